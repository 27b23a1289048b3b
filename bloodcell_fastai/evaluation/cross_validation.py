"""``bloodcell fit --folds K``: train K times, so that every photograph validates once."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..config import Config, check_resumed
from ..data.splits import held_out, split_folds
from ..distributed import by_first, rank, wait_for_all
from ..errors import BloodcellError
from ..model.runs import Run
from ..reporter import Reporter
from ..training.train import prepare, resume_run, train_table
from .interpretation import interpret_run, summarise, write_results
from .metrics import Evaluation


def cross_validate(
    config: Config,
    root: str | Path = "runs",
    name: str | None = None,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Train on grouped folds: a run ``fold-1`` to ``fold-K`` each, in one folder.

    That folder holds the pooled predictions and metrics: every image is predicted once, by the
    model that was trained without its photograph. ``split.csv`` has a column ``fold`` there.

    Args:
        config: the options of every fold, and how many ``folds`` there are, 2 or more.
        root: folder of the runs.
        name: of the run; the time of day if None.
        dry_run: write the plan of the first fold, tell it, and stop.
        reporter: told what happens.

    Returns:
        The run that holds the folds.

    Raises:
        BloodcellError: the data, an option or a training went wrong.

    Examples:
        >>> from bloodcell_fastai import Config, cross_validate
        >>> config = Config(
        ...     data="demo", arch="resnet18", weights="none", size=32, epochs=1, folds=2
        ... )
        >>> run = cross_validate(config, name="folds")  # doctest: +ELLIPSIS
        Layout   subset folders: ...
        Left out of all folds: ... images of the data's own test folder. ...
        Fold 1 of 2
        ...
        >>> sorted(run.table.fold.unique())
        ['1', '2']
        >>> (run.path / "metrics.json").is_file()
        True
    """
    reporter = reporter or Reporter()
    resolved, table = prepare(config, reporter)
    if (test := held_out(table)).any():
        reporter.say(
            f"Left out of all folds: {test.sum():,} images of the data's own test folder. Score "
            "them at the end: bloodcell interpret RUN/fold-1 --data DATA --subset "
            + shlex.quote(table.subset[test].iloc[0])
        )
        table = table[~test].reset_index(drop=True)
    tables = split_folds(table, config.folds, config.seed)
    fold_of = sum((split.part == "valid") * k for k, split in enumerate(tables, start=1))
    parent = Run.create(root, name)
    with parent.lock():
        parent.start(config, resolved, table.assign(part="", fold=fold_of))
        try:
            _train_folds(parent, dry_run, reporter)
        except BaseException:
            if not parent.fold(1).started:
                parent.remove()  # it holds nothing yet
            raise
    return parent


def resume_folds(parent: Run, reporter: Reporter | None = None, **changes: Any) -> Run:
    """Continue a run of :func:`cross_validate`: the folds that are not finished, the results.

    Args:
        parent: the run of the folds.
        reporter: told what happens.
        **changes: options that are of the machine; see ``bloodcell_fastai.training.train.resume``.

    Raises:
        UsageError: another option has another value than the run was begun with.
        BloodcellError: it came to its end, or another process trains it.
    """
    reporter = reporter or Reporter()
    check_resumed(parent.asked, changes, str(parent.fold(1).path / "model.safetensors"))
    with parent.lock():
        if parent.finished:
            raise BloodcellError(
                f"All folds of run {parent.name} came to their end.",
                f"Look at {parent.path / 'metrics.json'}.",
            )
        here = {name: changes[name] for name in ("device", "workers") if name in changes}
        _train_folds(parent, False, reporter, **here)
    return parent


def _train_folds(parent: Run, dry_run: bool, reporter: Reporter, **here: Any) -> None:
    """Train the folds that are not trained yet, ``here`` with other options of the machine, then
    pool their predictions."""
    results: list[Evaluation] = []
    wait_for_all()  # until the first process has written what the run is
    table, folds = parent.table, parent.asked.folds
    for number in range(1, folds + 1):
        reporter.say(f"Fold {number} of {folds}")
        fold = parent.fold(number)
        if not fold.started:
            asked = parent.asked.changed(folds=0, **here)
            # Not what the first fold was resolved to: its learning rate was found on images that
            # validate here.
            again = asked.model_dump() | {"data": str(parent.root), "split": parent.config.split}
            resolved = parent.config.changed(**again)
            folder = Run.create(parent.path, fold.name)
            part = np.where(table.fold == str(number), "valid", "train")
            split = table.drop(columns="fold").assign(part=part)
            train_table(asked, resolved, split, folder, dry_run, reporter)
        elif not fold.finished:
            resume_run(fold, reporter, **here)
        if number == 1:  # what it was resolved to holds for all
            found = fold.config.changed(folds=folds, data=str(parent.root))
            parent.start(parent.asked, found, table)
        if dry_run:
            return
        if rank() == 0:
            results.append(interpret_run(fold))
        wait_for_all()  # until it has written what the fold is
    _pool(parent, results, reporter)
    parent.finish()
    wait_for_all()


@by_first
def _pool(parent: Run, results: list[Evaluation], reporter: Reporter) -> None:
    """Write the predictions of the folds as the parent's and tell what came of them."""
    pooled = pd.concat([result.predictions for result in results], ignore_index=True)
    leakages = [result.leakage for result in results if result.leakage is not None]
    leakage = sum(leakages) / len(leakages) if leakages else None  # known of all folds or of none
    # Each fold has a temperature of its own.
    result = Evaluation(pooled, results[0].classes, leakage, temperature=None)
    write_results(parent, result)
    reporter.say(summarise(result, parent.config))
