"""fastai's Adam, computed for all parameters of a group at once."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from fastai.optimizer import Optimizer
from torch.optim.adamw import adamw

FUSED_DEVICES = ("cpu", "cuda")


class FusedAdam(Optimizer):
    """fastai's ``Adam`` with decoupled weight decay: the same numbers in one call per group.

    fastai loops over the parameters in Python, with a dozen small kernels for each. Its
    hyper-parameters, ``state_dict`` and freezing work as ever. The method is AdamW (Loshchilov
    and Hutter 2019).

    Args:
        params: parameters, or a list of groups of them.
        lr: learning rate.
        mom: decay of the mean gradient, beta1.
        sqr_mom: decay of the mean squared gradient, beta2.
        eps: added to the denominator.
        wd: weight decay; not applied to parameters whose ``do_wd`` is False, as the ``Learner``
            sets it for biases and norms.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        mom: float = 0.9,
        sqr_mom: float = 0.99,
        eps: float = 1e-5,
        wd: float = 0.01,
    ):
        super().__init__(params, cbs=[], lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        together = defaultdict(list)
        for parameter, _, state, hyper in self.all_params(with_grad=True):
            if "step" not in state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["grad_avg"] = torch.zeros_like(parameter)
                state["sqr_avg"] = torch.zeros_like(parameter)
            for name in ("grad_avg", "sqr_avg"):
                state[name] = _laid_out_as(parameter, state[name])
            decay = hyper["wd"] if state.get("do_wd", True) else 0.0
            key = (*(hyper[name] for name in ("lr", "mom", "sqr_mom", "eps")), decay)
            together[key, parameter.device.type].append((parameter, state))
        for ((lr, mom, sqr_mom, eps, decay), device), pairs in together.items():
            states = [state for _, state in pairs]
            adamw(
                [parameter for parameter, _ in pairs],
                [_laid_out_as(parameter, parameter.grad) for parameter, _ in pairs],
                [state["grad_avg"] for state in states],
                [state["sqr_avg"] for state in states],
                [],
                [state["step"] for state in states],
                fused=device in FUSED_DEVICES,
                amsgrad=False,
                beta1=mom,
                beta2=sqr_mom,
                lr=lr,
                weight_decay=decay,
                eps=eps,
                maximize=False,
            )

    def zero_grad(self):
        """Drop the gradients, which saves filling them with zeros."""
        for parameter, *_ in self.all_params(with_grad=True):
            parameter.grad = None


def _laid_out_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the memory layout of ``parameter``.

    torch's fused kernel walks them side by side in memory. A state read from a file, or from
    before the model became channels-last, would be paired with the wrong elements.
    """
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter).copy_(tensor)
