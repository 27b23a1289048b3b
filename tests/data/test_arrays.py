"""Data sets that are one .npz, as MedMNIST's: drawn here, with the arrays that BloodMNIST has."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.data import archives, arrays
from bloodcell_fastai.data.archives import content_key, holds_images
from bloodcell_fastai.data.arrays import BLOODMNIST, holds_arrays, unpack_arrays

GENERATOR = np.random.default_rng(0)


def subset(name: str, n: int, shape=(12, 10, 3), classes: int = 8) -> dict[str, np.ndarray]:
    images = GENERATOR.integers(0, 256, (n, *shape), dtype=np.uint8)
    labels = (np.arange(n) % classes).astype(np.uint8)[:, None]
    return {f"{name}_images": images, f"{name}_labels": labels}


def npz(path: Path, save=np.savez, **arrays) -> Path:
    save(path, **arrays)
    return path


def refused(path: Path, match: str) -> None:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(BloodcellError, match=match) as caught:
        unpack_arrays(path, path.parent / "out")
    assert caught.value.hint
    assert sorted(path.parent.rglob("*")) == before


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["bloodmnist.npz", "bloodmnist_64.npz", "Blood_MNIST_subset.npz"])
def test_bloodmnist(tmp_path, save, name):
    content = {**subset("train", 17), **subset("val", 8), **subset("test", 9)}
    path, shown = npz(tmp_path / name, save, **content), []
    assert holds_arrays(path) and not holds_images(path) and content_key(path)
    target = unpack_arrays(path, tmp_path / "out", lambda *step: shown.append(step))
    assert target == tmp_path / "out"
    assert shown[0] == ("Unpacking", 1, 34) and shown[-1] == ("Unpacking", 34, 34)
    files = sorted(p.relative_to(target).as_posix() for p in target.rglob("*.*"))
    assert files == sorted(
        f"{part}/{BLOODMNIST[str(n % 8)]}/{n:05}.png"
        for part, count in (("train", 17), ("val", 8), ("test", 9))
        for n in range(count)
    )
    for part, number in (("train", 0), ("train", 11), ("test", 8)):
        file = target / part / BLOODMNIST[str(number % 8)] / f"{number:05}.png"
        assert np.array_equal(pixels(file), content[f"{part}_images"][number])


def test_bloodmnist_is_known_by_its_numbers_of_images(tmp_path, monkeypatch):
    assert sum(arrays.BLOODMNIST_COUNTS.values()) == 17_092
    few = {"train": 9, "val": 8, "test": 2}
    monkeypatch.setattr(arrays, "BLOODMNIST_COUNTS", few)
    parts = {name: subset(name, n) for name, n in few.items()}
    path = npz(tmp_path / "cells.npz", **parts["train"], **parts["val"], **parts["test"])
    target = unpack_arrays(path, tmp_path / "out")
    assert sorted(p.name for p in (target / "val").iterdir()) == sorted(BLOODMNIST.values())


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1)])
def test_grey_images_of_another_set(tmp_path, shape):
    content = subset("train", 5, shape, classes=2)
    content["train_labels"] = content["train_labels"][:, 0].astype(np.int64)
    path = npz(tmp_path / "tissuemnist.npz", **content)
    assert holds_arrays(path)
    target = unpack_arrays(path, tmp_path / "out")
    files = sorted(p.relative_to(target).as_posix() for p in target.rglob("*.*"))
    assert files == [f"train/{n % 2}/{n:05}.png" for n in (0, 2, 4, 1, 3)]
    expected = content["train_images"][3].reshape(12, 10)
    assert np.array_equal(pixels(target / "train/1/00003.png"), expected)


def test_a_number_that_bloodmnist_has_not(tmp_path):
    path = npz(tmp_path / "bloodmnist_and_more.npz", **subset("train", 9, classes=9))
    names = {folder.name for folder in (unpack_arrays(path, tmp_path / "out") / "train").iterdir()}
    assert names == set("012345678")


def changed(**arrays) -> dict[str, np.ndarray]:
    return {**subset("train", 6), **arrays}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(train_labels=np.eye(6, 8)), r"\(6, 8\), 8 values for each image"),
        (changed(train_labels=np.ones((6, 14), np.uint8)), "one-hot, or .* several labels"),
        (changed(train_labels=np.zeros(6)), "train_labels is of float64"),
        (changed(train_labels=np.array(list("abcdef"))), "train_labels is of <U1"),
        (changed(train_labels=np.zeros((6, 1, 1), int)), "one for each image"),
        (changed(train_labels=np.zeros((6, 0), int)), "6 train_images and 0 train_labels"),
        (changed(train_labels=np.zeros(5, int)), "holds 6 train_images and 5 train_labels"),
        (changed(train_labels=np.array([{}] * 6)), "holds Python objects"),
        (changed(train_images=np.array([{}] * 6)), "holds Python objects"),
        (changed(train_images=np.zeros((6, 8, 8, 3))), "is of float64 and shape"),
        (changed(train_images=np.zeros((6, 8, 8), np.uint16)), "is of uint16"),
        (changed(train_images=np.zeros((6, 3, 8, 8), np.uint8)), r"shape \(6, 3, 8, 8\)"),
        (changed(train_images=np.zeros((6, 8, 8, 8), np.uint8)), r"shape \(6, 8, 8, 8\)"),
        (changed(train_images=np.zeros((6, 8, 0, 3), np.uint8)), r"images of \(8, 0\) pixels"),
        (changed(train_images=np.zeros((6, 64), np.uint8)), r"shape \(6, 64\)"),
        (
            changed(train_images=np.asfortranarray(np.zeros((6, 8, 8), np.uint8))),
            "in the order of Fortran",
        ),
        ({**changed(), "test_images": np.zeros((1, 8, 8), np.uint8)}, "no test_labels"),
        ({**changed(), "val_labels": np.zeros(1, int)}, "no val_images"),
        (subset("train", 0), "holds no images"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, content, message):
    refused(npz(tmp_path / "bloodmnist.npz", **content), message)


def test_a_header_of_another_version(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.zeros((6, 8, 8), np.uint8), version=(2, 0))
    path = npz(tmp_path / "x.npz", **subset("train", 6))
    with zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr("test_images.npy", content.getvalue())
        zipped.writestr("test_labels.npy", content.getvalue())
    refused(path, r"test_images is of version \(2, 0\) of the format")


def with_header(path: Path, shape: str) -> Path:
    """An .npz whose images say that they have another shape than they have."""
    true = subset("train", 6)
    np.save(images := io.BytesIO(), true["train_images"])
    np.save(labels := io.BytesIO(), true["train_labels"])
    content = images.getvalue().replace(b"(6, 12, 10, 3)", shape.encode().ljust(14))
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("train_images.npy", content)
        zipped.writestr("train_labels.npy", labels.getvalue())
    return path


@pytest.mark.parametrize("shape", ["(6, 12, 11, 3)", "(6,999999,9,3)", "(9, 12, 10, 3)"])
def test_a_header_that_lies(tmp_path, shape):
    path = with_header(tmp_path / "x.npz", shape)
    assert holds_arrays(path)
    refused(path, "has not the .* bytes of its shape")


@pytest.mark.parametrize("shape", ["(6, 12, 10, -3)", "(6, 'a', 10)", "no header"])
def test_a_header_that_is_none(tmp_path, shape):
    refused(with_header(tmp_path / "x.npz", shape), "x.npz")


def test_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "SMALL", 2**20)
    content = changed(train_images=np.zeros((6, 500, 700), np.uint8))
    refused(npz(tmp_path / "x.npz", np.savez_compressed, **content), "would unpack from")


def test_no_room(tmp_path, monkeypatch):
    usage = archives.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(npz(tmp_path / "x.npz", **changed()), "No room to unpack")


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b.replace(b"\x05\x06\x07", b"")])
def test_a_damaged_file(tmp_path, damage):
    images = np.arange(6 * 12 * 10, dtype=np.uint8).reshape(6, 12, 10)
    path = npz(tmp_path / "x.npz", **changed(train_images=images))
    path.write_bytes(damage(path.read_bytes()))
    refused(path, "x.npz is not a .npz that can be unpacked")


def test_an_interrupted_unpack_leaves_nothing(tmp_path):
    path = npz(tmp_path / "x.npz", **changed())

    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack_arrays(path, tmp_path / "out", stop)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_what_holds_no_such_arrays(tmp_path):
    assert not holds_arrays(npz(tmp_path / "a.npz", x=np.zeros(3)))
    assert not holds_arrays(npz(tmp_path / "b.npz", train_images=np.zeros(3), y=np.zeros(3)))
    (tmp_path / "c.npz").write_bytes(b"no zip")
    assert not holds_arrays(tmp_path / "c.npz")
    assert not holds_arrays(tmp_path)
    assert not holds_arrays(tmp_path / "nowhere.npz")
