import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from bloodcell_fastai import (
    BloodcellError,
    Predictor,
    Run,
    interpret_run,
    measure_robustness,
    robustness_images,
)
from bloodcell_fastai.cli import app
from bloodcell_fastai.data.crop import DARK, find_nucleus
from bloodcell_fastai.data.images import open_image
from bloodcell_fastai.evaluation.report import percent, render_report
from bloodcell_fastai.evaluation.robustness import (
    CLEAN,
    CORRUPTIONS,
    describe_robustness,
    read_robustness,
    robustness_metrics,
    write_robustness,
)

BY_KIND = {corruption.kind: corruption for corruption in CORRUPTIONS}


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory) -> Run:
    """A run whose robustness the command has measured."""
    root = tmp_path_factory.mktemp("runs")
    run = Run(shutil.copytree(trained.path, root / "mine"))
    done = CliRunner().invoke(app, ["interpret", "mine", "--stress", "--runs", str(root)])
    assert done.exit_code == 0, done.output
    assert describe_robustness(robustness_metrics(read_robustness(run))) in done.output
    return run


@pytest.fixture
def copy(measured, tmp_path) -> Run:
    return Run(shutil.copytree(measured.path, tmp_path / "mine"))


@pytest.fixture(scope="module")
def photographs(demo) -> list[Image.Image]:
    """Photographs, without the black corners that their copies have."""
    return [open_image(path) for path in demo.originals[::4]]


