"""The folder of a run: the only place that reads or writes one."""

import hashlib
import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch
from fastai.vision.all import Learner

from ..config import Config, ResolvedConfig
from ..distributed import agree, by_first, rank
from ..errors import BloodcellError, DataError, MissingFileError, UsageError, printable
from ..files import (
    read_json,
    read_model,
    read_table,
    remove_unfinished,
    sole_writer,
    write_json,
    write_table,
    write_text,
)
from ..reporter import Reporter
from .calibration import Calibration, Reference
from .checkpoints import Checkpoint, write_checkpoint
from .model import load_weights, read_tensors, timm_model, write_tensors
from .pretrained import (
    DEFAULT_PRETRAINED,
    PRETRAINED,
    introduce,
    pretrained_path,
    pretrained_source,
)

IMAGE_COLUMNS = ["path", "label", "subset", "photo", "part"]
REFERENCE_COLUMNS = ["path", "label", "photo"]
PATH_COLUMNS = ("path", "nearest")  # relative to the data in the files of a run
HISTORY = ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "lr", "seconds"]


class Run:
    """A folder with everything about one training: see docs/training.md for its files.

    Every file is written beside and renamed, so that a kill leaves the previous one. Of processes
    that train together the first writes, and what writes does nothing in the others. Files whose
    names begin with a dot hold nothing of the run: its lock, and what is being written.

    Paths of images are relative to the folder of the data in the files, and absolute in the tables
    that this class returns: a run and its data can be moved.

    Args:
        path: the folder; it need not be there. To find one by its name use :meth:`open`, to make
            one :meth:`create`; both raise a :class:`~bloodcell_fastai.BloodcellError` where they
            cannot.
        data: where the images are now; None: where they were when the run was trained.

    Examples:
        >>> from bloodcell_fastai import Run
        >>> run = Run.open("mine")
        >>> run.config.arch, run.config.classes[0]
        ('resnet18', 'EOSINOPHIL')
        >>> list(run.table.columns)
        ['path', 'label', 'subset', 'photo', 'part']
        >>> list(run.history.columns)[:3]
        ['epoch', 'train_loss', 'train_accuracy']
    """

    def __init__(self, path: str | Path, data: str | Path | None = None):
        self.path = Path(path)
        self._data = None if data is None else Path(data).absolute()

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
            raise UsageError(
                f"{name!r} cannot name a run.", "Use letters, digits, dots and dashes."
            )
        run = cls(Path(root) / name)
        run.path.mkdir(parents=True, exist_ok=True)
        if not all(path.name[0] == "." or path.name == "split.csv" for path in run.path.iterdir()):
            raise BloodcellError(
                f"There is a run named {name} in {root}.",
                "Choose another `name`, or continue it with `resume`.",
            )
        return run

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        root: str | Path = "runs",
        data: str | Path | None = None,
    ) -> "Run":
        """The run of that path, of that name under ``root``, or, where there is no such run,
        the pretrained model of that name that ships with the package; the newest under ``root``
        with a model if None.

        Args:
            path: a folder or a name.
            root: folder of the runs.
            data: where the images are now; None: where they were when the run was trained.

        Raises:
            BloodcellError: there is none.
        """
        root = Path(root)
        if path is None:
            if not (trained := trained_runs(root)):
                raise MissingFileError(f"No trained run in {root}/.", "Train one: bloodcell fit")
            return cls(trained[-1].path, data)
        for candidate in (Path(path), root / path):
            if (candidate / "config.json").is_file():
                return cls(candidate, data)
        if str(path) in PRETRAINED:
            return cls(pretrained_path(str(path)), data)
        raise MissingFileError(
            f"{path} is not a run, nor is {root / path}.",
            f"Runs here: {', '.join(r.name for r in all_runs(root)) or 'none'}. Pretrained models: "
            f"{', '.join(PRETRAINED)}.",
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
        """Folder for what is made of the model, which is the run's own, but for a pretrained model
        ``runs/NAME``, since the package is not to be changed."""
        return Path("runs", self.name) if pretrained_source(self.path) else self.path

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
    def asked(self) -> Config:
        """The options as they were given."""
        return self._read_config()[0]

    @property
    def config(self) -> ResolvedConfig:
        """What the options were resolved to."""
        return self._read_config()[1]

    def _read_config(self) -> tuple[Config, ResolvedConfig]:
        path, hint = self.path / "config.json", "Is this the folder of a run, as fit wrote it?"
        values = read_json(path, hint)
        parts = values.get("asked"), values.get("resolved")
        if values.keys() != {"asked", "resolved"} or not all(isinstance(p, dict) for p in parts):
            raise DataError(f"{path} does not hold the tables asked and resolved.", hint)
        try:
            return Config(**values["asked"]), ResolvedConfig(**values["resolved"])
        except (UsageError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{path}: {reason}", "Was it edited?") from None

    @property
    def root(self) -> Path:
        """Folder of the images."""
        return Path(self.config.data if self._data is None else self._data)

    @property
    def table(self) -> pd.DataFrame:
        """The image table of the run, with ``part``; ``path`` is absolute.

        Raises:
            BloodcellError: ``split.csv`` is missing or no such table.
        """
        hint = "Train again: bloodcell fit"
        return self.absolute(read_table(self.path / "split.csv", IMAGE_COLUMNS, hint=hint))

    def relative(self, table: pd.DataFrame) -> pd.DataFrame:
        """``table`` with its paths relative to :attr:`root`; those outside it stay as they are."""
        return relative_to(table, self.root)

    def absolute(self, table: pd.DataFrame) -> pd.DataFrame:
        """``table`` with its paths below :attr:`root`."""
        root = self.root
        return table.assign(**table.filter(PATH_COLUMNS).map(lambda path: str(root / path)))

    def moved_to(self, root: Path) -> "Run | None":
        """This run with its images under ``root``, if they are there and gone from where they
        were; None otherwise."""
        table = self.table
        valid = table[table.part == "valid"] if (table.part == "valid").any() else table
        moved = Run(self.path, root)
        there = self.relative(valid).path.map(lambda path: (Path(root) / path).is_file())
        gone = not valid.path.map(lambda path: Path(path).is_file()).any()
        return moved if gone and there.all() else None

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
                    "Wait for it, stop it, or train another run under another `name`.",
                ) from None
            for folder in (self.path / "last", self.report):
                remove_unfinished(folder)
            shutil.rmtree(self.path / "models", ignore_errors=True)  # fastai's lr_find at work
            if self.finished:
                self._checkpoint.unlink(missing_ok=True)
            owner = self.path / ".owner"
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            try:
                write_text(owner, f"process {os.getpid()} on {socket.gethostname()} since {since}")
                yield
            finally:
                with suppress(OSError):  # what went wrong before matters more
                    owner.unlink(missing_ok=True)

    def _owner(self) -> str:
        try:
            return printable((self.path / ".owner").read_text(encoding="utf-8")[:200])
        except (OSError, ValueError):  # it is just beginning or ending
            return "another process"

    @by_first
    def start(self, asked: Config, resolved: ResolvedConfig, table: pd.DataFrame) -> None:
        """Write what the run is: its images and, last, its options, which make it a run."""
        write_table(self.path / "split.csv", relative_to(table, Path(resolved.data)))
        values = {"asked": asked.model_dump(), "resolved": resolved.model_dump()}
        write_json(self.path / "config.json", values)

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

        Results of the weights before them are removed.
        """
        for name in ("calibration.json", "metrics.json", "predictions.csv", "robustness.csv"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.report, self.path / "on"):
            shutil.rmtree(folder, ignore_errors=True)
        metadata = {"classes": json.dumps(list(classes))}
        write_tensors(self.path / "model.safetensors", state, metadata)

    @property
    def weights_hash(self) -> str:
        """SHA-256, in hex, of ``model.safetensors``; of folds that of all their hashes.

        Results carry it, since a file of weights may be replaced.
        """
        if self.has_model:
            with (self.path / "model.safetensors").open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        numbers = range(1, self.config.folds + 1)
        hashes = "".join(self.fold(number).weights_hash for number in numbers)
        return hashlib.sha256(hashes.encode()).hexdigest()

    def require_weights(self, weights_hash: str, path: Path, hint: str) -> None:
        """Refuse results of other weights than the run has now.

        Args:
            weights_hash: what the results carry.
            path: their file.
            hint: how to make them anew.

        Raises:
            BloodcellError: they are of others.
        """
        if weights_hash != self.weights_hash:
            raise DataError(f"{path} is of other weights than {self.name} has now.", hint)

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
            BloodcellError: ``calibration.json`` is not what :meth:`save_calibration` writes, or is
                of other weights.
        """
        path = self.path / "calibration.json"
        hint = _RECALIBRATE.format(self.name, self.path)
        if not path.is_file():
            return None
        calibration = read_model(path, Calibration, hint)
        self.require_weights(calibration.weights, path, hint)
        return calibration

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
            raise DataError(
                f"{path} and {listed.name} do not belong together.",
                _RECALIBRATE.format(self.name, self.path),
            )
        return Reference(features, self.absolute(table), calibration.neighbours)

    @by_first
    def save_calibration(self, calibration: Calibration, reference: Reference) -> None:
        """Write ``reference.safetensors``, ``reference.csv`` and ``calibration.json``.

        The last one goes first and comes back last: while it is there, the three belong together.
        """
        path = self.path / "calibration.json"
        path.unlink(missing_ok=True)
        write_tensors(self.path / "reference.safetensors", {"features": reference.features.half()})
        write_table(self.path / "reference.csv", self.relative(reference.table))
        write_json(path, calibration.model_dump() | {"weights": self.weights_hash})

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
        return Run(self.path / f"fold-{number}", self._data)

    @by_first
    def save_last(self, learn: Learner, epochs_done: int, best: float, wait: int) -> None:
        """Write what resuming needs; see :mod:`~bloodcell_fastai.model.checkpoints`."""
        write_checkpoint(self._checkpoint, learn, epochs_done, best, wait)

    def load_last(self) -> Checkpoint | None:
        """What :meth:`save_last` wrote last, or None if no epoch has finished."""
        return Checkpoint.read(self._checkpoint) if self._checkpoint.is_file() else None

    @by_first
    def finish(self) -> None:
        """Mark the run as done and drop the checkpoint, which nothing will need."""
        write_json(self.path / "last" / "finished.json", {"epochs": len(self.history)})
        self._checkpoint.unlink(missing_ok=True)

    @by_first
    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)


