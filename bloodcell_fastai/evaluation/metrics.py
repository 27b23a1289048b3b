"""Metrics of predictions for labelled images, with intervals that count photographs."""

from functools import cached_property

import numpy as np
import pandas as pd
from sklearn.metrics import (
    classification_report,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)

from ..data.splits import count_known, photo_groups
from ..model.calibration import calibration_error, probability_error, softmax

BOOTSTRAP_SAMPLES = 2000
CONFIDENCES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Evaluation:
    """Predictions for labelled images and the metrics computed from them.

    Attributes:
        predictions: one row per image, see :func:`labelled_predictions`.
        classes: in the order of the model's outputs.
        leakage: fraction of the images whose photograph was trained on, 0 to 1; None if unknown.
        temperature: what the logits were divided by to give the probabilities; None where the
            predictions are of several models.
    """

    def __init__(
        self,
        predictions: pd.DataFrame,
        classes: tuple[str, ...],
        leakage: float | None = None,
        temperature: float | None = 1.0,
    ):
        self.predictions, self.classes, self.leakage = predictions, tuple(classes), leakage
        self.temperature = temperature

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
    groups, photos = photo_groups(table), by_photo(evaluation)
    photo_correct = (photos.label == photos.predicted).to_numpy()
    per_class, raw = class_metrics(evaluation), uncalibrated(evaluation)
    return {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": bootstrap_ci(correct, groups),
        "balanced_accuracy": _mean([row["recall"] for row in per_class.values()]),
        "macro_f1": _mean([row["f1"] for row in per_class.values()]),
        "photo_accuracy": float(photo_correct.mean()),
        "photo_accuracy_ci95": bootstrap_ci(photo_correct, photos.photo),
        "n_images": len(table),
        "n_photos": int(groups.nunique()),
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
    its copies. A photograph under two labels makes two rows."""
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
    photos = photo_groups(table).groupby(table.label).nunique()
    intervals, matrix = class_intervals(evaluation), evaluation.confusion_matrix
    scores = precision_recall_fscore_support(
        table.label, table.predicted, labels=classes, zero_division=0
    )
    result = {}
    for index, name in enumerate(classes):
        precision, recall, f1, support = (column[index] for column in scores)
        negatives = matrix.sum() - matrix[index].sum()
        false_positives = matrix[:, index].sum() - matrix[index, index]
        result[name] = {
            "precision": float(precision),
            "recall": float(recall) if support else None,
            "f1": float(f1) if support else None,
            "support": int(support),
            "photos": int(photos.get(name, 0)),
            "specificity": float(1 - false_positives / negatives) if negatives else None,
            "auroc": _auroc(table[f"p_{name}"], table.label == name),
        } | intervals[name]
    return result


def class_intervals(evaluation: Evaluation) -> dict[str, dict]:
    """95 % intervals of the scores of each class, from resampled photographs.

    As :func:`bootstrap_ci`. A resample in which a score is not defined, such as the recall of a
    class without images, is left out of that score; None if there is no other.
    """
    table, classes = evaluation.predictions, evaluation.classes
    photos = photo_groups(table).factorize()[0]
    drawn = resample_photos(photos.max() + 1)
    true, predicted = evaluation.labels, pd.Index(classes).get_indexer(table.predicted)
    per_photo = np.zeros((drawn.shape[1], len(classes), len(classes)))
    np.add.at(per_photo, (photos, true, predicted), 1)
    matrices = np.tensordot(drawn, per_photo, 1)  # (resamples, true classes, predicted classes)
    hits = np.einsum("rcc->rc", matrices)
    actual, n_predicted = matrices.sum(2), matrices.sum(1)
    others = actual.sum(1, keepdims=True) - actual
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: not defined
        scores = {
            "precision": hits / n_predicted,
            "recall": hits / actual,
            "f1": np.where(actual > 0, 2 * hits / (n_predicted + actual), np.nan),
            "specificity": 1 - (n_predicted - hits) / others,
            "auroc": np.column_stack(
                [
                    _resampled_auroc(table[f"p_{name}"].to_numpy(), true == index, photos, drawn)
                    for index, name in enumerate(classes)
                ]
            ),
        }
    return {
        name: {f"{score}_ci95": _interval(values[:, index]) for score, values in scores.items()}
        for index, name in enumerate(classes)
    }


def _resampled_auroc(
    score: np.ndarray, is_class: np.ndarray, photos: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """The area under the ROC curve in each resample, float64 (resamples,).

    It is the fraction of pairs of a positive and a negative in which the positive has the higher
    score, ties counting half: a running sum of the negatives in the order of their scores.
    """
    order = np.argsort(score[~is_class])
    negatives, positives = score[~is_class][order], score[is_class]
    below = np.searchsorted(negatives, positives, "left")
    not_above = np.searchsorted(negatives, positives, "right")
    areas = []
    for counts in np.array_split(drawn, 16):  # all at once would take gigabytes
        weights = counts[:, photos[is_class]]
        sums = np.pad(counts[:, photos[~is_class][order]].cumsum(axis=1), ((0, 0), (1, 0)))
        won = (weights * (sums[:, below] + sums[:, not_above])).sum(axis=1) / 2
        areas.append(won / (weights.sum(axis=1) * sums[:, -1]))
    return np.concatenate(areas)


def coverage(evaluation: Evaluation) -> list[dict]:
    """Accuracy and coverage at thresholds of confidence (selective prediction, El-Yaniv and Wiener
    2010).

    Returns:
        For each ``min_confidence``: ``coverage``, the fraction of the images that reach it,
        ``n_images`` of them, and their ``accuracy`` with ``accuracy_ci95``, None without images.
    """
    table = evaluation.predictions
    rows = []
    for threshold in CONFIDENCES:
        kept = table[table.confidence >= threshold]
        correct = (kept.label == kept.predicted).to_numpy()
        row: dict = {"min_confidence": threshold, "coverage": len(kept) / len(table)}
        row |= {"n_images": len(kept), "accuracy": None, "accuracy_ci95": None}
        if len(kept):
            row["accuracy"] = float(correct.mean())
            row["accuracy_ci95"] = bootstrap_ci(correct, photo_groups(kept))
        rows.append(row)
    return rows


def bootstrap_ci(correct: np.ndarray, photos: pd.Series, seed: int = 0) -> list[float]:
    """95 % percentile interval of an accuracy, resampling photographs with all their images.

    Images of one photograph succeed and fail together; resampling files would give an interval far
    too narrow (the cluster bootstrap, Davison and Hinkley 1997, section 3.8).

    Args:
        correct: bool (images,).
        photos: id of each image's photograph.
        seed: of the resampling.

    Returns:
        Lower and upper bound, 0 to 1.
    """
    totals = pd.DataFrame({"right": correct, "photo": photos.to_numpy()}).groupby("photo").right
    right, count = totals.sum().to_numpy(), totals.count().to_numpy()
    drawn = resample_photos(len(right), seed)
    return _middle((drawn @ right) / (drawn @ count))


def auroc_ci(
    score: np.ndarray, is_class: np.ndarray, photos: pd.Series
) -> tuple[float | None, list[float] | None]:
    """The area under the ROC curve of a score, higher where the class is likelier, and its 95 %
    interval, as :func:`bootstrap_ci`. None where all images are of the class, or none is."""
    numbers = photos.factorize()[0]
    drawn = resample_photos(numbers.max() + 1)
    with np.errstate(invalid="ignore"):  # of a resample that lacks one side
        areas = _resampled_auroc(score, is_class, numbers, drawn)
    return _auroc(score, is_class), _interval(areas)


def _auroc(score: np.ndarray, is_class: np.ndarray) -> float | None:
    one_sided = is_class.all() or not is_class.any()
    return None if one_sided else float(roc_auc_score(is_class, score))


def resample_photos(n_photos: int, seed: int = 0) -> np.ndarray:
    """How often each photograph is drawn, which is all that counts: int64 (resamples, photos)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_photos, np.full(n_photos, 1 / n_photos), BOOTSTRAP_SAMPLES)


def _interval(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of resampled values without the NaN among them; None if all are."""
    defined = values[~np.isnan(values)]
    return _middle(defined) if len(defined) else None


def _middle(values: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]


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
