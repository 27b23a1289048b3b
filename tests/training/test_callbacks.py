import io
import signal

import pytest
import torch
from fastai.vision.all import Callback, CancelFitException

from bloodcell_fastai import blood_dls, blood_learner, split_table
from bloodcell_fastai.device import has_cpu_bfloat16
from bloodcell_fastai.training import callbacks
from bloodcell_fastai.training.callbacks import (
    CPUBFloat16,
    History,
    RichProgress,
    StopOnSignal,
    shown_progress,
)


@pytest.fixture(scope="module")
def learn(demo_table):
    dls = blood_dls(split_table(demo_table), "test_resnet", 32, 32, device="cpu")
    return blood_learner(dls, weights="none")


class Fail(Callback):
    """Ends a fit with an exception at an event."""

    def __init__(self, event, error):
        setattr(self, event, self.fail)
        self.error = error

    def fail(self):
        raise self.error


class InForward(torch.nn.Module):
    """A model that fails when it is called, under whatever precision it is called."""

    def __init__(self, model):
        super().__init__()
        self.model, self.precision = model, None

    def forward(self, x):
        self.precision = torch.is_autocast_enabled("cpu")
        raise RuntimeError("a batch that cannot be computed")


def test_bfloat16_where_the_processor_has_it(learn):
    assert bool(learn.cbs.filter(lambda cb: isinstance(cb, CPUBFloat16))) == has_cpu_bfloat16()
    with learn.no_bar():
        assert learn.get_preds(dl=learn.dls.valid)[0].dtype == torch.float32


def test_bfloat16_ends_with_the_call_of_the_model_even_if_that_fails(learn):
    whole, bfloat16 = learn.model, CPUBFloat16()
    learn.remove_cbs(CPUBFloat16)
    learn.model = InForward(whole)
    try:
        with learn.added_cbs(bfloat16), pytest.raises(RuntimeError, match="cannot be computed"):
            learn.get_preds()
        assert learn.model.precision  # it was on
        assert not torch.is_autocast_enabled("cpu")
    finally:
        learn.model = whole
        learn.add_cbs(callbacks.precision_callback(torch.device("cpu")))


def test_the_training_loss_is_the_mean_of_the_epoch(learn):
    rows, seen = [], []

    class Watch(Callback):
        def after_batch(self):
            if self.training:
                seen.append((self.loss.item(), len(self.y)))

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[History(rows.append, first_epoch=4), Watch()])
    (row,) = rows
    mean = sum(loss * n for loss, n in seen) / sum(n for _, n in seen)
    assert row["train_loss"] == pytest.approx(mean, rel=1e-5)
    assert row["epoch"] == 5


def test_signals_are_given_back_and_ignored_ones_left_alone():
    mine = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in mine.items()}
    try:
        with StopOnSignal():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Output(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_suits_the_output(learn, monkeypatch, terminal):
    monkeypatch.setattr("sys.stdout", Output(terminal))
    for _ in range(2):
        with shown_progress(learn):
            names = [type(callback).__name__ for callback in learn.cbs]
            assert names.count("RichProgress") == terminal
            assert "ProgressCallback" not in names
        assert not learn.cbs.filter(lambda cb: isinstance(cb, RichProgress))


@pytest.mark.parametrize("event", ["after_batch", "before_validate", "after_epoch"])
@pytest.mark.parametrize("error", [CancelFitException, KeyboardInterrupt])
def test_the_cursor_comes_back_however_a_fit_ends(learn, monkeypatch, event, error):
    output = Output(terminal=True)
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setenv("TERM", "xterm")
    with learn.no_logging():
        try:
            with shown_progress(learn, 0, 1):
                learn.fit(1, cbs=Fail(event, error))
        except KeyboardInterrupt:
            pass
    shown = output.getvalue()
    assert shown.count("\x1b[?25l") > 0  # hidden while the bar is there
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
