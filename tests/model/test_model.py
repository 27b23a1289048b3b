"""timm models: their sizes, their weights, and what their classifier is given."""

import json
import socket
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.errors import WeightsWarning
from bloodcell_fastai.model.model import (
    create_sized,
    load_model,
    load_weights,
    read_tensors,
)

MAXVIT = "maxvit_nano_rw_256.sw_in1k"
LITE0 = "tf_efficientnet_lite0"


@pytest.fixture
def no_hub(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("name or service not known")

    monkeypatch.setattr("bloodcell_fastai.model.model.get_hf_file_metadata", unreachable)


@pytest.mark.parametrize("size", [64, 96])
def test_maxvit_takes_other_sizes(size):
    model, initial_weights = load_model(MAXVIT, 4, size, "none")
    assert initial_weights == "none"
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 4)


def test_weights_of_another_size_are_adapted(tmp_path):
    """Position biases depend on the size; everything else is taken over as it is."""
    small, _ = load_model(MAXVIT, 8, 64, "none")
    path = tmp_path / "small.safetensors"
    save_file(small.state_dict(), path)
    large, initial_weights = load_model(MAXVIT, 4, 128, path)
    assert initial_weights == "small.safetensors"
    assert torch.equal(large.state_dict()["stem.conv1.weight"], small.stem.conv1.weight)
    assert large(torch.zeros(1, 3, 128, 128)).shape == (1, 4)


def test_a_pth_file_of_tensors(tmp_path, lite0_weights):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": load_file(lite0_weights)}, path)
    model, _ = load_model(LITE0, 4, 64, path)
    assert torch.equal(model.conv_stem.weight, load_file(lite0_weights)["conv_stem.weight"])


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_not_run(tmp_path):
    torch.save({"weight": Bomb(tmp_path / "harm")}, tmp_path / "weights.pth")
    with pytest.raises(BloodcellError, match="more than tensors"):
        read_tensors(tmp_path / "weights.pth")
    assert not (tmp_path / "harm").exists()


def test_weights_of_another_architecture_are_counted(lite0_weights):
    with pytest.raises(BloodcellError, match=r"\d+ are missing.*\d+ are unknown"):
        load_model("resnet18", 4, 64, lite0_weights)


def test_missing_keys_are_counted(tmp_path, lite0_weights):
    state = load_file(lite0_weights)
    for name in ("conv_stem.weight", "bn1.weight"):
        del state[name]
    save_file(state, tmp_path / "partial.safetensors")
    with pytest.raises(BloodcellError, match="2 are missing and 0 have another shape; 0"):
        load_model(LITE0, 4, 64, tmp_path / "partial.safetensors")


def test_a_runs_weights_must_fit_whole(tmp_path, lite0_weights):
    state = load_file(lite0_weights)
    state["conv_stem.weight"] = state["conv_stem.weight"][:, :1].clone()
    save_file(state, tmp_path / "grey.safetensors")
    model, _ = load_model(LITE0, 1000, 64, "none")
    with pytest.raises(BloodcellError, match="0 are missing and 1 have another shape"):
        load_weights(model, tmp_path / "grey.safetensors")
    model, _ = load_model(LITE0, 4, 64, "none")
    with pytest.raises(BloodcellError, match=r"lists 4 names, but .* has 1000 outputs"):
        load_weights(model, lite0_weights)


@pytest.mark.parametrize(
    ("name", "content", "message", "kind"),
    [
        ("gone.safetensors", None, "No weights file", FileNotFoundError),
        ("text.safetensors", b"hello", "damaged", ValueError),
        ("text.pth", b"hello", "damaged", ValueError),
        ("empty.pth", b"", "damaged", ValueError),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, content, message, kind):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        load_model(LITE0, 4, 64, path)
    assert isinstance(caught.value, BloodcellError)


def test_weights_for_other_classes_are_refused(tmp_path):
    model, _ = load_model("resnet18", 2, 64, "none")
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, {"classes": json.dumps(["A", "B"])})
    load_weights(model, path, ("A", "B"))
    with pytest.raises(BloodcellError, match="classes in config.json are not those of"):
        load_weights(model, path, ("B", "A"))


def test_auto_without_a_hub_warns_and_starts_from_nothing(no_hub):
    with pytest.warns(WeightsWarning, match="RANDOM WEIGHTS"):
        _, initial_weights = load_model(LITE0, 4, 64, "auto")
    assert initial_weights == "none"


def test_imagenet_without_a_hub_is_an_error(no_hub):
    with pytest.raises(BloodcellError, match="cannot be reached"):
        load_model(MAXVIT, 4, 64, "imagenet")


def test_auto_takes_the_hubs_weights(monkeypatch, lite0_weights, tmp_path):
    """A local stand-in for the hub's cache, where timm finds its file as after a download."""
    monkeypatch.setattr(
        "bloodcell_fastai.model.model.try_to_load_from_cache", lambda *a: str(lite0_weights)
    )
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *a, **k: str(lite0_weights))
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeightsWarning)
        model, initial_weights = load_model(LITE0, 4, 64, "auto")
    assert initial_weights == f"imagenet ({LITE0})"
    assert torch.equal(model.conv_stem.weight, load_file(lite0_weights)["conv_stem.weight"])


def test_auto_decides_soon_when_the_hub_never_answers(monkeypatch):
    """A server that takes the connection and then says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(
            "bloodcell_fastai.model.model.hf_hub_url", lambda repo, name: f"{address}/{name}"
        )
        started = time.monotonic()
        with pytest.warns(WeightsWarning):
            load_model(LITE0, 4, 64, "auto")
        assert time.monotonic() - started < 15


def test_an_unknown_architecture_names_its_neighbours():
    with pytest.raises(ValueError, match="no architecture 'maxvit_nan'") as caught:
        load_model("maxvit_nan", 4, 64, "none")
    assert isinstance(caught.value, BloodcellError)
    assert "maxvit_nano" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("size", [100, 250])
def test_a_size_maxvit_cannot_take_names_those_it_can(size):
    with pytest.raises(BloodcellError, match=f"cannot take {size} px") as caught:
        load_model(MAXVIT, 4, size, "none")
    assert f"`size` {size // 32 * 32} or {size // 32 * 32 + 32}" in caught.value.hint


def test_what_timm_is_told_of_the_size():
    """Exports must make the same model with timm alone."""
    _, sized = create_sized(MAXVIT, 4, 64)
    assert sized == {"img_size": 64}
    assert create_sized("resnet18", 4, 64)[1] == {}


def test_nothing_but_an_architecture_is_fetched():
    """timm itself would load a model from a hub or a folder of such a name."""
    for name in ("hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp"):
        with pytest.raises(BloodcellError, match="no architecture"):
            create_sized(name, 4, 64)
