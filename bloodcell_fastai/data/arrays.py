"""Data sets that are one ``.npz`` of arrays, in the layout of MedMNIST.

It holds ``train_images``, ``train_labels`` and the same of ``val`` and ``test``; labels are
numbers. BloodMNIST is one: 17,092 images of PBC (Acevedo et al. 2020, Data in Brief 30:105474), cut
to the middle 200 pixels and resized to 28, 64, 128 or 224 (Yang et al. 2023, Scientific Data 10:41;
CC BY 4.0; https://zenodo.org/records/10519652).
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from ..errors import DataError
from ..files import atomic_folder
from ..reporter import Progress, no_progress
from .archives import Allowance, explained
from .images import MAX_PIXELS
from .public_sets import PUBLIC_SETS

SUBSETS = ("train", "val", "test")
BLOODMNIST = next(known.codes for known in PUBLIC_SETS if known.name == "BloodMNIST")
"""The classes of BloodMNIST by number, as text."""
BLOODMNIST_COUNTS = {"train": 11_959, "val": 1_712, "test": 3_421}

_HINT = "Save them as BloodMNIST has them, or as image files in a folder per class."


def holds_arrays(path: Path) -> bool:
    """Whether a file is an ``.npz`` with the images and the labels of at least one subset, by its
    table of contents alone."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with explained(path, ".npz"), zipfile.ZipFile(path) as zipped:
            names = set(zipped.namelist())
    except DataError:
        return False
    return any({f"{subset}_images.npy", f"{subset}_labels.npy"} <= names for subset in SUBSETS)


def unpack_arrays(path: Path, target: Path, progress: Progress = no_progress) -> Path:
    """Write the images of an ``.npz`` as ``target/train/basophil/00000.png`` and so on, numbered as
    in their array. ``target``, which is returned, appears only when complete.

    Images are ``uint8`` of shape (n, height, width), (n, height, width, 1) or (n, height, width,
    3), labels integers of shape (n,) or (n, 1). The classes of BloodMNIST, which is known by the
    name of the file or the number of its images, have their names; those of others are numbers.
    One image at a time is in memory, and the labels.

    Raises:
        BloodcellError: a zip that is damaged, or arrays that are of another type or shape, do not
            fit together or would have to be unpickled; or there is no room on the disk.
    """
    with explained(path, ".npz"), zipfile.ZipFile(path) as zipped:
        names = {name.removesuffix(".npy") for name in zipped.namelist()}
        subsets = [s for s in SUBSETS if {f"{s}_images", f"{s}_labels"} & names]
        shapes, labels = {}, {}
        for subset in subsets:
            shapes[subset], labels[subset] = _checked(zipped, path, subset, names)
        n_images = sum(map(len, labels.values()))
        if not n_images:
            raise DataError(f"{path} holds no images.", _HINT)
        Allowance(path).take(n_images, sum(map(math.prod, shapes.values())), path, target)
        classes = _classes(path, labels)
        done = 0
        with atomic_folder(target) as folder:
            for subset in subsets:
                digits = max(5, len(str(len(labels[subset]) - 1)))
                images = _images(zipped, path, f"{subset}_images")
                for number, (image, label) in enumerate(zip(images, labels[subset], strict=True)):
                    file = folder / subset / classes[label] / f"{number:0{digits}}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(file, compress_level=1)
                    progress("Unpacking", done := done + 1, n_images)
    return target


def _checked(
    zipped: zipfile.ZipFile, path: Path, subset: str, names: set[str]
) -> tuple[tuple[int, ...], list[int]]:
    """The shape of the images of a subset, and their labels."""
    for one, other in (("images", "labels"), ("labels", "images")):
        if f"{subset}_{one}" not in names:
            raise DataError(f"{path} holds {subset}_{other} and no {subset}_{one}.", _HINT)
    with _array(zipped, path, f"{subset}_images") as (_, shape, dtype):
        grey = len(shape) == 3
        if dtype != np.uint8 or not (grey or (len(shape) == 4 and shape[3] in (1, 3))):
            raise DataError(
                f"{path}: {subset}_images is of {dtype} and shape {shape}, not of uint8 and "
                "(images, height, width) or (images, height, width, 3).",
                _HINT,
            )
        if not 0 < shape[1] * shape[2] <= MAX_PIXELS:
            raise DataError(f"{path}: {subset}_images has images of {shape[1:3]} pixels.", _HINT)
    labels = _labels(zipped, path, f"{subset}_labels")
    if len(labels) != shape[0]:
        raise DataError(
            f"{path} holds {shape[0]:,} {subset}_images and {len(labels):,} {subset}_labels.", _HINT
        )
    return shape, labels


def _labels(zipped: zipfile.ZipFile, path: Path, name: str) -> list[int]:
    with _array(zipped, path, name) as (file, shape, dtype):
        if len(shape) == 2 and shape[1] > 1:
            raise DataError(
                f"{path}: {name} has the shape {shape}, {shape[1]} values for each image. They are "
                "one-hot, or an image has several labels.",
                "Save the number of one class for each image.",
            )
        if dtype.kind not in "iu" or len(shape) not in (1, 2):
            raise DataError(
                f"{path}: {name} is of {dtype} and shape {shape}, not integers, one for each "
                "image.",
                _HINT,
            )
        return np.frombuffer(file.read(), dtype).tolist()


def _images(zipped: zipfile.ZipFile, path: Path, name: str) -> Iterator[np.ndarray]:
    """Each image, uint8 of shape (height, width) or (height, width, 3)."""
    with _array(zipped, path, name) as (file, shape, _):
        image_shape = shape[1:] if shape[-1] == 3 and len(shape) == 4 else shape[1:3]
        for _ in range(shape[0]):
            content = file.read(math.prod(image_shape))
            yield np.frombuffer(content, np.uint8).reshape(image_shape)


@contextmanager
def _array(
    zipped: zipfile.ZipFile, path: Path, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """The values of an array, to be read one after the other, its shape and its dtype."""
    with zipped.open(f"{name}.npy") as file:
        if (version := np.lib.format.read_magic(file)) != (1, 0):  # others have no limited header
            raise DataError(f"{path}: {name} is of version {version} of the format.", _HINT)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise DataError(
                f"{path}: {name} holds Python objects. They are pickled, and a pickle can run "
                "anything.",
                "Save images as uint8 and labels as integers.",
            )
        if fortran_order:
            raise DataError(
                f"{path}: {name} is in the order of Fortran.",
                "Save what numpy.ascontiguousarray makes of it.",
            )
        size = file.tell() + math.prod(shape) * dtype.itemsize
        if zipped.getinfo(f"{name}.npy").file_size != size:
            raise DataError(
                f"{path}: {name} has not the {size:,} bytes of its shape {shape}.",
                "Download it again.",
            )
        yield file, shape, dtype


def _classes(path: Path, labels: dict[str, list[int]]) -> dict[int, str]:
    """The name of each class, by number."""
    numbers = {number for of_subset in labels.values() for number in of_subset}
    counts = {subset: len(of_subset) for subset, of_subset in labels.items()}
    name = path.stem.lower().replace("_", "").replace("-", "")
    is_bloodmnist = "bloodmnist" in name or counts == BLOODMNIST_COUNTS
    names = {number: str(number) for number in numbers}
    if is_bloodmnist and set(names.values()) <= BLOODMNIST.keys():
        return {number: BLOODMNIST[name] for number, name in names.items()}
    return names
