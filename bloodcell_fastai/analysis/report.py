"""One page that tells everything about a run: ``report/index.html``, a single file.

What it says and in which order follows CLAIM 2024, the checklist for artificial intelligence in
medical imaging, and model cards (Mitchell et al. 2019): what was trained on what, how it was kept
apart, scores with their uncertainty, where it fails, what it is not for, how to do it again.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import date
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.vision.all import Learner
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure
from PIL import Image

from ..config import Config
from ..data.dataset import open_image
from ..data.splits import photos_known
from ..errors import BloodcellError
from ..files import write_text
from ..training.runs import Run
from ..training.workflow import describe_leakage, duration
from . import figures
from .evaluation import BOOTSTRAP_SAMPLES, Evaluation
from .explain import heat_maps, overlay
from .external import External, describe_external
from .stress import CLEAN, read_stress, stress_metrics

DASH = "\N{EN DASH}"
GALLERY = 8
BARS = 4  # probabilities shown of an image
PICTURE = 320  # longest side of a picture in the page, in pixels
SPLITS = {
    "photo": "by photograph: about a fifth of every class validates, and no photograph is on "
    "both sides",
    "official": "the data set's own folders for training and validation",
    "random": "a stratified random fifth of all images, whatever photograph they show (the "
    "published protocol)",
}


def write_report(
    run: Run,
    result: Evaluation,
    learn: Learner | None = None,
    folder: Path | None = None,
    external: External | None = None,
) -> Path:
    """Write the page of a run into its ``report/``; return its path.

    Args:
        run: a run that was trained, or the parent of folds.
        result: the predictions for its validation images.
        learn: the run's learner, which the heat maps of the gallery need; None leaves them out.
        folder: where the page goes if not there.
        external: the other data set that ``result`` is of, if it is of one.
    """
    path = (folder or run.report) / "index.html"
    write_text(path, render_report(run, result, learn, external))
    return path


def render_report(
    run: Run,
    result: Evaluation,
    learn: Learner | None = None,
    external: External | None = None,
) -> str:
    """The page as HTML; see :func:`write_report`."""
    config, table, history = run.config, run.table, run.history
    heat = _heat_maps(result, learn)
    return load_template("analysis", "report.html.jinja").render(
        run=run.name,
        written=date.today(),
        config=config,
        source=Path(config.data).name or "not recorded",
        split=_describe_split(config),
        warnings=all_warnings(config),
        external=external,
        facts=describe_external(external) if external else [],
        samples=BOOTSTRAP_SAMPLES,
        metrics=result.metrics,
        classes=result.classes,
        leakage=describe_leakage(result.leakage),
        trusted=result.leakage == 0,
        data=count_images(table),
        unused=0 if config.folds else int((table.part == "").sum()),
        guess=max(row["support"] for row in result.metrics["per_class"].values())
        / result.metrics["n_images"],
        shares=_row_shares(result),
        curves=_curves(history),
        history=summarise_history(history),
        folds=_read_folds(run, config.folds),
        reliability=_figure(figures.plot_reliability(result)),
        coverage=_figure(figures.plot_coverage(result)),
        stress=None if external else _stress(read_stress(run)),
        gallery=_gallery(result, table, config, heat, external.root if external else None),
        no_heat=_why_no_heat(config, heat),
        calibration=None if config.folds else run.calibration,
        command=fit_command(config),
        options=asdict(config),
        fingerprint=fingerprint(table, Path(config.data)),
        external_command=interpret_command(run, external) if external else None,
        external_fingerprint=_fingerprint_of(external) if external else None,
    )


def load_template(room: str, name: str) -> Template:
    """A page's template of this package; it escapes what it is given and knows our filters."""
    environment = Environment(
        loader=PackageLoader("bloodcell_fastai", room),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "duration": duration}
    return environment.get_template(name)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a reader expects it, ``93.4 %``; a dash where there is none."""
    return DASH if value is None else f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def interval(bounds: Sequence[float] | None, digits: int = 1) -> str:
    """Two shares as ``91.0-95.2 %`` with a dash; a dash where there are none."""
    if bounds is None:
        return DASH
    return f"{100 * bounds[0]:.{digits}f}{DASH}{percent(bounds[1], digits)}"


def fit_command(config: Config) -> str:
    """The command that trains such a run again: every option that is not the default.

    The device and the loading processes are left to the machine it will run on.
    """
    names = [field.name for field in fields(Config)]
    defaults = asdict(Config())
    values = {name: getattr(config, name) for name in names[: names.index("classes")]}
    if config.weights == "auto" and config.weights_used:  # what it came to
        values["weights"] = config.weights_used.partition(" ")[0]
    if any(warning.startswith("DEMO DATA") for warning in config.warnings):
        values["data"] = "demo"
    words = ["bloodcell", "fit"]
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if name in ("device", "workers") or (value == defaults[name] and name != "epochs"):
            continue
        words += [f"--no-{name}"] if value is False else [option, str(value)]
    return shlex.join(words)


def interpret_command(run: Run, external: External) -> str:
    """The command that scores the run on the other data set again."""
    parent = Run(run.path.parent)
    name = f"{parent.name}/{run.name}" if parent.started else run.name  # of a fold
    words = ["bloodcell", "interpret", name, "--data", str(external.root)]
    return shlex.join(words + (["--subset", external.subset] if external.subset else []))


def fingerprint(table: pd.DataFrame, root: Path) -> str:
    """SHA-256 in hex of which images there are, their labels and parts (folds, if it has them).

    Paths count relative to ``root``, and the order of the rows does not, so that the same data
    has the same fingerprint on another machine. The pixels are not looked at.
    """
    part = table.get("fold", table.part)
    paths = [_relative(path, root) for path in table.path]
    lines = sorted(map("\t".join, zip(paths, table.label, part.astype(str), strict=True)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _fingerprint_of(external: External) -> str:
    table = external.table
    return fingerprint(table.assign(label=table.theirs, part=""), external.root)


def count_images(table: pd.DataFrame) -> list[dict]:
    """Images and photographs per class in each part, with a last row of totals.

    Returns:
        For each class ``label`` and ``counts``: for training and then validation, or once for a
        table without parts, the images and the photographs, None if these are not known.
    """
    known = photos_known(table)
    parts = ("train", "valid") if table.part.any() else ("",)
    sides = [table[table.part == part] for part in parts]

    def count(rows: pd.DataFrame) -> tuple[int, int | None]:
        return len(rows), int(rows.photo.nunique()) if known else None

    labels = sorted(set(table.label))
    return [
        {"label": label, "counts": [count(side[side.label == label]) for side in sides]}
        for label in labels
    ] + [{"label": "All", "counts": [count(side) for side in sides]}]


def summarise_history(history: pd.DataFrame) -> dict | None:
    """Epochs, the kept one with its scores and the seconds in all; None before the first."""
    if history.empty:
        return None
    kept = history.loc[history.valid_accuracy.idxmax()]
    return {
        "epochs": len(history),
        "kept": int(kept.epoch),
        "seconds": float(history.seconds.sum()),
        **{name: float(kept[name]) for name in ("train_accuracy", "valid_accuracy", "valid_loss")},
    }


def all_warnings(config: Config) -> tuple[str, ...]:
    """The run's own, and one for random weights even where they were asked for."""
    if config.weights_used != "none" or any("RANDOM WEIGHTS" in text for text in config.warnings):
        return config.warnings
    return (*config.warnings, "RANDOM WEIGHTS: the model started from nothing, not from ImageNet.")


