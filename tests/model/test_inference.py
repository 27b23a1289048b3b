"""The one way to predict: the same table from a run, a learner, a stream and an ensemble."""

import inspect
import shutil
import weakref

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from bloodcell_fastai import (
    BloodcellError,
    Predictor,
    Run,
    blood_dls,
    blood_learner,
    calibrate,
    measure_robustness,
    robustness_images,
)
from bloodcell_fastai.data import crop
from bloodcell_fastai.data.cache import ImageReader
from bloodcell_fastai.model.model import load_model


@pytest.fixture(scope="module")
def expected(trained):
    """What ``interpret`` wrote for the validation images."""
    written = pd.read_csv(trained.path / "predictions.csv", keep_default_na=False)
    return trained.absolute(written)


@pytest.fixture(scope="module")
def paths(expected):
    return expected.path.tolist()


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """The same predictions, whatever the batches they were made in."""
    exact = found.columns.drop("distance", errors="ignore")
    pd.testing.assert_frame_equal(found[exact], expected[exact], atol=1e-6)
    if "distance" in found:  # a small one is the root of a difference, in which errors grow
        assert np.allclose(found.distance, expected.distance, atol=2e-3)


def test_it_predicts_what_interpret_does(trained, expected, paths):
    """The one table; interpret adds the label, the loss and the photograph."""
    table = Predictor.load(trained.path, device="cpu")(paths)
    classes = trained.config.classes
    columns = ["path", "predicted", "confidence", "flag", *(f"p_{c}" for c in classes)]
    assert list(table) == [*columns, "distance", "nearest"]
    assert [name for name in expected if name not in ("label", "loss", "photo")] == list(table)
    assert_same(table, expected[list(table)])
    assert table.nearest.isin(trained.table.path[trained.table.part == "train"]).all()


def test_a_predictor_is_used_again(trained, paths):
    predictor = Predictor.load(trained)
    both = pd.concat([predictor(paths[:3]), predictor(paths[3:5])], ignore_index=True)
    assert_same(both, predictor(paths[:5]))


def test_an_image_can_be_given_twice(trained, paths):
    table = Predictor.load(trained)([paths[0], paths[1], paths[0]])
    assert table.path.tolist() == [paths[0], paths[1], paths[0]]
    assert table.confidence[0] == pytest.approx(table.confidence[2], abs=1e-6)


def test_no_images_give_an_empty_table(trained, paths):
    predictor = Predictor.load(trained)
    assert list(predictor([])) == predictor.columns == list(predictor(paths[:1]))
    assert len(predictor([])) == 0


def test_a_batch_at_a_time(trained, paths):
    predictor = Predictor.load(trained)
    predictor.batch_size = 4
    drawn = []
    batches = list(predictor.stream(drawn.append(path) or path for path in paths[:10]))
    assert [len(batch.table) for batch in batches] == [4, 4, 2]
    assert drawn == paths[:10]
    first = batches[0]
    assert first.pictures.paths == first.table.path.tolist() == paths[:4]
    assert first.pictures.pixels.shape == (4, 3, 64, 64)
    assert first.logits.shape == (4, 4) and first.logits.dtype == np.float64
    assert first.features.shape == (4, 512) and first.features.dtype == torch.float32
    scaled = torch.tensor(first.logits / trained.calibration.temperature).softmax(dim=1)
    assert np.allclose(scaled, first.table.filter(like="p_"), atol=1e-6)
    assert_same(pd.concat([b.table for b in batches], ignore_index=True), predictor(paths[:10]))


def test_predicting_many_images_keeps_no_pixels(trained, paths):
    """Those of a large data set would not fit into memory."""
    pixels, alive = [], []

    class Watched(ImageReader):
        def batches(self, chunks):
            for batch in super().batches(chunks):
                pixels.append(weakref.ref(batch.pixels))
                yield batch
                del batch
                alive.append(sum(each() is not None for each in pixels))

    predictor = Predictor.load(trained)
    predictor.batch_size = 2
    table = predictor.predict_all(paths[:12], Watched(64)).table
    assert len(table) == 12
    assert len(pixels) == 6 and max(alive) <= 1


