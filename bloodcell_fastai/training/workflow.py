"""From a config to a trained run: what ``bloodcell fit`` does, for the library to call too."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from fastai.vision.all import Learner

from ..config import Config
from ..data.dataset import open_dataset
from ..data.provenance import with_photos
from ..data.splits import kept_split, leakage, split_table
from ..errors import BloodcellError
from ..processes import agree, wait_for_all
from ..reporter import Reporter
from .calibration import calibrate
from .fit import estimate_seconds, fit, make_learner, phases, resolve
from .learner import WeightsWarning
from .runs import Run, newest_unfinished


@dataclass(frozen=True)
class Plan:
    """What a run is about to do.

    Attributes:
        images: images per class (rows) in ``train`` and ``valid`` (columns).
        photos: photographs in ``train`` and ``valid``; None if they are not known.
        leakage: share of validation images with a copy of their photograph in training, 0 to
            1; None if the photographs are not known.
        steps: optimizer steps per epoch.
        epochs: in all, and of these with the body frozen.
        seconds: the estimated time, None if it was not timed.
    """

    images: pd.DataFrame
    photos: pd.Series | None
    leakage: float | None
    steps: int
    epochs: tuple[int, int]
    seconds: float | None = None


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

    Raises:
        BloodcellError: the data, an option or the training went wrong.
    """
    reporter = reporter or Reporter()
    config, table = prepare(config, reporter)
    table = split_table(table, config.split, config.seed)
    return train_table(config, table, Run.create(root, name), dry_run, reporter)


def prepare(config: Config, reporter: Reporter) -> tuple[Config, pd.DataFrame]:
    """Open the data a config names: the config with the folder found, and the image table."""
    dataset = open_dataset(config.data or None, progress=reporter.progress)
    for warning in dataset.warnings:
        reporter.warn(warning)
    if dataset.unreadable:
        names = ", ".join(path.name for path in dataset.unreadable[:5])
        reporter.warn(f"{len(dataset.unreadable)} unreadable images are left out, such as {names}.")
    table = with_photos(dataset.table, dataset.root)
    if (kept := kept_split(table, config.split)) != config.split:
        reporter.say("The data set has a split of its own, which is kept: --split official.")
    config = replace(config, data=str(dataset.root), split=kept, warnings=dataset.warnings)
    return config, table


def train_table(
    config: Config, table: pd.DataFrame, run: Run, dry_run: bool, reporter: Reporter
) -> Run:
    """Train on a split table, into a run folder just made; see :func:`train`.

    Raises:
        BloodcellError: another process has taken the folder, an option or the training went
            wrong.
    """
    with run.lock():
        try:
            learn, config = _begin(config, table, run, dry_run, reporter)
        except BaseException:
            run.remove()  # it holds nothing yet
            raise
        reporter.say(describe(make_plan(config, table, learn, timed=dry_run), config, run))
        if not dry_run:
            complete(learn, run, reporter)
    return run


def _begin(
    config: Config, table: pd.DataFrame, run: Run, dry_run: bool, reporter: Reporter
) -> tuple[Learner, Config]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsWarning)
        learn = make_learner(config, table, cache=not dry_run, progress=reporter.progress)
    config = resolve(config, learn)
    for warning in caught:
        if issubclass(warning.category, WeightsWarning):
            reporter.warn(str(warning.message))
            config = replace(config, warnings=(*config.warnings, str(warning.message)))
    run.start(config, table)
    wait_for_all()  # the options of a run are read from its folder
    return learn, config


def resume(
    root: str | Path = "runs", name: str | None = None, reporter: Reporter | None = None
) -> Run:
    """Go on with an unfinished run, the newest if no name is given, as if it had not stopped.

    Raises:
        BloodcellError: there is no such run, it came to its end, or another process trains it.
    """
    reporter = reporter or Reporter()
    run = Run.open(name, root) if name else newest_unfinished(root)
    run.refuse_folds()
    with run.lock():
        if run.finished:
            raise BloodcellError(
                f"Run {run.name} came to its end after {len(run.history)} epochs.",
                f"See it: bloodcell interpret {run.name}",
            )
        checkpoint = run.load_last()
        weights = "none" if checkpoint else None  # the checkpoint brings all weights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WeightsWarning)
            learn = make_learner(run.config, run.table, weights, progress=reporter.progress)
        done = checkpoint.epochs_done if checkpoint else 0
        reporter.say(f"Resuming {run.name} after epoch {done} of {run.config.epochs}.")
        complete(learn, run, reporter)
    return run


def complete(learn: Learner, run: Run, reporter: Reporter) -> None:
    """Train to the end, calibrate the best model, and only then mark the run as finished."""
    fit(learn, run, reporter.say)
    calibration = agree(lambda: calibrate(learn, run))
    run.finish()
    wait_for_all()  # until it is marked, for those who look
    reporter.say(str(calibration))
    reporter.say(f"Done. Next: bloodcell interpret {run.name}")


def make_plan(config: Config, table: pd.DataFrame, learn: Learner, timed: bool = False) -> Plan:
    """What a run with these options on this table will do; ``timed`` runs a few batches."""
    used = table[table.part != ""]
    share = leakage(table)
    photos = used.groupby("part").photo.nunique() if share is not None else None
    return Plan(
        images=pd.crosstab(used.label, used.part),
        photos=photos,
        leakage=share,
        steps=len(learn.dls.train),
        epochs=(config.epochs, sum(phase.epochs for phase in phases(config) if phase.frozen)),
        seconds=estimate_seconds(learn, config) if timed else None,
    )


def describe(plan: Plan, config: Config, run: Run) -> str:
    """The plan as lines of text."""
    train, valid = plan.images["train"].sum(), plan.images["valid"].sum()
    lines = [
        f"Run      {run.path}",
        f"Data     {config.data}",
        f"Split    {config.split}: {train:,} images train, {valid:,} validate ("
        + ", ".join(f"{label} {n:,}" for label, n in plan.images["valid"].items())
        + ")",
        f"Leakage  {describe_leakage(plan.leakage)}",
        f"Model    {config.arch} from {config.start} at {config.size} px on {config.device}",
        f"Steps    {plan.steps} of {config.batch_size} images per epoch, {plan.epochs[0]} epochs"
        + (f", the head alone in the first {plan.epochs[1]}" if plan.epochs[1] else ""),
    ]
    if plan.photos is not None:
        counts = f"{plan.photos['train']:,} train, {plan.photos['valid']:,} validate"
        lines.insert(3, f"Photos   {counts}")
    if plan.seconds is not None:
        lines.append(f"Time     about {duration(plan.seconds)} on this machine")
    return "\n".join(lines)


def describe_leakage(share: float | None) -> str:
    """The leakage of a split in words a newcomer understands."""
    if share is None:
        return "unknown: which images show the same photograph is not known; see bloodcell audit"
    if share == 0:
        return "none: no validation image has a copy of its photograph in training"
    copies = f"{share:.1%} of the validation images have a copy of their own photograph in training"
    if share < 0.5:
        return f"{copies}: the score is better than it would be on new photographs"
    return f"{copies}: the score says how well the model remembers, not how it does on new ones"


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
