"""The demo set: what a drawing, a copy and the whole folder promise."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from bloodcell_fastai.data import demo as module
from bloodcell_fastai.data.demo import CLASSES, Cell, augment_copy, draw_photograph, make_demo

ORIGINALS = Path("dataset-master/dataset-master")
COPIES = Path("dataset2-master/dataset2-master/images")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("made") / "demo", photos_per_class=4, copies=3)


@pytest.fixture(scope="module")
def truth(demo):
    table = pd.read_csv(demo / "truth.csv")
    parts = table.path.str.split("/", expand=True)
    return table.assign(subset=parts[3], label=parts[4], name=parts[5])


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def keypoints(image):
    return len(cv2.SIFT_create().detect(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)))


def inside(cell, size):
    return 0 <= cell.x <= size[0] - 1 and 0 <= cell.y <= size[1] - 1


# --- one photograph


@pytest.mark.parametrize("label", CLASSES)
def test_photograph_is_a_smear_with_texture_and_a_purple_cell_where_it_says(label):
    image, cell = draw_photograph(label, seed=5)
    assert image.shape == (480, 640, 3)
    assert image.dtype == np.uint8
    assert keypoints(image) > 150
    red, green, blue = np.median(image, axis=(0, 1))
    assert min(red, green, blue) > 120, "the background is bright"
    disc = cv2.circle(
        np.zeros((480, 640), np.uint8), (round(cell.x), round(cell.y)), round(cell.radius), 1, -1
    ).astype(bool)
    purple = image[..., 2].astype(int) - image[..., 1] > 40
    assert purple[disc].mean() > 0.15
    assert purple[~disc].mean() < 0.02


def test_photograph_depends_on_label_seed_and_exposure_only():
    first, cell = draw_photograph("MONOCYTE", 3)
    again, same_cell = draw_photograph("MONOCYTE", 3)
    assert np.array_equal(first, again)
    assert cell == same_cell
    for other in (("MONOCYTE", 4), ("LYMPHOCYTE", 3), ("MONOCYTE", 3, 1)):
        assert not np.array_equal(first, draw_photograph(*other)[0])


@pytest.mark.parametrize("label", CLASSES)
def test_second_exposure_shows_the_same_field_shifted(label):
    first, cell = draw_photograph(label, 8)
    second, moved = draw_photograph(label, 8, exposure=1)
    shift = np.array([moved.x - cell.x, moved.y - cell.y])
    assert 15 < np.hypot(*shift) < 45
    assert moved.radius == cell.radius
    dx, dy = shift.round().astype(int)
    aligned = cv2.warpAffine(first, np.array([[1.0, 0, dx], [0, 1.0, dy]]), (640, 480))
    middle = np.s_[50:-50, 50:-50, 1]
    assert np.corrcoef(aligned[middle].ravel(), second[middle].ravel())[0, 1] > 0.9
    another = draw_photograph(label, 9)[0]
    assert np.corrcoef(first[middle].ravel(), another[middle].ravel())[0, 1] < 0.6


def test_drawing_scales_with_its_size():
    image, cell = draw_photograph("NEUTROPHIL", 2, size=(160, 120))
    full_cell = draw_photograph("NEUTROPHIL", 2)[1]
    assert image.shape == (120, 160, 3)
    assert cell.radius == pytest.approx(full_cell.radius / 4)


@pytest.mark.parametrize("arguments", [("BASOPHIL", 0), ("MONOCYTE", -1), ("MONOCYTE", 0, -1)])
def test_photograph_refuses_what_it_cannot_draw(arguments):
    with pytest.raises(ValueError):
        draw_photograph(*arguments)


# --- one copy


def test_copy_has_the_cell_where_it_says():
    photo = np.full((480, 640, 3), 200, np.uint8)
    cell = Cell(420.0, 150.0, 30.0)
    cv2.circle(photo, (420, 150), 30, (90, 60, 180), cv2.FILLED, cv2.LINE_AA)
    for seed in range(20):
        copy, moved = augment_copy(photo, cell, np.random.default_rng(seed))
        assert copy.shape == (240, 320, 3)
        rows, columns = np.nonzero((copy[..., 1] < 130) & (copy[..., 2] > 140))
        assert columns.mean() == pytest.approx(moved.x, abs=0.5)
        assert rows.mean() == pytest.approx(moved.y, abs=0.5)
        assert np.sqrt(len(rows) / np.pi) == pytest.approx(moved.radius, rel=0.06)


def test_copies_are_turned_mirrored_and_have_black_corners():
    photo = np.full((480, 640, 3), 200, np.uint8)
    marks = [Cell(x, y, 1.0) for x, y in ((320, 240), (420, 240), (320, 340))]
    angles, mirrored, black = [], [], []
    for seed in range(60):
        copies = [augment_copy(photo, mark, np.random.default_rng(seed)) for mark in marks]
        (ox, oy), right, down = [(cell.x, cell.y) for _, cell in copies]
        right, down = (right[0] - ox, right[1] - oy), (down[0] - ox, down[1] - oy)
        angles.append(np.degrees(np.arctan(right[1] / right[0])))
        mirrored.append(right[0] * down[1] - right[1] * down[0] < 0)
        black.append((copies[0][0] == 0).all(axis=2).mean())
    assert 15 < np.max(np.abs(angles)) <= 20.001
    assert 0.25 < np.mean(mirrored) < 0.75
    assert 0.02 < np.mean(black) < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_the_cell_stays_inside_every_copy(seed):
    rng = np.random.default_rng(seed)
    for exposure in (0, 1):
        photo, cell = draw_photograph("EOSINOPHIL", seed, exposure)
        assert inside(cell, (640, 480))
        assert all(inside(augment_copy(photo, cell, rng)[1], (320, 240)) for _ in range(50))


# --- the folder


def test_demo_has_kaggles_layout(demo, truth):
    originals = sorted(path.name for path in (demo / ORIGINALS / "JPEGImages").iterdir())
    assert originals == [f"BloodImage_{i:05d}.jpg" for i in range(16)]
    lines = (demo / ORIGINALS / "labels.csv").read_text().splitlines()
    assert lines[0] == ",Image,Category"
    assert lines[1].startswith(",0,")
    assert len(lines) == 17
    counts = truth.groupby(["subset", "label"]).size().unstack()
    assert list(counts.columns) == list(CLASSES)
    assert (counts.loc["TRAIN"] == 9).all()
    assert (counts.loc["TEST"] == 3).all()
    assert (counts.loc["TEST_SIMPLE"] == 1).all()
    assert truth.name.str.fullmatch(r"_\d+_\d+\.jpeg").all()
    files = {path.relative_to(demo).as_posix() for path in (demo / COPIES).rglob("*.jpeg")}
    assert files == set(truth.path)
    assert cv2.imread(str(demo / ORIGINALS / "JPEGImages" / originals[0])).shape == (480, 640, 3)
    assert {cv2.imread(str(demo / path)).shape for path in truth.path} == {(240, 320, 3)}


def test_photographs_keep_their_label_and_subset(demo, truth):
    labels = pd.read_csv(demo / ORIGINALS / "labels.csv")
    category = dict(zip(labels.Image, labels.Category, strict=True))
    assert (truth.photo.str[-5:].astype(int).map(category) == truth.label).all()
    in_train = truth[truth.subset == "TRAIN"].photo
    in_test = truth[truth.subset == "TEST"].photo
    assert set(in_train).isdisjoint(in_test)
    assert set(truth[truth.subset == "TEST_SIMPLE"].photo) == set(in_test)
    assert truth[truth.subset != "TEST_SIMPLE"].photo.value_counts().eq(3).all()


def test_the_number_in_a_name_is_not_the_photograph():
    plan = module._plan_photos(24, 10, seed=0)
    spread = [len({Path(path).name.split("_")[1] for path in photo.copies}) for photo in plan]
    assert min(spread) > 1


@pytest.mark.parametrize(("photos_per_class", "pairs"), [(2, 0), (3, 0), (4, 1), (16, 2), (24, 3)])
def test_a_few_fields_are_exposed_twice_and_one_pair_is_split(photos_per_class, pairs):
    plan = pd.DataFrame(module._plan_photos(photos_per_class, 1, seed=0))
    fields = plan.groupby("field").agg(
        photos=("number", "size"), subsets=("subset", "nunique"), labels=("label", "nunique")
    )
    assert (fields.photos == 2).sum() == pairs
    assert (fields.photos <= 2).all()
    assert (fields.subsets == 2).sum() == min(pairs, 1)
    assert (fields.labels == 1).all()
    in_test = (plan.subset == "TEST").groupby(plan.label).sum()
    assert (in_test == max(1, round(0.2 * photos_per_class))).all()


def test_every_photograph_is_another_and_has_texture(demo):
    paths = sorted((demo / ORIGINALS / "JPEGImages").iterdir())
    images = [cv2.imread(str(path)) for path in paths]
    assert min(keypoints(image) for image in images) > 150
    small = np.stack([cv2.resize(image, (64, 48)).ravel() for image in images]).astype(float)
    similarity = np.corrcoef(small) - np.eye(len(small))
    assert similarity.max() < 0.95


def test_same_seed_gives_the_same_bytes_whatever_the_threads(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(max_workers=1))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        again = make_demo(tmp_path / "again", photos_per_class=4, copies=3)
    finally:
        cv2.setNumThreads(threads)
    assert digests(again) == digests(demo)


def test_another_seed_gives_other_photographs(demo, tmp_path):
    other = make_demo(tmp_path / "other", photos_per_class=2, copies=1, seed=1)
    assert set(digests(other).values()).isdisjoint(digests(demo).values())


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        make_demo(tmp_path, photos_per_class=2, copies=1)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def disk_full(path, image):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "_write_jpeg", disk_full)
    with pytest.raises(OSError, match="no space"):
        make_demo(tmp_path / "demo", photos_per_class=2, copies=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "numbers", [{"photos_per_class": 1}, {"copies": 0}, {"copies": 10_001}, {"seed": -1}]
)
def test_numbers_out_of_range_are_refused(tmp_path, numbers):
    with pytest.raises(ValueError):
        make_demo(tmp_path / "demo", **numbers)
    assert os.listdir(tmp_path) == []
