"""Which photograph an image is a copy of: found with and without the originals."""

import os
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from bloodcell_fastai.data.demo import augment_copy, draw_photograph, make_demo
from bloodcell_fastai.data.duplicates import (
    KAGGLE_TABLE,
    _group,
    _Link,
    find_photos,
    known_photos,
    match_pair,
    overlap,
    write_known_photos,
)

ORIGINALS = "dataset-master/dataset-master/JPEGImages"


def save(path, rgb):
    path.write_bytes(cv2.imencode(path.suffix, rgb[:, :, ::-1])[1].tobytes())
    return path


def save_copies(folder, label, seed, count, exposure=0):
    photo, cell = draw_photograph(label, seed, exposure)
    rng = np.random.default_rng([seed, exposure])
    return [
        save(folder / f"{label}-{seed}-{exposure}-{i}.jpeg", augment_copy(photo, cell, rng)[0])
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("made") / "demo", photos_per_class=4, copies=4)


@pytest.fixture(scope="module")
def truth(demo):
    table = pd.read_csv(demo / "truth.csv")
    return table.assign(path=[demo / path for path in table.path])


@pytest.fixture(scope="module")
def originals(demo):
    return sorted((demo / ORIGINALS).iterdir())


@pytest.fixture(scope="module")
def with_originals(truth, originals):
    return find_photos(truth.path, originals)


@pytest.fixture(scope="module")
def without_originals(truth):
    return find_photos(truth.path)


def test_every_copy_finds_its_original(with_originals, truth):
    assert with_originals.original.tolist() == truth.photo.tolist()
    assert (with_originals.inliers > 20).all()


def test_photo_is_the_field_so_that_two_exposures_share_it(with_originals, truth):
    assert truth.photo.nunique() > truth.field.nunique()
    assert adjusted_rand_score(with_originals.photo, truth.field) == 1


def test_fields_are_found_without_originals(without_originals, truth):
    assert adjusted_rand_score(without_originals.photo, truth.field) == 1
    assert without_originals.photo.str.fullmatch(r"photo-\d{4}").all()
    assert (without_originals.original == without_originals.photo).all()
    assert (without_originals.margin > 0).all()


def test_table_has_a_row_for_each_path_in_the_given_order(with_originals, truth):
    assert list(with_originals) == ["path", "original", "photo", "inliers", "margin"]
    assert with_originals.path.tolist() == truth.path.tolist()


def test_the_result_does_not_depend_on_workers(without_originals, truth):
    pd.testing.assert_frame_equal(find_photos(truth.path, workers=3), without_originals)


def test_the_result_does_not_depend_on_order(without_originals, truth):
    backwards = find_photos(truth.path[::-1])[::-1]
    assert adjusted_rand_score(backwards.photo, without_originals.photo) == 1
    assert backwards.inliers.tolist() == without_originals.inliers.tolist()


def test_copies_of_missing_originals_are_grouped_among_themselves(originals, truth):
    # One photograph that stands for itself, and one of a field whose other exposure is kept.
    twins = truth.groupby("field").photo.unique().loc[lambda photos: photos.str.len() > 1].iloc[0]
    single = truth.photo[~truth.photo.isin(twins)].iloc[0]
    gone = {single, twins[1]}
    found = find_photos(truth.path, [path for path in originals if path.stem not in gone])

    assert found.photo[truth.photo == single].unique().tolist() == ["missing-0001"]
    assert adjusted_rand_score(found.photo, truth.field) == 1
    kept = ~truth.photo.isin(gone)
    assert found.original[kept].tolist() == truth.photo[kept].tolist()
    assert (found.photo[truth.photo.isin(twins)] == twins[0]).all()


