import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, norm
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from bloodcell_fastai.evaluation.metrics import (
    Evaluation,
    auroc_ci,
    by_photo,
    coverage,
    labelled_predictions,
    proportion_ci,
)
from bloodcell_fastai.files import read_table, write_table
from bloodcell_fastai.model.calibration import softmax

CLASSES = ("A", "B", "C")


def predict(table: pd.DataFrame, probabilities, classes=CLASSES) -> pd.DataFrame:
    """The labelled predictions of an image table, as a predictor's would be."""
    probabilities = np.asarray(probabilities)
    predicted = {
        "path": table.path,
        "predicted": np.array(classes)[probabilities.argmax(1)],
        "confidence": probabilities.max(1),
        "flag": "",
    }
    predicted |= {f"p_{name}": probabilities[:, i] for i, name in enumerate(classes)}
    return labelled_predictions(table, pd.DataFrame(predicted))


def make_evaluation(n_photos: int = 40, copies: int = 5, seed: int = 0) -> Evaluation:
    """Random predictions, right a little more often than not, alike within a photograph."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(0, 3, n_photos), copies)
    logits = np.repeat(rng.normal(size=(n_photos, 3)), copies, axis=0)
    logits[np.arange(len(labels)), labels] += 1
    logits += 0.1 * rng.normal(size=logits.shape)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    table = pd.DataFrame(
        {
            "path": [f"/{i}.jpg" for i in range(len(labels))],
            "label": np.array(CLASSES)[labels],
            "photo": np.repeat([f"p{i}" for i in range(n_photos)], copies),
        }
    )
    return Evaluation(predict(table, probabilities), CLASSES, 0.25)


WORDS = ("007", "1", "=1+1", "NA", "None", "True", "accuracy", "all", "label", "nan", "p_all")


def test_classes_called_as_words_of_ours_or_of_a_library(tmp_path):
    """Their metrics are those of any other names, also from the table that is written."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(len(WORDS)), 4)
    probabilities = softmax(rng.normal(size=(len(labels), len(WORDS))))

    def evaluate(classes):
        table = pd.DataFrame({"label": np.array(classes)[labels], "photo": ""})
        table["path"] = [f"/{i}.jpg" for i in range(len(labels))]
        return Evaluation(predict(table, probabilities, classes), classes)

    plain = evaluate(tuple("abcdefghijk"))
    found = evaluate(WORDS)
    write_table(tmp_path / "predictions.csv", found.predictions)
    numbers = ["confidence", "loss", *(f"p_{name}" for name in WORDS)]
    again = Evaluation(read_table(tmp_path / "predictions.csv", ["label"], numbers), WORDS)
    for evaluation in (found, again):
        metrics = json.loads(json.dumps(evaluation.metrics))
        assert metrics["classes"] == list(WORDS) == list(metrics["per_class"])
        assert list(metrics["per_class"].values()) == list(plain.metrics["per_class"].values())
        assert metrics["confusion_matrix"] == plain.metrics["confusion_matrix"]
        assert all(f" {name} " in evaluation.classification_report() for name in WORDS)


def make_perfect() -> Evaluation:
    """All right, ten photographs of each class."""
    label = np.repeat(CLASSES, 10)
    photo = [f"p{i}" for i in range(30)]
    table = pd.DataFrame({"path": photo, "label": label, "photo": photo})
    return Evaluation(predict(table, np.repeat(np.eye(3), 10, axis=0)), CLASSES)


