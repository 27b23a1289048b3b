"""The report of a run: ``report/index.html``, a single file.

Its contents follow CLAIM 2024 (Tejani et al. 2024), the checklist for artificial intelligence in
medical imaging, and model cards (Mitchell et al. 2019).
"""

import base64
import hashlib
import shlex
from collections.abc import Sequence
from datetime import date
from io import BytesIO
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from ..config import Config, ResolvedConfig, fit_command, flags
from ..data.cache import PictureBatch
from ..data.images import open_image
from ..data.splits import SPLIT_DESCRIPTIONS, count_known, describe_leakage, photo_groups
from ..files import read_json
from ..model.calibration import CALIBRATION_BINS
from ..model.inference import Predictor
from ..model.runs import Run, relative_to
from ..reporter import duration
from . import figures
from .explain import NoHeatMap, heat_maps, overlay
from .external import External, describe_external
from .metrics import Evaluation
from .robustness import CLEAN, read_robustness, robustness_metrics

DASH = "\N{EN DASH}"
GALLERY = 8
BARS = 4  # probabilities shown of an image
PICTURE = 320  # longest side of an image in the page, in pixels


def render_report(
    run: Run,
    result: Evaluation,
    predictor: Predictor | None = None,
    external: External | None = None,
) -> str:
    """The report of a run as HTML.

    Args:
        run: a trained run, or the parent of folds.
        result: the evaluation on its validation images, or on ``external``.
        predictor: the run's, for the heat maps of the gallery; None leaves them out.
        external: the other data set that ``result`` is of, if it is of one.
    """
    config, table, history, metrics = run.config, run.table, run.history, result.metrics
    gallery, no_heat = _gallery(run, result, predictor, external)
    robustness = None if external else read_robustness(run)
    other = external and relative_to(external.table, external.root).assign(
        label=external.table.theirs, part=""
    )
    return load_template("evaluation", "report.html.jinja").render(
        run=run.name,
        written=date.today(),
        config=config,
        source=Path(config.data).name or "not recorded",
        split=SPLIT_DESCRIPTIONS[config.split],
        warnings=all_warnings(config),
        external=external,
        own=external is not None and external.root == run.root,
        facts=describe_external(external) if external else [],
        bins=CALIBRATION_BINS,
        metrics=metrics,
        classes=result.classes,
        leakage=describe_leakage(metrics["leakage"], metrics["n_known"], metrics["n_images"]),
        data=count_images(table),
        unused=0 if config.folds else int((table.part == "").sum()),
        curves={
            name: _figure(figures.plot_history(history, [name]))
            for name in ("accuracy", "loss")
            if len(history)
        },
        history=summarise_history(history),
        folds=[_describe_fold(run.fold(n)) for n in range(1, config.folds + 1)],
        reliability=_figure(figures.plot_reliability(result)),
        coverage=_figure(figures.plot_coverage(result)),
        robustness=None if robustness is None else _describe_robustness(robustness),
        gallery=gallery,
        no_heat=no_heat,
        calibration=None if config.folds else run.calibration,
        command=reproduce_command(run),
        options=_options(run),
        fingerprint=fingerprint(run.relative(table)),
        external_command=interpret_command(run, external) if external else None,
        external_fingerprint=None if other is None else fingerprint(other),
    )


