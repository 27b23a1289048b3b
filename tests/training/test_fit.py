import io
import signal

import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback

from bloodcell_fastai import BloodcellError, Config, Run, split_table
from bloodcell_fastai.training import fit as fit_module
from bloodcell_fastai.training.callbacks import (
    CPUBFloat16,
    RichProgress,
    StopOnSignal,
    has_cpu_bfloat16,
    use_progress,
)
from bloodcell_fastai.training.fit import fit, make_learner, max_lr, phases, resolve
from bloodcell_fastai.training.learner import timm_model

LITE0 = "tf_efficientnet_lite0"


def make_config(**options) -> Config:
    defaults = {
        "arch": LITE0,
        "weights": "none",
        "size": 64,
        "batch_size": 16,
        "epochs": 2,
        "workers": 0,
        "device": "cpu",
    }
    return Config(**(defaults | options))


def start(path, table, **options):
    config = make_config(**options)
    learn = make_learner(config, table)
    run = Run(path)
    run.start(resolve(config, learn), table)
    return learn, run


@pytest.fixture(scope="module")
def table(demo_table):
    return split_table(demo_table)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, table):
    """Three epochs without a stop, and what was said."""
    lines = []
    learn, run = start(tmp_path_factory.mktemp("run"), table, epochs=3)
    fit(learn, run, lines.append)
    return learn, run, lines


def test_history_and_lines(trained):
    _, run, lines = trained
    history = run.history
    assert history.epoch.tolist() == [1, 2, 3]
    assert history.train_loss.gt(0).all()
    assert history.valid_accuracy.between(0, 1).all()
    first = history.iloc[0]
    assert lines[0] == (
        f"Epoch [1/3]  Train Loss: {first.train_loss:.4f} | Train Acc: {first.train_accuracy:.2%}"
        f"  || Val Loss: {first.valid_loss:.4f} | Val Acc: {first.valid_accuracy:.2%}"
    )
    assert lines[1] == f"Saved new best model with val_acc: {first.valid_accuracy:.2%}"


def test_the_best_epoch_is_in_the_learner_and_on_disk(trained):
    learn, run, _ = trained
    with learn.no_bar():
        _, accuracy = learn.validate()[:2]
    assert accuracy == pytest.approx(run.history.valid_accuracy.max(), abs=1e-6)
    assert not run.finished  # it is not calibrated yet


def test_the_config_says_what_was_resolved(trained):
    _, run, _ = trained
    assert run.config.classes == ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")
    assert run.config.weights_used == "none"
    assert any(entry.startswith("torch ") for entry in run.config.versions)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(trained, table, tmp_path, stop_after):
    class Killed(Exception):
        pass

    def die(line):
        if line.startswith(f"Epoch [{stop_after + 1}/"):
            raise Killed("killed")  # fastai's callbacks need an exception with a message

    _, whole, _ = trained
    learn, run = start(tmp_path, table, epochs=3)
    with pytest.raises(Killed):
        fit(learn, run, die)
    assert run.load_last().epochs_done == stop_after
    fit(make_learner(run.config, table), run, lambda line: None)
    columns = [name for name in whole.history if name != "seconds"]
    pd.testing.assert_frame_equal(run.history[columns], whole.history[columns], check_exact=True)
    assert (run.path / "model.safetensors").read_bytes() == (
        whole.path / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_real_imagenet_weights_learn_the_demo(table, lite0_weights, tmp_path):
    learn, run = start(
        tmp_path, table, weights=str(lite0_weights), epochs=3, size=128, batch_size=8, lr=2e-3
    )
    assert run.config.pretrained
    fit(learn, run, lambda line: None)
    assert run.history.valid_accuracy.max() >= 0.45  # chance is 0.25


def test_the_head_trains_first(table, lite0_weights, tmp_path):
    learn, run = start(tmp_path, table, weights=str(lite0_weights), epochs=2)
    before = {n: p.detach().clone() for n, p in timm_model(learn).named_parameters()}
    after = {}

    def look(line):
        if line.startswith("Epoch [1/"):
            after.update({n: p.detach().clone() for n, p in timm_model(learn).named_parameters()})

    fit(learn, run, look)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "conv_stem.weight" in same
    assert "classifier.weight" not in same


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pretrained": False}, [(0, 20, False)]),
        ({"pretrained": True}, [(0, 1, True), (1, 19, False)]),
        ({"pretrained": True, "freeze_epochs": 3}, [(0, 3, True), (3, 17, False)]),
        ({"pretrained": True, "freeze_epochs": 0}, [(0, 20, False)]),
        ({"pretrained": True, "epochs": 1}, [(0, 1, False)]),
    ],
)
def test_phases(options, expected):
    found = phases(Config(**options))
    assert [(p.first_epoch, p.epochs, p.frozen) for p in found] == expected


