"""``bloodcell audit``: the photograph of each image, and the leakage of each split."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path

import pandas as pd

from ..config import SPLITS
from ..data.datasets import Dataset
from ..data.duplicates import (
    COLUMNS,
    digest,
    find_photos,
    known_photos,
    match_pair,
    overlap,
    write_known_photos,
)
from ..data.splits import leakage, split_table
from ..errors import BloodcellError, DataError
from ..files import write_json, write_table
from ..model.runs import Run, relative_to
from ..reporter import Progress, no_progress
from .figures import plot_copies, save_figure

Pair = tuple[str, str]
"""Paths of a training and of a validation image, copies of one photograph."""


@dataclass(frozen=True)
class Audit:
    """The photographs of a data set.

    Attributes:
        table: image table with ``photo`` (the field: overlapping photographs count as one),
            ``original`` (the photograph itself), ``inliers`` and ``margin``; see
            :func:`~bloodcell_fastai.find_photos`.
        splits: the split table of every possible split, by the name of the split.
        rebuilt: whether the photographs were found from the pixels just now.
    """

    table: pd.DataFrame
    splits: dict[str, pd.DataFrame]
    rebuilt: bool

    @property
    def leakages(self) -> dict[str, float | None]:
        """The proportion, 0 to 1, of the validation images of each split that have a copy of their
        photograph in training; None where the split is not possible."""
        names = dict.fromkeys([*SPLITS, *self.splits])
        return {name: leakage(self.splits[name]) if name in self.splits else None for name in names}

    @cached_property
    def contradictions(self) -> list[dict]:
        """The fields with more than one label, each with ``photo``, ``labels`` and ``overlap``.

        ``overlap`` is the largest proportion, 0 to 1, of a photograph that another one with another
        label shows too: near 1 they show the same cell, near 0 neighbouring cells.
        """
        return [
            {
                "photo": photo,
                "labels": group.label.value_counts().to_dict(),
                "overlap": _overlap_across_labels(group),
            }
            for photo, group in self.table.groupby("photo")
            if group.label.nunique() > 1
        ]

    @property
    def official_pairs(self) -> list[dict]:
        """Fields in both parts of the official split, and the photographs in each part."""
        if "official" not in self.splits:
            return []
        table = self.splits["official"]
        names = table[table.part != ""].groupby(["photo", "part"]).original.unique().unstack()
        shared = names.reindex(columns=["train", "valid"]).dropna()
        return [
            {"photo": photo, "train": sorted(train), "valid": sorted(valid)}
            for photo, train, valid in shared.itertuples()
        ]

    @property
    def summary(self) -> dict:
        """What ``audit.json`` holds."""
        copies = self.table.groupby("original").size()
        digests = self.table.path.map(digest)
        return {
            "n_images": len(self.table),
            "n_photographs": int(self.table.original.nunique()),
            "n_fields": int(self.table.photo.nunique()),
            "photographs_per_class": self.table.groupby("label").original.nunique().to_dict(),
            "copies_per_photograph": {
                "min": int(copies.min()),
                "median": float(copies.median()),
                "max": int(copies.max()),
            },
            "exact_duplicates": int(digests.duplicated().sum()),
            "contradictory_labels": self.contradictions,
            "leakage": self.leakages,
            "official_pairs": self.official_pairs,
        }


def audit(
    dataset: Dataset,
    rebuild: bool = False,
    run: Run | None = None,
    progress: Progress = no_progress,
) -> Audit:
    """Find the photograph of every image and measure the leakage of every split.

    Args:
        dataset: any data set; its originals are used if it has them.
        rebuild: find the photographs from the pixels even if the images are those of Kaggle's set.
        run: a run of this data set, whose split is measured too.
        progress: told how far the search has come.

    Returns:
        The photographs, and the table split in every possible way.

    Raises:
        BloodcellError: there are more images than can be compared, see
            :func:`~bloodcell_fastai.find_photos`; the run is of another data set.

    Examples:
        >>> from bloodcell_fastai import audit, make_demo, open_dataset
        >>> result = audit(open_dataset(make_demo("few", photos_per_class=4, copies=2)))
        >>> list(result.leakages)
        ['photo', 'official', 'random']
        >>> result.leakages["photo"]
        0.0
        >>> result.leakages["official"] > 0  # TRAIN and TEST have a field in common
        True
    """
    known = known_photos(dataset.table.path)
    if rebuilt := rebuild or len(known) < len(dataset.table):
        known = find_photos(
            dataset.table.path,
            dataset.originals,
            progress=lambda done, total, stage: progress(stage.capitalize(), done, total),
        )
    table = dataset.table.drop(columns="photo").merge(known[COLUMNS], on="path", how="left")
    splits: dict[str, pd.DataFrame] = {}
    for name in SPLITS:
        with suppress(BloodcellError):  # such as official for a data set without folders of its own
            splits[name] = split_table(table, name)
    if run is not None:
        splits[f"run {run.name}"] = _split_of(run, table, dataset.root)
    return Audit(table, splits, rebuilt)


def write_audit(result: Audit, out: Path, root: Path) -> list[Path]:
    """Write ``photos.csv``, ``audit.json`` and the figures into ``out``; return what was written.

    The paths in ``photos.csv`` are relative to ``root``: put into the data set's folder, it is
    read by ``bloodcell fit``.
    """
    write_table(out / "photos.csv", relative_to(result.table[["path", "photo"]], root))
    write_json(out / "audit.json", result.summary)
    written = [out / "photos.csv", out / "audit.json"]
    if result.rebuilt:  # the format of the table of Kaggle's set that ships with the package
        write_known_photos(result.table, out / "known_photos.csv.xz")
        written.append(out / "known_photos.csv.xz")
    for name, pairs in (
        ("copies-random", copy_pairs(result.splits.get("random"))),
        ("copies-official", official_pair_images(result)),
    ):
        if pairs:
            save_figure(plot_copies(pairs), out / f"{name}.png")
            written.append(out / f"{name}.png")
    return written


def copy_pairs(table: pd.DataFrame | None, per_class: int = 1) -> list[Pair]:
    """For some validation images of each class a copy of the same photograph in training."""
    if table is None:
        return []
    train = table[table.part == "train"].drop_duplicates("original").set_index("original").path
    valid = table[(table.part == "valid") & table.original.isin(train.index)]
    chosen = valid.groupby("label").sample(n=per_class, random_state=0, replace=True)
    return [(train[row.original], row.path) for row in chosen.itertuples()]


def official_pair_images(result: Audit, at_most: int = 6) -> list[Pair]:
    """A training and a validation image for each field in both parts of the official split: of
    the copies with the most inliers the two with the most matching features."""
    if not result.official_pairs:
        return []
    table = result.splits["official"].sort_values("inliers", ascending=False)
    best = table[table.part != ""].drop_duplicates("original")
    pairs = []
    for pair in result.official_pairs[:at_most]:
        field = best[best.photo == pair["photo"]]
        sides = [field.path[field.part == part] for part in ("train", "valid")]
        pairs.append(max(product(*sides), key=lambda sides: len(match_pair(*sides)[0])))
    return pairs


def describe_audit(result: Audit) -> str:
    """The result as lines of text."""
    summary = result.summary
    copies = summary["copies_per_photograph"]
    per_class = summary["photographs_per_class"]
    lines = [
        f"{summary['n_images']:,} images of {summary['n_photographs']:,} photographs "
        f"({', '.join(f'{label} {count}' for label, count in per_class.items())})",
        f"{summary['n_fields']:,} independent fields (overlapping photographs count as one)",
        f"{copies['min']} to {copies['max']} copies per photograph, median {copies['median']:.0f}",
        f"{summary['exact_duplicates']:,} exact duplicates (files with the same bytes)",
    ]
    for found in summary["contradictory_labels"]:
        labels = ", ".join(f"{label} ({n} images)" for label, n in found["labels"].items())
        lines.append(
            f"Contradictory labels of field {found['photo']}: {labels}; the photographs overlap "
            f"by {found['overlap']:.0%}"
        )
    lines.append("Leakage: validation images with a copy of their photograph in training")
    for name, value in summary["leakage"].items():
        lines.append(f"  {name:<10} {'split not possible' if value is None else f'{value:.1%}'}")
    for pair in summary["official_pairs"]:
        lines.append(f"  official: {' '.join(pair['train'])} | {' '.join(pair['valid'])}")
    return "\n".join(lines)


def _overlap_across_labels(field: pd.DataFrame) -> float:
    """The largest overlap, 0 to 1, of two photographs of one field with different labels, each
    represented by its copy with the most inliers, which shows nearly all of it."""
    best = field.sort_values("inliers", ascending=False).drop_duplicates(["original", "label"])
    pairs = combinations(best.itertuples(), 2)
    return max(overlap(a.path, b.path) for a, b in pairs if a.label != b.label)


def _split_of(run: Run, table: pd.DataFrame, root: Path) -> pd.DataFrame:
    parts = Run(run.path, root).table.set_index("path").part
    part = table.path.map(parts).fillna("")
    if not (part == "valid").any():
        raise DataError(f"Run {run.name} was not validated on images of {root}.", "Check `data`.")
    return table.assign(part=part)