def test_figures_agree_with_scikit_learn_and_with_each_other():
    evaluation = make_evaluation()
    metrics, table = evaluation.metrics, evaluation.predictions
    matrix = np.array(metrics["confusion_matrix"])
    assert matrix.sum() == metrics["n_images"] == 200
    assert metrics["accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
    assert metrics["accuracy"] == pytest.approx(accuracy_score(table.label, table.predicted))
    assert metrics["macro_f1"] == pytest.approx(
        f1_score(table.label, table.predicted, average="macro")
    )
    for index, name in enumerate(CLASSES):
        row = metrics["per_class"][name]
        assert row["support"] == matrix[index].sum()
        assert row["recall"] == pytest.approx(matrix[index, index] / matrix[index].sum())
        others = np.delete(np.arange(3), index)
        negatives = matrix[others]
        assert row["specificity"] == pytest.approx(1 - negatives[:, index].sum() / negatives.sum())
        assert 0.5 < row["auroc"] <= 1
    assert metrics["n_photos"] == 40
    assert metrics["n_known"] == 200
    assert metrics["leakage"] == 0.25
    json.dumps(metrics, allow_nan=False)


def test_predictions_beside_their_labels():
    table = pd.DataFrame({"path": ["/1", "/2", "/3"], "label": ["B", "A", "other"], "photo": "x"})
    made = predict(table, [[0.2, 0.8], [0.4, 0.6], [0.5, 0.5]], ("A", "B"))
    assert made.columns.tolist() == [
        *("path", "label", "predicted", "confidence", "loss", "photo", "flag", "p_A", "p_B")
    ]
    assert made.predicted.tolist() == ["B", "B", "A"]
    assert made.loss[:2].tolist() == pytest.approx([-np.log(0.8), -np.log(0.4)])
    assert np.isnan(made.loss[2])  # of no class of the model


def test_images_without_a_known_photograph_count_one_each():
    """Not as copies of one photograph of no name."""
    table = pd.DataFrame({"path": list("1234"), "label": ["A", "A", "B", "B"]})
    probabilities = [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]]
    for photo, n_known, n_photos in (("", 0, 4), (["x", "x", "", ""], 2, 3), (list("xxyy"), 4, 2)):
        result = Evaluation(
            predict(table.assign(photo=photo), probabilities, ("A", "B")), ("A", "B")
        )
        assert result.metrics["n_known"] == n_known
        assert result.metrics["n_photos"] == len(by_photo(result)) == n_photos
        assert result.metrics["per_class"]["B"]["photos"] == n_photos - (1 if n_known else 2)
        assert len(result.top_losses(9, one_per_photo=True)) == n_photos
    assert result.metrics["photo_accuracy"] == 1 > result.metrics["accuracy"]


def test_the_loss_of_an_impossible_label_is_finite():
    table = pd.DataFrame({"path": ["/1"], "label": ["A"], "photo": ["x"]})
    assert np.isfinite(predict(table, [[0.0, 1.0]], ("A", "B")).loss[0])


def test_a_photograph_is_judged_by_the_mean_of_its_copies():
    table = pd.DataFrame({"path": list("123"), "label": ["A"] * 3, "photo": ["x"] * 3})
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    metrics = Evaluation(predict(table, probabilities, ("A", "B")), ("A", "B")).metrics
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["photo_accuracy"] == 1


def test_classes_without_images_have_no_figures():
    table = pd.DataFrame({"path": ["/1", "/2"], "label": ["A", "B"], "photo": ["x", "y"]})
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    metrics = Evaluation(predict(table, probabilities), CLASSES).metrics
    assert metrics["per_class"]["C"]["recall"] is None
    assert metrics["per_class"]["C"]["auroc"] is None
    assert metrics["macro_f1"] == 1
    json.dumps(metrics, allow_nan=False)


def test_the_interval_counts_photographs():
    """A hundred copies of a photograph are one piece of evidence."""
    rng = np.random.default_rng(0)
    right = rng.random(50) < 0.8
    single = proportion_ci(right, pd.Series(range(50)))
    copied = proportion_ci(np.repeat(right, 100), pd.Series(np.repeat(range(50), 100)))
    assert copied == pytest.approx(single, abs=1e-12)
    as_files = proportion_ci(np.repeat(right, 100), pd.Series(range(5000)))
    assert as_files[1] - as_files[0] < 0.2 * (single[1] - single[0])