def test_images_that_are_decoded_already(trained, paths, monkeypatch):
    """From a cache the nucleus is not searched for again, and the flags are the same."""
    predictor = Predictor.load(trained)
    reader = ImageReader.open(paths, 64, build=True)
    expected = predictor(paths)
    monkeypatch.setattr(crop, "_locate", None)  # a search would fail
    assert_same(predictor.predict_all(paths, reader).table, expected)
    monkeypatch.undo()
    pictures = predictor.read(paths[:3])
    assert_same(predictor.predict(pictures).table, expected[:3])
    logits, features = predictor.forward(pictures.pixels)
    assert logits.shape == (3, 4) and features.shape == (3, 512)


def test_the_predictor_of_a_learner(demo_table, trained):
    """In a notebook, before anything is saved; without a reference nothing is compared."""
    dls = blood_dls(trained.table, "resnet18", size=64, bs=8, cache=False)
    learn = blood_learner(dls, weights="none")
    predictor = Predictor.from_learner(learn, min_confidence=1.0)
    assert (predictor.arch, predictor.size, predictor.crop) == ("resnet18", 64, "cell")
    assert predictor.classes == tuple(dls.vocab)
    table = predictor(demo_table.path[:3])
    assert list(table) == [
        "path",
        "predicted",
        "confidence",
        "flag",
        *(f"p_{c}" for c in dls.vocab),
    ]
    assert (table.flag == "uncertain").all()
    with learn.no_bar():
        expected, _ = learn.get_preds(dl=dls.test_dl(demo_table[:3]))
    assert np.allclose(table.filter(like="p_"), expected, atol=1e-2)  # bfloat16 where it is fast


def test_predictions_of_low_confidence_are_flagged(trained, paths):
    table = Predictor.load(trained, min_confidence=1.0)(paths)
    assert set(table.flag) <= {"uncertain", "unlike training", "no cell"}
    assert "uncertain" in set(table.flag)
    assert "uncertain" not in set(Predictor.load(trained)(paths).flag)


def draw_stripes(folder) -> str:
    """An image as purple as a nucleus, but of none."""
    pixels = np.full((64, 64, 3), 235, np.uint8)
    pixels[:, ::4] = pixels[:, 1::4] = (90, 40, 160)
    Image.fromarray(pixels).save(folder / "stripes.png")
    return str(folder / "stripes.png")


def test_images_unlike_training_are_flagged(trained, paths, tmp_path):
    table = Predictor.load(trained)([*paths, draw_stripes(tmp_path)])
    assert table.flag.iloc[-1] == "unlike training"
    assert table.distance.iloc[-1] > table.distance[:-1].max()
    assert (table.flag[:-1] == "unlike training").mean() < 0.1


@pytest.mark.parametrize("empty", ["grey", "smear"])
def test_images_without_a_white_cell_are_flagged(trained, paths, empty, tmp_path):
    """The flag comes before any other but those of light: what the network saw was no cell."""
    image = Image.new("RGB", (64, 64), empty if empty != "smear" else (235, 225, 215))
    if empty == "smear":  # red cells alone
        for x in range(6, 64, 18):
            ImageDraw.Draw(image).ellipse((x, 20, x + 14, 34), fill=(222, 160, 150))
    image.save(tmp_path / "empty.png")
    predictor = Predictor.load(trained, min_confidence=1.0)
    table = predictor([*paths[:5], str(tmp_path / "empty.png")])
    assert table.flag.iloc[-1] == "no cell"
    assert (table.flag == "no cell").sum() == 1


@pytest.mark.parametrize("crop", ["cell", "frame"])
def test_pictures_of_far_too_little_or_too_much_light_are_flagged(trained, paths, crop, tmp_path):
    """Before any other flag, whatever the crop; and no others of the demo."""
    cell = np.asarray(Image.open(paths[0]).convert("RGB"), float)
    kinds = {"black": cell / 16, "dark": cell / 4, "pale": 200 + cell / 8, "white": 247 + cell / 32}
    for name, pixels in kinds.items():
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
    predictor = Predictor.load(trained, min_confidence=1.0)
    predictor.reader.crop = crop
    flags = predictor([*paths, *(tmp_path / f"{name}.png" for name in kinds)]).flag.tolist()
    assert [flags[-4], flags[-1]] == ["nearly black", "nearly white"]
    assert not {*flags[:-4], flags[-3], flags[-2]} & {"nearly black", "nearly white"}


