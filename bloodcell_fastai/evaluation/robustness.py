"""Robustness to corruptions: accuracy under another stain, camera and magnification.

After ImageNet-C (Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common
corruptions and perturbations"): each kind of corruption at five fixed strengths, and accuracy
relative to that on the same images uncorrupted. A corruption is applied to the whole image, before
it is cropped, so that the crop is tested too.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..data.augment import DYES, restain
from ..data.cache import Change, ImageReader
from ..data.crop import DARK, find_nucleus
from ..data.splits import photo_groups
from ..errors import DataError
from ..files import read_table, write_table
from ..model.calibration import reference_table
from ..model.inference import Predictor
from ..model.runs import Run
from ..reporter import Progress, no_progress
from .metrics import proportion_ci

ROBUSTNESS_IMAGES = 500  # a corruption takes as long as predicting them: 41 times in all
CLEAN = "clean"
SMOOTH = InterpolationMode.BILINEAR
NUMBERS = ["strength", "setting", "n_images", "n_photos"]
FRACTIONS = ["accuracy", "accuracy_low", "accuracy_high", "relative_accuracy"]


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption.

    Attributes:
        kind: its name.
        unit: of the settings.
        settings: one for each strength, the weakest first.
        change: makes it to an image, RGB, at a setting; what is random comes from the generator.
    """

    kind: str
    unit: str
    settings: tuple[float, ...]
    change: Callable[[Image.Image, float, np.random.Generator], Image.Image]

    def __call__(self, image: Image.Image, setting: float) -> Image.Image:
        """An image, RGB, corrupted; of the same size.

        What is random is drawn anew for every image, from a seed that is in its pixels: the
        same image comes out the same, in whichever order and thread.
        """
        return self.change(image, setting, np.random.default_rng(zlib.crc32(image.tobytes())))


def robustness_images(
    table: pd.DataFrame, n: int = ROBUSTNESS_IMAGES, seed: int = 42
) -> pd.DataFrame:
    """Choose the validation images to corrupt.

    Every class gives as many as the others, while it has some, and every photograph of a class
    as many copies as the others.

    Args:
        table: image table with ``part``.
        n: how many at most.
        seed: of the choice.

    Returns:
        ``path``, ``label`` and ``photo`` of up to ``n`` images.

    Examples:
        >>> from bloodcell_fastai import Run, robustness_images
        >>> chosen = robustness_images(Run.open("mine").table, n=8)
        >>> chosen.label.value_counts().to_dict() == dict.fromkeys(chosen.label, 2)
        True
    """
    return reference_table(table[table.part == "valid"], n, seed)


def measure_robustness(
    predictor: Predictor, images: pd.DataFrame, progress: Progress = no_progress
) -> pd.DataFrame:
    """Accuracy on images with every kind of corruption, at every strength.

    The images are decoded for each corruption anew: the network takes about forty times as long.

    Args:
        predictor: of a trained model.
        images: with ``path``, ``label`` and ``photo``, such as :func:`robustness_images` chooses.
        progress: told how far it has come.

    Returns:
        A row for the uncorrupted images, whose ``kind`` is ``clean`` and ``strength`` 0, and one
        per corruption: ``kind``, ``strength`` (1 to 5), ``setting`` in ``unit``, ``n_images``,
        ``n_photos``, ``accuracy``, its 95 % interval by photograph from ``accuracy_low`` to
        ``accuracy_high``, and ``relative_accuracy``, the fraction of the clean accuracy that is
        left; NaN where there was none.

    Raises:
        BloodcellError: an image cannot be read.

    Examples:
        >>> from bloodcell_fastai import Predictor, Run, measure_robustness, robustness_images
        >>> run = Run.open("mine")
        >>> table = measure_robustness(Predictor.load(run), robustness_images(run.table, n=4))
        >>> len(table), list(table.kind.unique())[:3]
        (41, ['clean', 'stain', 'brightness'])
    """
    tasks: list[tuple[str, int, float, str, Change | None]] = [(CLEAN, 0, 0.0, "", None)]
    tasks += [
        (corruption.kind, strength, setting, corruption.unit, partial(corruption, setting=setting))
        for corruption in CORRUPTIONS
        for strength, setting in enumerate(corruption.settings, start=1)
    ]
    rows: list[tuple] = []
    photos = photo_groups(images)
    for kind, strength, setting, unit, change in tasks:
        progress("Robustness", len(rows), len(tasks))
        bits = predictor.reader.bits
        reader = ImageReader(predictor.size, predictor.crop, change=change, bits=bits)
        predicted = predictor.predict_all(images.path, reader).table.predicted
        correct = predicted.to_numpy() == images.label.to_numpy()
        score = float(correct.mean()), *(proportion_ci(correct, photos) or [])
        rows.append((kind, strength, setting, unit, len(images), photos.nunique(), *score))
    progress("Robustness", len(tasks), len(tasks))
    columns = ["kind", "strength", "setting", "unit", *NUMBERS[2:], *FRACTIONS[:3]]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(relative_accuracy=table.accuracy / (table.accuracy[0] or np.nan))


