"""Training: the head first, then everything in one cycle, the best epoch kept, resumable."""

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version

import pandas as pd
import torch
from fastai.callback.mixup import MixUp
from fastai.vision.all import Learner, set_seed

from ..config import Config
from ..data.blocks import config_dls
from ..data.dataset import Progress, no_progress
from ..errors import BloodcellError, usage_error
from ..processes import agree, lost_peers_explained, wait_for_all, world_size
from .callbacks import (
    Compile,
    EarlyStopping,
    FreezeNorm,
    History,
    SaveBest,
    SaveLast,
    SeedEpoch,
    StopOnNaN,
    StopOnSignal,
    TimeBatches,
    use_progress,
)
from .learner import blood_learner, check_arch
from .runs import Run

BODY_LR_SHARE = 1 / 3  # pretrained features should change less than the new head
COMPILE_IMAGES = 500_000  # a few minutes of a large GPU's training; not measured on one
TRACKED = ("torch", "fastai", "timm", "numpy", "bloodcell-fastai")


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs under one schedule."""

    first_epoch: int
    epochs: int
    frozen: bool


def phases(config: Config) -> list[Phase]:
    """The phases of a run: the head alone (if the weights are pretrained), then everything."""
    frozen = config.freeze_epochs
    if frozen < 0:
        frozen = 1 if config.pretrained and config.epochs > 1 else 0
    plan = [Phase(0, frozen, True), Phase(frozen, config.epochs - frozen, False)]
    return [phase for phase in plan if phase.epochs]


def make_learner(
    config: Config,
    table: pd.DataFrame,
    weights: str | None = None,
    cache: bool = True,
    progress: Progress = no_progress,
) -> Learner:
    """The learner of a run: its batches, its model, and mixup if it asks for it.

    The seed decides the weights that start at random.

    Args:
        config: the run's options.
        table: its split image table.
        weights: in place of the config's.
        cache: decode all images once and keep them; see ``blood_dls``.
        progress: told how far the decoding has come.
    """
    check_arch(config.arch)  # before minutes go into decoding images
    set_seed(config.seed)
    dls = config_dls(table, config, cache, progress)
    extras = [MixUp(config.mixup)] if config.mixup else []
    if config.freeze_norm:
        extras.append(FreezeNorm())
    if compile_pays(config, len(dls.train_ds)):
        extras.append(Compile())
    return blood_learner(
        dls,
        arch=config.arch,
        weights=config.weights if weights is None else weights,
        size=config.size,
        label_smoothing=config.label_smoothing,
        wd=config.wd,
        cbs=extras,
    )


def compile_pays(config: Config, n_images: int) -> bool:
    """Whether ``torch.compile``, which takes a minute or two on a GPU, saves more than that.

    It speeds MaxViT up by a third and more on GPUs, by timm's published figures, and brought
    nothing on a CPU: :class:`~bloodcell_fastai.training.callbacks.Compile` leaves that alone.
    """
    if config.compile == "auto":
        return n_images * config.epochs >= COMPILE_IMAGES
    return config.compile == "yes"


def resolve(config: Config, learn: Learner) -> Config:
    """``config`` with what only the learner knows: classes, first weights, versions, device."""
    return replace(
        config,
        classes=tuple(learn.dls.vocab),
        pretrained=learn.pretrained,
        weights_used=learn.weights_used,
        device=str(learn.dls.device),
        versions=(
            f"python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in TRACKED),
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
    use_progress(learn, 0, config.epochs)
    if config.lr == 0:
        config = replace(config, lr=agree(lambda: find_lr(learn, run, say)))
        run.start(config, run.table)
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
        use_progress(learn, phase.first_epoch, config.epochs)
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
        with learn.no_logging(), signals, _explained(run, config), _shared(learn, config):
            learn.fit_one_cycle(
                phase.epochs, max_lr(config, phase), cbs=callbacks, start_epoch=start
            )
        if guard.stopped:
            raise BloodcellError(
                f"The loss became NaN in {_where(run)}.",
                f"Train again under another --name with a lower --lr than {config.lr:g}.",
            )
        if signals.received:
            raise BloodcellError(
                f"Stopped in {_where(run)}.",
                f"Go on: {run.resume_command}",
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


def _shared(learn: Learner, config: Config) -> AbstractContextManager:
    """A block in which the processes that were joined train together.

    Raises:
        BloodcellError: a batch cannot be parted equally.
    """
    world = world_size()
    if world == 1:
        return nullcontext()
    if learn.dls.train.bs % world or len(learn.dls.train_ds) < learn.dls.train.bs:
        n = min(config.batch_size, len(learn.dls.train_ds)) // world * world
        raise usage_error(
            f"{world} processes cannot share batches of {config.batch_size} of "
            f"{len(learn.dls.train_ds):,} images equally.",
            f"--batch-size is that of all processes together: use {max(n, world)}.",
        )
    from .distributed import shared_fit  # it needs Accelerate

    return shared_fit(learn)


@contextmanager
def _explained(run: Run, config: Config) -> Iterator[None]:
    """Turn a lack of memory, or the loss of another process, into an error that says what to do."""
    try:
        with lost_peers_explained(f"Go on: the same command with --resume --name {run.name}"):
            yield
    except (RuntimeError, MemoryError) as error:
        # torch has a class for it on a device only; on the CPU it names its allocator.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and (
            "DefaultCPUAllocator" not in str(error)
        ):
            raise
        raise BloodcellError(
            f"No memory left for {config.batch_size} images of {config.size} px at once, in "
            f"{_where(run)}.",
            f"Train under another --name with --batch-size {max(config.batch_size // 2, 1)}; if "
            f"something else filled the memory: {run.resume_command}",
        ) from error


def max_lr(config: Config, phase: Phase) -> float | slice:
    """The one-cycle maximum: for fastai, a slice gives the first value to the body and the
    second to the head."""
    if phase.frozen or not config.pretrained:
        return config.lr
    return slice(config.lr * BODY_LR_SHARE, config.lr)


def find_lr(learn: Learner, run: Run, say: Callable[[str], None] = print) -> float:
    """fastai's ``lr_find``; its plot is kept as ``lr_find.png`` in the run."""
    import matplotlib.pyplot as plt

    from ..files import atomic_path

    say("Finding a learning rate ...")
    suggestion = learn.lr_find().valley
    with atomic_path(run.path / "lr_find.png") as temporary:
        plt.gcf().savefig(temporary, dpi=150)
    plt.close()
    say(f"Learning rate found: {suggestion:.1e} (plot: {run.path / 'lr_find.png'})")
    return suggestion


def estimate_seconds(learn: Learner, config: Config) -> float:
    """Expected seconds of a run, from a few training batches timed here and now.

    Validation is counted as a third of the cost of training per image.
    """
    timer = TimeBatches()
    learn.unfreeze()
    use_progress(learn, 0, config.epochs)
    with learn.no_logging(), _shared(learn, config):
        learn.fit(1, cbs=timer)
    batches = len(learn.dls.train) + len(learn.dls.valid) / 3
    return timer.seconds * batches * config.epochs


def _record(run: Run, config: Config, row: dict, say: Callable[[str], None]) -> None:
    run.append_history(row)
    say(
        f"Epoch [{row['epoch']}/{config.epochs}]  "
        f"Train Loss: {row['train_loss']:.4f} | Train Acc: {row['train_accuracy']:.2%}  || "
        f"Val Loss: {row['valid_loss']:.4f} | Val Acc: {row['valid_accuracy']:.2%}"
    )


def _keep_best(learn: Learner, run: Run, score: float, say: Callable[[str], None]) -> None:
    run.save_model(learn)
    say(f"Saved new best model with val_acc: {score:.2%}")
