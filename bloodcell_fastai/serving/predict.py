"""Predict any number of images, into a file that grows a batch at a time."""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..data.images import list_images
from ..distributed import agree, lost_peers_explained, rank, wait_for_all, world_size
from ..errors import DataError, MissingFileError, UsageError
from ..files import atomic_path, csv_text, decode_text, parse_csv, spellings
from ..model.inference import Predictor
from ..reporter import Progress, no_progress


def find_images(
    sources: Iterable[str | Path], listed: Iterable[str] | Iterable[bytes] = ()
) -> Iterator[str]:
    """The image files that the words of a command line mean.

    Args:
        sources: files, folders, patterns such as ``cells/*.png``, text files (``.txt``) with a
            path in each line, or ``-`` for ``listed``. Paths in a text file are relative to the
            working folder, or else to the folder of the file or the one above.
        listed: lines with a path each, such as standard input, as text or as bytes.

    Raises:
        BloodcellError: a source does not exist, or a pattern matches nothing.
    """
    for source in map(str, sources):
        if source == "-":
            if world_size() > 1:
                raise UsageError(
                    "Standard input cannot be read by several processes.",
                    "Write them to a file and name that: paths.txt",
                )
            lines = (os.fsencode(line) for line in listed)
            yield from _listed(b"".join(lines), [""])
        elif os.path.isdir(source):  # noqa: PTH112 of names of any length, unlike Path.is_dir
            yield from map(str, list_images(Path(source)))
        elif source.lower().endswith(".txt") and os.path.isfile(source):  # noqa: PTH113
            folder = Path(source).absolute().parent
            yield from _listed(Path(source).read_bytes(), ["", str(folder), str(folder.parent)])
        elif os.path.exists(source):  # noqa: PTH110
            yield source
        elif matches := _matching(source):
            yield from find_images(matches)
        else:
            raise MissingFileError(f"No file or folder {source}.", "Check the path.")


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
            raise UsageError(f"Cannot write {path}.", "Use a name that ends in .csv or .jsonl.")
        kept = pd.DataFrame(columns=self.columns)
        if resume and self.path.exists():
            kept = self._read(self.path)
        self.done = set(kept.path)
        with atomic_path(self.path) as temporary, _open(temporary, "w") as file:
            file.write(self._format(kept, header=True))

    def append(self, table: pd.DataFrame) -> None:
        """Add the rows of a table."""
        with _open(self.path, "a") as file:
            file.write(self._format(table))

    def join(self, shards: Sequence[Path]) -> None:
        """Add the rows of other files of the kind and remove those files. An image that is in
        here already is passed over, so that a join that was cut off can be repeated."""
        for shard in shards:
            table = self._read(shard)
            self.append(table[~table.path.isin(self.done)])
            self.done |= set(table.path)
            shard.unlink()

    def _format(self, table: pd.DataFrame, header: bool = False) -> str:
        if self.path.suffix == ".csv":
            return csv_text(table, header)
        return "".join(json.dumps(row) + "\n" for row in table.to_dict("records"))

    def _read(self, path: Path) -> pd.DataFrame:
        """The rows of a file, as they are written, without a last one that was cut short."""
        content = path.read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        try:
            if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in content.splitlines()]
                if all(
                    isinstance(row, dict)
                    and list(row) == self.columns
                    and isinstance(row["path"], str)
                    for row in rows
                ):
                    return pd.DataFrame(rows, columns=self.columns)
            else:  # text, so that numbers are written back as they were
                while content.count(b'"') % 2:  # cut off at a line break inside quotes
                    content = content[: content.rfind(b"\n", 0, -1) + 1]
                table = parse_csv(content) if content else pd.DataFrame(columns=self.columns)
                if list(table) == self.columns:
                    return table
        except (ValueError, RecursionError, csv.Error):
            pass
        raise DataError(
            f"{path} holds predictions of another kind.",
            "Give another `out`, or leave out `resume` to replace it.",
        )


@dataclass
class Outcome:
    """What came of predicting many images.

    Attributes:
        classes: images predicted now, by class.
        flags: images by flag, without those that have none.
        unreadable: the reason for each path that could not be read.
        table: all predictions; None where they went to a file.
        already_done: images that the file held before.
    """

    classes: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    table: pd.DataFrame | None = None
    already_done: int = 0

    @property
    def n_images(self) -> int:
        """How many were predicted now."""
        return self.classes.total()

    def __str__(self) -> str:
        found = ", ".join(f"{name} {n:,}" for name, n in sorted(self.classes.items()))
        flagged = ", ".join(f"{n:,} {name}" for name, n in sorted(self.flags.items()))
        return (
            f"{self.n_images:,} images predicted"
            + (f": {found}" if found else "")
            + (f"; flagged: {flagged}" if flagged else "")
            + (f"; {self.already_done:,} were there already" if self.already_done else "")
        )


