"""Temperature scaling, and a reference to recognise images unlike the training images."""

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import minimize_scalar
from torch.nn.functional import normalize

from ..data.splits import photo_groups
from ..errors import DataError

CALIBRATION_BINS = 15
TEMPERATURES = (0.05, 20.0)
REFERENCE_IMAGES = 2000
IN_DISTRIBUTION = 0.95  # of the validation photographs are within the distance threshold
_MAX_NEIGHBOURS = 10
_IMAGES_PER_NEIGHBOUR = 50
_CHUNK = 4096  # images whose distances to the whole reference are in memory at a time


class Calibration(BaseModel):
    """What :func:`~bloodcell_fastai.calibrate` found on the validation images of a run.

    Attributes:
        temperature: what the logits are divided by before the softmax; above 1 the model was
            overconfident.
        distance_threshold: an image further than this from the reference is unlike training.
        neighbours: which nearest reference image the distance is to, 1 for the nearest.
        ece_before: expected calibration error without the temperature, 0 to 1.
        ece_after: the same with it, on the images it was fitted on.
        n_images: validation images.
        weights: hash of the weights it was found for, ``Run.weights_hash``; empty before
            ``Run.save_calibration`` sets it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    temperature: float = Field(ge=1e-6, le=1e6)
    distance_threshold: float = Field(ge=0, le=2)  # unit vectors are at most 2 apart
    neighbours: int = Field(ge=1)
    ece_before: float = Field(ge=0, le=1)
    ece_after: float = Field(ge=0, le=1)
    n_images: int = Field(ge=1)
    weights: str = ""

    def __str__(self) -> str:
        return (
            f"Calibrated: temperature {self.temperature:.2f}, "
            f"ECE {100 * self.ece_before:.1f} % -> {100 * self.ece_after:.1f} %"
        )


class Reference:
    """Training images as the model sees them, to measure how unlike them another image is.

    Attributes:
        features: float16 (m, d), the penultimate features, each of length 1.
        table: their ``path``, ``label`` and ``photo``, in the same order.
        neighbours: the k of the distance.
    """

    def __init__(self, features: torch.Tensor, table: pd.DataFrame, neighbours: int):
        self.features, self.table, self.neighbours = features, table, neighbours

    def nearest(self, features: torch.Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far images are from the training images, and which one is nearest to each.

        The distance is that to the k-th nearest, between features scaled to length 1 (Sun et
        al. 2022, "Out-of-distribution detection with deep nearest neighbors").

        Args:
            features: float (n, d), as :meth:`Predictor.forward` gives them.

        Returns:
            Distances, float32 (n,) from 0 to 2, and rows of ``table``, int64 (n,).

        Raises:
            BloodcellError: the reference is of another model.
        """
        known = self.features.float().T
        if len(features) and features.shape[1] != len(known):
            raise DataError(
                f"reference.safetensors has {len(known)} features an image, the model "
                f"{features.shape[1]}.",
                "Remove calibration.json of the run and calibrate anew: bloodcell interpret RUN",
            )
        distances, rows = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        for chunk in torch.as_tensor(features).split(_CHUNK):
            likeness = normalize(chunk.float()) @ known  # cosines: |a - b|^2 = 2 - 2 a.b
            cosines, order = likeness.topk(self.neighbours)
            distances.append((2 - 2 * cosines[:, -1]).clamp(min=0).sqrt().numpy())
            rows.append(order[:, 0].numpy())
        return np.concatenate(distances), np.concatenate(rows)

    def photographs(self, features: torch.Tensor | np.ndarray, n: int = 3) -> list[pd.DataFrame]:
        """The training photographs most like each of a few images, nearest first.

        Args:
            features: float (images, d), as :meth:`Predictor.forward` gives them.
            n: how many photographs at most.

        Returns:
            For each image rows of ``table``, the nearest copy of each photograph, with its
            ``distance``, 0 to 2.
        """
        likeness = normalize(torch.as_tensor(features).float()) @ self.features.float().T
        distances = (2 - 2 * likeness).clamp(min=0).sqrt().numpy()
        ranked = (self.table.assign(distance=row).sort_values("distance") for row in distances)
        return [rows.loc[~photo_groups(rows).duplicated()].head(n) for rows in ranked]


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities, float64 (n, classes), of logits divided by a temperature."""
    return torch.from_numpy(logits / temperature).softmax(dim=1).numpy()


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """The temperature with the least cross-entropy (Guo et al. 2017), 0.05 to 20.

    Where every image is right, there is no minimum: a lower temperature is always better. As in
    Platt's scaling (1999), a prior keeps it finite: one more image of each class beside
    the n, so that the target is (n + 1) / (n + classes) for the label and 1 / (n + classes) for
    the others. It matters for few images or few errors and vanishes for many.

    Args:
        logits: float (images, classes).
        labels: int (images,), the true classes.
        weights: float (images,), how much each image counts, n in all, such as
            :func:`photo_weights`; 1 each if None.
    """
    weights = np.ones(len(logits)) if weights is None else weights
    n, classes = weights.sum(), logits.shape[1]
    values = torch.from_numpy(logits).double()
    targets = torch.full_like(values, 1 / (n + classes))
    targets[torch.arange(len(labels)), torch.as_tensor(labels)] += n / (n + classes)

    def cross_entropy(log_temperature: float) -> float:
        scaled = values / np.exp(log_temperature)
        losses = -(targets * scaled.log_softmax(dim=1)).sum(dim=1)
        return float(np.average(losses, weights=weights))

    found = minimize_scalar(cross_entropy, bounds=np.log(TEMPERATURES), method="bounded")
    return float(np.exp(found.x))


def photo_weights(table: pd.DataFrame) -> np.ndarray:
    """How much each image counts if every photograph counts as 1, float64 (images,): copies are
    right and wrong together, and 155 of one unusual cell would decide everything."""
    photos = photo_groups(table)
    return 1 / photos.map(photos.value_counts()).to_numpy(float)


def weighted_quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    """numpy's quantile of ``values``, float (n,), of which each counts ``weights``, float (n,)."""
    order = np.argsort(values)
    ranked, weights = values[order], weights[order]
    below = weights.cumsum() - weights  # numpy's own weighted quantile does not interpolate
    return float(np.interp(q * below[-1], below, ranked))


