"""From image files to uint8 batches: decoded ahead by threads, or once for all into a cache."""

import errno
import hashlib
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..errors import CacheWarning, DataError
from ..files import atomic_path, sole_writer, user_home
from ..reporter import Progress, no_progress
from .crop import crop_image
from .images import mean_brightness, open_image, why_unreadable

CACHE_VERSION = 5  # raise it when decode() gives other pixels, or more than before
SPARE_DISK = 2**30  # bytes the cache leaves free
BATCHES_AHEAD = 2
CHUNK = 64  # images decoded at a time while the cache is made

Change = Callable[[Image.Image], Image.Image]
"""What may be done to an image, RGB, before it is cropped."""


class Picture(NamedTuple):
    """An image as the network sees it.

    Attributes:
        pixels: uint8 (size, size, 3), RGB.
        box: the crop in the original image: left, top, right, bottom, in pixels.
        has_cell: whether a white cell was found; true for the crop ``frame``, which looks for none.
        brightness: the mean of the whole image as it was opened, 0 to 255.
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    has_cell: bool
    brightness: float


@dataclass(frozen=True)
class PictureBatch:
    """Decoded images.

    Attributes:
        paths: of the images that could be read.
        pixels: uint8 (n, 3, size, size), RGB, channels last in memory.
        boxes: int32 (n, 4), the crops; see :class:`Picture`.
        has_cell: bool (n,).
        brightness: float32 (n,), 0 to 255; see :class:`Picture`.
        unreadable: the reason for each path that could not be read.
    """

    paths: list[str]
    pixels: torch.Tensor
    boxes: np.ndarray
    has_cell: np.ndarray
    brightness: np.ndarray
    unreadable: dict[str, str]

    def __len__(self) -> int:
        return len(self.paths)


def decode(
    path: str | Path,
    size: int,
    crop: str = "cell",
    change: Change | None = None,
    bits: int | None = None,
) -> Picture:
    """Read an image, crop it and resize it to a square, without keeping the aspect ratio.

    The pixels are those of fastai's ``Resize(size, ResizeMethod.Squish)``, bit for bit.

    Args:
        path: an image file.
        size: of the square, in pixels.
        crop: ``cell`` or ``frame``, see :func:`~bloodcell_fastai.data.crop.crop_image`.
        change: made to the whole image before it is cropped.
        bits: what images of 16 bits per sample use of them; see
            :func:`~bloodcell_fastai.data.images.open_image`.

    Raises:
        OSError: the image cannot be read.
    """
    image = open_image(path, bits)
    part, box, has_cell = crop_image(change(image) if change else image, crop)
    pixels = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
    return Picture(pixels, box, has_cell, mean_brightness(image))


class ImageReader:
    """Reads images at one size and crop, a batch at a time, from the cache where there is one.

    Args:
        size: of the square, in pixels.
        crop: ``cell`` or ``frame``, see :func:`~bloodcell_fastai.data.crop.crop_image`.
        threads: how many decode; 0: only the caller; None: as many as there are processors,
            at most 8.
        change: see :func:`decode`; a reader with one uses no cache.
        bits: see :func:`decode`; None: of each image by itself.
    """

    def __init__(
        self,
        size: int,
        crop: str = "cell",
        threads: int | None = None,
        change: Change | None = None,
        bits: int | None = None,
    ):
        self.size, self.crop, self.threads, self.change = size, crop, threads, change
        self.bits = bits
        self._cached: np.ndarray | None = None
        self._rows: dict[str, int] = {}
        self._on_device: torch.Tensor | None = None

    @classmethod
    def open(
        cls,
        paths: Sequence[str],
        size: int,
        crop: str = "cell",
        build: bool = False,
        threads: int | None = None,
        progress: Progress = no_progress,
        bits: int | None = None,
    ) -> "ImageReader":
        """A reader of ``paths`` with the cache of just these files, if there is one.

        With ``build`` the cache is made, by one process at a time. Where the disk has no room for
        it, or its folder cannot be written to, a warning says so:
        :class:`~bloodcell_fastai.errors.CacheWarning`.

        Raises:
            BloodcellError: an image cannot be read (with ``build``).
        """
        reader, paths = cls(size, crop, threads, bits=bits), sorted(set(map(str, paths)))
        if (file := cache_file(paths, size, crop, bits)) is None:
            return reader
        cached = _load(file, len(paths), size)
        if cached is None and build:
            try:
                with sole_writer(file.parent):
                    # Another process may have made it meanwhile.
                    if (cached := _load(file, len(paths), size)) is None:
                        _require_room(file.parent, len(paths) * _row_type(size).itemsize)
                        reader._build(file, paths, progress)
                        cached = _load(file, len(paths), size)
            except OSError as error:  # images are decoded as they come
                warnings.warn(
                    f"NO CACHE: decoded images cannot be kept in {file.parent} "
                    f"({error.strerror or error}). They are decoded again in every epoch, which "
                    "takes longer. $BLOODCELL_CACHE can name another folder.",
                    CacheWarning,
                    stacklevel=2,
                )
        if cached is not None:
            reader._cached = cached
            reader._rows = {path: row for row, path in enumerate(paths)}
        return reader

    def __getstate__(self) -> dict:
        """What a pickle keeps, such as fastai's ``learn.export``: no images."""
        return self.__dict__ | {"_rows": {}, "_cached": None, "_on_device": None}

    def move_to(self, device: torch.device) -> None:
        """Keep the cached pixels in the memory of a CUDA device that has ample room for them."""
        if device.type != "cuda" or self._cached is None or self._on_device is not None:
            return
        free, _ = torch.cuda.mem_get_info(device)
        if self._cached.nbytes < free / 4:  # the model and its activations need the rest
            pixels = np.ascontiguousarray(self._cached["pixels"])
            self._on_device = torch.from_numpy(pixels).to(device)

    def read(self, paths: Sequence[str | Path]) -> PictureBatch:
        """All of ``paths`` as one batch."""
        return next(self.batches([list(map(str, paths))]))

    def batches(self, chunks: Iterable[Sequence[str]]) -> Iterator[PictureBatch]:
        """The images of each chunk of paths, which are drawn from ``chunks`` as they are needed."""
        if self._cached is None:
            yield from self._decode_ahead(chunks)
            return
        for chunk in chunks:
            if all(path in self._rows for path in chunk):
                yield self._gather(self._cached, chunk)
            else:  # of a file that came later
                yield from self._decode_ahead([chunk])

    def _gather(self, cache: np.ndarray, paths: Sequence[str]) -> PictureBatch:
        rows = np.array([self._rows[path] for path in paths], dtype=np.intp)
        cached = cache[rows]
        if self._on_device is not None:
            pixels = self._on_device[torch.from_numpy(rows).to(self._on_device.device)]
        else:
            pixels = torch.from_numpy(cached["pixels"])
        return PictureBatch(
            list(paths),
            pixels.permute(0, 3, 1, 2),
            cached["box"],
            cached["has_cell"],
            cached["brightness"],
            {},
        )

    def _decode_ahead(self, chunks: Iterable[Sequence[str]]) -> Iterator[PictureBatch]:
        """Decode in threads, a few chunks ahead of the consumer."""
        if self.threads == 0:
            for chunk in chunks:
                yield self._collect(chunk, map(self._try_decode, chunk))
            return
        threads = self.threads or min(8, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        waiting: deque[tuple[Sequence[str], Iterator[Picture | str]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.map(self._try_decode, chunk)))
                if len(waiting) > BATCHES_AHEAD:
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _try_decode(self, path: str) -> Picture | str:
        """The image, or why it cannot be read."""
        try:
            return decode(path, self.size, self.crop, self.change, self.bits)
        except Exception as error:  # a decoder may fail in its own way, or have no memory left
            return why_unreadable(path, error)

    def _collect(self, paths: Sequence[str], found: Iterable[Picture | str]) -> PictureBatch:
        readable, pictures, unreadable = [], [], {}
        for path, picture in zip(paths, found, strict=True):
            if isinstance(picture, str):
                unreadable[path] = picture
            else:
                readable.append(path)
                pictures.append(picture)
        rows = np.array(pictures, dtype=_row_type(self.size))
        pixels = torch.from_numpy(rows["pixels"]).permute(0, 3, 1, 2)
        return PictureBatch(
            readable, pixels, rows["box"], rows["has_cell"], rows["brightness"], unreadable
        )

    def _build(self, file: Path, paths: Sequence[str], progress: Progress) -> None:
        row_type = _row_type(self.size)
        header = {
            "descr": np.lib.format.dtype_to_descr(row_type),
            "fortran_order": False,
            "shape": (len(paths),),
        }
        # Written, not mapped: on a full disk a write is an error, but a page of a map is a crash.
        with atomic_path(file) as temporary, temporary.open("wb") as output:
            np.lib.format.write_array_header_1_0(output, header)
            done = 0
            starts = range(0, len(paths), CHUNK)
            for batch in self.batches(paths[start : start + CHUNK] for start in starts):
                require_readable(batch)
                rows = np.empty(len(batch), row_type)
                rows["pixels"] = batch.pixels.permute(0, 2, 3, 1).numpy()
                rows["box"], rows["has_cell"] = batch.boxes, batch.has_cell
                rows["brightness"] = batch.brightness
                output.write(rows.tobytes())
                done += len(batch)
                progress("Decoding images", done, len(paths))
        names, px, *_ = file.name.split("-")
        for stale in file.parent.glob(f"{names}-{px}-*.npy"):
            if stale != file:
                stale.unlink(missing_ok=True)


def _require_room(folder: Path, needed: int) -> None:
    """Raise an OSError where a file of ``needed`` bytes would leave too little of the disk."""
    free = shutil.disk_usage(folder).free
    if free <= needed + SPARE_DISK:
        room = f"{needed / 1e9:.1f} GB are needed, and {SPARE_DISK / 1e9:.1f} GB to spare"
        raise OSError(errno.ENOSPC, f"{room}; {free / 1e9:.1f} GB are free")


def require_readable(batch: PictureBatch) -> None:
    """Refuse a batch with files that cannot be read.

    Raises:
        BloodcellError: there are some; the message names the first.
    """
    for path, reason in batch.unreadable.items():
        raise DataError(
            f"{path} cannot be read: {reason}.",
            "Put the image back or take it out of the data set, then go on with `resume`.",
        )


def cache_root() -> Path:
    """Folder of the decoded images: ``$BLOODCELL_CACHE``, else one in the user's cache."""
    if chosen := os.environ.get("BLOODCELL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or user_home() / ".cache", "bloodcell_fastai")


def cache_file(paths: Sequence[str], size: int, crop: str, bits: int | None = None) -> Path | None:
    """Where the decoded images of ``paths`` belong: the name changes with the list of files,
    with the length or time of any, with the size, the crop and the bits of 16 that are used. None
    if a file is missing."""
    names = _digest(*paths)
    try:
        states = [os.stat(path) for path in paths]  # noqa: PTH116 thousands of times: speed
    except OSError:
        return None
    contents = _digest(*(f"{state.st_size} {state.st_mtime_ns}" for state in states))
    seen = f"{size}px_{crop}" + (f"_{bits}bit" if bits else "")
    return cache_root() / f"{names}-{seen}-{contents}-v{CACHE_VERSION}.npy"


def clear_cache() -> int:
    """Remove all decoded images; the bytes that were freed."""
    with sole_writer(cache_root()):
        files = [path for path in cache_root().glob("*.npy") if path.is_file()]
        freed = sum(path.stat().st_size for path in files)
        for path in files:
            path.unlink()
    return freed


def _row_type(size: int) -> np.dtype:
    """A cached :class:`Picture`."""
    return np.dtype(
        [
            ("pixels", "u1", (size, size, 3)),
            ("box", "<i4", (4,)),
            ("has_cell", "?"),
            ("brightness", "<f4"),
        ]
    )


def _load(file: Path, n_images: int, size: int) -> np.ndarray | None:
    try:
        cached = np.lib.format.open_memmap(file, mode="r")  # np.load reads more than arrays
    except (OSError, ValueError):  # absent, cut short, or no array
        return None
    fits = cached.shape == (n_images,) and cached.dtype == _row_type(size)
    return cached if fits else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
