"""Several processes that train or predict as one, as ``accelerate launch`` starts them.

Hugging Face Accelerate joins them and torch's ``DistributedDataParallel`` averages their gradients.
All of them read the same folders, of one machine or of a shared file system; only the first writes
into a run. A global batch is what one process would have in a step: each process has its part of
it, so that the number of processes does not change what is learnt.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import distributed

from .errors import BloodcellError, usage_error


class Sliceable(Protocol):
    """A sequence, an array or a tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


T = TypeVar("T")
Items = TypeVar("Items", bound=Sliceable)
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what a launcher tells every process it starts
PATIENCE = timedelta(hours=2)  # with a process that lives: the first one may calibrate long
STOPPED = 128  # exit codes from here on say that a signal ended the process
FIRST_SPEAKS = 10.0  # seconds, within which a launcher ends the others when the first one fails


@dataclass(frozen=True)
class Share:
    """What a process has of the work of all.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    def of(self, items: Items) -> Items:
        """This process's part of ``items``, a sequence or a tensor; the parts follow one another
        in the order of the ranks and differ by one at most in length."""
        start, stop = (len(items) * r // self.world for r in (self.rank, self.rank + 1))
        return items[start:stop]

    def drawn(self, n: int, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """This process's part, ``n`` rows, of what one process would draw for the global batch.

        All processes draw all of it from the same random state, which stays the same for all.
        """
        return self.of(draw(n * self.world))


ALONE = Share()
_in_training = ALONE


def training_share() -> Share:
    """What this process has of every batch now: a part within :func:`sharing_batches`."""
    return _in_training


@contextmanager
def sharing_batches() -> Iterator[Share]:
    """Until the end of the block, batches of the loaders and what is drawn for them are shared."""
    global _in_training
    _in_training = Share(rank(), world_size())
    try:
        yield _in_training
    finally:
        _in_training = ALONE


def rank() -> int:
    """The number of this process among those that were joined, from 0."""
    return distributed.get_rank() if _joined() else 0


def world_size() -> int:
    """How many processes were joined; 1 without :func:`joined`."""
    return distributed.get_world_size() if _joined() else 1


def launched() -> Share:
    """What a launcher says about this process, whether it was joined to the others yet or not."""
    return Share(
        int(os.environ.get("RANK", rank())), int(os.environ.get("WORLD_SIZE", world_size()))
    )


@contextmanager
def joined() -> Iterator[Share]:
    """Join the processes of a launcher for the length of the block; nothing without a launcher.

    Raises:
        BloodcellError: Accelerate is missing, or another process cannot be reached.
    """
    if launched().world == 1 or _joined():
        yield Share(rank(), world_size())
        return
    try:
        from accelerate import PartialState
    except ModuleNotFoundError:
        raise usage_error(
            f"{launched().world} processes were started, which needs Accelerate.",
            'Install it: pip install "bloodcell-fastai[distributed]"',
        ) from None
    with lost_peers_explained("Start the command again."):
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    # fastai would gather in every call, also in what a single process does on its own.
    told = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield Share(rank(), world_size())
    finally:
        os.environ |= told
        state.destroy_process_group()


def by_first(function: Callable) -> Callable:
    """A decorator: the first process alone does what the function does; it returns nothing."""

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


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        distributed.barrier()


def summed(*values: torch.Tensor | float) -> Sequence[torch.Tensor | float]:
    """Numbers, each added up over the processes that share batches; alone they stay as they are."""
    if training_share().world == 1:
        return values
    on = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=on) for v in values])
    distributed.all_reduce(numbers)
    return numbers.unbind()


@contextmanager
def lost_peers_explained(hint: str) -> Iterator[None]:
    """Turn the loss of another process into an error.

    Args:
        hint: what to do then.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise BloodcellError("Another process of this job has ended or hangs.", hint) from error


def speaks(error: BloodcellError) -> bool:
    """Whether this process should show an error; waits where another may show the same one."""
    if launched().rank > 0:
        time.sleep(FIRST_SPEAKS)
        return error.exit_code < STOPPED  # all were told to stop
    return True


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _is_lost_peer(error: RuntimeError) -> bool:
    # gloo has no class of its own for it.
    return isinstance(error, distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL")
    )
