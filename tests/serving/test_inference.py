import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from bloodcell_fastai import BloodcellError, Config, Predictor, Run, interpret_run, split_table
from bloodcell_fastai.serving.inference import PredictionFile, find_images, predict
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
    run.expected = interpret_run(run).predictions
    return run


@pytest.fixture(scope="module")
def paths(run):
    return run.expected.path.tolist()


def test_it_predicts_what_interpret_does(run, paths):
    table = Predictor.load(run.path, device="cpu")(paths)
    names = ["path", "predicted", "confidence", *run.expected.filter(like="p_"), "nearest"]
    pd.testing.assert_frame_equal(table[names], run.expected[names], atol=1e-6)
    # A distance of 0 is the root of rounding errors.
    assert np.allclose(table.distance, run.expected.distance, atol=2e-3)


def test_a_predictor_is_used_again(run, paths):
    predictor = Predictor.load(run)
    both = pd.concat([predictor(paths[:3]), predictor(paths[3:5])], ignore_index=True)
    at_once = predictor(paths[:5])
    same = both.columns.drop("distance")
    pd.testing.assert_frame_equal(both[same], at_once[same], atol=1e-6)
    # A small distance is the root of a difference of cosines, in which rounding errors grow.
    assert np.allclose(both.distance, at_once.distance, atol=1e-4)


def test_no_images_give_an_empty_table(run, paths):
    predictor = Predictor.load(run)
    assert list(predictor([])) == list(predictor(paths[:1]))
    assert len(predictor([])) == 0


def test_unsure_predictions_are_flagged(run, paths):
    table = Predictor.load(run, min_confidence=1.0)(paths)
    assert set(table.flag) <= {"uncertain", "unlike training", "no cell"}
    assert "uncertain" in set(table.flag)
    assert "uncertain" not in set(Predictor.load(run)(paths).flag)


def test_images_unlike_training_are_flagged(run, paths, tmp_path):
    table = Predictor.load(run)([*paths, draw_stripes(tmp_path)])
    assert table.flag.iloc[-1] == "unlike training"
    assert table.distance.iloc[-1] > table.distance[:-1].max()
    assert (table.flag[:-1] == "unlike training").mean() < 0.1


@pytest.mark.parametrize("empty", ["black", "white", "smear"])
def test_images_without_a_white_cell_are_flagged(run, paths, empty, tmp_path):
    """The flag comes before any other: what the network saw was no cell."""
    image = Image.new("RGB", (64, 64), empty if empty != "smear" else (235, 225, 215))
    if empty == "smear":  # red cells alone
        for x in range(6, 64, 18):
            ImageDraw.Draw(image).ellipse((x, 20, x + 14, 34), fill=(222, 160, 150))
    image.save(tmp_path / "empty.png")
    table = Predictor.load(run, min_confidence=1.0)([*paths, str(tmp_path / "empty.png")])
    assert table.flag.iloc[-1] == "no cell"
    assert (table.flag == "no cell").sum() == 1


def draw_stripes(folder) -> str:
    """A picture as purple as a nucleus, but of none."""
    pixels = np.full((64, 64, 3), 235, np.uint8)
    pixels[:, ::4] = pixels[:, 1::4] = (90, 40, 160)
    Image.fromarray(pixels).save(folder / "stripes.png")
    return str(folder / "stripes.png")


def test_turned_pictures_give_the_same_answer_with_tta(run, paths, tmp_path):
    image = Image.open(paths[0]).resize((64, 64)).convert("L")  # no stain: all of it is seen
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    files = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    spread = [
        np.ptp(Predictor.load(run, tta=tta)(files).filter(like="p_").to_numpy(), axis=0).max()
        for tta in (False, True)
    ]
    assert spread[1] < 1e-3 < spread[0]


def test_short_memory_halves_the_batch_and_changes_nothing(run, paths, monkeypatch):
    predictor = Predictor.load(run)
    expected = predictor(paths)
    whole = Predictor._logits

    def small(self, images):
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, images)

    monkeypatch.setattr(Predictor, "_logits", small)
    with pytest.warns(UserWarning, match="Memory is short"):
        table = predictor(paths)
    pd.testing.assert_frame_equal(table, expected, atol=2e-3)
    assert predictor.batch_size <= 5