def predict(
    predictor: Predictor,
    paths: Iterable[str],
    out: Path | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Predict images and count; the rows go to ``out`` as they come, if it is given.

    Of several processes that were joined each predicts its shard of the images into a file beside
    ``out``, which they need, and the first adds these to it in order.

    Args:
        predictor: of a run.
        paths: of images, such as those of :func:`find_images`.
        out: a ``.csv`` or ``.jsonl`` file.
        resume: continue ``out``: its images are not predicted again.
        progress: told how far it has come.

    Raises:
        BloodcellError: there is no readable image, or ``out`` cannot be written.
    """
    paths = list(dict.fromkeys(paths))  # a pattern may name a folder and what it holds
    file = agree(lambda: _begin(out, predictor.columns, resume)) if out else None
    left = [path for path in paths if path not in file.done] if file else paths
    if world_size() == 1:
        outcome = _predict(predictor, left, file, progress)
    elif file:
        outcome = _predict_shards(predictor, left, file, progress)
    else:
        raise UsageError("Several processes need a file to write.", "Give `out`.")
    outcome.already_done = len(paths) - len(left)
    if not outcome.n_images and not outcome.already_done:
        raise DataError("There is no readable image.", "Give image files or folders.")
    return outcome


def _predict(
    predictor: Predictor, paths: list[str], file: PredictionFile | None, progress: Progress
) -> Outcome:
    outcome, tables = Outcome(), []
    for batch in predictor.stream(paths):
        file.append(batch.table) if file else tables.append(batch.table)
        outcome.classes.update(batch.table.predicted)
        outcome.flags.update(filter(None, batch.table.flag))
        outcome.unreadable |= batch.pictures.unreadable
        progress("Predicting", outcome.n_images + len(outcome.unreadable), len(paths))
    if file is None:
        outcome.table = pd.concat(tables or [predictor([])], ignore_index=True)
    return outcome


def _predict_shards(
    predictor: Predictor, paths: list[str], file: PredictionFile, progress: Progress
) -> Outcome:
    """Predict in all processes, each into a file of its own, which the first one joins."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    name = f"{file.path.stem}.part-{rank() + 1:04}-of-{world_size():04}{file.path.suffix}"
    with (
        lost_peers_explained("Start the same command again with `resume`."),
        PartialState().split_between_processes(paths) as own,
    ):
        shard = PredictionFile(file.path.with_name(name), predictor.columns)
        outcomes = gather_object([_predict(predictor, own, shard, progress)])
        if rank() == 0:
            file.join(_shards(file.path))
        wait_for_all()
    total = Outcome()
    for outcome in outcomes:
        total.classes += outcome.classes
        total.flags += outcome.flags
        total.unreadable |= outcome.unreadable
    return total


def _begin(out: Path, columns: Sequence[str], resume: bool) -> PredictionFile:
    """Make ``out``, or continue it with the shards that were left."""
    file = PredictionFile(out, columns, resume)
    if resume:
        file.join(_shards(out))
    for shard in _shards(out):
        shard.unlink()
    return file


def _shards(out: Path) -> list[Path]:
    """The files of shards beside ``out``, in the order of the ranks; of no other kind, for they
    are removed."""
    name = re.compile(rf"{re.escape(out.stem)}\.part-\d{{4,}}-of-\d{{4,}}{re.escape(out.suffix)}")
    return sorted(path for path in out.parent.iterdir() if name.fullmatch(path.name))


def _matching(pattern: str) -> list[str]:
    """Sorted paths that match. ``**`` follows no links to folders, which may lead in a circle."""
    path = Path(pattern)
    try:
        found = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except (ValueError, NotImplementedError, OSError):  # not a pattern, or too long for a name
        return []
    return sorted(str(match) for match in found if not match.name.startswith("."))


def _listed(content: bytes, folders: Sequence[str]) -> Iterator[str]:
    """The paths in a list: the first reading of each line that is there below one of the folders;
    the line itself, without what is around the path, where none is."""
    for line in re.split("[\r\n]", decode_text(content)):
        names = spellings(line)
        if plain := names[-1]:
            readings = (os.path.join(folder, name) for folder in folders for name in names)  # noqa: PTH118
            yield next(filter(os.path.exists, readings), plain)


def _open(path: Path, mode: str):
    """Text that may hold names of files in any encoding."""
    return path.open(mode, encoding="utf-8", errors="surrogateescape", newline="")
