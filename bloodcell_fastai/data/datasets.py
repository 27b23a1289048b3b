"""From a folder, a zip or a download to the image table."""

import errno
import os
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import pandas as pd

from ..errors import BloodcellError, DataError, MissingFileError, NoNetworkError
from ..files import sole_writer
from ..reporter import Progress, no_progress
from .archives import content_key, unpack
from .demo import make_demo
from .duplicates import with_photos
from .images import (
    has_image_name,
    image_size,
    is_hidden,
    is_written,
    list_images,
    refuse_folder,
    why_unreadable,
)
from .splits import count_known

KAGGLE_HANDLE = "paultimothymooney/blood-cells"
KAGGLE_URL = f"https://www.kaggle.com/datasets/{KAGGLE_HANDLE}"
KAGGLE_COUNTS = {
    "TRAIN": {"EOSINOPHIL": 2497, "LYMPHOCYTE": 2483, "MONOCYTE": 2478, "NEUTROPHIL": 2499},
    "TEST": {"EOSINOPHIL": 623, "LYMPHOCYTE": 620, "MONOCYTE": 620, "NEUTROPHIL": 624},
    "TEST_SIMPLE": {"EOSINOPHIL": 13, "LYMPHOCYTE": 6, "MONOCYTE": 4, "NEUTROPHIL": 48},
}
SUBSET_NAMES = {"train", "training", "valid", "val", "validation", "test", "testing", "test_simple"}
MAX_UNREADABLE = 0.05  # of all images
KAGGLE_TIMEOUT = (10, 60)  # seconds to wait for a connection, and for the next bytes


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
        warnings: sentences a user must see, such as that the images are drawn.
    """

    root: Path
    table: pd.DataFrame
    originals: tuple[Path, ...]
    unreadable: dict[Path, str]
    sizes: dict[tuple[int, int], int]
    warnings: tuple[str, ...]

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
) -> Dataset:
    """Find, unpack or download the data and read its image table.

    ``photo`` is filled in from ``photos.csv`` (``path,photo``) in the data set's folder, as
    ``bloodcell audit --out`` writes it, or, for the images of the Kaggle set, from a table that
    ships with the package.

    Args:
        source: a zip, a folder, or ``"demo"``; None for the set under ``home`` if there is
            one, else a download from Kaggle, else, where there is no network at all, the demo
            with a warning.
        home: where archives are unpacked and the demo is drawn.
        progress: told how far unpacking and checking have come.
        download: fetches the Kaggle set and returns its folder; kagglehub by default.

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
        candidates = sorted(home.iterdir()) if home.is_dir() else []
        source = next(filter(_is_data, candidates), None)
    if source is None:
        try:
            source = (download or download_kaggle)()
        except NoNetworkError as error:
            source, reason = "demo", f" {error.message}"
    if str(source) != "demo":
        return read_folder(_as_folder(Path(source), home, progress), progress)
    folder = _made_once(home / "demo", make_demo)
    return read_folder(folder, progress, (f"DEMO DATA: drawn by code, not photographed.{reason}",))


def read_folder(
    root: str | Path, progress: Progress = no_progress, warnings: tuple[str, ...] = ()
) -> Dataset:
    """Read a folder-per-class tree, with or without ``train``/``test`` parents.

    Every image is decoded once, so that a truncated one is found now and not in mid-training.

    Raises:
        BloodcellError: no such folder, no images, fewer than two classes, or more than 5 % of
            the images unreadable.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise MissingFileError(f"No folder {root}.", "Check `data`.")
    table = pd.DataFrame(_list_images(root), columns=["path", "label", "subset"])
    if table.empty:
        raise DataError(f"No images in {root}.", "It should hold one folder of images per class.")
    table, repeated = _without_links(table)
    if repeated:
        warnings += (f"{repeated:,} links to images that are in the set anyway are left out.",)
    if table.label.nunique() < 2:
        raise DataError(
            f"Only one class in {root}: {table.label[0]}.",
            "Give a folder with one sub-folder per class, two or more.",
        )
    sizes = _read_sizes(table.path, progress)
    readable = sizes.map(lambda found: isinstance(found, tuple))
    unreadable = dict(zip(table.path[~readable].map(Path), sizes[~readable], strict=True))
    if len(unreadable) > MAX_UNREADABLE * len(table):
        raise DataError(
            f"{len(unreadable):,} of {len(table):,} images cannot be read, "
            f"such as {describe_unreadable(unreadable)}.",
            "Copy damaged files again, convert or shrink whole ones, or take them out of the data "
            "set.",
        )
    table, gaps = with_photos(table[readable].reset_index(drop=True), root)
    return Dataset(
        root=root,
        table=table,
        originals=find_originals(root),
        unreadable=unreadable,
        sizes=sizes[readable].value_counts().to_dict(),
        warnings=warnings + gaps + _missing_images(root, table),
    )


def find_originals(root: Path) -> tuple[Path, ...]:
    """The photographs in Kaggle's ``JPEGImages`` folder under ``root``, sorted; often none."""
    folders = [root / "dataset-master" / "dataset-master" / "JPEGImages", root / "JPEGImages"]
    folder = next(filter(Path.is_dir, folders), None)
    return tuple(sorted(filter(has_image_name, folder.iterdir()))) if folder else ()


