"""What a model gets right: fastai's interpretation from one pass, and the results of a run."""

import json
import shutil

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import ClassificationInterpretation, ImageDataLoaders, Resize
from nbclient import NotebookClient
from PIL import Image

from bloodcell_fastai import (
    BloodcellError,
    BloodInterpretation,
    Config,
    Run,
    blood_dls,
    blood_learner,
    interpret_run,
    load_learner,
    split_table,
    timm_model,
)
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.evaluation.external import open_test
from bloodcell_fastai.evaluation.interpretation import read_metrics, summarise
from bloodcell_fastai.model.pretrained import pretrained_path
from bloodcell_fastai.serving.card import model_card


@pytest.fixture(scope="module")
def table(demo_table):
    """Split at random: copies of most photographs are in both parts."""
    return split_table(demo_table, "random")


@pytest.fixture(scope="module")
def learn(table):
    """An untrained learner; what matters here is that all is of one prediction."""
    return blood_learner(blood_dls(table, "resnet18", 64, 16, device="cpu"), weights="none")


@pytest.fixture(scope="module")
def interp(learn):
    return BloodInterpretation.from_learner(learn)


@pytest.fixture(scope="module")
def theirs(learn):
    """fastai's own interpretation of the same learner."""
    with learn.no_bar():
        yield ClassificationInterpretation.from_learner(learn)


@pytest.fixture(autouse=True)
def _no_figures():
    plt.close("all")


def start(path, table, demo_root, learn) -> Run:
    """A run with the learner's model, as training would leave it."""
    run = Run(path)
    config = {"data": str(demo_root), "arch": "resnet18", "size": 64, "split": "random"}
    run.start(Config(**config), ResolvedConfig(**config, classes=tuple(learn.dls.vocab)), table)
    run.save_model(learn)
    return run


def test_it_is_fastais_interpretation(interp, theirs, learn):
    assert isinstance(interp, ClassificationInterpretation)
    matrix = interp.confusion_matrix()
    assert np.array_equal(matrix, theirs.confusion_matrix())
    assert matrix.dtype == theirs.confusion_matrix().dtype
    assert list(interp.vocab) == list(theirs.vocab)
    assert interp.most_confused(2) == theirs.most_confused(2)
    with learn.no_bar():
        probabilities, targets = learn.get_preds(dl=learn.dls.valid)
    expected = torch.nn.functional.nll_loss(probabilities.log(), targets, reduction="none")
    assert np.allclose(interp.losses, expected, atol=1e-4)
    assert np.allclose(interp.evaluation.probabilities, probabilities, atol=1e-6)


def test_no_plot_changes_the_confusion_matrix(interp):
    before = interp.confusion_matrix()
    interp.most_confused()  # fastai's sets the diagonal of its matrix to 0
    assert np.array_equal(interp.confusion_matrix(), before)
    assert np.trace(before) > 0


@pytest.mark.parametrize("largest", [True, False])
def test_top_losses(interp, theirs, largest):
    losses, indices = interp.top_losses(5, largest)
    expected, _ = theirs.top_losses(5, largest)
    assert (type(losses), losses.shape, losses.dtype) == (
        *(type(expected), expected.shape),
        expected.dtype,
    )
    assert losses.tolist() == sorted(interp.losses.tolist(), reverse=largest)[:5]
    assert torch.equal(interp.losses[indices], losses)
    *_, items = interp.top_losses(5, largest, items=True)
    assert items.path.tolist() == interp.predictions.path[indices.numpy()].tolist()
    assert items.columns.tolist() == theirs.top_losses(5, items=True)[2].columns.tolist()
    assert len(interp.top_losses()[0]) == len(interp.predictions)


