"""How long a large folder takes until training can begin, and how much memory it needs.

    python benchmarks/load.py --images 100000

The images are hard links to a few hundred small JPEGs in many folders. Each row gives the seconds
of a step and the peak memory of the process so far.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from bloodcell_fastai import Config, open_dataset, split_table, train
from bloodcell_fastai.data.duplicates import with_photos
from bloodcell_fastai.evaluation.metrics import Evaluation, labelled_predictions
from bloodcell_fastai.reporter import SilentReporter

CLASSES = ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")
PER_FOLDER = 1000
DISTINCT = 400


def make_tree(root: Path, n: int) -> Path:
    """``n`` images below ``root``: CLASS/part-0001/000001.jpg."""
    rng = np.random.default_rng(0)
    sources = []
    (root / ".sources").mkdir(parents=True)
    for number in range(DISTINCT):
        pixels = rng.integers(0, 255, (6, 8, 3), np.uint8)
        path = root / ".sources" / f"{number}.jpg"
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(path)
        sources.append(path)
    for number in range(n):
        label = CLASSES[number % len(CLASSES)]
        folder = root / label / f"part-{number // PER_FOLDER:04d}"
        if number % PER_FOLDER < len(CLASSES):
            folder.mkdir(parents=True, exist_ok=True)
        os.link(sources[number % DISTINCT], folder / f"{number:06d}.jpg")
    return root


def measure(name: str, step):
    """Do a step and print its row; return its result."""
    begin = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {name} | {seconds:.1f} | {peak:,.0f} |", flush=True)
    return result


def guesses(table) -> Evaluation:
    """Random predictions for an image table, as a model's would be."""
    classes = tuple(sorted(set(table.label)))
    probabilities = np.random.default_rng(0).dirichlet(np.ones(len(classes)), len(table))
    predicted = pd.DataFrame(probabilities, columns=[f"p_{name}" for name in classes])
    predicted.insert(0, "path", table.path)
    predicted.insert(1, "predicted", np.array(classes)[probabilities.argmax(axis=1)])
    predicted.insert(2, "confidence", probabilities.max(axis=1))
    predicted.insert(3, "flag", "")
    return Evaluation(labelled_predictions(table, predicted), classes)


def run(folder: Path, n: int) -> None:
    """All steps on ``n`` images under ``folder``."""
    print("| step | seconds | peak memory, MB |\n|---|---:|---:|")
    root = measure("make the tree", lambda: make_tree(folder / "set", n))
    table = measure("index: list, decode and check every image", lambda: open_dataset(root)).table
    assert len(table) == n
    measure(
        "of that, look up the photographs, by the hash of each file",
        lambda: with_photos(table, root),
    )
    measure("split by photograph, none known", lambda: split_table(table))
    grouped = table.assign(photo=(table.index // 10).astype(str))
    measure(f"split by photograph, {n // 10:,} known", lambda: split_table(grouped))
    evaluation = guesses(grouped)
    measure("metrics of a prediction for every image", lambda: evaluation.metrics)
    config = Config(data=str(root), arch="resnet18", weights="none", size=64, epochs=1)
    measure(
        "fit --dry-run, all of it",
        lambda: train(config, folder / "runs", dry_run=True, reporter=SilentReporter()),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.images)
