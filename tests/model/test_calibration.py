"""Temperature scaling and the reference, on numbers made for the purpose."""

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from bloodcell_fastai.model.calibration import (
    Calibration,
    Reference,
    calibration_error,
    count_neighbours,
    fit_temperature,
    photo_weights,
    probability_error,
    reference_table,
    reliability,
    softmax,
    weighted_quantile,
)


def honest(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose probabilities are those the labels are drawn with."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, 4))
    labels = [rng.choice(4, p=row) for row in softmax(logits)]
    return logits, np.array(labels)


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_the_temperature_undoes_a_false_confidence(factor):
    logits, labels = honest(4000)
    temperature = fit_temperature(logits * factor, labels)
    assert temperature == pytest.approx(factor, rel=0.06)
    assert probability_error(softmax(logits * factor, temperature), labels) < 0.02
    if factor != 1:
        assert probability_error(softmax(logits * factor), labels) > 0.1


def test_many_copies_of_one_photograph_count_once():
    logits, labels = honest(500)
    odd = np.argmin(logits, axis=1)[:1]  # a photograph whose true class has the lowest logit
    copies = np.concatenate([logits, logits[:1].repeat(400, axis=0)])
    of_copies = np.concatenate([odd, labels[1:], odd.repeat(400)])
    photos = pd.DataFrame({"photo": [*map(str, range(500)), *["0"] * 400], "path": "x"})
    once = fit_temperature(logits, np.concatenate([odd, labels[1:]]))
    weighted = fit_temperature(copies, of_copies, photo_weights(photos))
    assert weighted == pytest.approx(once, rel=0.02)
    assert fit_temperature(copies, of_copies) > 2 * once


def test_the_prior_counts_photographs():
    """Copies of photographs that are all right do not make the model surer."""
    labels = np.arange(12) % 4
    logits = 5 * np.eye(4)[labels]
    photos = pd.DataFrame({"photo": np.repeat(list("abcdefghijkl"), 100), "path": "x"})
    once = fit_temperature(logits, labels)
    copied = fit_temperature(logits.repeat(100, axis=0), labels.repeat(100), photo_weights(photos))
    assert copied == pytest.approx(once, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_a_weighted_quantile_is_numpys_where_all_weigh_the_same(n):
    values = np.random.default_rng(0).normal(size=n)
    expected = np.quantile(values, 0.95)
    assert weighted_quantile(values, np.full(n, 0.5), 0.95) == pytest.approx(expected)


def test_copies_of_one_photograph_do_not_move_a_weighted_quantile():
    values = np.linspace(0, 1, 101)
    copies, weights = np.append(values, np.full(300, 0.99)), np.append(np.ones(101), np.zeros(300))
    weights[-300:] = weights[99] = 1 / 301
    assert weighted_quantile(copies, weights, 0.95) == pytest.approx(0.95, abs=0.01)
    assert np.quantile(copies, 0.95) == 0.99


def test_no_error_at_all_is_not_taken_for_certainty():
    labels = np.arange(200) % 4
    logits = 5 * np.eye(4)[labels]
    confidence = softmax(logits, fit_temperature(logits, labels)).max(axis=1)
    assert confidence == pytest.approx(201 / 204, abs=1e-3)  # the prior: an image of each class


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_few_images_give_little_confidence(n):
    labels = np.arange(n) % 4
    logits = 30 * np.eye(4)[labels]
    temperature = fit_temperature(logits, labels)
    assert 0.05 <= temperature <= 20.001
    assert softmax(logits, temperature).max() < 0.95
    wrong = fit_temperature(logits, (labels + 1) % 4)
    assert softmax(logits, wrong).max() < 0.6


def test_distance_to_the_kth_neighbour():
    angles = torch.tensor([0.0, 0.1, 0.3, 2.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    names = pd.DataFrame({"path": list("abcd"), "label": "x", "photo": list("abcd")})
    query = torch.tensor([[5.0, 0.0], [0.0, 0.1]])  # lengths do not count
    for k, expected in [(1, [0.0, 2 - np.pi / 2]), (2, [0.1, np.pi / 2 - 0.3])]:
        distances, rows = Reference(features.half(), names, k).nearest(query)
        assert distances == pytest.approx(2 * np.sin(np.array(expected) / 2), abs=2e-2)
        assert rows.tolist() == [0, 3]
    assert [len(x) for x in Reference(features, names, 1).nearest(query[:0])] == [0, 0]


def test_the_nearest_photographs_are_shown_once_each():
    angles = torch.tensor([0.0, 0.1, 0.3, 2.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    copies = pd.DataFrame({"path": list("abcd"), "label": "x", "photo": list("ppqr")})
    reference = Reference(features.half(), copies, 1)
    query = torch.tensor([[0.0, 3.0], [5.0, 0.0]])
    upward, along = reference.photographs(query, 2)
    assert upward.path.tolist() == ["d", "c"]
    assert along.path.tolist() == ["a", "c"]  # b is another copy of what a is
    assert along.distance.tolist() == pytest.approx([0, 2 * np.sin(0.15)], abs=2e-2)
    assert [len(rows) for rows in reference.photographs(query, 9)] == [3, 3]


def test_the_reference_is_spread_over_classes_and_photographs():
    """As in the real set: one class of few photographs with many copies."""
    rows = [("A", f"a{i % 2}") for i in range(100)] + [("B", f"b{i % 20}") for i in range(100)]
    images = pd.DataFrame(rows, columns=["label", "photo"])
    images["path"] = images.index.astype(str)
    chosen = reference_table(images, 80, seed=1)
    assert chosen.label.value_counts().to_dict() == {"A": 40, "B": 40}
    assert chosen.photo.value_counts().loc[["a0", "a1"]].tolist() == [20, 20]
    assert set(chosen.photo.value_counts().filter(like="b")) == {2}
    assert chosen.path.is_unique
    assert chosen.equals(reference_table(images, 80, seed=1))
    assert not chosen.equals(reference_table(images, 80, seed=2))
    assert len(reference_table(images, 1000)) == 200
    unknown = reference_table(images.assign(photo=""), 10)  # each image for itself
    assert (unknown.photo == "").all() and unknown.path.is_unique
    assert unknown.label.value_counts().to_dict() == {"A": 5, "B": 5}


@pytest.mark.parametrize(("n", "k"), [(1, 1), (99, 1), (100, 2), (500, 10), (2000, 10)])
def test_neighbours(n, k):
    assert count_neighbours(n) == k


def test_images_of_unknown_photographs_count_one_each():
    table = pd.DataFrame({"photo": ["p", "p", "", ""], "path": list("abcd")})
    assert photo_weights(table).tolist() == [0.5, 0.5, 1, 1]
    features = torch.eye(4)
    reference = Reference(features.half(), table.assign(label="x"), 1)
    (found,) = reference.photographs(torch.tensor([[9.0, 8.0, 7.0, 6.0]]), 9)
    assert found.path.tolist() == ["a", "c", "d"]


def test_a_reference_of_another_model_is_refused():
    reference = Reference(torch.eye(3).half(), pd.DataFrame({"path": list("abc")}), 1)
    with pytest.raises(ValueError, match="has 3 features an image, the model 5"):
        reference.nearest(torch.ones(2, 5))


def test_reliability():
    confidence = np.array([0.51, 0.52, 0.99, 1.0])
    bins = reliability(confidence, np.array([True, False, True, True]))
    assert bins.index.tolist() == [7, 14]
    assert bins.images.tolist() == [2, 2]
    assert bins.accuracy.tolist() == [0.5, 1.0]
    assert bins.confidence.tolist() == pytest.approx([0.515, 0.995])
    assert calibration_error(confidence, np.array([1, 0, 1, 1])) == pytest.approx(0.01)


def test_calibration_error():
    confidence = np.full(1000, 0.8)
    assert calibration_error(confidence, np.arange(1000) < 800) == pytest.approx(0)
    assert calibration_error(confidence, np.arange(1000) < 300) == pytest.approx(0.5)
    assert calibration_error(np.ones(10), np.ones(10, bool)) == 0


def test_a_calibration_in_words():
    calibration = Calibration(
        temperature=1.321,
        distance_threshold=0.5,
        neighbours=1,
        ece_before=0.041,
        ece_after=0.012,
        n_images=9,
    )
    assert str(calibration) == "Calibrated: temperature 1.32, ECE 4.1 % -> 1.2 %"
    with pytest.raises(ValidationError):
        calibration.temperature = 2.0
