"""Files: written atomically, read with validation."""

import codecs
import csv
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import DataError, MissingFileError

if TYPE_CHECKING:
    import pandas as pd
    from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound="BaseModel")

LOCK = ".bloodcell.lock"
UNFINISHED = ".tmp-"  # how the name of everything begins that is not complete


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to beside ``path``, of the same suffix; it is renamed to ``path`` if
    the block succeeds, so that a reader sees the old file or the new one, never half of either."""
    with _beside(path) as temporary:
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``; it is renamed to ``path`` if the block succeeds.

    Raises:
        FileExistsError: ``path`` is already there.
    """
    if path.exists():
        raise FileExistsError(path)
    with _beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        temporary.rename(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a new path beside ``path``, and remove what is left of it; errors name ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Files of ``tempfile`` would be private to the user.
    temporary = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}{path.suffix}")
    try:
        try:
            yield temporary
        finally:
            _remove(temporary)
    except OSError as error:
        # A full disk does not say where it is, and that name tells a user nothing. An error without
        # a number is nothing but its text, which a name would replace.
        if error.errno and str(error.filename or temporary) == str(temporary):
            error.filename = str(path)
        raise


@contextmanager
def sole_writer(folder: Path, timeout: float = -1) -> Iterator[None]:
    """Hold ``folder`` against other processes that call this, and remove what a killed one left
    unfinished directly in it. No lock is ever stale: it ends with the process that holds it.

    Args:
        folder: made if it is not there.
        timeout: seconds to wait for another process; -1: as long as it takes.

    Raises:
        TimeoutError: another process still holds it.
    """
    from filelock import FileLock  # every command imports this module, and few need a lock

    folder.mkdir(parents=True, exist_ok=True)
    # Who may write to the folder may lock it, whatever the umask of who came first.
    mode = folder.stat().st_mode & 0o666 | 0o600
    with FileLock(folder / LOCK, timeout=timeout, mode=mode):
        remove_unfinished(folder)
        yield


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left of :func:`atomic_path` and :func:`atomic_folder`."""
    for path in folder.glob(f"{UNFINISHED}*"):
        _remove(path)


def _remove(path: Path) -> None:
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
    write_text(path, csv_text(table))


def csv_text(table: "pd.DataFrame", header: bool = True) -> str:
    """A table as CSV, which :func:`parse_csv` reads."""
    text = table.to_csv(index=False, header=header)
    if "\r" in text:  # in the name of a file; unquoted it would end the row
        text = table.to_csv(index=False, header=header, quoting=csv.QUOTE_NONNUMERIC)
    return text


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
        raise DataError(f"{path} is not JSON: {error}.", hint) from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object.", hint)
    return values


def read_model(path: Path, model: type[Model], hint: str = "Was it edited?") -> Model:
    """The JSON file ``path`` as a pydantic model.

    Raises:
        BloodcellError: the file is missing, is no JSON, or a value is not what the model says;
            the message names the first one.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(read_json(path, hint))
    except ValidationError as error:
        raise DataError(f"{path}: {describe_invalid(error)}.", hint) from None


def describe_invalid(error: "ValidationError") -> str:
    """The first fault that pydantic found: the field, what it is, what it should be."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "it"
    if first["type"] in ("missing", "extra_forbidden"):
        return f"{field[:100]}: {first['msg'].lower()}"
    return f"{field[:100]} is {repr(first['input'])[:60]}: {first['msg'].lower()}"


def read_table(
    path: Path, columns: Sequence[str], numbers: Sequence[str] = (), hint: str = "Was it edited?"
) -> "pd.DataFrame":
    """The table of a CSV file, all of it text but the columns ``numbers``.

    Raises:
        BloodcellError: the file is missing or no CSV; a column of ``columns`` or ``numbers`` is
            missing, a row too short or too long, a number none.
    """
    import pandas as pd

    try:
        table = parse_csv(_read_bytes(path, hint))
    except (csv.Error, ValueError) as error:
        raise DataError(f"{path} is not a CSV table: {error}.", hint) from None
    require_columns(path, table, (*columns, *numbers), hint)
    for name in numbers:
        with suppress(ValueError, TypeError, OverflowError):
            table[name] = pd.to_numeric(table[name])
        if table[name].dtype.kind not in "if" and not table.empty:
            raise DataError(f"{path}: a value of {name} is no number.", hint)
    return table


def require_columns(path: Path, table: "pd.DataFrame", columns: Sequence[str], hint: str) -> None:
    """Refuse a table that has not each of the columns, and once.

    Raises:
        BloodcellError: it is of the file ``path``, and has not.
    """
    for name in columns:
        if (found := list(table).count(name)) != 1:
            raise DataError(f"{path} has {found} columns {name}.", hint)


def parse_csv(content: bytes) -> "pd.DataFrame":
    """The rows of a CSV table, all of it text; names of files in it may be in any encoding.

    Raises:
        ValueError, csv.Error: it is none, or a row is too short or too long.
    """
    import pandas as pd

    if "\0" in (text := decode_text(content)):  # which no name can hold
        raise ValueError("it holds zero bytes")
    header, *rows = filter(None, csv.reader(io.StringIO(text, newline=""), strict=True))
    if any(len(row) != len(header) for row in rows):
        raise ValueError("it has rows of another length than its header")
    return pd.DataFrame(rows, columns=header, dtype=str)


def decode_text(content: bytes) -> str:
    """Text of any program, without a byte order mark: UTF-8, or UTF-16 with that mark, as Windows
    PowerShell writes it. Names of files in it may be in any encoding."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        with suppress(UnicodeDecodeError):
            return content.decode("utf-16")
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def spellings(listed: str) -> list[str]:
    """What a path in a list may mean that another program made, or a person: the path as it is
    written, without blanks and quotes around it, and with slashes for backslashes."""
    plain = listed.strip()
    if len(plain) > 1 and plain[0] == plain[-1] and plain[0] in "\"'":
        plain = plain[1:-1]
    return list(dict.fromkeys((listed, plain, plain.replace("\\", "/"))))


def user_home() -> Path:
    """The user's home; where the system knows of none, a folder among the temporary files."""
    try:
        return Path.home()
    except RuntimeError:  # no $HOME, and a user without an entry in the system's table
        user = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir(), f"bloodcell_fastai-{user}")


def _read_bytes(path: Path, hint: str) -> bytes:
    if not path.is_file():
        raise MissingFileError(f"{path} is missing.", hint)
    return path.read_bytes()
