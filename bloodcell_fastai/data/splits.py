"""Which images train and which validate, and how far the two share photographs."""

import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from ..errors import BloodcellError, usage_error

VALID_SHARE = 0.2
_TRIES = 8  # shuffles of which the best balanced fold is taken
_TRAIN_NAMES = ("train", "training")
_VALID_NAMES = (("valid", "val", "validation"), ("test", "testing"))


def split_table(table: pd.DataFrame, how: str = "photo", seed: int = 42) -> pd.DataFrame:
    """Say of every image whether it trains or validates.

    Args:
        table: image table with ``label``, ``subset`` and ``photo``.
        how: ``random``, a stratified fifth of all images (the published protocol);
            ``official``, the data set's own folders, TRAIN against TEST;
            ``photo``, about a fifth of every class, in images and in photographs, with no
            photograph on both sides.
        seed: of the random choice; ``official`` has none.

    Returns:
        The table with the column ``part``, which is ``train``, ``valid`` or empty (unused).

    Raises:
        BloodcellError: ``how`` is none of the three, the table cannot be split that way, or a
            class would be missing from training or from validation.

    Examples:
        >>> from bloodcell_fastai import leakage, open_dataset, split_table, with_photos
        >>> dataset = open_dataset("demo")
        >>> table = with_photos(dataset.table, dataset.root)
        >>> split = split_table(table, "photo")
        >>> sorted(split.part.unique())
        ['train', 'valid']
        >>> leakage(split)
        0.0
    """
    ways = {"random": _random, "official": _official, "photo": _by_photo}
    if how not in ways:
        raise usage_error(f"The split is {how!r}.", f"Use one of: {', '.join(ways)}.")
    result = table.assign(part=ways[how](table, seed))
    _check_classes(result)
    return result


def split_folds(table: pd.DataFrame, folds: int, seed: int = 42) -> list[pd.DataFrame]:
    """The image table split ``folds`` times, each photograph validating exactly once.

    Raises:
        BloodcellError: a class has fewer photographs than there are folds.
    """
    fewest = table.groupby("label").photo.nunique()
    if fewest.min() < folds:
        raise BloodcellError(
            f"Class {fewest.idxmin()} has {fewest.min()} photographs, too few for {folds} folds.",
            f"Use --folds {fewest.min()} or fewer.",
        )
    return [table.assign(part=_parts(table, valid)) for valid in _grouped_folds(table, folds, seed)]


def kept_split(table: pd.DataFrame, how: str) -> str:
    """``how``, or ``official`` for a ``photo`` split of data with its own valid folder.

    Who made such a folder knows more about the data than a random choice does. A folder named
    test is no such sign: it is meant for the end, and Kaggle's shares photographs with TRAIN.
    """
    names = set(table.subset.str.lower())
    has_both = names & set(_TRAIN_NAMES) and names & set(_VALID_NAMES[0])
    return "official" if how == "photo" and has_both else how


def leakage(table: pd.DataFrame) -> float | None:
    """Share of validation images, 0 to 1, whose photograph is also in training.

    None if the photographs are not known, which is when every image is its own.

    Args:
        table: image table with ``photo`` and ``part``.

    Examples:
        >>> from bloodcell_fastai import leakage, open_dataset, split_table, with_photos
        >>> dataset = open_dataset("demo")
        >>> table = with_photos(dataset.table, dataset.root)
        >>> leakage(split_table(table, "random")) > 0.9
        True
        >>> leakage(split_table(table, "photo"))
        0.0
    """
    if not photos_known(table):
        return None
    train = table.photo[table.part == "train"]
    valid = table.photo[table.part == "valid"]
    return float(valid.isin(set(train)).mean())


def photos_known(table: pd.DataFrame) -> bool:
    """Whether the source photographs of the images are known (see the image table)."""
    return bool((table.photo != table.path).any())


def _random(table: pd.DataFrame, seed: int) -> pd.Series:
    smallest = table.label.value_counts()
    if smallest.min() < 2:
        raise BloodcellError(
            f"Class {smallest.idxmin()} has a single image, too few to split.",
            "Add images to it or remove the class.",
        )
    _, valid = train_test_split(
        table.index, test_size=VALID_SHARE, stratify=table.label, random_state=seed
    )
    return _parts(table, valid)


def _by_photo(table: pd.DataFrame, seed: int) -> pd.Series:
    photos_per_class = table.groupby("label").photo.nunique()
    if photos_per_class.min() < 2:
        raise BloodcellError(
            f"Class {photos_per_class.idxmin()} has a single photograph, which cannot be on "
            "both sides of a split.",
            "Add photographs of it, or use --split random and read its score with care.",
        )
    n_splits = min(round(1 / VALID_SHARE), photos_per_class.min())
    # Where each image is its own photograph the first shuffle is as good as any.
    tries = range(seed, seed + (_TRIES if photos_known(table) else 1))
    folds = [fold for each in tries for fold in _grouped_folds(table, n_splits, each)]
    return _parts(table, min(folds, key=lambda valid: _imbalance(table, valid)))


def _grouped_folds(table: pd.DataFrame, n_splits: int, seed: int) -> list[pd.Index]:
    """The validation rows of each fold."""
    # The grouped kind places one group after the other, which takes minutes for 100,000.
    grouped = photos_known(table)
    folds = (StratifiedGroupKFold if grouped else StratifiedKFold)(
        n_splits, shuffle=True, random_state=seed
    )
    split = folds.split(table.path, table.label, groups=table.photo if grouped else None)
    return [table.index[valid] for _, valid in split]


def _imbalance(table: pd.DataFrame, valid: pd.Index) -> float:
    """How far the worst class is from its share of validation, in images or in photographs.

    A class of few photographs with many copies each can be right in one and wrong in the other.
    """
    images = table.label[valid].value_counts() / table.label.value_counts()
    photos = (
        table.loc[valid].groupby("label").photo.nunique() / table.groupby("label").photo.nunique()
    )
    shares = pd.concat([images, photos]).fillna(0)
    return float((shares - VALID_SHARE).abs().max())


def _official(table: pd.DataFrame, seed: int) -> pd.Series:
    own = _own_parts(table)
    if own is None:
        raise BloodcellError(
            "The data set has no folders of its own for training and validation.",
            "Use --split photo or --split random.",
        )
    return own


def _own_parts(table: pd.DataFrame) -> pd.Series | None:
    """``part`` by the names of the folders; TEST_SIMPLE repeats photographs of TEST: unused."""
    subset = table.subset.str.lower()
    train = subset.isin(_TRAIN_NAMES)
    for names in _VALID_NAMES:
        valid = subset.isin(names)
        if train.any() and valid.any():
            part = pd.Series("", index=table.index)
            part[train], part[valid] = "train", "valid"
            return part
    return None


def _parts(table: pd.DataFrame, valid: pd.Index) -> pd.Series:
    part = pd.Series("train", index=table.index)
    part[valid] = "valid"
    return part


def _check_classes(table: pd.DataFrame) -> None:
    """A class must be learnt to be scored and scored to be trusted."""
    train = set(table.label[table.part == "train"])
    valid = set(table.label[table.part == "valid"])
    if valid - train:
        raise BloodcellError(
            f"Only in validation, never in training: {', '.join(sorted(valid - train))}.",
            "Rename the folder to the training class it belongs to, or remove it.",
        )
    if len(train) < 2:
        raise BloodcellError(
            f"Training needs two classes or more; found {', '.join(sorted(train)) or 'none'}.",
            "Give a folder with one sub-folder per class.",
        )
    if not valid:
        raise BloodcellError("No image is left for validation.", "Add images.")
