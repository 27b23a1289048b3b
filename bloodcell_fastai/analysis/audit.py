"""``bloodcell audit``: which photograph each image is from, and how far each split leaks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path

import pandas as pd

from ..config import SPLITS
from ..data.dataset import Dataset, Progress, no_progress
from ..data.provenance import (
    COLUMNS,
    digest,
    find_photos,
    known_photos,
    match_pair,
    overlap,
    write_known_photos,
)
from ..data.splits import leakage, split_table
from ..errors import BloodcellError
from ..files import write_json, write_table
from ..training.runs import Run
from .figures import plot_siblings, save_figure

Pair = tuple[str, str]
"""Paths of a training image and a validation image of one photograph."""


@dataclass(frozen=True)
class Audit:
    """What is known about the photographs behind a data set.

    Attributes:
        table: the image table with ``photo`` (the field: photographs that overlap count as
            one), ``original`` (the photograph itself), ``inliers`` and ``margin``.
        splits: the table split in every way that is possible, by the name of the split.
        rebuilt: whether the photographs were found from the pixels just now.
    """

    table: pd.DataFrame
    splits: dict[str, pd.DataFrame]
    rebuilt: bool

    @property
    def leakages(self) -> dict[str, float | None]:
        """Per split the share of validation images with a sibling in training, 0 to 1.

        None where the split is not possible. Never unknown: an audited image without a sibling
        is known to have none.
        """
        return {
            name: _leakage(self.splits[name]) if name in self.splits else None
            for name in (*SPLITS, *(self.splits.keys() - set(SPLITS)))
        }

    @cached_property
    def contradictions(self) -> list[dict]:
        """Fields under more than one label, with ``photo``, images per ``labels``, and ``overlap``.

        ``overlap`` is the share, 0 to 1, of one photograph that another one of the other label
        shows too, the largest there is: near 1 they are one cell under two labels, near 0 two
        neighbours.
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
        """Fields on both sides of the official split, with the photographs on either side."""
        if "official" not in self.splits:
            return []
        table = self.splits["official"]
        sides = {part: table[table.part == part] for part in ("train", "valid")}
        shared = sorted(set(sides["train"].photo) & set(sides["valid"].photo))
        return [
            {"photo": photo}
            | {
                part: sorted(set(side.original[side.photo == photo]))
                for part, side in sides.items()
            }
            for photo in shared
        ]

    @property
    def summary(self) -> dict:
        """What ``audit.json`` holds."""
        copies = self.table.groupby("original").size()
        digests = pd.Series([digest(Path(path)) for path in self.table.path])
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
    """Find the photograph of every image and see how each split shares them.

    Args:
        dataset: any data set; its originals are used where it has them.
        rebuild: find them from the pixels even where the images are known.
        run: a run whose split is looked at too.
        progress: told how far the search has come.

    Returns:
        The photographs, and the table split in every way that is possible.

    Raises:
        BloodcellError: there are more images than can be compared, see :func:`find_photos`.

    Examples:
        >>> from bloodcell_fastai import audit, make_demo, open_dataset
        >>> result = audit(open_dataset(make_demo("few", photos_per_class=4, copies=2)))
        >>> list(result.leakages)
        ['photo', 'official', 'random']
        >>> result.leakages["photo"]
        0.0
        >>> result.leakages["official"] > 0  # TRAIN and TEST share a field
        True
    """
    known = None if rebuild else known_photos(dataset.table.path)
    rebuilt = False
    if known is None or len(known) < len(dataset.table):
        rebuilt = True
        known = find_photos(
            dataset.table.path,
            dataset.originals,
            progress=lambda done, total, stage: progress(stage.capitalize(), done, total),
        )
    table = dataset.table.drop(columns="photo").merge(known[COLUMNS], on="path", how="left")
    splits = dict(_possible_splits(table))
    if run is not None:
        splits[f"run {run.name}"] = _split_of(run, table)
    return Audit(table, splits, rebuilt)