def difference(image: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(image, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize("kind", BY_KIND)
def test_a_corruption_keeps_the_size_and_comes_out_the_same_again(photographs, kind):
    corruption = BY_KIND[kind]
    assert len(corruption.settings) == 5
    for image in photographs[:2]:
        changed = corruption(image, corruption.settings[2])
        assert (changed.size, changed.mode) == (image.size, "RGB")
        torch.manual_seed(1)
        assert changed.tobytes() == corruption(image, corruption.settings[2]).tobytes()


@pytest.mark.parametrize("kind", [kind for kind in BY_KIND if kind != "rotation"])
def test_a_corruption_grows_with_its_strength(photographs, kind):
    corruption = BY_KIND[kind]
    for image in photographs:
        changes = [difference(image, corruption(image, s)) for s in corruption.settings]
        assert changes[0] > 0
        assert (np.diff(changes) > 0).all()


def test_factors_go_both_ways(photographs):
    for kind, brighter in (("brightness", np.mean), ("scale", lambda x: find_nucleus(x).side)):
        strongest = partial(BY_KIND[kind], setting=1.3)
        found = [
            brighter(np.asarray(strongest(image))) / brighter(np.asarray(image))
            for image in photographs
        ]
        assert min(found) < 0.9 and max(found) > 1.1, kind


def test_noise_is_not_that_of_another_image(photographs):
    noise = [
        np.asarray(BY_KIND["noise"](image, 0.02), float) - np.asarray(image, float)
        for image in photographs[:2]
    ]
    assert np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1] < 0.1
    assert noise[0].std() == pytest.approx(0.02 * 255, rel=0.1)


def test_the_stain_leaves_the_empty_slide_and_black_corners_alone():
    image = np.full((40, 60, 3), (230, 225, 235), np.uint8)
    image[10:20, 10:20] = (150, 70, 160)
    image[30:, :10] = 0
    changed = np.asarray(BY_KIND["stain"](Image.fromarray(image), 2))
    assert np.abs(changed[:, 30:].astype(int) - image[:, 30:]).max() <= 1
    assert (changed[30:, :10] == 0).all()
    assert np.abs(changed[15, 15].astype(int) - image[15, 15]).max() > 20


@pytest.mark.parametrize("setting", BY_KIND["rotation"].settings)
def test_a_turned_image_keeps_its_cell_and_has_no_black_corners(photographs, setting):
    for image in photographs:
        before = find_nucleus(np.asarray(image))
        turned = np.asarray(BY_KIND["rotation"](image, setting))
        after = find_nucleus(turned)
        moved = np.hypot(after.x - before.x, after.y - before.y)
        assert moved < before.side / 5  # its middle is that of a box around it, which turns too
        assert after.side == pytest.approx(before.side, rel=0.15)
        assert turned.max(2).min() > DARK
    assert difference(image, Image.fromarray(turned)) > 1


def test_the_images_are_of_all_classes_and_as_many_photographs_as_can_be():
    rows = [
        {"path": f"{label}{photo}-{copy}", "label": label, "photo": f"{label}{photo}"}
        for label, photos in (("A", 9), ("B", 2))
        for photo in range(photos)
        for copy in range(5)
    ]
    table = pd.DataFrame(rows).assign(part="valid")
    table = pd.concat([table, table.assign(path="no", part="train")], ignore_index=True)
    chosen = robustness_images(table, 12)
    assert chosen.label.value_counts().to_dict() == {"A": 6, "B": 6}
    assert chosen.groupby("label").photo.nunique().to_dict() == {"A": 6, "B": 2}
    assert "no" not in set(chosen.path)
    assert chosen.equals(robustness_images(table, 12))
    assert not chosen.path.equals(robustness_images(table, 12, seed=1).path)
    assert len(robustness_images(table)) == 55


@pytest.mark.slow
def test_it_scores_what_the_corrupted_files_would_score(measured, tmp_path):
    """The network sees what it would see in files of corrupted images."""
    images = robustness_images(measured.table, seed=measured.config.seed)
    table, predictor = read_robustness(measured), Predictor.load(measured)
    assert len(table) == 1 + 5 * len(CORRUPTIONS)
    assert (table.n_images == len(images)).all()
    for kind in (CLEAN, "brightness", "scale", "JPEG"):
        paths = [tmp_path / f"{number}.png" for number in range(len(images))]
        for source, path in zip(images.path, paths, strict=True):
            image = open_image(source)
            strongest = image if kind == CLEAN else BY_KIND[kind](image, BY_KIND[kind].settings[4])
            strongest.save(path)
        correct = predictor(paths).predicted.to_numpy() == images.label.to_numpy()
        assert table[table.kind == kind].accuracy.iloc[-1] == correct.mean(), kind
    clean = table.accuracy[0]
    assert table.relative_accuracy.to_numpy() == pytest.approx(table.accuracy / clean)
    assert ((table.accuracy_low <= table.accuracy) & (table.accuracy <= table.accuracy_high)).all()


@pytest.mark.slow
def test_progress_counts_the_corruptions(measured):
    reported = []
    images = robustness_images(measured.table, 4)
    measure_robustness(
        Predictor.load(measured), images, lambda what, done, total: reported.append((done, total))
    )
    assert reported == [(4 * done, 4 * 41) for done in range(42)] or reported == [
        (done, 41) for done in range(42)
    ]


@pytest.mark.slow
def test_the_run_holds_the_table_the_figure_and_the_numbers(measured):
    table = read_robustness(measured)
    metrics = json.loads((measured.path / "metrics.json").read_text())["robustness"]
    assert metrics == robustness_metrics(table)
    blur = table[table.kind == "blur"].accuracy.mean() / table.accuracy[0]
    assert metrics["kinds"]["blur"] == pytest.approx(blur)
    assert metrics["relative_accuracy"] == pytest.approx(np.mean(list(metrics["kinds"].values())))
    with Image.open(measured.report / "robustness.png") as figure:
        assert min(figure.size) > 600
    page = (measured.report / "index.html").read_text(encoding="utf-8")
    for name, value in (
        ("relative_accuracy", metrics["relative_accuracy"]),
        ("accuracy", metrics["accuracy"]),
        *((f"kinds.{kind}", value) for kind, value in metrics["kinds"].items()),
    ):
        assert f'data-metric="robustness.{name}">{percent(value)}<' in page, name
    cells = [f'<span class="value">{percent(value)}</span>' for value in table.accuracy[1:]]
    assert all(cell in page for cell in cells)
    assert "was not measured" not in page


@pytest.mark.slow
def test_it_stays_until_the_model_changes(copy):
    interpret_run(copy)
    assert read_robustness(copy) is not None
    assert 'id="robustness"' in (copy.report / "index.html").read_text(encoding="utf-8")
    state = load_file(copy.path / "model.safetensors")
    copy.save_weights(state, copy.config.classes)
    interpret_run(copy)
    assert read_robustness(copy) is None
    assert json.loads((copy.path / "metrics.json").read_text()).get("robustness") is None
    page = (copy.report / "index.html").read_text(encoding="utf-8")
    assert 'id="robustness"' not in page and "was not measured" in page


@pytest.mark.slow
def test_a_model_that_is_never_right(copy):
    table = read_robustness(copy).assign(accuracy=0.0, accuracy_low=0.0, relative_accuracy=np.nan)
    write_robustness(copy, table)
    metrics = robustness_metrics(read_robustness(copy))
    assert metrics["relative_accuracy"] is None
    assert "left" not in describe_robustness(metrics)
    assert "relative accuracy is not defined" in render_report(copy, interpret_run(copy))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [lambda t: t[1:], lambda t: t.assign(accuracy=2.0), lambda t: t.assign(strength=3)]
)
def test_an_edited_table_is_refused(copy, change):
    write_robustness(copy, change(read_robustness(copy)))
    with pytest.raises(BloodcellError, match="is no table of robustness") as caught:
        read_robustness(copy)
    assert "bloodcell interpret mine --stress" in caught.value.hint
