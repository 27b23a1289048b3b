import os
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from fastai.vision.all import Pipeline, ToTensor

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.data import pixels
from bloodcell_fastai.data.blocks import BloodImage, item_transforms
from bloodcell_fastai.data.pixels import (
    Pixels,
    cache_file,
    cache_root,
    clear_cache,
    decode,
    decode_ahead,
)


@pytest.fixture
def paths(demo_table, tmp_path, monkeypatch):
    """A few images of the demo set, with an empty cache of their own."""
    monkeypatch.setenv("BLOODCELL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    copies = [shutil.copy(path, tmp_path / "images") for path in demo_table.path[::16]]
    return [str(path) for path in copies]


def cached_files():
    return sorted(path for path in pixels.cache_root().glob("*") if path.name != ".lock")


@pytest.mark.parametrize("crop", ["cell", "frame"])
def test_decoding_gives_fastais_pixels(paths, crop):
    fastais = Pipeline([BloodImage.create, *item_transforms(96, crop), ToTensor()])
    for path in paths:
        expected = fastais(path).permute(1, 2, 0).numpy()
        assert np.array_equal(decode(path, 96, crop), expected)


def test_the_cache_gives_the_decoded_pixels(paths):
    cached = Pixels.open(paths, 64, build=True)
    assert len(cached_files()) == 1
    wanted = [[paths[3], paths[0]], [paths[1]]]
    plain = list(Pixels(64).batches(wanted))
    for ours, expected in zip(cached.batches(wanted), plain, strict=True):
        assert torch.equal(ours, expected)
        assert ours.dtype == torch.uint8
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_the_cache_is_built_once_and_shared_whatever_the_order(paths, monkeypatch):
    Pixels.open(paths, 64, build=True)
    monkeypatch.setattr(pixels, "decode", None)  # a second decoding would fail
    again = Pixels.open(paths[::-1], 64)
    assert next(again.batches([paths[:2]])).shape == (2, 3, 64, 64)


def test_the_cache_of_whole_frames_is_another(paths):
    cells, frames = (Pixels.open(paths, 64, crop, build=True) for crop in ("cell", "frame"))
    assert len(cached_files()) == 2
    both = [next(pictures.batches([paths[:2]])) for pictures in (cells, frames)]
    assert not torch.equal(*both)


def test_without_build_nothing_is_written(paths):
    assert next(Pixels.open(paths, 64).batches([paths[:1]])).shape == (1, 3, 64, 64)
    assert cached_files() == []


def test_a_changed_image_is_decoded_anew_and_the_old_cache_goes(paths):
    Pixels.open(paths, 64, build=True)
    shutil.copy(paths[1], paths[0])
    os.utime(paths[0], (1, 1))
    batch = next(Pixels.open(paths, 64, build=True).batches([paths[:2]]))
    assert torch.equal(batch[0], batch[1])
    assert len(cached_files()) == 1


def test_each_size_has_a_cache_of_its_own(paths):
    for size in (64, 32):
        pictures = Pixels.open(paths, size, build=True)
        assert next(pictures.batches([paths[:1]])).shape[-1] == size
    assert len(cached_files()) == 2


def test_a_cache_cut_short_is_built_again(paths):
    Pixels.open(paths, 64, build=True)
    file = cache_file(sorted(paths), 64, "cell")
    file.write_bytes(file.read_bytes()[:5000])
    batch = next(Pixels.open(paths, 64, build=True).batches([paths[:1]]))
    assert np.array_equal(batch[0].permute(1, 2, 0), decode(paths[0], 64))


def test_an_image_that_came_later_is_decoded(paths):
    pictures = Pixels.open(paths[:-1], 64, build=True)
    batch = next(pictures.batches([paths[-2:]]))
    assert np.array_equal(batch[1].permute(1, 2, 0), decode(paths[-1], 64))


def test_a_full_disk_means_no_cache_and_no_failure(paths, monkeypatch):
    usage = shutil.disk_usage(pixels.cache_root().parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    pictures = Pixels.open(paths, 64, build=True)
    assert next(pictures.batches([paths[:1]])).shape == (1, 3, 64, 64)
    assert cached_files() == []


def test_an_unreadable_image_leaves_no_half_cache(paths):
    open(paths[2], "w").write("no image")  # noqa: SIM115, PTH123
    with pytest.raises(BloodcellError, match="cannot be read"):
        Pixels.open(paths, 64, build=True)
    assert cached_files() == []


def test_the_cache_is_removed_on_request(paths):
    Pixels.open(paths, 64, build=True)
    assert clear_cache() > len(paths) * 64 * 64 * 3
    assert cached_files() == []


def test_decoding_runs_ahead_but_not_far(paths):
    drawn = []

    def chunks():
        for path in paths * 10:
            drawn.append(path)
            yield [path]

    stream = decode_ahead(chunks(), 32, "cell")
    chunk, images = next(stream)
    assert chunk == [paths[0]]
    assert images[0].pixels.shape == (32, 32, 3)
    assert len(drawn) == 1 + pixels.BATCHES_AHEAD
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_decoding_hands_errors_on(paths, tmp_path):
    _, images = next(decode_ahead([[paths[0], str(tmp_path / "none.jpg")]], 32, "cell"))
    assert images[0].pixels.shape == (32, 32, 3)
    assert isinstance(images[1], OSError)


def test_a_pickle_holds_no_pictures(paths):
    again = pickle.loads(pickled := pickle.dumps(Pixels.open(paths, 64, build=True)))
    assert len(pickled) < 1000
    assert next(again.batches([paths[:1]])).shape == (1, 3, 64, 64)


def test_pixels_kept_on_a_device_are_the_same(paths):
    """As on a GPU with room for them; here the device is the CPU."""
    pictures = Pixels.open(paths, 64, build=True)
    expected = next(pictures.batches([paths[:3]]))
    pictures._on_device = torch.from_numpy(np.array(pictures._cached))
    pictures._cached = pictures._cached[:0]  # nothing is read from there
    assert torch.equal(next(pictures.batches([paths[:3]])), expected)


def test_decoded_images_lie_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("BLOODCELL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "bloodcell_fastai"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "bloodcell_fastai"


def test_files_that_are_gone_have_no_cache(paths):
    assert cache_file(paths, 64, "cell") is not None
    assert cache_file([*paths, "gone.png"], 64, "cell") is None
