"""How the library reports what it is doing; the command line has a reporter of its own."""

import sys
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` while something long goes on."""


def duration(seconds: float) -> str:
    """Seconds in words: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def no_progress(what: str, done: int, total: int) -> None:
    """The :data:`Progress` that shows nothing."""


class Reporter:
    """Plain lines: results on standard output, warnings on standard error, no progress bars."""

    def say(self, text: str) -> None:
        """Tell the user something."""
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """Tell the user something that must not be missed."""
        print(f"WARNING: {text}", file=sys.stderr, flush=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell how far something long has come; called for every step of it."""


class SilentReporter(Reporter):
    """Says nothing; for all but the first of several processes."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""
