"""Which recipe is better on photographs it has not seen?

    python benchmarks/honest.py DATA [--recipes cell frame ...] [--copies 8] -- FIT OPTIONS
    python benchmarks/honest.py DATA --across OTHER [--recipes ...] -- FIT OPTIONS
    python benchmarks/honest.py DATA --also OTHER --recipes cell -- FIT OPTIONS
    python benchmarks/honest.py DATA --look cell --why "recipe of 1.0" -- FIT OPTIONS

DATA is Kaggle's zip or its folder. What follows ``--`` goes to every ``bloodcell fit``, such as
``--size 128 --epochs 3 --batch-size 32``. docs/evaluation.md has the protocol:

- Training uses at most ``--copies`` copies of each photograph behind TRAIN, and at most
  ``--per-class`` images of each class, spread evenly over its photographs.
- Recipes are compared by cross-validation on these, with the same folds for all. The others are
  compared with the first recipe, paired by photograph: a bootstrap interval of the difference and
  McNemar's exact test. A recipe whose interval contains 0 is not better.
- ``--across OTHER`` compares them from one laboratory to another instead: trained on TRAIN and
  scored on OTHER, and the other way round, with the classes that both have. The initial weights
  must have seen neither.
- ``--also OTHER`` trains on TRAIN and on the same classes of another data set, such as PBC. Without
  ``--look`` nothing is scored.
- ``--look`` evaluates one recipe once on TEST: trained on all of TRAIN, a fifth of its photographs
  choosing the epoch. Photographs whose field is in TRAIN are left out; the figures with them stand
  beside. With ``--ensemble`` all models of the recipe's cross-validation predict together. Every
  evaluation is appended to docs/test_looks.csv.

The folder ``--out`` keeps the runs, so that nothing is trained twice.
"""

import argparse
import datetime
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from common import machine
from scipy.stats import binomtest, bootstrap

from bloodcell_fastai import Predictor, Run, open_dataset
from bloodcell_fastai.data.class_names import match_classes
from bloodcell_fastai.data.splits import photo_groups
from bloodcell_fastai.evaluation.metrics import (
    Evaluation,
    by_photo,
    labelled_predictions,
)

RECIPES = {  # what differs from the defaults of ``bloodcell fit``
    "cell": [],
    "frame": ["--crop", "frame"],
    "half the stain": ["--stain", "0.4"],
    "256 px": ["--size", "256"],
    "twice the epochs": ["--epochs", "6"],
    "three times the rate": ["--lr", "3e-3"],
    "random weights": ["--weights", "none"],
    "imagenet": ["--weights", "imagenet"],
}
EVALUATIONS = Path(__file__).parents[1] / "docs" / "test_looks.csv"


