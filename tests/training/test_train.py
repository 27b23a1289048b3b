import re
import shutil
import warnings

import pandas as pd
import pytest

from bloodcell_fastai import BloodcellError, Config, Run, train
from bloodcell_fastai.errors import CacheWarning, UsageError, WeightsWarning
from bloodcell_fastai.reporter import SilentReporter
from bloodcell_fastai.training import train as train_module
from bloodcell_fastai.training.train import resume


def make_config(root, **options) -> Config:
    defaults = {"arch": "test_resnet", "weights": "none", "size": 32, "bs": 32, "epochs": 1}
    return Config(data=str(root), **(defaults | options))


@pytest.fixture
def cut(demo_root, tmp_path, monkeypatch):
    """A run of data in a folder of its own, killed before it was calibrated."""

    def die(*args):
        raise KeyboardInterrupt

    data = shutil.copytree(demo_root, tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "calibrate", die)
        train(make_config(data), tmp_path / "runs", "cut", reporter=SilentReporter())
    return Run.open("cut", tmp_path / "runs")


def test_a_kill_before_the_calibration_is_made_good(cut, capsys):
    assert cut.has_model
    assert not cut.finished
    resume(cut.path.parent, "cut")
    assert cut.finished
    assert len(cut.history) == 1
    assert str(cut.calibration) in capsys.readouterr().out
    with pytest.raises(BloodcellError, match="came to its end after 1 epochs") as caught:
        resume(cut.path.parent, "cut")
    assert f"--weights {cut.path}/model.safetensors" in caught.value.hint  # to train on


@pytest.mark.parametrize(("name", "value"), [("epochs", 7), ("bs", 4), ("lr", "auto")])
def test_what_cannot_change_is_refused_when_a_run_is_resumed(cut, name, value):
    with pytest.raises(
        UsageError, match=f"{name} is {value}, but the run was begun with"
    ) as caught:
        resume(cut.path.parent, "cut", **{name: value})
    assert f"Leave out `{name}`" in caught.value.hint
    assert not cut.finished


def test_what_is_of_the_machine_may_change_and_what_is_the_same_may_be_said_again(cut):
    path = cut.path / "config.json"
    text = path.read_text()
    assert '"device": "auto"' in text
    path.write_text(text.replace('"device": "auto"', '"device": "cuda:7"'))  # asked for there
    resume(cut.path.parent, "cut", SilentReporter(), epochs=1, bs=32, device="cpu", workers=1)
    assert cut.finished


def test_a_run_is_resumed_where_its_images_are_now_and_on_the_device_that_is_there(cut, tmp_path):
    path = cut.path / "config.json"
    text = path.read_text()
    assert '"device": "cpu"' in text  # what auto came to
    path.write_text(text.replace('"device": "cpu"', '"device": "cuda:0"'))
    (tmp_path / "data").rename(tmp_path / "moved")
    run = resume(cut.path.parent, "cut", SilentReporter(), data=tmp_path / "moved")
    assert run.finished
    listed = pd.read_csv(run.path / "reference.csv")
    assert not listed.path.str.startswith("/").any()


class Recorder(SilentReporter):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def test_a_cache_that_cannot_be_kept_is_told_in_a_fit_and_in_its_continuation(
    cut, tmp_path, monkeypatch
):
    """And not in the report: the results are the same without it."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("BLOODCELL_CACHE", str(tmp_path / "file"))
    reporter = Recorder()
    fresh = train(cut.asked, tmp_path / "runs", "fresh", reporter=reporter)
    assert [text.partition(":")[0] for text in reporter.warnings] == ["NO CACHE"]
    assert fresh.config.warnings == ()
    reporter = Recorder()
    resume(cut.path.parent, "cut", reporter)
    assert [text.partition(":")[0] for text in reporter.warnings] == ["NO CACHE"]


def test_weights_are_told_once_and_warnings_of_libraries_stay_warnings():
    def tell():
        warnings.warn("RANDOM WEIGHTS", WeightsWarning, stacklevel=2)
        warnings.warn("NO CACHE", CacheWarning, stacklevel=2)
        warnings.warn("theirs", UserWarning, stacklevel=2)

    for but, expected in (((), ["RANDOM WEIGHTS", "NO CACHE"]), (WeightsWarning, ["NO CACHE"])):
        reporter = Recorder()
        with (
            pytest.warns(UserWarning, match="theirs") as left,
            train_module._warnings_told(reporter, but) as told,
        ):
            tell()
        assert reporter.warnings == [str(each) for each in told] == expected
        assert len(left) == 1


def test_what_was_asked_is_kept_beside_what_it_came_to(demo_root, tmp_path):
    asked, before = make_config(demo_root, bs=1000), set(demo_root.rglob("*"))
    run = train(asked, tmp_path, "plan", dry_run=True, reporter=SilentReporter())
    assert run.asked == asked
    n_train = int((run.table.part == "train").sum())
    assert (run.config.bs, run.config.device, run.config.initial_weights) == (
        n_train,
        "cpu",
        "none",
    )
    assert not run.has_model
    assert set(demo_root.rglob("*")) == before  # which may be read-only


def test_the_plan_says_what_will_be_done(demo_root, tmp_path, capsys):
    train(make_config(demo_root, bs=1000, epochs=3), tmp_path, "plan", dry_run=True)
    plan = capsys.readouterr().out
    assert "Leakage  none: no validation image has a copy of its photograph in training" in plan
    assert "Model    test_resnet from random weights at 32 px on cpu" in plan
    assert re.search(r"Unused   \d+ images of TEST_SIMPLE$", plan, re.MULTILINE)
    assert "Steps    1 of " in plan
    assert "batches of 1000 would be larger than the training part" in plan
    assert "Time     about " in plan


def test_a_run_that_could_not_begin_leaves_no_folder(demo_root, tmp_path):
    with pytest.raises(BloodcellError, match="no architecture"):
        train(make_config(demo_root, arch="resnet999"), tmp_path, "none", reporter=SilentReporter())
    assert not (tmp_path / "none").exists()