def _describe_split(config: Config) -> str:
    if config.folds:
        return f"{config.folds} folds by photograph: a model each, every photograph validates once"
    return SPLITS[config.split]


def _row_shares(result: Evaluation) -> list[list[float]]:
    """The confusion matrix as shares of the true class."""
    matrix = result.confusion_matrix
    return (matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)).tolist()


def _curves(history: pd.DataFrame) -> dict[str, str]:
    if history.empty:
        return {}
    return {name: _figure(figures.plot_history(history, [name])) for name in ("accuracy", "loss")}


def _stress(table: pd.DataFrame | None) -> dict | None:
    """What the page shows of a stress test: its metrics, and of each kind the figure and rows."""
    if table is None:
        return None
    kinds = [
        {
            "name": kind,
            "unit": rows.unit.iloc[0],
            "figure": _figure(figures.plot_stress(table, [kind])),
            "rows": rows.to_dict("records"),
        }
        for kind, rows in table[table.kind != CLEAN].groupby("kind", sort=False)
    ]
    return {"metrics": stress_metrics(table), "kinds": kinds}


def _read_folds(run: Run, folds: int) -> list[dict]:
    """``name``, metrics and history of each fold, from the runs inside ``run``."""
    result = []
    for number in range(1, folds + 1):
        fold = Run(run.path / f"fold-{number}")
        metrics = json.loads((fold.path / "metrics.json").read_text())
        result.append(
            {"name": fold.name, "metrics": metrics, "history": summarise_history(fold.history)}
        )
    return result


