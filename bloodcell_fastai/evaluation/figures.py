"""Figures for papers and reports: each function returns a matplotlib Figure and saves nothing.

The colours are from the colour-blind-safe palette of Okabe and Ito (2008).
"""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..data.duplicates import match_pair
from ..data.images import open_image
from ..errors import printable
from ..files import atomic_path
from ..model.calibration import CALIBRATION_BINS, reliability
from .metrics import Evaluation, coverage, uncalibrated

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
# matplotlib types these keys differently in each version.
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "text.parse_math": False,  # a class name with dollar signs is not a formula
}
# The colours of figure_svg on a dark page.
DARK = {BLUE: "#56B4E9", ORANGE: "#F0882F", GREY: "#A3ACB8"}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to ``path``, atomically, in the format of its suffix."""
    for text in figure.findobj(Text):  # names of files and classes may hold anything
        text.set_text(printable(text.get_text()))
    with atomic_path(path) as temporary, rc_context(STYLE):
        figure.savefig(temporary)


def figure_svg(figure: Figure) -> str:
    """A figure as a transparent SVG file, as text, for light and for dark pages.

    On a dark page the text is light and the colours of this module are lighter.
    """
    text = StringIO()
    with rc_context(STYLE | {"svg.hashsalt": "bloodcell"}):  # reproducible ids
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().replace("#000000", "currentColor")
    dark = "color: #e7eaee; fill: #e7eaee;"
    for number, (light, twin) in enumerate(DARK.items()):
        svg = svg.replace(light.lower(), f"var(--c{number}, {light})")
        dark += f" --c{number}: {twin};"
    style = f"<style>@media screen and (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    return svg.replace("<defs>", f"{style}<defs>", 1)


@rc_context(STYLE)
def plot_history(history: pd.DataFrame, names: Sequence[str] = ("loss", "accuracy")) -> Figure:
    """Training and validation curves per epoch; a ring marks the best epoch.

    Args:
        history: one row per epoch, as ``Run.history``.
        names: a panel for each; ``loss`` and ``accuracy`` by default.
    """
    figure = Figure(figsize=(4 * len(names), 3.2))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for colour, label in ((BLUE, "training"), (ORANGE, "validation")):
            values = history[f"{label[:5]}_{name}"]
            axes.plot(history.epoch, values, "o-", ms=4, color=colour, label=label)
        best = history.loc[history.valid_accuracy.idxmax()]
        ring = {"ms": 11, "mfc": "none", "mec": ORANGE}
        axes.plot(best.epoch, best[f"valid_{name}"], "o", label="best epoch", **ring)
        axes.set(xlabel="Epoch", ylabel=name.capitalize())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()
    return figure


@rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False, "axes.grid": False})
def plot_confusion_matrix(evaluation: Evaluation) -> Figure:
    """Confusion matrix: rows are true classes, columns predicted classes; in each cell the number
    of images and their proportion of the true class."""
    matrix, classes = evaluation.confusion_matrix, evaluation.classes
    proportions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 1.9 + 0.95 * len(classes)
    figure = Figure(figsize=(side + 0.6, side))
    axes = figure.subplots()
    image = axes.imshow(proportions, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        proportion = proportions[row, column]
        colour, text = "white" if proportion > 0.5 else "black", f"{count:,}\n{proportion:.1%}"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, classes)
    axes.tick_params(length=0)
    axes.set(xlabel="Predicted class", ylabel="True class")
    label = "Proportion of the true class"
    figure.colorbar(image, format=PercentFormatter(1), shrink=0.8, label=label)
    return figure


@rc_context(STYLE)
def plot_top_losses(evaluation: Evaluation, k: int = 9) -> Figure:
    """The ``k`` images with the highest loss, one of each photograph."""
    worst = evaluation.top_losses(k, one_per_photo=True)
    figure = _picture_grid(max(1, -(-len(worst) // 3)), 3, 3, 3.1)
    for axis, row in zip(figure.axes, worst.itertuples(), strict=False):
        axis.imshow(open_image(row.path))
        axis.set_title(
            f"true: {row.label}\npredicted: {row.predicted} {row.confidence:.0%}\n"
            f"loss {row.loss:.2f}, p(true) {np.exp(-row.loss):.1%}",
            color=GREY if row.label == row.predicted else ORANGE,
            fontsize=9,
        )
    return figure


@rc_context(STYLE)
def plot_reliability(evaluation: Evaluation) -> Figure:
    """Reliability diagram: accuracy against confidence, above a histogram of the confidences.

    The diagonal is perfect calibration; below it the model is overconfident. Where a temperature
    was fitted, a paler line shows the probabilities before calibration. The bins are those of
    :func:`~bloodcell_fastai.model.calibration.reliability` (Guo et al. 2017).
    """
    table = evaluation.predictions
    correct = (table.label == table.predicted).to_numpy()
    bins, before = reliability(table.confidence.to_numpy(), correct), uncalibrated(evaluation)
    figure = Figure(figsize=(4.4, 4.4))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], "--", color=GREY, lw=1, label="perfect calibration")
    label = "this model"
    if before is not None and evaluation.temperature != 1:
        label = "calibrated"
        raw = reliability(before.max(axis=1), correct)
        upper.plot(raw.confidence, raw.accuracy, "o-", ms=4, lw=1, color=ORANGE, alpha=0.6)
        upper.lines[-1].set_label("before calibration")
    upper.plot(bins.confidence, bins.accuracy, "o-", ms=5, color=BLUE, label=label)
    upper.set(ylabel="Accuracy", xlim=(0, 1), ylim=(-0.02, 1.02))
    upper.legend(loc="upper left")
    lower.bar(
        (bins.index + 0.5) / CALIBRATION_BINS, bins.images, 0.85 / CALIBRATION_BINS, color=BLUE
    )
    lower.set(xlabel="Confidence", ylabel="Images")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    lower.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


@rc_context(STYLE)
def plot_coverage(evaluation: Evaluation) -> Figure:
    """Selective prediction: accuracy against coverage (El-Yaniv and Wiener 2010).

    The risk-coverage curve, drawn as accuracy, which is 1 - risk. Points are confidence thresholds,
    with 95 % intervals.
    """
    ranked = evaluation.predictions.sort_values("confidence", ascending=False, kind="stable")
    accuracy = (ranked.label == ranked.predicted).expanding().mean().to_numpy()
    answered = np.arange(1, len(ranked) + 1) / len(ranked)
    # No threshold separates images of equal confidence.
    ends = np.append(np.diff(ranked.confidence) != 0, True)
    ends[: max(1, len(ranked) // 50)] &= len(ranked) < 50  # the first few images are noise
    shown = np.flatnonzero(ends)[np.unique(np.linspace(0, ends.sum() - 1, 300).astype(int))]
    marks = [row for row in coverage(evaluation) if row["min_confidence"] and row["n_images"]]
    figure = Figure(figsize=(4.4, 4.4))
    axes = figure.subplots()
    axes.plot(answered[shown], accuracy[shown], color=BLUE)
    labelled = np.inf
    for row in marks:
        x, y = row["coverage"], row["accuracy"]
        axes.vlines(x, *row["accuracy_ci95"], color=BLUE, alpha=0.35, lw=3)
        axes.plot(x, y, "o", ms=6, color=ORANGE)
        if labelled - x > 0.07:  # else the labels would overlap
            text = f"{row['min_confidence']:g}"
            axes.annotate(text, (x, y), (5, 6), textcoords="offset points", color=ORANGE)
            labelled = x
    axes.set(xlabel="Coverage", ylabel="Accuracy of the images answered", xlim=(0, 1.04))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


@rc_context(STYLE)
def plot_robustness(table: pd.DataFrame, kinds: Sequence[str] = ()) -> Figure:
    """Accuracy against the strength of each corruption, a panel each.

    Bars are 95 % intervals; the dashed line is the clean accuracy.

    Args:
        table: as :func:`~bloodcell_fastai.measure_robustness` makes it.
        kinds: the corruptions to show; all by default.
    """
    clean, corrupted = table.iloc[0], table[table.strength > 0]
    kinds = list(kinds or corrupted.kind.unique())
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.5 * rows))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        shown = corrupted[corrupted.kind == kind]
        axes.axhline(clean.accuracy, ls="--", lw=1, color=GREY, label="clean")
        bounds = (shown.accuracy_low, shown.accuracy_high)
        axes.vlines(shown.strength, *bounds, color=BLUE, alpha=0.35, lw=3)
        axes.plot(shown.strength, shown.accuracy, "o-", ms=5, color=BLUE)
        axes.set(title=kind[:1].upper() + kind[1:], xlabel=shown.unit.iloc[0])
        axes.set(xlim=(0.6, 5.4), ylim=(-0.02, 1.04))
        axes.set_xticks(shown.strength, [f"{setting:g}" for setting in shown.setting])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in grid[:, 0]:
        axes.set_ylabel("Accuracy")
    if len(kinds) > 1:
        grid[0, 0].legend(loc="lower left")
    return figure


@rc_context(STYLE)
def plot_copies(pairs: Sequence[tuple[str, str]], matches: int = 30) -> Figure:
    """Pairs of copies of one photograph: a training image left, a validation image right.

    Args:
        pairs: paths of a training and of a validation image.
        matches: lines drawn at most, each between two matching features.
    """
    figure = _picture_grid(-(-len(pairs) // 2), 2, 6.6, 2.75)
    for axis, (train, valid) in zip(figure.axes, pairs, strict=False):
        _draw_pair(axis, train, valid, matches)
    return figure


def _draw_pair(axis, train: str, valid: str, matches: int) -> None:
    left, right = open_image(train), open_image(valid)
    scale = left.height / right.height
    right = right.resize((round(right.width * scale), left.height))
    gap = left.width // 20
    canvas = np.full((left.height, left.width + gap + right.width, 3), 255, np.uint8)
    canvas[:, : left.width], canvas[:, left.width + gap :] = np.asarray(left), np.asarray(right)
    axis.imshow(canvas)
    points, others = match_pair(train, valid)
    shown = np.linspace(0, len(points) - 1, min(matches, len(points))).astype(int)
    for (x, y), (u, v) in zip(points[shown], others[shown], strict=True):
        u = u * scale + left.width + gap
        axis.plot([x, u], [y, v * scale], "o-", color=ORANGE, ms=2.5, lw=0.6, alpha=0.9)
    names = [f"{Path(path).parent.name} {Path(path).name}" for path in (train, valid)]
    axis.set_title(
        f"training: {names[0]}    validation: {names[1]}\n{len(points)} matching features",
        fontsize=9,
    )


@rc_context(STYLE)
def contact_sheet(table: pd.DataFrame, per_class: int = 6, seed: int = 0) -> Figure:
    """Randomly chosen images of an image table, one row per class."""
    groups = list(table.groupby("label"))
    figure = _picture_grid(len(groups), per_class, 1.8, 1.5)
    for row, (label, images) in enumerate(groups):
        axes = figure.axes[row * per_class : (row + 1) * per_class]
        paths = images.path.sample(min(per_class, len(images)), random_state=seed)
        for axis, path in zip(axes, paths, strict=False):
            axis.imshow(open_image(path))
        axes[0].set_ylabel(f"{label}\n{len(images):,} images")
    return figure


def _picture_grid(rows: int, columns: int, width: float, height: float) -> Figure:
    """A figure of axes without ticks and spines, of that width and height each, in inches."""
    figure = Figure(figsize=(width * columns, height * rows))
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure
