import pytest
import torch

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.device import (
    autocast,
    pick_device,
    prediction_batch_size,
    reduced_precision,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_device_by_name():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["meta", "cuda:99", "tpu", ""])
def test_a_device_that_is_not_here(name):
    with pytest.raises(BloodcellError, match=f"No device '{name}' here") as caught:
        pick_device(name)
    assert "`device=auto`" in caught.value.hint


@pytest.mark.parametrize(
    ("device", "size", "images"),
    [(CPU, 256, 8), (CPU, 64, 128), (CPU, 4096, 4), (CUDA, 256, 256), (CUDA, 32, 512)],
)
def test_how_many_images_are_predicted_together(device, size, images):
    assert prediction_batch_size(device, size) == images


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, None), ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_the_cpu_computes_in_bfloat16_only_where_it_can(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert reduced_precision(CPU) is expected
    with autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (expected or torch.float32)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_an_older_gpu_computes_in_float16(monkeypatch, has_bfloat16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    expected = torch.bfloat16 if has_bfloat16 else torch.float16
    assert reduced_precision(CUDA) is expected
