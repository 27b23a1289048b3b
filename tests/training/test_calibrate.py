from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from bloodcell_fastai import (
    BloodcellError,
    Predictor,
    blood_dls,
    blood_learner,
    calibrate,
    split_table,
)
from bloodcell_fastai.data.cache import ImageReader
from bloodcell_fastai.model.calibration import (
    Reference,
    fit_temperature,
    photo_weights,
    weighted_quantile,
)


@pytest.fixture(scope="module")
def table(demo_table):
    return split_table(demo_table, "random")


@pytest.fixture(scope="module")
def predictor(table):
    dls = blood_dls(table, "resnet18", 64, 16, device="cpu")
    torch.manual_seed(0)
    return Predictor.from_learner(blood_learner(dls, weights="none"))


@pytest.fixture(scope="module")
def calibrated(predictor, table):
    return calibrate(predictor, table, ImageReader.open(table.path, 64))


def test_95_percent_of_the_validation_photographs_are_within_the_threshold(
    calibrated, predictor, table
):
    calibration, reference = calibrated
    valid = table[table.part == "valid"]
    assert calibration.n_images == len(valid)
    distances, _ = reference.nearest(predictor.predict_all(valid.path).features)
    weights = photo_weights(valid)
    expected = weighted_quantile(distances, weights, 0.95)
    assert calibration.distance_threshold == pytest.approx(expected, abs=1e-3)  # float16 features
    within = weights[distances <= calibration.distance_threshold + 1e-3].sum() / weights.sum()
    assert within > 0.8


def test_the_reference_holds_training_images_without_augmentation(calibrated, predictor, table):
    calibration, reference = calibrated
    assert set(reference.table.path) == set(table.path[table.part == "train"])
    again = predictor.predict_all(reference.table.path[:8]).features
    alone = Reference(reference.features, reference.table, 1)
    distances, rows = alone.nearest(again)
    assert rows.tolist() == list(range(8))
    assert distances.max() < 0.05 < calibration.distance_threshold


class Stub:
    """A model whose logits are drawn, and wrong for every fifth photograph."""

    def __init__(self, table):
        self.classes = sorted(set(table.label))
        rng, labels = np.random.default_rng(0), pd.Index(self.classes).get_indexer(table.label)
        wrong = table.photo.map({photo: i % 5 == 0 for i, photo in enumerate(table.photo.unique())})
        logits = rng.normal(size=(len(table), len(self.classes)))
        logits[np.arange(len(table)), (labels + wrong) % len(self.classes)] += 5
        self.logits = pd.DataFrame(logits, index=table.path)

    def predict_all(self, paths, reader=None):
        logits = self.logits.loc[paths].to_numpy(copy=True)
        return SimpleNamespace(logits=logits, features=torch.tensor(logits).float())


def test_every_photograph_counts_once_for_the_temperature(table):
    valid = table[table.part == "valid"]
    assert valid.photo.value_counts().nunique() > 1
    model = Stub(table)
    logits = model.predict_all(valid.path).logits
    labels = pd.Index(model.classes).get_indexer(valid.label)
    calibration, _ = calibrate(model, table)
    expected = fit_temperature(logits, labels, photo_weights(valid))
    assert calibration.temperature == pytest.approx(expected, rel=1e-6)
    assert calibration.temperature != pytest.approx(fit_temperature(logits, labels), rel=1e-2)


def test_the_files_give_what_the_cache_gives(calibrated, predictor, table):
    calibration, reference = calibrate(predictor, table)
    assert calibration.temperature == pytest.approx(calibrated[0].temperature, rel=1e-3)
    assert np.array_equal(reference.table, calibrated[1].table)


def test_a_label_that_is_no_class_is_refused(predictor, table):
    wrong = table.assign(label="BASOPHIL")
    with pytest.raises(BloodcellError, match="Not a class of this model: BASOPHIL"):
        calibrate(predictor, wrong)
