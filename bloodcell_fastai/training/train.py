"""From a config to a trained run: what ``bloodcell fit`` does, for the library to call too."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fastai.vision.all import Learner

from ..config import Config, ResolvedConfig, check_resumed, fit_command
from ..data.cache import ImageReader
from ..data.datasets import describe_unreadable, open_dataset
from ..data.splits import (
    count_known,
    describe_gaps,
    describe_leakage,
    kept_split,
    leakage,
    photo_groups,
    split_table,
)
from ..distributed import rank, wait_for_all, world_size
from ..errors import BloodcellError, BloodcellWarning, WeightsWarning
from ..model.inference import Predictor
from ..model.runs import Run, newest_unfinished
from ..reporter import Reporter, duration
from .calibrate import calibrate
from .fit import estimate_seconds, fit, make_learner, phases, resolve

LOOKED_AT = 40  # images in which a white cell is searched for before the training


def train(
    config: Config,
    root: str | Path = "runs",
    name: str | None = None,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Read the data, split it, make the learner, train it; return the run.

    Args:
        config: the options; ``config.data`` as for ``open_dataset``, empty to find the data.
        root: folder of the runs.
        name: of the run; the time of day if None.
        dry_run: write ``config.json`` and ``split.csv``, tell the plan, and stop.
        reporter: told what happens.

    Returns:
        The run; with ``dry_run`` one without a model.

    Raises:
        BloodcellError: the data, an option or the training went wrong.

    Examples:
        >>> from bloodcell_fastai import Config, train
        >>> config = Config(data="demo", arch="resnet18", weights="none", size=64, bs=16, epochs=1)
        >>> run = train(config, name="first")  # doctest: +ELLIPSIS
        Layout   subset folders: ...
        Run      runs/first
        ...
        >>> run.has_model, len(run.history)
        (True, 1)
    """
    reporter = reporter or Reporter()
    resolved, table = prepare(config, reporter)
    table = split_table(table, resolved.split, resolved.seed)
    for gap in (gaps := describe_gaps(table)):
        reporter.warn(gap)
    resolved = resolved.changed(warnings=(*resolved.warnings, *gaps))
    return train_table(config, resolved, table, Run.create(root, name), dry_run, reporter)


def prepare(config: Config, reporter: Reporter) -> tuple[ResolvedConfig, pd.DataFrame]:
    """Open the data that a config names.

    Returns:
        The config with the folder found and the split that is used, and the image table.
    """
    dataset = open_dataset(config.data or None, progress=reporter.progress, **config.label_source)
    for line in dataset.describe():
        reporter.say(line)
    warnings = dataset.warnings
    if config.crop == "cell":
        warnings += _describe_cells(dataset.table.path, dataset.bits)
    for warning in warnings:
        reporter.warn(warning)
    if unreadable := dataset.unreadable:
        some = describe_unreadable(unreadable)
        reporter.warn(f"{len(unreadable):,} unreadable images are left out, such as {some}.")
    # Folds are always by photograph.
    split = config.split if config.folds else kept_split(dataset.table, config.split)
    if split != config.split:
        reporter.say(f"The data set has a split of its own, which is used: {split}.")
    found = {
        "data": str(dataset.root),
        "split": split,
        "warnings": warnings,
        "bits": dataset.bits,
    }
    return ResolvedConfig(**(config.model_dump() | found)), dataset.table


def _describe_cells(paths: pd.Series, bits: int | None) -> tuple[str, ...]:
    """A warning where the crop ``cell`` finds no white cell in more than half of some images, which
    are spread over ``paths``."""
    rows = np.linspace(0, len(paths) - 1, min(LOOKED_AT, len(paths))).astype(int)
    pictures = ImageReader(32, bits=bits).read(paths.iloc[rows].tolist())
    without = np.flatnonzero(~pictures.has_cell)
    if len(without) <= len(pictures) / 2:
        return ()
    return (
        f"No white cell is found in {len(without)} of {len(pictures)} images looked at, such as "
        f"{pictures.paths[without[0]]}: the middle of each is used. `crop=frame` uses whole "
        "images.",
    )


def train_table(
    asked: Config,
    resolved: ResolvedConfig,
    table: pd.DataFrame,
    run: Run,
    dry_run: bool,
    reporter: Reporter,
) -> Run:
    """Train on a split table, into a run folder just made; see :func:`train`.

    Args:
        asked: the options as they were given.
        resolved: what :func:`prepare` made of them.
        table: image table with ``part``.
        run: from :meth:`Run.create`.
        dry_run: see :func:`train`.
        reporter: told what happens.

    Raises:
        BloodcellError: another process has taken the folder, an option or the training went
            wrong.
    """
    with run.lock():
        try:
            with _warnings_told(reporter) as told:
                learn = make_learner(resolved, table, not dry_run, reporter.progress)
            # The report shows those of the weights; another fold may have told them.
            of_weights = (str(each) for each in told if isinstance(each, WeightsWarning))
            known = tuple(dict.fromkeys((*resolved.warnings, *of_weights)))
            run.start(asked, resolve(resolved, learn).changed(warnings=known), table)
        except BaseException:
            run.remove()  # it holds nothing yet
            raise
        wait_for_all()  # the options of a run are read from its folder
        reporter.say(describe_plan(run, table, learn, timed=dry_run))
        if not dry_run:
            complete(learn, run, reporter)
    return run


