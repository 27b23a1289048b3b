"""The smallest numbers of everything: an image, a photograph, a class, a pixel, a batch."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bloodcell_fastai import (
    BloodcellError,
    Config,
    Predictor,
    cross_validate,
    interpret_external,
    interpret_run,
    open_dataset,
    train,
)
from bloodcell_fastai.reporter import SilentReporter


def draw(root: Path, n: int, size: tuple[int, int] = (40, 30), classes: str = "AB") -> Path:
    rng = np.random.default_rng(0)
    for label in classes:
        (root / label).mkdir(parents=True)
        for number in range(n):
            pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


def small(data: Path, **options) -> Config:
    defaults = {"arch": "test_resnet", "weights": "none", "size": 32, "epochs": 1, "device": "cpu"}
    return Config(data=str(data), **(defaults | options))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2)])
def test_images_of_a_pixel(tmp_path, size):
    data = draw(tmp_path / "data", 3, size)
    run = train(small(data), tmp_path / "runs", "a", reporter=SilentReporter())
    result = interpret_run(run)
    assert result.metrics["n_images"] == 2
    low, high = result.metrics["accuracy_ci95"]
    assert low < high
    (path,) = (data / "A").glob("0.png")
    assert len(Predictor.load(run)([path])) == len(Predictor.load(run, tta=True)([path])) == 1
    assert len(Predictor.load(run)([])) == 0


def test_two_images_of_a_class_have_two_folds(tmp_path):
    config = small(draw(tmp_path / "data", 2), folds=2)
    run = cross_validate(config, tmp_path / "runs", "a", reporter=SilentReporter())
    assert len(Predictor.load(run)(run.table.path)) == 4


def test_one_image_of_a_class_is_scored(tmp_path):
    reporter = SilentReporter()
    run = train(small(draw(tmp_path / "data", 2)), tmp_path / "runs", "a", reporter=reporter)
    other = draw(tmp_path / "other", 1, (50, 50))
    result, external, _ = interpret_external(run, open_dataset(other))
    assert (external.excluded, result.metrics["n_images"]) == (0, 2)


class Warned(SilentReporter):
    """Keeps the warnings."""

    def __init__(self):
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_class_without_validation_images_is_told_and_has_no_scores(tmp_path):
    """Nor do test images of a class that is not trained on stop the scoring of the others."""
    data, reporter = tmp_path / "data", Warned()
    draw(data / "train", 4, classes="ABC")
    draw(data / "val", 2, (41, 30), "AB")
    draw(data / "test", 2, (42, 30), "ABD")
    run = train(small(data), tmp_path / "runs", "a", reporter=reporter)
    gaps = [
        "No validation image of C: nothing measures how well it is recognised.",
        "Only in test, never in training: D. The model cannot know it; images left out: 2.",
    ]
    assert [text for text in reporter.warnings if text in gaps] == gaps
    assert [text for text in run.config.warnings if text in gaps] == gaps
    metrics = interpret_run(run).metrics
    scores = metrics["per_class"]["C"]
    assert (scores["support"], scores["recall"], scores["auroc"]) == (0, None, None)
    assert metrics["per_class"]["A"]["auroc"] is not None
    assert metrics["balanced_accuracy"] is not None
    assert metrics["test"]["n_images"] == 4
    page = (run.report / "index.html").read_text()
    assert all(gap in page for gap in gaps)


@pytest.mark.parametrize(
    ("n", "classes", "options", "message"),
    [
        (1, "AB", {}, "A has a single photograph"),
        (1, "AB", {"split": "random"}, "A has a single image"),
        (3, "AB", {"folds": 4}, "A has 3 photographs, too few for 4 folds"),
        (3, "A", {}, "Only one class"),
        (0, "AB", {}, "No images"),
    ],
)
def test_too_few_of_anything_is_said(tmp_path, n, classes, options, message):
    config = small(draw(tmp_path / "data", n, classes=classes), **options)
    start = cross_validate if config.folds else train
    with pytest.raises(BloodcellError, match=message):
        start(config, tmp_path / "runs", "a", reporter=SilentReporter())
    assert not (tmp_path / "runs" / "a").exists()
