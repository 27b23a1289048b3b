"""From image files to uint8 batches: decoded ahead by threads, or once for all into a cache."""

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import BloodcellError
from ..files import atomic_path, sole_writer
from .dataset import Progress, no_progress, open_image
from .framing import cut_out

CACHE_VERSION = 3  # raise it when decode() gives other pixels
SPARE_DISK = 2**30  # bytes the cache leaves free
BATCHES_AHEAD = 2

Change = Callable[[Image.Image], Image.Image]
"""What may be done to a picture, RGB, before the network's part is cut out of it."""


@dataclass(frozen=True)
class Picture:
    """What the network sees of an image.

    Attributes:
        pixels: uint8 (size, size, 3), RGB.
        has_cell: whether a white cell was found; for the crop ``frame``, which looks for none,
            true.
    """

    pixels: np.ndarray
    has_cell: bool


def decode(
    path: str | Path, size: int, crop: str = "cell", change: Change | None = None
) -> np.ndarray:
    """What :func:`~bloodcell_fastai.data.framing.framed` leaves of an image, squeezed to a
    square: uint8 (size, size, 3), what fastai's ``Resize(size, ResizeMethod.Squish)`` makes of
    it, bit for bit.

    Args:
        path: an image file.
        size: side of the square, in pixels.
        crop: ``cell`` or ``frame``, see :func:`~bloodcell_fastai.data.framing.framed`.
        change: made to the whole picture first, so that the part is looked for in the result.

    Raises:
        OSError: the image cannot be read.
    """
    return _picture(path, size, crop, change).pixels


def _picture(path: str | Path, size: int, crop: str, change: Change | None) -> Picture:
    image = open_image(path)
    image = change(image) if change else image
    part, has_cell = (image, True) if crop == "frame" else cut_out(image)
    return Picture(np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)), has_cell)


def decode_ahead(
    chunks: Iterable[Sequence[str]],
    size: int,
    crop: str,
    threads: int | None = None,
    change: Change | None = None,
) -> Iterator[tuple[Sequence[str], list[Picture | OSError]]]:
    """Decode chunk after chunk in threads, a few chunks ahead of the consumer.

    Args:
        chunks: paths, a batch at a time; drawn from as they are needed.
        size: side of the square, in pixels.
        crop: ``cell`` or ``frame``, see :func:`~bloodcell_fastai.data.framing.framed`.
        threads: how many decode; as many as there are processors, at most 8, if None.
        change: see :func:`decode`.

    Yields:
        Each chunk with its pictures, or the error where one cannot be read.
    """
    pool = ThreadPoolExecutor(threads or _threads(), thread_name_prefix="decode")
    waiting: deque[tuple[Sequence[str], list[Future]]] = deque()
    try:
        for chunk in chunks:
            futures = [pool.submit(_try_decode, path, size, crop, change) for path in chunk]
            waiting.append((chunk, futures))
            if len(waiting) > BATCHES_AHEAD:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


class Pixels:
    """The pictures of one size, as batches: from the cache if there is one, else decoded.

    Args:
        size: side of the square, in pixels.
        crop: ``cell`` or ``frame``, see :func:`~bloodcell_fastai.data.framing.framed`.
        threads: see :func:`decode_ahead`.
        cached: uint8 (images, size, size, 3), or None.
        rows: the row of each path in ``cached``.
        change: see :func:`decode`; what is cached passes it by.
    """

    def __init__(
        self,
        size: int,
        crop: str = "cell",
        threads: int | None = None,
        cached: np.ndarray | None = None,
        rows: dict[str, int] | None = None,
        change: Change | None = None,
    ):
        self.size, self.crop, self.threads, self.rows = size, crop, threads, rows or {}
        self._cached, self.change = cached, change
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
    ) -> "Pixels":
        """The pixels of ``paths``, from the cache of just these files at this size if there is
        one. With ``build`` one is made, if the disk has room for it and lets us write; a second
        process that wants it too waits for the first.

        Raises:
            BloodcellError: an image cannot be read (with ``build``).
        """
        paths = sorted(set(map(str, paths)))
        file = cache_file(paths, size, crop)
        cached = _load(file, len(paths), size) if file else None
        if cached is None and file and build:
            cached = _load_or_build(file, paths, size, crop, threads, progress)
        if cached is None:
            return cls(size, crop, threads)
        return cls(size, crop, threads, cached, {path: row for row, path in enumerate(paths)})

    def __getstate__(self) -> dict:
        """What a pickle keeps, such as fastai's ``learn.export``: no pictures."""
        return self.__dict__ | {"rows": {}, "_cached": None, "_on_device": None}

    def move_to(self, device: torch.device) -> None:
        """Keep the cached pixels in the memory of a CUDA device that has ample room for them."""
        if device.type != "cuda" or self._cached is None or self._on_device is not None:
            return
        free, _ = torch.cuda.mem_get_info(device)
        if self._cached.nbytes < free / 4:  # the model and its activations need the rest
            self._on_device = torch.from_numpy(np.array(self._cached)).to(device)

    def batches(self, chunks: Iterable[Sequence[str]]) -> Iterator[torch.Tensor]:
        """The images of each chunk of paths, uint8 (n, 3, size, size), channels last in memory.

        Raises:
            BloodcellError: an image cannot be read.
        """
        if self._cached is None:
            how = (self.size, self.crop, self.threads, self.change)
            for chunk, images in decode_ahead(chunks, *how):
                yield stack(chunk, images)
            return
        for chunk in chunks:
            yield self._gather(chunk)

    def _gather(self, paths: Sequence[str]) -> torch.Tensor:
        if self._cached is None or any(path not in self.rows for path in paths):  # it came later
            return stack(paths, [_try_decode(path, self.size, self.crop) for path in paths])
        rows = np.array([self.rows[path] for path in paths])
        if self._on_device is not None:
            images = self._on_device[torch.from_numpy(rows).to(self._on_device.device)]
        else:
            images = torch.from_numpy(self._cached[rows])
        return images.permute(0, 3, 1, 2)


