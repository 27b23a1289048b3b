"""Another data set than a run was trained on: which of its images can say how good the model is.

Scoring on data from elsewhere is what CLAIM 2024 calls external testing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.cell_names import ClassMatch, match_classes
from ..data.dataset import Dataset
from ..data.provenance import digest, known_photos, with_photos
from ..errors import BloodcellError
from ..training.runs import Run
from .evaluation import auroc_ci, bootstrap_ci


@dataclass(frozen=True)
class External:
    """A data set a model was not trained on, as far as the model can be tried on it.

    Attributes:
        root: its folder.
        subset: the only folder of it that was looked at; empty: all of it.
        table: the image table without the images of training and of classes that are too broad.
            ``label`` is the model's name of the class, if it has one; ``theirs`` the data set's.
        match: which class is which.
        excluded: images left out because the model was trained on them, or on another copy of
            their photograph.
        too_broad: images left out because the model knows several parts of their class.
        validated: images of ``table`` that the run was validated on.
        unchecked: training images that are gone, so that nobody can tell if they are in ``table``.
        warnings: what the user must know about the data set.
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
        BloodcellError: there is no such subset; no class of the data is one of the model's; the
            model was trained on every image that could be scored.
    """
    table = _of_subset(with_photos(dataset.table, dataset.root), subset)
    classes, labels = run.config.classes, sorted(set(table.label))
    match = match_classes(classes, labels)
    if not match.mapped:
        raise BloodcellError(
            f"{dataset.root} shares no class with the model.",
            f"The model knows {', '.join(classes)}; the data set has {', '.join(labels)}. "
            "Rename its folders to the model's classes where they mean the same.",
        )
    parts = run.table
    training = parts.path[parts.part == "train"]
    seen = seen_in_training(table, training)
    broad = table.label.isin(match.too_broad).to_numpy() & ~seen
    left = table[~seen & ~broad].reset_index(drop=True)
    left = left.assign(theirs=left.label, label=left.label.replace(match.mapped))
    if not left.theirs.isin(match.mapped).any():
        raise BloodcellError(
            f"Run {run.name} was trained on every image of {dataset.root} that could be scored.",
            "Give images it has not seen, such as those of another laboratory.",
        )
    return External(
        root=dataset.root,
        subset=subset or "",
        table=left,
        match=match,
        excluded=int(seen.sum()),
        too_broad=int(broad.sum()),
        validated=int(_same_files(left.path, parts.path[parts.part == "valid"]).sum()),
        unchecked=sum(not Path(path).is_file() for path in training),
        warnings=dataset.warnings + _unreadable(dataset),
    )


def seen_in_training(table: pd.DataFrame, training: Sequence[str]) -> np.ndarray:
    """Which images of a table were trained on, or are copies of a photograph that was.

    Files are compared by their bytes, whatever their names. Photographs are known to be the same
    within the table, and by the table of the Kaggle set, which is the same for all of its copies.

    Args:
        table: image table with its ``photo``.
        training: paths of the training images.

    Returns:
        bool (images,).
    """
    same = _same_files(table.path, training)
    of_trained = table.photo.isin(set(table.photo[same]))
    trained = set(known_photos(training).photo)
    found = known_photos(table.path)
    kaggle = table.path.isin(found.path[found.photo.isin(trained)])
    return (same | of_trained | kaggle).to_numpy()


def external_metrics(external: External, distance: np.ndarray, threshold: float) -> dict:
    """What ``metrics.json`` holds under ``external``: what became of the images, in numbers, the
    classes (:func:`count_classes`) and :func:`unlike_training`."""
    return {
        "excluded": external.excluded,
        "too_broad": external.too_broad,
        "validated": external.validated,
        "unchecked": external.unchecked,
        "missing": list(external.match.missing),
        "classes": count_classes(external, distance > threshold),
    } | unlike_training(external, distance, threshold)


def unlike_training(external: External, distance: np.ndarray, threshold: float) -> dict:
    """How well the distance to the training images tells classes the model does not know.

    Args:
        external: the data set.
        distance: float (images of its table,), to the training images.
        threshold: beyond it an image is flagged as unlike training.

    Returns:
        Plain numbers for ``metrics.json``: ``n_unknown``; ``flagged_known`` and
        ``flagged_unknown``, shares of the images flagged; ``auroc``, how often an image of an
        unknown class is further away than one of a known class; each with its 95 % interval from
        resampled photographs. None where there are no images of one kind.
    """
    unknown, photos = ~external.known, external.table.photo
    flagged = distance > threshold
    result: dict = {"n_unknown": int(unknown.sum())}
    for name, rows in {"flagged_known": ~unknown, "flagged_unknown": unknown}.items():
        result |= {name: None, f"{name}_ci95": None}
        if rows.any():
            result[name] = float(flagged[rows].mean())
            result[f"{name}_ci95"] = bootstrap_ci(flagged[rows], photos[rows])
    area, bounds = auroc_ci(distance, unknown, photos)
    return result | {"auroc": area, "auroc_ci95": bounds}


def count_classes(external: External, flagged: np.ndarray) -> list[dict]:
    """For each class of the data its name there, ``theirs``, the model's ``label`` (None: it has
    none), how many ``images`` and ``photos``, and the share ``flagged`` as unlike training; the
    classes that are scored come first."""
    table, mapped = external.table.assign(flagged=flagged), external.match.mapped
    rows = [
        {
            "theirs": theirs,
            "label": mapped.get(theirs),
            "images": len(images),
            "photos": int(images.photo.nunique()),
            "flagged": float(images.flagged.mean()),
        }
        for theirs, images in table.groupby("theirs")
    ]
    return sorted(rows, key=lambda row: row["label"] is None)


def describe_external(external: External) -> list[str]:
    """What was mapped to what, what is missing and what was left out, a sentence each."""
    match, known = external.match, int(external.known.sum())
    pairs = ", ".join(f"{theirs} as {own}" for theirs, own in match.mapped.items())
    lines = [f"Scored: {known:,} images ({pairs})."]
    if match.missing:
        lines.append(
            f"Classes of the model without a counterpart here: {', '.join(match.missing)}. "
            "Macro F1 and balanced accuracy are means over the other classes."
        )
    if match.unknown:
        lines.append(
            f"Classes the model does not know: {', '.join(match.unknown)}. Their "
            f"{external.n_unknown:,} images are not scored, as no answer would be right; they "
            "show whether the model notices what it does not know."
        )
    if match.too_broad:
        lines.append(
            f"Left out: {external.too_broad:,} images of {', '.join(match.too_broad)}, of which "
            "the model knows only parts."
        )
    lines += _describe_excluded(external)
    if external.validated:
        lines.append(
            f"{external.validated:,} of the images are the run's own validation images, on which "
            "its best epoch was chosen and its probabilities were calibrated."
        )
    return lines


def _describe_excluded(external: External) -> list[str]:
    lines = []
    if external.excluded:
        lines.append(
            f"Left out as trained on: {external.excluded:,} images, which are training images or "
            "copies of the photographs behind them."
        )
    if external.unchecked:
        lines.append(
            f"NOT CHECKED: {external.unchecked:,} training images are gone, so that nobody can "
            "tell whether some of them are scored here as if they were new."
        )
    return lines or ["Left out as trained on: none; no file is one of the training images."]


def _of_subset(table: pd.DataFrame, subset: str | None) -> pd.DataFrame:
    if subset is None:
        return table
    chosen = table[table.subset.str.lower() == subset.lower()]
    if chosen.empty:
        there = ", ".join(sorted(set(table.subset) - {""})) or "none"
        raise BloodcellError(
            f"The data set has no subset {subset}.", f"Its folders of classes are: {there}."
        )
    return chosen.reset_index(drop=True)


def _same_files(paths: pd.Series, others: Sequence[str]) -> pd.Series:
    """Whether each file has the bytes of one of the others, bool (paths,)."""
    return paths.map(digest).isin({digest(path) for path in others} - {""})


def _unreadable(dataset: Dataset) -> tuple[str, ...]:
    n = len(dataset.unreadable)
    return (f"{n:,} unreadable images are left out.",) if n else ()
