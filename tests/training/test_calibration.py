from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch

from bloodcell_fastai import Config, Run, blood_dls, split_table
from bloodcell_fastai.data.blocks import image_dls
from bloodcell_fastai.training import workflow
from bloodcell_fastai.training.calibration import (
    Calibration,
    Reference,
    calibrate,
    count_neighbours,
    fit_temperature,
    photo_weights,
    predict_with_features,
    probability_error,
    reference_table,
    softmax,
)
from bloodcell_fastai.training.fit import make_learner, resolve
from bloodcell_fastai.training.learner import classifier_inputs, timm_model

CONFIG = Config(
    arch="resnet18", weights="none", size=64, batch_size=16, epochs=1, workers=0, device="cpu"
)


@pytest.fixture(scope="module")
def table(demo_table):
    return split_table(demo_table, "random")


@pytest.fixture(scope="module")
def learn(table):
    return make_learner(CONFIG, table)


@pytest.fixture(scope="module")
def calibrated(learn, table, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"))
    run.start(resolve(CONFIG, learn), table)
    run.save_model(learn)
    return run, calibrate(learn, run)


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
    odd = np.argmin(logits, axis=1)[:1]  # a photograph that is surely taken for something else
    copies = np.concatenate([logits, logits[:1].repeat(400, axis=0)])
    of_copies = np.concatenate([odd, labels[1:], odd.repeat(400)])
    photos = pd.DataFrame({"photo": [*map(str, range(500)), *["0"] * 400]})
    once = fit_temperature(logits, np.concatenate([odd, labels[1:]]))
    weighted = fit_temperature(copies, of_copies, photo_weights(photos))
    assert weighted == pytest.approx(once, rel=0.02)
    assert fit_temperature(copies, of_copies) > 2 * once


def test_no_error_at_all_is_not_taken_for_certainty():
    labels = np.arange(200) % 4
    logits = 5 * np.eye(4)[labels]
    sure = softmax(logits, fit_temperature(logits, labels)).max(axis=1)
    assert sure == pytest.approx(201 / 204, abs=1e-3)  # the prior: one more image of each class


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_few_images_say_little(n):
    labels = np.arange(n) % 4
    logits = 30 * np.eye(4)[labels]
    temperature = fit_temperature(logits, labels)
    assert 0.05 <= temperature <= 20.001
    assert softmax(logits, temperature).max() < 0.95
    wrong = fit_temperature(logits, (labels + 1) % 4)
    assert softmax(logits, wrong).max() < 0.6


def test_features_are_what_the_classifier_multiplies(learn, table):
    paths = table.path[:5]
    dls = image_dls(paths, CONFIG.arch, CONFIG.size, bs=2, device="cpu")
    with learn.no_bar():
        logits, features, targets = predict_with_features(learn, dls.valid)
    assert targets is None
    assert features.shape == (5, 512)
    assert features.dtype == torch.float32
    fc = timm_model(learn).fc
    by_hand = features @ fc.weight.T + fc.bias
    assert np.allclose(by_hand.detach(), logits, atol=2e-2)  # bfloat16 where there is one
    assert not fc._forward_pre_hooks


@pytest.mark.parametrize(
    "arch",
    [
        "test_vit",  # tokens
        "test_convnext",  # a norm before the classifier
        "mobilenetv3_small_050",  # a convolution after the pooling
        "deit_tiny_distilled_patch16_224",  # two classifiers
        "resnetv2_18",  # the classifier is a convolution
    ],
)
def test_any_timm_model_has_features(arch):
    model = timm.create_model(arch, num_classes=3).eval()
    size = model.default_cfg["input_size"][-1]
    with classifier_inputs(model) as inputs, torch.inference_mode():
        for n in (2, 1):
            model(torch.rand(n, 3, size, size))
        features = inputs.take()
        assert features.shape == (3, model.head_hidden_size)
        assert len(inputs.take()) == 0
        model(torch.rand(2, 3, size, size))
        assert len(inputs.take()) == 2


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
    assert reference_table(images.drop(columns="photo"), 10).photo.nunique() == 10


@pytest.mark.parametrize(("n", "k"), [(1, 1), (99, 1), (100, 2), (500, 10), (2000, 10)])
def test_neighbours(n, k):
    assert count_neighbours(n) == k


def test_a_run_keeps_its_calibration(calibrated, learn, table):
    run, calibration = calibrated
    assert run.calibration == calibration
    assert calibration.n_images == (table.part == "valid").sum()
    reference = run.reference
    assert set(reference.table.path) == set(table.path[table.part == "train"])
    with learn.no_bar():
        _, features, _ = predict_with_features(learn, learn.dls.valid)
        distances, _ = reference.nearest(features)
        assert (distances <= calibration.distance_threshold).mean() == pytest.approx(0.95, abs=0.03)
        # A training image without augmentation lies where the reference says.
        own = image_dls(reference.table.path[:8], "resnet18", 64, 8, device="cpu")
        _, same, _ = predict_with_features(learn, own.valid)
    alone = Reference(reference.features, reference.table, 1)
    distances, rows = alone.nearest(same)
    assert rows.tolist() == list(range(8))
    assert distances.max() < 0.05 < calibration.distance_threshold


def test_every_photograph_counts_once_for_the_temperature(calibrated, learn):
    _, calibration = calibrated
    with learn.no_bar():
        logits, _, targets = predict_with_features(learn, learn.dls.valid)
    photos = learn.dls.valid_ds.items.photo
    assert photos.value_counts().nunique() > 1
    labels = targets.numpy()
    expected = fit_temperature(logits, labels, photo_weights(learn.dls.valid_ds.items))
    assert calibration.temperature == pytest.approx(expected, rel=1e-3)
    assert calibration.temperature != pytest.approx(fit_temperature(logits, labels), rel=1e-2)


def test_another_model_drops_the_calibration(calibrated, learn, tmp_path):
    run, calibration = calibrated
    other = Run(tmp_path)
    other.save_calibration(calibration, run.reference)
    assert other.reference is not None
    other.save_model(learn)
    assert other.calibration is None
    assert other.reference is None


def test_a_learner_without_photographs_is_calibrated(table, tmp_path):
    plain = blood_dls(table.drop(columns="photo"), "resnet18", 64, 16, device="cpu")
    learn = make_learner(CONFIG, table)
    learn.dls = plain
    run = Run(tmp_path)
    run.start(replace(CONFIG, classes=tuple(plain.vocab)), table)
    assert calibrate(learn, run).n_images > 0


def test_a_kill_before_the_calibration_is_made_good(demo_root, tmp_path, monkeypatch, capsys):
    def die(learn, run):
        raise KeyboardInterrupt

    config = replace(CONFIG, data=str(demo_root), split="random", size=32)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workflow, "calibrate", die)
        workflow.train(config, tmp_path, "cut")
    run = Run.open("cut", tmp_path)
    assert run.has_model
    assert not run.finished
    workflow.resume(tmp_path, "cut")
    assert run.finished
    assert len(run.history) == 1
    assert str(run.calibration) in capsys.readouterr().out
    assert str(Calibration(1.321, 0.5, 1, 0.041, 0.012, 9)) == (
        "Calibrated: temperature 1.32, ECE 4.1 % -> 1.2 %"
    )