def _worst(result: Evaluation) -> pd.DataFrame:
    """The images of the gallery: those with the highest loss, one of each photograph."""
    return result.top_losses(GALLERY, one_per_photo=True)


def _heat_maps(result: Evaluation, learn: Learner | None) -> np.ndarray | None:
    """Heat maps of the gallery's images, for the predicted class; None if there can be none."""
    if learn is None:
        return None
    try:
        return heat_maps(learn, _worst(result).path.tolist())
    except BloodcellError:  # the architecture keeps no features with a place in the image
        return None


def _why_no_heat(config: Config, heat: np.ndarray | None) -> str:
    if heat is not None:
        return ""
    if config.folds:
        return "Heat maps are in the reports of the folds, each of which has a model of its own."
    return f"There are no heat maps: none can be made for {config.arch}."


def _gallery(
    result: Evaluation,
    table: pd.DataFrame,
    config: Config,
    heat: np.ndarray | None,
    data: Path | None = None,
) -> list[dict]:
    """What the page shows of each image of the gallery; ``data`` is where they are, if not
    where the training images are."""
    root = Path(config.data)
    labels = dict(zip(table.path, table.label, strict=True))
    tiles = []
    for number, row in enumerate(_worst(result).to_dict("records")):
        nearest = row.get("nearest")
        tiles.append(
            {
                "label": row["label"],
                "predicted": row["predicted"],
                "loss": row["loss"],
                "distance": row.get("distance"),
                "path": _relative(row["path"], data or root),
                "image": picture(row["path"]),
                "heat": None if heat is None else picture(row["path"], heat[number], config.crop),
                "nearest": nearest
                and {
                    "label": labels.get(nearest, "label unknown"),
                    "path": _relative(nearest, root),
                    "image": picture(nearest),
                },
                "bars": _bars(row, result.classes),
            }
        )
    return tiles


def _bars(row: dict, classes: Sequence[str]) -> list[tuple[str, float]]:
    """The likeliest classes with their probabilities, and the true one wherever it comes."""
    ranked = sorted(classes, key=lambda name: row[f"p_{name}"], reverse=True)
    shown = ranked[:BARS]
    if row["label"] not in shown:
        shown[-1] = row["label"]
    return [(name, row[f"p_{name}"]) for name in shown]


def _relative(path: str, root: Path) -> str:
    file = Path(path)
    return (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()


def picture(path: str, heat: np.ndarray | None = None, crop: str = "cell") -> str | None:
    """An image file, at will under a heat map of what ``crop`` leaves of it, as a small data
    URI; None if it is gone."""
    try:
        image = open_image(path)
    except OSError:
        return None
    return _data_uri(image if heat is None else overlay(image, heat, crop))


def _data_uri(image: Image.Image) -> str:
    small, data = image.convert("RGB"), BytesIO()
    small.thumbnail((PICTURE, PICTURE))
    small.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _figure(figure: Figure) -> str:
    svg = figures.figure_svg(figure).encode()
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
