"""A fastai learner on a timm model."""

import numpy as np
import pytest
import timm
import torch
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    ColSplitter,
    DataBlock,
    ImageBlock,
    Learner,
    Resize,
)
from safetensors.torch import load_file

from bloodcell_fastai import BloodcellError, blood_dls, blood_learner, split_table, timm_model
from bloodcell_fastai.config import DEFAULT_ARCH
from bloodcell_fastai.data.loaders import normalization
from bloodcell_fastai.training.learner import split_parameters

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def table(demo_table):
    return split_table(demo_table)


@pytest.fixture(scope="module")
def dls(table):
    return blood_dls(table, LITE0, size=64, bs=8)


@pytest.fixture(scope="module")
def learn(dls, lite0_weights):
    return blood_learner(dls, weights=lite0_weights)


def test_the_batches_say_which_model_they_are_for(table):
    """No argument is given twice, and two that differ are an error."""
    dls = blood_dls(table, "resnet18", size=32, bs=8, crop="frame", cache=False)
    learn = blood_learner(dls, weights="none")
    assert (learn.arch, learn.size, learn.crop) == ("resnet18", 32, "frame")
    assert (learn.initial_weights, learn.pretrained) == ("none", False)
    assert timm_model(learn).pretrained_cfg["architecture"] == "resnet18"
    same = blood_learner(dls, "resnet18", weights="none", size=32)
    assert (same.arch, same.size) == ("resnet18", 32)
    for contradiction in ({"arch": LITE0}, {"size": 64}):
        with pytest.raises(ValueError, match="the batches are") as caught:
            blood_learner(dls, weights="none", **contradiction)
        assert isinstance(caught.value, BloodcellError)
        assert "blood_dls" in caught.value.hint


def test_batches_of_another_origin(table):
    """Any fastai loaders will do: the size is that of a batch."""
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=ColReader("path"),
        get_y=ColReader("label"),
        splitter=ColSplitter("is_valid"),
        item_tfms=Resize(96),
        batch_tfms=normalization("resnet18"),
    )
    dls = block.dataloaders(table.assign(is_valid=table.part == "valid"), bs=4)
    learn = blood_learner(dls, "resnet18", weights="none")
    assert (learn.arch, learn.size, learn.crop) == ("resnet18", 96, "frame")
    assert timm_model(learn).num_classes == 4
    assert DEFAULT_ARCH.startswith("maxvit")  # what it is without a name


def test_it_is_a_fastai_learner_with_two_groups(learn):
    assert isinstance(learn, Learner)
    body, head = split_parameters(learn.model)
    assert [p.shape for p in head] == [(4, 1280), (4,)]
    assert len(body) + len(head) == len(list(timm_model(learn).parameters()))


def test_pretrained_weights_leave_the_body_frozen(learn, lite0_weights):
    assert (learn.initial_weights, learn.pretrained) == (lite0_weights.name, True)
    trainable = {name for name, p in timm_model(learn).named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trainable
    assert "conv_stem.weight" not in trainable


def test_the_body_holds_the_weights_of_the_file(learn, lite0_weights):
    ours, theirs = timm_model(learn).state_dict(), load_file(lite0_weights)
    assert torch.equal(ours["conv_stem.weight"], theirs["conv_stem.weight"])
    assert torch.equal(ours["blocks.6.0.bn3.running_var"], theirs["blocks.6.0.bn3.running_var"])
    assert ours["classifier.weight"].shape == (4, 1280)


@pytest.mark.parametrize(
    "arch", [DEFAULT_ARCH, LITE0, "resnet18", "vit_tiny_patch16_224", "convnext_atto"]
)
def test_the_network_is_timms(table, arch):
    """timm alone, given the state dict, computes the same."""
    learn = blood_learner(blood_dls(table, arch, size=64, bs=8), weights="none")
    model = learn.model.eval()
    kwargs = {} if arch in (LITE0, "resnet18", "convnext_atto") else {"img_size": 64}
    alone = timm.create_model(arch, num_classes=4, **kwargs).eval()
    alone.load_state_dict(timm_model(learn).state_dict())
    batch = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(batch), alone(batch), atol=1e-5)


def test_gradients_reach_body_and_head(dls):
    learn = blood_learner(dls, weights="none")
    learn.model(torch.randn(2, 3, 64, 64)).sum().backward()
    for group in split_parameters(learn.model):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in group)


def test_arguments_of_vision_learner_and_of_the_loss(dls):
    learn = blood_learner(dls, weights="none", label_smoothing=0.25, wd=0.3, path="here")
    assert learn.wd == 0.3
    assert str(learn.path) == "here"
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0]])
    loss = learn.loss_func(logits, torch.tensor([0]))
    log_probabilities = logits.log_softmax(dim=1)[0].numpy()
    assert float(loss) == pytest.approx(-np.dot(log_probabilities, [0.8125, *[0.0625] * 3]))


def test_it_learns_with_fastais_own_calls(table):
    learn = blood_learner(blood_dls(table, "resnet18", size=32, bs=16), weights="none")
    before = timm_model(learn).fc.weight.detach().clone()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)
    names = list(learn.recorder.metric_names)
    assert {"train_loss", "train_accuracy", "valid_loss", "valid_accuracy"} <= set(names)
    assert not torch.equal(timm_model(learn).fc.weight, before)
