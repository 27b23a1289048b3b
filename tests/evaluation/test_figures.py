from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bloodcell_fastai.evaluation import figures
from bloodcell_fastai.evaluation.metrics import Evaluation, labelled_predictions
from bloodcell_fastai.evaluation.robustness import CLEAN, CORRUPTIONS


@pytest.fixture
def evaluation(demo_table):
    table = demo_table.iloc[::5].reset_index(drop=True)
    classes = tuple(sorted(set(table.label)))
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), len(table))
    predicted = pd.DataFrame(probabilities, columns=[f"p_{name}" for name in classes])
    predicted.insert(0, "path", table.path)
    predicted.insert(1, "predicted", np.array(classes)[probabilities.argmax(axis=1)])
    predicted.insert(2, "confidence", probabilities.max(axis=1))
    predicted.insert(3, "flag", "")
    return Evaluation(labelled_predictions(table, predicted), classes)


@pytest.fixture
def history():
    return pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "train_loss": [1.0, 0.6, 0.4],
            "valid_loss": [1.1, 0.7, 0.8],
            "train_accuracy": [0.5, 0.8, 0.9],
            "valid_accuracy": [0.4, 0.75, 0.7],
        }
    )


def texts(figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_the_matrix_shows_counts_and_proportions(evaluation):
    shown = texts(figures.plot_confusion_matrix(evaluation))
    matrix = evaluation.confusion_matrix
    assert shown[1] == f"{matrix[0, 1]}\n{matrix[0, 1] / matrix[0].sum():.1%}"
    assert len(shown) == 16


def test_the_curves_mark_the_best_epoch(history):
    loss, accuracy = figures.plot_history(history).axes
    assert [line.get_xydata().tolist() for line in accuracy.lines][2] == [[2, 0.75]]
    assert [line.get_xydata().tolist() for line in loss.lines][2] == [[2, 0.7]]


def test_top_losses_name_the_true_and_the_predicted_class(evaluation):
    figure = figures.plot_top_losses(evaluation, k=4)
    worst = evaluation.top_losses(1).iloc[0]
    title = figure.axes[0].get_title()
    assert f"true: {worst.label}" in title
    assert f"predicted: {worst.predicted}" in title
    assert f"loss {worst.loss:.2f}" in title


def test_coverage_ends_at_the_accuracy_of_all(evaluation):
    (axes,) = figures.plot_coverage(evaluation).axes
    covered, accuracy = axes.lines[0].get_xydata().T
    assert (np.diff(covered) > 0).all()
    assert (covered[-1], accuracy[-1]) == pytest.approx((1, evaluation.metrics["accuracy"]))
    thresholds = [row for row in evaluation.metrics["coverage"] if row["min_confidence"] > 0]
    marks = [tuple(line.get_xydata()[0]) for line in axes.lines[1:]]
    assert marks == [(row["coverage"], row["accuracy"]) for row in thresholds if row["n_images"]]


def test_reliability_counts_every_image_once(evaluation):
    upper, lower = figures.plot_reliability(evaluation).axes
    assert sum(bar.get_height() for bar in lower.patches) == len(evaluation.predictions)
    table = evaluation.predictions
    last = table[table.confidence >= np.floor(table.confidence.max() * 15) / 15]
    shown = upper.lines[-1].get_xydata()[-1]
    assert shown == pytest.approx((last.confidence.mean(), (last.label == last.predicted).mean()))


def test_reliability_shows_what_calibration_changed(evaluation):
    calibrated = Evaluation(evaluation.predictions, evaluation.classes, temperature=2.0)
    perfect, before, after = figures.plot_reliability(calibrated).axes[0].lines
    assert perfect.get_label() == "perfect calibration"
    assert before.get_label() == "before calibration"
    own = calibrated.probabilities**2
    own = own / own.sum(axis=1, keepdims=True)
    assert before.get_xdata()[-1] == pytest.approx(
        own.max(axis=1)[own.max(axis=1) >= 14 / 15].mean()
    )
    assert np.mean(before.get_xdata()) > np.mean(after.get_xdata())


def test_robustness_has_a_panel_for_each_corruption():
    rows = [(CLEAN, 0, 0.0, "", 0.9)]
    for corruption in CORRUPTIONS:
        for strength, setting in enumerate(corruption.settings, start=1):
            rows.append((corruption.kind, strength, setting, corruption.unit, 0.9 - strength / 10))
    table = pd.DataFrame(rows, columns=["kind", "strength", "setting", "unit", "accuracy"])
    table = table.assign(accuracy_low=table.accuracy - 0.1, accuracy_high=table.accuracy + 0.1)
    figure = figures.plot_robustness(table)
    assert [axis.get_title().lower() for axis in figure.axes] == [
        corruption.kind.lower() for corruption in CORRUPTIONS
    ]
    clean, accuracy = figure.axes[-1].lines
    assert set(clean.get_ydata()) == {0.9}
    assert accuracy.get_ydata() == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4])
    (axis,) = figures.plot_robustness(table, ["blur"]).axes
    assert axis.get_title() == "Blur"


def test_copies_are_joined_by_their_matching_features(demo_table):
    first, second = demo_table[demo_table.photo == demo_table.photo[0]].path[:2]
    other = demo_table.path[demo_table.photo != demo_table.photo[0]].iloc[0]
    pair, strangers = figures.plot_copies([(first, second), (first, other)], matches=5).axes
    assert len(pair.lines) == 5
    assert "training: " in pair.get_title() and "validation: " in pair.get_title()
    assert len(strangers.lines) == 0 and "0 matching features" in strangers.get_title()


def test_a_figure_as_svg_takes_the_colours_of_its_page(history):
    svg = figures.figure_svg(figures.plot_history(history, ["loss"]))
    assert svg == figures.figure_svg(figures.plot_history(history, ["loss"]))
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "currentColor" in svg and "#000000" not in svg
    assert f"var(--c0, {figures.BLUE})" in svg
    assert "prefers-color-scheme: dark" in svg


def test_a_class_named_like_mathematics(evaluation):
    odd = "$x$ $\\bad$"
    table = evaluation.predictions.rename(columns={f"p_{evaluation.classes[0]}": f"p_{odd}"})
    table = table.replace({evaluation.classes[0]: odd})
    renamed = Evaluation(table, (odd, *evaluation.classes[1:]))
    assert "<svg" in figures.figure_svg(figures.plot_confusion_matrix(renamed))


def test_the_contact_sheet_names_every_class(demo_table):
    figure = figures.contact_sheet(demo_table, per_class=3)
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert [label.split("\n")[0] for label in labels] == sorted(set(demo_table.label))


@pytest.mark.parametrize("name", ["matrix", "curves", "losses"])
def test_pictures_are_written(evaluation, history, tmp_path, name):
    figure = {
        "matrix": lambda: figures.plot_confusion_matrix(evaluation),
        "curves": lambda: figures.plot_history(history),
        "losses": lambda: figures.plot_top_losses(evaluation),
    }[name]()
    figures.save_figure(figure, tmp_path / "new" / "figure.png")
    with Image.open(tmp_path / "new" / "figure.png") as image:
        assert min(image.size) >= 600
