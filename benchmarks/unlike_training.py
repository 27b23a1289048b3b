"""How well does the distance from the training images detect images of something else?

    python benchmarks/unlike_training.py RUN [FOLDER...] [--images 600]

RUN is the folder of a trained run. Its validation images are compared with

- a sample of every FOLDER of other images, spread evenly over its sub-folders, such as the PBC set
  (blood cells of another laboratory, half of its classes unknown to the Kaggle set);
- images without blood, drawn by this script: noise, gradients, shapes, text and charts.
  Photographs of other things would be harder to detect, and are not included.

For each: the fraction whose distance is above the run's threshold, the fraction in which no white
cell is found (of a run with ``--crop cell``) and the fraction flagged for either; the AUROC of the
distance against the validation images, and that of the calibrated confidence for comparison
(Hendrycks and Gimpel 2017). Of the validation images 5 % are distant by design, because the
threshold was fitted on them. The second table has the AUROC for other numbers of neighbours.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score

from bloodcell_fastai import Predictor, Run, calibrate
from bloodcell_fastai.data.images import list_images
from bloodcell_fastai.model.calibration import Calibration, Reference
from bloodcell_fastai.model.inference import NO_CELL, Predictions

WIDTH, HEIGHT = 320, 240  # of a drawn image
NEIGHBOURS = (1, 2, 5, 10, 20, 50)
KNOWN = "validation images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--images", type=int, default=600, help="of each kind, at most")
    options = parser.parse_args()
    run = Run.open(options.run)
    predictor, table = Predictor.load(run), run.table
    if predictor.calibration is None:
        predictor.calibration, predictor.reference = calibrate(predictor, table)
    calibration, reference = predictor.calibration, predictor.reference
    with tempfile.TemporaryDirectory() as scratch:
        groups = {KNOWN: sample(table.path[table.part == "valid"].tolist(), options.images)}
        for folder in options.folders:
            groups[folder.name] = spread(folder, options.images)
        for name, draw in DRAWN.items():
            folder = Path(scratch) / "drawn" / name
            groups[f"drawn {name}"] = draw_all(folder, draw, options.images // len(DRAWN))
        found = {name: predictor.predict_all(paths) for name, paths in groups.items()}
    print(
        f"{calibration} on {calibration.n_images:,} images\nDistance to neighbour "
        f"{calibration.neighbours} of {len(reference.table):,} training images, unlike above "
        f"{calibration.distance_threshold:.3f}\n"
    )
    print_groups(found, calibration)
    print_neighbours(found, reference)


def print_groups(found: dict[str, Predictions], calibration: Calibration) -> None:
    known = found[KNOWN].table
    heads = ("images", "number", "distant", "no cell", "flagged")
    heads += ("AUROC distance", "AUROC confidence", "mean confidence")
    print("| " + " | ".join(heads) + " |")
    print("|---" + "|---:" * (len(heads) - 1) + "|")
    for name, predictions in found.items():
        table = predictions.table
        distant = table.distance > calibration.distance_threshold
        kinds = (distant, table.flag == NO_CELL, table.flag != "")
        fractions = [f"{flagged.mean():.1%}" for flagged in kinds]
        scores = ["", ""]
        if name != KNOWN:
            scores = [
                f"{auroc(known.distance, table.distance):.3f}",
                f"{auroc(-known.confidence, -table.confidence):.3f}",
            ]
        cells = [name, f"{len(table):,}", *fractions, *scores, f"{table.confidence.mean():.2f}"]
        print("| " + " | ".join(cells) + " |")


def print_neighbours(found: dict[str, Predictions], reference: Reference) -> None:
    usable = [k for k in NEIGHBOURS if k <= len(reference.table)]
    print("\n| AUROC for k = | " + " | ".join(map(str, usable)) + " |")
    print("|---|" + "---:|" * len(usable))
    distances = {
        (name, k): Reference(reference.features, reference.table, k).nearest(one.features)[0]
        for name, one in found.items()
        for k in usable
    }
    for name in found:
        if name != KNOWN:
            scores = [f"{auroc(distances[KNOWN, k], distances[name, k]):.3f}" for k in usable]
            print(f"| {name} | " + " | ".join(scores) + " |")


def auroc(known: np.ndarray, other: np.ndarray) -> float:
    """The probability that one of the others scores higher than one of the known."""
    is_other = np.repeat([0, 1], [len(known), len(other)])
    return float(roc_auc_score(is_other, np.concatenate([known, other])))


def sample(paths: list, n: int) -> list:
    return random.Random(0).sample(paths, min(n, len(paths)))


def spread(folder: Path, n: int) -> list:
    """``n`` images below a folder, as many of each sub-folder as can be."""
    files = list_images(folder)
    by_folder: dict[Path, list] = {}
    for path in sample(files, len(files)):
        by_folder.setdefault(path.parent, []).append(path)
    turns = [(turn, path) for paths in by_folder.values() for turn, path in enumerate(paths)]
    return [path for _, path in sorted(turns)[:n]]


def draw_all(folder: Path, draw: Callable, n: int) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.png" for number in range(n)]
    for number, path in enumerate(paths):
        draw(np.random.default_rng(number)).save(path)
    return paths


# Each kind of image: a random generator -> a PIL image.


def noise(rng: np.random.Generator) -> Image.Image:
    """Grains of 1 to 32 pixels around a random colour."""
    grain = 2 ** rng.integers(0, 6)
    shape = (HEIGHT // grain + 1, WIDTH // grain + 1, 3)
    values = rng.normal(rng.uniform(50, 200, 3), rng.uniform(10, 80), shape)
    small = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return small.resize((WIDTH, HEIGHT), rng.choice([Image.NEAREST, Image.BICUBIC]))


def gradient(rng: np.random.Generator) -> Image.Image:
    """Colour that changes from corner to corner."""
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize((WIDTH, HEIGHT), Image.BICUBIC)


def shapes(rng: np.random.Generator) -> Image.Image:
    """Rectangles, ellipses and lines on a plain ground."""
    image = Image.new("RGB", (WIDTH, HEIGHT), colour(rng))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 20)):
        x, y = rng.integers(0, WIDTH, 2), rng.integers(0, HEIGHT, 2)
        box = [int(x.min()), int(y.min()), int(x.max()), int(y.max())]
        kind = rng.integers(3)
        if kind == 2:
            pen.line(box, fill=colour(rng), width=int(rng.integers(1, 12)))
        else:
            (pen.rectangle, pen.ellipse)[kind](box, fill=colour(rng))
    return image


def text(rng: np.random.Generator) -> Image.Image:
    """A page of made-up words, dark on light or light on dark."""
    dark = rng.random() < 0.3
    image = Image.new("RGB", (WIDTH, HEIGHT), (20, 20, 25) if dark else (250, 250, 245))
    pen = ImageDraw.Draw(image)
    size = int(rng.integers(9, 28))
    letters = np.array(list("aaabcdeeeefghiiklmnnoooprssttuuvw    "))
    for y in range(8, HEIGHT, round(size * 1.4)):
        line = "".join(rng.choice(letters, WIDTH // size * 2))
        pen.text((10, y), line, fill="white" if dark else "black", font_size=size)
    return image


def chart(rng: np.random.Generator) -> Image.Image:
    """A figure of matplotlib's: curves, bars, points or a map of values."""
    figure = Figure(figsize=(WIDTH / 80, HEIGHT / 80), dpi=80)
    axes = figure.subplots()
    kind = rng.integers(4)
    if kind == 0:
        axes.plot(rng.normal(size=(40, rng.integers(1, 6))).cumsum(axis=0))
    elif kind == 1:
        axes.bar(np.arange(8), rng.random(8), color=rng.random((8, 3)))
    elif kind == 2:
        axes.scatter(*rng.normal(size=(2, 150)), c=rng.random(150), s=rng.uniform(5, 80))
    else:
        cmap = str(rng.choice(["viridis", "magma", "coolwarm", "Greys"]))
        axes.imshow(rng.random((8, 11)), cmap=cmap)
    axes.set_title(f"Figure {rng.integers(100)}")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def colour(rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(int(value) for value in rng.integers(0, 256, 3))


DRAWN = {"noise": noise, "gradients": gradient, "shapes": shapes, "text": text, "charts": chart}


if __name__ == "__main__":
    main()