def write_robustness(run: Run, table: pd.DataFrame) -> None:
    """Write the table of :func:`measure_robustness` as ``robustness.csv`` of a run."""
    write_table(run.path / "robustness.csv", table.assign(weights=run.weights_hash))


def read_robustness(run: Run) -> pd.DataFrame | None:
    """What :func:`write_robustness` wrote for the model that the run has; None if nothing.

    Raises:
        BloodcellError: it was edited into something else.
    """
    path = run.path / "robustness.csv"
    hint = f"Make it anew: bloodcell interpret {run.name} --stress"
    if not path.is_file():
        return None
    table = read_table(path, ["kind", "unit", "weights"], [*NUMBERS, *FRACTIONS], hint)
    if (table.pop("weights") != run.weights_hash).any():
        return None
    fractions, strengths = table[FRACTIONS[:3]].to_numpy(float), table.strength.tolist()
    expected = [0] + [n for c in CORRUPTIONS for n in range(1, len(c.settings) + 1)]
    if strengths != expected or not ((fractions >= 0) & (fractions <= 1)).all():
        raise DataError(f"{path} is no table of robustness.", hint)
    return table


def robustness_metrics(table: pd.DataFrame) -> dict:
    """What ``metrics.json`` holds of a table of :func:`measure_robustness`.

    Returns:
        ``n_images`` and ``n_photos``; ``accuracy`` and ``accuracy_ci95`` of the uncorrupted images;
        ``relative_accuracy``, the mean over all corruptions, and in ``kinds`` that of each kind.
        Relative accuracies are None where the clean accuracy is 0.
    """
    clean, corrupted = table.iloc[0], table[table.kind != CLEAN]
    relative = corrupted.groupby("kind", sort=False).relative_accuracy.mean()
    return {
        "n_images": int(clean.n_images),
        "n_photos": int(clean.n_photos),
        "accuracy": float(clean.accuracy),
        "accuracy_ci95": [float(clean.accuracy_low), float(clean.accuracy_high)],
        "relative_accuracy": _number(corrupted.relative_accuracy.mean()),
        "kinds": {kind: _number(value) for kind, value in relative.items()},
    }


def describe_robustness(metrics: dict) -> str:
    """What :func:`robustness_metrics` returns as lines of text."""
    lines = [
        f"Robustness, {metrics['n_images']:,} images of {metrics['n_photos']:,} photographs",
        f"  {CLEAN:<12} {metrics['accuracy']:>8.2%}  accuracy",
    ]
    if metrics["relative_accuracy"] is not None:
        for kind, value in (metrics["kinds"] | {"mean": metrics["relative_accuracy"]}).items():
            lines.append(f"  {kind:<12} {value:>8.2%}  of that accuracy")
    return "\n".join(lines)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _either(factor: float, rng: np.random.Generator) -> float:
    """A factor or its inverse."""
    return factor if rng.random() < 0.5 else 1 / factor


