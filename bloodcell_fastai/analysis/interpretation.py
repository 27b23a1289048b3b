"""``bloodcell interpret`` and its notebook twin: what a model gets right, and what it does not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.vision.all import Learner
from matplotlib.figure import Figure

from ..config import Config
from ..data.blocks import config_dls, image_dls, pick_device
from ..data.dataset import Dataset
from ..data.provenance import with_photos
from ..data.splits import photos_known
from ..errors import BloodcellError, is_number
from ..files import read_json, read_table, write_json, write_table, write_text
from ..reporter import Progress, no_progress
from ..training.calibration import Reference, calibrate, predict_with_features, softmax
from ..training.callbacks import use_progress
from ..training.learner import blood_learner, load_weights, timm_model
from ..training.runs import Run
from ..training.workflow import describe_leakage
from . import figures
from .evaluation import Evaluation, evaluate, prediction_table
from .external import (
    External,
    describe_external,
    external_metrics,
    open_external,
)
from .report import write_report
from .stress import read_stress, stress_images, stress_metrics, stress_test, write_stress


class Interpretation(Evaluation):
    """What a pass over the validation images told, with fastai's plots of it.

    It is an :class:`~bloodcell_fastai.analysis.evaluation.Evaluation` with the plots of
    fastai's ``ClassificationInterpretation``, all from the one pass. fastai's own class works on
    the same learner, and predicts anew for each.
    """

    def plot_confusion_matrix(self) -> Figure:
        """Counts and row shares."""
        return figures.plot_confusion_matrix(self)

    def plot_top_losses(self, k: int = 9) -> Figure:
        """The ``k`` images with the highest loss."""
        return figures.plot_top_losses(self, k)

    def print_classification_report(self) -> None:
        """scikit-learn's report."""
        print(self.classification_report())


def interpret(learn: Learner) -> Interpretation:
    """Predict the validation part of ``learn.dls`` once and return everything about it.

    Args:
        learn: a trained learner whose batches come from ``blood_dls``.

    Returns:
        Predictions, metrics and plots; the probabilities are not calibrated.

    Raises:
        BloodcellError: an image cannot be read.

    Examples:
        >>> from bloodcell_fastai import Run, interpret, load_learner
        >>> learn = load_learner(Run.open("mine"))
        >>> with learn.no_bar():
        ...     result = interpret(learn)
        >>> result.confusion_matrix.shape
        (4, 4)
        >>> 0 <= result.metrics["photo_accuracy"] <= 1
        True
        >>> worst = result.top_losses(3)  # rows of result.predictions
        >>> len(worst)
        3
    """
    return _interpretation(evaluate(learn))


def _interpretation(evaluation: Evaluation) -> Interpretation:
    return Interpretation(
        evaluation.predictions,
        evaluation.classes,
        evaluation.leakage,
        evaluation.temperature,
        evaluation.features,
    )


def load_learner(run: Run) -> Learner:
    """The learner of a run with its best weights, on the best device here.

    Unlike fastai's function of this name it reads safetensors and JSON, and runs nothing that
    a file contains.

    Args:
        run: a trained run, its images where they were.

    Returns:
        As of :func:`~bloodcell_fastai.blood_learner`, its batches those of the run's split.

    Raises:
        BloodcellError: the run has no model yet, its files do not fit together, or validation
            images are gone.

    Examples:
        >>> from bloodcell_fastai import Run, load_learner
        >>> learn = load_learner(Run.open("mine"))
        >>> type(learn).__name__, len(learn.dls.vocab), learn.size
        ('Learner', 4, 64)
    """
    run.require_model()
    config = replace(run.config, device="auto")
    table = run.table
    if not photos_known(table):  # they may have been found since the training
        table = with_photos(table, Path(config.data))
    missing = [path for path in table.path[table.part == "valid"] if not Path(path).is_file()]
    if missing:
        raise BloodcellError(
            f"{len(missing):,} validation images are gone, such as {missing[0]}.",
            f"Put the data back to {config.data or 'where it was'}.",
        )
    learn = blood_learner(
        config_dls(table, config, cache=False), config.arch, weights="none", size=config.size
    )
    run.load_model(learn)
    return learn


