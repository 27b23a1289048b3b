"""The folder of a run: what is written comes back, wherever the folder and its data are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from bloodcell_fastai import (
    BloodcellError,
    Config,
    Predictor,
    Run,
    blood_dls,
    blood_learner,
    export_run,
    interpret_external,
    interpret_run,
    load_learner,
    open_dataset,
    split_table,
    timm_model,
)
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.evaluation.interpretation import read_metrics
from bloodcell_fastai.model.calibration import Calibration, Reference
from bloodcell_fastai.model.model import read_tensors
from bloodcell_fastai.model.runs import HISTORY, newest_unfinished, open_model

CALIBRATION = Calibration(
    temperature=1.5,
    distance_threshold=0.25,
    neighbours=2,
    ece_before=0.04,
    ece_after=0.01,
    n_images=30,
)


@pytest.fixture(scope="module")
def learn(demo_table):
    learn = blood_learner(blood_dls(split_table(demo_table), "resnet18", 64, 16), weights="none")
    with learn.no_logging(), learn.no_bar():
        learn.fit(1)
    return learn


@pytest.fixture(scope="module")
def resolved(demo_root, learn) -> ResolvedConfig:
    return ResolvedConfig(
        data=str(demo_root), arch="resnet18", size=64, classes=tuple(learn.dls.vocab)
    )


def row(epoch: int, accuracy: float = 0.5) -> dict:
    return dict.fromkeys(HISTORY, 1.0) | {"epoch": epoch, "valid_accuracy": accuracy}


def test_the_newest_trained_run_is_opened(tmp_path, demo_table, resolved):
    table = split_table(demo_table)
    for name in ("b", "a", "planned"):
        Run.create(tmp_path, name).start(Config(), resolved, table)
        if name != "planned":  # as --dry-run leaves it
            (tmp_path / name / "model.safetensors").touch()
    assert Run.open(root=tmp_path).name == open_model(root=tmp_path).name == "a"
    assert Run.open("b", tmp_path).name == Run.open(tmp_path / "b").name == "b"
    assert Run.open("b", tmp_path).table.equals(table.astype(str))


def test_an_export_is_no_run(trained, tmp_path):
    run = Run(shutil.copytree(trained.path, tmp_path / "runs" / "mine"))
    export_run(run, "timm", tmp_path / "runs" / "exported")
    assert Run.open(root=tmp_path / "runs").name == "mine"
    with pytest.raises(BloodcellError, match="does not hold the tables asked and resolved"):
        Predictor.load(Run.open("exported", tmp_path / "runs"))


def test_what_was_asked_and_what_it_came_to_are_kept_apart(tmp_path, demo_table, resolved):
    run = Run(tmp_path / "run")
    asked = Config(data="demo", lr="auto", device="auto")
    run.start(asked, resolved.changed(lr=2e-3, device="cpu"), split_table(demo_table))
    assert run.asked == asked
    assert type(run.config) is ResolvedConfig
    assert (run.config.lr, run.config.device, run.config.classes) == (
        *(2e-3, "cpu"),
        resolved.classes,
    )
    written = json.loads((run.path / "config.json").read_text())
    assert written["asked"]["lr"] == "auto"
    assert written["resolved"]["lr"] == 2e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("asked"), "tables asked and resolved"),
        (lambda values: values.update(more={}), "tables asked and resolved"),
        (lambda values: values["resolved"].update(size="big"), "size is big"),
        (lambda values: values["resolved"].update(compile=True), "compile"),
    ],
)
def test_an_edited_config_is_refused(tmp_path, demo_table, resolved, change, message):
    run = Run(tmp_path / "run")
    run.start(Config(), resolved, split_table(demo_table))
    values = json.loads((run.path / "config.json").read_text())
    change(values)
    (run.path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as caught:
        _ = run.config
    assert isinstance(caught.value, BloodcellError)


def test_names(tmp_path):
    first, second = Run.create(tmp_path), Run.create(tmp_path)
    first.start(Config(), ResolvedConfig(), pd.DataFrame())
    assert first.name != second.name
    for name in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="cannot name a run"):
            Run.create(tmp_path, name)
    with pytest.raises(BloodcellError, match="There is a run named"):
        Run.create(tmp_path, first.name)


def test_no_runs(tmp_path):
    """As Python itself would say it, for who catches that."""
    with pytest.raises(FileNotFoundError, match="No trained run in"):
        Run.open(root=tmp_path)
    with pytest.raises(FileNotFoundError, match="not a run") as caught:
        Run.open("nowhere", tmp_path)
    assert isinstance(caught.value, BloodcellError)
    with pytest.raises(FileNotFoundError, match="No unfinished run"):
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


def test_a_model_comes_back(tmp_path, learn, demo_table, resolved):
    run = Run(tmp_path)
    run.start(Config(), resolved, demo_table)
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
    names = pd.DataFrame({"path": ["/d/1", "/2"], "label": ["A", "NA"], "photo": ["01", ""]})
    run.start(Config(), ResolvedConfig(data="/d"), names)
    reference = Reference(torch.eye(2, 3).half(), names, 2)
    run.save_calibration(CALIBRATION, reference)
    return run


def test_a_calibration_comes_back(calibrated, tmp_path):
    assert Run(tmp_path / "none").calibration is None
    assert Run(tmp_path / "none").reference is None
    assert calibrated.calibration.model_copy(update={"weights": ""}) == CALIBRATION
    reference = calibrated.reference
    assert torch.equal(reference.features, torch.eye(2, 3).half())
    assert reference.table.values.tolist() == [["/d/1", "A", "01"], ["/2", "NA", ""]]
    assert reference.neighbours == 2
    listed = pd.read_csv(calibrated.path / "reference.csv")
    assert listed.path.tolist() == ["1", "/2"]  # what is not of the data has no other name


def test_new_weights_remove_the_results_of_the_old(trained, tmp_path):
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    results = ["metrics.json", "predictions.csv", "calibration.json", "report", "on"]
    (run.path / "on").mkdir(exist_ok=True)
    (run.path / "robustness.csv").touch()
    run.save_weights(read_tensors(run.path / "model.safetensors"), run.config.classes)
    left = {path.name for path in run.path.iterdir()}
    assert not left & {*results, "robustness.csv"}
    assert {"history.csv", "model.safetensors", "split.csv"} <= left


def test_results_of_other_weights_are_refused(trained, tmp_path):
    """A file of weights may be replaced by hand."""
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    assert read_metrics(run)["weights"] == run.weights_hash == run.calibration.weights
    state = read_tensors(run.path / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, run.path / "model.safetensors")
    for read in (read_metrics, lambda run: run.calibration):
        with pytest.raises(BloodcellError, match="is of other weights than run has now"):
            read(run)


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


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"temperature": 1}'])
def test_a_damaged_calibration_is_refused(calibrated, text):
    (calibrated.path / "calibration.json").write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json") as caught:
        _ = calibrated.calibration
    assert isinstance(caught.value, BloodcellError)


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


@pytest.fixture(scope="module")
def moved(trained, demo_root, tmp_path_factory) -> tuple[Run, Path]:
    """A run and its data in other folders; what it was trained on is gone."""
    home = tmp_path_factory.mktemp("before")
    data, path = shutil.copytree(demo_root, home / "data"), home / "run"
    shutil.copytree(trained.path, path)
    config = json.loads((path / "config.json").read_text())
    config["resolved"]["data"] = str(data)  # as if it had been trained there
    (path / "config.json").write_text(json.dumps(config))
    after = tmp_path_factory.mktemp("after")
    run = Run.open(shutil.move(path, after / "run"), data=shutil.move(data, after / "images"))
    assert not home.is_dir() or not any(home.iterdir())
    return run, after / "images"


def test_the_files_of_a_run_hold_relative_paths_alone(trained):
    for name, column in (
        *(("split.csv", "path"), ("reference.csv", "path")),
        *(("predictions.csv", "path"), ("predictions.csv", "nearest")),
    ):
        paths = pd.read_csv(trained.path / name)[column]
        assert len(paths)
        for path in paths:
            assert not Path(path).is_absolute() and "\\" not in path, name
            assert (trained.root / path).is_file(), name
    for path in trained.path.rglob("*.csv"):
        assert str(trained.root) not in path.read_text(), path.name


def test_a_run_and_its_data_can_be_moved(moved, trained):
    """Everything that needs the images works with them where they are now."""
    run, data = moved
    assert run.root == data
    assert all(path.startswith(f"{data}/") for path in (*run.table.path, *run.reference.table.path))
    valid = run.table.path[run.table.part == "valid"].tolist()
    table = Predictor.load(run)(valid)
    assert all(Path(path).is_file() for path in table.nearest)
    before = pd.read_csv(trained.path / "predictions.csv")

    result = interpret_run(run)
    assert result.predictions.path.tolist() == valid
    assert np.allclose(result.probabilities, before.filter(like="p_"), atol=1e-6)
    again = pd.read_csv(run.path / "predictions.csv")
    for column in ("path", "nearest", "predicted", "label"):
        assert again[column].tolist() == before[column].tolist()

    learn = load_learner(run)
    assert learn.dls.valid_ds.items.path.tolist() == valid
    distances, rows = run.reference.nearest(run.reference.features[:3].float())
    assert rows.tolist() == [0, 1, 2] and len(distances) == 3


def test_a_moved_run_without_its_data_says_so(moved):
    run = Run.open(moved[0].path)
    for use in (interpret_run, load_learner):
        with pytest.raises(FileNotFoundError, match="images are gone, such as") as caught:
            use(run)
        assert "`data`" in caught.value.hint


def test_where_the_images_of_a_run_are_now(moved, trained, tmp_path, monkeypatch):
    run, data = moved
    left = Run.open(run.path)
    assert left.moved_to(data).root == data
    monkeypatch.chdir(data.parent)
    here = Run.open(run.path, data=data.name)
    monkeypatch.chdir(tmp_path)
    assert here.root == data  # and not below where we are now
    assert left.moved_to(tmp_path) is None  # they are not there either
    assert trained.moved_to(data) is None  # they are where they were


def test_a_part_of_its_own_data_is_named_from_that_part(trained, demo, tmp_path):
    """Paths are relative to the folder that was scored, wherever it lies."""
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    test = Path(demo.table.path[demo.table.subset == "TEST"].iloc[0]).parents[1]
    _, _, folder = interpret_external(run, open_dataset(test))
    table = pd.read_csv(folder / "predictions.csv")
    assert all((test / path).is_file() for path in table.path)
    assert all((run.root / path).is_file() for path in table.nearest)