def test_no_memory_for_one_image_is_an_error(run, paths, monkeypatch):
    def none(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Predictor, "_logits", none)
    with (
        pytest.warns(UserWarning, match="Memory is short"),
        pytest.raises(BloodcellError, match="no memory"),
    ):
        Predictor.load(run)(paths[:4])


def test_other_failures_are_not_taken_for_short_memory(run, paths, monkeypatch):
    def broken(self, images):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Predictor, "_logits", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        Predictor.load(run)(paths[:4])


def test_an_unreadable_image_is_named(run, paths, tmp_path):
    (tmp_path / "c.jpg").write_text("no image")
    with pytest.raises(BloodcellError, match=r"1 of the images .*/c\.jpg"):
        Predictor.load(run)([paths[0], tmp_path / "c.jpg"])


def test_a_min_confidence_that_makes_no_sense(run):
    with pytest.raises(BloodcellError, match="min_confidence"):
        Predictor.load(run, min_confidence=50)


@pytest.fixture
def folder(paths, tmp_path):
    """Two images, one in a folder below, a file that is none, and a list of both."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(paths[0], tmp_path / "in" / "deep" / "a b.jpg")
    shutil.copy(paths[1], tmp_path / "in" / "b.jpg")
    (tmp_path / "in" / "c.jpg").write_text("no image")
    both = [str(tmp_path / "in" / "b.jpg"), str(tmp_path / "in" / "deep" / "a b.jpg")]
    (tmp_path / "list.txt").write_text("\n".join([*both, ""]))
    return tmp_path / "in", both


def test_sources(folder):
    root, both = folder
    assert list(find_images([*both])) == both
    assert [path for path in find_images([root]) if path in both] == both
    assert list(find_images([root.parent / "list.txt"])) == both
    assert list(find_images(["-"], [f"{path}\n" for path in both])) == both
    assert list(find_images([f"{root}/*/*.jpg"])) == both[1:]
    assert list(find_images([f"{root}/**/a*.jpg"])) == both[1:]


@pytest.mark.parametrize("source", ["none.jpg", "none/*.jpg"])
def test_a_source_that_is_not_there(tmp_path, source):
    with pytest.raises(BloodcellError, match="No file or folder"):
        list(find_images([tmp_path / source]))


def test_a_folder_is_predicted_and_unreadable_files_listed(run, folder):
    root, both = folder
    outcome = predict(Predictor.load(run), find_images([root]))
    assert outcome.table.path.tolist() == both
    assert outcome.unreadable == [str(root / "c.jpg")]
    assert outcome.n_images == sum(outcome.classes.values()) == 2


def test_nothing_to_predict(run, tmp_path):
    with pytest.raises(BloodcellError, match="no readable image"):
        predict(Predictor.load(run), find_images([tmp_path]))


def read(path):
    if path.suffix == ".csv":
        return pd.read_csv(path, keep_default_na=False)
    return pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_a_file_grows_with_every_batch(run, paths, tmp_path, name):
    predictor = Predictor.load(run)
    predictor.batch_size = 4
    lengths = []
    predict(
        predictor,
        paths[:10],
        tmp_path / name,
        progress=lambda *_: lengths.append(len(read(tmp_path / name))),
    )
    assert lengths == [4, 8, 10]
    written = read(tmp_path / name)
    pd.testing.assert_frame_equal(written, predictor(paths[:10]), check_dtype=False, atol=1e-6)


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_a_file_cut_short_is_gone_on_with(run, paths, tmp_path, name):
    predictor, out = Predictor.load(run), tmp_path / name
    predict(predictor, paths[:6], out)
    out.write_bytes(out.read_bytes()[:-30])  # killed in the middle of a row
    outcome = predict(predictor, paths[:10], out, resume=True)
    assert outcome.already_done == 5
    assert outcome.n_images == 5
    assert read(out).path.tolist() == paths[:10]


def test_without_resume_a_file_is_replaced(run, paths, tmp_path):
    predictor = Predictor.load(run)
    predict(predictor, paths[:3], tmp_path / "out.csv")
    predict(predictor, paths[3:5], tmp_path / "out.csv")
    assert read(tmp_path / "out.csv").path.tolist() == paths[3:5]


def test_a_file_of_another_kind_is_not_gone_on_with(tmp_path):
    (tmp_path / "out.csv").write_text("path,other\na,b\n")
    with pytest.raises(BloodcellError, match="another kind"):
        PredictionFile(tmp_path / "out.csv", ["path", "predicted"], resume=True)
    with pytest.raises(BloodcellError, match="Cannot write"):
        PredictionFile(tmp_path / "out.xlsx", ["path"])


def test_names_in_no_encoding_are_written(tmp_path):
    file = PredictionFile(tmp_path / "out.csv", ["path"])
    names = ["caf\udce9.jpg", 'a "b", c.jpg', "new\nline.jpg"]
    file.append(pd.DataFrame({"path": names}))
    assert PredictionFile(tmp_path / "out.csv", ["path"], resume=True).done == set(names)


@pytest.fixture(scope="module")
def folds(run, tmp_path_factory):
    """A cross-validation of two models that disagree, calibrated each on its own."""
    parent = Run(tmp_path_factory.mktemp("runs") / "cv")
    parent.start(replace(run.config, folds=2), run.table)
    for number in (1, 2):
        fold = Run(shutil.copytree(run.path, parent.fold(number).path))
        if number == 2:
            state = load_file(fold.path / "model.safetensors")
            state["fc.weight"] = state["fc.weight"].flip(0)
            state["conv1.weight"] = state["conv1.weight"].flip(1)  # blue for red
            fold.save_weights(state, run.config.classes)  # and so it is calibrated anew
            interpret_run(fold)
        fold.finish()
    return parent


@pytest.mark.parametrize("tta", [False, True])
def test_folds_predict_together(folds, paths, tta, tmp_path):
    images = [*paths, draw_stripes(tmp_path)]
    table = Predictor.load(folds, tta=tta)(images)
    single = [Predictor.load(folds.fold(number), tta=tta)(images) for number in (1, 2)]
    shares = [part.filter(like="p_").to_numpy() for part in single]
    assert np.abs(shares[0] - shares[1]).max() > 1e-3  # so that their mean is neither
    assert np.allclose(table.filter(like="p_"), np.mean(shares, axis=0), atol=1e-6)
    assert (table.confidence == table.filter(like="p_").max(axis=1)).all()
    distances = np.stack([part.distance for part in single])
    assert np.allclose(table.distance, distances.mean(axis=0), atol=2e-3)
    limits = [folds.fold(number).calibration.distance_threshold for number in (1, 2)]
    assert limits[0] != limits[1]
    assert (table.flag == "unlike training").tolist() == (table.distance > np.mean(limits)).tolist()
    assert table.flag.iloc[-1] == "unlike training"
    apart = np.abs(distances[0] - distances[1]) > 4e-3
    nearer = np.where(distances[0] < distances[1], single[0].nearest, single[1].nearest)
    assert (table.nearest[apart] == nearer[apart]).all()
    assert (single[0].nearest != single[1].nearest)[apart].any()


def test_folds_flag_as_a_single_model_does(folds, paths):
    assert "uncertain" in set(Predictor.load(folds, min_confidence=1.0)(paths).flag)
    assert list(Predictor.load(folds)([])) == list(Predictor.load(folds.fold(1))([]))


def test_a_file_of_folds_is_gone_on_with(folds, paths, tmp_path):
    predictor, out = Predictor.load(folds), tmp_path / "out.csv"
    predict(predictor, paths[:6], out)
    out.write_bytes(out.read_bytes()[:-30])
    assert predict(predictor, paths[:10], out, resume=True).already_done == 5
    pd.testing.assert_frame_equal(read(out), predictor(paths[:10]), check_dtype=False, atol=2e-3)


def test_folds_that_are_not_all_there(folds, tmp_path):
    copy = Run(shutil.copytree(folds.path, tmp_path / "cv"))
    classes = copy.fold(2).config.classes
    replace(copy.config, folds=0, classes=classes[::-1]).save(copy.fold(2).path / "config.json")
    with pytest.raises(BloodcellError, match="folds of run cv are models of different kinds"):
        Predictor.load(copy)
    (copy.fold(2).path / "last" / "finished.json").unlink()
    with pytest.raises(BloodcellError, match="not trained to its end: fold-2 is missing") as left:
        Predictor.load(copy)
    assert "bloodcell fit --resume --name cv" in left.value.hint