def write_folder(table: pd.DataFrame, folder: Path) -> Path:
    """A folder per class with copies of the images, and ``photos.csv`` with their photographs."""
    rows = []
    for row in table.itertuples():
        name = Path(row.label, Path(row.path).name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_bytes(Path(row.path).read_bytes())
        rows.append({"path": name.as_posix(), "photo": row.photo})
    pd.DataFrame(rows).to_csv(folder / "photos.csv", index=False)
    return folder


def shared_classes(data: str, classes: list[str], home: Path) -> pd.DataFrame:
    """The images of another data set whose class is one of ours, under our names."""
    table = open_dataset(data, home=home).table
    names = match_classes(classes, sorted(set(table.label))).mapped
    return table.assign(label=table.label.map(names)).dropna(subset="label")


def few_copies(table: pd.DataFrame, copies: int, per_class: int) -> pd.DataFrame:
    """Some copies of each photograph, the same for every recipe."""
    shuffled = table.sample(frac=1, random_state=0)
    number = shuffled.groupby([photo_groups(shuffled), "label"]).cumcount()
    in_turns = shuffled.assign(number=number).sort_values("number", kind="stable")
    return in_turns[in_turns.number < copies].groupby("label").head(per_class)


def bloodcell(*arguments: str | Path) -> None:
    """Run a command as a user does."""
    subprocess.run([sys.executable, "-m", "bloodcell_fastai", *map(str, arguments)], check=True)


def cross_validated(recipe: str, data: Path, args: argparse.Namespace) -> Evaluation:
    """The pooled predictions of a recipe, every photograph by the model that has not seen it."""
    run = _folds(recipe, data, args)
    return read_predictions(run.path / "predictions.csv", run.config.classes)


def _folds(recipe: str, data: Path, args: argparse.Namespace) -> Run:
    """A cross-validation on a folder."""
    name = "-".join([data.name, *recipe.replace("'", "").split()])
    run = Run(args.runs / name)
    if not (run.path / "metrics.json").is_file():
        own = ["--folds", args.folds, "--name", name, "--runs", args.runs]
        started = ["--resume"] if run.path.is_dir() else []
        bloodcell("fit", "--data", data, *own, *args.fit, *RECIPES[recipe], *started)
    return run


def across(recipe: str, source: Path, target: Path, args: argparse.Namespace) -> Evaluation:
    """What a recipe, trained on the images of one laboratory, predicts for those of another."""
    run = _trained("from", recipe, source, args)
    results = run.results_on(target.resolve())
    if not (results / "metrics.json").is_file():
        bloodcell("interpret", run.path, "--data", target)
    return read_predictions(results / "predictions.csv", run.config.classes)


def read_predictions(file: Path, classes: tuple[str, ...]) -> Evaluation:
    """Predictions for labelled images that were written before."""
    return Evaluation(pd.read_csv(file, dtype={"photo": str}, keep_default_na=False), classes)


def _trained(what: str, recipe: str, data: Path, args: argparse.Namespace) -> Run:
    """One training on a folder, a fifth of its photographs choosing the epoch."""
    name = "-".join([what, data.name, *recipe.replace("'", "").split()])
    run = Run(args.runs / name)
    own = ["--data", data, "--split", "photo", "--name", name, "--runs", args.runs]
    if not run.finished:
        started = ["--resume"] if run.started else []
        bloodcell("fit", *own, *args.fit, *RECIPES[recipe], *started)
    return run


def print_table(title: str, results: dict[str, Evaluation]) -> None:
    """The recipes as a Markdown table, compared with the first."""
    first = next(iter(results))
    print(f"\n{machine()}; {title}\n")
    print(
        f"| recipe | per image | per photograph | macro F1 | balanced accuracy "
        f"| gain per photograph on {first} | won : lost | p |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        print(row(name, result, results[first]))


def row(name: str, evaluation: Evaluation, first: Evaluation) -> str:
    """A line of the table: the scores, and the difference from the first recipe."""
    figures = evaluation.metrics
    scores = [
        f"{figures[key]:.1%} ({low:.1%}-{high:.1%})"
        for key in ("accuracy", "photo_accuracy")
        for low, high in [figures[f"{key}_ci95"]]
    ]
    scores += [f"{figures[key]:.3f}" for key in ("macro_f1", "balanced_accuracy")]
    return " | ".join([f"| {name}", *scores, *difference(evaluation, first)]) + " |"


def difference(evaluation: Evaluation, first: Evaluation) -> list[str]:
    """Points per photograph that a recipe gains on another, with its 95 % interval, and the p of
    McNemar's exact test."""
    right = [_right(one) for one in (evaluation, first)]
    gains = (right[0].astype(int) - right[1].astype(int)).reindex(right[1].index).to_numpy()
    drawn = bootstrap([gains], np.mean, n_resamples=2000, method="percentile", random_state=0)
    low, high = drawn.confidence_interval
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    p_value = f"{p:.3f}" if p >= 0.001 else "< 0.001"
    return [f"{gains.mean():+.1%} ({low:+.1%} to {high:+.1%})", f"{won} : {lost}", p_value]


def _right(evaluation: Evaluation) -> pd.Series:
    photos = by_photo(evaluation)
    return (photos.label == photos.predicted).set_axis(
        pd.MultiIndex.from_frame(photos[["photo", "label"]])
    )


def evaluate_on_test(
    train: Path, test: pd.DataFrame, seen: pd.Series, args: argparse.Namespace
) -> dict:
    """Train on TRAIN, predict TEST once; return the row for docs/test_looks.csv.

    Args:
        train: folder of the training images.
        test: the image table of TEST.
        seen: which of its images are of a field that is in TRAIN too.
    """
    name = f"look-{datetime.date.today()}"
    run = (_folds if args.ensemble else partial(_trained, name))(args.look, train, args)
    predictions = labelled_predictions(test, Predictor.load(run)(test.path))
    predictions.to_csv(args.out / f"{name}-{run.name}.csv", index=False)
    figures = Evaluation(predictions[~seen.to_numpy()], run.config.classes).metrics
    of_all = Evaluation(predictions, run.config.classes).metrics
    kept = ("n_images", "n_photos", "accuracy", "photo_accuracy", "macro_f1", "balanced_accuracy")
    return {
        "date": str(datetime.date.today()),
        "recipe": f"{args.look}, {args.folds} models" if args.ensemble else args.look,
        "options": " ".join([*args.fit, *RECIPES[args.look]]),
        "images": f"{args.copies} a photograph, {args.per_class} a class",
        "also": Path(args.also).stem,
        "machine": machine(),
        "why": args.why,
        **{key: round(figures[key], 4) for key in kept},
        **{
            f"{key}_ci95": "-".join(f"{bound:.3f}" for bound in figures[f"{key}_ci95"])
            for key in ("accuracy", "photo_accuracy")
        },
        **{f"{key}_all_of_test": round(of_all[key], 4) for key in ("accuracy", "photo_accuracy")},
    }


def main() -> None:
    """Compare recipes on TRAIN or across laboratories, or evaluate one on TEST."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["cell", "frame"])
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--per-class", type=int, default=10_000)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--across", default="")
    parser.add_argument("--look", choices=RECIPES)
    parser.add_argument("--ensemble", action="store_true")
    parser.add_argument("--why", default="")
    parser.add_argument("--also", default="")
    parser.add_argument("--out", type=Path, default=Path("honest"))
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:split])
    args.fit = sys.argv[split + 1 :]
    if args.look and not args.why:
        parser.error("an evaluation on TEST needs a --why, which is kept with its figures")
    options = re.sub(r"[^\w.]+", "-", " ".join([f"{args.folds} folds", *args.fit]))
    args.runs = args.out / "runs" / options

    table = open_dataset(args.data, home=args.out / "data").table
    train = few_copies(table[table.subset == "TRAIN"], args.copies, args.per_class)
    few = f"{args.copies}-{args.per_class}"
    other = args.across or args.also
    others = _few_of(other, sorted(set(train.label)), args) if other else train[:0]
    if args.look or args.also:
        both = pd.concat([train, others], ignore_index=True)
        folder = write_folder(both, args.out / f"train{Path(args.also).stem}-{few}")
    if args.look:
        test = table[table.subset == "TEST"]
        found = evaluate_on_test(folder, test, test.photo.isin(train.photo), args)
        found = pd.DataFrame([found])
        found.to_csv(EVALUATIONS, mode="a", header=not EVALUATIONS.exists(), index=False)
        print(found.T.to_string(header=False))
        return
    if args.also:
        for name in args.recipes:
            print("bloodcell predict IMAGES --run", _trained("on", name, folder, args).path)
        return
    here = write_folder(train, args.out / f"train-{few}")
    if args.across:
        there = write_folder(others, args.out / f"{Path(other).stem}-{few}")
        for source, target in ((here, there), (there, here)):
            results = {name: across(name, source, target, args) for name in args.recipes}
            print_table(f"{source.name} to {target.name}, {' '.join(args.fit)}", results)
        return
    results = {name: cross_validated(name, here, args) for name in args.recipes}
    print_table(f"{args.folds} folds of {here.name}, {' '.join(args.fit)}", results)


def _few_of(other: str, classes: list[str], args: argparse.Namespace) -> pd.DataFrame:
    shared = shared_classes(other, classes, args.out / "data")
    return few_copies(shared, args.copies, args.per_class)


if __name__ == "__main__":
    main()