def interpret_run(
    run: Run, stress: bool = False, progress: Progress = no_progress
) -> Interpretation:
    """Score a run's model on its validation images and write the results into its folder.

    Its probabilities are calibrated; a run from before there was a calibration is given one.
    Writes ``predictions.csv``, ``metrics.json`` and, in ``report/``, the page ``index.html``, the
    classification report and the figures.

    Args:
        run: with a model.
        stress: corrupt images too and write ``stress.csv``; see
            :func:`~bloodcell_fastai.stress_test`. It stays, and stays in the page, until it is
            made anew or the model is another.
        progress: told how far the stress test has come.

    Returns:
        Predictions, metrics and plots.

    Raises:
        BloodcellError: the run has no model yet, or its images are gone.

    Examples:
        >>> from bloodcell_fastai import Run, interpret_run
        >>> run = Run.open("mine")
        >>> result = interpret_run(run)
        >>> result.metrics["n_images"] == len(run.table[run.table.part == "valid"])
        True
        >>> sorted(path.suffix for path in run.report.glob("index.*"))
        ['.html']
    """
    if run.output != run.path:  # even in the folder of its images: the package is not to be changed
        raise BloodcellError(
            f"{run.name} comes with the package, and without the images it was validated on.",
            f"Score it on others: bloodcell interpret {run.name} --data FOLDER",
        )
    learn = load_learner(run)
    use_progress(learn)
    calibration = run.calibration or calibrate(learn, run)  # older runs have none
    result = _interpretation(evaluate(learn, calibration.temperature))
    reference = run.reference
    assert reference is not None  # it comes with the calibration
    result.predictions = with_nearest(result, reference)
    if stress:
        images = stress_images(run.table, seed=run.config.seed)
        write_stress(run, stress_test(learn, images, progress))
    write_results(run, result, learn)
    return result


def interpret_external(
    run: Run, dataset: Dataset, subset: str | None = None
) -> tuple[Interpretation, External, Path]:
    """Score a run's model on another data set and write the results into a folder of the run.

    Classes are matched by their names; images that the model was trained on are left out, and
    those of classes it does not know are compared with the others by their distance to the
    training images. The run's temperature and threshold are taken as they are.

    Writes the files of :func:`interpret_run`, and ``unknown.csv`` with the predictions for the
    images of unknown classes.

    Args:
        run: a trained run.
        dataset: from :func:`~bloodcell_fastai.open_dataset`.
        subset: the only folder of it to look at, such as ``TEST``.

    Returns:
        The result on the classes the model knows, what became of the images, and the folder.

    Raises:
        BloodcellError: the run has no model yet, or no image can be scored; see
            :func:`~bloodcell_fastai.analysis.external.open_external`.

    Examples:
        >>> from bloodcell_fastai import Run, interpret_external, make_demo, open_dataset
        >>> other = open_dataset(make_demo("other", photos_per_class=2, copies=2, seed=1))
        >>> result, external, folder = interpret_external(Run.open("mine"), other)
        >>> folder.as_posix()
        'runs/mine/on/other'
        >>> external.excluded, result.metrics["n_images"]
        (0, 20)
    """
    run.require_model()
    external, config = open_external(run, dataset, subset), run.config
    calibration = run.calibration or calibrate(load_learner(run), run)  # older runs have none
    learn = _bare_learner(run, external.table.path)
    logits, features, _ = predict_with_features(learn, learn.dls.valid)
    shares = softmax(logits, calibration.temperature)
    reference = run.reference
    assert reference is not None  # it comes with the calibration
    distance, rows = reference.nearest(features)
    nearest = reference.table.path.to_numpy()[rows]
    everything = prediction_table(external.table, shares, config.classes)
    everything = everything.assign(distance=distance, nearest=nearest)

    result = Interpretation(
        everything[external.known].reset_index(drop=True),
        config.classes,
        None if external.unchecked or not photos_known(external.table) else 0.0,
        calibration.temperature,
        features.numpy()[external.known],
    )
    result.metrics |= {
        "data": str(external.root),
        "subset": external.subset,
        "external": external_metrics(external, distance, calibration.distance_threshold),
    }
    folder = run.results_on(external.root, external.subset)
    write_table(folder / "unknown.csv", everything[~external.known].drop(columns="loss"))
    write_results(run, result, learn, folder, external)
    return result, external, folder


