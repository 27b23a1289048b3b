"""One pass over the validation images, and every figure that follows from it."""

from functools import cached_property

import numpy as np
import pandas as pd
from fastai.vision.all import Learner
from sklearn.metrics import (
    classification_report,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)

from ..training.calibration import (
    calibration_error,
    predict_with_features,
    probability_error,
    softmax,
)

BOOTSTRAP_SAMPLES = 2000
CONFIDENCES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Evaluation:
    """Predictions for labelled images and the metrics computed from them.

    Attributes:
        predictions: one row per image: ``path``, ``label``, ``predicted``, ``confidence`` (the
            probability of the predicted class), ``loss`` (cross-entropy, natural logarithm),
            ``photo`` and ``p_<CLASS>`` for each class. Where the run has a reference,
            ``distance`` to the training images and ``nearest``, the path of the nearest one.
        classes: in the order of the model's outputs.
        leakage: share of the images whose photograph was trained on, 0 to 1; None if unknown.
        temperature: what the logits were divided by to give the probabilities; None where the
            predictions are of several models.
        features: the penultimate features, float32 (images, d); None where they were not kept.
    """

    def __init__(
        self,
        predictions: pd.DataFrame,
        classes: tuple[str, ...],
        leakage: float | None = None,
        temperature: float | None = 1.0,
        features: np.ndarray | None = None,
    ):
        self.predictions, self.classes, self.leakage = predictions, tuple(classes), leakage
        self.temperature, self.features = temperature, features

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
        return (worst.drop_duplicates("photo") if one_per_photo else worst).head(k)


def evaluate(learn: Learner, temperature: float = 1.0) -> Evaluation:
    """Predict the validation part of ``learn.dls`` once.

    The items must be an image table, as :func:`~bloodcell_fastai.blood_dls` makes them.

    Args:
        learn: a trained learner.
        temperature: of the model's calibration; 1 leaves the probabilities as they are.
    """
    table = learn.dls.valid_ds.items.reset_index(drop=True)
    logits, features, _ = predict_with_features(learn, learn.dls.valid)
    trained_on = set(learn.dls.train_ds.items.photo)
    known = (table.photo != table.path).any()
    return Evaluation(
        prediction_table(table, softmax(logits, temperature), tuple(learn.dls.vocab)),
        tuple(learn.dls.vocab),
        float(table.photo.isin(trained_on).mean()) if known else None,
        temperature,
        features.numpy(),
    )


def prediction_table(
    table: pd.DataFrame, probabilities: np.ndarray, classes: tuple[str, ...]
) -> pd.DataFrame:
    """The table of :class:`Evaluation` from an image table and its (images, classes) array.

    The loss of an image whose label is none of the classes is NaN.
    """
    best = probabilities.argmax(axis=1)
    true = pd.Index(classes).get_indexer(table.label)
    rows = np.arange(len(table))
    # float32 can round a probability to 0, whose loss would be infinite.
    of_true = np.maximum(probabilities[rows, true], np.finfo(np.float32).tiny)
    of_true[true < 0] = np.nan
    columns = {
        "path": table.path,
        "label": table.label,
        "predicted": np.array(classes)[best],
        "confidence": probabilities[rows, best],
        "loss": -np.log(of_true),
        "photo": table.photo,
    }
    columns |= {f"p_{name}": probabilities[:, index] for index, name in enumerate(classes)}
    return pd.DataFrame(columns)


