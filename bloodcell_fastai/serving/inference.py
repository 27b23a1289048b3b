"""Predict any number of images with a trained run, a batch at a time."""

import csv
import io
import itertools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..config import Config
from ..data.blocks import normalization, pick_device, prediction_batch_size
from ..data.dataset import Progress, list_folder, no_progress
from ..data.pixels import Picture, decode_ahead, stack
from ..errors import BloodcellError, usage_error
from ..files import atomic_path
from ..processes import Share, agree, gather, rank, wait_for_all, world_size
from ..training.calibration import Calibration, Reference, softmax
from ..training.callbacks import autocast
from ..training.learner import TimmModel, classifier_inputs, load_model, load_weights
from ..training.runs import Run

UNCERTAIN, UNLIKE, NO_CELL = "uncertain", "unlike training", "no cell"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Batch:
    """Predictions of some images and the files among them that cannot be read.

    Attributes:
        table: see :meth:`Predictor.__call__`.
        unreadable: paths.
        features: penultimate features of the table's images, float32 (n, d) on the CPU.
    """

    table: pd.DataFrame
    unreadable: list[str]
    features: torch.Tensor


class Predictor:
    """A run's best model, ready to predict.

    Args:
        model: the timm model, with its weights.
        config: of the run.
        calibration: of the run; None leaves the probabilities as they are.
        reference: training images to compare with; None: no image is called unlike them.
        tta: average over the eight ways to turn and mirror an image, at eight times the cost.
        min_confidence: below it an image is flagged as uncertain, 0 to 1.
        device: torch device.

    Examples:
        >>> from bloodcell_fastai import Predictor, Run
        >>> predictor = Predictor.load("mine", min_confidence=0.5)
        >>> table = predictor(Run.open("mine").table.path[:2])
        >>> list(table.columns)[:5]
        ['path', 'predicted', 'confidence', 'flag', 'p_EOSINOPHIL']
        >>> probabilities = table.filter(like="p_").sum(axis=1)
        >>> probabilities.round(6).tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        model: TimmModel,
        config: Config,
        calibration: Calibration | None = None,
        reference: Reference | None = None,
        tta: bool = False,
        min_confidence: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).eval()
        self.config, self.calibration, self.reference = config, calibration, reference
        self.distance_threshold: float | None = None
        if calibration is not None and reference is not None:
            self.distance_threshold = calibration.distance_threshold
        self.tta, self.min_confidence = tta, min_confidence
        self.batch_size = prediction_batch_size(self.device, config.size)
        stats = normalization(config.arch)
        self._mean, self._std = stats.mean.to(self.device), stats.std.to(self.device)

    @property
    def columns(self) -> list[str]:
        """Of the tables it makes."""
        return list(self.table([], *self._nothing()))

    @classmethod
    def load(
        cls,
        run: Run | str | Path,
        tta: bool = False,
        min_confidence: float = 0.0,
        device: str = "auto",
    ) -> "Predictor":
        """The predictor of a run, given as such or by its folder or name; ``pbc`` is the model
        that comes with the package. Of a cross-validation it is an :class:`Ensemble`.

        Raises:
            BloodcellError: there is no such run, it has no model yet, or its files do not fit
                together; ``min_confidence`` is not between 0 and 1.
        """
        if not 0 <= min_confidence <= 1:
            raise usage_error(
                f"min_confidence is {min_confidence}.", "Give --min-confidence from 0 to 1."
            )
        run = run if isinstance(run, Run) else Run.open(run)
        config = run.config
        if config.folds:
            return Ensemble([cls.load(f, tta, min_confidence, device) for f in _folds(run)])
        run.require_model()
        model, _ = load_model(config.arch, len(config.classes), config.size, "none")
        load_weights(model, run.path / "model.safetensors", config.classes)
        return cls(
            model,
            config,
            run.calibration,
            run.reference,
            tta,
            min_confidence,
            pick_device(device),
        )

    def __call__(self, paths: Sequence[str | Path]) -> pd.DataFrame:
        """Predict images, which become the pictures the model was validated on.

        Args:
            paths: image files.

        Returns:
            One row per image, in order, with ``path``, ``predicted``, ``confidence``, ``flag``
            (empty, ``uncertain``, ``unlike training`` or ``no cell``), ``p_<CLASS>`` (calibrated
            probabilities, 0 to 1) and, where the run has a reference, ``distance`` to the
            training images and ``nearest``, the path of the nearest one.

        Raises:
            BloodcellError: an image cannot be read.
        """
        batches = list(self.stream(paths))
        if unreadable := [path for batch in batches for path in batch.unreadable]:
            raise BloodcellError(
                f"{len(unreadable)} of the images cannot be read, such as {unreadable[0]}.",
                "Leave them out, or use Predictor.stream, which passes over them.",
            )
        tables = [batch.table for batch in batches] or [self.table([], *self._nothing())]
        return pd.concat(tables, ignore_index=True)

    def stream(self, paths: Iterable[str | Path]) -> Iterator[Batch]:
        """Predict images a batch at a time, while the next ones are being decoded.

        Args:
            paths: image files; drawn from as they are needed.

        Yields:
            The predictions of each batch, in order, and its unreadable files.
        """
        names = map(str, paths)
        chunks = iter(lambda: list(itertools.islice(names, self.batch_size)), [])
        for chunk, images in decode_ahead(chunks, self.config.size, self.config.crop):
            pairs = list(zip(chunk, images, strict=True))
            unreadable = [path for path, image in pairs if isinstance(image, OSError)]
            readable = [path for path, image in pairs if isinstance(image, Picture)]
            pictures = [image for image in images if isinstance(image, Picture)]
            found = self.probabilities(stack(readable, pictures)) if pictures else self._nothing()
            has_cell = np.array([picture.has_cell for picture in pictures], dtype=bool)
            yield Batch(self.table(readable, *found, has_cell), unreadable, found[1])

    def probabilities(self, images: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """Predict pictures that are decoded already.

        Args:
            images: uint8 (n, 3, size, size), RGB.

        Returns:
            Calibrated probabilities, float64 (n, classes), and penultimate features, float32
            (n, d) on the CPU.

        Raises:
            BloodcellError: there is no memory for a single image.
        """
        views = [_view(images, number) for number in range(8 if self.tta else 1)]
        results = [self._forward(view) for view in views]
        temperature = self.calibration.temperature if self.calibration else 1.0
        shares = [softmax(logits, temperature) for logits, _ in results]
        return np.mean(shares, axis=0), torch.stack([features for _, features in results]).mean(0)

    def nearest(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """How far images are from the training images, float (n,) from 0 to 2, and the path of
        the nearest one of each. Only with a reference."""
        assert self.reference is not None
        distances, rows = self.reference.nearest(features)
        return distances, self.reference.table.path.to_numpy()[rows]

    def table(
        self,
        paths: Sequence[str],
        probabilities: np.ndarray,
        features: torch.Tensor,
        has_cell: np.ndarray | bool = True,
    ) -> pd.DataFrame:
        """The table of :meth:`__call__` from what :meth:`probabilities` returns, and whether a
        white cell was found in each image, bool (n,)."""
        classes = self.config.classes
        confidence = probabilities.max(axis=1)
        flag = np.where(confidence < self.min_confidence, UNCERTAIN, "").astype(object)
        seen = {}
        if self.distance_threshold is not None:
            distance, nearest = self.nearest(features)
            flag[distance > self.distance_threshold] = UNLIKE
            seen = {"distance": distance, "nearest": nearest}
        flag[~np.broadcast_to(has_cell, flag.shape)] = NO_CELL
        columns = {
            "path": list(paths),
            "predicted": np.array(classes)[probabilities.argmax(axis=1)],
            "confidence": confidence,
            "flag": flag,
        }
        columns |= {f"p_{name}": probabilities[:, i] for i, name in enumerate(classes)}
        return pd.DataFrame(columns | seen)

    def _forward(self, images: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """Logits and features of a batch; in halves, and from now on so, if memory is short."""
        results = []
        for part in images.split(self.batch_size):
            try:
                results.append(self._logits(part))
            except RuntimeError as error:
                if not any(words in str(error).lower() for words in OUT_OF_MEMORY):
                    raise
                self._halve(len(part))
                results.append(self._forward(part))
        logits, features = zip(*results, strict=True)
        return np.concatenate(logits), torch.cat(features)

    @torch.inference_mode()
    def _logits(self, images: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        x = images.to(self.device, non_blocking=True).float().div_(255)
        x = x.sub_(self._mean).div_(self._std)
        with autocast(self.device), classifier_inputs(self.model) as inputs:
            logits = self.model(x)
        return logits.double().cpu().numpy(), inputs.take()

    def _halve(self, n: int) -> None:
        if n == 1:
            raise BloodcellError(
                f"There is no memory on {self.device} for one image of {self.config.size} px.",
                "Close other programs, or use --device cpu.",
            )
        self.batch_size = n // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"Memory is short: going on with {self.batch_size} images at a time.", stacklevel=2
        )

    def _nothing(self) -> tuple[np.ndarray, torch.Tensor]:
        """Probabilities and features of no image."""
        width = self.reference.features.shape[1] if self.reference is not None else 0
        return np.empty((0, len(self.config.classes))), torch.empty(0, width)


class Ensemble(Predictor):
    """The models of a cross-validation, asked together.

    Probabilities are the mean of the calibrated ones of the models (a deep ensemble,
    Lakshminarayanan et al. 2017). ``distance`` is the mean of their distances, and an image is
    unlike training where it is above the mean of their thresholds; ``nearest`` is what the
    model finds that has it nearest.

    Args:
        members: predictors of models that take the same pictures and know the same classes.
    """

    def __init__(self, members: Sequence[Predictor]):
        first, limits = members[0], [member.distance_threshold for member in members]
        thresholds = [limit for limit in limits if limit is not None]
        self.members, self.config = list(members), first.config
        self.min_confidence, self.batch_size = first.min_confidence, first.batch_size
        self.distance_threshold = None
        if len(thresholds) == len(members):
            self.distance_threshold = float(np.mean(thresholds))

    def probabilities(self, images: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """As of a single model; the features of the models stand beside one another."""
        return self._join([member.probabilities(images) for member in self.members])

    def nearest(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The mean of the models' distances, and the path of the nearest image to any."""
        parts = features.tensor_split(len(self.members), dim=1)
        found = [member.nearest(part) for member, part in zip(self.members, parts, strict=True)]
        distances, paths = (np.stack(values) for values in zip(*found, strict=True))
        return distances.mean(axis=0), paths[distances.argmin(axis=0), np.arange(len(features))]

    def _nothing(self) -> tuple[np.ndarray, torch.Tensor]:
        return self._join([member._nothing() for member in self.members])

    @staticmethod
    def _join(
        results: Sequence[tuple[np.ndarray, torch.Tensor]],
    ) -> tuple[np.ndarray, torch.Tensor]:
        shares, features = zip(*results, strict=True)
        return np.mean(shares, axis=0), torch.cat(features, dim=1)


