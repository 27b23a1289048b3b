"""Which images train and which validate, and whether copies of one photograph are in both."""

import math
import re
import unicodedata
import warnings
from typing import Literal

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from ..errors import DataError, UsageError

VALID_FRACTION = 0.2
_TRIES = 8  # shuffles of which the best balanced fold is taken
SubsetPart = Literal["train", "valid", "test", ""]
_LONG_WORDS: dict[str, SubsetPart] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "valid"),
    **dict.fromkeys(("test", "tests", "testing", "holdout"), "test"),
    # German, French, Italian, Portuguese, Spanish, Turkish, Russian, Chinese
    **dict.fromkeys(("trainingsdaten", "apprentissage", "entraînement", "addestramento"), "train"),
    **dict.fromkeys(("treino", "treinamento", "entrenamiento", "eğitim", "обучение"), "train"),
    **dict.fromkeys(("训练", "训练集", "訓練", "訓練集"), "train"),
    **dict.fromkeys(("validierung", "validierungsdaten", "validazione", "validação"), "valid"),
    **dict.fromkeys(("validación", "doğrulama", "валидация", "验证", "验证集", "驗證集"), "valid"),
    **dict.fromkeys(("testdaten", "teste", "prueba", "pruebas", "тест"), "test"),
    **dict.fromkeys(("测试", "测试集", "測試", "測試集"), "test"),
}
# These mean other things too, beside other words: Tr1 is a kind of T cell. "development" is not
# here: in medicine a model is trained on the development set.
_SHORT_WORDS: dict[str, SubsetPart] = {
    **dict.fromkeys(("tr", "trn"), "train"),
    **dict.fromkeys(("dev", "eval", "evaluation"), "valid"),
    "tst": "test",
}
_SUBSET_WORDS = _LONG_WORDS | _SHORT_WORDS
_NOUNS = {
    *("set", "sets", "data", "dataset", "split"),
    *("image", "images", "img", "imgs", "photos", "pictures"),
}
_FILLERS = {
    *("final", "prelim", "preliminary", "phase", "simple"),
    *("internal", "external", "public", "private"),
    *("original", "raw", "cropped", "resized", "aug", "augmented", "balanced"),
    *("cell", "cells", "wbc"),
}
_GLUED = re.compile(
    rf"({'|'.join(_SUBSET_WORDS)})({'|'.join(sorted(_NOUNS))})|(train|val|test)([ab])"
)
_HOLDOUT = re.compile(r"(?<![^\W_])h(old|eld)[\W_]?out(?![^\W_])", re.IGNORECASE)
SPLIT_DESCRIPTIONS = {
    "photo": "by photograph: about a fifth of every class for validation, and of each class at "
    "least one photograph, no photograph in both parts; the data set's own test folder, if it has "
    "one, is left for the end",
    "official": "the data set's own training and validation folders",
    "random": "a stratified random fifth of the images for validation, whatever their photograph "
    "(the published protocol)",
}


def subset_part(name: str) -> SubsetPart:
    """What the name of a folder says its images are for; empty where it says nothing of it.

    In any case, with separators, camel case, numbers and words such as "set" or "images". A name
    with other words counts where these are in front and "data" or the like is at the end, as in
    ``C-NMC_training_data``: ``Coombs test`` may be a class. One that names two parts, as
    ``train_test`` does, says nothing.

    Args:
        name: of the folder, without its parents.

    Examples:
        >>> from bloodcell_fastai.data.splits import subset_part
        >>> [subset_part(name) for name in ("01_Training Set", "val2017", "TestA", "testis")]
        ['train', 'valid', 'test', '']
    """
    name = unicodedata.normalize("NFC", name)
    return _part_of_words(re.sub("(?<=[a-z])(?=[A-Z])", " ", name)) or _part_of_words(name)