@pytest.mark.parametrize("indices", [3, [0, 2, 1], torch.tensor([1, 3])])
def test_images_by_their_number(interp, theirs, learn, indices):
    """Inputs, predictions, targets, decoded predictions and losses, as fastai gives them."""
    ours = interp[indices]
    with learn.no_bar():
        expected = theirs[indices]
    assert len(ours) == len(expected) == 5
    for a, b in zip(ours[:4], expected[:4], strict=True):
        assert (type(a), a.shape, a.dtype, a.device) == (type(b), b.shape, b.dtype, b.device)
        assert torch.allclose(a.float(), b.float(), atol=1e-4)
    assert (type(ours[4]), ours[4].shape) == (type(expected[4]), expected[4].shape)
    numbers = torch.atleast_1d(torch.as_tensor(indices))
    assert torch.equal(ours[4], interp.losses[numbers])


def test_all_of_it_comes_from_one_pass(learn, table):
    seen = []
    handle = timm_model(learn).register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with handle:
        interp = BloodInterpretation.from_learner(learn)
        interp.confusion_matrix()
        interp.most_confused()
        interp.top_losses(3, items=True)
        interp.print_classification_report()
        interp.plot_confusion_matrix()
        interp.plot_top_losses(4)
        interp.show_results([0, 1])
        assert interp.metrics["n_images"] == len(interp.predictions)
        interp.by_photo()
    assert sum(seen) == (table.part == "valid").sum()


def test_the_plots(interp):
    """Drawn by pyplot, so that a notebook shows them; see the last test."""
    interp.plot_confusion_matrix(normalize=True, title="Mine")
    (axes,) = plt.gcf().axes
    assert axes.get_title() == "Mine"
    matrix = interp.confusion_matrix()
    shown = [float(text.get_text()) for text in axes.texts]
    assert shown == pytest.approx((matrix / matrix.sum(1, keepdims=True)).ravel(), abs=0.006)

    interp.plot_top_losses(4, figsize=(6, 6))
    drawn = [axis for axis in plt.gcf().axes if axis.images]
    assert len(drawn) == 4
    losses, indices = interp.top_losses(4)
    for axis, loss, index in zip(drawn, losses, indices, strict=True):
        row = interp.predictions.iloc[int(index)]
        predicted, actual, shown, _ = axis.get_title().split("/")
        assert (predicted.strip(), actual.strip()) == (row.predicted, row.label)
        assert float(shown) == pytest.approx(float(loss), abs=0.01)
    interp.plot_top_losses(range(2), largest=False)
    interp.show_results([0, 1, 2])
    assert len([axis for axis in plt.gcf().axes if axis.images]) == 3


def test_the_report(interp, capsys):
    interp.print_classification_report()
    shown = capsys.readouterr().out
    assert "EOSINOPHIL" in shown and "macro avg" in shown
    assert f"{interp.metrics['accuracy']:.4f}" in shown


def test_what_fastai_has_not(interp, table):
    metrics, valid = interp.metrics, table[table.part == "valid"]
    low, high = metrics["accuracy_ci95"]
    assert low <= metrics["accuracy"] <= high
    assert metrics["n_photos"] == valid.photo.nunique() == len(interp.by_photo())
    assert metrics["n_known"] == len(valid)
    assert metrics["leakage"] > 0.5
    assert metrics["temperature"] == 1.0  # not calibrated
    assert interp.predictions.path.tolist() == valid.path.tolist()


def test_other_images_than_the_validation_part(learn, table, demo_table):
    train = BloodInterpretation.from_learner(learn, ds_idx=0)
    assert train.predictions.path.tolist() == table.path[table.part == "train"].tolist()
    assert train.metrics["leakage"] == 1

    rows = demo_table[demo_table.label != "MONOCYTE"][::9]
    dl = learn.dls.test_dl(rows, with_labels=True)
    interp = BloodInterpretation.from_learner(learn, dl=dl)
    assert interp.predictions.path.tolist() == rows.path.tolist()
    assert interp.predictions.label.tolist() == rows.label.tolist()
    assert interp.confusion_matrix().shape == (4, 4)
    assert interp.confusion_matrix()[2].sum() == 0
    inputs, *_, losses = interp[[1, 0]]
    assert torch.equal(inputs, dl.one_batch()[0][[1, 0]])
    assert losses.tolist() == [interp.losses[1], interp.losses[0]]


