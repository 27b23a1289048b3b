"""``bloodcell interpret`` and its notebook twin: what a model gets right, and what it does not."""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import ClassificationInterpretation, Learner, TensorBase
from pydantic import BaseModel, ConfigDict, Field

from ..config import ResolvedConfig
from ..data.cache import ImageReader
from ..data.datasets import Dataset
from ..data.loaders import check_labels, config_dls
from ..data.splits import count_known, describe_leakage, leakage
from ..errors import DataError, MissingFileError
from ..files import read_model, write_json, write_table, write_text
from ..model.inference import Predictor
from ..model.runs import Run
from ..reporter import Progress, no_progress
from ..training.calibrate import calibrate
from ..training.learner import blood_learner
from . import figures
from .external import (
    External,
    NothingToScore,
    describe_external,
    external_metrics,
    open_external,
    open_test,
)
from .metrics import Evaluation, by_photo, labelled_predictions
from .report import portable, render_report
from .robustness import (
    describe_robustness,
    measure_robustness,
    read_robustness,
    robustness_images,
    robustness_metrics,
    write_robustness,
)


class BloodInterpretation(ClassificationInterpretation):
    """fastai's ``ClassificationInterpretation``, whose methods share one prediction pass.

    The methods are fastai's, with its arguments and results; fastai's own class predicts again for
    each. The losses are cross-entropies without label smoothing.

    Args:
        learn: a learner of :func:`~bloodcell_fastai.blood_learner`.
        dl: the loader that was predicted, its items an image table with labels.
        evaluation: the predictions.
        logits: float (images, classes).
        act: activation of the logits for ``interp[idxs]``; softmax by default.

    Attributes:
        evaluation: predictions and metrics of this project.
    """

    def __init__(self, learn: Learner, dl, evaluation: Evaluation, logits: torch.Tensor, act=None):
        losses = TensorBase(evaluation.predictions.loss.to_numpy(np.float32))
        super().__init__(learn, dl, losses, act)
        self.evaluation = evaluation
        self._preds = act(logits) if act else logits.softmax(dim=1)

    @classmethod
    def from_learner(cls, learn: Learner, ds_idx: int = 1, dl=None, act=None):
        """Predict a part of ``learn.dls`` once.

        Args:
            learn: a trained learner whose batches come from ``blood_dls``.
            ds_idx: 1 for the validation part, 0 for the training part.
            dl: a loader to predict in its place, such as ``learn.dls.test_dl(table,
                with_labels=True)`` of an image table.
            act: activation of the logits; softmax by default.

        Returns:
            The interpretation; its probabilities are not calibrated.

        Raises:
            BloodcellError: the loader's items are no image table, a label is no class of the model,
                or an image cannot be read.

        Examples:
            >>> from bloodcell_fastai import BloodInterpretation, Run, load_learner
            >>> interp = BloodInterpretation.from_learner(load_learner(Run.open("mine")))
            >>> interp.confusion_matrix().shape
            (4, 4)
            >>> losses, indices = interp.top_losses(3)
            >>> 0 <= interp.metrics["photo_accuracy"] <= 1
            True
        """
        dl = learn.dls[ds_idx].new(shuffle=False, drop_last=False) if dl is None else dl
        table = dl.items
        if not isinstance(table, pd.DataFrame) or not {"path", "label", "photo"} <= set(table):
            raise DataError(
                "The items of the loader are no image table.",
                "Make the batches with blood_dls, or use fastai's ClassificationInterpretation.",
            )
        check_labels(table.label, learn.dls.vocab)
        table = table.reset_index(drop=True)
        predictor = Predictor.from_learner(learn)
        found = predictor.predict_all(table.path, getattr(dl, "reader", None))
        trained = learn.dls.train_ds.items.assign(part="train")
        evaluation = Evaluation(
            labelled_predictions(table, found.table),
            predictor.classes,
            leakage(pd.concat([trained, table.assign(part="valid")])),
        )
        return cls(learn, dl, evaluation, torch.from_numpy(found.logits).float(), act)

    def __getitem__(self, idxs):
        """Inputs, predictions, targets, decoded predictions and losses at ``idxs``, as fastai's."""
        idxs = np.atleast_1d(np.asarray(idxs, int))
        images = self.learn.dls.test_dl(self.dl.items.iloc[idxs], bs=max(len(idxs), 1))
        preds = self._preds[idxs]
        targets = torch.from_numpy(self.evaluation.labels[idxs])
        inputs, decoded = images.one_batch()[0].cpu(), preds.argmax(dim=1)
        return inputs, preds, targets, decoded, self.losses[idxs]

    def confusion_matrix(self) -> np.ndarray:
        """Images per true class (rows) and predicted class (columns), int64 (classes, classes)."""
        return self.evaluation.confusion_matrix.copy()

    def print_classification_report(self) -> None:
        """Print scikit-learn's report of the classes that occur."""
        print(self.evaluation.classification_report())

    @property
    def predictions(self) -> pd.DataFrame:
        """One row per image; see :class:`~bloodcell_fastai.evaluation.metrics.Evaluation`."""
        return self.evaluation.predictions

    @property
    def metrics(self) -> dict:
        """What ``metrics.json`` of a run holds, with 95 % intervals by photograph."""
        return self.evaluation.metrics

    def by_photo(self) -> pd.DataFrame:
        """One row per photograph; see :func:`~bloodcell_fastai.evaluation.metrics.by_photo`."""
        return by_photo(self.evaluation)


