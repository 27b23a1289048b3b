"""Which tool finds the copies of one photograph? bloodcell_fastai and other duplicate finders.

    python benchmarks/duplicates.py PATH_TO_DATA

PATH_TO_DATA is the unpacked Kaggle set, copies and originals, or a demo set. Tools that are not
installed are named in the table: pip install imagehash imagededup cleanvision

The reference is the result of bloodcell_fastai with the originals at hand, which agrees with all
class labels although it never sees them; its own row is therefore no measurement. Two images are
copies of one photograph when they show the same field. Every tool reads the copies only.

Hash finders run at imagededup's default distance of 10 bits of 64. CPU seconds, of all threads and
child processes, are a better measure than seconds where the machine does other work too.
"""

import argparse
import itertools
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics.cluster import pair_confusion_matrix

from bloodcell_fastai.data.duplicates import find_photos

MAX_DISTANCE = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="the unpacked data set")
    data = parser.parse_args().data
    originals = sorted(data.rglob("JPEGImages/*.jp*g"))
    paths = sorted(set(data.rglob("*.jp*g")) - set(originals))

    rows = []
    reference, *cost = measured(lambda: find_photos(paths, originals).photo)
    rows.append(["bloodcell_fastai, with originals", "(reference)", "(reference)", *cost])
    found, *cost = measured(lambda: find_photos(paths).photo)
    (_, wrong), (missed, right) = pair_confusion_matrix(reference, found)
    scores = right / (right + wrong), right / (right + missed)  # precision and recall of the pairs
    rows.append(["bloodcell_fastai, without originals", *map(percent, scores), *cost])
    codes = pd.factorize(reference)[0]
    for name, find_pairs in TOOLS.items():
        rows.append([name, *score_tool(find_pairs, paths, codes)])
        print(rows[-1], flush=True)

    sizes = f"{len(paths):,} images, {reference.nunique():,} fields"
    print(f"\n{sizes}, {count_pairs(codes):,} pairs of copies\n")
    print("| method | pair precision | pair recall | seconds | CPU seconds |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def score_tool(find_pairs: Callable, paths: list[Path], reference: np.ndarray) -> list[str]:
    """Precision, recall and cost of a tool, or why it did not run."""
    try:
        pairs, *cost = measured(lambda: find_pairs(paths))
    except Exception as error:  # the table says why a tool did not run
        reason = str(error).strip().split("\n")[0][:80]
        return [f"not available: {type(error).__name__}: {reason}", "", "", ""]
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    hits = np.count_nonzero(reference[pairs[:, 0]] == reference[pairs[:, 1]])
    precision = percent(hits / len(pairs)) if len(pairs) else "no pairs"
    return [precision, percent(hits / count_pairs(reference)), *cost]


def measured(work: Callable) -> tuple:
    """The result of some work, its seconds and its CPU seconds, ready to print."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = work()
    return result, f"{time.perf_counter() - wall:,.0f}", f"{cpu_seconds() - cpu:,.0f}"


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def count_pairs(groups: np.ndarray) -> int:
    sizes = np.bincount(groups)
    return int((sizes * (sizes - 1) // 2).sum())


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


# Each tool: a list of paths -> pairs of positions, (n, 2) int.


def imagehash_phash(paths: list[Path]) -> np.ndarray:
    import imagehash
    from PIL import Image

    bits = np.array([imagehash.phash(Image.open(path)).hash.ravel() for path in paths])
    signs = bits.astype(np.float32) * 2 - 1
    found = []
    for start in range(0, len(signs), 1000):
        distance = (signs.shape[1] - signs[start : start + 1000] @ signs.T) / 2
        left, right = np.nonzero(distance <= MAX_DISTANCE)
        found.append(np.stack([left + start, right], axis=1))
    pairs = np.concatenate(found)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def imagededup(method: str) -> Callable:
    def find_pairs(paths: list[Path]) -> np.ndarray:
        from imagededup import methods

        finder = getattr(methods, method)(verbose=False)
        options = {} if method == "CNN" else {"max_distance_threshold": MAX_DISTANCE}
        with tempfile.TemporaryDirectory() as folder:
            # It takes one folder of files, whose names it returns.
            for i, path in enumerate(paths):
                (Path(folder) / f"{i}{path.suffix}").symlink_to(path.resolve())
            duplicates = finder.find_duplicates(image_dir=folder, **options)
        return np.array(
            [
                (int(Path(name).stem), int(Path(other).stem))
                for name, others in duplicates.items()
                for other in others
            ],
            int,
        ).reshape(-1, 2)

    return find_pairs


def cleanvision(paths: list[Path]) -> np.ndarray:
    from cleanvision import Imagelab

    lab = Imagelab(filepaths=[str(path) for path in paths])
    lab.find_issues({"exact_duplicates": {}, "near_duplicates": {}}, verbose=False)
    position = {str(path): i for i, path in enumerate(paths)}
    sets = [group for kind in ("exact", "near") for group in lab.info[f"{kind}_duplicates"]["sets"]]
    pairs = [pair for group in sets for pair in itertools.combinations(map(position.get, group), 2)]
    return np.array(pairs, int).reshape(-1, 2)


TOOLS = {
    "pHash (imagehash)": imagehash_phash,
    "PHash (imagededup)": imagededup("PHash"),
    "DHash (imagededup)": imagededup("DHash"),
    "AHash (imagededup)": imagededup("AHash"),
    "WHash (imagededup)": imagededup("WHash"),
    "CNN (imagededup)": imagededup("CNN"),
    "cleanvision, duplicates": cleanvision,
}

if __name__ == "__main__":
    main()
