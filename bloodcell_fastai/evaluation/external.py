"""Another data set than a run was trained on: which of its images can say how good the model is.

Scoring on data from elsewhere is what CLAIM 2024 calls external testing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.class_names import ClassMatch, match_classes
from ..data.datasets import Dataset, describe_unreadable
from ..data.duplicates import digest, known_photos
from ..data.layouts import LabelSource
from ..data.splits import photo_groups
from ..errors import BloodcellError, DataError
from ..model.runs import Run
from .metrics import auroc_ci, proportion_ci


class NothingToScore(BloodcellError):
    """The model was trained on every image, or on copies of it."""


@dataclass(frozen=True)
class External:
    """A data set a model was not trained on, as far as the model can be tried on it.

    Attributes:
        root: its folder.
        subset: the only folder of it that was scored; empty: all of it.
        table: the image table without the images of training and of classes that are too broad.
            ``label`` is the model's name of the class, if it has one; ``theirs`` the data set's.
        match: which class is which.
        excluded: images left out because the model was trained on them, or on another copy of
            their photograph.
        too_broad: images left out because the model knows several parts of their class.
        validated: images of ``table`` that the run was validated on.
        unchecked: training images that are gone, which may be in ``table``.
        warnings: what the user must know about the data set.
        bits: what its images of 16 bits per sample use of them; None: there are none.
        label_source: what the user said about its labels.
    """

    root: Path
    subset: str
    table: pd.DataFrame
    match: ClassMatch
    excluded: int
    too_broad: int
    validated: int
    unchecked: int
    warnings: tuple[str, ...]
    bits: int | None
    label_source: LabelSource = field(default_factory=LabelSource)

    @property
    def name(self) -> str:
        """What to call it, by the names of the folder and the subset."""
        return f"{self.root.name} {self.subset}".strip()

    @property
    def known(self) -> np.ndarray:
        """Whether the model knows the class of each image of the table, bool (images,)."""
        return self.table.theirs.isin(self.match.mapped).to_numpy()

    @property
    def n_unknown(self) -> int:
        """Images of classes that the model does not know."""
        return int((~self.known).sum())


def open_external(run: Run, dataset: Dataset, subset: str | None = None) -> External:
    """Choose the images of a data set that a run's model can be tried on.

    Args:
        run: a trained run.
        dataset: any data set.
        subset: one of its folders of classes, such as ``TEST``, in any case; all by default.

    Raises:
        NothingToScore: the model was trained on every image that could be scored.
        BloodcellError: there is no such subset; no class of the data is one of the model's.
    """
    folders = dataset.table.subset.str.lower()
    chosen = folders.isin(folders if subset is None else [subset.lower()])
    if not chosen.any():
        there = ", ".join(sorted(set(dataset.table.subset) - {""})) or "none"
        raise DataError(
            f"The data set has no subset {subset}.", f"Its folders of classes are: {there}."
        )
    warnings = dataset.warnings
    if unreadable := dataset.unreadable:
        some = describe_unreadable(unreadable)
        warnings += (f"{len(unreadable):,} unreadable images are left out, such as {some}.",)
    external = _choose(
        run, dataset.root, dataset.table, chosen, subset or "", warnings, dataset.bits
    )
    return replace(external, label_source=dataset.label_source)


def open_test(run: Run) -> External:
    """The images of the run's own test folder, which neither trained nor chose the epoch.

    Args:
        run: a trained run whose table has the part ``test``.

    Raises:
        NothingToScore: the model was trained on every one of them, or on copies.
    """
    table = run.table
    chosen = table.part == "test"
    names = " + ".join(sorted(set(table.subset[chosen])))  # such as TestA and TestB
    return _choose(run, run.root, table, chosen, names, (), run.config.bits)


def _choose(
    run: Run,
    root: Path,
    table: pd.DataFrame,
    chosen: pd.Series,
    subset: str,
    warnings: tuple[str, ...],
    bits: int | None,
) -> External:
    """The ``chosen`` images of a table that the model can be tried on."""
    parts = run.table
    training, validation = (parts.path[parts.part == part] for part in ("train", "valid"))
    digests = table.path.map(digest)
    # Of the whole data set, before the subset is taken: a copy in another subset tells that the
    # photograph was trained on.
    seen = seen_in_training(table, digests, training)[chosen]
    validated = _same_files(digests, validation)[chosen]
    table = table[chosen]
    classes, labels = run.config.classes, sorted(set(table.label))
    match = match_classes(classes, labels)
    if not match.mapped:
        raise DataError(
            f"{root} has no class of the model.",
            f"The model knows {', '.join(classes)}; the data set has {', '.join(labels)}. "
            "Rename its folders to the model's classes where they mean the same.",
        )
    broad = table.label.isin(match.too_broad) & ~seen
    kept = ~seen & ~broad
    left = table[kept].reset_index(drop=True)
    left = left.assign(theirs=left.label, label=left.label.replace(match.mapped))
    if not left.theirs.isin(match.mapped).any():
        raise NothingToScore(
            f"Run {run.name} was trained on every image of {root} {subset}".rstrip()
            + " that could be scored.",
            "Give images it has not seen, such as those of another laboratory.",
        )
    return External(
        root=root,
        subset=subset,
        table=left,
        match=match,
        excluded=int(seen.sum()),
        too_broad=int(broad.sum()),
        validated=int(validated[kept].sum()),
        unchecked=sum(not Path(path).is_file() for path in training),
        warnings=warnings,
        bits=bits,
    )


def seen_in_training(table: pd.DataFrame, digests: pd.Series, training: Sequence[str]) -> pd.Series:
    """Which images of a table were trained on, or are copies of a photograph that was.

    Files are compared by their bytes, photographs within the table and by the table of Kaggle's
    set.

    Args:
        table: image table with its ``photo``.
        digests: hash of each of its files.
        training: paths of the training images.

    Returns:
        bool (images,), with the index of ``table``.
    """
    same = _same_files(digests, training)
    of_trained = (table.photo != "") & table.photo.isin(set(table.photo[same]))
    trained = set(known_photos(training).photo)
    found = known_photos(table.path)
    kaggle = table.path.isin(found.path[found.photo.isin(trained)])
    return same | of_trained | kaggle


def external_metrics(external: External, distance: np.ndarray, unlike: np.ndarray) -> dict:
    """What ``metrics.json`` holds under ``external``: what became of the images, and how well the
    distance to the training images detects classes the model does not know.

    Args:
        external: the data set.
        distance: float (images of its table,), from the training images.
        unlike: bool, whether it is beyond the run's threshold.

    Returns:
        ``excluded``, ``too_broad``, ``validated`` and ``unchecked``, numbers of images as in
        :class:`External`, and ``missing``, the classes of the model that the data set lacks.
        ``classes``: for each class of the data its name there, ``theirs``, the model's ``label``
        (None: it has none), how many ``images`` and ``photos``, and the fraction ``flagged`` as
        unlike training; the classes that are scored come first.
        ``n_unknown``; ``flagged_known`` and ``flagged_unknown``, fractions of the images flagged;
        ``auroc``, how often an image of an unknown class is further away than one of a known class;
        each with its 95 % interval. None where there are no images of one kind.
    """
    match, known, photos = external.match, external.known, photo_groups(external.table)
    table = external.table.assign(photo=photos, flagged=unlike)
    by_class = table.groupby("theirs").agg(
        images=("path", "size"), photos=("photo", "nunique"), flagged=("flagged", "mean")
    )
    classes = [
        {"theirs": theirs, "label": match.mapped.get(theirs), **row}
        for theirs, row in by_class.to_dict("index").items()
    ]
    counts = ("excluded", "too_broad", "validated", "unchecked", "n_unknown")
    result = {name: getattr(external, name) for name in counts}
    result |= {
        "missing": list(match.missing),
        "classes": sorted(classes, key=lambda row: row["label"] is None),
    }
    for name, rows in {"flagged_known": known, "flagged_unknown": ~known}.items():
        result[name] = float(unlike[rows].mean()) if rows.any() else None
        result[f"{name}_ci95"] = proportion_ci(unlike[rows], photos[rows])
    result["auroc"], result["auroc_ci95"] = auroc_ci(distance, ~known, photos)
    return result


def describe_external(external: External) -> list[str]:
    """How the classes were matched and what was left out, a sentence each."""
    match, known = external.match, int(external.known.sum())
    mapped = match.mapped.items()
    pairs = ", ".join(own if theirs == own else f"{theirs} as {own}" for theirs, own in mapped)
    lines = [f"Scored: {known:,} images ({pairs})."]
    if match.missing:
        lines.append(
            f"Classes of the model that the data set lacks: {', '.join(match.missing)}. "
            "Macro F1 and balanced accuracy are means over the other classes."
        )
    if match.unknown:
        lines.append(
            f"Classes that the model does not know: {', '.join(match.unknown)}. Their "
            f"{external.n_unknown:,} images have no correct prediction and are not scored. They "
            "show how well images of unknown classes are flagged."
        )
    if match.too_broad:
        lines.append(
            f"Left out: {external.too_broad:,} images of {', '.join(match.too_broad)}, of which "
            "the model knows only parts."
        )
    if external.excluded:
        lines.append(
            f"Left out as trained on: {external.excluded:,} images, which are training images or "
            "copies of their photographs."
        )
    if external.unchecked:
        lines.append(
            f"NOT CHECKED: {external.unchecked:,} training images are gone. Some of them may be "
            "scored here as if they were new."
        )
    if not external.excluded + external.unchecked:
        lines.append("Left out as trained on: none; no file is one of the training images.")
    if external.validated:
        lines.append(
            f"{external.validated:,} of the images are the run's own validation images, on which "
            "its best epoch was chosen and its probabilities were calibrated."
        )
    return lines


def _same_files(digests: pd.Series, others: Sequence[str]) -> pd.Series:
    """Whether each file has the bytes of one of the others, bool (digests,)."""
    return digests.isin({digest(path) for path in others} - {""})
