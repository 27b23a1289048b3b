"""The demo data set: blood smears drawn by code, in the layout of Kaggle's blood-cells.

Every object adds to maps of stain amounts, the stains have an absorbance for red, green and blue,
and the image is ``light * exp(-absorbance)``. Stain colours, light and magnification vary more
between photographs than between classes: the class is in shape and granules. The drawings are for
trying the tools; what a model learns from them does not hold for real blood.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from numpy.random import Generator

from ..files import atomic_folder, write_table

CLASSES = ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")

PHOTO_SIZE = (640, 480)  # lengths in this module are for its width and scale with it
COPY_SIZE = (320, 240)
# Drawn around the image, so that a second exposure can be shifted without running out of smear.
_MARGIN = 44

_HAEMOGLOBIN, _CHROMATIN, _CYTOPLASM, _EOSIN, _SHADE = range(5)
# Absorbance (natural logarithm) of one unit of each stain for R, G, B, at the two ends of its
# range of hues.
_STAIN_HUES = np.array(
    [
        [[0.05, 0.26, 0.27], [0.05, 0.27, 0.38]],
        [[0.66, 1.15, 0.06], [1.02, 1.18, 0.14]],
        [[0.16, 0.24, 0.04], [0.36, 0.27, 0.05]],
        [[0.06, 0.44, 0.26], [0.04, 0.48, 0.46]],
        [[1.00, 1.00, 1.00], [1.00, 1.00, 1.00]],
    ],
    np.float32,
)
_STAIN_STRENGTH_SPREAD = np.array([0.18, 0.22, 0.30, 0.35, 0.0])


@dataclass(frozen=True)
class Cell:
    """The white cell, in pixels of its image; (0, 0) is the centre of the top left pixel."""

    x: float
    y: float
    radius: float


class _Appearance(NamedTuple):
    """How the white cells of a class look, lengths in cell radii, amounts in units of stain."""

    size: tuple[float, float]  # radius, in radii of the photograph's red cells
    wobble: float  # irregularity of the outline
    chromatin: float
    clumps: float  # contrast of the nucleus's texture
    cytoplasm: float
    granules: int
    granule_radius: float
    granule_eosin: float
    vacuoles: int


_APPEARANCES = {
    "EOSINOPHIL": _Appearance((1.30, 1.75), 0.015, 0.95, 0.22, 0.30, 420, 0.055, 0.80, 0),
    "LYMPHOCYTE": _Appearance((1.15, 1.65), 0.025, 1.00, 0.22, 0.90, 20, 0.022, 0.30, 0),
    "MONOCYTE": _Appearance((1.45, 2.05), 0.040, 0.85, 0.26, 0.80, 160, 0.018, 0.25, 9),
    "NEUTROPHIL": _Appearance((1.30, 1.75), 0.015, 0.95, 0.22, 0.35, 700, 0.022, 0.65, 0),
}


def draw_photograph(
    label: str, seed: int, exposure: int = 0, size: tuple[int, int] = PHOTO_SIZE
) -> tuple[np.ndarray, Cell]:
    """Draw one photograph of a smear around one white cell.

    Another exposure is the same field photographed again: shifted by 20 to 40 pixels (at the
    default size), in other light, white balance, focus and noise.

    Args:
        label: one of CLASSES.
        seed: integer >= 0, the field.
        exposure: integer >= 0, which photograph of the field.
        size: (width, height) in pixels; what is drawn scales with the width.

    Returns:
        The RGB image, uint8 (height, width, 3), and the white cell.

    Raises:
        ValueError: unknown label, or negative seed or exposure.
    """
    if label not in CLASSES:
        raise ValueError(f"unknown label {label!r}: expected one of {', '.join(CLASSES)}")
    if seed < 0 or exposure < 0:
        raise ValueError(f"seed and exposure must be at least 0, got {seed} and {exposure}")
    # NumPy pads seeds with zeros: without the 1 added, the first exposure would have the field's.
    field_seed = [seed, CLASSES.index(label)]
    field_rng = np.random.default_rng(field_seed)
    camera_rng = np.random.default_rng([*field_seed, exposure + 1])
    stains, colours, cell = _draw_field(label, field_rng, size)
    return _expose(stains, colours, cell, exposure, camera_rng, size)


# --- the field -----------------------------------------------------------------------------------


def _draw_field(
    label: str, rng: Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, Cell]:
    """Lay out and draw the smear, with a margin around the image: the amounts of stain, float32
    (5, height, width), their absorbances, float32 (5, 3), and the white cell in those pixels."""
    unit = size[0] / PHOTO_SIZE[0]
    margin = round(_MARGIN * unit)
    width, height = size[0] + 2 * margin, size[1] + 2 * margin
    stains = np.zeros((5, height, width), np.float32)
    red_radius = rng.uniform(36, 49) * unit
    # Central enough for the cell's middle to stay inside every exposure and every copy.
    cell = Cell(
        x=margin + size[0] * rng.uniform(0.30, 0.70),
        y=margin + size[1] * rng.uniform(0.33, 0.67),
        radius=red_radius * rng.uniform(*_APPEARANCES[label].size),
    )
    stains[_SHADE] += 0.012 * _cloud(rng, (height, width), 60 * unit)
    stains[_SHADE] += 0.006 * _cloud(rng, (height, width), 5 * unit)
    red_cells = _scatter_red_cells(rng, (width, height), red_radius, cell)
    _draw_red_cells(stains, rng, red_cells)
    _draw_platelets(stains, rng, unit)
    _draw_white_cell(stains, rng, label, cell)
    _draw_droplets(stains, rng, red_cells, unit)
    _draw_debris(stains, rng, unit)

    hue = rng.uniform(0, 1, (5, 1))
    strength = np.exp(rng.normal(0, _STAIN_STRENGTH_SPREAD))[:, None]
    colours = strength * ((1 - hue) * _STAIN_HUES[:, 0] + hue * _STAIN_HUES[:, 1])
    return stains, colours.astype(np.float32), cell


def _scatter_red_cells(
    rng: Generator, size: tuple[int, int], radius: float, white: Cell
) -> np.ndarray:
    """Red cells in short overlapping chains that leave gaps and give way to the white cell: x, y
    and radius, float64 (n, 3), in pixels."""
    placed = np.array([[white.x, white.y, white.radius]])
    n_cells = rng.uniform(0.65, 1.15) * size[0] * size[1] / (np.pi * radius**2)
    for _ in range(round(n_cells / 2.5)):
        x, y = rng.uniform(0, 1, 2) * size
        heading = rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(1, 5)):
            own = radius * rng.uniform(0.84, 1.14)
            gap = np.hypot(placed[:, 0] - x, placed[:, 1] - y)
            nearest = np.full(len(placed), 0.75 * radius)
            nearest[0] = white.radius + 0.8 * own
            if (gap > nearest).all():
                placed = np.vstack([placed, [x, y, own]])
            heading += rng.normal(0, 0.5)
            step = radius * rng.uniform(0.9, 2.0)
            x, y = x + step * np.cos(heading), y + step * np.sin(heading)
    return placed[1:]


def _draw_red_cells(stains: np.ndarray, rng: Generator, cells: np.ndarray) -> None:
    """Add red cells: discs with a rim, a membrane, and a pale centre where they lie flat."""
    flatness = rng.uniform(0.35, 0.75)  # of this part of the smear
    mottle = _cloud(rng, stains.shape[1:], 0.08 * cells[:, 2].mean())
    for x, y, radius in cells.tolist():
        window, dx, dy = _window(stains.shape[1:], x, y, 1.5 * radius)
        edge = _wobbly_distance(rng, dx, dy, radius, 0.03, squash=rng.uniform(0.72, 1.0))
        body = _step((1 - edge) * radius / 3.5)
        pale = min(max(rng.normal(flatness, 0.22), 0), 0.92)
        dip = 1 - pale * _step((rng.uniform(0.40, 0.62) - edge) / 0.25)
        rim = 0.18 * np.exp(-(((edge - 0.9) / 0.1) ** 2))
        thickness = body * rng.uniform(0.75, 1.15) * (dip + rim) * (1 + 0.09 * mottle[window])
        below = stains[_HAEMOGLOBIN][window]
        # Overlapping cells flatten each other: less than twice as dense as one.
        below[:] = np.maximum(below, thickness) + 0.22 * np.minimum(below, thickness)
        # The membrane refracts: a thin bright line just outside.
        stains[_SHADE][window] -= 0.035 * np.exp(-((((edge - 1.03) * radius) / 1.5) ** 2))


def _draw_platelets(stains: np.ndarray, rng: Generator, unit: float) -> None:
    """Add platelets: small, ragged, granular and purple, some in clumps and some out of focus."""
    height, width = stains.shape[1:]
    for _ in range(rng.integers(4, 9)):
        x, y = rng.uniform(0, 1, 2) * (width, height)
        amount = rng.uniform(0.15, 0.55)
        for _ in range(1 + rng.poisson(0.5)):
            radius = rng.uniform(6, 13) * unit
            window, dx, dy = _window((height, width), x, y, 1.8 * radius)
            edge = _wobbly_distance(rng, dx, dy, radius, 0.12, squash=rng.uniform(0.6, 1))
            grain = 1 + 0.35 * _cloud(rng, edge.shape, 2.5 * unit)
            stains[_CHROMATIN][window] += amount * grain * _step((1 - edge) * rng.uniform(0.8, 3))
            x, y = np.clip(rng.normal((x, y), radius), 0, (width - 1, height - 1))


def _draw_droplets(stains: np.ndarray, rng: Generator, red_cells: np.ndarray, unit: float) -> None:
    """Add the small bright rings, outlined in dark, of a smear that dried too slowly."""
    for _ in range(rng.integers(34, 58)):
        x, y, radius = red_cells[rng.integers(len(red_cells))]
        x, y = rng.normal((x, y), radius / 3)
        radius = rng.uniform(2.2, 6.5) * unit
        window, dx, dy = _window(stains.shape[1:], x, y, 2.5 * radius)
        edge = _wobbly_distance(rng, dx, dy, radius, 0.15, squash=rng.uniform(0.45, 1))
        outline = np.exp(-(((edge - 1) / 0.32) ** 2))
        stains[_SHADE][window] += 0.22 * outline - rng.uniform(0, 0.3) * _step((0.8 - edge) / 0.3)
        stains[_CHROMATIN][window] += rng.uniform(0, 0.35) * outline


def _draw_debris(stains: np.ndarray, rng: Generator, unit: float) -> None:
    """Add specks of dust and precipitated stain, sharp or blurred, anywhere."""
    height, width = stains.shape[1:]
    for _ in range(rng.integers(200, 260)):
        x, y = rng.uniform(0, 1, 2) * (width, height)
        radius = rng.uniform(0.8, 2.6) * unit
        window, dx, dy = _window((height, width), x, y, 4 * radius)
        speck = np.exp(-(dx**2 + dy**2) / radius**2)
        stain, amount = (_CHROMATIN, 0.40) if rng.random() < 0.4 else (_SHADE, 0.30)
        stains[stain][window] += rng.uniform(0.5, 1) * amount * speck


# --- the white cell ------------------------------------------------------------------------------


def _draw_white_cell(stains: np.ndarray, rng: Generator, label: str, cell: Cell) -> None:
    """Put the white cell over whatever lies there: cytoplasm, granules, nucleus, vacuoles."""
    kind = _APPEARANCES[label]
    window, dx, dy = _window(stains.shape[1:], cell.x, cell.y, 1.4 * cell.radius)
    edge = _wobbly_distance(rng, dx, dy, cell.radius, kind.wobble, squash=rng.uniform(0.88, 1))
    body = _step((1 - edge) * cell.radius / 3)
    nucleus = _draw_nucleus(rng, label, dx, dy, cell.radius)
    holes = _draw_dots(rng, dx, dy, cell.radius, kind.vacuoles, 0.05)
    granules = _draw_dots(rng, dx, dy, cell.radius, kind.granules, kind.granule_radius)
    smooth = _cloud(rng, edge.shape, 0.16 * cell.radius)
    fine = _cloud(rng, edge.shape, 0.05 * cell.radius)
    texture = 1 + kind.clumps * (0.6 * smooth + 0.7 * fine)
    membrane = np.exp(-((((edge - 0.97) * cell.radius) / 2) ** 2))

    layers = stains[:, window[0], window[1]]
    layers *= 1 - body
    solid = body * (1 - 0.8 * holes)
    layers[_CHROMATIN] += solid * kind.chromatin * nucleus * texture
    layers[_CYTOPLASM] += (
        solid * (1 - nucleus) * kind.cytoplasm * (1 + 0.15 * smooth + 0.12 * fine + 0.3 * membrane)
    )
    layers[_EOSIN] += solid * (1 - 0.8 * nucleus) * kind.granule_eosin * granules
    layers[_SHADE] += 0.05 * membrane


def _nucleus_plan(label: str, rng: Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """A nucleus as lobes in a row and the strand that links them: the centres of the lobes (n, 2),
    their radii (n,), and the width of the strand, in cell radii from the centre of the cell."""
    if label == "LYMPHOCYTE":
        return rng.uniform(-0.06, 0.06, (1, 2)), rng.uniform(0.80, 0.90, 1), 0.0
    if label == "EOSINOPHIL":
        angles = rng.uniform(0, 2 * np.pi) + np.array([0, rng.uniform(1.9, 2.8)])
        return _on_circle(angles, 0.45), rng.uniform(0.34, 0.43, 2), rng.uniform(0.10, 0.2)
    if label == "MONOCYTE":
        # So many lobes that they run into one: a kidney, bent around a notch.
        angles = rng.uniform(0, 2 * np.pi) + np.linspace(0, rng.uniform(2.6, 3.8), 9)
        return _on_circle(angles, rng.uniform(0.36, 0.44)), rng.uniform(0.36, 0.44, 9), 0.5
    lobes = rng.integers(3, 6)
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(
        rng.uniform(0.95, 1.3, lobes) * (4 / lobes) ** 0.5
    )
    distances = rng.uniform(0.40, 0.56, lobes)
    return _on_circle(angles, distances), rng.uniform(0.25, 0.32, lobes), rng.uniform(0.09, 0.16)


def _draw_nucleus(
    rng: Generator, label: str, dx: np.ndarray, dy: np.ndarray, radius: float
) -> np.ndarray:
    """Draw the lobes and the strand, joints rounded: how much is nucleus, float32 0..1."""
    centres, lobe_radii, strand = _nucleus_plan(label, rng)
    canvas = np.zeros((dy.size, dx.size), np.uint8)
    points = np.rint(centres * radius - (dx[0, 0], dy[0, 0])).astype(int)
    for point, lobe in zip(points, lobe_radii, strict=True):
        axes = np.rint(lobe * radius * np.array([1, rng.uniform(0.82, 1.0)])).astype(int)
        cv2.ellipse(
            canvas, point.tolist(), axes.tolist(), rng.uniform(0, 180), 0, 360, 255, cv2.FILLED
        )
    if strand:
        cv2.polylines(canvas, [points], False, 255, max(1, round(strand * radius)))
    blurred = cv2.GaussianBlur(canvas.astype(np.float32) / 255, (0, 0), 0.045 * radius)
    ragged = 0.10 * _cloud(rng, canvas.shape, 0.14 * radius)
    return _step((blurred - 0.45 + ragged * (blurred > 0.02)) * 5)


def _draw_dots(
    rng: Generator, dx: np.ndarray, dy: np.ndarray, radius: float, count: int, dot_radius: float
) -> np.ndarray:
    """Scatter dots of `dot_radius` cell radii over a cell: how much is dot, float32 0..1."""
    canvas = np.zeros((dy.size, dx.size), np.uint8)
    angles = rng.uniform(0, 2 * np.pi, count)
    distances = radius * 0.95 * np.sqrt(rng.uniform(0, 1, count))
    centres = _on_circle(angles, distances) - (dx[0, 0], dy[0, 0])
    radii = dot_radius * radius * rng.uniform(0.7, 1.3, count)
    # OpenCV places circles to 1/16 px when told that four bits are a fraction.
    places = np.rint(np.column_stack([centres, radii]) * 16).astype(int).tolist()
    for (*centre, dot), shade in zip(places, rng.integers(110, 256, count).tolist(), strict=True):
        cv2.circle(canvas, centre, dot, shade, cv2.FILLED, cv2.LINE_AA, 4)
    return canvas.astype(np.float32) / 255


# --- the camera ----------------------------------------------------------------------------------


def _expose(
    stains: np.ndarray,
    colours: np.ndarray,
    cell: Cell,
    exposure: int,
    rng: Generator,
    size: tuple[int, int],
) -> tuple[np.ndarray, Cell]:
    """Photograph a field: position, light, focus, vignette, white balance, sensor noise."""
    width, height = size
    unit = width / PHOTO_SIZE[0]
    left = top = round(_MARGIN * unit)
    if exposure:
        distance, angle = rng.uniform(20, 40) * unit, rng.uniform(0, 2 * np.pi)
        left += round(distance * np.cos(angle))
        top += round(distance * np.sin(angle))
    visible = stains[:, top : top + height, left : left + width]
    absorbance = np.einsum("shw,sc->hwc", visible, colours)

    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    slope = rng.normal(0, 0.025, 2)
    shading = 1 + slope[0] * x + slope[1] * y - rng.uniform(0.01, 0.05) * (x**2 + y**2)
    white = np.array([195, 191, 186]) * rng.normal(1, 0.03) * rng.normal(1, (0.02, 0.012, 0.03))
    light = np.exp(-absorbance) * (shading[..., None] * white).astype(np.float32)
    # A microscope's light reaches the dark parts of the image as glare.
    light = 8 + 0.96 * cv2.GaussianBlur(light, (0, 0), rng.uniform(0.7, 1.15) * unit)
    noise = rng.standard_normal(light.shape, np.float32) * rng.uniform(1.2, 2.4)
    # Colour filters on the sensor spread the noise over neighbouring pixels.
    light += cv2.GaussianBlur(noise, (0, 0), 0.7)
    image = np.clip(np.rint(light), 0, 255).astype(np.uint8)
    return image, Cell(cell.x - left, cell.y - top, cell.radius)


# --- shapes --------------------------------------------------------------------------------------


def _window(
    shape: tuple[int, int], x: float, y: float, reach: float
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The square of half side `reach` around (x, y), as far as it is in the image: slices of rows
    and columns, and how far their pixels lie from (x, y), float32 (1, w) and (h, 1)."""
    rows, columns = (
        slice(min(n, max(0, round(at - reach))), max(0, min(n, round(at + reach) + 1)))
        for n, at in zip(shape, (y, x), strict=True)
    )
    dx = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(x)
    dy = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(y)
    return (rows, columns), dx, dy