def test_turned_images_give_the_same_prediction_with_tta(trained, paths, tmp_path):
    image = Image.open(paths[0]).resize((64, 64)).convert("L")  # no stain: all of it is seen
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    files = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    both = (Predictor.load(trained, tta, full_precision=True) for tta in (False, True))
    tables = [predictor(files) for predictor in both]
    spread = [np.ptp(t.filter(like="p_").to_numpy(), axis=0).max() for t in tables]
    assert spread[1] < 1e-5 < 1e-4 < spread[0]
    # Of the image as it is, for which the threshold was fitted; bfloat16 may round otherwise.
    assert np.allclose(tables[1].distance, tables[0].distance, atol=1e-2)


def test_what_no_temperature_was_fitted_for_is_not_called_calibrated(trained, folds):
    assert Predictor.load(trained).calibrated
    assert not Predictor.load(trained, tta=True).calibrated
    assert not Predictor.load(folds).calibrated


@pytest.fixture
def fails(trained):
    """A predictor whose network raises an error for more than a number of images."""

    def make(error: RuntimeError, above: int) -> Predictor:
        predictor = Predictor.load(trained)

        def forward(module, args):
            if len(args[0]) > above:
                raise error

        predictor.model.register_forward_pre_hook(forward)
        return predictor

    return make


def test_short_memory_halves_the_batch_and_changes_nothing(fails, trained, paths):
    predictor = fails(torch.OutOfMemoryError("CUDA out of memory"), above=5)
    with pytest.warns(UserWarning, match="Memory is short"):
        table = predictor(paths)
    assert_same(table, Predictor.load(trained)(paths))
    assert predictor.batch_size <= 5


def test_no_memory_for_one_image_is_an_error(fails, paths):
    predictor = fails(torch.OutOfMemoryError("CUDA out of memory"), above=0)
    with (
        pytest.warns(UserWarning, match="Memory is short"),
        pytest.raises(BloodcellError, match="no memory"),
    ):
        predictor(paths[:4])


def test_other_failures_are_not_taken_for_short_memory(fails, paths):
    with pytest.raises(RuntimeError, match="shapes"):
        fails(RuntimeError("shapes do not match"), above=0)(paths[:4])


def test_an_unreadable_image_is_named(trained, paths, tmp_path):
    (tmp_path / "c.jpg").write_text("no image")
    predictor = Predictor.load(trained)
    with pytest.raises(ValueError, match=r"1 of the images .*/c\.jpg") as caught:
        predictor([paths[0], tmp_path / "c.jpg"])
    assert isinstance(caught.value, BloodcellError)
    (batch,) = predictor.stream([paths[0], tmp_path / "c.jpg"])
    assert batch.table.path.tolist() == [paths[0]]
    assert list(batch.pictures.unreadable) == [str(tmp_path / "c.jpg")]


def test_a_min_confidence_that_makes_no_sense(trained):
    with pytest.raises(ValueError, match="min_confidence is 50") as caught:
        Predictor.load(trained, min_confidence=50)
    assert caught.value.exit_code == 2


def test_a_run_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="nowhere is not a run"):
        Predictor.load("nowhere")


@pytest.fixture(scope="module")
def folds(trained, tmp_path_factory):
    """A cross-validation of two models that disagree, calibrated each on its own."""
    parent = Run(tmp_path_factory.mktemp("runs") / "cv")
    parent.start(trained.asked, trained.config.changed(folds=2), trained.table)
    for number in (1, 2):
        fold = Run(shutil.copytree(trained.path, parent.fold(number).path))
        if number == 2:
            state = load_file(fold.path / "model.safetensors")
            state["fc.weight"] = state["fc.weight"].flip(0)
            state["conv1.weight"] = state["conv1.weight"].flip(1)  # blue for red
            fold.save_weights(state, trained.config.classes)
            fold.save_calibration(*calibrate(Predictor.load(fold), fold.table))
    return parent


