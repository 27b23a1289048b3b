"""Training: the head first, then everything in one cycle, the best epoch kept, resumable."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import pandas as pd
from fastai.vision.all import Learner, set_seed

from .. import __version__
from ..config import ResolvedConfig
from ..data.loaders import config_dls
from ..distributed import (
    agree,
    lost_peers_explained,
    training_together,
    wait_for_all,
    world_size,
)
from ..errors import BloodcellError, UsageError, is_out_of_memory
from ..files import atomic_path
from ..model.model import check_arch
from ..model.runs import Run
from ..reporter import Progress, no_progress
from .callbacks import (
    EarlyStopping,
    History,
    SaveBest,
    SaveLast,
    SeedEpoch,
    StopOnNaN,
    StopOnSignal,
    TimeBatches,
    shown_progress,
)
from .learner import blood_learner

BODY_LR_FACTOR = 1 / 3  # pretrained features should change less than the new head
TRACKED = ("torch", "fastai", "timm", "numpy")


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs under one schedule."""

    first_epoch: int
    epochs: int
    frozen: bool


def phases(config: ResolvedConfig) -> list[Phase]:
    """The phases of a run: the head alone (if the weights are pretrained), then everything."""
    frozen = config.freeze_epochs
    if frozen < 0:
        frozen = 1 if config.pretrained and config.epochs > 1 else 0
    plan = [Phase(0, frozen, True), Phase(frozen, config.epochs - frozen, False)]
    return [phase for phase in plan if phase.epochs]


