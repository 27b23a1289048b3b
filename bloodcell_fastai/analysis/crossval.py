"""``bloodcell fit --folds K``: train K times, so that every photograph validates once."""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from ..config import Config
from ..data.splits import split_folds
from ..reporter import Reporter
from ..training.runs import Run
from ..training.workflow import prepare, train_table
from .interpretation import Interpretation, interpret_run, write_results


def cross_validate(
    config: Config,
    root: str | Path = "runs",
    name: str | None = None,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Train on grouped folds: a run ``fold-1`` to ``fold-K`` each, in one folder.

    That folder holds the pooled predictions and metrics: every image is predicted once, by the
    model that has not seen its photograph. ``split.csv`` has a column ``fold`` there.

    Args:
        config: the options of every fold, and how many ``folds`` there are, 2 or more.
        root: folder of the runs.
        name: of the run; the time of day if None.
        dry_run: write the plan of the first fold, tell it, and stop.
        reporter: told what happens.

    Raises:
        BloodcellError: the data, an option or a training went wrong.
    """
    reporter = reporter or Reporter()
    config, table = prepare(config, reporter)
    folds, config = config.folds, replace(config, folds=0)
    tables = split_folds(table, folds, config.seed)
    fold_of = sum((split.part == "valid") * k for k, split in enumerate(tables, start=1))
    parent = Run.create(root, name)
    results = []
    for number, split in enumerate(tables, start=1):
        reporter.say(f"Fold {number} of {folds}")
        fold = train_table(
            config, split, Run.create(parent.path, f"fold-{number}"), dry_run, reporter
        )
        if number == 1:
            parent.start(replace(fold.config, folds=folds), table.assign(part="", fold=fold_of))
        if dry_run:
            return parent
        results.append(interpret_run(fold))
    pooled = pd.concat([result.predictions for result in results], ignore_index=True)
    leakages = [result.leakage for result in results]
    leakage = None if None in leakages else sum(leakages) / folds
    # Each fold has a temperature of its own.
    write_results(parent, Interpretation(pooled, results[0].classes, leakage, temperature=None))
    parent.finish()
    return parent