@pytest.mark.parametrize("flip", [0, 1, -1])
def test_mirrored_copies_belong_together(tmp_path, flip):
    photo = cv2.resize(draw_photograph("MONOCYTE", 5)[0], (320, 240))
    paths = [save(tmp_path / "a.png", photo), save(tmp_path / "b.png", cv2.flip(photo, flip))]
    paths += save_copies(tmp_path, "NEUTROPHIL", 6, 2)
    assert adjusted_rand_score(find_photos(paths).photo, list("aabb")) == 1


def test_two_photographs_of_one_field_under_two_labels(tmp_path):
    (tmp_path / "LYMPHOCYTE").mkdir()
    (tmp_path / "MONOCYTE").mkdir()
    first = save(tmp_path / "LYMPHOCYTE/1.png", draw_photograph("MONOCYTE", 5, exposure=0)[0])
    second = save(tmp_path / "MONOCYTE/1.png", draw_photograph("MONOCYTE", 5, exposure=1)[0])
    found = find_photos([first, second], [first, second])
    # Their stems are the same, so that they are named by their folders too.
    assert found.original.tolist() == ["LYMPHOCYTE/1.png", "MONOCYTE/1.png"]
    assert len(set(found.photo)) == 1
    assert 0.8 < overlap(first, second) < 1


def test_images_without_features_stand_alone(tmp_path):
    plain = [np.full((240, 320, 3), value, np.uint8) for value in (0, 255, 128)]
    paths = [save(tmp_path / f"{i}.png", image) for i, image in enumerate(plain)]
    paths.append(save(tmp_path / "dot.png", np.zeros((1, 1, 3), np.uint8)))
    original = save(tmp_path / "original.png", draw_photograph("MONOCYTE", 5)[0])
    for found in (find_photos(paths), find_photos(paths, [original])):
        assert found.photo.nunique() == len(paths)
        assert (found[["inliers", "margin"]] == 0).all(axis=None)


def test_single_image(tmp_path):
    found = find_photos(save_copies(tmp_path, "MONOCYTE", 5, 1))
    assert found.photo.tolist() == ["photo-0001"]
    assert found.inliers.tolist() == [0]


def test_no_images():
    assert list(find_photos([])) == ["path", "original", "photo", "inliers", "margin"]


def test_identical_files_belong_together_even_without_features(tmp_path):
    first = save(tmp_path / "a.png", np.zeros((240, 320, 3), np.uint8))
    second = Path(shutil.copy(first, tmp_path / "ü.png"))
    other = save(tmp_path / "c.png", np.full((240, 320, 3), 255, np.uint8))
    assert find_photos([first, other, second]).photo.tolist() == [
        "photo-0001",
        "photo-0002",
        "photo-0001",
    ]


def test_unreadable_files_stand_alone(tmp_path):
    paths = [tmp_path / name for name in ("empty.jpeg", "empty2.jpeg", "text.jpeg", "gone.jpeg")]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(b"")
    paths[2].write_text("no image")
    paths += save_copies(tmp_path, "MONOCYTE", 5, 2)
    assert adjusted_rand_score(find_photos(paths).photo, list("abcdee")) == 1


def test_one_wrong_link_does_not_join_two_groups():
    strong = [_Link(a, a + 1, 80, True) for a in (0, 1, 3, 4)]  # 0-1-2 and 3-4-5
    wrong = [_Link(2, 3, 12, True), _Link(2, 4, 12, True)]
    refused = [_Link(0, 5, 90, False)]
    assert _group(6, strong + wrong + refused).tolist() == [0, 0, 0, 1, 1, 1]
    assert len(set(_group(6, [*strong, *wrong, _Link(1, 5, 12, True)]))) == 1


def test_black_corners_are_no_common_feature(tmp_path):
    def cornered(seed):
        noise = np.random.default_rng(seed).integers(100, 256, (240, 320, 3))
        image = cv2.GaussianBlur(noise.astype(np.uint8), (0, 0), 3)
        image = cv2.normalize(image, None, 60, 255, cv2.NORM_MINMAX)
        for corner in ([(0, 0), (150, 0), (0, 60)], [(320, 240), (200, 240), (320, 180)]):
            cv2.fillPoly(image, [np.array(corner)], (0, 0, 0))
        return save(tmp_path / f"{seed}.png", image)

    first, second = cornered(1), cornered(2)
    assert find_photos([first, second]).photo.nunique() == 2
    assert len(match_pair(first, first)[0]) > 50


