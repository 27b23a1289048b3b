"""From a folder, an archive or a download to the image table."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import DataError, MissingFileError, NoNetworkError
from ..files import LOCK, sole_writer
from ..reporter import Progress, no_progress
from .archives import SUFFIXES, archive_stem, content_key, holds_images, unpack
from .arrays import holds_arrays, unpack_arrays
from .demo import make_demo
from .download import download_kaggle
from .duplicates import with_photos
from .images import (
    ImageInfo,
    bits_used,
    describe_light,
    inspect_image,
    is_hidden,
    is_image,
    is_written,
    list_images,
    refuse_folder,
    why_unreadable,
)
from .layouts import LabelSource, describe_left_out, read_layout
from .layouts.folders import are_one_set, parts_of
from .splits import count_known

KAGGLE_COUNTS = {
    "TRAIN": {"EOSINOPHIL": 2497, "LYMPHOCYTE": 2483, "MONOCYTE": 2478, "NEUTROPHIL": 2499},
    "TEST": {"EOSINOPHIL": 623, "LYMPHOCYTE": 620, "MONOCYTE": 620, "NEUTROPHIL": 624},
    "TEST_SIMPLE": {"EOSINOPHIL": 13, "LYMPHOCYTE": 6, "MONOCYTE": 4, "NEUTROPHIL": 48},
}
MAX_UNREADABLE = 0.05  # of all images


@dataclass(frozen=True)
class Dataset:
    """A data set on disk.

    Attributes:
        root: its folder.
        table: one row per readable image: ``path`` (absolute), ``label``, ``subset`` (name of
            the train/test folder, or empty), ``photo`` (an id that the copies of one photograph
            share; empty where the photograph is not known).
        originals: the photographs the images were made from, where the data set has them.
        unreadable: files that look like images and cannot be read, with the reason of each.
        sizes: images per (width, height) in pixels, readable images only.
        layout: how the files are laid out, one of :data:`~bloodcell_fastai.data.layouts.LAYOUTS`.
        why: what the layout was recognised by.
        left_out: files that look like images and were not taken, by the reason.
        warnings: sentences a user must see, such as that the images are drawn.
        bits: what the images of 16 bits per sample use of them, all together; None: no image has
            more than 8 bits per sample.
        label_source: what the user said about the labels.
    """

    root: Path
    table: pd.DataFrame
    originals: tuple[Path, ...]
    unreadable: dict[Path, str]
    sizes: dict[tuple[int, int], int]
    layout: str
    why: str
    left_out: Mapping[str, Sequence[Path]]
    warnings: tuple[str, ...]
    bits: int | None = None
    label_source: LabelSource = field(default_factory=LabelSource)

    def describe(self) -> list[str]:
        """How the folder was read: the layout, what each subset is for, and what was left out."""
        lines = [f"Layout   {self.layout}: {self.why}."]
        uses = {"train": "training", "valid": "validation", "test": "the end"}
        subsets = pd.Series(sorted(set(self.table.subset)), dtype=str)
        parts = subsets.groupby(parts_of(subsets)).agg(", ".join)
        told = [f"{parts[part]} for {use}" for part, use in uses.items() if part in parts]
        if told:
            lines.append(f"Subsets  {'; '.join(told)}.")
        if self.originals:
            lines.append(f"Beside   {len(self.originals):,} photographs the images were made from.")
        return lines + describe_left_out(self.left_out, self.root)

    @property
    def n_known(self) -> int:
        """Images whose photograph is known."""
        return count_known(self.table)

    @property
    def counts(self) -> pd.DataFrame:
        """Images per subset (rows) and class (columns)."""
        return pd.crosstab(self.table.subset, self.table.label)

    @property
    def counts_with_totals(self) -> pd.DataFrame:
        """:attr:`counts` with a last row and a last column ``all``, in brackets where a class has
        that name."""
        name = "all"
        while name in {*self.table.label, *self.table.subset}:
            name = f"({name})"
        return pd.crosstab(self.table.subset, self.table.label, margins=True, margins_name=name)


def open_dataset(
    source: str | Path | None = None,
    home: str | Path = "data",
    progress: Progress = no_progress,
    download: Callable[[], Path] | None = None,
    **label_source: Any,
) -> Dataset:
    """Find, unpack or download the data and read its image table.

    ``photo`` is filled in from ``photos.csv`` (``path,photo``) in the data set's folder, as
    ``bloodcell audit --out`` writes it, or, for the images of the Kaggle set, from a table that
    ships with the package.

    Args:
        source: a zip, a tar, an ``.npz`` of MedMNIST, a folder, or ``"demo"``; None for the set
            under ``home`` if there is one, else a download from Kaggle, else, where there is no
            network at all, the demo with a warning.
        home: where archives are unpacked and the demo is drawn.
        progress: told how far unpacking and checking have come.
        download: fetches the Kaggle set and returns its folder; kagglehub by default.
        **label_source: ``classes_from``, ``labels`` and ``label_column``, where the layout is
            not recognised as it should be; see
            :class:`~bloodcell_fastai.data.layouts.files.LabelSource`.

    Returns:
        The data set; its ``table`` has a row per readable image.

    Raises:
        BloodcellError: nothing usable is there, or the download failed; the message says what was
            found.

    Examples:
        >>> from bloodcell_fastai import open_dataset
        >>> dataset = open_dataset("demo")
        >>> list(dataset.table.columns)
        ['path', 'label', 'subset', 'photo']
        >>> list(dataset.counts.columns)
        ['EOSINOPHIL', 'LYMPHOCYTE', 'MONOCYTE', 'NEUTROPHIL']
        >>> dataset.warnings
        ('DEMO DATA: drawn by code, not photographed.',)
        >>> dataset.n_known == len(dataset.table)  # images whose photograph is known
        True
    """
    home, reason = Path(home), ""
    if source is None:
        source = _find_data(home)
    if source is None:
        try:
            source = (download or download_kaggle)()
        except NoNetworkError as error:
            source, reason = "demo", f" {error.message}"
    if str(source) != "demo":
        return read_folder(_as_folder(Path(source), home, progress), progress, **label_source)
    folder = _made_once(home / "demo", make_demo)
    drawn = f"DEMO DATA: drawn by code, not photographed.{reason}"
    return read_folder(folder, progress, (drawn,), **label_source)


def read_folder(
    root: str | Path,
    progress: Progress = no_progress,
    warnings: tuple[str, ...] = (),
    **label_source: Any,
) -> Dataset:
    """Read the images below a folder and their labels, in any of the
    :data:`~bloodcell_fastai.data.layouts.LAYOUTS`.

    Every image is decoded once, so that a truncated one is found now and not in mid-training.

    Raises:
        BloodcellError: no such folder, no images, fewer than two classes, a layout that is not
            clear, or more than 5 % of the images unreadable.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise MissingFileError(f"No folder {root}.", "Check `data`.")
    source = LabelSource(**label_source)
    reading = read_layout(root, source, _made_in(root))
    table, repeated = _without_links(reading.table)
    warnings += reading.warnings
    if repeated:
        warnings += (f"{repeated:,} links to images that are in the set anyway are left out.",)
    found = _inspect(table.path, progress)
    readable = found.map(lambda each: isinstance(each, ImageInfo))
    unreadable = dict(zip(table.path[~readable].map(Path), found[~readable], strict=True))
    infos: list[ImageInfo] = found[readable].tolist()
    if len(unreadable) > MAX_UNREADABLE * len(table):
        raise DataError(
            f"{len(unreadable):,} of {len(table):,} images cannot be read, "
            f"such as {describe_unreadable(unreadable)}.",
            "Copy damaged files again, convert or shrink whole ones, or take them out of the data "
            "set.",
        )
    originals = find_originals(root)
    left_out = {
        reason: kept
        for reason, paths in reading.left_out.items()
        if (kept := [path for path in paths if path not in originals])
    }
    table, gaps = with_photos(table[readable].reset_index(drop=True), root)
    # A patient's images stay together, unless it is known which photograph each is of.
    table = table.assign(photo=table.photo.where(table.photo != "", table.group))
    return Dataset(
        root=root,
        table=table.drop(columns="group"),
        originals=originals,
        unreadable=unreadable,
        sizes=dict(Counter((info.width, info.height) for info in infos)),
        layout=reading.layout,
        why=reading.why,
        left_out=left_out,
        warnings=warnings + describe_light(table.path, infos) + gaps + _missing_images(root, table),
        bits=bits_used(infos),
        label_source=source,
    )