def download_kaggle() -> Path:
    """Download the Kaggle set with kagglehub and return its folder.

    Raises:
        NoNetworkError: this machine has no network at all.
        BloodcellError: the download failed in any other way.
    """
    hint = f"Download it from {KAGGLE_URL} by hand and give the zip as `data`, or use `data=demo`."
    answers: list = []
    try:
        import kagglehub  # slow to import, and needed only here

        with _limited_requests(answers):
            return Path(kagglehub.dataset_download(KAGGLE_HANDLE))
    except Exception as error:  # kagglehub raises many kinds, also those of its HTTP client
        if not answers and _no_network(error):
            raise NoNetworkError("There is no network to download from.", hint) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BloodcellError(f"The download from Kaggle failed ({reason}).", hint) from error


@contextmanager
def _limited_requests(answers: list) -> Iterator[None]:
    """Collect the answers to HTTP requests, and give those without a time limit
    :data:`KAGGLE_TIMEOUT`: kagglehub's client sets none and has no option for it."""
    from requests import Session

    send = Session.send

    def limited(self, request, **options):
        options["timeout"] = options.get("timeout") or KAGGLE_TIMEOUT
        answers.append(answer := send(self, request, **options))
        return answer

    Session.send = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        Session.send = send  # type: ignore[method-assign]


def _no_network(error: BaseException | None) -> bool:
    """Whether the first request failed because no name is resolved or no network is within reach.

    Where a proxy is to be used this says nothing: the network is there, and the proxy is wrong.
    """
    if {"https", "all"} & getproxies().keys() and not proxy_bypass(urlsplit(KAGGLE_URL).netloc):
        return False
    while error is not None:
        if isinstance(error, socket.gaierror):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.ENETDOWN):
            return True
        error = error.__cause__ or error.__context__
    return False


def _as_folder(path: Path, home: Path, progress: Progress) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise MissingFileError(f"No file or folder {path}.", "Check `data`.")
    if not _is_zip(path):
        raise DataError(
            f"{path} is neither a folder nor a zip.", "Give a zip or a folder with classes."
        )
    target = home / f"{path.stem[:100]}-{content_key(path)}"
    return _made_once(target, lambda folder: unpack(path, folder, progress))


def _made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that one process makes, if it is not there, while others wait for it."""
    if not folder.is_dir():
        with sole_writer(folder.parent):
            if not folder.is_dir():
                make(folder)
    return folder


def _is_data(path: Path) -> bool:
    if path.name.startswith(".") or path.name == "demo":
        return False
    return bool(_list_images(path)) if path.is_dir() else _is_zip(path)


def _is_zip(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


def _list_images(root: Path) -> list[tuple[str, str, str]]:
    """(path, label, subset) of every file below ``root`` that looks like an image, sorted."""
    root = _class_root(root)
    subsets = [folder for folder in _folders(root) if folder.name.lower() in SUBSET_NAMES]
    return [
        (str(path), label.name, folder.name if subsets else "")
        for folder in subsets or [root]
        for label in _folders(folder)
        if not is_written(label)
        for path in list_images(label)
    ]


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


def _class_root(root: Path) -> Path:
    """Follow Kaggle's nesting, or folders that hold nothing but one other folder."""
    for nested in ("dataset2-master/dataset2-master/images", "dataset2-master/images", "images"):
        if (root / nested).is_dir():
            return root / nested
    inside = _folders(root)
    if len(inside) == 1 and not inside[0].is_symlink() and _folders(inside[0]):
        return _class_root(inside[0])
    return root


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(f for f in root.iterdir() if f.is_dir() and not is_hidden(f.name))
    except OSError as error:
        refuse_folder(error)


def _read_sizes(paths: Sequence[str], progress: Progress) -> pd.Series:
    """The (width, height) of each image, or the reason why it cannot be read."""
    found = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for size in pool.map(_try_size, paths):
            found.append(size)
            progress("Checking images", len(found), len(paths))
    return pd.Series(found, dtype=object)


def _try_size(path: str) -> tuple[int, int] | str:
    try:
        return image_size(path)
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
