"""The training loop's behaviour: one small callback per job."""

import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.vision.all import (
    AvgLoss,
    Callback,
    CancelFitException,
    Learner,
    ProgressCallback,
    Recorder,
    SaveModelCallback,
    TrainEvalCallback,
    set_seed,
    to_float,
)
from fastcore.imports import IN_NOTEBOOK
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..device import reduced_precision
from ..distributed import rank

MONITOR = "valid_accuracy"


class CPUBFloat16(Callback):
    """bfloat16 autocast on the CPU, where fastai's own mixed precision turns itself off."""

    order = MixedPrecision.order

    def before_batch(self):
        # Around the call of the model alone, so that it ends however the call ends.
        forward = type(self.model).forward.__get__(self.model)
        self.model.forward = torch.autocast("cpu", torch.bfloat16)(forward)

    def after_pred(self):
        del self.model.forward
        self.learn.pred = to_float(self.pred)


def precision_callback(device: torch.device) -> list[Callback]:
    """The callback for :func:`~bloodcell_fastai.device.reduced_precision`, as a list of one or
    none."""
    if (dtype := reduced_precision(device)) is None:
        return []
    if device.type == "cpu":
        return [CPUBFloat16()]
    return [MixedPrecision(AMPMode.BF16 if dtype is torch.bfloat16 else AMPMode.FP16)]


class SeedEpoch(Callback):
    """Draw the randomness of every epoch from (seed, epoch) alone.

    Order, augmentation and dropout of an epoch then do not depend on what came before, so that
    a resumed run needs no random states to continue as if it had never stopped. Processes that
    train together draw the same order and different augmentations.
    """

    order = TrainEvalCallback.order - 5

    def __init__(self, seed: int, first_epoch: int = 0):
        self.seed, self.first_epoch = seed, first_epoch

    def before_fit(self):
        self.loader = self.dls.train  # which fastai's distributed trainer is about to wrap

    def before_epoch(self):
        seed = self.seed * 1_000_003 + self.first_epoch + self.epoch
        set_seed((seed + rank() * 500_009) % 2**32, reproducible=True)
        self.loader.rng = random.Random(seed % 2**32)


class StopOnNaN(Callback):
    """Stop when the training loss is no longer a number, before it reaches the records.

    A loss that is not a number stays in fastai's smoothed loss, which is the same in all processes
    that train together. The last step of an epoch shows only in the validation loss.

    Attributes:
        stopped: whether it has.
    """

    order = Recorder.order + 1
    stopped = False

    def after_batch(self):
        if self.training:
            self._check(self.recorder.smooth_loss.val)

    def after_validate(self):
        self._check(self.recorder.loss.value)

    def _check(self, loss: torch.Tensor):
        if not torch.isfinite(loss):
            self.stopped = True
            raise CancelFitException


class History(Callback):
    """Hand each epoch's figures to ``write``, a dict with the columns of ``history.csv``.

    The training loss is the mean over the epoch; fastai's recorder keeps a smoothed one.
    """

    order = Recorder.order + 1
    remove_on_fetch, _only_train_loop = True, True

    def __init__(self, write: Callable[[dict], None], first_epoch: int = 0):
        self.write, self.first_epoch, self.mean_loss = write, first_epoch, AvgLoss()

    def before_epoch(self):
        self.started = time.monotonic()
        self.mean_loss.reset()

    def after_batch(self):
        if self.training:
            self.mean_loss.accumulate(self.learn)

    def after_epoch(self):
        if not (values := self.recorder.values[-1]):
            return  # an epoch that a resumed run skips
        row = dict(zip(self.recorder.metric_names[1:], values, strict=False))
        self.write(
            {
                "epoch": self.first_epoch + self.epoch + 1,
                "train_loss": float(self.mean_loss.value),
                "train_accuracy": row["train_accuracy"],
                "valid_loss": row["valid_loss"],
                "valid_accuracy": row["valid_accuracy"],
                "lr": self.opt.hypers[-1]["lr"],
                "seconds": round(time.monotonic() - self.started, 1),
            }
        )