def make_learner(
    config: ResolvedConfig,
    table: pd.DataFrame,
    cache: bool = True,
    progress: Progress = no_progress,
) -> Learner:
    """The learner of a run: its batches and its model.

    The seed decides the weights that start at random. A batch has at most as many images as the
    training part, of which each process has its part: fastai drops a last batch that is not full.

    Args:
        config: the run's options.
        table: its split image table.
        cache: decode all images once and keep them; see ``blood_dls``.
        progress: told how far the decoding has come.
    """
    check_arch(config.arch)  # before minutes go into decoding images
    set_seed(config.seed)
    n_train = int((table.part == "train").sum())
    config = config.changed(bs=min(config.bs, max(n_train // world_size(), 1)))
    dls = config_dls(table, config, cache, progress)
    return blood_learner(dls, weights=config.weights)


def resolve(config: ResolvedConfig, learn: Learner) -> ResolvedConfig:
    """``config`` with what only the learner knows: classes, initial weights, device, batch size."""
    return config.changed(
        bs=learn.dls.train.bs,
        device=str(learn.dls.device),
        classes=tuple(learn.dls.vocab),
        pretrained=learn.pretrained,
        initial_weights=learn.initial_weights,
        versions=(
            f"python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in TRACKED),
            f"bloodcell-fastai {__version__}",
        ),
    )


def fit(learn: Learner, run: Run, say: Callable[[str], None] = print) -> None:
    """Train ``learn`` as the run's config says, from where the run stopped.

    Every epoch adds a row to ``history.csv`` and a line in the published form; the best by
    validation accuracy is kept in ``model.safetensors`` and is in ``learn`` at the end.

    Args:
        learn: from :func:`make_learner`.
        run: a run that :meth:`Run.start` has begun; its last checkpoint is continued.
        say: told each line.

    Raises:
        BloodcellError: the loss is no longer a number, the memory is full, or Ctrl-C or SIGTERM
            came. What the epochs before have reached is kept.
    """
    config, checkpoint = run.config, run.load_last()
    done = checkpoint.epochs_done if checkpoint else 0
    run.cut_history(done)
    if checkpoint:
        checkpoint.restore_model(learn)
    learn.path = run.path
    if config.lr == "auto":
        lr = agree(lambda: find_lr(learn, run, say))
        config = config.changed(lr=lr, data=str(run.root))
        run.start(run.asked, config, run.table)
    best = (checkpoint.best, checkpoint.wait) if checkpoint else ()
    saver = SaveBest(lambda score: _keep_best(learn, run, score, say), *best)
    stopper, guard, signals = EarlyStopping(saver, config.patience), StopOnNaN(), StopOnSignal()
    for phase in phases(config):
        start = max(done - phase.first_epoch, 0)
        if start >= phase.epochs or stopper.due:
            continue
        learn.freeze() if phase.frozen else learn.unfreeze()
        if checkpoint and start:
            checkpoint.restore_optimizer(learn)
        callbacks = [
            SeedEpoch(config.seed, phase.first_epoch),
            guard,
            History(lambda row: _record(run, config, row, say), phase.first_epoch),
            saver,
            SaveLast(
                lambda epochs: run.save_last(learn, epochs, saver.best, saver.wait),
                phase.first_epoch,
            ),
            stopper,
            signals,
        ]
        with (
            shown_progress(learn, phase.first_epoch, config.epochs),
            learn.no_logging(),
            signals,
            _explained(run, config),
            training_together(learn),
        ):
            learn.fit_one_cycle(
                phase.epochs, max_lr(config, phase), cbs=callbacks, start_epoch=start
            )
        if guard.stopped:
            raise BloodcellError(
                f"The loss became NaN in {_where(run)}.",
                f"Train again under another `name` with an `lr` below {config.lr:g}.",
            )
        if signals.received:
            raise BloodcellError(
                f"Stopped in {_where(run)}.",
                f"Continue: {run.resume_command}",
                exit_code=128 + signals.received,
            )
    if stopper.due:
        say(f"Stopped early: no better epoch for {saver.wait}.")
    wait_for_all()  # until the first has written it
    run.load_model(learn)


def _where(run: Run) -> str:
    done = len(run.history)
    kept = f"the {done} before it and the best model are kept" if done else "none is finished yet"
    return f"epoch {done + 1}; {kept} in {run.path}"


@contextmanager
def _explained(run: Run, config: ResolvedConfig) -> Iterator[None]:
    """Turn what ends a batch, and a user can mend, into an error that says how: a lack of memory,
    a single value for BatchNorm, the loss of another process."""
    try:
        with lost_peers_explained(f"Continue, started as before: {run.resume_command}"):
            yield
    except (RuntimeError, MemoryError, ValueError) as error:
        if is_out_of_memory(error):
            raise BloodcellError(
                f"No memory left for {config.bs} images of {config.size} px at once, in "
                f"{_where(run)}.",
                f"Train under another `name` with `bs={max(config.bs // 2, 1)}`; if something else "
                f"filled the memory: {run.resume_command}",
            ) from error
        if "more than 1 value per channel" in str(error):
            raise UsageError(
                f"{config.arch} normalises over the images of a batch, and bs is {config.bs}.",
                "Train under another `name` with `bs=2` or more, or a larger `size`.",
            ) from error
        raise


def max_lr(config: ResolvedConfig, phase: Phase) -> float | slice:
    """The one-cycle maximum: for fastai, a slice gives the first value to the body and the
    second to the head."""
    lr = float(config.lr)
    return lr if phase.frozen or not config.pretrained else slice(lr * BODY_LR_FACTOR, lr)


def find_lr(learn: Learner, run: Run, say: Callable[[str], None] = print) -> float:
    """fastai's ``lr_find`` on all layers, as most epochs train them; its plot is kept as
    ``lr_find.png`` in the run."""
    import matplotlib.pyplot as plt

    say("Finding a learning rate ...")
    learn.unfreeze()
    with shown_progress(learn, 0, run.config.epochs):
        suggestion = learn.lr_find().valley
    with atomic_path(run.path / "lr_find.png") as temporary:
        plt.gcf().savefig(temporary, dpi=150)
    plt.close()
    say(f"Learning rate found: {suggestion:.1e} (plot: {run.path / 'lr_find.png'})")
    return suggestion


def estimate_seconds(learn: Learner, run: Run) -> float:
    """Expected seconds of a run, from a few training batches timed here and now.

    Validation is counted as a third of the cost of training per image.
    """
    timer, config = TimeBatches(), run.config
    learn.unfreeze()
    with (
        shown_progress(learn, 0, config.epochs),
        learn.no_logging(),
        _explained(run, config),
        training_together(learn),
    ):
        learn.fit(1, cbs=timer)
    batches = (len(learn.dls.train) + len(learn.dls.valid) / 3) / world_size()
    return timer.seconds * batches * config.epochs


def _record(run: Run, config: ResolvedConfig, row: dict, say: Callable[[str], None]) -> None:
    run.append_history(row)
    say(
        f"Epoch [{row['epoch']}/{config.epochs}]  "
        f"Train Loss: {row['train_loss']:.4f} | Train Acc: {row['train_accuracy']:.2%}  || "
        f"Val Loss: {row['valid_loss']:.4f} | Val Acc: {row['valid_accuracy']:.2%}"
    )


def _keep_best(learn: Learner, run: Run, score: float, say: Callable[[str], None]) -> None:
    run.save_model(learn)
    say(f"Saved new best model with val_acc: {score:.2%}")
