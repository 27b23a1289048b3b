"""From a folder, a zip or a download to the image table."""

import os
import socket
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from ..errors import BloodcellError
from ..files import sole_writer
from ..reporter import Progress, no_progress
from .archives import content_key, unpack
from .smears import make_demo

KAGGLE_HANDLE = "paultimothymooney/blood-cells"
KAGGLE_URL = f"https://www.kaggle.com/datasets/{KAGGLE_HANDLE}"
KAGGLE_COUNTS = {
    "TRAIN": {"EOSINOPHIL": 2497, "LYMPHOCYTE": 2483, "MONOCYTE": 2478, "NEUTROPHIL": 2499},
    "TEST": {"EOSINOPHIL": 623, "LYMPHOCYTE": 620, "MONOCYTE": 620, "NEUTROPHIL": 624},
    "TEST_SIMPLE": {"EOSINOPHIL": 13, "LYMPHOCYTE": 6, "MONOCYTE": 4, "NEUTROPHIL": 48},
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
# What Pillow may take a file for, whatever its suffix says. Of the others some are rare and some
# dangerous: it hands EPS to Ghostscript, which runs what the file contains.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 89_478_485  # above which Pillow suspects a bomb
SYSTEM_FOLDERS = {"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir"}
SUBSET_NAMES = {"train", "training", "valid", "val", "validation", "test", "testing", "test_simple"}
MAX_UNREADABLE_SHARE = 0.05


@dataclass(frozen=True)
class Dataset:
    """A data set on disk.

    Attributes:
        root: its folder.
        table: one row per readable image: ``path`` (absolute), ``label``, ``subset`` (name of
            the train/test folder, or empty), ``photo`` (here the image's own path: unknown).
        originals: the photographs the images were made from, where the data set has them.
        unreadable: files that look like images and cannot be read.
        sizes: images per (width, height) in pixels, readable images only.
        warnings: sentences a user must see, such as that the images are drawn.
    """

    root: Path
    table: pd.DataFrame
    originals: tuple[Path, ...]
    unreadable: tuple[Path, ...]
    sizes: dict[tuple[int, int], int]
    warnings: tuple[str, ...]

    @property
    def counts(self) -> pd.DataFrame:
        """Images per subset (rows) and class (columns)."""
        return pd.crosstab(self.table.subset, self.table.label)

    @property
    def counts_with_totals(self) -> pd.DataFrame:
        """:attr:`counts` with a last row and a last column ``all``."""
        return pd.crosstab(self.table.subset, self.table.label, margins=True, margins_name="all")


def open_dataset(
    source: str | Path | None = None,
    home: str | Path = "data",
    progress: Progress = no_progress,
    download: Callable[[], Path] | None = None,
) -> Dataset:
    """Find, unpack or download the data and read its image table.

    Args:
        source: a zip, a folder, or ``"demo"``; None for the set under ``home`` if there is
            one, else a download from Kaggle, else the demo with a warning.
        home: where archives are unpacked and the demo is drawn.
        progress: told how far unpacking and checking have come.
        download: fetches the Kaggle set and returns its folder; kagglehub by default.

    Returns:
        The data set; its ``table`` has a row per readable image.

    Raises:
        BloodcellError: nothing usable is there; the message says what was found.

    Examples:
        >>> from bloodcell_fastai import open_dataset
        >>> dataset = open_dataset("demo")
        >>> list(dataset.table.columns)
        ['path', 'label', 'subset', 'photo']
        >>> list(dataset.counts.columns)
        ['EOSINOPHIL', 'LYMPHOCYTE', 'MONOCYTE', 'NEUTROPHIL']
        >>> dataset.warnings
        ('DEMO DATA: drawn by code, not photographed.',)
    """
    home = Path(home)
    if source is not None and str(source) != "demo":
        return read_folder(_as_folder(Path(source), home, progress), progress)
    if source is None:
        for candidate in sorted(home.iterdir()) if home.is_dir() else []:
            if candidate.name != "demo" and _is_data(candidate):
                return read_folder(_as_folder(candidate, home, progress), progress)
        try:
            return read_folder((download or download_kaggle)(), progress)
        except BloodcellError as error:
            warnings = (
                f"DEMO DATA: these images are drawn by code, not photographed. {error.message}",
            )
            return read_folder(_demo(home), progress, warnings)
    return read_folder(_demo(home), progress, ("DEMO DATA: drawn by code, not photographed.",))


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
        raise BloodcellError(f"No folder {root}.", "Check the path given to --data.")
    files = _list_images(root)
    table = pd.DataFrame(files, columns=["path", "label", "subset"])
    if table.empty:
        raise BloodcellError(
            f"No images in {root}.", "It should hold one folder of images per class."
        )
    table, repeated = _without_links(table)
    if repeated:
        warnings += (f"{repeated:,} links to images that are in the set anyway are left out.",)
    if table.label.nunique() < 2:
        raise BloodcellError(
            f"Only one class in {root}: {table.label[0]}.",
            "Give a folder with one sub-folder per class, two or more.",
        )
    sizes = _read_sizes(table.path, progress)
    readable = np.array([size is not None for size in sizes])
    unreadable = tuple(Path(path) for path in table.path[~readable])
    if len(unreadable) > MAX_UNREADABLE_SHARE * len(table):
        raise BloodcellError(
            f"{len(unreadable):,} of {len(table):,} images cannot be read, "
            f"such as {unreadable[0]}.",
            "Download or copy the data set again.",
        )
    table = table[readable].reset_index(drop=True)
    table["photo"] = table.path
    return Dataset(
        root=root,
        table=table,
        originals=find_originals(root),
        unreadable=unreadable,
        sizes=pd.Series([size for size in sizes if size]).value_counts().to_dict(),
        warnings=warnings + _missing_images(root, table),
    )


def find_originals(root: Path) -> tuple[Path, ...]:
    """The photographs in Kaggle's ``JPEGImages`` folder under ``root``, sorted; often none."""
    folders = [root / "dataset-master" / "dataset-master" / "JPEGImages", root / "JPEGImages"]
    for folder in folders:
        if folder.is_dir():
            return tuple(sorted(path for path in folder.iterdir() if _has_image_name(path)))
    return ()


def download_kaggle() -> Path:
    """Download the Kaggle set with kagglehub and return its folder.

    Raises:
        BloodcellError: Kaggle cannot be reached or refuses.
    """
    hint = f"Download it from {KAGGLE_URL} by hand and give the zip to --data."
    try:
        socket.create_connection(("www.kaggle.com", 443), timeout=5).close()
    except OSError as error:
        raise BloodcellError(f"Kaggle cannot be reached ({error}).", hint) from None
    import kagglehub  # slow to import, and needed only here

    try:
        return Path(kagglehub.dataset_download(KAGGLE_HANDLE))
    except Exception as error:  # kagglehub raises many kinds, also those of its HTTP client
        raise BloodcellError(f"Kaggle refused the download ({error}).", hint) from error


def open_image(path: str | os.PathLike) -> Image.Image:
    """Read an image as a viewer shows it.

    It is turned by its EXIF tag, in three colours, on white where it is transparent; 16 bits of
    grey are scaled to 8; of an animation it is the first frame. Colour profiles are not applied.

    Raises:
        OSError: the file is missing, empty, truncated, no image, or one that viewers do not agree
            on (32 bits of grey); or it has more than 89 million pixels.
    """
    with _opened(path) as image:
        image.load()
        return _as_shown(_turned(image))


def image_size(path: str | Path) -> tuple[int, int] | None:
    """(width, height) in pixels, or None if the image cannot be decoded to its end."""
    try:
        with _opened(path) as image:
            size = image.size
            # A JPEG decoded at an eighth still reads every byte, in a fraction of the time.
            image.draft(image.mode, (max(size[0] // 8, 1), max(size[1] // 8, 1)))
            image.load()
            return size
    except OSError:
        return None


def is_image(path: str | Path) -> bool:
    """Whether a file begins like an image that can be decoded safely."""
    try:
        with _opened(path):
            return True
    except OSError:
        return False


def list_folder(folder: Path) -> list[Path]:
    """Image files below ``folder``, sorted; hidden ones and those of the system passed over.

    Links to files count as files; links to folders are not followed, so that none can lead in a
    circle or into the folder of another class.

    Raises:
        BloodcellError: a folder cannot be listed.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [path for name in names if _has_image_name(path := Path(parent, name))]
    return sorted(found)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """A file that Pillow knows and that is safe to decode; everything else is an OSError."""
    if not os.path.isfile(path):  # noqa: PTH113 a pipe would wait for ever; False for any name
        raise OSError(f"{path}: no such file" if not os.path.lexists(path) else f"{path}: no file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"more than {MAX_PIXELS:,} pixels")
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise OSError("32 bits of grey have no agreed brightness")
            yield image
    except Exception as error:  # on damaged files Pillow's readers raise anything
        raise OSError(f"{path}: {error}") from error


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag, which viewers pass over
        return image


def _as_shown(image: Image.Image) -> Image.Image:
    """A loaded image as 8-bit RGB."""
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip to white
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _as_folder(path: Path, home: Path, progress: Progress) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise BloodcellError(f"No file or folder {path}.", "Check the path given to --data.")
    if not (path.is_file() and zipfile.is_zipfile(path)):
        raise BloodcellError(
            f"{path} is neither a folder nor a zip.", "Give a zip or a folder with classes."
        )
    target = home / f"{path.stem[:100]}-{content_key(path)}"
    if target.is_dir():
        return target
    with sole_writer(home):
        return target if target.is_dir() else unpack(path, target, progress)


def _is_data(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return bool(_list_images(path))
    return path.is_file() and zipfile.is_zipfile(path)


def _demo(home: Path) -> Path:
    folder = home / "demo"
    if folder.is_dir():
        return folder
    with sole_writer(home):
        return folder if folder.is_dir() else make_demo(folder)


def _has_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder.lower() in SYSTEM_FOLDERS


def _refuse_folder(error: OSError) -> None:
    raise _unlistable(error) from None


def _unlistable(error: OSError) -> BloodcellError:
    return BloodcellError(
        f"The folder {error.filename} cannot be listed: {error.strerror}.",
        "Give yourself the right to read it, or take it out of the data set.",
    )


def _list_images(root: Path) -> list[tuple[str, str, str]]:
    """(path, label, subset) of every file below ``root`` that looks like an image, sorted."""
    rows = []
    for subset, folder in _subset_folders(_class_root(root)):
        for class_folder in _folders(folder):
            rows += [(str(path), class_folder.name, subset) for path in list_folder(class_folder)]
    return rows


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

    files = table.path.map(real)
    for _, same in table[files.duplicated(keep=False)].groupby(files):
        if same.label.nunique() > 1:
            first, other = same.drop_duplicates("label").path[:2]
            raise BloodcellError(
                f"One image has two labels: {first} and {other} are the same file.",
                "Remove the link that is wrong.",
            )
    by_link = pd.DataFrame({"file": files, "is_link": files != table.path})
    kept = by_link.sort_values("is_link", kind="stable").drop_duplicates("file").index.sort_values()
    return table.loc[kept].reset_index(drop=True), len(table) - len(kept)


def _class_root(root: Path) -> Path:
    """Follow Kaggle's nesting, or folders that hold nothing but one other folder."""
    for nested in ("dataset2-master/dataset2-master/images", "dataset2-master/images", "images"):
        if (root / nested).is_dir():
            return root / nested
    inside = _folders(root)
    if len(inside) == 1 and not inside[0].is_symlink() and _folders(inside[0]):
        return _class_root(inside[0])
    return root


def _subset_folders(root: Path) -> list[tuple[str, Path]]:
    subsets = [f for f in _folders(root) if f.name.lower() in SUBSET_NAMES]
    return [(folder.name, folder) for folder in subsets] or [("", root)]


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(f for f in root.iterdir() if f.is_dir() and not _is_hidden(f.name))
    except OSError as error:
        raise _unlistable(error) from None


def _read_sizes(paths: Sequence[str], progress: Progress) -> list[tuple[int, int] | None]:
    sizes = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, size in enumerate(pool.map(image_size, paths), start=1):
            sizes.append(size)
            progress("Checking images", done, len(paths))
    return sizes


def _missing_images(root: Path, table: pd.DataFrame) -> tuple[str, ...]:
    """A warning if this is the Kaggle set and some of it is missing."""
    if (root / "truth.csv").exists() or set(table.subset) != set(KAGGLE_COUNTS):
        return ()
    found = table.groupby(["subset", "label"]).size()
    wrong = [
        f"{subset}/{label} has {found.get((subset, label), 0):,} of {count:,}"
        for subset, classes in KAGGLE_COUNTS.items()
        for label, count in classes.items()
        if found.get((subset, label), 0) != count
    ]
    return (f"Not the whole Kaggle set: {'; '.join(wrong)}.",) if wrong else ()
