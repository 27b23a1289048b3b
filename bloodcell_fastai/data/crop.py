"""The crop: a square around the white cell on an evened-out background, or the whole image."""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

SEARCH_SIDE = 160  # pixels of the longer side when the nucleus is searched for
SIDES_OF_NUCLEUS = 2.4  # side of the crop, in square roots of the nucleus's area
MIN_FRACTION = 1 / 4  # of the shorter side of the image that a crop keeps
DARK = 24  # of 255: the black corners of rotated copies are not stained
BACKGROUND_QUANTILE = 0.9  # of the pixels are as dark as the background or darker
WHITE = 235  # of 255: the background after the light is evened out
MIN_BACKGROUND = 80  # of 255: an image without background is not brightened to white
MIN_STAIN = 0.2  # optical density above the rest that makes a nucleus; found ones have 0.3-0.9


@dataclass(frozen=True)
class Nucleus:
    """Where a nucleus lies, in pixels: its centre, and the square root of its area."""

    x: float
    y: float
    side: float


def find_nucleus(image: np.ndarray) -> Nucleus | None:
    """The largest, most deeply stained nucleus of a smear, found by its colour.

    The stains of the Romanowsky family dye chromatin purple: it absorbs red and green light and
    transmits blue, while red cells absorb blue. The difference of the optical densities, relative
    to the empty background of the same image, is cut by Otsu's threshold (1979). Of the connected
    regions, with lobes joined, the one with the most stain is the nucleus.

    Args:
        image: uint8 (height, width, 3), RGB.

    Returns:
        The nucleus; None where nothing is stained like one.
    """
    return _locate(image)[0]


class Cropped(NamedTuple):
    """What :func:`crop_image` returns.

    Attributes:
        image: RGB, what the network sees before it is resized.
        box: left, top, right and bottom of it in the original image, in pixels.
        has_cell: whether a white cell was found; true for ``frame``, which looks for none.
    """

    image: Image.Image
    box: tuple[int, int, int, int]
    has_cell: bool


def crop_image(image: Image.Image, crop: str) -> Cropped:
    """The part of an image that the network sees.

    For ``cell`` a square around the white cell, proportional to the size of the nucleus, so that
    the magnification matters less; the middle of the image if no cell is found. Each colour is
    divided by that of the empty background of the whole image, which becomes a light grey: this
    removes the tint of the lamp and the exposure, in which laboratories differ.

    Args:
        image: RGB.
        crop: ``cell``, or ``frame`` for the whole image as it is.
    """
    if crop == "frame":
        return Cropped(image, (0, 0, *image.size), True)
    nucleus, background = _locate(np.asarray(image))
    x, y, side = image.width / 2, image.height / 2, min(image.size)
    if nucleus:
        x, y = nucleus.x, nucleus.y
        wanted = np.clip(nucleus.side * SIDES_OF_NUCLEUS, side * MIN_FRACTION, side)
        side = max(round(float(wanted)), 1)
    left = int(np.clip(round(x - side / 2), 0, image.width - side))
    top = int(np.clip(round(y - side / 2), 0, image.height - side))
    box = left, top, left + side, top + side
    gains = WHITE / np.maximum(background, MIN_BACKGROUND)
    levels = np.clip(np.arange(256) * gains[:, None], 0, 255).round().astype(np.uint8)
    return Cropped(image.crop(box).point(levels.ravel().tolist()), box, nucleus is not None)


def _locate(image: np.ndarray) -> tuple[Nucleus | None, np.ndarray]:
    """:func:`find_nucleus`, and the colour of the background, float64 (3,)."""
    scale = SEARCH_SIDE / max(image.shape[:2])
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    small = cv2.GaussianBlur(cv2.resize(image, size, interpolation=cv2.INTER_AREA), (0, 0), 1.2)
    lit = cv2.erode((small.max(2) > DARK).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    if not lit.any():
        return None, np.full(3, float(WHITE))
    counts = [np.bincount(channel, minlength=256).cumsum() for channel in small[lit].T]
    background = np.array([np.searchsorted(c, BACKGROUND_QUANTILE * c[-1]) for c in counts], float)
    stain = _stain(small, lit, background)
    seen = stain[lit]
    mask = stain > _otsu(seen)
    # The lobes of one nucleus count as one region.
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, disc)
    _, regions = cv2.connectedComponents(closed)
    weights = np.bincount(regions.ravel(), (stain * mask).ravel())
    weights[0] = 0  # what lies between the regions
    chosen = (regions == weights.argmax()) & mask
    if not weights.any() or stain[chosen].mean() - np.median(seen) < MIN_STAIN:
        return None, background
    rows, columns = np.nonzero(chosen)
    shrunk = max(image.shape[:2]) / max(size)
    x, y = ((places.min() + places.max() + 1) / 2 * shrunk for places in (columns, rows))
    return Nucleus(x, y, float(np.sqrt(len(rows))) * shrunk), background


def _stain(small: np.ndarray, lit: np.ndarray, background: np.ndarray) -> np.ndarray:
    """How much more red and green than blue light is absorbed: float32 (height, width)."""
    levels = np.arange(256)[:, None]
    # The 8 keeps the density of black finite, and that of dark noise low.
    densities = np.log((background + 8) / (levels + 8)).astype(np.float32)
    red, green, blue = (densities[:, c][small[..., c]] for c in range(3))
    return np.where(lit, np.maximum((red + green) / 2 - blue, 0), 0)


def _otsu(values: np.ndarray) -> float:
    last = int(0.998 * (len(values) - 1))  # a few outliers do not stretch the scale
    top = max(float(np.partition(values, last)[last]), 1e-6)
    levels = np.minimum(values / top * 255, 255).astype(np.uint8).reshape(-1, 1)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    return (threshold + 1) / 255 * top  # OpenCV keeps what is above the level