def _stain(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """More of haematoxylin or eosin, less of the other; none where the slide is empty."""
    factor = _either(factor, rng)
    mixed = DYES.inverse() @ torch.diag(torch.tensor([factor, 1 / factor, 1])) @ DYES
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    light = torch.tensor(_background(image)).view(3, 1, 1) / 255
    stained = restain((picture / light)[None], mixed[None], torch.zeros(1, 3))[0] * light
    # Black corners of rotated copies are no dye, and would turn green.
    stained = torch.where(picture.amax(0) > DARK / 255, stained, picture)
    return tv.to_pil_image((stained * 255).round().byte())


def _brightness(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    return tv.adjust_brightness(image, _either(factor, rng))


def _contrast(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    return tv.adjust_contrast(image, factor)


def _blur(image: Image.Image, percent: float, rng: np.random.Generator) -> Image.Image:
    # torchvision's takes thirty times as long: it is not separable.
    sigma = percent / 100 * min(image.size)
    return Image.fromarray(cv2.GaussianBlur(np.asarray(image), (0, 0), sigma))


def _noise(image: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    # torchvision's draws from a generator that all threads share: no two runs would agree.
    picture = np.asarray(image, np.float32)
    noise = rng.standard_normal(picture.shape, np.float32) * (255 * deviation)
    return Image.fromarray((picture + noise).round().clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, quality: float, rng: np.random.Generator) -> Image.Image:
    return tv.jpeg(image, int(quality))


def _scale(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    return _turned(image, 0, _either(factor, rng))


def _rotation(image: Image.Image, degrees: float, rng: np.random.Generator) -> Image.Image:
    return _turned(image, degrees if rng.random() < 0.5 else -degrees, 1)


def _turned(image: Image.Image, degrees: float, factor: float) -> Image.Image:
    """Turned and enlarged about the white cell.

    About the middle of the image one cell in ten would leave it.
    """
    nucleus = find_nucleus(np.asarray(image))
    centre = [nucleus.x, nucleus.y] if nucleus else None
    fill = _background(image)
    if factor < 1:  # what is too fine for the smaller image
        sigma = (1 / factor - 1) / 2
        image = Image.fromarray(cv2.GaussianBlur(np.asarray(image), (0, 0), sigma))
    return tv.affine(image, degrees, [0, 0], factor, [0, 0], SMOOTH, fill, centre)


def _background(image: Image.Image) -> list[float]:
    """The colour of the empty slide, 0 to 255, which also fills what an image does not cover:
    black would imitate the corners that copies of the Kaggle set have, and a mirror would double
    cells."""
    return np.maximum(np.percentile(np.asarray(image), 90, axis=(0, 1)), 1).tolist()


CORRUPTIONS = (
    Corruption("stain", "factor, one dye up, one down", (1.15, 1.3, 1.5, 1.75, 2), _stain),
    Corruption("brightness", "factor, up or down", (1.1, 1.2, 1.3, 1.4, 1.5), _brightness),
    Corruption("contrast", "factor", (0.85, 0.7, 0.55, 0.4, 0.25), _contrast),
    Corruption("blur", "sigma, % of the shorter side", (0.25, 0.5, 0.75, 1, 1.5), _blur),
    Corruption("noise", "sigma, colours from 0 to 1", (0.02, 0.04, 0.08, 0.12, 0.16), _noise),
    Corruption("JPEG", "quality", (60, 40, 25, 15, 10), _jpeg),
    Corruption("scale", "factor, up or down", (1.1, 1.25, 1.5, 1.75, 2), _scale),
    Corruption("rotation", "degrees, either way", (15, 30, 45, 90, 180), _rotation),
)