def load_template(room: str, name: str) -> Template:
    """A template of this package, which escapes its variables, with the filters of the pages."""
    environment = Environment(
        loader=PackageLoader("bloodcell_fastai", room),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "duration": duration,
        "number": "{:,}".format,
    }
    return environment.get_template(name)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage, ``93.4 %``; a dash for None."""
    return DASH if value is None else f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def interval(bounds: Sequence[float] | None, digits: int = 1) -> str:
    """Two fractions as ``91.0-95.2 %``, with an en dash; a dash for None."""
    if bounds is None:
        return DASH
    return f"{100 * bounds[0]:.{digits}f}{DASH}{percent(bounds[1], digits)}"


def reproduce_command(run: Run) -> str:
    """The command that trains the run again, of a fold all folds: the options as asked, with the
    initial weights that ``auto`` was resolved to, and ``demo`` where the demo stood in for data."""
    if (parent := Run(run.path.parent)).started:
        return reproduce_command(parent)
    asked, config = run.asked, run.config
    changes: dict[str, str] = {}
    if asked.weights == "auto" and config.initial_weights:
        changes["weights"] = config.initial_weights.partition(" ")[0]
    if any(warning.startswith("DEMO DATA") for warning in config.warnings):
        changes["data"] = "demo"
    return fit_command(asked.changed(**changes))


def interpret_command(run: Run, external: External) -> str:
    """The command that evaluates the run on the other data set again."""
    parent = Run(run.path.parent)
    name = f"{parent.name}/{run.name}" if parent.started else run.name  # of a fold
    words = ["bloodcell", "interpret", name, "--data", str(external.root)]
    options = {"subset": external.subset} | vars(external.label_source)
    for option, value in options.items():
        if value and value != "auto":
            words += [*flags(option), value]
    return shlex.join(words)


def fingerprint(table: pd.DataFrame) -> str:
    """SHA-256, in hex, of the paths, labels and parts (or folds) of a table, in any order.

    With paths relative to the data the fingerprint is the same on every machine. The pixels do not
    count.
    """
    parts = table.get("fold", table.part).astype(str)
    lines = sorted(map("\t".join, zip(table.path, table.label, parts, strict=True)))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def count_images(table: pd.DataFrame) -> list[dict]:
    """Images and photographs per class and part, with a last row of totals.

    Returns:
        For each class ``label`` and ``counts``: for training, validation and, if there is one, the
        test set, or once for a table without parts, the images and the photographs (None if no
        photograph is known).
    """
    parts = [part for part in ("train", "valid", "test") if (table.part == part).any()] or [""]
    known, rows = count_known(table), []
    for label, images in [*table.groupby("label"), ("All classes", table)]:
        photos = [photo_groups(images[images.part == part]) for part in parts]
        counts = [(len(each), each.nunique() if known else None) for each in photos]
        rows.append({"label": label, "counts": counts})
    return rows


def summarise_history(history: pd.DataFrame) -> dict | None:
    """Number of epochs, the best one with its metrics, total seconds; None before the first."""
    if history.empty:
        return None
    best = history.loc[history.valid_accuracy.idxmax()]
    return {
        "epochs": len(history),
        "best": int(best.epoch),
        "seconds": float(history.seconds.sum()),
        **{name: float(best[name]) for name in ("train_accuracy", "valid_accuracy", "valid_loss")},
    }


def all_warnings(config: ResolvedConfig) -> tuple[str, ...]:
    """The run's warnings, and one for random initial weights even if they were asked for."""
    warned = any("RANDOM WEIGHTS" in warning for warning in config.warnings)
    if config.initial_weights != "none" or warned:
        return config.warnings
    return (*config.warnings, "RANDOM WEIGHTS: the model did not start from pretrained weights.")


def _options(run: Run) -> dict[str, tuple]:
    """Of each option the value that was asked for and what it was resolved to."""
    asked, resolved = run.asked.model_dump(), run.config.model_dump()
    resolved |= {"data": asked["data"], "weights": run.config.initial_weights or asked["weights"]}
    return {name: (asked[name], resolved[name]) for name in Config.model_fields}


def _describe_robustness(table: pd.DataFrame) -> dict:
    """``metrics``, and of each of the ``kinds`` of corruption ``name``, ``unit``, ``figure`` and
    ``rows``."""
    kinds = [
        {
            "name": kind,
            "unit": rows.unit.iloc[0],
            "figure": _figure(figures.plot_robustness(table, [kind])),
            "rows": rows.to_dict("records"),
        }
        for kind, rows in table[table.kind != CLEAN].groupby("kind", sort=False)
    ]
    return {"metrics": robustness_metrics(table), "kinds": kinds}