@pytest.mark.parametrize("right", [0, 1, 30, 60, 61])
def test_the_interval_of_independent_photographs_is_wilsons(right):
    correct = np.arange(61) < right
    expected = binomtest(right, 61).proportion_ci(method="wilson")
    assert proportion_ci(correct, pd.Series(range(61))) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("right", [False, True])
def test_no_bound_is_outside_of_0_to_1_by_rounding(right):
    for n in range(1, 300):
        low, high = proportion_ci(np.full(n, right), pd.Series(range(n)))
        assert 0 <= low <= right <= high <= 1


def test_the_interval_has_a_width_where_all_are_right():
    photos = pd.Series(np.repeat(range(61), np.arange(1, 62)))  # unequal copies
    low, high = proportion_ci(np.ones(len(photos), bool), photos)
    assert 0.9 < low < 0.95
    assert high == 1
    assert proportion_ci(np.ones(0, bool), pd.Series(dtype=str)) is None
    for row in make_perfect().metrics["per_class"].values():
        for name in ("precision", "recall", "f1", "specificity", "auroc"):
            low, high = row[f"{name}_ci95"]
            assert row[name] == high == 1 > low > 0.3, name


@pytest.mark.parametrize("correlation", [0.05, 0.5, 1])
@pytest.mark.parametrize("truth", [0.8, 0.95, 0.99])
def test_the_interval_covers_the_truth(truth, correlation):
    """Of an accuracy of photographs with copies, one with very many, whatever their correlation."""
    rng = np.random.default_rng(1)
    copies = np.append(rng.geometric(1 / 36, 60), 155)
    photos = pd.Series(np.repeat(range(61), copies))
    covered = 0
    for _ in range(200):
        rates = (rng.random(61) < truth).astype(float)
        if correlation < 1:
            spread = 1 / correlation - 1
            rates = rng.beta(truth * spread, (1 - truth) * spread, 61)
        low, high = proportion_ci(rng.random(len(photos)) < np.repeat(rates, copies), photos)
        covered += low <= truth <= high
    assert covered >= 180  # of 200; 190 on average, less three standard deviations


def test_the_brier_score():
    table = pd.DataFrame({"path": ["/1", "/2"], "label": ["A", "B"], "photo": ["x", "y"]})
    for row, expected in [((1.0, 0.0), 1.0), ((0.5, 0.5), 0.5), ((0.6, 0.4), 0.52)]:
        predictions = predict(table, [row, row], ("A", "B"))
        assert Evaluation(predictions, ("A", "B")).metrics["brier"] == pytest.approx(expected)


def test_the_models_own_calibration_error_is_kept_beside_the_calibrated_one():
    plain = make_evaluation()
    logits = np.log(plain.probabilities)
    logits[:5] *= 60  # as near to 1 as float64 can be
    own = Evaluation(predict(plain.predictions, softmax(logits)), CLASSES)
    cooled = predict(plain.predictions, softmax(logits, 3.0))
    metrics = Evaluation(cooled, CLASSES, temperature=3.0).metrics
    assert metrics["temperature"] == 3.0
    assert metrics["ece_uncalibrated"] == pytest.approx(own.metrics["ece"])
    assert metrics["ece"] > 0.05 + metrics["ece_uncalibrated"]
    pooled = Evaluation(cooled, CLASSES, temperature=None).metrics
    assert pooled["ece_uncalibrated"] is None
    assert pooled["ece"] == metrics["ece"]


def test_top_losses():
    evaluation = make_evaluation()
    worst = evaluation.top_losses(5)
    assert worst.loss.tolist() == sorted(evaluation.predictions.loss, reverse=True)[:5]
    spread = evaluation.top_losses(5, one_per_photo=True)
    assert spread.photo.nunique() == 5
    assert spread.loss.iloc[0] == worst.loss.iloc[0]