def compute_metrics(evaluation: Evaluation) -> dict:
    """Every figure of the report from the predictions; see :attr:`Evaluation.metrics`."""
    table, classes = evaluation.predictions, evaluation.classes
    correct = (table.label == table.predicted).to_numpy()
    photos = by_photo(evaluation)
    photo_correct = (photos.label == photos.predicted).to_numpy()
    per_class = class_metrics(evaluation)
    return {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": bootstrap_ci(correct, table.photo),
        "balanced_accuracy": _mean([row["recall"] for row in per_class.values()]),
        "macro_f1": _mean([row["f1"] for row in per_class.values()]),
        "photo_accuracy": float(photo_correct.mean()),
        "photo_accuracy_ci95": bootstrap_ci(photo_correct, photos.photo),
        "n_images": len(table),
        "n_photos": int(table.photo.nunique()),
        "photos_known": bool((table.photo != table.path).any()),
        "leakage": evaluation.leakage,
        "loss": float(table.loss.mean()),
        "temperature": evaluation.temperature,
        "ece": calibration_error(table.confidence.to_numpy(), correct),
        "ece_uncalibrated": uncalibrated_error(evaluation),
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
    grouped = evaluation.predictions.groupby(["photo", "label"])[columns].mean()
    predicted = np.array(evaluation.classes)[grouped.to_numpy().argmax(axis=1)]
    return grouped.reset_index()[["photo", "label"]].assign(predicted=predicted)


def class_metrics(evaluation: Evaluation) -> dict[str, dict]:
    """precision, recall, f1, support, specificity and auroc (one against the rest) per class.

    ``support`` counts images and ``photos`` photographs; the scores have their 95 % interval
    beside them, as ``recall_ci95``.
    """
    table, classes = evaluation.predictions, evaluation.classes
    photos, intervals = table.groupby("label").photo.nunique(), class_intervals(evaluation)
    matrix = evaluation.confusion_matrix
    scores = precision_recall_fscore_support(
        table.label, table.predicted, labels=classes, zero_division=0
    )
    result = {}
    for index, name in enumerate(classes):
        precision, recall, f1, support = (column[index] for column in scores)
        negatives = matrix.sum() - matrix[index].sum()
        false_positives = matrix[:, index].sum() - matrix[index, index]
        is_class = (table.label == name).to_numpy()
        result[name] = {
            "precision": float(precision),
            "recall": float(recall) if support else None,
            "f1": float(f1) if support else None,
            "support": int(support),
            "photos": int(photos.get(name, 0)),
            "specificity": float(1 - false_positives / negatives) if negatives else None,
            "auroc": (
                float(roc_auc_score(is_class, table[f"p_{name}"]))
                if 0 < is_class.sum() < len(table)
                else None
            ),
        } | intervals[name]
    return result


def class_intervals(evaluation: Evaluation) -> dict[str, dict]:
    """95 % intervals of the scores of each class, from resampled photographs.

    As :func:`bootstrap_ci`. A resample in which a score is not defined, such as the recall of a
    class without images, is left out of that score; None if there is no other.
    """
    table, classes = evaluation.predictions, evaluation.classes
    photos = table.photo.factorize()[0]
    drawn = resample_photos(photos.max() + 1)
    true, predicted = evaluation.labels, pd.Index(classes).get_indexer(table.predicted)
    per_photo = np.zeros((drawn.shape[1], len(classes), len(classes)))
    np.add.at(per_photo, (photos, true, predicted), 1)
    matrices = np.tensordot(drawn, per_photo, 1)  # (resamples, true classes, predicted classes)
    hits = np.einsum("rcc->rc", matrices)
    actual, said = matrices.sum(2), matrices.sum(1)
    others = actual.sum(1, keepdims=True) - actual
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: not defined
        scores = {
            "precision": hits / said,
            "recall": hits / actual,
            "f1": np.where(actual > 0, 2 * hits / (said + actual), np.nan),
            "specificity": 1 - (said - hits) / others,
            "auroc": np.stack(
                [
                    _resampled_auroc(table[f"p_{name}"].to_numpy(), true == index, photos, drawn)
                    for index, name in enumerate(classes)
                ],
                axis=1,
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

    It is the share of pairs of a positive and a negative in which the positive has the higher
    score, ties counting half. How many negatives are below a positive changes from resample to
    resample only by how often each negative counts: one running sum in the order of the scores.
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
    """What answering only from a confidence on buys, and what it costs (selective prediction,
    El-Yaniv and Wiener 2010).

    Returns:
        For each ``min_confidence``: ``coverage``, the share of the images that reach it,
        ``n_images`` of them, and their ``accuracy`` with ``accuracy_ci95``, None without images.
    """
    table = evaluation.predictions
    rows = []
    for threshold in CONFIDENCES:
        kept = table[table.confidence >= threshold]
        correct = (kept.label == kept.predicted).to_numpy()
        rows.append(
            {
                "min_confidence": threshold,
                "coverage": len(kept) / len(table),
                "n_images": len(kept),
                "accuracy": float(correct.mean()) if len(kept) else None,
                "accuracy_ci95": bootstrap_ci(correct, kept.photo) if len(kept) else None,
            }
        )
    return rows


def bootstrap_ci(correct: np.ndarray, photos: pd.Series, seed: int = 0) -> list[float]:
    """95 % percentile interval of an accuracy, resampling photographs with all their images.

    Images of one photograph succeed and fail together; resampling files would take them for
    independent and give an interval far too narrow (the cluster bootstrap, Davison and Hinkley
    1997, section 3.8).

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
    """The area under the ROC curve and its 95 % interval, as :func:`bootstrap_ci`.

    Args:
        score: float (images,), higher where the class is likelier.
        is_class: bool (images,).
        photos: id of each image's photograph.

    Returns:
        Both 0 to 1; None where all images are of the class, or none is.
    """
    if is_class.all() or not is_class.any():
        return None, None
    numbers = photos.factorize()[0]
    drawn = resample_photos(numbers.max() + 1)
    with np.errstate(invalid="ignore"):  # of a resample that lacks one side
        areas = _resampled_auroc(score, is_class, numbers, drawn)
    return float(roc_auc_score(is_class, score)), _interval(areas)


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


def uncalibrated_error(evaluation: Evaluation) -> float | None:
    """The expected calibration error without the temperature; None if there is no single one."""
    probabilities = uncalibrated(evaluation)
    return None if probabilities is None else probability_error(probabilities, evaluation.labels)


def uncalibrated(evaluation: Evaluation) -> np.ndarray | None:
    """The probabilities without the temperature, float64 (images, classes); None if there is no
    single one.

    Logarithms of probabilities are logits less a number of each image's own, which the softmax
    does not see: multiplied by the temperature they give the model's own probabilities back.
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
