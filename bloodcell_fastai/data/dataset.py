"""From a folder, a zip or a download to the image table."""

import os
import socket
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from ..errors import BloodcellError
from ..files import atomic_folder, sole_writer
from .smears import make_demo

KAGGLE_HANDLE = "paultimothymooney/blood-cells"
KAGGLE_URL = f"https://www.kaggle.com/datasets/{KAGGLE_HANDLE}"
KAGGLE_COUNTS = {
    "TRAIN": {"EOSINOPHIL": 2497, "LYMPHOCYTE": 2483, "MONOCYTE": 2478, "NEUTROPHIL": 2499},
    "TEST": {"EOSINOPHIL": 623, "LYMPHOCYTE": 620, "MONOCYTE": 620, "NEUTROPHIL": 624},
    "TEST_SIMPLE": {"EOSINOPHIL": 13, "LYMPHOCYTE": 6, "MONOCYTE": 4, "NEUTROPHIL": 48},
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
SUBSET_NAMES = {"train", "training", "valid", "val", "validation", "test", "testing", "test_simple"}
MAX_UNREADABLE_SHARE = 0.05

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` while something long goes on."""


def no_progress(what: str, done: int, total: int) -> None:
    """The :data:`Progress` that shows nothing."""


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

    Raises:
        BloodcellError: nothing usable is there; the message says what was found.
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
            return tuple(sorted(path for path in folder.iterdir() if _is_image(path)))
    return ()


def unpack(archive: Path, target: Path, progress: Progress = no_progress) -> Path:
    """Unpack a zip into ``target``, which appears only when complete. Returns ``target``.

    Raises:
        BloodcellError: not a zip, damaged, or a member would land outside the target.
    """
    try:
        with zipfile.ZipFile(archive) as zipped, atomic_folder(target) as folder:
            members = [member for member in zipped.infolist() if not member.is_dir()]
            for member in members:
                _check_member(member, archive)
            for done, member in enumerate(members, start=1):
                zipped.extract(member, folder)
                progress("Unpacking", done, len(members))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise BloodcellError(
            f"{archive} is not a zip that can be unpacked: {error}.", "Download it again."
        ) from None
    return target


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


def open_image(path: str | Path) -> Image.Image:
    """Read an image as a viewer shows it: turned by its EXIF tag, three colours, no alpha.

    Raises:
        OSError: the file is missing, empty, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {error}") from error


def image_size(path: str | Path) -> tuple[int, int] | None:
    """(width, height) in pixels, or None if the image cannot be decoded to its end."""
    try:
        with Image.open(path) as image:
            size = image.size
            # A JPEG decoded at an eighth still reads every byte, in a fraction of the time.
            image.draft(image.mode, (size[0] // 8, size[1] // 8))
            image.load()
            return size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def list_folder(folder: Path) -> list[Path]:
    """Image files below ``folder``, sorted; hidden ones passed over, links not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for name in names if _is_image(path := Path(parent, name))]
    return sorted(found)


def _as_folder(path: Path, home: Path, progress: Progress) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise BloodcellError(f"No file or folder {path}.", "Check the path given to --data.")
    if not zipfile.is_zipfile(path):
        raise BloodcellError(
            f"{path} is neither a folder nor a zip.", "Give a zip or a folder with classes."
        )
    target = home / f"{path.stem}-{_content_key(path)}"
    if target.is_dir():
        return target
    with sole_writer(home):
        return target if target.is_dir() else unpack(path, target, progress)


def _content_key(archive: Path) -> str:
    """Eight hex digits that name what a zip contains, from its table of contents alone."""
    with zipfile.ZipFile(archive) as zipped:
        listing = "".join(f"{m.filename}{m.CRC}" for m in zipped.infolist())
    return f"{zlib.crc32(listing.encode()):08x}"


def _check_member(member: zipfile.ZipInfo, archive: Path) -> None:
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        raise BloodcellError(
            f"{archive} would write outside its folder: {member.filename!r}.",
            "Do not use this archive: it is damaged or hostile.",
        )


def _is_data(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return bool(path.is_dir() and _list_images(path)) or zipfile.is_zipfile(path)


def _demo(home: Path) -> Path:
    folder = home / "demo"
    if folder.is_dir():
        return folder
    with sole_writer(home):
        return folder if folder.is_dir() else make_demo(folder)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _list_images(root: Path) -> list[tuple[str, str, str]]:
    """(path, label, subset) of every file below ``root`` that looks like an image, sorted."""
    rows = []
    for subset, folder in _subset_folders(_class_root(root)):
        for class_folder in _folders(folder):
            rows += [(str(path), class_folder.name, subset) for path in list_folder(class_folder)]
    return rows


def _class_root(root: Path) -> Path:
    """Follow Kaggle's nesting, or folders that hold nothing but one other folder."""
    for nested in ("dataset2-master/dataset2-master/images", "dataset2-master/images", "images"):
        if (root / nested).is_dir():
            return root / nested
    inside = _folders(root)
    if len(inside) == 1 and _folders(inside[0]):
        return _class_root(inside[0])
    return root


def _subset_folders(root: Path) -> list[tuple[str, Path]]:
    subsets = [f for f in _folders(root) if f.name.lower() in SUBSET_NAMES]
    return [(folder.name, folder) for folder in subsets] or [("", root)]


def _folders(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))


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