def all_runs(root: str | Path = "runs") -> list[Run]:
    """The runs under ``root``, oldest first; an export for timm has a ``config.json`` too."""
    configs = [p for p in Path(root).glob("*/config.json") if p.with_name("split.csv").is_file()]
    return [Run(path.parent) for path in sorted(configs, key=lambda p: p.stat().st_mtime_ns)]


def trained_runs(root: str | Path = "runs") -> list[Run]:
    """The runs under ``root`` that have a model, or of folds all models, oldest first."""
    return [run for run in all_runs(root) if run.has_model or run.finished]


def open_model(
    path: str | Path | None = None,
    root: str | Path = "runs",
    reporter: Reporter | None = None,
    data: str | Path | None = None,
) -> Run:
    """The run to predict with: as :meth:`Run.open`, and where nothing is named the newest run that
    has a model, or without any the pretrained model that ships with the package.

    Args:
        path: folder or name of a run, or ``pbc`` for the pretrained model.
        root: folder of the runs.
        reporter: told what the pretrained model is and is not, if it is taken.
        data: see :meth:`Run.open`.

    Raises:
        BloodcellError: there is no run of that name, or the installation lacks the model.
    """
    if path is None and not trained_runs(root):
        path = pretrained_path(DEFAULT_PRETRAINED)
    run = Run.open(path, root, data)
    if pretrained_source(run.path):
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
    raise MissingFileError(f"No unfinished run in {root}/.", "Start a new one: bloodcell fit")


_RECALIBRATE = "Calibrate it anew: rm {1}/calibration.json && bloodcell interpret {0}"


def relative_to(table: pd.DataFrame, root: Path) -> pd.DataFrame:
    """``table`` with its paths relative to ``root``, as POSIX paths; others stay as they are."""

    def relative(path: str) -> str:
        file = Path(path)
        return (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()

    return table.assign(**table.filter(PATH_COLUMNS).map(relative))


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
