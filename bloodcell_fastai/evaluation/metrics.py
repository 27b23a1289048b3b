"""Metrics of predictions for labelled images, with intervals that count photographs."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.metrics import (
    classification_report,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)

from ..data.splits import count_known, photo_groups
from ..model.calibration import calibration_error, probability_error, softmax

Z95 = norm.ppf(0.975)  # the middle 95 % of a normal distribution
NEXT_TO = 1e-9  # so far from an area of 0 or 1, which would be a root of its own
CONFIDENCES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(eq=False)
class Evaluation:
    """Predictions for labelled images and the metrics computed from them.

    Attributes:
        predictions: one row per image, see :func:`labelled_predictions`.
        classes: in the order of the model's outputs.
        leakage: fraction of the images whose photograph was trained on, 0 to 1; None if unknown.
        temperature: what the logits were divided by to give the probabilities; None where the
            predictions are of several models.
    """

    predictions: pd.DataFrame
    classes: tuple[str, ...]
    leakage: float | None = None
    temperature: float | None = 1.0

    @property
    def probabilities(self) -> np.ndarray:
        """float64 (images, classes), rows sum to 1."""
        return self.predictions[[f"p_{name}" for name in self.classes]].to_numpy(float)

    @property
    def labels(self) -> np.ndarray:
        """The true classes, int64 (images,), as indices into ``classes``."""
        return pd.Index(self.classes).get_indexer(self.predictions.label)

    @cached_property
    def confusion_matrix(self) -> np.ndarray:
        """Images per true class (rows) and predicted one (columns), int64 (classes, classes)."""
        table = self.predictions
        return confusion_matrix(table.label, table.predicted, labels=self.classes)

    @cached_property
    def metrics(self) -> dict:
        """What ``metrics.json`` holds: plain numbers, None where one is not defined."""
        return compute_metrics(self)

    def classification_report(self) -> str:
        """Precision, recall and F1 of the classes that occur, as scikit-learn prints them."""
        table = self.predictions
        occurring = [name for name in self.classes if (table.label == name).any()]
        return classification_report(
            table.label, table.predicted, labels=occurring, digits=4, zero_division=0
        )

    def top_losses(self, k: int = 9, one_per_photo: bool = False) -> pd.DataFrame:
        """The ``k`` images with the highest loss, highest first; at will one of a photograph."""
        worst = self.predictions.sort_values("loss", ascending=False)
        if one_per_photo:
            worst = worst[~photo_groups(worst).duplicated()]
        return worst.head(k)


def labelled_predictions(table: pd.DataFrame, predicted: pd.DataFrame) -> pd.DataFrame:
    """Predictions beside the labels of the images.

    Args:
        table: image table.
        predicted: the prediction table of the same images, in the same order, as
            :class:`~bloodcell_fastai.Predictor` makes it.

    Returns:
        ``path``, ``label``, ``predicted``, ``confidence`` (the probability of the predicted
        class), ``loss`` (cross-entropy, natural logarithm; NaN where the label is none of the
        classes), ``photo``, ``flag``, ``p_<CLASS>`` for each class and, where the model has a
        reference, ``distance`` and ``nearest``.
    """
    probabilities = predicted.filter(regex="^p_")
    true = probabilities.columns.get_indexer("p_" + table.label)
    # float32 can round a probability to 0, whose loss would be infinite.
    of_true = probabilities.to_numpy(float)[np.arange(len(table)), true]
    of_true = np.maximum(of_true, np.finfo(np.float32).tiny)
    of_true[true < 0] = np.nan
    result = predicted.copy()
    result.insert(1, "label", table.label.to_numpy())
    result.insert(4, "loss", -np.log(of_true))
    result.insert(5, "photo", table.photo.to_numpy())
    return result


def compute_metrics(evaluation: Evaluation) -> dict:
    """Every figure of the report from the predictions; see :attr:`Evaluation.metrics`."""
    table, classes = evaluation.predictions, evaluation.classes
    correct = (table.label == table.predicted).to_numpy()
    photos = by_photo(evaluation)
    photo_correct = (photos.label == photos.predicted).to_numpy()
    per_class, raw = class_metrics(evaluation), uncalibrated(evaluation)
    return {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": proportion_ci(correct, photo_groups(table)),
        "balanced_accuracy": _mean([row["recall"] for row in per_class.values()]),
        "macro_f1": _mean([row["f1"] for row in per_class.values()]),
        "photo_accuracy": float(photo_correct.mean()),
        "photo_accuracy_ci95": proportion_ci(photo_correct, photos.photo),
        "n_images": len(table),
        "n_photos": len(photos),
        "n_known": count_known(table),
        "leakage": evaluation.leakage,
        "loss": float(table.loss.mean()),
        "temperature": evaluation.temperature,
        "ece": calibration_error(table.confidence.to_numpy(), correct),
        "ece_uncalibrated": (None if raw is None else probability_error(raw, evaluation.labels)),
        "brier": brier_score(evaluation),
        "classes": list(classes),
        "confusion_matrix": evaluation.confusion_matrix.tolist(),
        "per_class": per_class,
        "coverage": coverage(evaluation),
    }


def by_photo(evaluation: Evaluation) -> pd.DataFrame:
    """One row per photograph: ``photo``, ``label``, ``predicted`` from the mean probabilities of
    its copies. A photograph under two labels makes two rows, and counts twice in ``n_photos``."""
    columns = [f"p_{name}" for name in evaluation.classes]
    table = evaluation.predictions
    table = table.assign(photo=photo_groups(table))
    grouped = table.groupby(["photo", "label"])[columns].mean()
    predicted = np.array(evaluation.classes)[grouped.to_numpy().argmax(axis=1)]
    return grouped.reset_index()[["photo", "label"]].assign(predicted=predicted)


def class_metrics(evaluation: Evaluation) -> dict[str, dict]:
    """precision, recall, f1, support, specificity and auroc (one against the rest) per class.

    ``support`` counts images and ``photos`` photographs; the scores have their 95 % interval
    beside them, as ``recall_ci95``.
    """
    table, classes = evaluation.predictions, evaluation.classes
    photos = photo_groups(table)
    scores = precision_recall_fscore_support(
        table.label, table.predicted, labels=classes, zero_division=0
    )
    result = {}
    for index, name in enumerate(classes):
        precision, recall, f1, support = (column[index] for column in scores)
        actual = (table.label == name).to_numpy()
        found = (table.predicted == name).to_numpy()
        either, hit = actual | found, actual & found
        auroc, auroc_bounds = auroc_ci(table[f"p_{name}"].to_numpy(), actual, photos)
        result[name] = {
            "precision": float(precision),
            "precision_ci95": proportion_ci(actual[found], photos[found]),
            "recall": float(recall) if support else None,
            "recall_ci95": proportion_ci(found[actual], photos[actual]),
            "f1": float(f1) if support else None,
            "f1_ci95": _f1_ci(hit[either], photos[either]) if support else None,
            "support": int(support),
            "photos": int(photos[actual].nunique()),
            "specificity": None if actual.all() else float(1 - found[~actual].mean()),
            "specificity_ci95": proportion_ci(~found[~actual], photos[~actual]),
            "auroc": auroc,
            "auroc_ci95": auroc_bounds,
        }
    return result


def coverage(evaluation: Evaluation) -> list[dict]:
    """Accuracy and coverage at thresholds of confidence (selective prediction, El-Yaniv and Wiener
    2010).

    Returns:
        For each ``min_confidence``: ``coverage``, the fraction of the images that reach it,
        ``n_images`` of them, and their ``accuracy`` with ``accuracy_ci95``, None without images.
    """
    table = evaluation.predictions
    rows: list[dict] = []
    for threshold in CONFIDENCES:
        kept = table[table.confidence >= threshold]
        correct = (kept.label == kept.predicted).to_numpy()
        rows.append(
            {
                "min_confidence": threshold,
                "coverage": len(kept) / len(table),
                "n_images": len(kept),
                "accuracy": float(correct.mean()) if len(kept) else None,
                "accuracy_ci95": proportion_ci(correct, photo_groups(kept)),
            }
        )
    return rows


def proportion_ci(correct: np.ndarray, photos: pd.Series) -> list[float] | None:
    """95 % interval of a proportion of images, such as the accuracy.

    Wilson's score interval (1927) for as many independent photographs as the images are worth:
    copies of one photograph are right and wrong together, so that n images count as n^2 / sum of
    m^2, m the copies of each photograph (the effective sample size of Kish 1965 for a correlation
    of 1). It has a width also where all images are right, and covers the true value in 95 % of
    data sets near 100 % too, where intervals from resampled photographs cover far less.

    Args:
        correct: bool (images,).
        photos: id of each image's photograph.

    Returns:
        Lower and upper bound, 0 to 1; None without images.

    Examples:
        >>> import numpy as np, pandas as pd
        >>> from bloodcell_fastai.evaluation.metrics import proportion_ci
        >>> low, high = proportion_ci(np.ones(61, bool), pd.Series(range(61)))
        >>> f"{low:.3f} to {high:.3f}"
        '0.941 to 1.000'
    """
    if not len(correct):
        return None
    rate, n = float(correct.mean()), effective_photos(photos)
    middle = rate + Z95**2 / (2 * n)
    half = Z95 * np.sqrt(rate * (1 - rate) / n + (Z95 / (2 * n)) ** 2)
    low, high = (middle + np.array([-half, half])) / (1 + Z95**2 / n)
    # Rounding may leave the rate just outside of its interval, or a bound outside of 0 to 1.
    return [float(np.clip(low, 0, rate)), float(np.clip(high, rate, 1))]


def effective_photos(photos: pd.Series) -> float:
    """How many independent photographs some images are worth; see :func:`proportion_ci`."""
    copies = photos.value_counts().to_numpy(float)
    return float(copies.sum() ** 2 / (copies**2).sum())


def auroc_ci(
    score: np.ndarray, is_class: np.ndarray, photos: pd.Series
) -> tuple[float | None, list[float] | None]:
    """The area under the ROC curve of a score and its 95 % interval.

    The interval is the set of areas that the one found is at most 1.96 standard errors away from,
    with the variance of Hanley and McNeil (1982) in the form of Newcombe (2006, method 5), which
    has a width also where the area is 1. Copies count as in :func:`proportion_ci`.

    Args:
        score: float (images,), higher where the class is likelier.
        is_class: bool (images,).
        photos: id of each image's photograph.

    Returns:
        The area and its lower and upper bound, 0 to 1; None where all images are of the class, or
        none is.
    """
    if is_class.all() or not is_class.any():
        return None, None
    area = float(roc_auc_score(is_class, score))
    positives, negatives = (effective_photos(photos[rows]) for rows in (is_class, ~is_class))

    def excess(true: float) -> float:
        spread = (positives + negatives) / 2 - 1
        variance = true * (1 - true) * (1 + spread * ((1 - true) / (2 - true) + true / (1 + true)))
        return (area - true) ** 2 - Z95**2 * variance / (positives * negatives)

    low = brentq(excess, 0, area - NEXT_TO) if area > NEXT_TO else 0
    high = brentq(excess, area + NEXT_TO, 1) if area < 1 - NEXT_TO else 1
    return area, [float(low), float(high)]


def _f1_ci(hit: np.ndarray, photos: pd.Series) -> list[float] | None:
    """95 % interval of F1 = 2 F* / (1 + F*), where F* is the proportion of true positives among the
    images that are of the class or predicted to be (Hand et al. 2021)."""
    bounds = proportion_ci(hit, photos)
    return bounds and [2 * bound / (1 + bound) for bound in bounds]


def uncalibrated(evaluation: Evaluation) -> np.ndarray | None:
    """The probabilities without the temperature, float64 (images, classes); None if there is no
    single one. The softmax of their logarithms times the temperature gives them back.
    """
    if evaluation.temperature is None:
        return None
    logits = np.log(np.maximum(evaluation.probabilities, np.finfo(float).tiny))
    return softmax(logits * evaluation.temperature)


def brier_score(evaluation: Evaluation) -> float:
    """Mean over the images of the squared distance of the probabilities from the truth, summed
    over the classes: 0 is perfect, 2 the worst (Brier 1950)."""
    truth = np.eye(len(evaluation.classes))[evaluation.labels]
    return float(((evaluation.probabilities - truth) ** 2).sum(axis=1).mean())


def _mean(values: list[float | None]) -> float:
    """Mean over the classes that have images."""
    return float(np.mean([value for value in values if value is not None]))