def test_matched_points_show_the_same_thing(tmp_path):
    photo, _ = draw_photograph("EOSINOPHIL", 3)
    mirrored = cv2.flip(cv2.resize(photo, (320, 240), interpolation=cv2.INTER_AREA), 1)
    a, b = save(tmp_path / "a.png", photo), save(tmp_path / "b.png", mirrored)
    points_a, points_b = match_pair(a, b)
    assert len(points_a) == len(points_b) > 30
    expected = np.stack([319.5 - points_a[:, 0] / 2, points_a[:, 1] / 2], axis=1)
    assert np.median(np.abs(points_b - expected)) < 1


def test_images_of_two_photographs_have_no_matched_points(tmp_path):
    a, b = (save_copies(tmp_path, "MONOCYTE", seed, 1)[0] for seed in (1, 2))
    points_a, points_b = match_pair(a, b)
    assert points_a.shape == points_b.shape == (0, 2)
    assert overlap(a, b) == 0


def test_progress_is_reported_to_the_end(tmp_path):
    reported = []
    find_photos(
        save_copies(tmp_path, "MONOCYTE", 5, 3), progress=lambda *event: reported.append(event)
    )
    assert ("reading images" in {stage for *_, stage in reported}) and reported[0][1] == 3
    last = {stage: (done, total) for done, total, stage in reported}
    assert all(done == total for done, total in last.values())


def test_the_table_of_known_photographs_finds_renamed_files(with_originals, tmp_path):
    table = tmp_path / "table.csv.xz"
    write_known_photos(with_originals, table)
    row = with_originals.iloc[7]
    renamed = Path(shutil.copy(row.path, tmp_path / "renamed.jpeg"))
    unknown = save_copies(tmp_path, "MONOCYTE", 99, 1)[0]
    known = known_photos([unknown, renamed, tmp_path / "gone.jpeg"], table)
    assert known.path.tolist() == [renamed]
    assert known.iloc[0].drop("path").to_dict() == row.drop("path").to_dict()


def test_a_photograph_may_be_called_as_a_missing_value(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((9, 9, 3), np.uint8))
    row = {"path": path, "original": "NA", "photo": "nan", "inliers": 0, "margin": 0}
    write_known_photos(pd.DataFrame([row]), tmp_path / "table.csv.xz")
    known = known_photos([path], tmp_path / "table.csv.xz")
    assert known[["original", "photo"]].values.tolist() == [["NA", "nan"]]


def test_the_table_of_the_kaggle_set():
    known = pd.read_csv(KAGGLE_TABLE)
    assert len(known) == 12_515 - 2  # two files are there twice
    assert known.original.nunique() == 348
    assert KAGGLE_TABLE.stat().st_size < 250_000


@pytest.mark.slow
@pytest.mark.skipif(
    "BLOODCELL_DATA" not in os.environ, reason="needs Kaggle's zip: set BLOODCELL_DATA to its path"
)
def test_the_table_of_the_kaggle_set_is_what_the_pixels_say(tmp_path):
    with zipfile.ZipFile(os.environ["BLOODCELL_DATA"]) as archive:
        names = sorted(archive.namelist())
        copies = [name for name in names if "dataset2-master/images/T" in name and ".jpeg" in name]
        archive.extractall(tmp_path, [*copies[::250], *(n for n in names if "/JPEGImages/" in n)])
    paths = [tmp_path / name for name in copies[::250]]
    found = find_photos(paths, sorted(tmp_path.rglob("JPEGImages/*.jpg")))
    columns = ["path", "original", "photo"]
    pd.testing.assert_frame_equal(found[columns], known_photos(paths)[columns])