def load_learner(run: Run) -> Learner:
    """The learner of a run with its best weights, on the best device here.

    Unlike fastai's function of this name it reads safetensors and JSON, and runs nothing that
    a file contains.

    Args:
        run: a trained run with its images.

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
    table = run.table
    _require_images(run, table.path[table.part == "valid"])
    dls = config_dls(table, run.config.changed(device="auto"), cache=False)
    learn = blood_learner(dls, weights="none")
    run.load_model(learn)
    return learn


def _require_images(run: Run, paths: pd.Series) -> None:
    """Refuse to go on where images of a run are gone."""
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise MissingFileError(
            f"{len(missing):,} images are gone, such as {missing[0]}.",
            f"Put the data back to {run.config.data or 'where it was'}, or say where it is now: "
            "`data`.",
        )


def interpret_run(run: Run, stress: bool = False, progress: Progress = no_progress) -> Evaluation:
    """Score a run's model on its validation images and write the results into its folder.

    Its probabilities are calibrated. Writes ``predictions.csv``, ``metrics.json`` and, in
    ``report/``, the page ``index.html``, the classification report and the figures. A test set
    that the split left for the end is scored too, into ``on/``, as :func:`interpret_external`
    does, with its headline under ``test`` in ``metrics.json``.

    Args:
        run: with a model and its images.
        stress: measure robustness too and write ``robustness.csv``; see
            :func:`~bloodcell_fastai.measure_robustness`. It stays, also in the page, until it is
            measured again or the model is another.
        progress: told how far the measurement of robustness has come.

    Returns:
        Predictions and metrics.

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
        raise DataError(
            f"{run.name} ships with the package, without the images it was validated on.",
            f"Score it on others: bloodcell interpret {run.name} --data FOLDER",
        )
    run.require_model()
    table, config = run.table, run.config
    valid = table[table.part == "valid"].reset_index(drop=True)
    if valid.empty:
        raise DataError(f"Run {run.name} has no validation images.", "Train again: bloodcell fit")
    check_labels(valid.label, config.classes)
    _require_images(run, table.path[table.part.isin(["valid", "test"])])
    threads = None if config.workers < 0 else config.workers
    reader = ImageReader.open(
        table.path, config.size, config.crop, threads=threads, bits=config.bits
    )
    predictor = Predictor.load(run)
    if predictor.calibration is None:
        run.save_calibration(*calibrate(predictor, table, reader, config.seed))
        predictor = Predictor.load(run)
    predictor.reader = reader
    result = Evaluation(
        labelled_predictions(valid, predictor(valid.path)),
        config.classes,
        leakage(table),
        predictor.temperature,
    )
    if (table.part == "test").any():
        result.metrics["test"] = _score_test(run, predictor)
    if stress:
        images = robustness_images(table, seed=config.seed)
        write_robustness(run, measure_robustness(predictor, images, progress))
    write_results(run, result, predictor)
    return result