def test_class_intervals_are_those_of_the_images_that_a_score_is_of():
    table = (evaluation := make_evaluation()).predictions
    true, found = table.label == "B", table.predicted == "B"
    row = evaluation.metrics["per_class"]["B"]
    for name, hit, of in (
        ("precision", true, found),
        ("recall", found, true),
        ("specificity", ~found, ~true),
    ):
        expected = proportion_ci(hit[of].to_numpy(), table.photo[of])
        assert row[f"{name}_ci95"] == pytest.approx(expected), name
    either = true | found
    low, high = proportion_ci((true & found)[either].to_numpy(), table.photo[either])
    assert row["f1_ci95"] == pytest.approx([2 * low / (1 + low), 2 * high / (1 + high)])


def test_many_images_take_little_time_and_memory():
    """Not, as once, a table of resamples by photographs: gigabytes for 100,000."""
    evaluation = make_evaluation(n_photos=50_000, copies=1)
    tracemalloc.start()
    assert evaluation.metrics["n_images"] == 50_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


def test_a_photograph_under_two_labels_counts_once_for_each():
    table = pd.DataFrame({"path": list("123"), "label": list("AAB"), "photo": list("xyy")})
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    evaluation = Evaluation(predict(table, probabilities, ("A", "B")), ("A", "B"))
    metrics = evaluation.metrics
    assert metrics["n_photos"] == len(by_photo(evaluation)) == 3
    assert metrics["photo_accuracy"] == pytest.approx(2 / 3)
    assert sum(row["photos"] for row in metrics["per_class"].values()) == 3


def test_every_score_of_a_class_lies_in_its_interval():
    for row in make_evaluation().metrics["per_class"].values():
        for name in ("precision", "recall", "f1", "specificity", "auroc"):
            low, high = row[f"{name}_ci95"]
            assert low < row[name] < high
        assert 0 < row["photos"] < row["support"]


def test_coverage():
    evaluation = make_evaluation()
    table, rows = evaluation.predictions, evaluation.metrics["coverage"]
    assert rows[0]["coverage"] == 1
    assert rows[0]["accuracy"] == evaluation.metrics["accuracy"]
    assert rows[0]["accuracy_ci95"] == evaluation.metrics["accuracy_ci95"]
    for row in rows:
        kept = table[table.confidence >= row["min_confidence"]]
        assert row["n_images"] == len(kept)
        assert row["coverage"] == len(kept) / len(table)
        if len(kept):
            assert row["accuracy"] == pytest.approx((kept.label == kept.predicted).mean())
    assert len(table) > rows[2]["n_images"] > rows[4]["n_images"] > 0


def test_no_image_reaches_a_threshold():
    table = pd.DataFrame({"path": ["/1"], "label": ["A"], "photo": ["x"]})
    evaluation = Evaluation(predict(table, [[0.6, 0.4]], ("A", "B")), ("A", "B"))
    assert coverage(evaluation)[-1] == {
        "min_confidence": 0.99,
        "coverage": 0,
        "n_images": 0,
        "accuracy": None,
        "accuracy_ci95": None,
    }


def test_the_auroc_has_an_interval_by_photograph():
    rng = np.random.default_rng(0)
    is_class = np.repeat([True, False], 20)
    score = is_class + rng.normal(size=40)
    photos = pd.Series(range(40))
    area, (low, high) = auroc_ci(score, is_class, photos)
    assert area == pytest.approx(roc_auc_score(is_class, score))
    assert low < area < high
    _, copied = auroc_ci(score.repeat(9), is_class.repeat(9), photos.repeat(9))
    assert copied == pytest.approx([low, high])
    assert auroc_ci(score, np.ones(40, bool), photos) == (None, None)


def test_the_interval_of_an_auroc_covers_the_truth():
    rng = np.random.default_rng(0)
    is_class, photos = np.repeat([True, False], [12, 60]), pd.Series(range(72))
    for shift in (1.0, 2.5):
        truth, covered = norm.cdf(shift / np.sqrt(2)), 0
        for _ in range(200):
            _, (low, high) = auroc_ci(shift * is_class + rng.normal(size=72), is_class, photos)
            covered += low <= truth <= high
        assert covered >= 180  # of 200
