import json
import shutil

import pandas as pd
import pytest

from bloodcell_fastai import BloodcellError, Config, Predictor, Run, interpret, split_table
from bloodcell_fastai.serving.inference import predict, write_predictions
from bloodcell_fastai.training.fit import make_learner, resolve


@pytest.fixture(scope="module")
def run(demo_table, tmp_path_factory):
    config = Config(
        arch="resnet18", weights="none", size=64, batch_size=8, epochs=1, workers=0, device="cpu"
    )
    table = split_table(demo_table)
    learn = make_learner(config, table)
    run = Run(tmp_path_factory.mktemp("runs") / "one")
    run.start(resolve(config, learn), table)
    run.save_model(learn)
    with learn.no_bar():
        run.expected = interpret(learn).predictions
    return run


def test_it_predicts_what_interpret_does(run):
    table = Predictor.load(run.path)(run.expected.path)
    names = ["path", "predicted", "confidence", *run.expected.filter(like="p_")]
    pd.testing.assert_frame_equal(table[names], run.expected[names], atol=1e-6)


def test_a_predictor_is_used_again(run):
    predictor = Predictor.load(run)
    paths = run.expected.path.tolist()
    both = pd.concat([predictor(paths[:3]), predictor(paths[3:5])], ignore_index=True)
    pd.testing.assert_frame_equal(both, predictor(paths[:5]), atol=1e-6)


def test_folders_are_searched_and_unreadable_files_listed(run, tmp_path):
    (tmp_path / "deep").mkdir()
    shutil.copy(run.expected.path[0], tmp_path / "deep" / "a b.jpg")
    shutil.copy(run.expected.path[1], tmp_path / "b.jpg")
    (tmp_path / "c.jpg").write_text("no image")
    table, unreadable = predict(run, [tmp_path])
    assert table.path.tolist() == [str(tmp_path / "b.jpg"), str(tmp_path / "deep" / "a b.jpg")]
    assert unreadable == [tmp_path / "c.jpg"]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_nothing_to_predict(run, tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(BloodcellError, match=r"No file or folder|No readable image"):
        predict(run, [tmp_path / "x"])


def test_tables_are_written(run, tmp_path):
    table = run.expected[["path", "predicted", "confidence"]]
    write_predictions(table, tmp_path / "out.csv")
    write_predictions(table, tmp_path / "out.json")
    assert pd.read_csv(tmp_path / "out.csv").predicted.tolist() == table.predicted.tolist()
    assert json.loads((tmp_path / "out.json").read_text())[0]["path"] == table.path[0]
    with pytest.raises(BloodcellError, match="Cannot write"):
        write_predictions(table, tmp_path / "out.xlsx")
