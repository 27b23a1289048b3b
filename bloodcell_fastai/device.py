"""Which device computes, in which precision, how many images at a time."""

from contextlib import AbstractContextManager, nullcontext

import torch
from fastai.vision.all import default_device

from .errors import BloodcellError


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of a name such as ``cuda:1`` or ``cpu``; fastai's default for ``auto``.

    Raises:
        BloodcellError: there is no such device here.
    """
    if name == "auto":
        return torch.device(default_device())
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BloodcellError(f"No device {name!r} here: {reason}", "Use `device=auto`.") from None


def prediction_batch_size(device: torch.device, size: int) -> int:
    """How many images of ``size`` pixels a device predicts fastest together.

    On the CPU the activations of a batch should fit into the caches: MaxViT-nano at 256 px
    predicts 28 images a second in batches of 8 and 17 in batches of 64. A GPU wants many.
    """
    pixels = 2**19 if device.type == "cpu" else 2**24
    return int(min(max(pixels // size**2, 4), 512))


def reduced_precision(device: torch.device) -> torch.dtype | None:
    """The reduced precision ``device`` computes fastest in; None: float32.

    bfloat16 where the hardware has it, float16 on an older CUDA card.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and has_cpu_bfloat16() else None


def autocast(device: torch.device) -> AbstractContextManager:
    """A block in which ``device`` computes in :func:`reduced_precision`."""
    dtype = reduced_precision(device)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def has_cpu_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; emulation would be slower."""
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
