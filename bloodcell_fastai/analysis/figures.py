"""Figures for papers and reports: each function returns a matplotlib Figure and saves nothing.

Colours are those of Okabe and Ito (2008), which people with colour-blindness can tell apart.
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

from ..data.dataset import open_image
from ..data.provenance import match_pair
from ..errors import printable
from ..files import atomic_path
from ..training.calibration import CALIBRATION_BINS, reliability
from .evaluation import Evaluation, coverage, uncalibrated

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
# Of matplotlib's types for these keys each version has its own.
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "text.parse_math": False,  # a name with dollar signs is no formula
}
# What figure_svg makes of a figure's colours where a page is dark.
DARK = {BLUE: "#56B4E9", ORANGE: "#F0882F", GREY: "#A3ACB8"}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to ``path``, atomically, in the format of its suffix."""
    for text in figure.findobj(Text):  # names of files and classes may hold anything
        text.set_text(printable(text.get_text()))
    with atomic_path(path) as temporary, rc_context(STYLE):
        figure.savefig(temporary)


def figure_svg(figure: Figure) -> str:
    """A figure as the text of an SVG file, transparent, for light pages and for dark ones.

    Black becomes the colour of the text, and the colours of this module have a lighter twin.
    """
    text = StringIO()
    with rc_context(STYLE | {"svg.hashsalt": "bloodcell"}):  # the same figure, the same text
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().replace("#000000", "currentColor")
    dark = "color: #e7eaee; fill: #e7eaee;"
    for number, (light, twin) in enumerate(DARK.items()):
        svg = svg.replace(light.lower(), f"var(--c{number}, {light})")
        dark += f" --c{number}: {twin};"
    style = f"<style>@media screen and (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    return svg.replace("<defs>", f"{style}<defs>", 1)


