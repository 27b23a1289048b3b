from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback

from bloodcell_fastai import BloodcellError, Config, Run, split_table, timm_model
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.training import fit as fit_module
from bloodcell_fastai.training.callbacks import TimeBatches
from bloodcell_fastai.training.fit import (
    estimate_seconds,
    find_lr,
    fit,
    make_learner,
    max_lr,
    phases,
    resolve,
)

ARCH, LITE0 = "test_resnet", "tf_efficientnet_lite0"


def make_config(**options) -> ResolvedConfig:
    defaults = {
        "arch": ARCH,
        "weights": "none",
        "size": 64,
        "bs": 16,
        "epochs": 2,
        "device": "cpu",
    }
    return ResolvedConfig(**(defaults | options))


def start(path, table, **options):
    config = make_config(**options)
    learn = make_learner(config, table)
    run = Run(path)
    asked = Config(**config.model_dump(include=set(Config.model_fields)))
    run.start(asked, resolve(config, learn), table)
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
    assert run.config.initial_weights == "none"
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
        tmp_path, table, arch=LITE0, weights=str(lite0_weights), epochs=3, size=128, bs=8, lr=2e-3
    )
    assert run.config.pretrained
    fit(learn, run, lambda line: None)
    assert run.history.valid_accuracy.max() >= 0.45  # chance is 0.25


def test_the_head_trains_first(table, lite0_weights, tmp_path):
    learn, run = start(tmp_path, table, arch=LITE0, weights=str(lite0_weights), size=32)
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
    found = phases(ResolvedConfig(**options))
    assert [(p.first_epoch, p.epochs, p.frozen) for p in found] == expected


def test_a_pretrained_body_learns_more_slowly():
    config = ResolvedConfig(pretrained=True, lr=3e-3)
    body, whole = phases(config)
    assert max_lr(config, body) == 3e-3
    assert max_lr(config, whole) == slice(pytest.approx(1e-3), 3e-3)


def test_a_batch_has_no_more_images_than_the_training_part(table, tmp_path):
    """fastai drops a last batch that is not full: the forty images of a newcomer would be none."""
    n_train = (table.part == "train").sum()
    learn, run = start(tmp_path, table, size=32, bs=1000, epochs=1)
    assert (run.config.bs, run.asked.bs, len(learn.dls.train)) == (n_train, 1000, 1)
    assert estimate_seconds(learn, run) > 0  # with a single batch, too
    fit(learn, run, lambda line: None)
    assert len(run.history) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("full"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_full_memory_is_explained_in_a_fit_and_in_a_dry_run(table, tmp_path, error):
    class Fill(Callback):
        def before_batch(self):
            raise error

    learn, run = start(tmp_path, table, epochs=1)
    learn.add_cb(Fill())
    for use in (lambda: fit(learn, run), lambda: estimate_seconds(learn, run)):
        with pytest.raises(BloodcellError, match="No memory left for 16 images of 64 px"):
            use()


def poison_weights(learn):
    with torch.no_grad():
        next(timm_model(learn).parameters()).fill_(float("nan"))


@pytest.mark.slow
def test_nan_keeps_the_best_model_and_says_so(table, tmp_path):
    learn, run = start(tmp_path, table, epochs=3)

    def poison(line):
        if line.startswith("Epoch [1/"):
            poison_weights(learn)

    with pytest.raises(BloodcellError, match="NaN in epoch 2") as caught:
        fit(learn, run, poison)
    assert "`lr` below 0.001" in caught.value.hint
    assert run.has_model


def test_nan_after_the_last_step_of_an_epoch_is_seen_before_it_is_saved(table, tmp_path):
    class Poison(Callback):
        def after_train(self):
            if self.epoch == 1:
                poison_weights(self.learn)

    learn, run = start(tmp_path, table, epochs=3)
    learn.add_cb(Poison())
    with pytest.raises(BloodcellError, match="NaN in epoch 2; the 1 before it"):
        fit(learn, run, lambda line: None)
    assert run.load_last().epochs_done == len(run.history) == 1


@pytest.mark.slow
def test_early_stopping(table, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "max_lr", lambda config, phase: 0.0)  # nothing is learnt
    learn, run = start(tmp_path, table, epochs=9, patience=1)
    fit(learn, run, lambda line: None)
    assert len(run.history) < 9


def test_the_learning_rate_is_found_for_all_layers(table, tmp_path, monkeypatch):
    """Not for the head of a frozen network, since most epochs train all of it."""
    learn, run = start(tmp_path, table, lr="auto")
    learn.freeze()
    trained = []

    def find():
        trained.append(all(p.requires_grad for p in learn.model.parameters()))
        return SimpleNamespace(valley=1e-3)

    monkeypatch.setattr(learn, "lr_find", find)
    assert find_lr(learn, run, lambda line: None) == 1e-3
    assert trained == [True]


@pytest.mark.slow
def test_lr_find_keeps_its_plot_and_its_rate(table, tmp_path):
    learn, run = start(tmp_path, table, epochs=1, lr="auto", bs=4, size=32)
    fit(learn, run, lambda line: None)
    assert run.asked.lr == "auto"
    assert run.config.lr > 0
    assert (run.path / "lr_find.png").stat().st_size > 1000
    assert set(run.table.path) == set(table.path)


def test_the_estimate_leaves_out_the_batch_that_warms_up():
    timer = TimeBatches()
    timer.times = [0.0, 10.0, 11.0, 12.0, 13.0]
    assert timer.seconds == 1
    timer.times = [0.0, 10.0]
    assert timer.seconds == 10
