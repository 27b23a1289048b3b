"""The one error users see: what went wrong and how to mend it."""

import errno


class BloodcellError(Exception):
    """A problem the user can do something about.

    The command line shows it as two lines, ``message`` and ``hint``, and never as a traceback.

    Args:
        message: what went wrong and where.
        hint: what to do about it, a command where there is one.
        exit_code: 1 for a problem met on the way, 2 for wrong usage.

    Examples:
        >>> from bloodcell_fastai import BloodcellError, open_dataset
        >>> try:
        ...     open_dataset("nowhere.zip")
        ... except BloodcellError as error:
        ...     print(error.message)
        ...     print(error.hint)
        No file or folder nowhere.zip.
        Check the path given to --data.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 1):
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def disk_error(error: OSError) -> BloodcellError:
    """A :class:`BloodcellError` for a file or folder that the system would not read or write."""
    where = f": {error.filename}" if error.filename else ""
    return BloodcellError(f"{error.strerror or error}{where}", _hint(error))


def _hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room on the disk and repeat the command; a fit goes on with --resume."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Ask for the right to write there or name another folder; a fit takes --runs."
    return "Mend that and repeat the command; a fit goes on with --resume."


def usage_error(message: str, hint: str = "") -> BloodcellError:
    """A :class:`BloodcellError` for an argument that cannot be right (exit code 2)."""
    return BloodcellError(message, hint, exit_code=2)


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value read from JSON is a number, no truth value, from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high


def printable(text: str) -> str:
    """``text`` with control characters and bytes that are no text written as escapes.

    File names come from strangers, and a terminal obeys what it is shown. Line breaks stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