@pytest.mark.parametrize("tta", [False, True])
def test_folds_predict_together(folds, paths, tta, tmp_path):
    images = [*paths[:12], draw_stripes(tmp_path)]
    together = Predictor.load(folds, tta=tta)
    single = [Predictor.load(folds.fold(number), tta=tta)(images) for number in (1, 2)]
    limits = [
        float(np.quantile(part.distance, q)) for part, q in zip(single, (0.3, 0.6), strict=True)
    ]
    # So that they disagree on any machine.
    for member, limit in zip(together.members, limits, strict=True):
        changes = {"distance_threshold": limit}
        member.calibration = member.calibration.model_copy(update=changes)
    table = together(images)
    parts = [part.filter(like="p_").to_numpy() for part in single]
    assert np.abs(parts[0] - parts[1]).max() > 1e-3  # so that their mean is neither
    assert np.allclose(table.filter(like="p_"), np.mean(parts, axis=0), atol=1e-6)
    assert (table.confidence == table.filter(like="p_").max(axis=1)).all()
    distances = np.stack([part.distance for part in single])
    assert np.allclose(table.distance, distances.mean(axis=0), atol=2e-3)
    unlike = distances > np.array(limits)[:, None]
    assert (unlike[0] != unlike[1]).any()
    clear = (np.abs(distances - np.array(limits)[:, None]) > 4e-3).all(axis=0)
    flagged = (table.flag == "unlike training").to_numpy()
    assert (flagged == unlike.all(axis=0))[clear].all()
    assert clear.sum() > len(images) / 2
    apart = np.abs(distances[0] - distances[1]) > 4e-3
    nearer = np.where(distances[0] < distances[1], single[0].nearest, single[1].nearest)
    assert (table.nearest[apart] == nearer[apart]).all()
    assert (single[0].nearest != single[1].nearest)[apart].any()


def test_folds_are_a_predictor_like_any(folds, trained, paths):
    """Whatever works with the predictor of one model works with that of several."""
    single = Predictor.load(trained, min_confidence=1.0)
    together = Predictor.load(folds, min_confidence=1.0)
    assert isinstance(together, Predictor)
    public = {name for name, _ in inspect.getmembers(single) if not name.startswith("_")}
    assert public <= {name for name, _ in inspect.getmembers(together)}
    for name in ("arch", "size", "crop", "classes", "device", "batch_size", "tta", "columns"):
        assert getattr(together, name) == getattr(single, name), name
    assert "uncertain" in set(together(paths).flag)
    assert list(together([])) == single.columns

    together.batch_size = 4
    batches = list(together.stream(paths[:6]))
    assert [len(batch.table) for batch in batches] == [4, 2]
    assert batches[0].features.shape == (4, 2 * 512)
    probabilities = batches[0].table.filter(like="p_")
    assert np.allclose(np.exp(batches[0].logits), probabilities)
    pictures = together.read(paths[:2])
    assert_same(together.predict(pictures).table, together(paths[:2]))
    logits, _ = together.forward(pictures.pixels)
    assert np.allclose(logits, batches[0].logits[:2], atol=1e-6)


@pytest.mark.slow
def test_the_robustness_of_folds_is_measured(folds, trained):
    images = robustness_images(trained.table, 4)
    assert len(measure_robustness(Predictor.load(folds), images)) == 41


def test_folds_that_are_not_all_there(folds, tmp_path):
    copy = Run(shutil.copytree(folds.path, tmp_path / "cv"))
    second = copy.fold(2)
    other = second.config.changed(classes=second.config.classes[::-1])
    second.start(second.asked, other, second.table)
    with pytest.raises(ValueError, match="folds of run cv are models of different kinds"):
        Predictor.load(copy)
    (second.path / "last" / "finished.json").unlink()
    with pytest.raises(BloodcellError, match="not trained to its end: fold-2 is missing") as left:
        Predictor.load(copy)
    assert "bloodcell fit --resume --name cv" in left.value.hint


def test_features_are_what_the_classifier_multiplies():
    model, _ = load_model("resnet18", 4, 64, "none")
    predictor = Predictor(model, "resnet18", 64, "cell", "abcd", full_precision=True)
    pixels = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    logits, features = predictor.forward(pixels)
    assert features.shape == (3, 512)
    assert features.dtype == torch.float32
    by_hand = features @ model.fc.weight.T + model.fc.bias
    assert np.allclose(by_hand.detach(), logits, atol=1e-5)
    assert not model.fc._forward_pre_hooks


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
    model = timm.create_model(arch, num_classes=3)
    size = model.default_cfg["input_size"][-1]
    predictor = Predictor(model, arch, size, "cell", "abc")
    logits, features = predictor.forward(torch.zeros(3, 3, size, size, dtype=torch.uint8))
    assert logits.shape == (3, 3)
    assert features.shape == (3, model.head_hidden_size)