def _bare_learner(run: Run, paths: pd.Series) -> Learner:
    """The learner of a run on images that may have no class, for which its own are not needed."""
    config = run.config
    images = image_dls(paths, config.arch, config.size, crop=config.crop, device=pick_device())
    learn = blood_learner(images, config.arch, "none", size=config.size, n_out=len(config.classes))
    load_weights(timm_model(learn), run.path / "model.safetensors", config.classes)
    use_progress(learn)
    return learn


def with_nearest(evaluation: Evaluation, reference: Reference) -> pd.DataFrame:
    """The predictions with the ``distance`` of each image from the training images, and the
    path of the ``nearest`` one."""
    assert evaluation.features is not None  # evaluate keeps them
    distances, rows = reference.nearest(evaluation.features)
    nearest = reference.table.path.to_numpy()[rows]
    return evaluation.predictions.assign(distance=distances, nearest=nearest)


def write_results(
    run: Run,
    result: Interpretation,
    learn: Learner | None = None,
    folder: Path | None = None,
    external: External | None = None,
) -> None:
    """Write the files of :func:`interpret_run`; without the learner the page has no heat maps.

    They go into the run, or, of another data set, into a ``folder`` of its own.
    """
    folder = folder or run.path
    report = folder / run.report.name
    stress = None if external else read_stress(run)
    metrics = result.metrics | ({} if stress is None else {"stress": stress_metrics(stress)})
    write_table(folder / "predictions.csv", result.predictions)
    write_json(folder / "metrics.json", metrics)
    write_text(report / "classification_report.txt", result.classification_report())
    pictures = {
        "confusion_matrix": result.plot_confusion_matrix(),
        "top_losses": result.plot_top_losses(),
    }
    if len(history := run.history):
        pictures["curves"] = figures.plot_history(history)
    if stress is not None:
        pictures["stress"] = figures.plot_stress(stress)
    for name, figure in pictures.items():
        figures.save_figure(figure, report / f"{name}.png")
    write_report(run, result, learn, report, external)


def read_results(run: Run) -> Interpretation:
    """What :func:`write_results` wrote, without predicting again.

    Raises:
        BloodcellError: the run was not interpreted yet.
    """
    hint = f"Run: bloodcell interpret {run.name}"
    files = [run.path / name for name in ("metrics.json", "predictions.csv")]
    if not all(file.is_file() for file in files):
        raise BloodcellError(f"Run {run.name} was not interpreted yet.", hint)
    metrics = read_metrics(run)
    classes = metrics["classes"]
    shares = [f"p_{name}" for name in classes]
    predictions = read_table(files[1], PREDICTED, ["confidence", "loss", *shares], hint)
    numbers = predictions[["confidence", "loss", *shares]].to_numpy(float)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise BloodcellError(f"{files[1]} holds no predictions, or some that are no number.", hint)
    if "distance" in predictions:
        predictions["distance"] = pd.to_numeric(predictions["distance"], errors="coerce")
    for column in ("label", "predicted"):
        if unknown := set(predictions[column]) - set(classes):
            raise BloodcellError(f"{files[1]}: {column} is {min(unknown)!r}, not a class.", hint)
    # Results of before the calibration have no temperature: theirs was 1.
    temperature = metrics.get("temperature", 1.0)
    return Interpretation(predictions, tuple(classes), metrics["leakage"], temperature)