def write_audit(result: Audit, out: Path, root: Path) -> list[Path]:
    """Write ``photos.csv``, ``audit.json`` and the pictures into ``out``; return what was written.

    The paths in ``photos.csv`` are relative to ``root``, so that the file can lie in the data
    set's folder, where ``bloodcell fit`` finds it.
    """
    photos = result.table[["path", "photo"]].assign(
        path=[Path(path).relative_to(root).as_posix() for path in result.table.path]
    )
    write_table(out / "photos.csv", photos)
    write_json(out / "audit.json", result.summary)
    written = [out / "photos.csv", out / "audit.json"]
    if result.rebuilt:  # in the form of the table that ships for Kaggle's set
        write_known_photos(result.table, out / "known_photos.csv.xz")
        written.append(out / "known_photos.csv.xz")
    for name, pairs in (
        ("siblings-random", sibling_pairs(result.splits.get("random"))),
        ("siblings-official", official_pair_images(result)),
    ):
        if pairs:
            save_figure(plot_siblings(pairs), out / f"{name}.png")
            written.append(out / f"{name}.png")
    return written


def sibling_pairs(table: pd.DataFrame | None, per_class: int = 1) -> list[Pair]:
    """For some validation images of each class a training image of the same photograph."""
    if table is None:
        return []
    train = table[table.part == "train"].drop_duplicates("original").set_index("original").path
    valid = table[(table.part == "valid") & table.original.isin(train.index)]
    chosen = valid.groupby("label").sample(n=per_class, random_state=0, replace=True)
    return [(train[row.original], row.path) for row in chosen.itertuples()]


def official_pair_images(result: Audit, at_most: int = 6) -> list[Pair]:
    """An image of either side for the fields that the official split shares.

    Of each photograph the copy with the most inliers stands for it; of a field's photographs
    those two are shown that have most in common.
    """
    if not result.official_pairs:
        return []
    table = result.splits["official"].sort_values("inliers", ascending=False)
    best = table[table.part != ""].drop_duplicates("original")
    pairs = []
    for pair in result.official_pairs[:at_most]:
        field = best[best.photo == pair["photo"]]
        sides = [field.path[field.part == part] for part in ("train", "valid")]
        pairs.append(max(product(*sides), key=_matches))
    return pairs


def _matches(pair: Pair) -> int:
    return len(match_pair(Path(pair[0]), Path(pair[1]))[0])


def describe_audit(result: Audit) -> str:
    """The verdict as lines of text."""
    summary = result.summary
    copies = summary["copies_per_photograph"]
    per_class = summary["photographs_per_class"]
    lines = [
        f"{summary['n_images']:,} images of {summary['n_photographs']:,} photographs "
        f"({', '.join(f'{label} {count}' for label, count in per_class.items())})",
        f"{summary['n_fields']:,} independent fields: photographs that overlap count as one",
        f"{copies['min']} to {copies['max']} copies per photograph, {copies['median']:.0f} at the "
        "median",
        f"{summary['exact_duplicates']:,} files are byte for byte another one",
    ]
    for found in summary["contradictory_labels"]:
        labels = ", ".join(f"{label} ({n} images)" for label, n in found["labels"].items())
        lines.append(
            f"One field under two labels: {found['photo']} is {labels}; "
            f"they overlap by {found['overlap']:.0%}"
        )
    lines.append("Leakage, the share of validation images whose photograph is also in training:")
    for name, share in summary["leakage"].items():
        lines.append(f"  {name:<10} {'not possible here' if share is None else f'{share:.1%}'}")
    for pair in summary["official_pairs"]:
        lines.append(f"  official: {' '.join(pair['train'])} | {' '.join(pair['valid'])}")
    return "\n".join(lines)


def _overlap_across_labels(field: pd.DataFrame) -> float:
    """The largest overlap of two photographs of one field under different labels.

    Each is judged by the copy that matches it best, which shows nearly all of it.
    """
    best = field.sort_values("inliers", ascending=False).drop_duplicates(["original", "label"])
    pairs = combinations(best.itertuples(), 2)
    return max(overlap(Path(a.path), Path(b.path)) for a, b in pairs if a.label != b.label)


def _leakage(table: pd.DataFrame) -> float:
    """As :func:`leakage`, where a table in which every image stands alone leaks nothing."""
    return leakage(table) or 0.0


def _possible_splits(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for name in SPLITS:
        try:
            yield name, split_table(table, name)
        except BloodcellError:
            continue  # such as official for a data set without folders of its own


def _split_of(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    parts = run.table.set_index("path").part
    return table.assign(part=table.path.map(parts).fillna(""))
