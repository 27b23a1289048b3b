"""How the library tells what it is doing; the command line dresses it up."""

import sys
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` while something long goes on."""


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
    """Says nothing: of several processes one is enough to hear."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""
