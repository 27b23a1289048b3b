"""The training loop's behaviour: one small callback per job."""

import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.learner import AvgMetric, AvgSmoothLoss
from fastai.vision.all import (
    AvgLoss,
    Callback,
    CancelFitException,
    Learner,
    ProgressCallback,
    Recorder,
    SaveModelCallback,
    TrainEvalCallback,
    find_bs,
    set_seed,
    to_float,
)
from fastcore.imports import IN_NOTEBOOK
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..processes import rank, summed, training_share

MONITOR = "valid_accuracy"
EVERY = 50  # batches between looks that a device would have to wait for


class CPUBFloat16(Callback):
    """bfloat16 autocast on the CPU, where fastai's own mixed precision turns itself off."""

    order = MixedPrecision.order

    def before_batch(self):
        self.autocast = autocast(torch.device("cpu"))
        self.autocast.__enter__()

    def after_pred(self):
        self.learn.pred = to_float(self.pred)

    def after_loss(self):
        self._leave()

    def after_cancel_batch(self):
        self._leave()

    def _leave(self):
        if (autocast := self.__dict__.pop("autocast", None)) is not None:
            autocast.__exit__(None, None, None)


def reduced_precision(device: torch.device) -> torch.dtype | None:
    """The reduced precision ``device`` computes fastest in; None: float32.

    bfloat16 where the hardware has it, float16 on an older CUDA card.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and has_cpu_bfloat16() else None


def precision_callback(device: torch.device) -> list[Callback]:
    """The callback for :func:`reduced_precision`, as a list of one or none."""
    if (dtype := reduced_precision(device)) is None:
        return []
    if device.type == "cpu":
        return [CPUBFloat16()]
    return [MixedPrecision(AMPMode.BF16 if dtype is torch.bfloat16 else AMPMode.FP16)]


def autocast(device: torch.device) -> AbstractContextManager:
    """A block in which ``device`` computes in :func:`reduced_precision`."""
    dtype = reduced_precision(device)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def has_cpu_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; emulation would be slower."""
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class SeedEpoch(Callback):
    """Draw the randomness of every epoch from (seed, epoch) alone.

    Order, augmentation and dropout of an epoch then do not depend on what came before, so that
    a resumed run needs no random states to go on as if it had never stopped.
    """

    order = TrainEvalCallback.order - 5

    def __init__(self, seed: int, first_epoch: int = 0):
        self.seed, self.first_epoch = seed, first_epoch

    def before_epoch(self):
        seed = (self.seed * 1_000_003 + self.first_epoch + self.epoch) % 2**32
        set_seed(seed, reproducible=True)
        self.dls.train.rng = random.Random(seed)


def measure_on_device(learn: Learner) -> None:
    """Have the loss and the metrics added up where they are computed, and read once an epoch.

    fastai fetches each of them to the host in every batch, and the device waits for that.
    """
    learn.recorder.loss = DeviceLoss()
    learn.recorder.smooth_loss = DeviceSmoothLoss(learn.recorder.smooth_loss.beta)
    learn.metrics = [DeviceMetric(m.func) if type(m) is AvgMetric else m for m in learn.metrics]
    learn.add_cb(FetchLosses())


class FetchLosses(Callback):
    """Bring the recorded losses of an epoch to the host, all at once."""

    order = Recorder.order + 1

    def after_epoch(self):
        self._fetch()

    def after_fit(self):
        self._fetch()

    def _fetch(self):
        losses = self.recorder.losses
        if new := [loss for loss in losses if torch.is_tensor(loss)]:
            losses[len(losses) - len(new) :] = torch.stack(new).tolist()


class DeviceMetric(AvgMetric):
    """fastai's ``AvgMetric`` that adds up on the device, over all processes that train together:
    each of them has to ask for the value."""

    def accumulate(self, learn):
        """Add a batch."""
        bs = find_bs(learn.yb)
        self.total += learn.to_detach(self.func(learn.pred, *learn.yb), cpu=False) * bs
        self.count += bs

    @property
    def value(self):
        """The mean; None before the first batch."""
        return _mean(self.total, self.count)


class DeviceLoss(AvgLoss):
    """fastai's ``AvgLoss`` as :class:`DeviceMetric`."""

    def accumulate(self, learn):
        """Add a batch."""
        bs = find_bs(learn.yb)
        self.total += learn.to_detach(learn.loss.mean(), cpu=False) * bs
        self.count += bs

    @property
    def value(self):
        """The mean; None before the first batch."""
        return _mean(self.total, self.count)


