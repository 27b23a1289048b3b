"""What the readers of layouts share: the files below a folder, and what a reader finds."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from ..archives import holds_images
from ..class_names import known_cell
from ..images import UNREAD_SUFFIXES, list_files, open_image

MASKS = {
    *("mask", "masks", "gt", "groundtruth", "truth", "seg", "segmentation"),
    *("segmentations", "annotation", "annotations", "overlay", "overlays", "contour"),
    *("contours", "outline", "outlines", "heatmap", "heatmaps"),
}
MOST_COLOURS = 16  # that a mask has; the smallest photograph of a cell has hundreds


@dataclass(frozen=True)
class LabelSource:
    """Where the labels are, as far as the user has said so; see :class:`~bloodcell_fastai.Config`.

    Attributes:
        classes_from: ``auto``, ``folder``, ``parent`` or ``name``.
        labels: a table of labels; empty: none is named.
        label_column: its column of labels; empty: found by its name.
    """

    classes_from: str = "auto"
    labels: str = ""
    label_column: str = ""


@dataclass(frozen=True)
class Files:
    """The files below a folder.

    Attributes:
        root: the folder.
        images: those that may be images of cells.
        others: those that are no images.
        empty: folders that hold nothing.
        left_out: images that are none of cells, and pictures in formats that are not read, by the
            reason.
    """

    root: Path
    images: tuple[Path, ...]
    others: tuple[Path, ...]
    empty: tuple[Path, ...]
    left_out: dict[str, list[Path]]

    @classmethod
    def below(cls, root: Path, skip: Iterable[Path] = ()) -> "Files":
        """The files below ``root`` but those in the folders ``skip``, in order.

        Raises:
            BloodcellError: a folder cannot be listed.
        """
        skipped = set(skip)
        images, others = (
            [path for path in paths if skipped.isdisjoint(path.parents)] if skipped else paths
            for paths in list_files(root, links=True)
        )
        masks = _masks(root, images)
        left_out: dict[str, list[Path]] = {
            "masks": [path for path in images if path in masks],
            "of a format that is not read": [
                path for path in others if path.suffix.lower() in UNREAD_SUFFIXES
            ],
            "archives inside the folder, which are not unpacked": [
                path
                for path in others
                if path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz") and holds_images(path)
            ],
        }
        empty = [
            Path(parent)
            for parent, folders, names in os.walk(root)
            if not folders
            and not names
            and skipped.isdisjoint((Path(parent), *Path(parent).parents))
        ]
        kept = (path for path in images if path not in masks)
        return cls(root, tuple(kept), tuple(others), tuple(sorted(empty)), left_out)

    @cached_property
    def folders(self) -> list[tuple[str, ...]]:
        """Of each image the names of the folders between the root and it."""
        parents = [path.parent for path in self.images]
        names = {parent: parent.relative_to(self.root).parts for parent in set(parents)}
        return [names[parent] for parent in parents]


@dataclass(frozen=True)
class Reading:
    """What a reader found.

    Attributes:
        layout: its name, one of :data:`~bloodcell_fastai.data.layouts.LAYOUTS`.
        why: what it was recognised by, a sentence.
        table: a row per labelled image: ``path``, ``label``, ``subset`` (empty: none) and
            ``group``, the patient or slide as far as folders or a table tell it.
        left_out: images without a label, by the reason.
        warnings: sentences a user must see.
    """

    layout: str
    why: str
    table: pd.DataFrame
    left_out: dict[str, list[Path]]
    warnings: tuple[str, ...] = ()


def describe_left_out(left_out: Mapping[str, Sequence[Path]], root: Path) -> list[str]:
    """How many files of which kind were left out, and why, a sentence for each reason."""
    lines = []
    for reason, paths in left_out.items():
        if paths:
            kinds = pd.Series([path.suffix.lower() or "without a suffix" for path in paths])
            counts = ", ".join(f"{n:,} {kind}" for kind, n in kinds.value_counts().items())
            lines.append(f"Left out: {counts} {reason}, such as {paths[0].relative_to(root)}.")
    return lines


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of :attr:`Reading.table`, paths as text."""
    table = table[["path", "label", "subset", "group"]]
    return table.assign(path=table.path.map(str)).reset_index(drop=True)


def some(names: Iterable[str], most: int = 6) -> str:
    """The first of the names, each once, in order of the alphabet."""
    names = sorted(set(names))
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _masks(root: Path, images: Sequence[Path]) -> set[Path]:
    """Pictures of regions and not of cells: in a folder that is called so, with such a word behind
    the name of an image, or beside an image of the same name in another format and of few
    colours."""
    of_masks = {
        folder
        for folder in {path.parent for path in images}
        if any(map(is_mask, folder.relative_to(root).parts))
    }
    masks = {path for path in images if path.parent in of_masks}
    stems = {path.with_suffix("") for path in images if path not in masks}
    for path in images:
        stem, *mark = re.split(r"[_\-. ](?=[^_\-. ]*$)", path.stem)
        if mark and mark[0].casefold() in MASKS and path.with_name(stem) in stems:
            masks.add(path)
    same_name: dict[Path, list[Path]] = {}
    for path in images:
        same_name.setdefault(path.with_suffix(""), []).append(path)
    for paths in same_name.values():
        drawn = [path for path in paths if len(paths) > 1 and _has_few_colours(path)]
        if len(drawn) < len(paths):
            masks.update(drawn)
    return masks


def _has_few_colours(path: Path) -> bool:
    try:
        return open_image(path).getcolors(MOST_COLOURS) is not None
    except OSError:  # it is reported as unreadable where it is decoded
        return False


def is_mask(name: str) -> bool:
    """Whether a folder is called like one of masks. ``SEG`` is a segmented neutrophil."""
    words = words_of(name)
    named = (
        not MASKS.isdisjoint(words)
        or "".join(words).startswith("groundtruth")
        or words == ["labels"]
    )
    return named and name != "SEG" and not known_cell(name)


def words_of(name: str) -> list[str]:
    """The words and numbers in a name, in lower case."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word.casefold() for word in re.findall(r"[^\W\d_]+|\d+", spaced)]