def _part_of_words(name: str) -> SubsetPart:
    words: list[str] = []
    for word in re.findall(r"[^\W\d_]+|\d+", _HOLDOUT.sub("holdout", name).lower()):
        glued = _GLUED.fullmatch(word)
        words += filter(None, glued.groups()) if glued else [word]
    parts = {_SUBSET_WORDS[word] for word in words if word in _SUBSET_WORDS}
    if len(parts) != 1:
        return ""
    first = next(index for index, word in enumerate(words) if word in _SUBSET_WORDS)
    before, after = words[:first], words[first + 1 :]
    if not all(map(_adds_nothing, after)):
        return ""
    if words[first] in _SHORT_WORDS:
        said = all(map(str.isdigit, before)) and (not after or after[0] in _NOUNS)
    else:
        said = all(map(_adds_nothing, before)) or words[-1] in _NOUNS
    return parts.pop() if said else ""


def _adds_nothing(word: str) -> bool:
    """Whether a word beside "train" or "test" leaves its meaning as it is."""
    known = word in _LONG_WORDS or word in _NOUNS or word in _FILLERS
    return known or word.isdigit() or len(word) == 1


def split_table(table: pd.DataFrame, how: str = "photo", seed: int = 42) -> pd.DataFrame:
    """Assign every image to training, validation or test.

    A test folder beside other images is for the end: with ``photo`` and, where there is a
    validation folder too, with ``official`` it neither trains nor chooses the best epoch. Its
    images of classes that are not trained on are left out.

    A class of the training part may be missing from validation; :func:`describe_gaps` tells.

    Args:
        table: image table with ``label``, ``subset`` and ``photo``.
        how: ``random``, a stratified fifth of all images, those of a test folder too (the
            published protocol), but at least as many as there are classes; ``official``, the data
            set's own folders, training against validation, or against test where there is no
            other; ``photo``, about a fifth of every class, in images and in photographs, with no
            photograph in both. Of a class of two to four photographs it takes one.
        seed: of the random choice; ``official`` has none.

    Returns:
        The table with the column ``part``, which is ``train``, ``valid``, ``test`` or empty
        (unused).

    Raises:
        BloodcellError: ``how`` is none of the three, the table cannot be split that way, there is
            nothing to validate on, or a class of the validation part is not in training.

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
    trained = result.label.isin(result.label[result.part == "train"])
    return result.assign(part=result.part.mask((result.part == "test") & ~trained, ""))


def split_folds(table: pd.DataFrame, folds: int, seed: int = 42) -> list[pd.DataFrame]:
    """The image table split ``folds`` times, each photograph validating exactly once.

    All images take part; see :func:`held_out` for those that should not.

    Raises:
        BloodcellError: a class has fewer photographs than there are folds, or would be missing
            from the training part of one.
    """
    fewest = _require_two_photos(table)
    if fewest.min() < folds:
        raise DataError(
            f"Class {fewest.idxmin()} has {fewest.min()} photographs, too few for {folds} folds.",
            f"Use `folds={fewest.min()}` or fewer, add photographs of it, or leave the class out.",
        )
    tables = [
        table.assign(part=_parts(table, valid)) for valid in _grouped_folds(table, folds, seed)
    ]
    for number, split in enumerate(tables, start=1):
        # Photographs of several classes, such as patients, cannot always be spread evenly.
        if missing := set(split.label) - set(split.label[split.part == "train"]):
            raise DataError(
                f"Fold {number} of {folds} holds every photograph of {', '.join(sorted(missing))}, "
                "of which none is left to train on.",
                "Use another `seed` or fewer `folds`.",
            )
    return tables


def describe_gaps(table: pd.DataFrame) -> tuple[str, ...]:
    """What a split cannot tell of some classes, in sentences for the user.

    Args:
        table: image table with ``subset`` and ``part``.

    Returns:
        Classes of the training part without images for validation or in the test set, and those
        that are left out because they are not trained on.

    Examples:
        >>> import pandas as pd
        >>> from bloodcell_fastai.data.splits import describe_gaps
        >>> rows = [("A", "train", "train"), ("B", "train", "train"), ("A", "val", "valid")]
        >>> table = pd.DataFrame(rows, columns=["label", "subset", "part"])
        >>> describe_gaps(table)
        ('No validation image of B: nothing measures how well it is recognised.',)
    """
    train, valid, test = (
        set(table.label[table.part == part]) for part in ("train", "valid", "test")
    )
    unseen = table[(table.part == "") & ~table.label.isin(train)]
    gaps = (
        (
            train - valid - test,
            "No validation image of {names}: nothing measures how well {it_is} recognised.",
        ),
        (
            train & test - valid,
            "No validation image of {names}: only the test set measures how well {it_is} "
            "recognised.",
        ),
        (
            valid - test if test else set(),
            "No test image of {names}: the score of the test set says nothing of {it}.",
        ),
        (
            set(unseen.label),
            "Only in {folders}, never in training: {names}. The model cannot know {it}; images "
            "left out: {n:,}.",
        ),
    )
    return tuple(
        text.format(
            names=", ".join(sorted(names)),
            it="it" if len(names) == 1 else "them",
            it_is="it is" if len(names) == 1 else "they are",
            folders=", ".join(sorted(set(unseen.subset) - {""})) or "other folders",
            n=len(unseen),
        )
        for names, text in gaps
        if names
    )


def kept_split(table: pd.DataFrame, how: str) -> str:
    """``how``, or ``official`` for a ``photo`` split of data with its own validation folder."""
    has_both = {"train", "valid"} <= set(_subset_parts(table))
    return "official" if how == "photo" and has_both else how


def held_out(table: pd.DataFrame) -> pd.Series:
    """Which images are in a test folder beside other images, bool (images,)."""
    test = _subset_parts(table) == "test"
    return test & ~test.all()


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


def _subset_parts(table: pd.DataFrame) -> pd.Series:
    """:func:`subset_part` of each image's folder."""
    return table.subset.map({name: subset_part(name) for name in table.subset.unique()})


