"""``bloodcell interpret --stress``: how a model bears another stain, camera and magnification.

After ImageNet-C (Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common
corruptions and perturbations"): each kind of corruption at five fixed strengths, and accuracy
relative to that on the same images untouched. The settings are those of microscopes and cameras,
which vary less than the web's pictures do. A corruption is made to the picture file, before the
white cell is looked for, so that the finder of the cell is put to the test too.
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
from fastai.vision.all import Learner, ProgressCallback
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..data.augmentation import DYES, restain
from ..data.framing import DARK, find_nucleus
from ..data.pixels import Change, Pixels
from ..errors import BloodcellError
from ..files import read_table, write_table
from ..reporter import Progress, no_progress
from ..training.calibration import predict_with_features, reference_table
from ..training.callbacks import RichProgress
from ..training.runs import Run
from .evaluation import bootstrap_ci

STRESS_IMAGES = 500  # a corruption takes as long as predicting them: 41 times in all
CLEAN = "clean"
SMOOTH = InterpolationMode.BILINEAR
NUMBERS = ["strength", "setting", "n_images", "n_photos"]
SHARES = ["accuracy", "accuracy_low", "accuracy_high", "relative_accuracy"]


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption.

    Attributes:
        kind: its name.
        unit: of the settings.
        settings: one for each strength, the weakest first.
        change: makes it to a picture, RGB, at a setting; what is random comes from the generator.
    """

    kind: str
    unit: str
    settings: tuple[float, ...]
    change: Callable[[Image.Image, float, np.random.Generator], Image.Image]

    def __call__(self, image: Image.Image, setting: float) -> Image.Image:
        """A picture, RGB, corrupted; of the same size.

        What is random is drawn anew for every picture, from a seed that is in its pixels: the
        same picture comes out the same, in whichever order and thread.
        """
        return self.change(image, setting, np.random.default_rng(zlib.crc32(image.tobytes())))


def stress_images(table: pd.DataFrame, n: int = STRESS_IMAGES, seed: int = 42) -> pd.DataFrame:
    """Choose the validation images to corrupt.

    Every class gives as many as the others, while it has some, and every photograph of a class
    as many copies as the others: of 500 images as many show different photographs as can be.

    Args:
        table: image table with ``part``.
        n: how many at most.
        seed: of the choice.

    Returns:
        ``path``, ``label`` and ``photo`` of up to ``n`` images.

    Examples:
        >>> from bloodcell_fastai import Run, stress_images
        >>> chosen = stress_images(Run.open("mine").table, n=8)
        >>> chosen.label.value_counts().to_dict() == dict.fromkeys(chosen.label, 2)
        True
    """
    return reference_table(table[table.part == "valid"], n, seed)


def stress_test(
    learn: Learner, images: pd.DataFrame, progress: Progress = no_progress
) -> pd.DataFrame:
    """Accuracy on images that are corrupted in every way, at every strength.

    The images are decoded for each corruption anew: the network takes about forty times as long
    as that, and hundreds of photographs need not be held in memory.

    Args:
        learn: a trained learner whose batches come from :func:`~bloodcell_fastai.blood_dls`.
        images: with ``path``, ``label`` and ``photo``, such as :func:`stress_images` chooses.
        progress: told how far it has come.

    Returns:
        A row for the untouched images, whose ``kind`` is ``clean`` and ``strength`` 0, and one
        per corruption: ``kind``, ``strength`` (1 to 5), ``setting`` in ``unit``, ``n_images``,
        ``n_photos``, ``accuracy``, its 95 % interval by photograph from ``accuracy_low`` to
        ``accuracy_high``, and ``relative_accuracy``, the share of the clean accuracy that is
        left; NaN where there was none.

    Raises:
        BloodcellError: an image cannot be read.

    Examples:
        >>> from bloodcell_fastai import Run, load_learner, stress_images, stress_test
        >>> run = Run.open("mine")
        >>> table = stress_test(load_learner(run), stress_images(run.table, n=4))
        >>> len(table), list(table.kind.unique())[:3]
        (41, ['clean', 'stain', 'brightness'])
    """
    tasks: list[tuple[str, int, float, str, Change | None]] = [(CLEAN, 0, 0.0, "", None)]
    for corruption in CORRUPTIONS:
        for strength, setting in enumerate(corruption.settings, start=1):
            corrupt = partial(corruption, setting=setting)
            tasks.append((corruption.kind, strength, setting, corruption.unit, corrupt))
    rows: list[tuple] = []
    bars = [bar for bar in learn.cbs if isinstance(bar, RichProgress | ProgressCallback)]
    with learn.removed_cbs(bars):  # which would show a bar of their own for every corruption
        for kind, strength, setting, unit, change in tasks:
            progress("Stress test", len(rows), len(tasks))
            correct = _predict(learn, images, change) == images.label.to_numpy()
            score = float(correct.mean()), *bootstrap_ci(correct, images.photo)
            counts = len(images), images.photo.nunique()
            rows.append((kind, strength, setting, unit, *counts, *score))
    progress("Stress test", len(tasks), len(tasks))
    columns = ["kind", "strength", "setting", "unit", *NUMBERS[2:], *SHARES[:3]]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(relative_accuracy=table.accuracy / (table.accuracy[0] or np.nan))


