"""From the image table to batches: a fastai DataBlock with augmentation on the device."""

import os
from collections.abc import Sequence
from itertools import tee

import numpy as np
import pandas as pd
import timm
import torch
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    DataBlock,
    DataLoaders,
    IndexSplitter,
    IntToFloatTensor,
    Normalize,
    PILImage,
    Resize,
    ResizeMethod,
    TensorCategory,
    TensorImage,
    TfmdDL,
    Transform,
    TransformBlock,
)
from timm.models import PretrainedCfg

from ..config import DEFAULT_ARCH, ResolvedConfig
from ..device import pick_device, prediction_batch_size
from ..errors import DataError
from ..reporter import Progress, no_progress
from .augment import augmentation
from .cache import ImageReader, require_readable
from .crop import crop_image
from .images import open_image


class BloodImage(PILImage):
    """A PILImage opened by :func:`~bloodcell_fastai.data.images.open_image`."""

    @classmethod
    def create(cls, fn, bits: int | None = None, **kwargs):
        """Open ``fn``, a path, as RGB; anything else as fastai's PILImage does."""
        is_path = isinstance(fn, str | os.PathLike)
        return cls(open_image(fn, bits)) if is_path else super().create(fn)


class BatchDL(TfmdDL):
    """fastai's ``TfmdDL`` that fetches the images of a batch together, as uint8.

    A batch is one look into the decoded pixels, or is decoded ahead by threads; no worker processes
    are needed. Items that are no image table (an image for ``learn.predict``) go fastai's way.

    Args:
        dataset: fastai ``Datasets`` made of an image table.
        reader: where the images come from; None: fastai's way.
    """

    def __init__(self, dataset=None, *args, reader: ImageReader | None = None, **kwargs):
        self.reader = reader
        super().__init__(dataset, *args, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        """A loader like this one, over other items if given, with the same reader."""
        return super().new(dataset, cls, **({"reader": self.reader} | kwargs))

    def create_batches(self, samps):
        """Batches of the items with these numbers: (images,) or (images, classes)."""
        table = getattr(self.dataset, "items", None)
        if self.reader is None or not isinstance(table, pd.DataFrame):
            yield from super().create_batches(samps)
            return
        paths, targets = table.path.to_numpy(), None
        if len(self.dataset.tls) > 1:  # they have labels
            numbers = table.label.map(dict(self.dataset.vocab.o2i))
            targets = torch.tensor(numbers.to_numpy(np.int64))
        # Not a list: for show_batch(unique=True) fastai draws the same item without end.
        chunks, same = tee(np.array(chunk) for chunk in self.chunkify(iter(samps)))
        batches = self.reader.batches(paths[chunk] for chunk in same)
        for chunk, batch in zip(chunks, batches, strict=True):
            require_readable(batch)
            images = TensorImage(batch.pixels)
            yield (images,) if targets is None else (images, TensorCategory(targets[chunk]))


def blood_dls(
    table: pd.DataFrame,
    arch: str = DEFAULT_ARCH,
    size: int = 256,
    bs: int = 64,
    classes: Sequence[str] | None = None,
    batch_tfms: list | None = None,
    crop: str = "cell",
    threads: int | None = None,
    device=None,
    cache: bool = True,
    progress: Progress = no_progress,
    bits: int | None = None,
) -> DataLoaders:
    """Batches for training and validation.

    Args:
        table: image table with ``part``, as :func:`split_table` returns it.
        arch: timm architecture; its mean and standard deviation normalise the batches.
        size: input size in pixels; images are resized to a square of it.
        bs: images per batch.
        classes: names in the order of the model's outputs; those of the training part, sorted,
            by default.
        batch_tfms: augmentation on the device, :func:`augmentation` by default.
        crop: ``cell`` for a square around the white cell, ``frame`` for the whole image.
        threads: decoding threads, 0 for none; as many as there are processors, at most 8, by
            default.
        device: torch device; the best one here by default.
        cache: decode all images of the table once and keep them for the next time, if the disk
            has room. Without, a cache that is there is still used.
        progress: told how far the decoding has come.
        bits: what images of 16 bits per sample use of them, ``Dataset.bits``; None: of each image
            by itself.

    Returns:
        fastai ``DataLoaders`` with the attributes ``arch``, ``size`` and ``crop``, and ``reader``,
        which reads the images. A batch is a float32 tensor (bs, 3, size, size), normalised, and
        an int64 tensor (bs,).

    Raises:
        BloodcellError: the table has no ``part`` or one without images, an image of no known
            class, an unknown architecture, or an image that cannot be read.

    Examples:
        >>> from bloodcell_fastai import blood_dls, open_dataset, split_table
        >>> table = split_table(open_dataset("demo").table)
        >>> dls = blood_dls(table, arch="resnet18", size=64, bs=16)
        >>> images, labels = dls.one_batch()
        >>> tuple(images.shape), images.dtype, labels.dtype
        ((16, 3, 64, 64), torch.float32, torch.int64)
        >>> list(dls.vocab)
        ['EOSINOPHIL', 'LYMPHOCYTE', 'MONOCYTE', 'NEUTROPHIL']
    """
    if "part" not in table:
        raise DataError("The table is not split.", "Call split_table(table) first.")
    if missing := {"train", "valid"} - set(table.part):
        raise DataError(
            f"The table has no images to {min(missing)} with.",
            "Split it again: split_table(table).",
        )
    used = table[table.part.isin(["train", "valid"])].reset_index(drop=True)
    classes = list(classes or sorted(set(used.label[used.part == "train"])))
    check_labels(used.label, classes)
    block = DataBlock(
        blocks=(
            TransformBlock(type_tfms=Open(bits), batch_tfms=IntToFloatTensor),
            CategoryBlock(vocab=classes, sort=False),
        ),
        get_x=ColReader("path"),
        get_y=ColReader("label"),
        splitter=IndexSplitter(used.index[used.part == "valid"]),
        item_tfms=[Crop(crop), Resize(size, method=ResizeMethod.Squish)],
        batch_tfms=[*(augmentation() if batch_tfms is None else batch_tfms), normalization(arch)],
    )
    reader = ImageReader.open(table.path, size, crop, cache, threads, progress, bits)
    device = pick_device() if device is None else torch.device(device)
    reader.move_to(device)
    dls = block.dataloaders(
        used,
        dl_type=BatchDL,
        bs=bs,
        val_bs=prediction_batch_size(device, size),
        num_workers=0,
        device=device,
        reader=reader,
        verbose=False,
    )
    dls.arch, dls.size, dls.crop, dls.reader = arch, size, crop, reader
    return dls


def config_dls(
    table: pd.DataFrame,
    config: ResolvedConfig,
    cache: bool = True,
    progress: Progress = no_progress,
) -> DataLoaders:
    """:func:`blood_dls` with the options of a run."""
    return blood_dls(
        table,
        arch=config.arch,
        size=config.size,
        bs=config.bs,
        classes=config.classes or None,
        batch_tfms=augmentation(zoom=config.zoom, stain=config.stain, sharpness=config.sharpness),
        crop=config.crop,
        threads=None if config.workers < 0 else config.workers,
        device=pick_device(config.device),
        cache=cache,
        progress=progress,
        bits=config.bits,
    )


class Open(Transform):
    """fastai's transform of an ``ImageBlock``, which knows how many bits the images use."""

    def __init__(self, bits: int | None):
        self.bits = bits

    def encodes(self, x):
        """The image of a path, or of what fastai makes images of."""
        return BloodImage.create(x, self.bits)


class Crop(Transform):
    """fastai's item transform for :func:`~bloodcell_fastai.data.crop.crop_image`."""

    order = Resize.order - 1

    def __init__(self, crop: str):
        self.crop = crop

    def encodes(self, x: PILImage):
        """The part that the network sees, an image of the same type."""
        return type(x)(crop_image(x, self.crop).image)


def normalization(arch: str) -> Normalize:
    """fastai's ``Normalize`` with the mean and standard deviation the timm model expects."""
    # Of a name that timm knows without numbers of its own create_model takes the defaults.
    config = timm.get_pretrained_cfg(arch) or PretrainedCfg()
    return Normalize.from_stats(config.mean, config.std)


def check_labels(labels: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse labels the model has no output for, before any is scored against a wrong index.

    Raises:
        BloodcellError: a label is not among the classes.
    """
    if unknown := sorted(set(labels) - set(classes)):
        raise DataError(
            f"Not a class of this model: {', '.join(unknown)}.",
            f"It knows {', '.join(classes)}: rename the folders or leave them out.",
        )