def _folds(run: Run) -> list[Run]:
    """The runs of a cross-validation.

    Raises:
        BloodcellError: one is not trained to its end, or they are not of one kind.
    """
    folds = [run.fold(number) for number in range(1, run.config.folds + 1)]
    if left := [fold.name for fold in folds if not (fold.started and fold.finished)]:
        raise BloodcellError(
            f"Run {run.name} is not trained to its end: {left[0]} is missing.",
            f"Go on with it: {run.resume_command}",
        )
    kinds = {(c.arch, c.size, c.crop, c.classes) for c in (fold.config for fold in folds)}
    if len(kinds) > 1:
        raise BloodcellError(
            f"The folds of run {run.name} are models of different kinds.", "Was a config edited?"
        )
    return folds


def find_images(sources: Iterable[str | Path], listed: Iterable[str] = ()) -> Iterator[str]:
    """The image files that the words of a command line mean.

    Args:
        sources: files, folders, patterns such as ``cells/*.png``, text files (``.txt``) with a
            path in each line, or ``-`` for ``listed``.
        listed: lines with a path each, such as standard input.

    Raises:
        BloodcellError: a source does not exist, or a pattern matches nothing.
    """
    for source in map(str, sources):
        if source == "-":
            if world_size() > 1:
                raise usage_error(
                    "Several processes cannot share the lines of standard input.",
                    "Write them to a file and name that: paths.txt",
                )
            yield from _lines(listed)
        elif os.path.isdir(source):  # noqa: PTH112 of names of any length, unlike Path.is_dir
            yield from map(str, list_folder(Path(source)))
        elif source.lower().endswith(".txt") and os.path.isfile(source):  # noqa: PTH113
            with _open(Path(source), "r") as lines:
                yield from _lines(lines)
        elif os.path.exists(source):  # noqa: PTH110
            yield source
        elif matches := _matching(source):
            yield from find_images(matches)
        else:
            raise BloodcellError(f"No file or folder {source}.", "Check the path.")


