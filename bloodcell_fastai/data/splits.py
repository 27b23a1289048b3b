"""Which images train and which validate, and whether copies of one photograph are in both."""

import math

import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from ..errors import DataError, UsageError

VALID_FRACTION = 0.2
_TRIES = 8  # shuffles of which the best balanced fold is taken
_TRAIN_NAMES = ("train", "training")
_VALID_NAMES = ("valid", "val", "validation")
_TEST_NAMES = ("test", "testing")
_MORE_TEST_NAMES = ("test_simple",)  # Kaggle's repeats photographs of TEST
SPLIT_DESCRIPTIONS = {
    "photo": "by photograph: about a fifth of every class for validation, no photograph in both "
    "parts; the data set's own test folder, if it has one, is left for the end",
    "official": "the data set's own training and validation folders",
    "random": "a stratified random fifth of the images for validation, whatever their photograph "
    "(the published protocol)",
}


def split_table(table: pd.DataFrame, how: str = "photo", seed: int = 42) -> pd.DataFrame:
    """Assign every image to training, validation or test.

    The test folder of data with a training folder is for the end: with ``photo`` and, where there
    is a validation folder too, with ``official`` it neither trains nor chooses the best epoch.

    Args:
        table: image table with ``label``, ``subset`` and ``photo``.
        how: ``random``, a stratified fifth of all images, those of a test folder too (the
            published protocol), but at least as many as there are classes; ``official``, the data
            set's own folders, training against validation, or against test where there is no
            other; ``photo``, about a fifth of every class, in images and in photographs, with no
            photograph in both.
        seed: of the random choice; ``official`` has none.

    Returns:
        The table with the column ``part``, which is ``train``, ``valid``, ``test`` or empty
        (unused).

    Raises:
        BloodcellError: ``how`` is none of the three, the table cannot be split that way, or a
            class would be missing from training or from validation.

    Examples:
        >>> from bloodcell_fastai import leakage, open_dataset, split_table
        >>> table = open_dataset("demo").table
        >>> split = split_table(table, "photo")
        >>> sorted(split.part[split.part != ""].unique())
        ['test', 'train', 'valid']
        >>> leakage(split)
        0.0
    """
    ways = {"random": _random, "official": _official, "photo": _by_photo}
    if how not in ways:
        raise UsageError(f"how is {how!r}.", f"Use one of: {', '.join(ways)}.")
    result = table.assign(part=ways[how](table, seed))
    _check_classes(result)
    return result


def split_folds(table: pd.DataFrame, folds: int, seed: int = 42) -> list[pd.DataFrame]:
    """The image table split ``folds`` times, each photograph validating exactly once.

    All images take part; see :func:`held_out` for those that should not.

    Raises:
        BloodcellError: a class has fewer photographs than there are folds.
    """
    fewest = _require_two_photos(table)
    if fewest.min() < folds:
        raise DataError(
            f"Class {fewest.idxmin()} has {fewest.min()} photographs, too few for {folds} folds.",
            f"Use `folds={fewest.min()}` or fewer.",
        )
    return [table.assign(part=_parts(table, valid)) for valid in _grouped_folds(table, folds, seed)]


def kept_split(table: pd.DataFrame, how: str) -> str:
    """``how``, or ``official`` for a ``photo`` split of data with its own validation folder."""
    names = set(table.subset.str.lower())
    has_both = names & set(_TRAIN_NAMES) and names & set(_VALID_NAMES)
    return "official" if how == "photo" and has_both else how


def held_out(table: pd.DataFrame) -> pd.Series:
    """Which images are in a test folder beside a training folder, bool (images,)."""
    subset = table.subset.str.lower()
    return subset.isin([*_TEST_NAMES, *_MORE_TEST_NAMES]) & subset.isin(_TRAIN_NAMES).any()


def leakage(table: pd.DataFrame) -> float | None:
    """Fraction of the validation images whose photograph is also in training.

    Args:
        table: image table with ``photo`` and ``part``.

    Returns:
        0 to 1; None where no photograph of the two parts is known. Images whose photograph is not
        known count as photographs of their own: with :func:`count_known` below the number of images
        the result is a lower bound.

    Examples:
        >>> from bloodcell_fastai import leakage, open_dataset, split_table
        >>> table = open_dataset("demo").table
        >>> leakage(split_table(table, "random")) > 0.9
        True
        >>> leakage(split_table(table, "photo"))
        0.0
    """
    table = table[table.part.isin(["train", "valid"])]
    if not count_known(table):
        return None
    groups = photo_groups(table)
    train, valid = groups[table.part == "train"], groups[table.part == "valid"]
    return float(valid.isin(set(train)).mean())


def describe_leakage(leakage: float | None, n_known: int, n_images: int) -> str:
    """The leakage of a split in words, of ``n_images`` of which ``n_known`` have a photograph."""
    if leakage is None:
        return "unknown: which images show the same photograph is not known; see bloodcell audit"
    partly = ""
    if n_known < n_images:
        partly = f"; only {n_known:,} of {n_images:,} images have a known photograph"
    if leakage == 0:
        none = "none found" if partly else "none"
        return f"{none}: no validation image has a copy of its photograph in training{partly}"
    meaning = "is better than it would be on new photographs"
    if leakage >= 0.5:
        meaning = "measures memory, not accuracy on new photographs"
    return (
        f"{leakage:.1%} of the validation images have a copy of their own photograph in training: "
        f"the score {meaning}{partly}"
    )