def _describe_fold(fold: Run) -> dict:
    """``name``, ``metrics`` and ``history`` of a fold."""
    metrics = read_json(fold.path / "metrics.json", f"Run: bloodcell interpret {fold.name}")
    return {"name": fold.name, "metrics": metrics, "history": summarise_history(fold.history)}


def _gallery(
    run: Run, result: Evaluation, predictor: Predictor | None, external: External | None
) -> tuple[list[dict], str]:
    """What the page shows of each image with a large loss, and why there are no heat maps."""
    worst, known = result.top_losses(GALLERY, one_per_photo=True), run.table
    heat: dict[str, str | None] = {}
    no_heat = "Heat maps are in the reports of the folds." if run.config.folds else "No heat maps."
    if predictor:
        pictures = predictor.read(worst.path)
        predicted = worst.predicted[worst.path.isin(pictures.paths)]
        drawn = heat_pictures(predictor, pictures, predicted)
        no_heat = f"No heat maps: {predictor.arch} has no spatial features."
        if drawn is not None:
            heat, no_heat = dict(zip(pictures.paths, drawn, strict=True)), ""
    labels = dict(zip(known.path, known.label, strict=True))
    tiles = portable(worst, run, external).to_dict("records")
    for tile, row in zip(tiles, worst.to_dict("records"), strict=True):
        # The classes with the highest probabilities, always with the true one.
        shown = sorted(result.classes, key=lambda label: row[f"p_{label}"], reverse=True)[:BARS]
        if row["label"] not in shown:
            shown[-1] = row["label"]
        tile |= {
            "image": picture(row["path"]),
            "heat": heat.get(row["path"]),
            "bars": [(label, row[f"p_{label}"]) for label in shown],
        }
        if "nearest" in row:
            tile["nearest_label"] = labels.get(row["nearest"], "unknown")
            tile["nearest_image"] = picture(row["nearest"])
    return tiles, no_heat


def portable(predictions: pd.DataFrame, run: Run, external: External | None) -> pd.DataFrame:
    """Predictions with paths relative to the data that each is of."""
    own = run.relative(predictions)
    if external is None:
        return own
    return relative_to(predictions, external.root).assign(nearest=own.nearest)


def heat_pictures(
    predictor: Predictor, pictures: PictureBatch, predicted: Sequence[str]
) -> list[str | None] | None:
    """Images with their heat maps for the predicted classes, each as of :func:`picture`; None if
    the architecture has no features with a place in the image."""
    try:
        heat = heat_maps(predictor, pictures, [predictor.classes.index(name) for name in predicted])
    except NoHeatMap:
        return None
    return [picture(*drawn) for drawn in zip(pictures.paths, heat, pictures.boxes, strict=True)]


def picture(
    path: str, heat: np.ndarray | None = None, box: Sequence[int] | None = None
) -> str | None:
    """An image file as a small data URI; None if it cannot be read.

    Args:
        path: of the file.
        heat: a heat map to lay over it, float (h, w); see :func:`~bloodcell_fastai.overlay`.
        box: the crop that ``heat`` is of.
    """
    try:
        image = open_image(path)
    except OSError:
        return None
    width, height = image.size
    image.thumbnail((PICTURE, PICTURE))  # before the heat map, whose colours take 12 bytes a pixel
    if heat is not None and box is not None:
        across, down = image.width / width, image.height / height
        left, top = int(box[0] * across), int(box[1] * down)
        right, bottom = ceil(box[2] * across), ceil(box[3] * down)
        image = overlay(image, heat, (left, top, right, bottom))
    data = BytesIO()
    image.save(data, "JPEG", quality=85)
    return _data_uri("jpeg", data.getvalue())


def _figure(figure: Figure) -> str:
    return _data_uri("svg+xml", figures.figure_svg(figure).encode())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