class PredictionFile:
    """A CSV or JSON Lines file that grows by a batch at a time.

    Args:
        path: ends in ``.csv`` or ``.jsonl``.
        columns: of the tables to come.
        resume: keep the rows that are there, except a last one that was cut short.

    Attributes:
        done: the paths that are in it already.

    Raises:
        BloodcellError: another suffix, or the rows that are there have other columns.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], resume: bool = False):
        self.path, self.columns = Path(path), list(columns)
        if self.path.suffix not in (".csv", ".jsonl"):
            raise usage_error(f"Cannot write {path}.", "Use a name that ends in .csv or .jsonl.")
        rows = self._read(self.path) if resume and self.path.exists() else []
        self.done = {row["path"] for row in rows}
        with atomic_path(self.path) as temporary, _open(temporary, "w") as file:
            file.write(self._format(rows, header=True))

    def append(self, table: pd.DataFrame) -> None:
        """Add the rows of a table."""
        with _open(self.path, "a") as file:
            file.write(self._format(table.to_dict("records")))

    def join(self, parts: Sequence[Path]) -> None:
        """Add the rows of other files of the kind and remove those files. An image that is in
        here already is passed over, so that a join that was cut off can be repeated."""
        for part in parts:
            rows = self._read(part)
            with _open(self.path, "a") as file:
                file.write(self._format([row for row in rows if row["path"] not in self.done]))
            self.done |= {row["path"] for row in rows}
            part.unlink()

    def _format(self, rows: Sequence[dict], header: bool = False) -> str:
        if self.path.suffix == ".jsonl":
            return "".join(json.dumps(row) + "\n" for row in rows)
        lines = [self.columns] if header else []
        lines += [[row[name] for name in self.columns] for row in rows]
        return "".join(map(_csv_line, lines))

    def _read(self, path: Path) -> list[dict]:
        with _open(path, "r") as file:
            text = file.read()
        parse = _parse_jsonl if path.suffix == ".jsonl" else _parse_csv
        try:
            rows = parse(text[: text.rfind("\n") + 1], self.columns)
        except (ValueError, RecursionError, csv.Error):
            rows = None
        if rows is None or any(list(row) != self.columns for row in rows):
            raise BloodcellError(
                f"{path} holds predictions of another kind.",
                "Give another --out, or leave out --resume to replace it.",
            )
        return rows


@dataclass(frozen=True)
class Outcome:
    """What came of predicting many images.

    Attributes:
        n_images: how many were predicted now.
        classes: images by predicted class.
        flags: images by flag, without those that have none.
        unreadable: paths of the files that could not be read.
        table: all predictions; None where they went to a file.
        already_done: images that the file held before.
    """

    n_images: int
    classes: dict[str, int]
    flags: dict[str, int]
    unreadable: list[str]
    table: pd.DataFrame | None
    already_done: int = 0


def predict(
    predictor: Predictor,
    paths: Iterable[str],
    out: Path | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Predict images and count; the rows go to ``out`` as they come, if it is given.

    Args:
        predictor: of a run.
        paths: see :func:`find_images`.
        out: a ``.csv`` or ``.jsonl`` file. Several processes that were joined need one.
        resume: go on with ``out``: its images are not predicted again.
        progress: told how far it has come.

    Raises:
        BloodcellError: there is no readable image, or ``out`` cannot be written.
    """
    paths = list(dict.fromkeys(paths))  # a pattern may name a folder and what it holds
    if world_size() == 1:
        writer = PredictionFile(out, predictor.columns, resume) if out else None
        outcome = _predict(predictor, paths, writer, progress)
    else:
        outcome = _predict_together(predictor, paths, out, resume, progress)
    if not outcome.n_images + outcome.already_done:
        raise BloodcellError("There is no readable image.", "Give image files or folders.")
    return outcome