def find_originals(root: Path) -> tuple[Path, ...]:
    """The photographs in Kaggle's ``JPEGImages`` folder under ``root``, sorted; often none."""
    folders = [root / "dataset-master" / "dataset-master" / "JPEGImages", root / "JPEGImages"]
    folder = next(filter(Path.is_dir, folders), None)
    return tuple(sorted(filter(is_image, folder.iterdir()))) if folder else ()


def _find_data(home: Path) -> Path | None:
    """The data set in ``home``: an archive, a folder, or all of its folders together.

    Raises:
        BloodcellError: there are several.
    """
    if not home.is_dir():
        return None
    made = _made_in(home)
    archives = [path for path in sorted(home.iterdir()) if path.is_file() and _is_packed(path)]
    folders = [
        path
        for path in _folders(home)
        if path not in made and not is_written(path) and list_images(path)
    ]
    loose = [path for path in home.iterdir() if is_image(path)]
    found = [home] if loose or (folders and are_one_set(folders)) else folders
    # A damaged archive is not to lead to a download, but to an error.
    candidates = archives + found or [path for path in home.iterdir() if _is_called_archive(path)]
    if len(candidates) > 1:
        raise DataError(
            f"Several data sets are in {home}: {', '.join(path.name for path in candidates)}.",
            f"Name one: `data={candidates[0]}`.",
        )
    return next(iter(candidates), None)


