"""Augmentation of whole batches on the device: one resampling, one change of colour."""

from functools import lru_cache

import torch
from fastai.vision.all import (
    AffineCoordTfm,
    DisplayedTransform,
    LightingTfm,
    TensorImage,
    aug_transforms,
)
from fastai.vision.augment import find_coeffs

EPSILON = 1e-7  # keeps the logit of black and white finite, as in fastai


def augmentation(
    flip: bool = True,
    rotate: float = 180.0,
    zoom: float = 1.1,
    warp: float = 0.1,
    lighting: float = 0.2,
) -> list:
    """fastai's ``aug_transforms`` for cells, which have no up and no left, in one transform.

    Args:
        flip: flip both ways and turn by right angles, each with half the pictures.
        rotate: largest angle, in degrees.
        zoom: largest factor.
        warp: strength of the perspective, 0 to 1.
        lighting: strength of brightness and contrast, 0 to 1.

    Returns:
        A list for ``batch_tfms``: empty if everything is off. Edges are mirrored: black corners
        would imitate those that the copies of the Kaggle set have.
    """
    transforms = aug_transforms(
        do_flip=flip,
        flip_vert=True,
        max_rotate=rotate,
        max_zoom=zoom,
        max_warp=warp,
        max_lighting=lighting,
    )
    return [FusedAugmentation(transforms)] if transforms else []


class FusedAugmentation(DisplayedTransform):
    """fastai's affine, warp and lighting transforms, applied together to a training batch.

    The parameters are drawn by fastai's own functions, on the CPU, and sent to the device in
    one go. An affine map and a perspective are both 3x3 matrices, so that their product needs
    one resampling; fastai's own waits for the device in every batch. Validation pictures pass
    untouched, where fastai's would be resampled by the identity.

    Args:
        transforms: from ``aug_transforms``, in which an ``AffineCoordTfm`` and a
            ``LightingTfm`` may occur once each.
    """

    order, split_idx = AffineCoordTfm.order, 0

    def __init__(self, transforms: list):
        affine = [t for t in transforms if isinstance(t, AffineCoordTfm)]
        lighting = [t for t in transforms if isinstance(t, LightingTfm)]
        self.affine_fs = [f for t in affine for f in t.aff_fs]
        self.warps = [f for t in affine for f in t.coord_fs]
        self.lighting_fs = [f for t in lighting for f in t.fs]

    def encodes(self, x: TensorImage):
        """Pictures (n, 3, size, size), float32 from 0 to 1."""
        matrices, brightness, contrast = (t.to(x.device, non_blocking=True) for t in self.draw(x))
        pictures = x.as_subclass(torch.Tensor)
        if self.affine_fs or self.warps:
            pictures = resample(pictures, matrices)
        if self.lighting_fs:
            pictures = relight(pictures, brightness, contrast)
        return TensorImage(pictures)

    def draw(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Parameters for a batch like ``x``: matrices (n, 3, 3) from places in the result to
        places in the picture, both from -1 to 1; brightness (n,) and contrast (n,), which are
        added to and multiplied with the logit of the colours. All float32, on the CPU."""
        like = torch.empty(len(x), 1, 1, 1)
        matrices = torch.eye(3).repeat(len(x), 1, 1)
        for function in self.affine_fs:
            if (matrix := function(like)) is not None:
                matrices = matrices @ matrix
        for warp in self.warps:
            warp.before_call(like)
            matrices = _perspective(warp) @ matrices
        changes = []
        for function in self.lighting_fs:
            function.before_call(like)
            changes.append(function.change.as_subclass(torch.Tensor))
        if not changes:
            return matrices.as_subclass(torch.Tensor), torch.zeros(len(x)), torch.ones(len(x))
        brightness, contrast = changes
        return matrices.as_subclass(torch.Tensor), torch.logit(brightness), contrast


def resample(pictures: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Pictures (n, c, size, size) seen through projective maps (n, 3, 3), edges mirrored."""
    n, _, height, width = pictures.shape
    places = _places(height, width, pictures.device) @ matrices.transpose(1, 2)
    grid = (places[..., :2] / places[..., 2:]).view(n, height, width, 2)
    return torch.nn.functional.grid_sample(
        pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=True
    )


def relight(
    pictures: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor
) -> torch.Tensor:
    """Colours from 0 to 1 shifted and stretched on the logit scale, where none leaves 0 to 1."""
    logits = torch.logit(pictures, eps=EPSILON)
    return ((logits + brightness[:, None, None, None]) * contrast[:, None, None, None]).sigmoid_()


def _perspective(warp) -> torch.Tensor:
    """The matrices (n, 3, 3) of fastai's warp."""
    coefficients = find_coeffs(warp.orig_pts, warp.targ_pts)[..., 0]
    return torch.cat([coefficients, torch.ones(len(coefficients), 1)], 1).view(-1, 3, 3)


@lru_cache(maxsize=4)
def _places(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Homogeneous coordinates (height * width, 3) of the pixels, from -1 to 1, row by row."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    return torch.stack([x, y, torch.ones_like(x)], -1).view(-1, 3).to(device)
