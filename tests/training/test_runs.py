import json

import pandas as pd
import pytest
import torch

from bloodcell_fastai import BloodcellError, Config, Run, blood_dls, blood_learner, split_table
from bloodcell_fastai.training.calibration import Calibration, Reference
from bloodcell_fastai.training.learner import timm_model
from bloodcell_fastai.training.runs import HISTORY, newest_unfinished

ARCH = "resnet18"


@pytest.fixture(scope="module")
def learn(demo_table):
    dls = blood_dls(split_table(demo_table), ARCH, size=64, bs=16)
    learn = blood_learner(dls, ARCH, "none", size=64)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1)
    return learn


def row(epoch: int, accuracy: float = 0.5) -> dict:
    return dict.fromkeys(HISTORY, 1.0) | {"epoch": epoch, "valid_accuracy": accuracy}


def test_the_newest_run_is_opened(tmp_path, demo_table):
    table = split_table(demo_table)
    for name in ("b", "a"):
        Run.create(tmp_path, name).start(Config(), table)
    assert Run.open(root=tmp_path).name == "a"
    assert Run.open("b", tmp_path).name == Run.open(tmp_path / "b").name == "b"
    assert Run.open("b", tmp_path).table.equals(table.astype(str))


def test_names(tmp_path):
    first, second = Run.create(tmp_path), Run.create(tmp_path)
    first.start(Config(), pd.DataFrame())
    assert first.name != second.name
    for name in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(BloodcellError, match="cannot name a run"):
            Run.create(tmp_path, name)
    with pytest.raises(BloodcellError, match="There is a run named"):
        Run.create(tmp_path, first.name)


def test_no_runs(tmp_path):
    with pytest.raises(BloodcellError, match="No run in"):
        Run.open(root=tmp_path)
    with pytest.raises(BloodcellError, match="not a run"):
        Run.open("x", tmp_path)
    with pytest.raises(BloodcellError, match="No unfinished run"):
        newest_unfinished(tmp_path)


def test_history_replaces_epochs_that_are_trained_again(tmp_path):
    run = Run(tmp_path)
    assert run.history.empty
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    run.append_history(row(2, accuracy=0.75))
    assert run.history.epoch.tolist() == [1, 2]
    assert run.history.valid_accuracy.tolist() == [0.5, 0.75]
    assert list(run.history.columns) == HISTORY


def test_a_model_comes_back(tmp_path, learn, demo_table):
    run = Run(tmp_path)
    run.start(Config(), demo_table)
    with pytest.raises(BloodcellError, match="no model yet"):
        run.load_model(learn)
    run.save_model(learn)
    before = {k: v.clone() for k, v in timm_model(learn).state_dict().items()}
    with torch.no_grad():
        timm_model(learn).fc.weight.zero_()
    run.load_model(learn)
    assert all(torch.equal(v, before[k]) for k, v in timm_model(learn).state_dict().items())


def test_a_checkpoint_comes_back(tmp_path, learn):
    run = Run(tmp_path)
    assert run.load_last() is None
    run.save_last(learn, epochs_done=2, best=0.75, wait=1)
    before = learn.opt.state_dict()
    weight = timm_model(learn).fc.weight.clone()
    learn.create_opt()
    with torch.no_grad():
        timm_model(learn).fc.weight.zero_()
    checkpoint = run.load_last()
    checkpoint.restore_model(learn)
    checkpoint.restore_optimizer(learn)
    assert (checkpoint.epochs_done, checkpoint.best, checkpoint.wait) == (2, 0.75, 1)
    assert torch.equal(timm_model(learn).fc.weight, weight)
    after = learn.opt.state_dict()
    assert after["hypers"] == before["hypers"]
    for old, new in zip(before["state"], after["state"], strict=True):
        assert old.keys() == new.keys()
        assert all(
            torch.equal(old[k], new[k]) if torch.is_tensor(old[k]) else old[k] == new[k]
            for k in old
        )


def test_a_finished_run_drops_its_checkpoint(tmp_path, learn):
    run = Run(tmp_path)
    run.save_last(learn, 1, 0.5, 0)
    run.finish()
    assert run.finished
    assert run.load_last() is None


@pytest.fixture
def calibrated(tmp_path) -> Run:
    run = Run(tmp_path / "calibrated")
    names = pd.DataFrame({"path": ["/1", "/2"], "label": ["A", "NA"], "photo": ["01", "02"]})
    reference = Reference(torch.eye(2, 3).half(), names, 2)
    run.save_calibration(Calibration(1.5, 0.25, 2, 0.04, 0.01, 30), reference)
    return run


def test_a_calibration_comes_back(calibrated, tmp_path):
    assert Run(tmp_path / "none").calibration is None
    assert Run(tmp_path / "none").reference is None
    assert calibrated.calibration == Calibration(1.5, 0.25, 2, 0.04, 0.01, 30)
    reference = calibrated.reference
    assert torch.equal(reference.features, torch.eye(2, 3).half())
    assert reference.table.values.tolist() == [["/1", "A", "01"], ["/2", "NA", "02"]]
    assert reference.neighbours == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", True),
        ("distance_threshold", float("inf")),
        ("neighbours", 1.5),
        ("neighbours", 0),
        ("ece_after", -0.1),
        ("n_images", None),
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused(calibrated, field, value):
    path = calibrated.path / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(BloodcellError, match=f"{field} is") as caught:
        _ = calibrated.calibration
    assert "bloodcell interpret calibrated" in caught.value.hint


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_a_damaged_calibration_is_refused(calibrated, text):
    (calibrated.path / "calibration.json").write_text(text)
    with pytest.raises(BloodcellError, match=r"calibration\.json"):
        _ = calibrated.calibration


def test_reference_files_that_do_not_belong_together(calibrated):
    listed = calibrated.path / "reference.csv"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(BloodcellError, match="do not belong together"):
        _ = calibrated.reference
    listed.unlink()
    with pytest.raises(BloodcellError, match="do not belong together"):
        _ = calibrated.reference
    (calibrated.path / "reference.safetensors").unlink()
    with pytest.raises(BloodcellError, match=r"reference\.safetensors"):
        _ = calibrated.reference