def plot_history(history: pd.DataFrame, names: Sequence[str] = ("loss", "accuracy")) -> Figure:
    """Loss and accuracy per epoch, training against validation; the kept epoch is marked."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4 * len(names), 3.2))
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for part, colour, label in (
                ("train", BLUE, "training"),
                ("valid", ORANGE, "validation"),
            ):
                values = history[f"{part}_{name}"]
                axes.plot(history.epoch, values, "o-", ms=4, color=colour, label=label)
            best = history.loc[history.valid_accuracy.idxmax()]
            axes.plot(
                best.epoch,
                best[f"valid_{name}"],
                "o",
                ms=11,
                mfc="none",
                mec=ORANGE,
                label="kept",
            )
            axes.set(xlabel="Epoch", ylabel=name.capitalize())
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
            if name == "accuracy":
                axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend()
    return figure


def plot_confusion_matrix(evaluation: Evaluation) -> Figure:
    """Counts, with the share of the true class; shades follow the shares."""
    matrix, classes = evaluation.confusion_matrix, evaluation.classes
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 1.9 + 0.95 * len(classes)
    with rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(side + 0.6, side))
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            share = shares[row, column]
            axes.text(
                column,
                row,
                f"{count:,}\n{share:.1%}",
                ha="center",
                va="center",
                color="white" if share > 0.5 else "black",
            )
        names = [name.capitalize() for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.set(xlabel="Predicted class", ylabel="True class")
        figure.colorbar(
            image, format=PercentFormatter(1), shrink=0.8, label="Share of the true class"
        )
    return figure


def plot_top_losses(evaluation: Evaluation, k: int = 9) -> Figure:
    """The images the model was most wrong about, with what it said and how sure it was.

    Of each photograph one copy is shown: the others say the same.
    """
    worst = evaluation.top_losses(k, one_per_photo=True)
    return _gallery(
        [
            (
                row.path,
                f"{row.label.capitalize()}\n→ {row.predicted.capitalize()}"
                f" {row.confidence:.0%}\nloss {row.loss:.2f}, p(true) {np.exp(-row.loss):.1%}",
                GREY if row.label == row.predicted else ORANGE,
            )
            for row in worst.itertuples()
        ],
        columns=3,
    )


def plot_reliability(evaluation: Evaluation) -> Figure:
    """How often the model is right where it is so and so sure, and how many images that is.

    On the diagonal confidence can be taken at its word; below it the model is too sure. Where
    the probabilities are calibrated, a paler line shows them as they were before.
    """
    table = evaluation.predictions
    correct = (table.label == table.predicted).to_numpy()
    bins, before = reliability(table.confidence.to_numpy(), correct), uncalibrated(evaluation)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.4))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.plot([0, 1], [0, 1], "--", color=GREY, lw=1, label="as sure as right")
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
        for axes in (upper, lower):
            axes.grid(alpha=0.25)
        upper.yaxis.set_major_formatter(PercentFormatter(1))
        lower.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def plot_coverage(evaluation: Evaluation) -> Figure:
    """Accuracy on the images the model is surest of, against their share of all images.

    Marked are thresholds of confidence, with the 95 % interval from resampled photographs.
    """
    surest = evaluation.predictions.sort_values("confidence", ascending=False, kind="stable")
    accuracy = (surest.label == surest.predicted).expanding().mean().to_numpy()
    share = np.arange(1, len(surest) + 1) / len(surest)
    # A threshold cannot part images of one confidence.
    ends = np.append(np.diff(surest.confidence) != 0, True)
    ends[: max(1, len(surest) // 50)] &= len(surest) < 50  # a few images make a wild line
    shown = np.flatnonzero(ends)[np.unique(np.linspace(0, ends.sum() - 1, 300).astype(int))]
    marks = [row for row in coverage(evaluation) if row["min_confidence"] and row["n_images"]]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.4))
        axes = figure.subplots()
        axes.plot(share[shown], accuracy[shown], color=BLUE)
        labelled = np.inf
        for row in marks:
            x, y = row["coverage"], row["accuracy"]
            axes.vlines(x, *row["accuracy_ci95"], color=BLUE, alpha=0.35, lw=3)
            axes.plot(x, y, "o", ms=6, color=ORANGE)
            if labelled - x > 0.07:  # else the labels would lie on each other
                axes.annotate(
                    f"{row['min_confidence']:g}",
                    (x, y),
                    xytext=(5, 6),
                    textcoords="offset points",
                    color=ORANGE,
                )
                labelled = x
        axes.set(xlabel="Share of the images answered", ylabel="Accuracy on these", xlim=(0, 1.04))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.25)
    return figure


def plot_stress(stress: pd.DataFrame, kinds: Sequence[str] = ()) -> Figure:
    """Accuracy under each kind of corruption, a panel each, against its five strengths.

    Bars are 95 % intervals; the dashed line is the accuracy on the untouched images.

    Args:
        stress: the table of :func:`~bloodcell_fastai.stress_test`.
        kinds: those to show; all by default.
    """
    clean, corrupted = stress.iloc[0], stress[stress.strength > 0]
    kinds = list(kinds or corrupted.kind.unique())
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.9 * columns, 2.5 * rows))
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes, kind in zip(grid.flat, kinds, strict=False):
            shown = corrupted[corrupted.kind == kind]
            axes.axhline(clean.accuracy, ls="--", lw=1, color=GREY, label="untouched")
            bounds = (shown.accuracy_low, shown.accuracy_high)
            axes.vlines(shown.strength, *bounds, color=BLUE, alpha=0.35, lw=3)
            axes.plot(shown.strength, shown.accuracy, "o-", ms=5, color=BLUE)
            axes.set(title=kind[:1].upper() + kind[1:], xlabel=shown.unit.iloc[0])
            axes.set(xlim=(0.6, 5.4), ylim=(-0.02, 1.04))
            axes.set_xticks(shown.strength, [f"{setting:g}" for setting in shown.setting])
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.grid(alpha=0.25)
        for axes in grid[:, 0]:
            axes.set_ylabel("Accuracy")
        if len(kinds) > 1:
            grid[0, 0].legend(loc="lower left")
    return figure


def plot_siblings(pairs: Sequence[tuple[str, str]], matches: int = 30) -> Figure:
    """Pairs of images of one photograph, training on the left, validation on the right.

    Lines join up to ``matches`` features that agree on one affine map of one to the other.
    """
    columns = 2
    rows = -(-len(pairs) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.6 * columns, 2.75 * rows))
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axis in grid:
            _bare(axis)
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
    points, others = match_pair(Path(train), Path(valid))
    shown = np.linspace(0, len(points) - 1, min(matches, len(points))).astype(int)
    for (x, y), (u, v) in zip(points[shown], others[shown], strict=True):
        u = u * scale + left.width + gap
        axis.plot([x, u], [y, v * scale], "o-", color=ORANGE, ms=2.5, lw=0.6, alpha=0.9)
    names = [f"{Path(path).parent.name} {Path(path).name}" for path in (train, valid)]
    axis.set_title(
        f"training: {names[0]}    validation: {names[1]}\n{len(points)} features agree", fontsize=9
    )


def contact_sheet(table: pd.DataFrame, per_class: int = 6, seed: int = 0) -> Figure:
    """Images drawn at random from an image table, one row per class."""
    groups = list(table.groupby("label"))
    with rc_context(STYLE):
        figure = Figure(figsize=(1.8 * per_class, 1.5 * len(groups)))
        grid = figure.subplots(len(groups), per_class, squeeze=False)
        for axes, (label, images) in zip(grid, groups, strict=True):
            paths = images.path.sample(min(per_class, len(images)), random_state=seed)
            for axis in axes:
                _bare(axis)
            for axis, path in zip(axes, paths, strict=False):
                axis.imshow(open_image(path))
            axes[0].set_ylabel(f"{label.capitalize()}\n{len(images):,} images")
    return figure


def _gallery(tiles: list[tuple[str, str, str]], columns: int) -> Figure:
    """Images in a grid; a tile is a path, the text above it and the text's colour."""
    rows = max(1, -(-len(tiles) // columns))
    with rc_context(STYLE):
        figure = Figure(figsize=(3 * columns, 3.1 * rows))
        for axis in figure.subplots(rows, columns, squeeze=False).flat:
            _bare(axis)
        for axis, (path, text, colour) in zip(figure.axes, tiles, strict=False):
            axis.imshow(open_image(path))
            axis.set_title(text, color=colour, fontsize=9)
    return figure


def _bare(axis) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
