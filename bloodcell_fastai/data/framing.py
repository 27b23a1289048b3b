"""What of a photograph the network sees: the white cell on white ground, or the whole frame."""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

SEARCH_SIDE = 160  # pixels of the longer side in which the nucleus is looked for
SIDES_OF_NUCLEUS = 2.4  # side of the crop, in square roots of the nucleus's area
LEAST_SHARE = 1 / 4  # of the shorter side of the frame that a crop keeps
DARK = 24  # of 255: black corners of rotated copies, which are no stain
BACKGROUND_PERCENTILE = 90
WHITE = 235  # of 255: the background after the light is evened out
LEAST_BACKGROUND = 80  # of 255: a picture without background is not blown up to white
LEAST_STAIN = 0.2  # optical density above the rest that makes a nucleus; found ones have 0.3-0.9


@dataclass(frozen=True)
class Nucleus:
    """Where a nucleus lies, in pixels: its centre, and the square root of its area."""

    x: float
    y: float
    side: float


def find_nucleus(image: np.ndarray) -> Nucleus | None:
    """The largest, most deeply stained nucleus of a smear, found by its colour.

    The stains of the Romanowsky family dye chromatin purple: it swallows red and green light
    and lets blue pass, where red cells swallow blue. The difference of the optical densities,
    against the empty background of the same picture, is cut by Otsu's threshold (1979); of the
    pieces, lobes joined, the one with most stain wins.

    Args:
        image: uint8 (height, width, 3), RGB.

    Returns:
        The nucleus; None where nothing is stained like one.
    """
    small, lit = _reduced(image)
    if not lit.any():
        return None
    stain = _stain(small, lit)
    mask = stain > _otsu(stain[lit])
    pieces = _joined(mask)
    weights = np.bincount(pieces.ravel(), (stain * mask).ravel())
    weights[0] = 0  # what lies between the pieces
    chosen = (pieces == weights.argmax()) & mask
    if not weights.any() or stain[chosen].mean() - np.median(stain[lit]) < LEAST_STAIN:
        return None
    rows, columns = np.nonzero(chosen)
    scale = max(small.shape[:2]) / max(image.shape[:2])
    middle_y, middle_x = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    return Nucleus(middle_x / scale, middle_y / scale, float(np.sqrt(len(rows))) / scale)


def framed(image: Image.Image, crop: str) -> Image.Image:
    """What the network sees of a picture, before it is resized.

    For ``cell`` the part that :func:`crop_box` gives, seen in the light of the whole picture:
    each colour is divided by that of the empty background, which becomes a light grey. It takes
    away the tint of the lamp and the exposure, in which laboratories differ.

    Args:
        image: RGB.
        crop: ``cell`` or ``frame``; a whole frame is left as it is.
    """
    if crop == "frame":
        return image
    pixels = np.asarray(image)
    small, lit = _reduced(pixels)
    if not lit.any():
        return image.crop(crop_box(image, crop))
    gains = WHITE / np.maximum(_background(small, lit), LEAST_BACKGROUND)
    levels = np.clip(np.arange(256)[:, None] * gains, 0, 255).round().astype(np.uint8)
    return image.crop(crop_box(image, crop)).point(levels.T.ravel().tolist())


def crop_box(image: Image.Image, crop: str) -> tuple[int, int, int, int]:
    """The part of ``image`` the network sees: left, top, right, bottom, in pixels.

    Args:
        image: RGB.
        crop: ``frame`` for all of it; ``cell`` for a square around the white cell, of a side
            that goes with its nucleus, so that the magnification of the microscope matters
            less. The square stays inside the frame, and is its middle if no cell is found.
    """
    if crop == "frame":
        return 0, 0, image.width, image.height
    nucleus = find_nucleus(np.asarray(image))
    shorter = min(image.size)
    if nucleus is None:
        return _square(image, image.width / 2, image.height / 2, shorter)
    side = np.clip(nucleus.side * SIDES_OF_NUCLEUS, shorter * LEAST_SHARE, shorter)
    return _square(image, nucleus.x, nucleus.y, max(round(float(side)), 1))


def _reduced(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture, small and smooth, and which of its pixels are not black: uint8 and bool."""
    scale = SEARCH_SIDE / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), 1.2)
    lit = cv2.erode((small.max(2) > DARK).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    return small, lit


def _background(image: np.ndarray, lit: np.ndarray) -> np.ndarray:
    """The colour of the light where nothing lies in its way: float64 (3,)."""
    return np.percentile(image[lit], BACKGROUND_PERCENTILE, axis=0)


def _stain(image: np.ndarray, lit: np.ndarray) -> np.ndarray:
    """How much more red and green than blue light is swallowed: float64 (height, width)."""
    colours = image.astype(np.float64) + 8  # keeps black finite and quiet
    background = _background(image, lit) + 8
    red, green, blue = np.moveaxis(np.log(background / colours), 2, 0)
    return np.where(lit, np.clip((red + green) / 2 - blue, 0, None), 0)


def _otsu(values: np.ndarray) -> float:
    top = max(float(np.percentile(values, 99.8)), 1e-6)
    levels = np.uint8(np.clip(values / top, 0, 1) * 255).reshape(-1, 1)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    return (threshold + 1) / 255 * top  # OpenCV keeps what is above the level


def _joined(mask: np.ndarray) -> np.ndarray:
    """Numbers of the connected pieces, int32; the lobes of one nucleus count as one piece."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, disc)
    return cv2.connectedComponents(closed)[1]


def _square(image: Image.Image, x: float, y: float, side: int) -> tuple[int, int, int, int]:
    left = int(np.clip(round(x - side / 2), 0, image.width - side))
    top = int(np.clip(round(y - side / 2), 0, image.height - side))
    return left, top, left + side, top + side
