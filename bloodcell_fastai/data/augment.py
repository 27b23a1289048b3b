"""Augmentation of whole batches on the device, which nothing here waits for."""

import torch
from fastai.vision.all import (
    AffineCoordTfm,
    DisplayedTransform,
    LightingTfm,
    TensorImage,
    aug_transforms,
)
from fastai.vision.augment import find_coeffs
from torch.nn import functional
from torchvision.transforms.functional import gaussian_blur

# Optical densities in red, green and blue of haematoxylin, eosin and DAB, a row for each, by
# Ruifrok and Johnston (2001); scikit-image has them as rgb_from_hed.
DYES = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def augmentation(
    flip: bool = True,
    rotate: float = 180.0,
    zoom: float = 1.25,
    warp: float = 0.1,
    lighting: float = 0.3,
    stain: float = 0.8,
    sharpness: float = 0.7,
    noise: float = 0.03,
) -> list:
    """Transforms of whole batches that make images of cells vary as laboratories do.

    Position, perspective and light are fastai's ``aug_transforms``, whose ``Brightness`` changes
    the contrast too; cells have no preferred orientation. Stain, sharpness and noise are further
    transforms.

    Args:
        flip: flip both ways and turn by right angles, each with half the images.
        rotate: largest angle, in degrees.
        zoom: largest factor, in and out.
        warp: strength of the perspective, 0 to 1.
        lighting: strength of brightness and contrast, 0 to 1.
        stain: see :class:`Stain`.
        sharpness: see :class:`Sharpness`.
        noise: see :class:`Noise`.

    Returns:
        A list for ``batch_tfms`` without the transforms that are off. Edges are mirrored: black
        corners would look like those of the copies in the Kaggle set.

    Examples:
        >>> from bloodcell_fastai import augmentation
        >>> [type(transform).__name__ for transform in augmentation(stain=0)]
        ['Projective', 'Brightness', 'Sharpness', 'Noise']

        It goes into :func:`~bloodcell_fastai.blood_dls` as ``batch_tfms``.
    """
    transforms = aug_transforms(
        do_flip=flip,
        flip_vert=True,
        max_rotate=rotate,
        min_zoom=1 / zoom,
        max_zoom=zoom,
        max_warp=warp,
        max_lighting=lighting,
    )
    fastais = [Projective(t) if isinstance(t, AffineCoordTfm) else t for t in transforms]
    extras = ((Stain, stain), (Sharpness, sharpness), (Noise, noise))
    return fastais + [transform(strength) for transform, strength in extras if strength]


class Projective(DisplayedTransform):
    """fastai's affine and warp transforms of a training batch, without waiting for the device.

    The parameters are drawn by fastai's own functions, on the CPU, and sent to the device in
    one go. An affine map and a perspective are both 3x3 matrices, whose product needs one
    resampling. Validation images are not changed.

    Args:
        transform: from ``aug_transforms``.
    """

    order, split_idx = AffineCoordTfm.order, 0

    def __init__(self, transform: AffineCoordTfm):
        self.affine_fs, self.warps = transform.aff_fs, transform.coord_fs

    def encodes(self, x: TensorImage):
        """Images (n, 3, size, size), float32 from 0 to 1."""
        matrices = self.draw(len(x)).to(x.device, non_blocking=True)
        return TensorImage(resample(x.as_subclass(torch.Tensor), matrices))

    def draw(self, n: int) -> torch.Tensor:
        """Matrices (n, 3, 3) from places in the result to places in the image, both from -1 to 1;
        float32, on the CPU."""
        like = torch.empty(n, 1, 1, 1)
        matrices = torch.eye(3).repeat(n, 1, 1)
        for function in self.affine_fs:
            if (matrix := function(like)) is not None:
                matrices = matrices @ matrix
        for warp in self.warps:
            warp.before_call(like)
            coefficients = find_coeffs(warp.orig_pts, warp.targ_pts)[..., 0]
            matrices = torch.cat([coefficients, torch.ones(n, 1)], 1).view(n, 3, 3) @ matrices
        return matrices.as_subclass(torch.Tensor)


