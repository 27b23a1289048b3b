"""Where the model looked: class activation maps for any timm model, through captum."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from fastai.vision.all import Learner
from matplotlib import colormaps
from PIL import Image
from torch import nn

from ..data.blocks import image_dls
from ..data.framing import crop_box
from ..errors import BloodcellError

BATCH_SIZE = 16  # gradients need several times the memory of a prediction
COLOURS = "inferno"  # its lightness rises evenly, so that it reads the same in grey
STRENGTH = 0.65  # how much of the picture the hottest colour covers


def heat_maps(
    learn: Learner, paths: Sequence[str | Path], targets: Sequence[int] | None = None
) -> np.ndarray:
    """Where in each image the evidence for a class lies (Grad-CAM, Selvaraju et al. 2017).

    The map is made at the last features that have a place in the image and still reach the
    classifier: the body's output, or, where only a class token is classified, the input of the
    last block. It is as coarse as these, such as 8x8 for MaxViT at 256 px, and drawn smooth.

    The model runs in float32 and is left as it was. Like any prediction with a learner it is
    not for two threads at a time.

    Args:
        learn: from :func:`~bloodcell_fastai.blood_learner`.
        paths: n image files, cut and squeezed to the model's input as validation pictures are.
        targets: for each image the index of the class to explain; the predicted ones if None.

    Returns:
        float32 (n, size, size), ``size`` the side of the model's input. Each map goes from 0,
        which speaks for other classes or for none, to 1, the strongest evidence of its image;
        all are 0 where nothing in the image speaks for the class.

    Raises:
        BloodcellError: the architecture has no features with a place in the image.
        OSError: an image cannot be read.

    Examples:
        >>> from bloodcell_fastai import Run, heat_maps, load_learner
        >>> run = Run.open("mine")
        >>> heat = heat_maps(load_learner(run), run.table.path[:2])
        >>> heat.shape, heat.dtype
        ((2, 64, 64), dtype('float32'))
    """
    return network_heat_maps(learn.model, learn.arch, learn.size, learn.crop, paths, targets)


def network_heat_maps(
    network: nn.Sequential,
    arch: str,
    size: int,
    crop: str,
    paths: Sequence[str | Path],
    targets: Sequence[int] | None = None,
) -> np.ndarray:
    """:func:`heat_maps` without a learner.

    Args:
        network: ``TimmBody`` and ``TimmHead`` of one timm model, as a learner's ``model`` is.
        arch: its architecture, whose normalisation it expects.
        size: side of its input, in pixels.
        crop: ``cell`` or ``frame``, what it was trained on.
        paths: see :func:`heat_maps`.
        targets: see :func:`heat_maps`.
    """
    if not len(paths):
        return np.empty((0, size, size), np.float32)
    images = image_dls(
        paths,
        arch,
        size,
        BATCH_SIZE,
        crop,
        device=next(network.parameters()).device,
    )
    tap = nn.Identity()
    maps: list[torch.Tensor] = []
    with _evaluating(network), _tapped(network, tap):
        for (batch,) in images.valid:
            chosen = None
            if targets is not None:
                done = sum(map(len, maps))
                chosen = torch.as_tensor(targets[done : done + len(batch)], device=batch.device)
            maps.append(_grad_cam(network, tap, batch, chosen))
    return torch.cat(maps).numpy()


def overlay(image: Image.Image, heat: np.ndarray, crop: str = "cell") -> Image.Image:
    """Lay a heat map over its image, clear where it is cold.

    Args:
        image: the original, of any size and aspect.
        heat: float (h, w) from 0 to 1, one of :func:`heat_maps`; stretched over the part of the
            image that the model has seen.
        crop: ``cell`` or ``frame``, which part that is.

    Returns:
        An RGB image of the size of ``image``.

    Examples:
        >>> from PIL import Image
        >>> from bloodcell_fastai import Run, heat_maps, load_learner, overlay
        >>> run = Run.open("mine")
        >>> path = run.table.path[0]
        >>> heat = heat_maps(load_learner(run), [path])[0]
        >>> overlay(Image.open(path), heat, run.config.crop).size
        (320, 240)
    """
    picture = np.asarray(image.convert("RGB"), np.float32)
    left, top, right, bottom = crop_box(image.convert("RGB"), crop)
    part = Image.fromarray(np.asarray(heat, np.float32))
    part = part.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    values = np.zeros(picture.shape[:2], np.float32)
    values[top:bottom, left:right] = np.asarray(part)
    opacity = STRENGTH * values[..., None]
    blended = (1 - opacity) * picture + opacity * 255 * colormaps[COLOURS](values)[..., :3]
    return Image.fromarray(blended.round().astype(np.uint8))


def _grad_cam(
    network: nn.Module, tap: nn.Module, batch: torch.Tensor, targets: torch.Tensor | None
) -> torch.Tensor:
    """Maps of a batch, float32 (n, size, size) on the CPU."""
    # The images ask for gradients, or a frozen body would give none to the tap.
    images = batch.detach().as_subclass(torch.Tensor).requires_grad_()
    score = network if targets is not None else lambda x: network(x).max(dim=1).values
    heat = LayerGradCam(score, tap).attribute(images, targets, relu_attributions=True).detach()
    heat = LayerAttribution.interpolate(heat, images.shape[2:], interpolate_mode="bilinear")
    heat = heat[:, 0].float()
    strongest = heat.amax(dim=(1, 2), keepdim=True)
    return (heat / strongest.clamp(min=torch.finfo(heat.dtype).tiny)).cpu()


@contextmanager
def _tapped(network: nn.Sequential, tap: nn.Module) -> Iterator[None]:
    """Lead the features that are explained through ``tap``, as a map (n, c, h, w)."""
    model = network.get_submodule("0.model")
    lead = partial(_lead_through, tap, model)
    if getattr(model, "global_pool", "") == "token":
        # The body's other outputs are dropped: no gradient would reach them.
        handle = _last_block(model).register_forward_pre_hook(
            lambda module, args: (lead(args[0]), *args[1:])
        )
    else:
        handle = network[0].register_forward_hook(lambda module, args, output: lead(output))
    try:
        yield
    finally:
        handle.remove()


def _lead_through(tap: nn.Module, model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """``features`` unchanged, after ``tap`` has been given their map (n, c, h, w)."""
    if torch.is_tensor(features) and features.ndim == 4:
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            return tap(features.movedim(3, 1)).movedim(1, 3)
        return tap(features)
    if torch.is_tensor(features) and features.ndim == 3:
        # Class and register tokens come first and have no place; some bodies add them later.
        for prefix in (getattr(model, "num_prefix_tokens", 0), 0):
            side = isqrt(features.shape[1] - prefix)
            if side**2 == features.shape[1] - prefix:
                grid = features[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
                tokens = tap(grid).flatten(2).transpose(1, 2)
                return torch.cat([features[:, :prefix], tokens], dim=1)
    raise _no_map(model)


def _last_block(model: nn.Module) -> nn.Module:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise _no_map(model)
    return blocks[-1]


def _no_map(model: nn.Module) -> BloodcellError:
    return BloodcellError(
        f"{type(model).__name__} has no features with a place in the image.",
        "Heat maps need another --arch, such as a MaxViT, a CNN, a ViT or a Swin.",
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while; each of its modules returns to its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
