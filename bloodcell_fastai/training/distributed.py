"""Training shared by several processes: fastai's distributed trainer on this project's batches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import DistributedDataParallelKwargs
from fastai.distributed import DistributedTrainer
from fastai.vision.all import Learner
from timm.layers import convert_sync_batchnorm
from timm.layers.norm_act import BatchNormAct2d
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..processes import sharing_batches, world_size


@contextmanager
def shared_fit(learn: Learner) -> Iterator[None]:
    """A block in which ``learn`` trains with the learners of the other processes, as one process
    would with the global batch: gradients, batch normalisation, losses and metrics are of all of
    it. On return every process has the same weights."""
    together = _Together()
    learn.add_cb(together)
    try:
        with sharing_batches():
            yield
    finally:
        learn.remove_cb(together)


class _Together(DistributedTrainer):
    """fastai's trainer on Accelerate; the loaders know which part of a batch is theirs, and need
    no wrapping that repeats images to make all parts equal."""

    def __init__(self):
        # Buffers, the statistics of the norms, are the same anyway. Broadcasting them in every
        # pass would wait for ever where one process has a validation batch less.
        same_buffers = DistributedDataParallelKwargs(broadcast_buffers=False)
        cpu = not torch.cuda.is_available()
        super().__init__(sync_bn=False, cpu=cpu, kwargs_handlers=[same_buffers])

    def before_fit(self):
        self.norms = share_norms(self.learn.model)
        super().before_fit()

    def after_fit(self):
        super().after_fit()
        restore_norms(self.learn.model, self.norms)

    def _wrap_dl(self, dl):
        return dl


def share_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Have batch normalisation take its statistics from the global batch.

    On CUDA the layers become torch's ``SyncBatchNorm``, by timm's conversion, which keeps the
    activations inside timm's norms where torch's and fastai's loses them. torch has none for the
    CPU, where the layers stay and get a forward pass of their own.

    Returns:
        The layers by name, for :func:`restore_norms`.
    """
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)
    }
    if next(model.parameters()).device.type == "cuda":
        convert_sync_batchnorm(model)
        return norms
    for norm in norms.values():
        vars(norm)["forward"] = _GlobalNorm(norm)
    return norms


def restore_norms(model: nn.Module, norms: dict[str, _BatchNorm]) -> None:
    """Undo :func:`share_norms`; what was learnt stays."""
    for name, norm in norms.items():
        vars(norm).pop("forward", None)
        model.set_submodule(name, norm)


class _GlobalNorm:
    """The forward pass of a norm with the mean and variance of all processes' activations."""

    def __init__(self, norm: _BatchNorm):
        self.norm = norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        if not norm.training:
            return type(norm).forward(norm, x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        values = x.to(torch.promote_types(x.dtype, norm.weight.dtype))
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = _Mean.apply(values.mean(axes))  # the parts of a batch are equal
        centred = values - mean.view(shape)
        variance = _Mean.apply(centred.square().mean(axes))
        self._remember(mean.detach(), variance.detach(), values.numel() // len(mean))
        scale = norm.weight * (variance + norm.eps).rsqrt()
        y = (centred * scale.view(shape) + norm.bias.view(shape)).to(x.dtype)
        return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y

    def _remember(self, mean: torch.Tensor, variance: torch.Tensor, n: int) -> None:
        norm, n = self.norm, n * world_size()
        # All of timm's norms keep them.
        assert norm.running_mean is not None and norm.running_var is not None
        assert norm.num_batches_tracked is not None and norm.momentum is not None
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * n / max(n - 1, 1), norm.momentum)


class _Mean(torch.autograd.Function):
    """The mean of a tensor over all processes, the gradient with it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total / world_size()

    backward = forward