def stack(paths: Sequence[str], images: Sequence[Picture | OSError]) -> torch.Tensor:
    """Decoded images as one batch, uint8 (n, 3, size, size), channels last in memory.

    Raises:
        BloodcellError: one of them could not be read.
    """
    decoded = []
    for path, image in zip(paths, images, strict=True):
        if isinstance(image, OSError):
            raise BloodcellError(
                f"{path} cannot be read: {str(image).removeprefix(f'{path}: ')}.",
                "Put the image back or take it out of the data set, then go on with --resume.",
            )
        decoded.append(image.pixels)
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


def cache_root() -> Path:
    """Folder of the decoded images: ``$BLOODCELL_CACHE``, else one in the user's cache."""
    if chosen := os.environ.get("BLOODCELL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bloodcell_fastai")


def cache_file(paths: Sequence[str], size: int, crop: str) -> Path | None:
    """Where the decoded images of ``paths`` belong: the name changes with the list of files,
    with the length or time of any, with the size and with the crop. None if a file is missing."""
    names = _digest(*paths)
    try:
        states = [os.stat(path) for path in paths]  # noqa: PTH116 thousands of times: speed
    except OSError:
        return None
    contents = _digest(*(f"{state.st_size} {state.st_mtime_ns}" for state in states))
    return cache_root() / f"{names}-{size}px_{crop}-{contents}-v{CACHE_VERSION}.npy"


def clear_cache() -> int:
    """Remove all decoded images; the bytes that were freed."""
    with sole_writer(cache_root()):
        files = [path for path in cache_root().glob("*.npy") if path.is_file()]
        freed = sum(path.stat().st_size for path in files)
        for path in files:
            path.unlink()
    return freed


def _load_or_build(
    file: Path,
    paths: Sequence[str],
    size: int,
    crop: str,
    threads: int | None,
    progress: Progress,
) -> np.ndarray | None:
    """The cache, made if another process has not made it meanwhile; None if it cannot be kept."""
    try:
        with sole_writer(file.parent):
            cached = _load(file, len(paths), size)
            if cached is None and _has_room(file, len(paths), size):
                _build(file, paths, size, crop, threads, progress)
                cached = _load(file, len(paths), size)
            return cached
    except OSError:  # a full disk, a folder that is not ours: the images are decoded as they come
        return None


def _build(
    file: Path,
    paths: Sequence[str],
    size: int,
    crop: str,
    threads: int | None,
    progress: Progress,
) -> None:
    shape = (len(paths), size, size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    # Written, not mapped: on a full disk a write is an error, but a page of a map is a crash.
    with atomic_path(file) as temporary, temporary.open("wb") as output:
        np.lib.format.write_array_header_1_0(output, header)
        done, step = 0, 64
        chunks = (paths[start : start + step] for start in range(0, len(paths), step))
        for chunk, decoded in decode_ahead(chunks, size, crop, threads):
            output.write(stack(chunk, decoded).permute(0, 2, 3, 1).numpy().tobytes())
            done += len(chunk)
            progress("Decoding images", done, len(paths))
    names, px, *_ = file.name.split("-")
    for stale in file.parent.glob(f"{names}-{px}-*.npy"):
        if stale != file:
            stale.unlink(missing_ok=True)


def _load(file: Path, n_images: int, size: int) -> np.ndarray | None:
    try:
        cached = np.lib.format.open_memmap(file, mode="r")  # np.load reads more than arrays
    except (OSError, ValueError):  # absent, cut short, or no array
        return None
    fits = cached.shape == (n_images, size, size, 3) and cached.dtype == np.uint8
    return cached if fits else None


def _has_room(file: Path, n_images: int, size: int) -> bool:
    return shutil.disk_usage(file.parent).free > n_images * size * size * 3 + SPARE_DISK


def _finished(chunk: Sequence[str], futures: list[Future]) -> tuple[Sequence[str], list]:
    return chunk, [future.result() for future in futures]


def _try_decode(path: str, size: int, crop: str, change: Change | None = None) -> Picture | OSError:
    try:
        return _picture(path, size, crop, change)
    except OSError as error:
        return error
    except Exception as error:  # a decoder that fails in its own way, or has no memory left
        return OSError(f"{type(error).__name__}: {error}")


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