def photo_groups(table: pd.DataFrame) -> pd.Series:
    """The unit of independence of each image: its photograph, or its path where that is unknown."""
    return table.photo.where(table.photo != "", table.path)


def count_known(table: pd.DataFrame) -> int:
    """How many images of a table have a known photograph."""
    return int((table.photo != "").sum())


def _random(table: pd.DataFrame, seed: int) -> pd.Series:
    smallest = table.label.value_counts()
    if smallest.min() < 2:
        raise DataError(
            f"Class {smallest.idxmin()} has a single image, too few to split.",
            "Add images to it or remove the class.",
        )
    # With fewer than there are classes, not every class could have one.
    n_valid = max(math.ceil(VALID_FRACTION * len(table)), table.label.nunique())
    _, valid = train_test_split(
        table.index, test_size=n_valid, stratify=table.label, random_state=seed
    )
    return _parts(table, valid)


def _by_photo(table: pd.DataFrame, seed: int) -> pd.Series:
    """``part``: the photographs outside of the test set are split, and that is marked as such."""
    outside = table[~held_out(table)]
    part = _split_photos(outside, seed)
    return part.reindex(table.index, fill_value="").mask(_test_set(table), "test")


def _test_set(table: pd.DataFrame) -> pd.Series:
    """Which images of :func:`held_out` to score at the end: no photograph twice."""
    subset, outside = table.subset.str.lower(), held_out(table)
    named = outside & subset.isin(_TEST_NAMES)
    return named if named.any() else outside


def _split_photos(table: pd.DataFrame, seed: int) -> pd.Series:
    n_splits = min(round(1 / VALID_FRACTION), _require_two_photos(table).min())
    # Where each image is its own photograph the first shuffle is as good as any.
    tries = range(seed, seed + (_TRIES if count_known(table) else 1))
    folds = [fold for each in tries for fold in _grouped_folds(table, n_splits, each)]
    return _parts(table, min(folds, key=lambda valid: _imbalance(table, valid)))


def _grouped_folds(table: pd.DataFrame, n_splits: int, seed: int) -> list[pd.Index]:
    """The validation rows of each fold."""
    # The grouped kind places one group after the other, which takes minutes for 100,000.
    grouped = count_known(table) > 0
    folds = (StratifiedGroupKFold if grouped else StratifiedKFold)(
        n_splits, shuffle=True, random_state=seed
    )
    split = folds.split(table.path, table.label, groups=photo_groups(table) if grouped else None)
    return [table.index[valid] for _, valid in split]


def _photos_per_class(table: pd.DataFrame) -> pd.Series:
    return photo_groups(table).groupby(table.label).nunique()


def _require_two_photos(table: pd.DataFrame) -> pd.Series:
    """The photographs of each class, of which it needs two to be in both parts."""
    counts = _photos_per_class(table)
    if counts.min() < 2:
        raise DataError(
            f"Class {counts.idxmin()} has a single photograph, which cannot be on both sides of a "
            "split.",
            "Add photographs of it, or use `split=random` and read its score with care.",
        )
    return counts


def _imbalance(table: pd.DataFrame, valid: pd.Index) -> float:
    """How far the worst class is from a fifth in validation, in images or in photographs.

    A class of few photographs with many copies each can be balanced in one and not in the other.
    """
    images = table.label[valid].value_counts() / table.label.value_counts()
    photos = _photos_per_class(table.loc[valid]) / _photos_per_class(table)
    fractions = pd.concat([images, photos]).fillna(0)
    return float((fractions - VALID_FRACTION).abs().max())


def _official(table: pd.DataFrame, seed: int) -> pd.Series:
    """``part`` by the names of the folders."""
    subset = table.subset.str.lower()
    train, valid, test = subset.isin(_TRAIN_NAMES), subset.isin(_VALID_NAMES), _test_set(table)
    part = train.map({True: "train", False: ""})
    if train.any() and valid.any():
        return part.mask(valid, "valid").mask(test, "test")
    if train.any() and test.any():
        return part.mask(test, "valid")
    raise DataError(
        "The data set has no folders of its own for training and validation.",
        "Use `split=photo` or `split=random`.",
    )


def _parts(table: pd.DataFrame, valid: pd.Index) -> pd.Series:
    return pd.Series("train", index=table.index).where(~table.index.isin(valid), "valid")


def _check_classes(table: pd.DataFrame) -> None:
    """Refuse a split whose classes cannot be trained on or validated."""
    train = set(table.label[table.part == "train"])
    valid = set(table.label[table.part == "valid"])
    if valid - train:
        raise DataError(
            f"Only in validation, never in training: {', '.join(sorted(valid - train))}.",
            "Rename the folder to the training class it belongs to, or remove it.",
        )
    if len(train) < 2:
        raise DataError(
            f"Training needs two classes or more; found {', '.join(sorted(train)) or 'none'}.",
            "Give a folder with one sub-folder per class.",
        )
    if not valid:
        raise DataError("No image is left for validation.", "Add images.")
