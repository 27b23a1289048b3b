"""From the image table to batches: a fastai DataBlock with augmentation on the device."""

import os
from collections.abc import Sequence
from itertools import tee
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    DataBlock,
    DataLoaders,
    ImageBlock,
    IndexSplitter,
    Normalize,
    PILImage,
    Resize,
    ResizeMethod,
    TensorCategory,
    TensorImage,
    TfmdDL,
    Transform,
    default_device,
)

from ..config import DEFAULT_ARCH, Config
from ..errors import BloodcellError
from ..processes import training_share
from .augmentation import augmentation
from .dataset import Progress, no_progress, open_image
from .framing import framed
from .pixels import Pixels


class BloodImage(PILImage):
    """A PILImage opened by :func:`~bloodcell_fastai.data.dataset.open_image`."""

    @classmethod
    def create(cls, fn, **kwargs):
        """Open ``fn``, a path, as RGB; anything else as fastai's PILImage does."""
        return cls(open_image(fn)) if isinstance(fn, str | os.PathLike) else super().create(fn)


class BatchDL(TfmdDL):
    """fastai's ``TfmdDL`` that fetches the images of a batch together, as uint8.

    fastai walks each image through its pipeline in Python; here a batch is one look into the
    decoded pixels, or is decoded ahead by threads. It needs no worker processes. Where several
    processes train together, each gets its part of every batch. Items that are no image table (a
    single picture for ``learn.predict``) go fastai's way.

    Args:
        dataset: fastai ``Datasets`` made of an image table.
        pixels: where the images come from; None: fastai's way.
    """

    def __init__(self, dataset=None, *args, pixels: Pixels | None = None, **kwargs):
        self.pixels = pixels
        super().__init__(dataset, *args, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        """A loader like this one, over other items if given, on the same pixels."""
        return super().new(dataset, cls, **({"pixels": self.pixels} | kwargs))

    def create_batches(self, samps):
        """Batches of the items with these numbers: (images,) or (images, classes)."""
        table = getattr(self.dataset, "items", None)
        if self.pixels is None or not isinstance(table, pd.DataFrame):
            yield from super().create_batches(samps)
            return
        paths, targets = table.path.to_numpy(), self._targets()
        share = training_share()
        parts = (share.of(np.array(chunk)) for chunk in self.chunkify(iter(samps)))
        # Not a list: for show_batch(unique=True) fastai draws the same item without end.
        chunks, same = tee(part for part in parts if len(part))
        images = self.pixels.batches(paths[chunk] for chunk in same)
        for chunk, batch in zip(chunks, images, strict=True):
            batch = TensorImage(batch)
            yield (batch,) if targets is None else (batch, TensorCategory(targets[chunk]))

    def _targets(self) -> torch.Tensor | None:
        """The class numbers of all items; None where the items have no labels."""
        if len(self.dataset.tls) < 2:
            return None
        numbers = self.dataset.items.label.map(dict(self.dataset.vocab.o2i))
        return torch.tensor(numbers.to_numpy(np.int64))


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
) -> DataLoaders:
    """Batches for training and validation.

    Args:
        table: image table with ``part``, as :func:`split_table` returns it.
        arch: timm architecture; its mean and standard deviation normalise the batches.
        size: side of the square the images are squeezed to, in pixels.
        bs: images per batch.
        classes: names in the order of the model's outputs; those of the training part, sorted,
            by default.
        batch_tfms: augmentation on the device, :func:`augmentation` by default.
        crop: ``cell`` to show the network a square around the white cell, ``frame`` for the
            whole picture; see :mod:`~bloodcell_fastai.data.framing`.
        threads: decoding threads; as many as there are processors, at most 8, by default.
        device: torch device; fastai's default device if not given.
        cache: decode all images of the table once and keep them for the next time, if the disk
            has room; see :mod:`~bloodcell_fastai.data.pixels`. Without, a cache that is there
            is still used.
        progress: told how far the decoding has come.

    Returns:
        fastai ``DataLoaders``. A batch is a float32 tensor (bs, 3, size, size), normalised, and
        an int64 tensor (bs,).

    Raises:
        BloodcellError: the table has no ``part`` or one without images, an image of no known
            class, an unknown architecture, or an image that cannot be read.

    Examples:
        >>> from bloodcell_fastai import blood_dls, open_dataset, split_table, with_photos
        >>> dataset = open_dataset("demo")
        >>> table = with_photos(dataset.table, dataset.root)
        >>> dls = blood_dls(split_table(table), arch="resnet18", size=64, bs=16)
        >>> images, labels = dls.one_batch()
        >>> tuple(images.shape), images.dtype, labels.dtype
        ((16, 3, 64, 64), torch.float32, torch.int64)
        >>> list(dls.vocab)
        ['EOSINOPHIL', 'LYMPHOCYTE', 'MONOCYTE', 'NEUTROPHIL']
    """
    if "part" not in table:
        raise BloodcellError("The table is not split.", "Call split_table(table) first.")
    if missing := {"train", "valid"} - set(table.part):
        raise BloodcellError(
            f"The table has no images to {min(missing)} with.",
            "Split it again: split_table(table).",
        )
    used = table[table.part.isin(["train", "valid"])].reset_index(drop=True)
    classes = list(classes or sorted(set(used.label[used.part == "train"])))
    check_labels(used.label, classes)
    block = DataBlock(
        blocks=(ImageBlock(cls=BloodImage), CategoryBlock(vocab=classes, sort=False)),
        get_x=ColReader("path"),
        get_y=ColReader("label"),
        splitter=IndexSplitter(used.index[used.part == "valid"]),
        item_tfms=item_transforms(size, crop),
        batch_tfms=[*(augmentation() if batch_tfms is None else batch_tfms), normalization(arch)],
    )
    pixels = Pixels.open(table.path, size, crop, cache, threads, progress)
    device = torch.device(device or default_device())
    return _loaders(block, used, bs, prediction_batch_size(device, size), pixels, device)