class Varied(DisplayedTransform):
    """A change of each image of a training batch by up to a ``strength``."""

    order, split_idx = LightingTfm.order, 0

    def __init__(self, strength: float):
        self.strength = strength


class Stain(Varied):
    """Another amount of each dye, and light of another tint, for every image of a batch.

    The optical densities are taken apart into haematoxylin, eosin and the rest (Ruifrok and
    Johnston 2001), multiplied by a factor for each and one for all, and put together again
    (after Tellez et al. 2018). The tint is a factor for each of red, green and blue.

    Args:
        strength: the natural logarithms of the dyes' factors, and of that for all, lie within
            it, the densities that the tint adds within a quarter of it.
    """

    def encodes(self, x: TensorImage):
        """Images (n, 3, size, size), float32 from 0 to 1."""
        n = len(x)
        factors = torch.exp(self.strength * (_symmetric(n, 3) + _symmetric(n, 1)))
        tints = self.strength / 4 * _symmetric(n, 3)
        images = x.as_subclass(torch.Tensor)
        mixed = DYES.inverse() @ torch.diag_embed(factors) @ DYES  # (n, 3, 3), for row vectors
        return TensorImage(restain(images, mixed.to(x.device), tints.to(x.device)))


class Sharpness(Varied):
    """Each image of a batch a little blurred or sharpened.

    Args:
        strength: the largest weight of the difference from the blurred image, 0 to 1. Up to once
            it is added (sharper), up to twice it, and at most all of it, is subtracted (blurred).
    """

    order = LightingTfm.order + 1

    def encodes(self, x: TensorImage):
        """Images (n, 3, size, size), float32 from 0 to 1."""
        weights = self.strength * (3 * torch.rand(len(x), 1, 1, 1) - 1)
        images = x.as_subclass(torch.Tensor)
        weights = weights.clamp(max=1).to(x.device)
        return TensorImage(torch.lerp(images, blur(images), weights).clamp_(0, 1))


class Noise(Varied):
    """Gaussian noise on each image of a batch.

    Args:
        strength: the largest standard deviation, where colours go from 0 to 1.
    """

    order = LightingTfm.order + 2

    def encodes(self, x: TensorImage):
        """Images (n, 3, size, size), float32 from 0 to 1."""
        deviations = (self.strength * torch.rand(len(x), 1, 1, 1)).to(x.device)
        images = x.as_subclass(torch.Tensor)
        noise = torch.randn_like(images)
        return TensorImage((images + noise * deviations).clamp_(0, 1))


def blur(images: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, size, size) under a Gaussian of a 32nd of their size."""
    sigma = images.shape[-1] / 32
    length = 2 * round(2 * sigma) + 1
    for kernel in ([length, 1], [1, length]):  # along one axis at a time is much less work
        images = gaussian_blur(images, kernel, [sigma, sigma])
    return images


def _symmetric(*shape: int) -> torch.Tensor:
    return 2 * torch.rand(shape) - 1


def restain(images: torch.Tensor, mixed: torch.Tensor, tints: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, height, width), 0 to 1, whose optical densities are multiplied by matrices
    (n, 3, 3), as row vectors, and shifted by ``tints`` (n, 3)."""
    densities = -torch.log(images.clamp(min=1 / 255)).flatten(2)
    changed = torch.baddbmm(tints[:, :, None], mixed.transpose(1, 2), densities)
    return torch.exp(-changed).clamp_(0, 1).view_as(images)


def resample(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Images (n, c, size, size) seen through projective maps (n, 3, 3), edges mirrored."""
    n, _, height, width = images.shape
    unchanged = torch.eye(2, 3, device=images.device)[None]
    places = functional.affine_grid(unchanged, [1, 1, height, width], align_corners=True)
    seen = functional.pad(places.view(-1, 2), (0, 1), value=1.0) @ matrices.transpose(1, 2)
    grid = (seen[..., :2] / seen[..., 2:]).view(n, height, width, 2)
    return functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=True
    )
