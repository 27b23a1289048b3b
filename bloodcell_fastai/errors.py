"""The one error users see: what went wrong and how to mend it."""


class BloodcellError(Exception):
    """A problem the user can do something about.

    The command line shows it as two lines, ``message`` and ``hint``, and never as a traceback.

    Args:
        message: what went wrong and where.
        hint: what to do about it, a command where there is one.
        exit_code: 1 for a problem met on the way, 2 for wrong usage.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 1):
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def usage_error(message: str, hint: str = "") -> BloodcellError:
    """A :class:`BloodcellError` for an argument that cannot be right (exit code 2)."""
    return BloodcellError(message, hint, exit_code=2)


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value read from JSON is a number, no truth value, from ``low`` to ``high``."""
    return type(value) in (int, float) and low <= value <= high


def printable(text: str) -> str:
    """``text`` with control characters and bytes that are no text written as escapes.

    File names come from strangers, and a terminal obeys what it is shown. Line breaks stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
