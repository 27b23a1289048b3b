"""The folder of a run: the only place that reads or writes one."""

import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch
from fastai.vision.all import Learner
from safetensors.torch import save

from ..config import Config
from ..errors import BloodcellError, is_number
from ..files import (
    atomic_path,
    read_json,
    read_table,
    remove_unfinished,
    sole_writer,
    write_json,
    write_table,
    write_text,
)
from ..processes import agree, by_first, rank
from ..reporter import Reporter
from .calibration import Calibration, Reference
from .checkpoints import bad_checkpoint, check_optimizer, read_checkpoint
from .learner import load_weights, read_tensors, timm_model
from .ready import DEFAULT_READY, READY, introduce, ready_path, ready_source

IMAGE_COLUMNS = ["path", "label", "subset", "photo", "part"]
REFERENCE_COLUMNS = ["path", "label", "photo"]
HISTORY = ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "lr", "seconds"]


class Run:
    """A folder with everything about one training: see the README for its files.

    Every file is written beside and renamed, so that a kill leaves the previous one. Of processes
    that train together the first writes, and what writes does nothing in the others. Files whose
    names begin with a dot hold nothing of the run: its lock, and what is being written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def create(cls, root: str | Path = "runs", name: str | None = None) -> "Run":
        """Make a new folder under ``root``, named after the time if no name is given.

        A folder that a process left which was killed before its run began is used again. Of
        several processes the first makes it for all.

        Raises:
            BloodcellError: the name is taken or is not a plain one.
        """
        return agree(lambda: cls._create(root, name))

    @classmethod
    def _create(cls, root: str | Path, name: str | None) -> "Run":
        if name is None:
            return cls(_new_folder(Path(root), datetime.now().strftime("%Y%m%d-%H%M%S")))
        if not re.fullmatch(r"[\w][\w.-]{0,99}", name):
            raise BloodcellError(
                f"{name!r} cannot name a run.", "Use letters, digits, dots and dashes."
            )
        run = cls(Path(root) / name)
        run.path.mkdir(parents=True, exist_ok=True)
        if not all(path.name[0] == "." or path.name == "split.csv" for path in run.path.iterdir()):
            raise BloodcellError(
                f"There is a run named {name} in {root}.",
                "Choose another --name, or continue it with --resume.",
            )
        return run

    @classmethod
    def open(cls, path: str | Path | None = None, root: str | Path = "runs") -> "Run":
        """The run of that path, of that name under ``root``, or, where there is no such run,
        the model of that name that comes with the package; the newest under ``root`` if None.

        Raises:
            BloodcellError: there is none.
        """
        root = Path(root)
        if path is None:
            runs = all_runs(root)
            if not runs:
                raise BloodcellError(f"No run in {root}/.", "Train one: bloodcell fit")
            return runs[-1]
        for candidate in (Path(path), root / path):
            if (candidate / "config.json").is_file():
                return cls(candidate)
        if str(path) in READY:
            return cls(ready_path(str(path)))
        raise BloodcellError(
            f"{path} is not a run, nor is {root / path}.",
            f"Runs here: {', '.join(r.name for r in all_runs(root)) or 'none'}. With the package "
            f"comes: {', '.join(READY)}.",
        )

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run; of a fold, with all of them."""
        root = self.path.parent
        if (parent := Run(root)).started:
            return parent.resume_command
        elsewhere = "" if root == Path("runs") else f" --runs {shlex.quote(str(root))}"
        return f"bloodcell fit --resume --name {self.name}{elsewhere}"

    @property
    def report(self) -> Path:
        """Folder of the report and its figures."""
        return self.path / "report"

    @property
    def output(self) -> Path:
        """Folder for what is made of the model: the run's own; of a model that comes with the
        package one of its name in the working folder, for the package is not to be changed."""
        return Path(self.name) if ready_source(self.path) else self.path

    def results_on(self, data: Path, subset: str = "") -> Path:
        """Folder of the results on another data set, ``on/NAME``, whether it is there yet or not.

        Another data set of the same name does not lose its results: the folder gets a number.

        Args:
            data: folder of the data set.
            subset: the part of it that was looked at; empty: all of it.
        """
        name = "-".join(filter(None, (data.name[:100] or "data", subset[:100])))
        number, folder = 1, self.output / "on" / name
        while (metrics := folder / "metrics.json").is_file():
            if read_json(metrics).get("data") == str(data):
                break
            number += 1
            folder = self.output / "on" / f"{name}-{number}"
        return folder

    @property
    def config(self) -> Config:
        """The run's options, as resolved when it began."""
        return Config.load(self.path / "config.json")

    @property
    def table(self) -> pd.DataFrame:
        """The image table with its ``part``."""
        return read_table(self.path / "split.csv", IMAGE_COLUMNS, hint="Train again: bloodcell fit")

    @property
    def history(self) -> pd.DataFrame:
        """One row per finished epoch, in the columns of ``history.csv``; empty before the first."""
        path = self.path / "history.csv"
        if not path.is_file():
            return pd.DataFrame(columns=HISTORY)
        return read_table(path, HISTORY, numbers=HISTORY)

    @property
    def has_model(self) -> bool:
        """Whether an epoch has finished, so that there is a best model."""
        return (self.path / "model.safetensors").is_file()

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return (self.path / "last" / "finished.json").is_file()

    @property
    def _checkpoint(self) -> Path:
        return self.path / "last" / "checkpoint.safetensors"

    @property
    def started(self) -> bool:
        """Whether :meth:`start` came to its end, without which the folder is no run."""
        return (self.path / "config.json").is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run against other processes that would train it, and remove what a killed one
        left unfinished. Of processes that train together the first holds it for all.

        Raises:
            BloodcellError: another process trains it; the message names that process.
        """
        if rank() > 0:
            yield
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(sole_writer(self.path, timeout=0))
            except TimeoutError:
                raise BloodcellError(
                    f"Run {self.name} is being trained by {self._owner()}.",
                    "Wait for it, stop it, or train another run under another --name.",
                ) from None
            for folder in (self.path / "last", self.report):
                remove_unfinished(folder)
            shutil.rmtree(self.path / "models", ignore_errors=True)  # fastai's lr_find at work
            if self.finished:
                self._checkpoint.unlink(missing_ok=True)
            owner = self.path / ".owner.json"
            stack.callback(_try_unlink, owner)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
            yield

    def _owner(self) -> str:
        try:
            owner = json.loads((self.path / ".owner.json").read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except (OSError, ValueError, LookupError, TypeError):  # it is just beginning or ending
            return "another process"

    @by_first
    def start(self, config: Config, table: pd.DataFrame) -> None:
        """Write what the run is: its images and, last, its options, which make it a run."""
        write_table(self.path / "split.csv", table)
        config.save(self.path / "config.json")

    @by_first
    def append_history(self, row: dict) -> None:
        """Add an epoch to ``history.csv``, in place of any the run had from there on."""
        self.cut_history(row["epoch"] - 1)
        path = self.path / "history.csv"  # kept as text: a number read and written can change
        before = path.read_text() if path.is_file() else ",".join(HISTORY) + "\n"
        added = pd.DataFrame([row], columns=HISTORY).to_csv(index=False, header=False)
        write_text(path, before + added)

    @by_first
    def cut_history(self, epochs: int) -> None:
        """Drop the epochs after the first ``epochs``: a kill lost them, but not their rows."""
        if len(self.history) > epochs:
            path = self.path / "history.csv"
            lines = path.read_text().splitlines(keepends=True)
            write_text(path, "".join(lines[: epochs + 1]))

    def save_model(self, learn: Learner) -> None:
        """Write the weights as they are now as the best of the run; see :meth:`save_weights`."""
        self.save_weights(timm_model(learn).state_dict(), learn.dls.vocab)

    @by_first
    def save_weights(self, state: Mapping[str, torch.Tensor], classes: Sequence[str]) -> None:
        """Write tensors in timm's naming as ``model.safetensors``, with the names of its outputs.

        A calibration and a stress test of the weights before them go.
        """
        for name in ("calibration.json", "stress.csv"):
            (self.path / name).unlink(missing_ok=True)
        metadata = {"classes": json.dumps(list(classes))}
        _write_tensors(self.path / "model.safetensors", state, metadata)

    def load_model(self, learn: Learner) -> None:
        """Put the run's best weights into ``learn``.

        Raises:
            BloodcellError: there are none yet, or they do not fit.
        """
        self.require_model()
        load_weights(timm_model(learn), self.path / "model.safetensors", tuple(learn.dls.vocab))

    @property
    def calibration(self) -> Calibration | None:
        """What :func:`calibrate` found for the run's model; None if it was not calibrated.

        Raises:
            BloodcellError: ``calibration.json`` is not what :meth:`save_calibration` writes.
        """
        path = self.path / "calibration.json"
        return _read_calibration(path) if path.is_file() else None

    @property
    def reference(self) -> Reference | None:
        """The training images to compare others with; None if the run was not calibrated.

        Raises:
            BloodcellError: its files are missing, damaged or do not belong together.
        """
        if (calibration := self.calibration) is None:
            return None
        path, listed = self.path / "reference.safetensors", self.path / "reference.csv"
        features = read_tensors(path).get("features", torch.empty(0))
        table = read_table(listed, REFERENCE_COLUMNS) if listed.is_file() else []
        fits = features.ndim == 2 and len(features) == len(table)
        fits = fits and features.is_floating_point() and bool(features.isfinite().all())
        if not fits or not 1 <= calibration.neighbours <= len(table):
            raise BloodcellError(
                f"{path} and {listed.name} do not belong together.",
                _RECALIBRATE.format(self.name, self.path),
            )
        return Reference(features, table, calibration.neighbours)

    @by_first
    def save_calibration(self, calibration: Calibration, reference: Reference) -> None:
        """Write ``reference.safetensors``, ``reference.csv`` and ``calibration.json``.

        The last one goes first and comes back last: while it is there, the three belong together.
        """
        path = self.path / "calibration.json"
        path.unlink(missing_ok=True)
        _write_tensors(self.path / "reference.safetensors", {"features": reference.features.half()})
        write_table(self.path / "reference.csv", reference.table)
        write_json(path, asdict(calibration))

    def require_model(self) -> None:
        """Refuse to go on without a trained model.

        Raises:
            BloodcellError: no epoch has finished yet, or the run is one of folds.
        """
        self.refuse_folds()
        if not self.has_model:
            raise BloodcellError(
                f"Run {self.name} has no model yet.",
                f"Train it: {self.resume_command}",
            )

    def refuse_folds(self) -> None:
        """Refuse a run of several folds, each of which is a run with a model of its own.

        Raises:
            BloodcellError: this is one.
        """
        if self.config.folds:
            raise BloodcellError(
                f"Run {self.name} has {self.config.folds} models, one for each fold.",
                f"Name one of them: {self.name}/fold-1",
            )

    def fold(self, number: int) -> "Run":
        """One of the runs of several folds, counted from 1; it need not be there yet."""
        return Run(self.path / f"fold-{number}")

    @by_first
    def save_last(self, learn: Learner, epochs_done: int, best: float, wait: int) -> None:
        """Write what resuming needs, in one file, so that its parts always belong together."""
        tensors, plain = _pack_optimizer(learn.opt.state_dict())
        tensors |= {f"model.{k}": v for k, v in timm_model(learn).state_dict().items()}
        state = {"epochs_done": epochs_done, "best": best, "wait": wait, "optimizer": plain}
        _write_tensors(self._checkpoint, tensors, {"state": json.dumps(state)})

    def load_last(self) -> "Checkpoint | None":
        """What :meth:`save_last` wrote last, or None if no epoch has finished."""
        return Checkpoint(self._checkpoint) if self._checkpoint.is_file() else None

    @by_first
    def finish(self) -> None:
        """Mark the run as done and drop the checkpoint, which nothing will need."""
        write_json(self.path / "last" / "finished.json", {"epochs": len(self.history)})
        self._checkpoint.unlink(missing_ok=True)

    @by_first
    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)


class Checkpoint:
    """The end of an epoch: weights, optimizer, best score.

    Attributes:
        epochs_done: epochs finished so far.
        best: best validation accuracy so far.
        wait: epochs since then.
    """

    def __init__(self, path: Path):
        self._path = path
        self._tensors, state = read_checkpoint(path)
        self.epochs_done, self.best, self.wait = state["epochs_done"], state["best"], state["wait"]
        self._optimizer = state["optimizer"]

    def restore_model(self, learn: Learner) -> None:
        """Put the weights into ``learn``."""
        model = {k[6:]: v for k, v in self._tensors.items() if k.startswith("model.")}
        try:
            timm_model(learn).load_state_dict(model)
        except (RuntimeError, TypeError):
            raise bad_checkpoint(self._path, "its weights are those of another model") from None

    def restore_optimizer(self, learn: Learner) -> None:
        """Put the optimizer's state into ``learn``; after freezing, which clears it."""
        learn.create_opt()
        state = _unpack_optimizer(self._tensors, self._optimizer)
        check_optimizer(self._path, learn.opt, state)
        learn.opt.load_state_dict(state)


