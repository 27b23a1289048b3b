"""From batches to a fastai Learner on a timm model."""

from pathlib import Path

from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import (
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    accuracy,
    model_meta,
    params,
    vision_learner,
)
from torch import nn

from ..config import DEFAULT_ARCH
from ..errors import UsageError
from ..model.model import TimmBody, TimmHead, load_model
from .callbacks import precision_callback
from .optimizer import FusedAdam


def blood_learner(
    dls: DataLoaders,
    arch: str | None = None,
    weights: str | Path = "auto",
    size: int | None = None,
    label_smoothing: float = 0.1,
    metrics=accuracy,
    opt_func=FusedAdam,
    **kwargs,
) -> Learner:
    """A fastai ``Learner`` on a timm model, made by ``vision_learner``.

    ``learn.model`` is a body and timm's own head, in two parameter groups. With pretrained
    weights the body is frozen, as ``vision_learner`` leaves it. The trained network is timm's
    model: ``timm_model(learn)`` gives it and its ``state_dict`` loads into timm alone.

    Args:
        dls: from :func:`~bloodcell_fastai.blood_dls`, or any fastai image ``DataLoaders`` that
            normalise for ``arch``.
        arch: any architecture of timm's. Needed only for ``dls`` of another origin; those of
            ``blood_dls`` know theirs.
        weights: ``pbc`` (blood cells; ships with the package), ``imagenet`` (from the hub or its
            cache), a ``.safetensors`` or ``.pth`` file in timm's naming, ``none``, or ``auto``:
            pbc if it is of this architecture, else imagenet, else none with a warning.
        size: input size in pixels, for ``dls`` of another origin; found from a batch if not given.
        label_smoothing: of the cross-entropy loss, 0 to 1.
        metrics: fastai metrics.
        opt_func: a fastai optimizer; by default its Adam, computed faster.
        **kwargs: passed to ``vision_learner``, such as ``wd``, ``cbs``, ``path``.

    Returns:
        The learner. ``learn.initial_weights`` says in a few words what the model started from
        and ``learn.pretrained`` whether that was training of any kind; ``learn.arch``,
        ``learn.size`` and ``learn.crop`` are those of ``dls``.

    Raises:
        BloodcellError: unknown architecture, a size it cannot take, weights that cannot be had
            or do not fit; another ``arch`` or ``size`` than that of the batches.

    Examples:
        >>> from bloodcell_fastai import blood_dls, blood_learner, open_dataset, split_table
        >>> table = split_table(open_dataset("demo").table)
        >>> learn = blood_learner(
        ...     blood_dls(table, arch="resnet18", size=64, bs=16), weights="none"
        ... )
        >>> learn.initial_weights, learn.pretrained, learn.arch, learn.size, learn.crop
        ('none', False, 'resnet18', 64, 'cell')
        >>> with learn.no_bar(), learn.no_logging():
        ...     learn.fit_one_cycle(1, 1e-3)
    """
    own = vars(dls)  # getattr would find the size of fastai's own items, a table
    for name, given in (("arch", arch), ("size", size)):
        if given and given != own.get(name, given):
            raise UsageError(
                f"{name} is {given}, but the batches are for {own[name]}.",
                f"Give `{name}` to blood_dls.",
            )
    arch = arch or own.get("arch", DEFAULT_ARCH)
    size = size or own.get("size") or dls.one_batch()[0].shape[-1]
    n_out = len(dls.vocab)
    model, initial_weights = load_model(arch, n_out, size, weights)
    pretrained = initial_weights != "none"

    def build(pretrained: bool) -> nn.Module:
        return model

    # vision_learner ignores its argument ``cut`` and takes the way to make a body from fastai's
    # registry of architectures alone.
    model_meta[build] = {"cut": TimmBody, "split": split_parameters}
    try:
        learn = vision_learner(
            dls,
            build,
            normalize=False,  # done by the DataBlock, with or without pretrained weights
            n_out=n_out,
            pretrained=pretrained,
            custom_head=TimmHead(model),
            splitter=split_parameters,
            loss_func=CrossEntropyLossFlat(label_smoothing=label_smoothing),
            metrics=metrics,
            opt_func=opt_func,
            **kwargs,
        )
    finally:
        del model_meta[build]
    learn.arch, learn.size, learn.crop = arch, size, own.get("crop", "frame")
    learn.initial_weights = initial_weights
    learn.recorder.train_metrics = True
    return learn.add_cbs([ChannelsLast(), *precision_callback(dls.device)])


def split_parameters(model: nn.Sequential) -> list[list[nn.Parameter]]:
    """Two groups for fastai's discriminative learning rates: the body, the head."""
    head = params(model[1])
    head_ids = {id(p) for p in head}
    return [[p for p in params(model[0]) if id(p) not in head_ids], head]