def resume(
    root: str | Path = "runs",
    name: str | None = None,
    reporter: Reporter | None = None,
    **changes: Any,
) -> Run:
    """Continue an unfinished run, the newest if no name is given, as if it had not stopped.

    Args:
        root: folder of the runs.
        name: name or folder of the run.
        reporter: told what happens.
        **changes: options of :class:`Config` that are of the machine: ``data``, where the images
            are now, ``device`` and ``workers``. Others may be given as the run has them.

    Raises:
        UsageError: another option than those has another value than the run was begun with.
        BloodcellError: there is no such run, it came to its end, or another process trains it.
    """
    path = name or newest_unfinished(root).path
    run = Run.open(path, root, changes.get("data") or None)
    return resume_run(run, reporter or Reporter(), **changes)


def resume_run(run: Run, reporter: Reporter, **changes: Any) -> Run:
    """Continue a run; see :func:`resume`. Its device is chosen anew: it may be another machine."""
    run.refuse_folds()
    weights = str(run.path / "model.safetensors")
    check_resumed(run.asked, changes, weights)
    with run.lock():
        if run.finished:
            again = fit_command(run.asked.changed(weights=weights))
            raise BloodcellError(
                f"Run {run.name} came to its end after {len(run.history)} epochs.",
                f"See it: bloodcell interpret {run.name}. Train on from its weights: {again}",
            )
        checkpoint = run.load_last()
        here = {name: changes.get(name, getattr(run.asked, name)) for name in ("device", "workers")}
        if checkpoint:  # it brings all weights
            here["weights"] = "none"
        config = run.config.changed(**here)
        # It was told of its weights when it began.
        with _warnings_told(reporter, but=WeightsWarning):
            learn = make_learner(config, run.table, progress=reporter.progress)
        done = checkpoint.epochs_done if checkpoint else 0
        reporter.say(f"Resuming {run.name} after epoch {done} of {config.epochs}.")
        complete(learn, run, reporter)
    return run


@contextmanager
def _warnings_told(
    reporter: Reporter, but: type[Warning] | tuple = ()
) -> Iterator[list[BloodcellWarning]]:
    """A block whose :class:`BloodcellWarning` go to the reporter, all or all ``but`` one kind, and
    to the list; those of libraries go where they would."""
    told: list[BloodcellWarning] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BloodcellWarning)
        yield told
    for each in caught:
        if not isinstance(each.message, BloodcellWarning):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        elif not isinstance(each.message, but):
            told.append(each.message)
            reporter.warn(str(each.message))


def complete(learn: Learner, run: Run, reporter: Reporter) -> None:
    """Train to the end, calibrate the best model, and only then mark the run as finished."""
    fit(learn, run, reporter.say)
    if rank() == 0:
        predictor = Predictor.from_learner(learn)
        calibration, reference = calibrate(predictor, run.table, learn.dls.reader, run.config.seed)
        run.save_calibration(calibration, reference)
        run.finish()
        reporter.say(str(calibration))
        reporter.say(f"Done. Next: bloodcell interpret {run.name}")
    wait_for_all()  # until it is marked, for those who look


def describe_plan(run: Run, table: pd.DataFrame, learn: Learner, timed: bool) -> str:
    """What a run on this table is about to do, as lines of text; ``timed`` runs a few batches."""
    config, used = run.config, table[table.part != ""]
    images = pd.crosstab(used.label, used.part)
    train, valid = images["train"].sum(), images["valid"].sum()
    n_known = count_known(used[used.part != "test"])
    lines = [
        f"Run      {run.path}",
        f"Data     {config.data}",
        f"Split    {config.split}: {train:,} images train, {valid:,} validate ("
        + ", ".join(f"{label} {n:,}" for label, n in images["valid"].items())
        + ")",
    ]
    if "test" in images:
        lines.append(
            f"Test     {images['test'].sum():,} images of the data's own test folder neither train "
            "nor choose the best epoch: bloodcell interpret scores them at the end"
        )
    if len(unused := table[table.part == ""]):
        folders = ", ".join(sorted(set(unused.subset) - {""})) or "other folders"
        lines.append(f"Unused   {len(unused):,} images of {folders}")
    if n_known:
        photos = photo_groups(used).groupby(used.part).nunique()
        lines.append(f"Photos   {photos['train']:,} train, {photos['valid']:,} validate")
    steps = len(learn.dls.train) // world_size()
    n_frozen = sum(phase.epochs for phase in phases(config) if phase.frozen)
    processes = f" in each of {world_size()} processes" if world_size() > 1 else ""
    lines += [
        f"Leakage  {describe_leakage(leakage(used), n_known, train + valid)}",
        f"Model    {config.arch} from {config.start} at {config.size} px on {config.device}",
        f"Steps    {steps} of {config.bs} images{processes} per epoch, {config.epochs} epochs",
    ]
    if n_frozen:
        lines[-1] += f", the head alone in the first {n_frozen}"
    if config.bs < run.asked.bs:
        lines[-1] += f" (batches of {run.asked.bs} would be larger than the training part)"
    if timed:
        lines.append(f"Time     about {duration(estimate_seconds(learn, run))} on this machine")
    return "\n".join(lines)