def image_dls(
    paths: Sequence[str | Path],
    arch: str = DEFAULT_ARCH,
    size: int = 256,
    bs: int | None = None,
    crop: str = "cell",
    threads: int | None = None,
    device=None,
    pixels: Pixels | None = None,
) -> DataLoaders:
    """Batches of images without labels, all in the validation part, in the given order.

    They pass through the transforms that made the validation pictures of :func:`blood_dls`;
    ``bs`` is what the device predicts fastest by default. ``pixels`` of this size are used where
    they know an image; the files are decoded by default.
    """
    block = DataBlock(
        blocks=(ImageBlock(cls=BloodImage),),
        get_x=ColReader("path"),
        splitter=_all_valid,
        item_tfms=item_transforms(size, crop),
        batch_tfms=[normalization(arch)],
        n_inp=1,
    )
    table = pd.DataFrame({"path": [str(path) for path in paths]})
    device = torch.device(device or default_device())
    bs = bs or prediction_batch_size(device, size)
    return _loaders(block, table, bs, bs, pixels or Pixels(size, crop, threads), device)


def config_dls(
    table: pd.DataFrame, config: Config, cache: bool = True, progress: Progress = no_progress
) -> DataLoaders:
    """:func:`blood_dls` with the options of a run."""
    return blood_dls(
        table,
        arch=config.arch,
        size=config.size,
        bs=config.batch_size,
        classes=config.classes or None,
        batch_tfms=augmentation(
            config.flip,
            config.rotate,
            config.zoom,
            config.warp,
            config.lighting,
            config.stain,
            config.sharpness,
            config.noise,
        ),
        crop=config.crop,
        threads=config.workers if config.workers > 0 else None,
        device=pick_device(config.device),
        cache=cache,
        progress=progress,
    )


class Crop(Transform):
    """What :func:`~bloodcell_fastai.data.framing.framed` leaves of a picture."""

    order = Resize.order - 1

    def __init__(self, crop: str):
        self.crop = crop

    def encodes(self, x: PILImage):
        """The part, a picture of the same type."""
        return type(x)(framed(x, self.crop))


def item_transforms(size: int, crop: str = "cell") -> list:
    """What fastai does to a single image, as :func:`~bloodcell_fastai.data.pixels.decode` does
    to those of a table: cut it and squeeze it to a square."""
    return [Crop(crop), Resize(size, method=ResizeMethod.Squish)]


def used_crop(dls: DataLoaders) -> str:
    """Which part of a picture ``dls`` shows, ``cell`` or ``frame``; all of it if fastai made
    them without :class:`Crop`."""
    return next((t.crop for t in dls.after_item.fs if isinstance(t, Crop)), "frame")


def normalization(arch: str) -> Normalize:
    """fastai's ``Normalize`` with the mean and standard deviation the timm model expects."""
    config = timm.get_pretrained_cfg(arch)
    if config is None:
        # A name timm knows without its own numbers; create_model falls back to these.
        return Normalize.from_stats(timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    return Normalize.from_stats(config.mean, config.std)


def check_labels(labels: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse labels the model has no output for, before any is scored against a wrong index.

    Raises:
        BloodcellError: a label is not among the classes.
    """
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise BloodcellError(
            f"Not a class of this model: {', '.join(unknown)}.",
            f"It knows {', '.join(classes)}: rename the folders or leave them out.",
        )


def pick_device(name: str = "auto"):
    """The torch device of a name such as ``cuda:1`` or ``cpu``; the best there is for ``auto``.

    Raises:
        BloodcellError: there is no such device here.
    """
    if name == "auto":
        return default_device()
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BloodcellError(f"No device {name!r} here: {reason}", "Use --device auto.") from None


def _all_valid(items: Sequence) -> tuple[list[int], list[int]]:
    """Every item validates; the first also stands in for training, which may not be empty."""
    return [0], list(range(len(items)))


def prediction_batch_size(device: torch.device, size: int) -> int:
    """How many images of ``size`` pixels a device predicts fastest together.

    On the CPU the activations of a batch should stay near the cores: MaxViT-nano at 256 px
    predicts 28 images a second in batches of 8 and 17 in batches of 64. A GPU wants many.
    """
    pixels = 2**19 if device.type == "cpu" else 2**24
    return int(min(max(pixels // size**2, 4), 512))


def _loaders(
    block: DataBlock,
    table: pd.DataFrame,
    bs: int,
    val_bs: int,
    pixels: Pixels,
    device: torch.device,
) -> DataLoaders:
    pixels.move_to(device)
    return block.dataloaders(
        table,
        dl_type=BatchDL,
        bs=bs,
        val_bs=val_bs,
        num_workers=0,
        device=device,
        pixels=pixels,
        verbose=False,
    )