def all_runs(root: str | Path = "runs") -> list[Run]:
    """The runs under ``root``, oldest first."""
    configs = Path(root).glob("*/config.json")
    return [Run(path.parent) for path in sorted(configs, key=lambda p: p.stat().st_mtime_ns)]


def open_model(
    path: str | Path | None = None, root: str | Path = "runs", reporter: Reporter | None = None
) -> Run:
    """The run to predict with: as :meth:`Run.open`, and where nothing is named the newest run that
    has a model, or without any the model that comes with the package.

    Args:
        path: folder or name of a run, or ``pbc`` for the model that comes with the package.
        root: folder of the runs.
        reporter: told what the model that comes with the package is and is not, if it is taken.

    Raises:
        BloodcellError: there is no run of that name, or the installation lacks the model.
    """
    if path is None:
        trained = [run.path for run in all_runs(root) if run.has_model or run.finished]
        path = trained[-1] if trained else ready_path(DEFAULT_READY)
    run = Run.open(path, root)
    if ready_source(run.path):
        (reporter or Reporter()).warn(introduce(run.name, run.config))
    return run


def newest_unfinished(root: str | Path = "runs") -> Run:
    """The newest run that was cut off.

    Raises:
        BloodcellError: every run came to its end.
    """
    for run in reversed(all_runs(root)):
        if not run.finished:
            return run
    raise BloodcellError(f"No unfinished run in {root}/.", "Start a new one: bloodcell fit")