class SaveBest(SaveModelCallback):
    """fastai's SaveModelCallback on validation accuracy, with ``save`` as the way to save.

    Args:
        save: called with the validation accuracy when an epoch is the best so far.
        best: the accuracy to beat, from earlier epochs of the run.
        wait: epochs since then.
    """

    def __init__(self, save: Callable[[float], None], best: float = -math.inf, wait: int = 0):
        super().__init__(monitor=MONITOR, reset_on_fit=False)
        self.save, self.best, self.wait = save, best, wait

    def after_epoch(self):
        if not self.recorder.values[-1]:
            return  # an epoch that a resumed run skips
        super(SaveModelCallback, self).after_epoch()
        self.wait = 0 if self.new_best else self.wait + 1
        if self.new_best:
            self.save(self.best)

    def after_fit(self):
        self.run = True  # as fastai's trackers do; the caller loads the best model


class SaveLast(Callback):
    """Call ``save(epochs done)`` when everything else of an epoch is done and recorded."""

    order = SaveBest.order + 10
    remove_on_fetch, _only_train_loop = True, True

    def __init__(self, save: Callable[[int], None], first_epoch: int = 0):
        self.save, self.first_epoch = save, first_epoch

    def after_epoch(self):
        if self.recorder.values[-1]:
            self.save(self.first_epoch + self.epoch + 1)


class EarlyStopping(Callback):
    """Stop when ``saver`` has seen no better epoch for ``patience`` epochs, which is saved too.

    fastai's own counts from 0 in every fit, so also in one that goes on after a stop.
    """

    order = SaveLast.order + 1

    def __init__(self, saver: SaveBest, patience: int):
        self.saver, self.patience = saver, patience

    @property
    def due(self) -> bool:
        """Whether training should stop."""
        return 0 < self.patience <= self.saver.wait

    def after_epoch(self):
        if self.due:
            raise CancelFitException


class StopOnSignal(Callback):
    """Stop after the batch when Ctrl-C or SIGTERM comes, or after the epoch if it only has to be
    validated; a second signal interrupts at once. As a context manager it listens.

    Attributes:
        received: the signal, None if there was none.
    """

    order = EarlyStopping.order + 1
    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: signal.Signals | None = None
        self.handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # nobody else may listen
            for number in self.signals:
                # What is ignored, as by a shell in the background, stays so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error):
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        # Not print: the signal may have come in the middle of another one.
        with suppress(OSError):
            os.write(2, b"\nStopping after this batch; once more stops at once.\n")

    def after_batch(self):
        if self.training:
            self._stop_together()

    def after_epoch(self):
        self._stop_together()

    def _stop_together(self):
        """Stop if a signal has come to any of the processes that train together."""
        received = torch.tensor(float(self.received or 0), device=self.dls.device)
        if self.learn.to_detach(received):  # their mean
            self.received = self.received or signal.SIGTERM
            raise CancelFitException


class RichProgress(Callback):
    """Show each epoch in a progress bar with the time left; fastai's own is made for notebooks."""

    order = ProgressCallback.order

    def __init__(self, bar: Progress, first_epoch: int, n_epochs: int):
        self.bar, self.first_epoch, self.n_epochs = bar, first_epoch, n_epochs
        self.task = bar.add_task("", visible=False)

    def before_epoch(self):
        epoch = f"Epoch {self.first_epoch + self.epoch + 1}/{self.n_epochs}"
        batches = sum(len(dl) for dl in self.dls.loaders)
        self.bar.reset(self.task, total=batches, description=epoch, visible=True)

    def after_batch(self):
        self.bar.advance(self.task)

    def after_epoch(self):
        self.bar.update(self.task, visible=False)


class TimeBatches(Callback):
    """Time the first training batches of a fit, then cancel it."""

    order, n = SaveLast.order, 4

    @property
    def seconds(self) -> float:
        """Per batch, loading and the optimizer's step included; without the first one, which warms
        up, where there are others."""
        times = self.times[1:] if len(self.times) > 2 else self.times
        return (times[-1] - times[0]) / (len(times) - 1)

    def before_train(self):
        self.times = [time.monotonic()]

    def after_batch(self):
        self.times.append(time.monotonic())
        if len(self.times) > self.n:
            raise CancelFitException

    def after_train(self):
        raise CancelFitException


@contextmanager
def shown_progress(learn: Learner, first_epoch: int = 0, n_epochs: int = 0) -> Iterator[None]:
    """A block with progress bars that suit the output: fastai's in a notebook, Rich's in a
    terminal, none in a pipe or file, which fastprogress would take for a terminal."""
    if not IN_NOTEBOOK:
        learn.remove_cbs(ProgressCallback)
    if IN_NOTEBOOK or not sys.stdout.isatty() or rank() > 0:
        yield
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches, left:"),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, transient=True) as bar,
        learn.added_cbs(RichProgress(bar, first_epoch, n_epochs)),
    ):
        yield
