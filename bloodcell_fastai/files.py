"""Files: written so that a kill at any moment leaves the previous good one, read with suspicion."""

import codecs
import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BloodcellError

if TYPE_CHECKING:
    import pandas as pd

UNFINISHED = ".tmp-"  # how the name of everything begins that is not complete


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to beside ``path``; it is renamed to ``path`` if the block succeeds.

    The rename replaces what was there in one step, so that a reader sees the old file or the
    new one and never half of either. The temporary file keeps the suffix of ``path``, which
    matplotlib and OpenCV choose their format by.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=UNFINISHED, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp made it private
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where it is
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``; it is renamed to ``path`` if the block succeeds.

    Raises:
        FileExistsError: ``path`` is already there.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def sole_writer(folder: Path, timeout: float = -1) -> Iterator[None]:
    """Hold ``folder`` against other processes that call this, and remove what a killed one left
    unfinished directly in it.

    The operating system frees the lock when its holder ends, however it ends: none is ever stale.

    Args:
        folder: made if it is not there.
        timeout: seconds to wait for another process; -1: as long as it takes.

    Raises:
        TimeoutError: another process still holds it.
    """
    from filelock import FileLock  # every command imports this module, and few need a lock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", timeout=timeout):
        remove_unfinished(folder)
        yield


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left of :func:`atomic_path` and :func:`atomic_folder`."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically; names of files may be in any encoding."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write a table to ``path`` as CSV, atomically."""
    text = table.to_csv(index=False)
    if "\r" in text:  # in the name of a file; unquoted it would end the row
        text = table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
    write_text(path, text)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically. NaN is refused, not written."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, hint: str = "Was it edited?") -> dict:
    """The table of values a JSON file holds.

    Raises:
        BloodcellError: the file is missing, is no JSON, or holds something else than a table.
    """
    try:
        values = json.loads(_read_bytes(path, hint))
    except (ValueError, RecursionError) as error:
        raise BloodcellError(f"{path} is not JSON: {error}.", hint) from None
    if not isinstance(values, dict):
        raise BloodcellError(f"{path} holds no table of values.", hint)
    return values


def read_table(
    path: Path, columns: Sequence[str], numbers: Sequence[str] = (), hint: str = "Was it edited?"
) -> "pd.DataFrame":
    """The table of a CSV file, all of it text but the columns ``numbers``.

    Raises:
        BloodcellError: the file is missing or no CSV; a column of ``columns`` or ``numbers`` is
            missing, a row too short or too long, a number none.
    """
    import pandas as pd

    content = _read_bytes(path, hint)
    if b"\0" in content:  # which no name can hold
        raise BloodcellError(f"{path} is not a CSV table: it holds zero bytes.", hint)
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    try:
        header, *rows = filter(None, csv.reader(io.StringIO(text, newline=""), strict=True))
    except (csv.Error, ValueError) as error:
        raise BloodcellError(f"{path} is not a CSV table: {error}.", hint) from None
    for name in (*columns, *numbers):
        if header.count(name) != 1:
            raise BloodcellError(f"{path} has {header.count(name)} columns {name}.", hint)
    if any(len(row) != len(header) for row in rows):
        raise BloodcellError(f"{path} has rows of another length than its header.", hint)
    table = pd.DataFrame(rows, columns=header, dtype=str)
    for name in numbers:
        try:
            table[name] = pd.to_numeric(table[name])
            is_number = table[name].dtype.kind in "if" or table.empty
        except (ValueError, TypeError, OverflowError):
            is_number = False
        if not is_number:
            raise BloodcellError(f"{path}: a value of {name} is no number.", hint)
    return table


def _read_bytes(path: Path, hint: str) -> bytes:
    path = Path(path)
    if not path.is_file():
        raise BloodcellError(f"{path} is missing.", hint)
    return path.read_bytes()


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
