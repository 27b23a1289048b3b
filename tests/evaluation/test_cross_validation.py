import shutil

import numpy as np
import pandas as pd
import pytest

from bloodcell_fastai import BloodcellError, Config, Run, cross_validate, interpret_run
from bloodcell_fastai.evaluation.cross_validation import resume_folds
from bloodcell_fastai.reporter import SilentReporter


def make_config(root, **options) -> Config:
    return Config(
        **{
            "data": str(root),
            "arch": "resnet18",
            "weights": "none",
            "size": 64,
            "bs": 16,
            "epochs": 1,
            "device": "cpu",
            "folds": 3,
        }
        | options
    )


@pytest.mark.slow
def test_every_image_is_predicted_once_by_a_model_that_has_not_seen_it(demo_root, tmp_path):
    run = cross_validate(make_config(demo_root), tmp_path, "cv", reporter=SilentReporter())
    pooled = run.absolute(pd.read_csv(run.path / "predictions.csv"))
    table = run.table
    assert sorted(pooled.path) == sorted(table.path)
    assert table.groupby("photo").fold.nunique().eq(1).all()
    for number in (1, 2, 3):
        model = Run(run.path / f"fold-{number}")
        fold = model.table
        valid = set(fold.path[fold.part == "valid"])
        rows = pooled[pooled.path.isin(valid)]
        assert model.calibration.n_images == len(valid)
        assert set(rows.nearest) <= set(fold.path[fold.part == "train"])
        assert valid == set(table.path[table.fold == str(number)])
    metrics = pd.read_json(run.path / "metrics.json", typ="series")
    assert metrics.n_images == len(table)
    assert metrics.leakage == 0
    assert metrics.temperature is None  # each fold has its own
    assert np.sum(metrics.confusion_matrix) == len(table)
    page = (run.path / "report" / "index.html").read_text(encoding="utf-8")
    assert "Heat maps are in the reports of the folds" in page
    for number in (1, 2, 3):
        own = f"../fold-{number}/report/index.html"
        assert f'href="{own}"' in page
        assert (run.report / own).is_file()
    with pytest.raises(BloodcellError, match="3 models") as caught:
        interpret_run(run)
    assert caught.value.hint.endswith("cv/fold-1")
    with pytest.raises(BloodcellError, match="All folds of run cv came to their end"):
        resume_folds(run)


class Killed(Exception):
    pass


class KilledAt(SilentReporter):
    def __init__(self, words):
        self.words = words

    def say(self, text):
        if text.startswith(self.words):
            raise Killed


@pytest.mark.slow
def test_folds_are_resumed_where_the_images_are_now(demo_root, tmp_path):
    data = shutil.copytree(demo_root, tmp_path / "data")
    asked = make_config(data, folds=2, size=32, bs=64)
    with pytest.raises(Killed):
        cross_validate(asked, tmp_path, "cv", reporter=KilledAt("Fold 2"))
    data.rename(tmp_path / "moved")
    run = resume_folds(Run(tmp_path / "cv", tmp_path / "moved"), SilentReporter())
    assert run.finished
    assert run.asked == asked
    assert [fold.history.epoch.tolist() for fold in (run.fold(1), run.fold(2))] == [[1], [1]]
    assert run.config.classes == run.fold(2).config.classes
    assert all(path.startswith(str(tmp_path / "moved")) for path in run.table.path)


@pytest.mark.parametrize("options", [{"folds": 1}, {"folds": 3, "split": "random"}])
def test_folds_that_make_no_sense(demo_root, options):
    with pytest.raises(BloodcellError, match="folds is"):
        make_config(demo_root, **options)


def test_more_folds_than_photographs(demo_root, tmp_path):
    with pytest.raises(BloodcellError, match="too few for 9 folds"):
        cross_validate(make_config(demo_root, folds=9), tmp_path, "cv", reporter=SilentReporter())