_RECALIBRATE = "Calibrate it anew: rm {1}/calibration.json && bloodcell interpret {0}"


def _read_calibration(path: Path) -> Calibration:
    """A calibration whose every field is there and makes sense."""
    values = read_json(path, _RECALIBRATE.format(path.parent.name, path.parent))
    for field in fields(Calibration):
        low, high, whole = _CALIBRATION_RANGES[field.name]
        value = values.get(field.name)
        if not is_number(value, low, high) or (whole and not isinstance(value, int)):
            raise _bad_calibration(path, f"{field.name} is {repr(value)[:40]}")
    return Calibration(**{field.name: values[field.name] for field in fields(Calibration)})


# Lowest and highest value, and whether it is a whole number. Unit vectors are at most 2 apart.
_CALIBRATION_RANGES = {
    "temperature": (1e-6, 1e6, False),
    "distance_threshold": (0, 2, False),
    "neighbours": (1, 10**9, True),
    "ece_before": (0, 1, False),
    "ece_after": (0, 1, False),
    "n_images": (1, 10**12, True),
}


def _bad_calibration(path: Path, problem: str) -> BloodcellError:
    return BloodcellError(f"{path}: {problem}.", _RECALIBRATE.format(path.parent.name, path.parent))


def _try_unlink(path: Path) -> None:
    with suppress(OSError):  # what went wrong before matters more
        path.unlink(missing_ok=True)


def _new_folder(root: Path, name: str) -> Path:
    """A folder of that name, with a number added if it is taken."""
    number, folder = 1, root / name
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = root / f"{name}-{number}"


def _write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; an error of the disk is an OSError, as from any other file."""
    plain = {key: value.detach().contiguous() for key, value in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(plain, metadata))


def _pack_optimizer(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """fastai's optimizer state as named tensors and plain values that JSON can hold."""
    tensors: dict[str, torch.Tensor] = {}
    plain = []
    for index, entry in enumerate(state["state"]):
        tensors |= {f"opt.{index}.{k}": v for k, v in entry.items() if torch.is_tensor(v)}
        plain.append({k: v for k, v in entry.items() if not torch.is_tensor(v)})
    return tensors, {"state": plain, "hypers": [dict(hyper) for hyper in state["hypers"]]}


def _unpack_optimizer(tensors: dict[str, torch.Tensor], plain: dict) -> dict:
    state = [dict(entry) for entry in plain["state"]]
    for key, value in tensors.items():
        if key.startswith("opt."):
            _, index, name = key.split(".", 2)
            state[int(index)][name] = value
    return {"state": state, "hypers": plain["hypers"]}
