"""The errors users see: what went wrong and how to mend it."""

import errno


class BloodcellError(Exception):
    """A problem the user can do something about.

    An argument is named in backticks, as in "Check `data`."; the command line shows the flag in
    its place and never a traceback.

    Args:
        message: what went wrong and where.
        hint: what to do about it, a command where there is one.
        exit_code: 1 for a problem met on the way, 2 for wrong usage.

    Examples:
        >>> from bloodcell_fastai import BloodcellError, open_dataset
        >>> try:
        ...     open_dataset("nowhere.zip")
        ... except BloodcellError as error:
        ...     print(error)
        No file or folder nowhere.zip.
        Check `data`.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 1):
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(BloodcellError, ValueError):
    """An argument that cannot be right (exit code 2)."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message, hint, exit_code=2)


class DataError(BloodcellError, ValueError):
    """What a file, a folder or a data set holds is not usable."""


class MissingFileError(BloodcellError, FileNotFoundError):
    """A file, a folder or a run that is not there."""


class NoNetworkError(BloodcellError):
    """This machine has no network at all."""


class BloodcellWarning(UserWarning):
    """What a user must know and the library goes on with; ``train`` tells its reporter."""


class WeightsWarning(BloodcellWarning):
    """The model starts from other weights than a reader would expect."""


class CacheWarning(BloodcellWarning):
    """Decoded images cannot be kept: every epoch decodes them again."""


def disk_error(error: OSError) -> BloodcellError:
    """A :class:`BloodcellError` for a file or folder that the system would not read or write."""
    where = f": {error.filename}" if error.filename else ""
    hint = "Mend that and repeat the command; a fit goes on with `resume`."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = "Make room on the disk and repeat the command; a fit goes on with `resume`."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "Ask for the right to write there or name another folder; a fit takes `runs`."
    return BloodcellError(f"{error.strerror or error}{where}", hint)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory is full, for which torch has a class on CUDA only."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(each in str(error).lower() for each in words)


def printable(text: str) -> str:
    """``text`` with control characters and undecodable bytes written as escapes.

    A terminal obeys control characters, and names of files may hold any. Line breaks stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
