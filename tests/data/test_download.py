import errno
import socket
import sys
import zipfile
from types import SimpleNamespace

import pytest
import requests

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.data import download
from bloodcell_fastai.errors import NoNetworkError


def use_proxy(monkeypatch, address: str = "") -> None:
    """Set the proxy of this process; without an address none."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    if address:
        monkeypatch.setenv("https_proxy", address)


def download_with(monkeypatch, fetch) -> BloodcellError:
    """The error of a download by a kagglehub that does this, without a proxy."""
    use_proxy(monkeypatch)
    kagglehub = SimpleNamespace(dataset_download=fetch)
    monkeypatch.setitem(sys.modules, "kagglehub", kagglehub)
    with pytest.raises(BloodcellError) as caught:
        download.download_kaggle()
    assert download.KAGGLE_URL in caught.value.hint
    assert "`data=demo`" in caught.value.hint
    return caught.value


def ask_with(monkeypatch, error: OSError):
    """A kagglehub that asks a server by requests; the system refuses the connection."""

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return lambda handle: requests.get(download.KAGGLE_URL)


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
    ],
)
def test_no_network_at_all(monkeypatch, error):
    caught = download_with(monkeypatch, ask_with(monkeypatch, error))
    assert isinstance(caught, NoNetworkError)
    assert "There is no network to download from" in caught.message


@pytest.mark.parametrize(
    "error",
    [
        requests.exceptions.ProxyError("407 Proxy Authentication Required"),
        requests.exceptions.SSLError("certificate verify failed"),
        requests.exceptions.HTTPError("403 Client Error\nand more"),
        requests.exceptions.ReadTimeout("timed out"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        OSError(errno.ENOSPC, "No space left on device"),
        zipfile.BadZipFile("File is not a zip file"),
        RuntimeError(),
    ],
)
def test_any_other_failure_of_a_download_is_an_error(monkeypatch, error):
    def fail(handle):
        raise error

    caught = download_with(monkeypatch, fail)
    assert not isinstance(caught, NoNetworkError)
    reason = str(error).partition("\n")[0] or "RuntimeError"
    assert caught.message == f"The download from Kaggle failed ({reason})."


def test_a_name_that_is_not_resolved_behind_a_server_that_answered(monkeypatch):
    """Kaggle answers, and the store it sends to cannot be reached."""

    def fail(handle):
        requests.Session().send(requests.Request("GET", "http://first").prepare())
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(requests.Session, "send", lambda *args, **kwargs: requests.Response())
    assert not isinstance(download_with(monkeypatch, fail), NoNetworkError)


def test_kagglehub_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # whose import is an ImportError then
    with pytest.raises(BloodcellError, match="The download from Kaggle failed") as caught:
        download.download_kaggle()
    assert not isinstance(caught.value, NoNetworkError)


def test_a_proxy_that_is_not_there_is_an_error(monkeypatch):
    """With the real kagglehub; port 9 of this machine is closed."""
    use_proxy(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(BloodcellError, match="The download from Kaggle failed") as caught:
        download.download_kaggle()
    assert not isinstance(caught.value, NoNetworkError)


def test_a_proxy_whose_name_is_not_resolved_is_an_error(monkeypatch):
    use_proxy(monkeypatch, "http://no-such-proxy:9")
    ask = ask_with(monkeypatch, socket.gaierror(socket.EAI_NONAME, "Name not known"))
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=ask))
    with pytest.raises(BloodcellError, match="The download from Kaggle failed") as caught:
        download.download_kaggle()
    assert not isinstance(caught.value, NoNetworkError)
    monkeypatch.setenv("no_proxy", "www.kaggle.com")  # which is asked for directly then
    with pytest.raises(NoNetworkError):
        download.download_kaggle()


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(download, "KAGGLE_TIMEOUT", (1, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        caught = download_with(monkeypatch, lambda handle: requests.get(url))
    assert "timed out" in caught.message.lower()
    assert not isinstance(caught, NoNetworkError)
