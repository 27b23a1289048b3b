"""From the image table to batches: a fastai DataBlock with augmentation on the device."""

import os
from collections.abc import Sequence

import pandas as pd
import timm
from fastai.vision.all import (
    AffineCoordTfm,
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
    aug_transforms,
    default_device,
)

from ..config import DEFAULT_ARCH, Config
from ..errors import BloodcellError
from .dataset import open_image


class BloodImage(PILImage):
    """A PILImage opened by :func:`~bloodcell_fastai.data.dataset.open_image`."""

    @classmethod
    def create(cls, fn, **kwargs):
        """Open ``fn``, a path, as RGB; anything else as fastai's PILImage does."""
        return cls(open_image(fn)) if isinstance(fn, str | os.PathLike) else super().create(fn)


class TrainingAffine(AffineCoordTfm):
    """fastai's affine transform that leaves validation pictures alone.

    fastai's own passes them through an interpolation by the identity, which costs time and
    makes them differ from the pictures of a prediction, which have no augmentation.
    """

    @classmethod
    def of(cls, other: AffineCoordTfm) -> "TrainingAffine":
        """The same transform as ``other``."""
        return cls(
            other.aff_fs,
            other.coord_fs,
            mode=other.mode,
            pad_mode=other.pad_mode,
            align_corners=other.align_corners,
        )

    def before_call(self, b, split_idx):
        """Draw the batch's transform; apply it in training only."""
        super().before_call(b, split_idx)
        self.do = not split_idx


def blood_dls(
    table: pd.DataFrame,
    arch: str = DEFAULT_ARCH,
    size: int = 256,
    bs: int = 64,
    classes: Sequence[str] | None = None,
    batch_tfms: list | None = None,
    num_workers: int | None = None,
    device=None,
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
        num_workers: loading processes; as many as there are processors, at most 8, by default.
        device: torch device; fastai's default device if not given.

    Returns:
        fastai ``DataLoaders``. A batch is a float32 tensor (bs, 3, size, size), normalised, and
        an int64 tensor (bs,).

    Raises:
        BloodcellError: the table has no ``part``, an image of no known class, or an unknown
            architecture.
    """
    if "part" not in table:
        raise BloodcellError("The table is not split.", "Call split_table(table) first.")
    used = table[table.part.isin(["train", "valid"])].reset_index(drop=True)
    classes = list(classes or sorted(set(used.label[used.part == "train"])))
    check_labels(used.label, classes)
    block = DataBlock(
        blocks=(ImageBlock(cls=BloodImage), CategoryBlock(vocab=classes, sort=False)),
        get_x=ColReader("path"),
        get_y=ColReader("label"),
        splitter=IndexSplitter(used.index[used.part == "valid"]),
        item_tfms=item_transforms(size),
        batch_tfms=[*(augmentation() if batch_tfms is None else batch_tfms), normalization(arch)],
    )
    return _loaders(block, used, bs, num_workers, device)


def image_dls(
    paths: Sequence[str],
    arch: str = DEFAULT_ARCH,
    size: int = 256,
    bs: int = 64,
    num_workers: int | None = None,
    device=None,
) -> DataLoaders:
    """Batches of images without labels, all in the validation part, in the given order.

    They pass through the transforms that made the validation pictures of :func:`blood_dls`.
    """
    block = DataBlock(
        blocks=(ImageBlock(cls=BloodImage),),
        get_x=ColReader("path"),
        splitter=_all_valid,
        item_tfms=item_transforms(size),
        batch_tfms=[normalization(arch)],
        n_inp=1,
    )
    table = pd.DataFrame({"path": [str(path) for path in paths]})
    return _loaders(block, table, bs, num_workers, device)


def config_dls(table: pd.DataFrame, config: Config) -> DataLoaders:
    """:func:`blood_dls` with the options of a run."""
    return blood_dls(
        table,
        arch=config.arch,
        size=config.size,
        bs=config.batch_size,
        classes=config.classes or None,
        batch_tfms=augmentation(
            config.flip, config.rotate, config.zoom, config.warp, config.lighting
        ),
        num_workers=None if config.workers < 0 else config.workers,
        device=pick_device(config.device),
    )


def item_transforms(size: int) -> list:
    """What happens to each image before it joins a batch: squeezed to a square, nothing cut.

    The cell sits anywhere in the frame, so that a crop could lose it.
    """
    return [Resize(size, method=ResizeMethod.Squish)]


def augmentation(
    flip: bool = True,
    rotate: float = 180.0,
    zoom: float = 1.1,
    warp: float = 0.1,
    lighting: float = 0.2,
) -> list:
    """fastai's ``aug_transforms`` for cells, which have no up and no left.

    fastai joins the flips, rotation, zoom and warp into one interpolation and brightness and
    contrast into one pass. Edges are mirrored: black corners would imitate those that the
    copies of the Kaggle set have.
    """
    transforms = aug_transforms(
        do_flip=flip,
        flip_vert=True,
        max_rotate=rotate,
        max_zoom=zoom,
        max_warp=warp,
        max_lighting=lighting,
    )
    return [TrainingAffine.of(t) if isinstance(t, AffineCoordTfm) else t for t in transforms]


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
    import torch

    if name == "auto":
        return default_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BloodcellError(f"No device {name!r} here: {reason}", "Use --device auto.") from None


def _all_valid(items: Sequence) -> tuple[list[int], list[int]]:
    """Every item validates; the first also stands in for training, which may not be empty."""
    return [0], list(range(len(items)))


def _loaders(block: DataBlock, table: pd.DataFrame, bs: int, workers: int | None, device):
    if workers is None:
        workers = min(8, os.cpu_count() or 1)
    return block.dataloaders(
        table, bs=bs, num_workers=workers, device=device or default_device(), verbose=False
    )