def _mean(total: torch.Tensor | float, count: int) -> torch.Tensor | float | None:
    of_all, n = summed(total, count)
    return of_all / n if n else None


class DeviceSmoothLoss(AvgSmoothLoss):
    """fastai's ``AvgSmoothLoss`` on the device, of the global batch."""

    val: torch.Tensor

    def accumulate(self, learn):
        """Add a batch."""
        self.count += 1
        loss = learn.to_detach(learn.loss.mean(), cpu=False)
        (total,) = summed(loss)
        mean = total / training_share().world  # the parts of a batch are equal
        loss = torch.as_tensor(mean).to(loss)
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class Compile(Callback):
    """Compile the model before it trains on a CUDA device; the weights keep their names."""

    order = ChannelsLast.order + 1

    def before_fit(self):
        if self.dls.device.type == "cuda":
            self.learn.model.compile()


class FreezeNorm(Callback):
    """Batch normalisation by the statistics the model started with, which its own batches, of
    one laboratory, would replace by theirs. The scales and shifts are trained."""

    order = TrainEvalCallback.order + 1

    def before_train(self):
        for module in self.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()


class StopOnNaN(Callback):
    """Stop when the training loss is no longer a number, before it reaches the records.

    A loss that is not a number stays in fastai's smoothed loss for good, so that a GPU need not
    be made to wait for the loss of every batch. The last step of an epoch shows only in the
    validation loss.
    """

    order = Recorder.order + 1
    stopped = False

    def after_batch(self):
        if self.training and (self.dls.device.type == "cpu" or self.iter % EVERY == 0):
            self._check(self.recorder.smooth_loss.val)

    def after_train(self):
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
        self.write, self.first_epoch, self.mean_loss = write, first_epoch, DeviceLoss()

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
            found = {number: signal.getsignal(number) for number in self.signals}
            # What is ignored, as by a shell in the background, stays so.
            self.handlers = {n: old for n, old in found.items() if old is not signal.SIG_IGN}
        for number in self.handlers:
            signal.signal(number, self._receive)
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
        at_once = training_share().world == 1 or self.dls.device.type == "cpu"
        if self.training and (at_once or self.iter % EVERY == 0):
            self._stop_together()

    def after_epoch(self):
        self._stop_together()

    def _stop_together(self):
        """Stop if a signal has come to any of the processes that train together."""
        (received,) = summed(float(self.received or 0))
        if received:
            self.received = self.received or signal.SIGTERM
            raise CancelFitException


class RichProgress(Callback):
    """A progress bar with the time left in a terminal; fastai's own is made for notebooks."""

    order = ProgressCallback.order

    def __init__(self, first_epoch: int = 0, n_epochs: int = 0):
        self.first_epoch, self.n_epochs = first_epoch, n_epochs

    def before_train(self):
        self._open(f"Epoch {self.first_epoch + self.epoch + 1}/{self.n_epochs} train")

    def before_validate(self):
        self._open("Predicting" if hasattr(self.learn, "gather_preds") else "         valid")

    def after_batch(self):
        self.bar.advance(self.task)

    def after_train(self):
        self.bar.stop()

    def after_validate(self):
        self.bar.stop()

    def _open(self, text: str):
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches, left:"),
            TimeRemainingColumn(),
            transient=True,
        )
        self.task = self.bar.add_task(text, total=len(self.dl))
        self.bar.start()


class TimeBatches(Callback):
    """Time the first training batches of a fit, then cancel it.

    Attributes:
        seconds: per batch, loading and the optimizer's step included; the first, which warms
            up, is left out.
    """

    order = SaveLast.order

    def __init__(self, n: int = 3):
        self.n, self.seconds = n, 0.0

    def after_batch(self):
        if self.iter == 0:
            self.started = time.monotonic()
        if self.iter == min(self.n, self.n_iter - 1):
            self.seconds = (time.monotonic() - self.started) / max(self.iter, 1)
            raise CancelFitException


def use_progress(learn: Learner, first_epoch: int = 0, n_epochs: int = 0) -> None:
    """Show progress as suits the output: fastai's bars in a notebook, Rich's in a terminal,
    none in a pipe or file (fastprogress would take those for a terminal)."""
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, RichProgress)])
    if IN_NOTEBOOK:
        return
    learn.remove_cbs(ProgressCallback)
    if sys.stdout.isatty() and rank() == 0:
        learn.add_cb(RichProgress(first_epoch, n_epochs))