def write_stress(run: Run, table: pd.DataFrame) -> None:
    """Write the table of :func:`stress_test` as ``stress.csv`` of a run."""
    write_table(run.path / "stress.csv", table)


def read_stress(run: Run) -> pd.DataFrame | None:
    """What :func:`write_stress` wrote for the model that the run has; None if nothing.

    Raises:
        BloodcellError: it was edited into something else.
    """
    path, hint = run.path / "stress.csv", f"Make it anew: bloodcell interpret {run.name} --stress"
    if not path.is_file():
        return None
    table = read_table(path, ["kind", "unit"], [*NUMBERS, *SHARES], hint)
    shares, strengths = table[SHARES[:3]].to_numpy(float), table.strength.tolist()
    expected = [0] + [n for c in CORRUPTIONS for n in range(1, len(c.settings) + 1)]
    if strengths != expected or not ((shares >= 0) & (shares <= 1)).all():
        raise BloodcellError(f"{path} is no table of a stress test.", hint)
    return table


def stress_metrics(table: pd.DataFrame) -> dict:
    """What ``metrics.json`` holds of a table of :func:`stress_test`.

    Returns:
        ``n_images`` and ``n_photos``; ``accuracy`` and ``accuracy_ci95`` of the untouched images;
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
        "kinds": {kind: _number(share) for kind, share in relative.items()},
    }


def describe_stress(table: pd.DataFrame) -> str:
    """A table of :func:`stress_test` as lines of text."""
    metrics = stress_metrics(table)
    lines = [
        f"Under stress, {metrics['n_images']:,} images of {metrics['n_photos']:,} photographs",
        f"  {CLEAN:<12} {metrics['accuracy']:>8.2%}  of them right",
    ]
    if metrics["relative_accuracy"] is not None:
        for kind, share in (metrics["kinds"] | {"mean": metrics["relative_accuracy"]}).items():
            lines.append(f"  {kind:<12} {share:>8.2%}  of that accuracy left")
    return "\n".join(lines)


def _predict(learn: Learner, images: pd.DataFrame, change: Callable | None) -> np.ndarray:
    """The predicted class of each image."""
    usual = learn.dls.valid.pixels
    pixels = Pixels(usual.size, usual.crop, usual.threads, change=change)
    logits, _, _ = predict_with_features(learn, learn.dls.test_dl(images, pixels=pixels))
    return np.array(learn.dls.vocab)[logits.argmax(axis=1)]


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
    """Turned and enlarged about the white cell, which a person would keep in view.

    About the middle of the frame one cell in ten would leave it, and be missed for that.
    """
    nucleus = find_nucleus(np.asarray(image))
    centre = [nucleus.x, nucleus.y] if nucleus else None
    fill = _background(image)
    if factor < 1:  # what is too fine for the smaller picture
        sigma = (1 / factor - 1) / 2
        image = Image.fromarray(cv2.GaussianBlur(np.asarray(image), (0, 0), sigma))
    return tv.affine(image, degrees, [0, 0], factor, [0, 0], SMOOTH, fill, centre)


def _background(image: Image.Image) -> list[float]:
    """The colour of the empty slide, 0 to 255, which also fills what a picture does not cover:
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
