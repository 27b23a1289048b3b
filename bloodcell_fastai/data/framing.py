"""What of a photograph the network sees: the white cell on white ground, or the whole frame."""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

SEARCH_SIDE = 160  # pixels of the longer side in which the nucleus is looked for
SIDES_OF_NUCLEUS = 2.4  # side of the crop, in square roots of the nucleus's area
LEAST_SHARE = 1 / 4  # of the shorter side of the frame that a crop keeps
DARK = 24  # of 255: black corners of rotated copies, which are no stain
BACKGROUND_SHARE = 0.9  # of the pixels are as dark as the background or darker
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
    nucleus = _nucleus(small, lit, _background(small, lit))
    scale = max(image.shape[:2]) / max(small.shape[:2])
    return nucleus and Nucleus(nucleus.x * scale, nucleus.y * scale, nucleus.side * scale)


def framed(image: Image.Image, crop: str) -> Image.Image:
    """What the network sees of a picture, before it is resized.

    For ``cell`` the part that :func:`crop_box` gives, seen in the light of the whole picture:
    each colour is divided by that of the empty background, which becomes a light grey. It takes
    away the tint of the lamp and the exposure, in which laboratories differ.

    Args:
        image: RGB.
        crop: ``cell`` or ``frame``; a whole frame is left as it is.
    """
    return image if crop == "frame" else cut_out(image)[0]


def cut_out(image: Image.Image) -> tuple[Image.Image, bool]:
    """What :func:`framed` makes of a picture for ``cell``, and whether there is a white cell."""
    box, background, found = _look(image)
    gains = WHITE / np.maximum(background, LEAST_BACKGROUND)
    levels = np.clip(np.arange(256) * gains[:, None], 0, 255).round().astype(np.uint8)
    return image.crop(box).point(levels.ravel().tolist()), found


def crop_box(image: Image.Image, crop: str) -> tuple[int, int, int, int]:
    """The part of ``image`` the network sees: left, top, right, bottom, in pixels.

    Args:
        image: RGB.
        crop: ``frame`` for all of it; ``cell`` for a square around the white cell, of a side
            that goes with its nucleus, so that the magnification of the microscope matters
            less. The square stays inside the frame, and is its middle if no cell is found.
    """
    return (0, 0, *image.size) if crop == "frame" else _look(image)[0]


def _look(image: Image.Image) -> tuple[tuple[int, int, int, int], np.ndarray, bool]:
    """The square around the white cell, the colour of the background, float64 (3,), and whether
    there is a cell."""
    pixels, shorter = np.asarray(image), min(image.size)
    small, lit = _reduced(pixels)
    middle = _square(image, image.width / 2, image.height / 2, shorter)
    if not lit.any():
        return middle, np.full(3, float(WHITE)), False
    background = _background(small, lit)
    if (nucleus := _nucleus(small, lit, background)) is None:
        return middle, background, False
    scale = max(image.size) / max(small.shape[:2])
    side = np.clip(nucleus.side * scale * SIDES_OF_NUCLEUS, shorter * LEAST_SHARE, shorter)
    side = max(round(float(side)), 1)
    return _square(image, nucleus.x * scale, nucleus.y * scale, side), background, True


def _reduced(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture, small and smooth, and which of its pixels are not black: uint8 and bool."""
    scale = SEARCH_SIDE / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), 1.2)
    lit = cv2.erode((small.max(2) > DARK).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    return small, lit


def _background(small: np.ndarray, lit: np.ndarray) -> np.ndarray:
    """The colour of the light where nothing lies in its way: float64 (3,)."""
    counts = [np.bincount(channel, minlength=256).cumsum() for channel in small[lit].T]
    return np.array([np.searchsorted(c, BACKGROUND_SHARE * c[-1]) for c in counts], float)


def _nucleus(small: np.ndarray, lit: np.ndarray, background: np.ndarray) -> Nucleus | None:
    """:func:`find_nucleus` in a reduced picture."""
    stain = _stain(small, lit, background)
    seen = stain[lit]
    mask = stain > _otsu(seen)
    pieces = _joined(mask)
    weights = np.bincount(pieces.ravel(), (stain * mask).ravel())
    weights[0] = 0  # what lies between the pieces
    chosen = (pieces == weights.argmax()) & mask
    if not weights.any() or stain[chosen].mean() - np.median(seen) < LEAST_STAIN:
        return None
    rows, columns = np.nonzero(chosen)
    return Nucleus(
        x=(columns.min() + columns.max() + 1) / 2,
        y=(rows.min() + rows.max() + 1) / 2,
        side=float(np.sqrt(len(rows))),
    )


def _stain(small: np.ndarray, lit: np.ndarray, background: np.ndarray) -> np.ndarray:
    """How much more red and green than blue light is swallowed: float32 (height, width)."""
    levels = np.arange(256)[:, None]
    # The 8 keeps the density of black finite, and that of dark noise low.
    densities = np.log((background + 8) / (levels + 8)).astype(np.float32)
    red, green, blue = (densities[:, c][small[..., c]] for c in range(3))
    return np.where(lit, np.maximum((red + green) / 2 - blue, 0), 0)


def _otsu(values: np.ndarray) -> float:
    last = int(0.998 * (len(values) - 1))  # a few odd pixels do not stretch the scale
    top = max(float(np.partition(values, last)[last]), 1e-6)
    levels = np.minimum(values / top * 255, 255).astype(np.uint8).reshape(-1, 1)
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