def _predict(
    predictor: Predictor, paths: list[str], writer: PredictionFile | None, progress: Progress
) -> Outcome:
    left = [path for path in paths if path not in writer.done] if writer else paths
    classes: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    unreadable: list[str] = []
    tables, seen = [predictor.table([], *predictor._nothing())], 0
    for batch in predictor.stream(left):
        writer.append(batch.table) if writer else tables.append(batch.table)
        classes.update(batch.table.predicted)
        flags.update(batch.table.flag[batch.table.flag != ""])
        unreadable += batch.unreadable
        seen += len(batch.table) + len(batch.unreadable)
        progress("Predicting", seen, len(left))
    # The empty table has no types; it is for want of another.
    table = None if writer else pd.concat(tables[1:] or tables, ignore_index=True)
    n_images = len(left) - len(unreadable)
    return Outcome(n_images, classes, flags, unreadable, table, len(paths) - len(left))


def _predict_together(
    predictor: Predictor, paths: list[str], out: Path | None, resume: bool, progress: Progress
) -> Outcome:
    """Predict in all processes, each its part of the images into a file of its own beside
    ``out``; the first joins them. What a cut-off prediction left, of however many processes, is
    joined before."""
    if out is None:
        raise usage_error("Several processes need a file to write.", "Give --out FILE.csv")
    paths = agree(lambda: paths)  # of a folder that is still growing, too
    columns, share = predictor.columns, Share(rank(), world_size())
    done = set(agree(lambda: _begin_together(out, columns, resume)))
    left = [path for path in paths if path not in done]
    part = PredictionFile(_part_file(out, share), columns)
    outcomes = gather(_predict(predictor, list(share.of(left)), part, progress))
    if share.rank == 0:
        PredictionFile(out, columns, resume=True).join(_part_files(out))
    wait_for_all()
    return Outcome(
        sum(outcome.n_images for outcome in outcomes),
        sum((Counter(outcome.classes) for outcome in outcomes), Counter()),
        sum((Counter(outcome.flags) for outcome in outcomes), Counter()),
        [path for outcome in outcomes for path in outcome.unreadable],
        None,
        len(paths) - len(left),
    )


