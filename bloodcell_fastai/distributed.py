"""Several processes that train or predict as one job, as ``accelerate launch`` starts them.

All of them read the same folders, on one machine or on a shared file system; only the first one
writes into a run.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed, nn

from .errors import BloodcellError, UsageError

if TYPE_CHECKING:
    from fastai.vision.all import Learner

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE")  # by which fastai knows that it is one of several processes
PATIENCE = timedelta(hours=2)  # with a process that lives: the first one may calibrate long
SIGNALLED = 128  # exit codes from here on say that a signal ended the process
FIRST_REPORTS = 10.0  # seconds, within which a launcher ends the others when the first one fails


def rank() -> int:
    """The number of this process among those that were joined, from 0."""
    return distributed.get_rank() if _are_joined() else 0


def world_size() -> int:
    """How many processes were joined; 1 without :func:`joined`."""
    return distributed.get_world_size() if _are_joined() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes of a launcher for the length of the block; nothing without a launcher.

    Raises:
        BloodcellError: Accelerate is missing, or another process cannot be reached.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1 or _are_joined():
        yield
        return
    try:
        from accelerate import PartialState
    except ModuleNotFoundError:
        raise UsageError(
            f"{processes} processes were started, which needs Accelerate.",
            'Install it: pip install "bloodcell-fastai[distributed]"',
        ) from None
    with lost_peers_explained("Start the command again."):
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    # fastai would gather in every call, also in what the first process does on its own.
    hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden
        state.destroy_process_group()


@contextmanager
def training_together(learn: "Learner") -> Iterator[None]:
    """A block in which the processes that were joined train together, by fastai's
    ``learn.distrib_ctx()``: each has its own batches, gradients are averaged (torch's
    ``DistributedDataParallel``). On CUDA batch normalisation is synchronised. Nothing alone."""
    if world_size() == 1:
        yield
        return
    from fastai.distributed import DistributedDL
    from timm.layers import convert_sync_batchnorm

    # fastai's own sends the order of the images through a CUDA device, which may not be there.
    DistributedDL._broadcast = lambda self, values, rank: agree(lambda: values)
    on_cuda = torch.cuda.is_available()
    # torch's conversion, which fastai would use, loses the activations inside timm's norms, and
    # so does timm's where it is repeated.
    if on_cuda and not any(isinstance(m, nn.SyncBatchNorm) for m in learn.model.modules()):
        convert_sync_batchnorm(learn.model)
    os.environ |= dict(zip(LAUNCHED, (str(rank()), str(world_size())), strict=True))
    try:
        with learn.distrib_ctx(sync_bn=False, cpu=not on_cuda):
            yield
    finally:
        for name in LAUNCHED:
            del os.environ[name]


def by_first(function: Callable) -> Callable:
    """A decorator: only the first process does what the function does; it returns nothing."""

    @wraps(function)
    def maybe(*args, **kwargs) -> None:
        if rank() == 0:
            function(*args, **kwargs)

    return maybe


def agree(decide: Callable[[], T]) -> T:
    """What ``decide`` returns in the first process, in all of them."""
    if world_size() == 1:
        return decide()
    decided: list[Any] = [decide() if rank() == 0 else None]
    distributed.broadcast_object_list(decided)
    return decided[0]


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        distributed.barrier()


@contextmanager
def lost_peers_explained(hint: str) -> Iterator[None]:
    """Turn the loss of another process into an error.

    Args:
        hint: what to do then.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own for it.
        if not isinstance(error, distributed.DistError) and not any(
            word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL")
        ):
            raise
        raise BloodcellError("Another process of this job has ended or hangs.", hint) from error


def speaks(error: BloodcellError) -> bool:
    """Whether this process should show an error; waits where another may show the same one."""
    if int(os.environ.get("RANK", rank())) == 0:
        return True
    time.sleep(FIRST_REPORTS)
    return error.exit_code < SIGNALLED  # all were told to stop


def _are_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