def test_labels_the_model_does_not_know(learn, demo_table):
    dl = learn.dls.test_dl(demo_table[:4].assign(label="other"), with_labels=True)
    with pytest.raises(ValueError, match="Not a class of this model: other"):
        BloodInterpretation.from_learner(learn, dl=dl)


def test_another_activation(learn, interp):
    raw = BloodInterpretation.from_learner(learn, act=torch.sigmoid)
    assert torch.allclose(raw[[0]][1], torch.sigmoid(torch.logit(raw[[0]][1])))
    assert not torch.allclose(raw[[0]][1], interp[[0]][1])


def test_batches_of_another_origin_are_refused(learn, demo_table):
    """They do not say which photograph an image is of."""
    paths = demo_table.path[:8].tolist()
    dls = ImageDataLoaders.from_lists(
        "/", paths, demo_table.label[:8].tolist(), item_tfms=Resize(64), bs=2
    )
    with pytest.raises(ValueError, match="no image table") as caught:
        BloodInterpretation.from_learner(learn, dl=dls.valid)
    assert isinstance(caught.value, BloodcellError)
    assert "ClassificationInterpretation" in caught.value.hint


@pytest.mark.slow
def test_a_notebook_shows_every_plot_of_a_cell(trained, tmp_path, monkeypatch):
    """Not only what the last line of the cell gives back."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    cells = [
        "from bloodcell_fastai import BloodInterpretation, Run, load_learner\n"
        f"run = Run.open({str(trained.path)!r})\n"
        "interp = BloodInterpretation.from_learner(load_learner(run))",
        "interp.plot_confusion_matrix()\ninterp.plot_top_losses(4)\nprint('done')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[1].outputs
    assert [o.text for o in outputs if o.output_type == "stream"] == ["done\n"]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(images) == 2
    assert all(len(image.data["image/png"]) > 5000 for image in images)


def test_the_package_is_not_written_into():
    before = sorted(pretrained_path("pbc").rglob("*"))
    with pytest.raises(BloodcellError, match="ships with the package, without the images"):
        interpret_run(Run.open("pbc"))
    assert sorted(pretrained_path("pbc").rglob("*")) == before


def test_a_run_without_a_model_is_refused(table, tmp_path):
    run = Run(tmp_path)
    run.start(Config(), ResolvedConfig(), table)
    for use in (interpret_run, load_learner):
        with pytest.raises(BloodcellError, match="no model yet"):
            use(run)


def test_a_run_is_interpreted_with_its_best_weights(learn, table, interp, demo_root, tmp_path):
    run = start(tmp_path, table, demo_root, learn)
    assert run.calibration is None  # as after a kill before it was made
    result = interpret_run(run)
    logits = torch.tensor(interp.evaluation.probabilities).log() / run.calibration.temperature
    assert np.allclose(result.probabilities, logits.softmax(1), atol=1e-6)
    assert result.leakage > 0.5  # split at random, photographs known

    metrics = result.metrics
    assert metrics["temperature"] == run.calibration.temperature
    assert metrics["ece"] == pytest.approx(run.calibration.ece_after)
    assert metrics["ece_uncalibrated"] == pytest.approx(interp.metrics["ece"], abs=1e-6)
    assert metrics["accuracy"] == interp.metrics["accuracy"]
    assert json.loads((run.path / "metrics.json").read_text()) == read_metrics(run)
    assert read_metrics(run)["accuracy"] == metrics["accuracy"]
    assert "Leakage: " in summarise(result, run.config)

    predictions = result.predictions
    assert predictions.columns.tolist()[-2:] == ["distance", "nearest"]
    assert predictions.nearest.isin(run.table.path[run.table.part == "train"]).all()
    flagged = (predictions.distance > run.calibration.distance_threshold).mean()
    assert 0 < flagged <= 0.1  # a twentieth of 28 images, counted in whole ones
    assert ((predictions.flag == "unlike training").mean()) == flagged
    # The table on disk says the same.
    again = run.absolute(pd.read_csv(run.path / "predictions.csv", keep_default_na=False))
    pd.testing.assert_frame_equal(again, predictions, check_dtype=False, rtol=1e-6)


def test_a_learner_comes_back(learn, table, demo_root, tmp_path):
    run = start(tmp_path, table, demo_root, learn)
    again = load_learner(run)
    assert (again.arch, again.size, again.crop) == ("resnet18", 64, "cell")
    assert list(again.dls.vocab) == list(learn.dls.vocab)
    expected = timm_model(learn).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in timm_model(again).state_dict().items())


def test_images_without_a_cell_are_flagged_in_the_results_too(trained, tmp_path):
    """As ``predict`` flags them."""
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "empty.png")
    Image.new("RGB", (64, 64), "black").save(tmp_path / "black.png")
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    rows = pd.DataFrame({"path": [str(tmp_path / n) for n in ("empty.png", "black.png")]})
    rows = rows.assign(label="MONOCYTE", subset="", photo="", part="valid")
    run.start(trained.asked, trained.config, pd.concat([trained.table, rows], ignore_index=True))
    calibration = (run.path / "calibration.json").read_bytes()
    result = interpret_run(run)
    assert (run.path / "calibration.json").read_bytes() == calibration  # as it was
    written = pd.read_csv(run.path / "predictions.csv", keep_default_na=False)
    columns = ["path", "label", "predicted", "confidence", "loss", "photo", "flag"]
    assert list(written)[:7] == columns
    assert written.flag[-2:].tolist() == ["no cell", "nearly black"]
    assert set(written.flag[:-2]) <= {"", "unlike training"}
    assert written.photo[-2:].tolist() == ["", ""]
    assert result.metrics["n_known"] == len(written) - 2


def test_the_test_folder_is_scored_at_the_end(trained):
    table = trained.table
    test, metrics = table[table.part == "test"], read_metrics(trained)["test"]
    assert set(test.subset) == {"TEST"}
    assert metrics["n_images"] == len(test)
    assert metrics["excluded"] == 0
    folder = trained.path / "on" / f"{trained.root.name}-TEST"
    there = pd.read_csv(folder / "predictions.csv")
    assert sorted(there.path) == sorted(trained.relative(test).path)
    assert (there.label == there.predicted).mean() == pytest.approx(metrics["accuracy"])
    assert "neither trained nor chose the epoch" in (trained.report / "index.html").read_text()
    assert "On the test set `TEST`" in model_card(trained, "timm")


def test_copies_of_training_photographs_are_left_out_of_the_test_folder(trained, tmp_path):
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    table = run.table
    one = table.index[table.part == "test"][0]
    table.loc[one, "photo"] = table.photo[table.part == "train"].iloc[0]
    run.start(run.asked, run.config, table)
    external = open_test(run)
    assert external.excluded == 1
    assert set(external.table.path) == set(table.path[table.part == "test"].drop(one))


def test_a_test_folder_of_training_images_is_not_scored(trained, tmp_path):
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    table = run.table
    trained_on = table.path[table.part == "train"].iloc[0]
    paths = table.path.where(table.part != "test", trained_on)
    run.start(run.asked, run.config, table.assign(path=paths))
    result = interpret_run(run)
    assert "was trained on every image" in result.metrics["test"]["problem"]
    assert "Test set: not scored" in summarise(result, run.config)


def test_a_run_that_was_not_interpreted(trained, tmp_path):
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    (run.path / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="not interpreted yet") as caught:
        read_metrics(run)
    assert "bloodcell interpret run" in caught.value.hint


def test_lost_images_are_named(learn, table, demo_root, tmp_path):
    run = start(tmp_path, table.assign(path="/gone.jpg"), demo_root, learn)
    with pytest.raises(FileNotFoundError, match=r"images are gone, such as /gone\.jpg") as caught:
        interpret_run(run)
    assert isinstance(caught.value, BloodcellError)
    assert "`data`" in caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [("accuracy", 2), ("accuracy_ci95", [0.5]), ("classes", []), ("n_known", -1), ("leakage", "x")],
)
def test_edited_metrics_are_refused(trained, tmp_path, field, value):
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    path = run.path / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"metrics\.json: {field}") as caught:
        read_metrics(run)
    assert "bloodcell interpret run" in caught.value.hint