def _wobbly_distance(
    rng: Generator, dx: np.ndarray, dy: np.ndarray, radius: float, wobble: float, squash: float
) -> np.ndarray:
    """Distance from the centre in units of an irregular ellipse, float32 (h, w): 1 on it.

    wobble: height of the waves along the outline, in radii. squash: short axis over long axis.
    """
    turn = rng.uniform(0, np.pi)
    # Python's floats, unlike NumPy's, leave float32 arrays float32.
    cos, sin = math.cos(turn), math.sin(turn)
    along = cos * dx + sin * dy
    across = (cos * dy - sin * dx) / squash
    angle = np.arctan2(across, along)
    outline = np.full_like(angle, radius / math.sqrt(squash))
    for wave in range(2, 6):
        outline *= 1 + rng.normal(0, 3 * wobble / wave**1.5) * np.cos(
            wave * angle + rng.uniform(0, 2 * np.pi)
        )
    return np.hypot(along, across) / outline


def _cloud(rng: Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Smooth noise of mean 0 and deviation about 0.7, in blobs of `scale` pixels; float32."""
    height, width = (int(n / scale) + 2 for n in shape)
    coarse = rng.standard_normal((height, width), np.float32)
    return cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)


def _step(values: np.ndarray) -> np.ndarray:
    """Smooth step: 0 up to -0.5, 1 from 0.5."""
    t = np.clip(values + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _on_circle(angles: np.ndarray, distances: np.ndarray | float) -> np.ndarray:
    """Points at angles (radians) and distances from the origin, (n, 2)."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(distances, (-1, 1))


# --- copies --------------------------------------------------------------------------------------


def augment_copy(photo: np.ndarray, cell: Cell, rng: Generator) -> tuple[np.ndarray, Cell]:
    """Make one copy of a photograph the way the Kaggle set was made.

    Flips, rotation up to 20 degrees, shear, a shift up to 10 % and the change of size are composed
    and applied in one warp; what lies outside the photograph is black.

    Args:
        photo: uint8 (height, width, 3).
        cell: the white cell in the photograph's pixels.
        rng: where the choices come from.

    Returns:
        The copy, uint8 (240, 320, 3), and the white cell in its pixels.
    """
    height, width = photo.shape[:2]
    flips = np.diag(rng.choice([-1.0, 1.0], 2))
    angle, shear = rng.uniform(-1, 1, 2) * (np.deg2rad(20), 0.15)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    size = np.array(COPY_SIZE)
    scale = np.diag(size / (width, height))
    linear = scale @ rotation @ np.array([[1, shear], [0, 1]]) @ flips
    shift = rng.uniform(-0.1, 0.1, 2) * size
    photo_centre = (np.array([width, height]) - 1) / 2
    offset = (size - 1) / 2 + shift - linear @ photo_centre
    copy = cv2.warpAffine(photo, np.column_stack([linear, offset]), COPY_SIZE)
    x, y = linear @ (cell.x, cell.y) + offset
    return copy, Cell(float(x), float(y), cell.radius * float(np.sqrt(abs(np.linalg.det(linear)))))


def _shrink(photo: np.ndarray, cell: Cell) -> tuple[np.ndarray, Cell]:
    """Resize a photograph to a copy's size and change nothing else, as for TEST_SIMPLE."""
    scale = COPY_SIZE[0] / photo.shape[1]
    moved = Cell((cell.x + 0.5) * scale - 0.5, (cell.y + 0.5) * scale - 0.5, cell.radius * scale)
    return cv2.resize(photo, COPY_SIZE, interpolation=cv2.INTER_AREA), moved


# --- the data set --------------------------------------------------------------------------------

_ORIGINALS = PurePosixPath("dataset-master/dataset-master")
_COPIES = PurePosixPath("dataset2-master/dataset2-master/images")
_TRUTH = ["path", "photo", "field", "x", "y", "radius"]
_TEST_FRACTION = 0.2
# Second exposures: enough to matter to an audit, few enough to be the exception they really are.
_PHOTOS_PER_TWIN = 8
_MAX_TWINS = 3
_MAX_SUFFIX = 10_000  # of the random number in a copy's name


@dataclass(frozen=True)
class _Photo:
    """One photograph to draw and where its files go, paths relative to the root of the data set."""

    number: int
    label: str
    subset: str  # TRAIN or TEST
    field: str
    field_seed: int
    exposure: int
    copies: list[str]
    simple: list[str]  # the un-augmented copy that a TEST photograph has


def make_demo(root: Path, photos_per_class: int = 24, copies: int = 10, seed: int = 0) -> Path:
    """Draw the demo data set into a new folder, in Kaggle's layout.

    A fifth of the photographs of each class, at least one, is behind TEST and the rest behind
    TRAIN. From four per class on, one to three photographs are second exposures of another one's
    field: the first of them in TEST while that field's first exposure is in TRAIN.

    Besides Kaggle's files, ``truth.csv`` holds of every copy the path, the stem of the original,
    the field, and the white cell (x, y, radius) in pixels; ``photos.csv`` holds ``path,photo``, as
    ``bloodcell audit`` writes it.

    Args:
        root: the folder to make; it appears only when it is complete.
        photos_per_class: photographs of 640x480 per class, at least 2.
        copies: augmented copies of 320x240 per photograph, 1 to 10000.
        seed: integer >= 0. The same seed gives the same bytes, whatever the number of threads,
            under the same versions of NumPy and OpenCV.

    Returns:
        root, as a Path.

    Raises:
        FileExistsError: root is there already.
        ValueError: a number is out of range.

    Examples:
        >>> from bloodcell_fastai import make_demo, open_dataset
        >>> root = make_demo("drawn", photos_per_class=2, copies=3)
        >>> sorted(path.name for path in root.iterdir())
        ['dataset-master', 'dataset2-master', 'photos.csv', 'truth.csv']
        >>> open_dataset(root).counts.sum(axis=1).to_dict()
        {'TEST': 12, 'TEST_SIMPLE': 4, 'TRAIN': 12}
    """
    root = Path(root)
    if photos_per_class < 2:
        raise ValueError(f"photos_per_class must be at least 2, got {photos_per_class}")
    if not 1 <= copies <= _MAX_SUFFIX:
        raise ValueError(f"copies must be 1 to {_MAX_SUFFIX}, got {copies}")
    photos = _plan_photos(photos_per_class, copies, seed)
    with atomic_folder(root) as draft:
        with ThreadPoolExecutor() as pool:
            rows = pool.map(lambda photo: _write_photo(draft, photo, seed), photos)
            truth = pd.DataFrame(sorted(row for group in rows for row in group), columns=_TRUTH)
        write_table(draft / "truth.csv", truth)
        # What `bloodcell audit` would find: the library reads the photographs from here.
        write_table(draft / "photos.csv", pd.DataFrame({"path": truth.path, "photo": truth.field}))
        labels = [("", photo.number, photo.label) for photo in photos]
        table = pd.DataFrame(labels, columns=["", "Image", "Category"])
        write_table(draft / _ORIGINALS / "labels.csv", table)
    return root


def _plan_photos(photos_per_class: int, copies: int, seed: int) -> list[_Photo]:
    """Decide on the number, subset, field and file names of every photograph, by number."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(len(CLASSES) * photos_per_class).reshape(len(CLASSES), -1)
    field_seeds = rng.integers(2**32, size=numbers.shape)
    n_test = max(1, round(_TEST_FRACTION * photos_per_class))
    n_train = photos_per_class - n_test
    n_twins = 0
    if photos_per_class >= 4:
        n_twins = max(1, min(_MAX_TWINS, photos_per_class // _PHOTOS_PER_TWIN))
    # The last classes have a twin of their first photograph: one twin in TEST, the others in TRAIN.
    twins = {CLASSES[-1 - i]: n_train if i == 0 else 1 for i in range(n_twins)}

    photos = []
    for label, own_numbers, seeds in zip(CLASSES, numbers.tolist(), field_seeds, strict=True):
        names = _copy_names(rng, n_train, copies) + _copy_names(rng, n_test, copies)
        simple_names: list[list[str]] = [[]] * n_train
        simple_names += _copy_names(rng, n_test, 1)
        for i, number in enumerate(own_numbers):
            subset = "TRAIN" if i < n_train else "TEST"
            field = 0 if twins.get(label) == i else i
            photos.append(
                _Photo(
                    number=number,
                    label=label,
                    subset=subset,
                    field=f"field_{own_numbers[field]:05d}",
                    field_seed=int(seeds[field]),
                    exposure=int(field != i),
                    copies=[str(_COPIES / subset / label / name) for name in names[i]],
                    simple=[str(_COPIES / "TEST_SIMPLE" / label / n) for n in simple_names[i]],
                )
            )
    return sorted(photos, key=lambda photo: photo.number)


def _copy_names(rng: Generator, n_photos: int, copies: int) -> list[list[str]]:
    """`copies` unique file names for each photograph of a class and subset, as Kaggle's were:
    position in a pass through the photographs, each in another order, and a random number."""
    passes = np.stack([rng.permutation(n_photos) for _ in range(copies)])
    suffixes = np.stack([rng.choice(_MAX_SUFFIX, copies, replace=False) for _ in range(n_photos)])
    return [
        [f"_{position}_{suffixes[position, i]}.jpeg" for i, position in enumerate(positions)]
        for positions in passes.T
    ]


def _write_photo(root: Path, photo: _Photo, seed: int) -> list[tuple]:
    """Draw one photograph, write it and its copies, and return the copies' rows of truth.csv."""
    image, cell = draw_photograph(photo.label, photo.field_seed, photo.exposure)
    stem = f"BloodImage_{photo.number:05d}"
    _write_jpeg(root / _ORIGINALS / "JPEGImages" / f"{stem}.jpg", image)
    rng = np.random.default_rng([seed, photo.number + 1])  # with 0, the plan's own numbers
    copies = [(path, *augment_copy(image, cell, rng)) for path in photo.copies]
    copies += [(path, *_shrink(image, cell)) for path in photo.simple]
    rows = []
    for path, copy, moved in copies:
        _write_jpeg(root / path, copy)
        place = (f"{value:.2f}" for value in (moved.x, moved.y, moved.radius))
        rows.append((path, stem, photo.field, *place))
    return rows


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    """Write an RGB image, uint8 (height, width, 3), at the quality Pillow used for Kaggle's."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())