def _test_set(table: pd.DataFrame) -> pd.Series:
    """Which images of :func:`held_out` to score at the end: no photograph twice."""
    outside = held_out(table)
    # Kaggle's TEST_SIMPLE repeats photographs of TEST.
    named = outside & ~table.subset.str.contains("simple", case=False)
    return named if named.any() else outside


def _split_photos(table: pd.DataFrame, seed: int) -> pd.Series:
    shares = _Shares(table)
    # scikit-learn makes no more folds than the largest class has photographs.
    n_splits = min(round(1 / VALID_FRACTION), _require_two_photos(table).max())
    # Where each image is its own photograph the first shuffle is as good as any.
    tries = range(seed, seed + (_TRIES if count_known(table) else 1))
    choices = []
    for each in tries:
        for rows in _grouped_folds(table, n_splits, each):
            valid = np.zeros(shares.photo_of_image.max() + 1, bool)
            valid[shares.photo_of_image[table.index.get_indexer(rows)]] = True
            choices.append(shares.mend(valid, each))
    best = min(choices, key=lambda valid: shares.fault(shares.count(valid)))
    return _parts(table, table.index[best[shares.photo_of_image]])


class _Shares:
    """What each class of a table has in validation, for a choice of photographs.

    A class should have a fifth of its images and of its photographs there, or one photograph where
    that is more, as in small classes. A class of few photographs with many copies each may have the
    one and not the other. A choice is a bool (photographs,), true for validation.
    """

    def __init__(self, table: pd.DataFrame):
        self.photo_of_image = pd.factorize(photo_groups(table))[0]
        codes = {"photo": self.photo_of_image, "label": pd.factorize(table.label)[0]}
        # A row for each class that a photograph shows, which may be several; sorted by photograph.
        pairs = pd.DataFrame(codes).groupby(["photo", "label"]).size().reset_index(name="images")
        self.photo, self.label, self.copies = pairs.to_numpy().T
        self.total = np.stack([np.bincount(self.label, self.copies), np.bincount(self.label)])
        self.goal = np.maximum(VALID_FRACTION, 1 / self.total[1])
        self.small = self.goal > VALID_FRACTION
        # With unequal copies no photograph of a small class may hold the right share of its images.
        distance = (pairs.images / self.total[0, self.label] - self.goal[self.label]).abs()
        nearest = distance.groupby(self.label).min().to_numpy()
        self.unavoidable = np.stack([np.where(self.small, nearest, 0), np.zeros(len(nearest))])

    def count(self, valid: np.ndarray) -> np.ndarray:
        """Images and photographs of each class in validation, float64 (2, classes)."""
        chosen, n = valid[self.photo], self.total.shape[1]
        copies = np.bincount(self.label, self.copies * chosen, n)
        return np.stack([copies, np.bincount(self.label, chosen, n)])

    def fault(self, counts: np.ndarray) -> tuple[int, int, float, list[float]]:
        """How wrong a choice is, to compare: classes that training lacks, classes that validation
        lacks, how far the worst large class is from its share, how far each small one is, the worst
        first. So no small class bends the split of the large ones."""
        off = (np.abs(counts / self.total - self.goal) - self.unavoidable).max(axis=0)
        return (
            int((counts[1] == self.total[1]).sum()),
            int((counts[1] == 0).sum()),
            float(off[~self.small].max(initial=0)),
            np.sort(off[self.small])[::-1].tolist(),
        )

    def mend(self, valid: np.ndarray, seed: int) -> np.ndarray:
        """Move photographs of small classes to the other side while that is better: folds leave
        some of them without any in validation."""
        rng, valid, counts = np.random.default_rng(seed), valid.copy(), self.count(valid)
        for label in np.flatnonzero(self.small):
            own, improves = rng.permutation(self.photo[self.label == label]), True
            while improves:
                moved = [self._move(one, valid, counts) for one in own]
                faults = [self.fault(each) for each in moved]
                best = faults.index(min(faults))
                improves = faults[best] < self.fault(counts)
                if improves:
                    valid[own[best]] ^= True
                    counts = moved[best]
        return valid

    def _move(self, photo: int, valid: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The counts with one photograph on its other side."""
        start, end = np.searchsorted(self.photo, [photo, photo + 1])
        sign, moved = -1 if valid[photo] else 1, counts.copy()
        moved[:, self.label[start:end]] += sign * np.stack(
            [self.copies[start:end], np.ones(end - start)]
        )
        return moved


def _grouped_folds(table: pd.DataFrame, n_splits: int, seed: int) -> list[pd.Index]:
    """The validation rows of each fold."""
    # The grouped kind places one group after the other, which takes minutes for 100,000.
    grouped = count_known(table) > 0
    folds = (StratifiedGroupKFold if grouped else StratifiedKFold)(
        n_splits, shuffle=True, random_state=seed
    )
    with warnings.catch_warnings():
        # _Shares sees to the classes with fewer photographs than there are folds.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        groups = photo_groups(table) if grouped else None
        return [table.index[valid] for _, valid in folds.split(table.path, table.label, groups)]


def _require_two_photos(table: pd.DataFrame) -> pd.Series:
    """The photographs of each class, of which it needs two to be in both parts."""
    counts = photo_groups(table).groupby(table.label).nunique()
    if counts.min() < 2:
        label = counts.idxmin()
        hint = "Add photographs of it, or leave the class out."
        if (table.label == label).sum() > 1:
            hint = (
                "Add photographs of it, leave the class out, or use `split=random` and read its "
                "score with care."
            )
        raise DataError(
            f"Class {label} has a single photograph or patient, which cannot be on both sides of a "
            "split.",
            hint,
        )
    return counts


def _official(table: pd.DataFrame, seed: int) -> pd.Series:
    """``part`` by the names of the folders."""
    subset, test = _subset_parts(table), _test_set(table)
    train, valid = subset == "train", subset == "valid"
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
    """Refuse a split whose classes cannot be trained on, or without any validation."""
    train = set(table.label[table.part == "train"])
    valid = table[table.part == "valid"]
    if set(valid.label) - train:
        untrained = valid[~valid.label.isin(train)].groupby("label").subset.unique()
        names = (
            f"{label} (in {', '.join(sorted(subsets))})" if any(subsets) else label
            for label, subsets in untrained.items()
        )
        raise DataError(
            f"Only in validation, never in training: {', '.join(names)}.",
            "Rename the folder to the training class it belongs to, add images of it to training, "
            "or remove it.",
        )
    if len(train) < 2:
        raise DataError(
            f"Training needs two classes or more; found {', '.join(sorted(train)) or 'none'}.",
            "Give a folder with one sub-folder per class.",
        )
    if valid.empty:
        raise DataError("No image is left for validation.", "Add images.")
