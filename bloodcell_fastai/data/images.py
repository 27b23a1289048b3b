"""From an image file to RGB pixels; which files are images."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import BloodcellError
from ..files import LOCK

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
# The formats that Pillow may read, whatever the suffix. Of the others some are rare and some
# dangerous: it passes EPS to Ghostscript, which runs what the file contains.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 89_478_485  # above which Pillow suspects a decompression bomb
TOO_LARGE = f"more than {MAX_PIXELS:,} pixels"
# What this package writes.
RUN, AUDIT, CONTACT_SHEET = ("config.json", "split.csv"), "audit.json", "contact-sheet.png"
SYSTEM_FOLDERS = {"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir"}


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


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels of an image that can be decoded to its end.

    Raises:
        OSError: it cannot; see :func:`open_image`.
    """
    with _opened(path) as image:
        size = image.size
        # A JPEG decoded at an eighth still reads every byte, in a fraction of the time.
        image.draft(image.mode, (max(size[0] // 8, 1), max(size[1] // 8, 1)))
        image.load()
        return size


def why_unreadable(path: str | Path, error: Exception) -> str:
    """What an error of this module, or of a decoder, says about a file, without its path."""
    reason = str(error).removeprefix(f"{path}: ") if isinstance(error, OSError) else ""
    return reason or f"{type(error).__name__}: {error}"


def list_images(folder: Path) -> list[Path]:
    """Image files below ``folder``, sorted; hidden ones and those of the system passed over.

    Links to files count as files; links to folders are not followed, so that none can lead in a
    circle or into the folder of another class. What this package has written is passed over; see
    :func:`is_written`.

    Raises:
        BloodcellError: a folder cannot be listed.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse_folder):
        folders[:] = [
            name for name in folders if not is_hidden(name) and not is_written(Path(parent, name))
        ]
        if AUDIT not in names:  # whose figures are beside it
            found += [path for name in names if has_image_name(path := Path(parent, name))]
    return sorted(found)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """A file that Pillow knows and that is safe to decode; everything else is an OSError."""
    if not os.path.isfile(path):  # noqa: PTH113 a pipe would wait for ever; False for any name
        raise OSError(f"{path}: no such file" if not os.path.lexists(path) else f"{path}: no file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(TOO_LARGE)
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise OSError("32 bits of grey have no agreed brightness")
            yield image
    except Image.DecompressionBombError:  # whose text names a limit of Pillow's
        raise OSError(f"{path}: {TOO_LARGE}") from None
    except UnidentifiedImageError:  # whose text repeats the path
        raise OSError(f"{path}: cannot identify image file") from None
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


def has_image_name(path: Path) -> bool:
    """Whether a file's name is that of an image that can be read."""
    suffix, name = path.suffix.lower(), path.name
    return suffix in IMAGE_SUFFIXES and not name.startswith(".") and name != CONTACT_SHEET


def is_hidden(folder: str) -> bool:
    """Whether a folder of that name is hidden or the operating system's."""
    return folder.startswith(".") or folder.lower() in SYSTEM_FOLDERS


def is_written(folder: Path) -> bool:
    """Whether a folder is a run, or one where this package unpacks and draws images: its figures
    are no photographs, and its images are of another data set."""
    return (folder / LOCK).is_file() or all((folder / name).is_file() for name in RUN)


def refuse_folder(error: OSError) -> NoReturn:
    """Raise the error for a folder that the system does not list."""
    raise BloodcellError(
        f"The folder {error.filename} cannot be listed: {error.strerror}.",
        "Give yourself the right to read it, or take it out of the data set.",
    ) from None
