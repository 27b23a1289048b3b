"""From an image file to RGB pixels; which files are images."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import cv2
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from ..errors import BloodcellError
from ..files import LOCK

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif"),
    *(".jp2", ".j2k", ".jpx", ".heic", ".heif"),
}
# Pictures that are not read: stacks of microscopes, whole slides, medical images, raw data of
# cameras, rare formats. Some of them begin like a TIFF, which may be no more than a preview.
UNREAD_SUFFIXES = {
    *(".czi", ".lif", ".lsm", ".nd2", ".oib", ".oif", ".oir", ".vsi", ".zvi", ".ims", ".stk"),
    *(".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".qptiff"),
    *(".dcm", ".dicom", ".nii", ".mha", ".mhd", ".nrrd"),
    *(".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".dng"),
    *(".raw", ".jxl", ".jxr", ".psd", ".xcf", ".exr", ".hdr", ".tga", ".pcx", ".ico"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
}
# The formats that Pillow may read, whatever the suffix. Of the others some are rare and some
# dangerous: it passes EPS to Ghostscript, which runs what the file contains.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")
HEIC = re.compile(rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
NO_HEIC = "HEIC is read by the package pillow-heif: pip install pillow-heif"
# What files of these formats begin with, as their specifications say.
SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|II[*+]\0|MM\0[*+]|RIFF.{4}WEBP"
    rb"|\0{3}\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|.{4}ftypavi[fs]|" + HEIC.pattern,
    re.DOTALL,
)
MAX_PIXELS = 89_478_485  # above which Pillow suspects a decompression bomb
TOO_LARGE = f"more than {MAX_PIXELS:,} pixels"
BITS = (10, 12, 14, 16)  # what the samples of cameras use of 16 bits
# Mean brightness, of 255, of no ordinary smear: photographs of Raabin, BCISC, KRD, PBC and Kaggle's
# set have 87 to 224. The 12 bits of a camera that are taken for 16 give at most 16; an empty field
# under a bright lamp has about 240.
NEARLY_BLACK, NEARLY_WHITE = 32, 248
# What this package writes.
RUN, AUDIT, CONTACT_SHEET = ("config.json", "split.csv"), "audit.json", "contact-sheet.png"
SYSTEM_NAMES = {
    *("__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir"),
    *("thumbs.db", "desktop.ini"),
}


class ImageInfo(NamedTuple):
    """What :func:`inspect_image` finds.

    Attributes:
        width: in pixels.
        height: in pixels.
        bits: what the samples use, 8; of an image of 16 bits per sample 10, 12, 14 or 16, or what
            the file says.
        largest: the largest sample of an image of 16 bits per sample; 255 for others.
        brightness: the mean over pixels and colours, 0 to 255, scaled by ``bits``.
    """

    width: int
    height: int
    bits: int
    largest: int
    brightness: float


def open_image(path: str | os.PathLike, bits: int | None = None) -> Image.Image:
    """Read an image as a viewer shows it.

    It is turned by its EXIF tag, in three colours, on white where it is transparent; of an
    animation it is the first frame. Colour profiles are not applied.

    Images of 16 bits per sample are scaled to 8 by what they use: cameras of microscopes write 10,
    12 or 14 bits into files of 16, which viewers show nearly black.

    Args:
        path: of the image.
        bits: what the samples of an image of 16 bits per sample use; larger ones become white.
            None: what the file says, or else the smallest of 10, 12, 14 and 16 that holds its
            largest sample. Other images do not depend on it.

    Raises:
        OSError: the file is missing, empty, truncated, no image, or one that viewers do not agree
            on (32 bits of grey); it has more than 89 million pixels; or it is HEIC and
            pillow-heif is not installed.
    """
    return _read(path, bits)[0]


def inspect_image(path: str | os.PathLike) -> ImageInfo:
    """Size, depth and brightness of an image, which is decoded to its end.

    Raises:
        OSError: it cannot; see :func:`open_image`.
    """
    image, size, bits, largest = _read(path, None, draft=True)
    return ImageInfo(*size, bits, largest, mean_brightness(image))


def mean_brightness(image: Image.Image) -> float:
    """The mean of an RGB image over pixels and colours, 0 to 255."""
    return sum(cv2.mean(np.asarray(image))[:3]) / 3


def bits_used(found: Iterable[ImageInfo]) -> int | None:
    """What the samples of all images together use; None if all are of 8 bits per sample."""
    bits = max((info.bits for info in found), default=8)
    return bits if bits > 8 else None


def describe_light(paths: Sequence[str], found: Sequence[ImageInfo]) -> tuple[str, ...]:
    """A sentence each about images of 16 bits per sample, nearly black and nearly white ones.

    Args:
        paths: of the images of a data set.
        found: of each of them.
    """
    told, bits = [], bits_used(found)
    deep = [info for info in found if info.bits > 8]
    if bits is not None and bits < 16:
        told.append(
            f"{len(deep):,} images are of 16 bits per sample, of which {bits} are used (values up "
            f"to {max(info.largest for info in deep):,}): they are scaled by that; without it they "
            "would be nearly black."
        )
    light = [
        # Each was scaled by its own bits, but is read by those of the data set.
        info.brightness / 2 ** (bits - info.bits) if bits and info.bits > 8 else info.brightness
        for info in found
    ]
    for name, limit, is_odd in (
        ("black", f"below {NEARLY_BLACK}", [mean < NEARLY_BLACK for mean in light]),
        ("white", f"above {NEARLY_WHITE}", [mean > NEARLY_WHITE for mean in light]),
    ):
        if any(is_odd):
            told.append(
                f"{sum(is_odd):,} images are nearly {name}, such as {paths[is_odd.index(True)]}: "
                f"their mean brightness is {limit} of 255."
            )
    return tuple(told)


def why_unreadable(path: str | Path, error: Exception) -> str:
    """What an error of this module, or of a decoder, says about a file, without its path."""
    reason = str(error).removeprefix(f"{path}: ") if isinstance(error, OSError) else ""
    return reason or f"{type(error).__name__}: {error}"


def list_images(folder: Path) -> list[Path]:
    """The images of :func:`list_files`."""
    return list_files(folder)[0]


def list_files(folder: Path, links: bool = False) -> tuple[list[Path], list[Path]]:
    """Images below ``folder``, see :func:`is_image`, and all other files, both sorted; hidden ones
    and those of the system passed over.

    Links to files count as files; links to folders are not followed, or, with ``links``, those
    alone that lead outside of ``folder``, so that none leads in a circle. Folders and images that
    this package has written are passed over; see :func:`is_written`.

    Raises:
        BloodcellError: a folder cannot be listed.
    """
    images: list[Path] = []
    others: list[Path] = []
    root = Path(os.path.realpath(folder))
    for parent, folders, names in os.walk(folder, onerror=refuse_folder, followlinks=links):
        folders[:] = [
            name
            for name in folders
            if not is_hidden(name)
            and not is_written(Path(parent, name))
            and (not links or _may_follow(Path(parent, name), root))
        ]
        for name in names:
            path = Path(parent, name)
            if is_hidden(name) or name == CONTACT_SHEET:
                continue
            if not is_image(path):
                others.append(path)
            elif AUDIT not in names:  # whose figures are beside it
                images.append(path)
    return sorted(images), sorted(others)


def _may_follow(folder: Path, root: Path) -> bool:
    """Whether a folder below ``root`` is no link, or one that leads outside."""
    if not folder.is_symlink():
        return True
    parent, target = Path(os.path.realpath(folder.parent)), Path(os.path.realpath(folder))
    return root in (parent, *parent.parents) and not (
        root in (target, *target.parents) or target in root.parents
    )


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """A file that Pillow knows and that is safe to decode; everything else is an OSError."""
    if not os.path.isfile(path):  # noqa: PTH113 a pipe would wait for ever; False for any name
        raise OSError(f"{path}: no such file" if not os.path.lexists(path) else f"{path}: no file")
    try:
        # By name, Pillow maps uncompressed TIFFs into memory and turns those on their side wrongly.
        with Path(path).open("rb") as file, Image.open(file, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(TOO_LARGE)
            if image.mode in ("F", "I"):
                raise OSError("32 bits of grey have no agreed brightness")
            yield image
    except Image.DecompressionBombError:  # whose text names a limit of Pillow's
        raise OSError(f"{path}: {TOO_LARGE}") from None
    except UnidentifiedImageError:  # whose text repeats the path
        is_heic = HEIC.match(_first_bytes(path)) and "HEIF" not in _formats()
        reason = NO_HEIC if is_heic else "cannot identify image file"
        raise OSError(f"{path}: {reason}") from None
    except Exception as error:  # on damaged files Pillow's readers raise anything
        raise OSError(f"{path}: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    """:data:`FORMATS`, and HEIC where its plugin is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _read(
    path: str | os.PathLike, bits: int | None, draft: bool = False
) -> tuple[Image.Image, tuple[int, int], int, int]:
    """An image as 8-bit RGB, with ``draft`` a JPEG at an eighth of its size; its own size; the bits
    its samples use, and the largest of them; see :class:`ImageInfo`."""
    with _opened(path) as image:
        size = image.size
        if draft:  # which reads every byte too, in a fraction of the time
            image.draft(image.mode, (max(size[0] // 8, 1), max(size[1] // 8, 1)))
        deep_colours = _has_deep_colours(image)
        image.load()
        if not deep_colours and not image.mode.startswith("I;16"):
            return _as_shown(_turned(image)), size, 8, 255
        samples = _deep_colours(image, path) if deep_colours else np.asarray(image)
        largest = int(samples[..., :3].max() if samples.ndim == 3 else samples.max())
        if bits is None:
            bits = _own_bits(image, path, largest)
        scaled = np.minimum(samples >> (bits - 8), 255).astype(np.uint8)
        shown = Image.fromarray(scaled)
        # A TIFF is turned by now; other files keep it in their EXIF data.
        shown.info |= {key: value for key, value in image.info.items() if key != "transparency"}
        return _as_shown(_turned(shown)), size, bits, largest


def _has_deep_colours(image: Image.Image) -> bool:
    """Whether an image that is not loaded has colours of 16 bits each, of which Pillow keeps the
    high bytes alone."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 16 in image.tag_v2.get(258, ())  # BitsPerSample
    return isinstance(image, PngImagePlugin.PngImageFile) and ";16" in str(image.tile)


def _deep_colours(image: Image.Image, path: str | os.PathLike) -> np.ndarray:
    """The samples of a loaded colour image of 16 bits each: uint16 (height, width, 3 or 4), RGB or
    RGBA."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(284) == 2:
        # PlanarConfiguration, of which neither Pillow nor OpenCV takes notice at this depth.
        raise OSError("16 bits per sample with a plane for each colour, which is not read")
    # It would warn of each tag that it does not know.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    found = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16 or found.shape[1::-1] != image.size:
        raise OSError("16 bits per sample in a way that OpenCV cannot read")
    if found.shape[2] == 4 and image.has_transparency_data:
        return found[..., [2, 1, 0, 3]]
    return found[..., 2::-1]


def _own_bits(image: Image.Image, path: str | os.PathLike, largest: int) -> int:
    """How many of 16 bits an image uses, by what the file says, if that is so and below 16, or
    else by its largest sample.

    PNG asks for samples that use all of the 16 bits, with the original depth in sBIT: then that is
    not so. Programs of cameras write the samples as they are.
    """
    said = 0
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        if found := re.search(r'SignificantBits="(\d{1,2})"', str(tags.get(270, ""))):  # OME-TIFF
            said = int(found[1])
        elif 281 in tags:  # MaxSampleValue
            said = int(np.max(tags[281])).bit_length()
        else:  # BitsPerSample: 12 may be packed
            said = int(np.max(tags.get(258, 16)))
    elif isinstance(image, PngImagePlugin.PngImageFile):
        head = _first_bytes(path, 4096).partition(b"IDAT")[0]
        said = int.from_bytes(head.partition(b"sBIT")[2][:1])
    if 8 < said < 16 and largest < 2**said:
        return said
    return next(bits for bits in BITS if largest < 2**bits)


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag, which viewers pass over
        return image


def _as_shown(image: Image.Image) -> Image.Image:
    """A loaded image of 8 bits per sample as RGB."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def is_image(path: Path) -> bool:
    """Whether a file is an image that can be read, or has the name of one. Of a file of another
    suffix, or of none, the first bytes decide."""
    suffix, name = path.suffix.lower(), path.name
    if is_hidden(name) or name == CONTACT_SHEET or suffix in UNREAD_SUFFIXES:
        return False
    return suffix in IMAGE_SUFFIXES or SIGNATURES.match(_first_bytes(path)) is not None


def _first_bytes(path: str | os.PathLike, n: int = 16) -> bytes:
    """The beginning of a file; nothing where it cannot be read."""
    try:
        if not os.path.isfile(path):  # noqa: PTH113 a pipe would wait for ever
            return b""
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(n)
    except OSError:
        return b""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is hidden or the operating system's."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


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
