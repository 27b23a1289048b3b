"""The Kaggle set from the network."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import BloodcellError, NoNetworkError

KAGGLE_HANDLE = "paultimothymooney/blood-cells"
KAGGLE_URL = f"https://www.kaggle.com/datasets/{KAGGLE_HANDLE}"
KAGGLE_TIMEOUT = (10, 60)  # seconds to wait for a connection, and for the next bytes


def download_kaggle() -> Path:
    """Download the Kaggle set with kagglehub and return its folder.

    Raises:
        NoNetworkError: this machine has no network at all.
        BloodcellError: the download failed in any other way.
    """
    hint = f"Download it from {KAGGLE_URL} by hand and give the zip as `data`, or use `data=demo`."
    answers: list = []
    try:
        import kagglehub  # slow to import, and needed only here

        with _limited_requests(answers):
            return Path(kagglehub.dataset_download(KAGGLE_HANDLE))
    except Exception as error:  # kagglehub raises many kinds, also those of its HTTP client
        if not answers and _no_network(error):
            raise NoNetworkError("There is no network to download from.", hint) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BloodcellError(f"The download from Kaggle failed ({reason}).", hint) from error


@contextmanager
def _limited_requests(answers: list) -> Iterator[None]:
    """Collect the answers to HTTP requests, and give those without a time limit
    :data:`KAGGLE_TIMEOUT`: kagglehub's client sets none and has no option for it."""
    from requests import Session

    send = Session.send

    def limited(self, request, **options):
        options["timeout"] = options.get("timeout") or KAGGLE_TIMEOUT
        answers.append(answer := send(self, request, **options))
        return answer

    Session.send = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        Session.send = send  # type: ignore[method-assign]


def _no_network(error: BaseException | None) -> bool:
    """Whether the first request failed because no name is resolved or no network is within reach.

    Where a proxy is to be used this says nothing: the network is there, and the proxy is wrong.
    """
    if {"https", "all"} & getproxies().keys() and not proxy_bypass(urlsplit(KAGGLE_URL).netloc):
        return False
    while error is not None:
        if isinstance(error, socket.gaierror):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.ENETDOWN):
            return True
        error = error.__cause__ or error.__context__
    return False