def reference_table(table: pd.DataFrame, n: int = REFERENCE_IMAGES, seed: int = 42) -> pd.DataFrame:
    """``path``, ``label`` and ``photo`` of up to ``n`` images, spread as evenly as can be.

    Every class gives as many images as the others, while it has some, and within a class every
    photograph as many copies as the others: a photograph with many copies is one piece of
    evidence.
    """
    table = table.reset_index(drop=True)
    shuffled = table[["path", "label", "photo"]].sample(frac=1, random_state=seed)
    copy = shuffled.groupby([shuffled.label, photo_groups(shuffled)]).cumcount()
    by_copy = shuffled.loc[copy.sort_values(kind="stable").index]
    place = by_copy.groupby("label").cumcount()
    return by_copy.loc[place.sort_values(kind="stable").index].head(n).reset_index(drop=True)


def count_neighbours(n: int) -> int:
    """The k for a reference of ``n`` images: one in 50, from 1 to 10.

    Sun et al. 2022 take 10 for a reference of 1 % of ImageNet. It is also more than the copies
    the reference holds of most photographs, so that one odd photograph in training does not
    make everything that resembles it known.
    """
    return max(1, min(_MAX_NEIGHBOURS, n // _IMAGES_PER_NEIGHBOUR))


def probability_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """:func:`calibration_error` of probabilities (n, classes) for true classes (n,)."""
    return calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)


def reliability(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    """Images in 15 equal bins of confidence, the empty ones left out (Guo et al. 2017).

    Args:
        confidence: float (n,), the probability of the predicted class, 0 to 1.
        correct: bool (n,).

    Returns:
        ``confidence`` and ``accuracy``, the means within a bin, 0 to 1, and ``images``; indexed
        by the bin's number, 0 to 14.
    """
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    table = pd.DataFrame({"bin": bins, "confidence": confidence, "correct": correct})
    return table.groupby("bin").agg(
        confidence=("confidence", "mean"), accuracy=("correct", "mean"), images=("correct", "size")
    )


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error, 0 to 1: the mean gap between confidence and accuracy over the
    bins of :func:`reliability`, weighted by their images (Guo et al. 2017)."""
    bins = reliability(confidence, correct)
    gaps = (bins.accuracy - bins.confidence).abs()
    return float((gaps * bins.images).sum() / len(confidence))
