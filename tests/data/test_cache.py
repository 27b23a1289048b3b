import os
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from fastai.vision.all import Pipeline, Resize, ResizeMethod, ToTensor

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.data import cache, crop
from bloodcell_fastai.data.cache import (
    BATCHES_AHEAD,
    ImageReader,
    cache_file,
    cache_root,
    clear_cache,
    decode,
)
from bloodcell_fastai.data.loaders import BloodImage, Crop
from bloodcell_fastai.errors import CacheWarning
from bloodcell_fastai.files import LOCK


@pytest.fixture
def paths(demo_table, tmp_path, monkeypatch):
    """A few images of the demo set, with an empty cache of their own."""
    monkeypatch.setenv("BLOODCELL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    copies = [shutil.copy(path, tmp_path / "images") for path in demo_table.path[::16]]
    return [str(path) for path in copies]


def cached_files():
    return sorted(path for path in cache_root().glob("*") if path.name != LOCK)


@pytest.mark.parametrize("crop", ["cell", "frame"])
def test_decoding_gives_fastais_pixels(paths, crop):
    resize = Resize(96, method=ResizeMethod.Squish)
    fastais = Pipeline([BloodImage.create, Crop(crop), resize, ToTensor()])
    for path in paths:
        expected = fastais(path).permute(1, 2, 0).numpy()
        assert np.array_equal(decode(path, 96, crop).pixels, expected)


def test_the_cache_gives_the_decoded_pixels(paths):
    cached = ImageReader.open(paths, 64, build=True)
    assert len(cached_files()) == 1
    wanted = [[paths[3], paths[0]], [paths[1]]]
    plain = list(ImageReader(64).batches(wanted))
    for ours, expected in zip(cached.batches(wanted), plain, strict=True):
        assert ours.paths == expected.paths
        assert torch.equal(ours.pixels, expected.pixels)
        assert np.array_equal(ours.boxes, expected.boxes)
        assert np.array_equal(ours.has_cell, expected.has_cell)
        assert ours.pixels.dtype == torch.uint8


def test_no_thread_decodes_where_none_is_asked_for(paths, monkeypatch):
    monkeypatch.setattr(cache, "ThreadPoolExecutor", None)
    expected, chunks = ImageReader(32).read, [paths[:2], paths[2:3]]
    with pytest.raises(TypeError):
        expected(paths)
    found = list(ImageReader(32, threads=0).batches(chunks))
    assert [batch.paths for batch in found] == chunks
    assert ImageReader(32, threads=0).read(["gone.png"]).unreadable.keys() == {"gone.png"}


def test_a_cached_image_is_not_searched_for_its_nucleus_again(paths, monkeypatch):
    reader = ImageReader.open(paths, 64, build=True)
    monkeypatch.setattr(crop, "_locate", None)  # a search would fail
    batch = reader.read(paths)
    assert batch.boxes.shape == (len(paths), 4)
    assert batch.has_cell.all()


def test_the_box_is_the_crop_of_the_original(paths):
    left, top, right, bottom = decode(paths[0], 64).box
    assert 0 <= left < right <= 320
    assert 0 <= top < bottom <= 240
    assert decode(paths[0], 64, "frame").box == (0, 0, 320, 240)


def test_the_cache_is_built_once_and_shared_whatever_the_order(paths, monkeypatch):
    ImageReader.open(paths, 64, build=True)
    monkeypatch.setattr(cache, "decode", None)  # a second decoding would fail
    again = ImageReader.open(paths[::-1], 64)
    assert next(again.batches([paths[:2]])).pixels.shape == (2, 3, 64, 64)


def test_the_cache_of_whole_images_is_another(paths):
    cells, frames = (ImageReader.open(paths, 64, crop, build=True) for crop in ("cell", "frame"))
    assert len(cached_files()) == 2
    both = [reader.read(paths[:2]).pixels for reader in (cells, frames)]
    assert not torch.equal(*both)


def test_without_build_nothing_is_written(paths):
    assert next(ImageReader.open(paths, 64).batches([paths[:1]])).pixels.shape == (1, 3, 64, 64)
    assert cached_files() == []


def test_a_changed_image_is_decoded_anew_and_the_old_cache_goes(paths):
    ImageReader.open(paths, 64, build=True)
    shutil.copy(paths[1], paths[0])
    os.utime(paths[0], (1, 1))
    pixels = ImageReader.open(paths, 64, build=True).read(paths[:2]).pixels
    assert torch.equal(pixels[0], pixels[1])
    assert len(cached_files()) == 1


def test_each_size_has_a_cache_of_its_own(paths):
    for size in (64, 32):
        reader = ImageReader.open(paths, size, build=True)
        assert reader.read(paths[:1]).pixels.shape[-1] == size
    assert len(cached_files()) == 2


def test_a_cache_cut_short_is_built_again(paths):
    ImageReader.open(paths, 64, build=True)
    file = cache_file(sorted(paths), 64, "cell")
    file.write_bytes(file.read_bytes()[:5000])
    pixels = ImageReader.open(paths, 64, build=True).read(paths[:1]).pixels
    assert np.array_equal(pixels[0].permute(1, 2, 0), decode(paths[0], 64).pixels)


def test_an_image_that_came_later_is_decoded(paths):
    reader = ImageReader.open(paths[:-1], 64, build=True)
    pixels = reader.read(paths[-2:]).pixels
    assert np.array_equal(pixels[1].permute(1, 2, 0), decode(paths[-1], 64).pixels)


def test_a_full_disk_means_no_cache_and_a_warning(paths, monkeypatch):
    usage = shutil.disk_usage(cache_root().parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    with pytest.warns(CacheWarning, match=r"GB are needed.*1\.1 GB are free") as caught:
        reader = ImageReader.open(paths, 64, build=True)
    message = str(caught[0].message)
    assert str(cache_root()) in message
    assert "again in every epoch" in message and "$BLOODCELL_CACHE" in message
    assert reader.read(paths[:1]).pixels.shape == (1, 3, 64, 64)
    assert cached_files() == []


def test_a_cache_that_cannot_be_written_is_told_with_the_reason(paths, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("BLOODCELL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(CacheWarning, match="Not a directory"):
        reader = ImageReader.open(paths, 64, build=True)
    assert len(reader.read(paths)) == len(paths)


def test_an_unreadable_image_leaves_no_half_cache(paths):
    open(paths[2], "w").write("no image")  # noqa: SIM115, PTH123
    with pytest.raises(BloodcellError, match="cannot be read"):
        ImageReader.open(paths, 64, build=True)
    assert cached_files() == []


def test_the_cache_is_removed_on_request(paths):
    ImageReader.open(paths, 64, build=True)
    assert clear_cache() > len(paths) * 64 * 64 * 3
    assert cached_files() == []


def test_decoding_runs_ahead_but_not_far(paths):
    drawn = []

    def chunks():
        for path in paths * 10:
            drawn.append(path)
            yield [path]

    stream = ImageReader(32).batches(chunks())
    batch = next(stream)
    assert batch.paths == [paths[0]]
    assert batch.pixels.shape == (1, 3, 32, 32)
    assert len(drawn) == 1 + BATCHES_AHEAD
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_unreadable_files_are_listed_with_their_reason(paths, tmp_path):
    missing, text = str(tmp_path / "none.jpg"), str(tmp_path / "text.jpg")
    open(text, "w").write("no image")  # noqa: SIM115, PTH123
    batch = ImageReader(32).read([missing, paths[0], text])
    assert batch.paths == [paths[0]]
    assert len(batch) == len(batch.pixels) == len(batch.boxes) == len(batch.has_cell) == 1
    assert list(batch.unreadable) == [missing, text]
    assert batch.unreadable[missing] == "no such file"
    assert "cannot identify" in batch.unreadable[text]


@pytest.mark.parametrize("build", [True, False])
def test_an_image_can_be_asked_for_twice(paths, build):
    batch = ImageReader.open(paths, 32, build=build).read([paths[1], paths[0], paths[1]])
    assert batch.paths == [paths[1], paths[0], paths[1]]
    assert torch.equal(batch.pixels[0], batch.pixels[2])
    assert batch.boxes.tolist()[0] == batch.boxes.tolist()[2]


def test_no_image_is_an_empty_batch():
    batch = ImageReader(32).read([])
    assert batch.pixels.shape == (0, 3, 32, 32)
    assert batch.boxes.shape == (0, 4)


def test_a_pickle_holds_no_images(paths):
    again = pickle.loads(pickled := pickle.dumps(ImageReader.open(paths, 64, build=True)))
    assert len(pickled) < 1000
    assert next(again.batches([paths[:1]])).pixels.shape == (1, 3, 64, 64)


def test_pixels_kept_on_a_device_are_the_same(paths):
    """As on a GPU with room for them; here the device is the CPU."""
    reader = ImageReader.open(paths, 64, build=True)
    expected = reader.read(paths[:3]).pixels
    reader._on_device = torch.from_numpy(np.ascontiguousarray(reader._cached["pixels"]))
    assert torch.equal(reader.read(paths[:3]).pixels, expected)


def test_decoded_images_lie_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("BLOODCELL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "bloodcell_fastai"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "bloodcell_fastai"
    monkeypatch.setattr(cache, "user_home", lambda: tmp_path / "temporary")  # where there is none
    assert cache_root() == tmp_path / "temporary" / ".cache" / "bloodcell_fastai"


def test_files_that_are_gone_have_no_cache(paths):
    assert cache_file(paths, 64, "cell") is not None
    assert cache_file([*paths, "gone.png"], 64, "cell") is None
