import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import ClassificationInterpretation

from bloodcell_fastai import BloodcellError, Config, Run, interpret, interpret_run, split_table
from bloodcell_fastai.analysis.interpretation import read_results
from bloodcell_fastai.training.fit import make_learner, resolve
from bloodcell_fastai.training.learner import timm_model
from bloodcell_fastai.training.ready import ready_path


@pytest.fixture(scope="module")
def learn_and_run(demo_table, tmp_path_factory):
    """An untrained run: what matters here is that all its figures come from one prediction."""
    config = Config(
        arch="resnet18", weights="none", size=64, batch_size=16, epochs=1, workers=0, device="cpu"
    )
    table = split_table(demo_table, "random")
    learn = make_learner(config, table)
    run = Run(tmp_path_factory.mktemp("run"))
    run.start(resolve(config, learn), table)
    return learn, run


def test_it_agrees_with_fastai(learn_and_run):
    learn, _ = learn_and_run
    with learn.no_bar():
        ours, theirs = interpret(learn), ClassificationInterpretation.from_learner(learn)
        assert np.array_equal(ours.confusion_matrix, theirs.confusion_matrix())
        losses = learn.get_preds(dl=learn.dls.valid)
    expected = torch.nn.functional.nll_loss(losses[0].log(), losses[1], reduction="none")
    assert np.allclose(ours.predictions.loss, expected, atol=1e-4)


def test_the_package_is_not_written_into():
    before = sorted(ready_path("pbc").rglob("*"))
    with pytest.raises(BloodcellError, match="comes with the package, and without the images"):
        interpret_run(Run.open("pbc"))
    assert sorted(ready_path("pbc").rglob("*")) == before


def test_a_run_without_a_model_is_refused(learn_and_run):
    _, run = learn_and_run
    with pytest.raises(BloodcellError, match="no model yet"):
        interpret_run(run)


def test_a_run_is_interpreted_with_its_best_weights(learn_and_run, tmp_path):
    learn, untrained = learn_and_run
    run = Run(tmp_path)
    run.start(untrained.config, untrained.table)
    run.save_model(learn)
    with learn.no_bar():
        expected = interpret(learn)
    with torch.no_grad():
        timm_model(learn).fc.weight.normal_()
    result = interpret_run(run)
    logits = torch.tensor(expected.probabilities).log() / run.calibration.temperature
    assert np.allclose(result.probabilities, logits.softmax(1), atol=1e-6)
    assert result.leakage > 0.5  # split at random, photographs known

    metrics = result.metrics
    assert metrics["temperature"] == run.calibration.temperature
    assert metrics["ece"] == pytest.approx(run.calibration.ece_after)
    assert metrics["ece_uncalibrated"] == pytest.approx(expected.metrics["ece"], abs=1e-6)
    assert metrics["accuracy"] == expected.metrics["accuracy"]


def test_a_run_is_told_how_near_its_training_images_are(learn_and_run, tmp_path):
    learn, untrained = learn_and_run
    run = Run(tmp_path)
    run.start(untrained.config, untrained.table)
    run.save_model(learn)
    result = interpret_run(run)
    table = result.predictions
    assert table.columns.tolist()[-2:] == ["distance", "nearest"]
    assert table.nearest.isin(run.table.path[run.table.part == "train"]).all()
    flagged = (table.distance > run.calibration.distance_threshold).mean()
    assert 0 < flagged <= 0.1  # a twentieth of 28 images, counted in whole ones
    # The table on disk says the same, and the temperature survives the reading.
    again = read_results(run)
    pd.testing.assert_frame_equal(again.predictions, table, check_dtype=False, rtol=1e-6)
    assert again.metrics["ece_uncalibrated"] == pytest.approx(result.metrics["ece_uncalibrated"])


def test_lost_images_are_named(learn_and_run, tmp_path):
    learn, untrained = learn_and_run
    run = Run(tmp_path)
    run.start(untrained.config, untrained.table.assign(path="/gone.jpg"))
    run.save_model(learn)
    with pytest.raises(BloodcellError, match=r"images are gone, such as /gone\.jpg"):
        interpret_run(run)
