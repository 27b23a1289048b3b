"""Which parts of an image support a class: class activation maps for any timm model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isqrt

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from matplotlib import colormaps
from PIL import Image
from torch import nn

from ..data.cache import PictureBatch
from ..errors import BloodcellError
from ..model.inference import Predictor
from ..model.model import TimmModel

BATCH_SIZE = 16  # gradients need several times the memory of a prediction
COLOURS = "inferno"  # its lightness rises evenly, so that it reads the same in grey
STRENGTH = 0.65  # opacity of the hottest colour


class NoHeatMap(BloodcellError):
    """The architecture has no features with a place in the image."""


def heat_maps(
    predictor: Predictor, pictures: PictureBatch, targets: Sequence[int] | None = None
) -> np.ndarray:
    """Where in each image the evidence for a class lies (Grad-CAM, Selvaraju et al. 2017).

    The map is made at the last features that have a place in the image and still reach the
    classifier: the body's output, or, where only a class token is classified, the input of the
    last block. It is as coarse as these, such as 8x8 for MaxViT at 256 px, and drawn smooth. Not
    for two threads at a time.

    Args:
        predictor: of a single model.
        pictures: n images, as :meth:`Predictor.read` gives them.
        targets: for each image the index of the class to explain; the predicted ones if None.

    Returns:
        float32 (n, size, size), ``size`` that of the model's input. Each map goes from 0, which
        supports other classes or none, to 1, the strongest evidence of its image; all are 0 where
        nothing in the image supports the class.

    Raises:
        BloodcellError: the architecture has no features with a place in the image.

    Examples:
        >>> from bloodcell_fastai import Predictor, Run, heat_maps
        >>> run = Run.open("mine")
        >>> predictor = Predictor.load(run)
        >>> heat = heat_maps(predictor, predictor.read(run.table.path[:2]))
        >>> heat.shape, heat.dtype
        ((2, 64, 64), dtype('float32'))
    """
    model, tap = predictor.model, nn.Identity()
    maps = [torch.empty(0, predictor.size, predictor.size)]
    chosen = None if targets is None else torch.as_tensor(targets, device=predictor.device)
    with _tapped(model, tap) as forward:
        for start in range(0, len(pictures), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            images = predictor.normalise(pictures.pixels[part])
            maps.append(_grad_cam(forward, tap, images, None if chosen is None else chosen[part]))
    return torch.cat(maps).numpy()


def overlay(image: Image.Image, heat: np.ndarray, box: Sequence[int]) -> Image.Image:
    """Lay a heat map over its image, transparent where it is 0.

    Args:
        image: the original, of any size and aspect ratio.
        heat: float (h, w) from 0 to 1, one of :func:`heat_maps`.
        box: the crop that the model saw, in pixels of ``image``: left, top, right, bottom; one of
            ``PictureBatch.boxes``.

    Returns:
        An RGB image of the size of ``image``.

    Examples:
        >>> from PIL import Image
        >>> from bloodcell_fastai import Predictor, Run, heat_maps, overlay
        >>> run = Run.open("mine")
        >>> predictor, path = Predictor.load(run), run.table.path[0]
        >>> pictures = predictor.read([path])
        >>> heat = heat_maps(predictor, pictures)[0]
        >>> overlay(Image.open(path), heat, pictures.boxes[0]).size
        (320, 240)
    """
    picture = np.asarray(image.convert("RGB"), np.float32)
    left, top, right, bottom = map(int, box)
    part = Image.fromarray(np.asarray(heat, np.float32))
    part = part.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    values = np.zeros(picture.shape[:2], np.float32)
    values[top:bottom, left:right] = np.asarray(part)
    opacity = STRENGTH * values[..., None]
    blended = (1 - opacity) * picture + opacity * 255 * colormaps[COLOURS](values)[..., :3]
    return Image.fromarray(blended.round().astype(np.uint8))


def _grad_cam(
    forward: Callable[[torch.Tensor], torch.Tensor],
    tap: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor | None,
) -> torch.Tensor:
    """Maps of a batch, float32 (n, size, size) on the CPU."""
    # The images ask for gradients, or a frozen body would give none to the tap.
    images = images.requires_grad_()
    score = forward if targets is not None else lambda x: forward(x).max(dim=1).values
    heat = LayerGradCam(score, tap).attribute(images, targets, relu_attributions=True).detach()
    heat = LayerAttribution.interpolate(heat, images.shape[2:], interpolate_mode="bilinear")
    heat = heat[:, 0].float()
    strongest = heat.amax(dim=(1, 2), keepdim=True)
    return (heat / strongest.clamp(min=torch.finfo(heat.dtype).tiny)).cpu()


@contextmanager
def _tapped(model: TimmModel, tap: nn.Module) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """The forward pass of a model with its features led through ``tap``, as a map (n, c, h, w)."""
    lead = partial(_lead_through, tap, model)
    if getattr(model, "global_pool", "") != "token":
        yield lambda x: model.forward_head(lead(model.forward_features(x)))
        return
    # The body's outputs other than the class token are dropped: no gradient would reach them.
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise _no_map(model)
    handle = blocks[-1].register_forward_pre_hook(lambda module, args: (lead(args[0]), *args[1:]))
    try:
        yield lambda x: model.forward_head(model.forward_features(x))
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


def _no_map(model: nn.Module) -> NoHeatMap:
    return NoHeatMap(
        f"{type(model).__name__} has no features with a place in the image.",
        "Heat maps need another `arch`, such as a MaxViT, a CNN, a ViT or a Swin.",
    )