def _score_test(run: Run, predictor: Predictor) -> dict:
    """The headline of the run's own test set, or under ``problem`` why there is none."""
    try:
        external = open_test(run)
    except NothingToScore as error:
        return {"problem": error.message}
    metrics = _score(run, external, predictor)[0].metrics
    names = ("subset", *Scores.model_fields, "macro_f1", "balanced_accuracy", "ece")
    return {"excluded": external.excluded} | {name: metrics[name] for name in names}


def interpret_external(
    run: Run, dataset: Dataset, subset: str | None = None
) -> tuple[Evaluation, External, Path]:
    """Score a run's model on another data set and write the results into a folder of the run.

    Classes are matched by their names; images that the model was trained on are left out. The
    run's temperature and threshold are taken as they are. Writes the files of
    :func:`interpret_run`, and ``unknown.csv``, the predictions for images of unknown classes.

    Args:
        run: a trained run.
        dataset: from :func:`~bloodcell_fastai.open_dataset`.
        subset: the only folder of it to score, such as ``TEST``.

    Returns:
        The result on the classes the model knows, what became of the images, and the folder.

    Raises:
        BloodcellError: the run has no model yet or is not calibrated, or no image can be scored;
            see :func:`~bloodcell_fastai.evaluation.external.open_external`.

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
    external, predictor = open_external(run, dataset, subset), Predictor.load(run)
    predictor.reader = ImageReader(predictor.size, predictor.crop, bits=external.bits)
    result, folder = _score(run, external, predictor)
    return result, external, folder


def _score(run: Run, external: External, predictor: Predictor) -> tuple[Evaluation, Path]:
    """Predict and write the results; the evaluation and the folder."""
    if predictor.calibration is None:
        raise DataError(
            f"Run {run.name} is not calibrated.", f"Calibrate it: bloodcell interpret {run.name}"
        )
    predicted = predictor(external.table.path)
    everything = labelled_predictions(external.table, predicted)
    known, distance = external.known, everything.distance.to_numpy()
    unlike = distance > predictor.calibration.distance_threshold
    checked = not external.unchecked and count_known(external.table) > 0
    result = Evaluation(
        everything[known].reset_index(drop=True),
        predictor.classes,
        0.0 if checked else None,
        predictor.calibration.temperature,
    )
    result.metrics.update(
        data=str(external.root),
        subset=external.subset,
        external=external_metrics(external, distance, unlike),
    )
    folder = write_results(run, result, predictor, external)
    unknown = everything[~known].drop(columns="loss")
    write_table(folder / "unknown.csv", portable(unknown, run, external))
    return result, folder


def write_results(
    run: Run,
    result: Evaluation,
    predictor: Predictor | None = None,
    external: External | None = None,
) -> Path:
    """Write the files of :func:`interpret_run`; without a predictor the page has no heat maps.

    They go into the folder that is returned: the run, or one of its own for another data set.
    """
    folder = run.results_on(external.root, external.subset) if external else run.path
    report = folder / run.report.name
    robustness = None if external else read_robustness(run)
    if robustness is not None:
        result.metrics["robustness"] = robustness_metrics(robustness)
    write_table(folder / "predictions.csv", portable(result.predictions, run, external))
    write_json(folder / "metrics.json", result.metrics | {"weights": run.weights_hash})
    write_text(report / "classification_report.txt", result.classification_report())
    pictures = {
        "confusion_matrix": figures.plot_confusion_matrix(result),
        "top_losses": figures.plot_top_losses(result),
    }
    if len(history := run.history):
        pictures["curves"] = figures.plot_history(history)
    if robustness is not None:
        pictures["robustness"] = figures.plot_robustness(robustness)
    for name, figure in pictures.items():
        figures.save_figure(figure, report / f"{name}.png")
    write_text(report / "index.html", render_report(run, result, predictor, external))
    return folder


Fraction = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[Fraction], Field(min_length=2, max_length=2)]


class Scores(BaseModel):
    """Scores of the model on its validation images."""

    photo_accuracy: Fraction = Field(description="Fraction of the photographs it got right.")
    photo_accuracy_ci95: Interval = Field(description="Its 95 % interval.")
    accuracy: Fraction = Field(description="Fraction of the images it got right.")
    accuracy_ci95: Interval = Field(description="Its 95 % interval.")
    n_photos: int = Field(ge=1, description="An image of an unknown photograph counts as one.")
    n_images: int = Field(ge=1)
    n_known: int = Field(ge=0, description="Images whose photograph is known.")


class Metrics(Scores):
    """What others rely on in ``metrics.json``; the rest is kept as it is."""

    model_config = ConfigDict(extra="allow")

    classes: list[str] = Field(min_length=1)
    weights: str
    leakage: Fraction | None


def read_metrics(run: Run) -> dict:
    """What ``metrics.json`` of a run holds.

    Raises:
        BloodcellError: the run was not interpreted yet, a value that others rely on is wrong, or
            the results are of other weights.
    """
    path, hint = run.path / "metrics.json", f"Run: bloodcell interpret {run.name}"
    if not path.is_file():
        raise MissingFileError(f"Run {run.name} was not interpreted yet.", hint)
    metrics = read_model(path, Metrics, hint)
    run.require_weights(metrics.weights, path, hint)
    return metrics.model_dump()


def summarise(result: Evaluation, config: ResolvedConfig, external: External | None = None) -> str:
    """The result as lines of text: what it was measured on, the headline, the report."""
    metrics = result.metrics
    n_known, n_images = metrics["n_known"], metrics["n_images"]
    unit = "photographs" if n_known else "images (photographs unknown)"
    if 0 < n_known < n_images:
        unit = f"photographs (known for {n_known:,} images; the others count as one each)"
    verdict = [f"Leakage: {describe_leakage(result.leakage, n_known, n_images)}"]
    return "\n".join(
        [
            *(f"WARNING: {warning}" for warning in config.warnings),
            f"{config.arch} from {config.start}, {config.size} px, "
            + (f"{config.folds} folds" if config.folds else f"split {config.split}"),
            *(_summarise_external(external, metrics) if external else verdict),
            f"Accuracy per image       {_with_interval(metrics, 'accuracy')}"
            f"   of {n_images:,} images",
            f"Accuracy per photograph  {_with_interval(metrics, 'photo_accuracy')}"
            f"   of {metrics['n_photos']:,} {unit}",
            *(_summarise_test(metrics["test"]) if "test" in metrics else []),
            "",
            result.classification_report(),
            "Confusion matrix (rows: true class, columns: predicted class; "
            + ", ".join(result.classes)
            + ")",
            *("  " + " ".join(f"{n:>6,}" for n in row) for row in result.confusion_matrix),
            *([describe_robustness(metrics["robustness"])] if "robustness" in metrics else []),
        ]
    )


def _summarise_test(test: dict) -> list[str]:
    if problem := test.get("problem"):
        return [f"Test set: not scored. {problem}"]
    return [
        f"Test set {test['subset']}, {test['n_images']:,} images of {test['n_photos']:,} "
        f"photographs ({test['excluded']:,} images left out as trained on):",
        f"  Accuracy per image       {_with_interval(test, 'accuracy')}",
        f"  Accuracy per photograph  {_with_interval(test, 'photo_accuracy')}",
    ]


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
        f"Expected calibration error: {metrics['ece']:.2%} with the run's temperature, "
        f"{metrics['ece_uncalibrated']:.2%} without",
    ]


def _with_interval(metrics: dict, name: str) -> str:
    low, high = metrics[f"{name}_ci95"]
    return f"{metrics[name]:.2%}  (95 % interval {low:.2%} to {high:.2%})"