def test_a_pretrained_body_learns_more_slowly():
    config = Config(pretrained=True, lr=3e-3)
    body, whole = phases(config)
    assert max_lr(config, body) == 3e-3
    assert max_lr(config, whole) == slice(pytest.approx(1e-3), 3e-3)


def test_nan_keeps_the_best_model_and_says_so(table, tmp_path):
    learn, run = start(tmp_path, table, epochs=3)

    def poison(line):
        if line.startswith("Epoch [1/"):
            with torch.no_grad():
                timm_model(learn).conv_stem.weight.fill_(float("nan"))

    with pytest.raises(BloodcellError, match="NaN in epoch 2") as caught:
        fit(learn, run, poison)
    assert "--lr" in caught.value.hint
    assert run.has_model


def test_nan_after_the_last_step_of_an_epoch_is_seen_before_it_is_saved(table, tmp_path):
    class Poison(Callback):
        def after_train(self):
            if self.epoch == 1:
                with torch.no_grad():
                    timm_model(self.learn).conv_stem.weight.fill_(float("nan"))

    learn, run = start(tmp_path, table, epochs=3)
    learn.add_cb(Poison())
    with pytest.raises(BloodcellError, match="NaN in epoch 2; the 1 before it"):
        fit(learn, run, lambda line: None)
    assert run.load_last().epochs_done == len(run.history) == 1


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


def test_early_stopping(table, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "max_lr", lambda config, phase: 0.0)  # nothing is learnt
    learn, run = start(tmp_path, table, epochs=9, patience=1)
    fit(learn, run, lambda line: None)
    assert len(run.history) < 9


@pytest.mark.slow
def test_lr_find_keeps_its_plot(table, tmp_path):
    learn, run = start(tmp_path, table, epochs=1, lr=0.0, batch_size=4, size=32)
    fit(learn, run, lambda line: None)
    assert run.config.lr > 0
    assert (run.path / "lr_find.png").stat().st_size > 1000


def test_mixup_trains(table, tmp_path):
    learn, run = start(tmp_path, table, epochs=1, mixup=0.4)
    fit(learn, run, lambda line: None)
    assert len(run.history) == 1


@pytest.mark.parametrize("freeze_norm", [True, False])
def test_the_statistics_of_batch_normalisation_stay_if_asked(table, tmp_path, freeze_norm):
    learn, run = start(tmp_path, table, epochs=1, freeze_norm=freeze_norm)

    def numbers(name):
        norms = [m for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        return torch.cat([getattr(norm, name).detach().cpu().clone() for norm in norms])

    names = ("running_mean", "running_var", "weight")
    before = [numbers(name) for name in names]
    fit(learn, run, lambda line: None)
    same = [torch.equal(numbers(name), old) for name, old in zip(names, before, strict=True)]
    assert same == [freeze_norm, freeze_norm, False]


def test_bfloat16_where_the_processor_has_it(trained):
    learn, *_ = trained
    assert bool(learn.cbs.filter(lambda cb: isinstance(cb, CPUBFloat16))) == has_cpu_bfloat16()
    assert learn.get_preds(dl=learn.dls.valid)[0].dtype == torch.float32


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_suits_the_output(table, monkeypatch, terminal):
    class Output(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr("sys.stdout", Output())
    learn = make_learner(make_config(), table)
    use_progress(learn)
    names = {type(callback).__name__ for callback in learn.cbs}
    assert ("RichProgress" in names) == terminal
    assert "ProgressCallback" not in names
    use_progress(learn)
    assert len(learn.cbs.filter(lambda cb: isinstance(cb, RichProgress))) == terminal