PREDICTED = ["path", "label", "predicted", "photo"]
_SHARES = ("accuracy", "balanced_accuracy", "macro_f1", "photo_accuracy")


def read_metrics(run: Run) -> dict:
    """What ``metrics.json`` of a run holds.

    Raises:
        BloodcellError: it is missing, or a value that others rely on makes no sense.
    """
    path, hint = run.path / "metrics.json", f"Run: bloodcell interpret {run.name}"
    metrics = read_json(path, hint)
    classes, leakage = metrics.get("classes"), metrics.get("leakage")
    temperature = metrics.get("temperature", 1.0)
    sound = {
        "classes": isinstance(classes, list)
        and classes
        and all(isinstance(name, str) for name in classes)
        and len(set(classes)) == len(classes),
        "leakage": "leakage" in metrics and (leakage is None or _is_share(leakage)),
        "temperature": temperature is None or is_number(temperature, 1e-6, 1e6),
    }
    sound |= {name: _is_share(metrics.get(name)) for name in _SHARES}
    for name in ("accuracy_ci95", "photo_accuracy_ci95"):
        bounds = metrics.get(name)
        sound[name] = isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_share, bounds))
    for name, is_sound in sound.items():
        if not is_sound:
            raise BloodcellError(f"{path}: {name} is {str(metrics.get(name))[:80]}.", hint)
    return metrics


def _is_share(value: object) -> bool:
    return is_number(value, 0, 1)


def summarise(result: Interpretation, config: Config, external: External | None = None) -> str:
    """The result as lines of text: what it was measured on, the headline, the report."""
    metrics = result.metrics
    unit = "photographs" if metrics["photos_known"] else "images (photographs unknown)"
    leakage = [f"Leakage: {describe_leakage(result.leakage)}"]
    return "\n".join(
        [
            *(f"WARNING: {warning}" for warning in config.warnings),
            f"{config.arch} from {config.start}, {config.size} px, "
            + (f"{config.folds} folds" if config.folds else f"split {config.split}"),
            *(_summarise_external(external, metrics) if external else leakage),
            f"Accuracy per image       {_with_interval(metrics, 'accuracy')}"
            f"   of {metrics['n_images']:,} images",
            f"Accuracy per photograph  {_with_interval(metrics, 'photo_accuracy')}"
            f"   of {metrics['n_photos']:,} {unit}",
            "",
            result.classification_report(),
            "Confusion matrix (rows true, columns predicted; " + ", ".join(result.classes) + ")",
            *("  " + " ".join(f"{n:>6,}" for n in row) for row in result.confusion_matrix),
        ]
    )


def _summarise_external(external: External, metrics: dict) -> list[str]:
    found = metrics["external"]
    kinds = {"flagged_known": "of the classes it knows", "flagged_unknown": "of the others"}
    return [
        *(f"WARNING: {external.name}: {warning}" for warning in external.warnings),
        f"ANOTHER DATA SET than it was trained on: {external.root} {external.subset}".rstrip(),
        *describe_external(external),
        *(
            f"Unlike training: {_with_interval(found, name)} {kind}"
            for name, kind in kinds.items()
            if found[name] is not None
        ),
        *([f"AUROC of the distance: {found['auroc']:.3f}"] if found["auroc"] is not None else []),
        f"Calibration error: {metrics['ece']:.2%} with the run's temperature, "
        f"{metrics['ece_uncalibrated']:.2%} without",
    ]


def _with_interval(metrics: dict, name: str) -> str:
    low, high = metrics[f"{name}_ci95"]
    return f"{metrics[name]:.2%}  (95 % interval {low:.2%} to {high:.2%})"
