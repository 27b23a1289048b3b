import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import DataLoaders, Normalize

from bloodcell_fastai import BloodcellError, augmentation, blood_dls, split_table
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.data.cache import decode
from bloodcell_fastai.data.loaders import BloodImage, config_dls, normalization

ARCH = "maxvit_nano_rw_256.sw_in1k"


@pytest.fixture(scope="module")
def table(demo_table):
    return split_table(demo_table, "photo")


@pytest.fixture(scope="module")
def dls(table):
    return blood_dls(table, size=64, bs=8)


def test_a_batch(dls, table):
    images, labels = dls.one_batch()
    assert images.shape == (8, 3, 64, 64)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert list(dls.vocab) == sorted(set(table.label))
    assert len(dls.train_ds) == (table.part == "train").sum()
    assert len(dls.valid_ds) == (table.part == "valid").sum()


def test_the_batches_know_what_they_are_made_for(dls, table):
    assert isinstance(dls, DataLoaders)
    assert (dls.arch, dls.size, dls.crop) == (ARCH, 64, "cell")
    assert (dls.reader.size, dls.reader.crop) == (64, "cell")
    whole = blood_dls(table, "resnet18", 32, crop="frame", cache=False)
    assert (whole.arch, whole.size, whole.crop) == ("resnet18", 32, "frame")


def test_the_options_of_a_run(table):
    config = ResolvedConfig(
        arch="resnet18",
        size=32,
        bs=4,
        crop="frame",
        stain=0,
        classes=tuple(sorted(set(table.label))),
        bits=12,
    )
    dls = config_dls(table, config, cache=False)
    assert dls.reader.bits == 12
    assert (dls.arch, dls.size, dls.crop, dls.bs) == ("resnet18", 32, "frame", 4)
    names = {type(transform).__name__ for transform in dls.train.after_batch}
    assert "Sharpness" in names and "Stain" not in names


def test_labels_follow_the_table(dls, table):
    valid = table[table.part == "valid"]
    names = [dls.vocab[label] for _, label in dls.valid_ds]
    assert names == valid.label.tolist()


def test_normalised_with_the_models_own_numbers(dls):
    normalize = dls.valid.after_batch.fs.filter(lambda tfm: isinstance(tfm, Normalize))
    assert len(normalize) == 1
    assert normalize[0].mean.flatten().tolist() == [0.5, 0.5, 0.5]
    resnet = normalization("resnet18.a1_in1k")
    assert resnet.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize("crop", ["cell", "frame"])
def test_validation_images_are_cropped_and_resized(table, crop):
    path = table.path[table.part == "valid"].iloc[0]
    image = blood_dls(table, ARCH, 64, crop=crop, cache=False).valid.one_batch()[0][0]
    expected = decode(path, 64, crop).pixels / 255 * 2 - 1
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < 0.02


def test_batches_are_those_of_fastais_own_loader(dls, monkeypatch):
    theirs = list(dls.valid.new(reader=None, bs=8))  # item by item
    monkeypatch.setattr(BloodImage, "create", None)  # ours opens no single images
    for ours, expected in zip(dls.valid.new(bs=8), theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert all(type(a) is type(b) for a, b in zip(ours, expected, strict=True))


def test_other_images_can_be_loaded_with_the_same_transforms(dls, demo_table):
    rows = demo_table.iloc[:3]
    labelled = dls.test_dl(rows, with_labels=True).one_batch()
    assert labelled[0].shape == (3, 3, 64, 64)
    assert [dls.vocab[label] for label in labelled[1]] == rows.label.tolist()
    assert torch.equal(dls.test_dl(rows).one_batch()[0], labelled[0])


@pytest.mark.parametrize("cache", [True, False])
def test_images_can_be_repeated(table, cache):
    """As one does to show a rare class more often."""
    again = table.iloc[[0, 0, 1, 0]].assign(part="valid")
    dls = blood_dls(pd.concat([table, again]), size=32, cache=cache)
    images, labels = next(iter(dls.test_dl(again, with_labels=True)))
    assert len(images) == len(labels) == 4
    assert torch.equal(images[0], images[3]) and not torch.equal(images[0], images[2])
    assert len(dls.valid_ds) == (table.part == "valid").sum() + 4


def test_an_image_that_vanished_is_named(table, tmp_path):
    row = table.index[table.part == "valid"][3]
    copy = shutil.copy(table.path[row], tmp_path / "gone.jpg")
    table = table.assign(path=table.path.where(table.index != row, str(copy)))
    dls = blood_dls(table, size=64, cache=False)
    copy.unlink()
    with pytest.raises(BloodcellError, match=r"gone\.jpg cannot be read"):
        dls.valid.one_batch()


def test_training_images_vary_and_validation_images_do_not(table):
    one = table.assign(part=["train", *["valid"] * (len(table) - 1)])
    one = one[(one.part == "train") | (one.label == one.label.iloc[0])]
    dls = blood_dls(one, size=64, bs=1, classes=sorted(set(one.label)))
    train = [dls.train.one_batch()[0] for _ in range(2)]
    valid = [dls.valid.one_batch()[0] for _ in range(2)]
    assert not torch.equal(*train)
    assert torch.equal(*valid)


def test_augmentation_leaves_no_black_corners(table):
    bright = blood_dls(table, size=64, bs=16, batch_tfms=augmentation(lighting=0))
    plain = blood_dls(table, size=64, bs=16, batch_tfms=[])
    black = [(dls.train.one_batch()[0] < -0.98).all(1).float().mean() for dls in (bright, plain)]
    # Rotating by any angle with black fill would add a fifth of the image and more.
    assert black[0] < black[1] + 0.1


def test_show_batch(dls):
    plt.close("all")
    dls.show_batch(max_n=4)
    assert len([axis for axis in plt.gcf().axes if axis.images]) == 4


def test_one_image_can_be_shown_augmented_several_times(dls):
    dls.train.show_batch(max_n=4, unique=True)
    axes = [axis for axis in plt.gcf().axes if axis.images]
    assert len(axes) == 4
    assert len({axis.get_title() for axis in axes}) == 1
    images = [np.asarray(axis.images[0].get_array()) for axis in axes]
    assert not np.array_equal(images[0], images[1])


def test_the_order_of_the_classes_can_be_given(table):
    classes = sorted(set(table.label), reverse=True)
    assert list(blood_dls(table, size=64, classes=classes).vocab) == classes


def test_labels_the_model_does_not_know_are_refused(table):
    with pytest.raises(BloodcellError, match="Not a class of this model: NEUTROPHIL"):
        blood_dls(table, size=64, classes=["EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE"])


def test_an_unsplit_table_is_refused(demo_table):
    with pytest.raises(BloodcellError, match="not split"):
        blood_dls(demo_table)