def _begin_together(out: Path, columns: Sequence[str], resume: bool) -> set[str]:
    """Make or take up ``out``; the paths that are done."""
    file = PredictionFile(out, columns, resume)
    if not resume:
        for path in _part_files(out):
            path.unlink()
    file.join(_part_files(out))
    return file.done


def _part_file(out: Path, share: Share) -> Path:
    return out.with_name(f"{out.stem}.part-{share.rank + 1:04}-of-{share.world:04}{out.suffix}")


def _part_files(out: Path) -> list[Path]:
    """The files of parts that lie beside ``out``, in the order of the ranks; of no other kind, for
    they are removed."""
    name = re.compile(rf"{re.escape(out.stem)}\.part-\d{{4,}}-of-\d{{4,}}{re.escape(out.suffix)}")
    return sorted(path for path in out.parent.iterdir() if name.fullmatch(path.name))


def _view(images: torch.Tensor, number: int) -> torch.Tensor:
    """One of the eight ways to turn and mirror square pictures; 0 leaves them as they are."""
    return (images.flip(-1) if number >= 4 else images).rot90(number % 4, (-2, -1))


def _csv_line(values: Sequence, quote_all: bool = False) -> str:
    buffer = io.StringIO()
    writer = csv.writer(
        buffer, lineterminator="\n", quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    )
    writer.writerow(values)
    line = buffer.getvalue()
    if "\r" in line and not quote_all:  # in a name; unquoted it ends the row
        return _csv_line(values, quote_all=True)
    return line


def _parse_jsonl(text: str, columns: list[str]) -> list[dict]:
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    if not all(isinstance(row, dict) and isinstance(row.get("path"), str) for row in rows):
        raise ValueError("not a table")
    return rows


def _parse_csv(text: str, columns: list[str]) -> list[dict]:
    """The rows, without a last one that was cut off at a line break inside quotes."""
    lines: list[list[str]] = []
    try:
        lines.extend(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        if "unexpected end of data" not in str(error):
            raise
    if lines and lines[0] != columns:
        raise ValueError("other columns")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def _matching(pattern: str) -> list[str]:
    """Sorted paths that match. ``**`` follows no links to folders, which may lead in a circle."""
    path = Path(pattern)
    try:
        found = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except (ValueError, NotImplementedError, OSError):  # not a pattern, or too long for a name
        return []
    return sorted(str(match) for match in found if not match.name.startswith("."))


def _lines(lines: Iterable[str]) -> Iterator[str]:
    return (path for line in lines if (path := line.rstrip("\r\n")))


def _open(path: Path, mode: str):
    """Text that may hold names of files in any encoding."""
    return path.open(mode, encoding="utf-8", errors="surrogateescape", newline="")
