"""A folder of thousands is indexed, split and planned in bounded time; 100,000 in benchmarks/."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bloodcell_fastai import BloodcellError, Config, audit, open_dataset, split_table, train
from bloodcell_fastai.data import duplicates
from bloodcell_fastai.serving.predict import find_images

N = 5000
CLASSES = ("A", "B", "C", "D")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Small images in nested folders, most of them hard links."""
    root = tmp_path_factory.mktemp("load") / "set"
    rng = np.random.default_rng(0)
    sources = []
    for number in range(N):
        folder = root / CLASSES[number % 4] / f"part-{number // 500}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number}.jpg"
        if len(sources) < 40:
            Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).save(path)
            sources.append(path)
        else:
            os.link(sources[number % 40], path)
    return root


def seconds(step) -> float:
    """CPU seconds of all threads, to which what else the machine does adds little."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


@pytest.mark.slow
def test_thousands_of_images_are_planned_in_bounded_time(tree, tmp_path, capsys):
    config = Config(data=str(tree), arch="resnet18", weights="none", size=32, epochs=1)
    assert seconds(lambda: train(config, tmp_path, "plan", dry_run=True)) < 60
    assert "4,000 images train, 1,000 validate" in capsys.readouterr().out


def test_a_split_grows_no_faster_than_the_images(tree):
    """Placing each image by itself as a group would take minutes here."""
    table = open_dataset(tree).table
    assert len(table) == N
    assert set(table.photo) == {""}
    many = table.loc[np.tile(table.index, 10)].reset_index(drop=True)
    many["path"] += many.index.astype(str)
    split = None

    def divide():
        nonlocal split
        split = split_table(many)

    assert seconds(divide) < 10
    assert split.groupby("label").part.value_counts(normalize=True).xs(
        "valid", level="part"
    ).tolist() == pytest.approx([0.2] * 4, abs=0.001)


def test_images_are_found_one_at_a_time(tree):
    assert seconds(lambda: list(find_images([tree] * 3))) < 10


def test_too_many_images_to_compare_are_refused_at_once(tree, monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_IMAGES", N - 1)
    with pytest.raises(BloodcellError, match="5,000 images are too many to compare with") as caught:
        audit(open_dataset(tree))
    assert "photos.csv" in caught.value.hint