def _made_in(home: Path) -> set[Path]:
    """The folders in ``home`` that were made there: the demo, and what archives hold."""
    if not (home / LOCK).is_file():
        return set()
    packed = (path for path in home.iterdir() if path.is_file() and _is_packed(path))
    return {home / "demo", *(_unpacked(path, home) for path in packed)}


def _is_packed(path: Path) -> bool:
    return holds_images(path) or holds_arrays(path)


def _is_called_archive(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _unpacked(archive: Path, home: Path) -> Path:
    """Where an archive is unpacked."""
    return home / f"{archive_stem(archive.name)[:100]}-{content_key(archive)}"


def _as_folder(path: Path, home: Path, progress: Progress) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise MissingFileError(f"No file or folder {path}.", "Check `data`.")
    if holds_arrays(path):
        return _made_once(
            _unpacked(path, home), lambda folder: unpack_arrays(path, folder, progress)
        )
    if not path.is_file() or not (_is_called_archive(path) or holds_images(path)):
        raise DataError(
            f"{path} is neither a folder nor an archive of images.",
            "Give a zip, a tar, or a folder with classes.",
        )
    return _made_once(_unpacked(path, home), lambda folder: unpack(path, folder, progress))


def _made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that one process makes, if it is not there, while others wait for it."""
    if not folder.is_dir():
        with sole_writer(folder.parent):
            if not folder.is_dir():
                make(folder)
    return folder


def _without_links(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The table without links to files it holds already, and how many these were.

    Raises:
        BloodcellError: one file has two labels by way of a link.
    """
    real_folder = lru_cache(None)(os.path.realpath)

    def real(path: str) -> str:
        if os.path.islink(path):  # noqa: PTH114 for every image: speed
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        return f"{real_folder(folder)}{os.sep}{name}"

    table = table.assign(file=table.path.map(real))
    for _, same in table[table.file.duplicated(keep=False)].groupby("file"):
        if same.label.nunique() > 1:
            first, other = same.drop_duplicates("label").path[:2]
            raise DataError(
                f"One image has two labels: {first} and {other} are the same file.",
                "Remove the link that is wrong.",
            )
    # A file before the links to it: what comes later is dropped.
    by_link = table.iloc[(table.file != table.path).argsort(kind="stable")]
    kept = by_link.drop_duplicates("file").sort_index()
    return kept.drop(columns="file").reset_index(drop=True), len(table) - len(kept)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(f for f in root.iterdir() if f.is_dir() and not is_hidden(f.name))
    except OSError as error:
        refuse_folder(error)


def _inspect(paths: Sequence[str], progress: Progress) -> pd.Series:
    """The :class:`ImageInfo` of each image, or the reason why it cannot be read."""
    found = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for info in pool.map(_try_inspect, paths):
            found.append(info)
            progress("Checking images", len(found), len(paths))
    return pd.Series(found, dtype=object)


def _try_inspect(path: str) -> ImageInfo | str:
    try:
        return inspect_image(path)
    except OSError as error:
        return why_unreadable(path, error)


def describe_unreadable(unreadable: Mapping[Path, str]) -> str:
    """Some files that cannot be read, each for another reason, and the reasons."""
    examples = pd.Series(unreadable).drop_duplicates().head(3)
    return "; ".join(f"{path} ({reason})" for path, reason in examples.items())


def _missing_images(root: Path, table: pd.DataFrame) -> tuple[str, ...]:
    """A warning if this is the Kaggle set and some of it is missing."""
    if (root / "truth.csv").exists() or set(table.subset) != set(KAGGLE_COUNTS):
        return ()
    found = table.groupby(["subset", "label"]).size()
    wrong = [
        f"{subset}/{label} has {n:,} of {count:,}"
        for subset, classes in KAGGLE_COUNTS.items()
        for label, count in classes.items()
        if (n := found.get((subset, label), 0)) != count
    ]
    return (f"Not the whole Kaggle set: {'; '.join(wrong)}.",) if wrong else ()
