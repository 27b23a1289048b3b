"""How well does the distance to the training images tell pictures of something else?

    python benchmarks/unlike_training.py RUN [FOLDER...] [--images 600]

RUN is the folder of a trained run; a copy of it is calibrated, if it was not. Its validation images
are the known ones. Against them stand

- a sample of every FOLDER of other images, spread evenly over its sub-folders, such as the PBC set
  (blood cells of another laboratory, half of its classes unknown to the Kaggle set);
- pictures of no blood, all drawn by this script: noise, gradients, shapes, text and charts. They
  stand for what is dropped on a page by mistake. Photographs of other things would be a harder
  test, and are not in it.

For each: the share whose distance is above the run's threshold, the share in which no white cell is
found (of a run with ``--crop cell``) and the share flagged for either; the AUROC of the distance
against the validation images, and that of the calibrated confidence for comparison (Hendrycks and
Gimpel 2017: the less sure, the less known). Of the validation images 5 % are distant by design,
because the threshold was fitted on them. The second table has the AUROC for other numbers of
neighbours.
"""

import argparse
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score

from bloodcell_fastai import Run, load_learner
from bloodcell_fastai.data.blocks import image_dls
from bloodcell_fastai.data.dataset import list_folder
from bloodcell_fastai.data.pixels import decode_ahead
from bloodcell_fastai.training.calibration import (
    Calibration,
    Reference,
    calibrate,
    predict_with_features,
    softmax,
)
from bloodcell_fastai.training.callbacks import use_progress

WIDTH, HEIGHT = 320, 240  # of a drawn picture
NEIGHBOURS = (1, 2, 5, 10, 20, 50)
KNOWN = "validation images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--images", type=int, default=600, help="of each kind, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(shutil.copytree(options.run, Path(scratch) / options.run.name))
        learn = load_learner(run)
        use_progress(learn)
        calibration = run.calibration or calibrate(learn, run)
        groups = {KNOWN: sample(learn.dls.valid_ds.items.path.tolist(), options.images)}
        for folder in options.folders:
            groups[folder.name] = spread(folder, options.images)
        for name, draw in DRAWN.items():
            folder = Path(scratch) / "drawn" / name
            groups[f"drawn {name}"] = draw_all(folder, draw, options.images // len(DRAWN))
        seen = {name: look(learn, paths) for name, paths in groups.items()}
        reference = run.reference
    print(
        f"{calibration} on {calibration.n_images:,} images\nDistance to neighbour "
        f"{calibration.neighbours} of {len(reference.table):,} training images, unlike above "
        f"{calibration.distance_threshold:.3f}\n"
    )
    print_groups(seen, reference, calibration)
    print_neighbours(seen, reference)


def print_groups(seen: dict, reference: Reference, calibration: Calibration) -> None:
    known_logits, known_features, _ = seen[KNOWN]
    known = reference.nearest(known_features)[0]
    sure = softmax(known_logits, calibration.temperature).max(axis=1)
    heads = ("images", "number", "distant", "no cell", "flagged")
    heads += ("AUROC distance", "AUROC confidence", "mean confidence")
    print("| " + " | ".join(heads) + " |")
    print("|---" + "|---:" * (len(heads) - 1) + "|")
    for name, (logits, features, has_cell) in seen.items():
        distances = reference.nearest(features)[0]
        confidence = softmax(logits, calibration.temperature).max(axis=1)
        distant = distances > calibration.distance_threshold
        shares = [f"{mask.mean():.1%}" for mask in (distant, ~has_cell, distant | ~has_cell)]
        scores = ["", ""]
        if name != KNOWN:
            scores = [f"{auroc(known, distances):.3f}", f"{auroc(-sure, -confidence):.3f}"]
        cells = [name, f"{len(logits):,}", *shares, *scores, f"{confidence.mean():.2f}"]
        print("| " + " | ".join(cells) + " |")


def print_neighbours(seen: dict, reference: Reference) -> None:
    usable = [k for k in NEIGHBOURS if k <= len(reference.table)]
    print("\n| AUROC for k = | " + " | ".join(map(str, usable)) + " |")
    print("|---|" + "---:|" * len(usable))
    distances = {
        (name, k): Reference(reference.features, reference.table, k).nearest(features)[0]
        for name, (_, features, _) in seen.items()
        for k in usable
    }
    for name in seen:
        if name != KNOWN:
            scores = [f"{auroc(distances[KNOWN, k], distances[name, k]):.3f}" for k in usable]
            print(f"| {name} | " + " | ".join(scores) + " |")


def auroc(known: np.ndarray, other: np.ndarray) -> float:
    """The chance that a picture of the others scores higher than one of the known."""
    is_other = np.repeat([0, 1], [len(known), len(other)])
    return float(roc_auc_score(is_other, np.concatenate([known, other])))


def look(learn, paths: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits and features of images, and whether a white cell was found where one is looked for."""
    images = image_dls(
        paths, learn.arch, learn.size, learn.dls.bs, learn.crop, device=learn.dls.device
    )
    logits, features, _ = predict_with_features(learn, images.valid)
    decoded = decode_ahead([paths], learn.size, learn.crop)
    has_cell = np.array([picture.has_cell for _, pictures in decoded for picture in pictures])
    return logits, features, has_cell


def sample(paths: list, n: int) -> list:
    return random.Random(0).sample(paths, min(n, len(paths)))


def spread(folder: Path, n: int) -> list:
    """``n`` images below a folder, as many of each sub-folder as can be."""
    files = list_folder(folder)
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


# Each kind of picture: a random generator -> a PIL image.


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
