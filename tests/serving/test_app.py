import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import cv2
import numpy as np
import pytest
import requests
import uvicorn
from bs4 import BeautifulSoup
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from bloodcell_fastai import BloodcellError, Predictor, Run
from bloodcell_fastai.data import cache
from bloodcell_fastai.evaluation import report
from bloodcell_fastai.evaluation.explain import NoHeatMap
from bloodcell_fastai.evaluation.interpretation import read_metrics
from bloodcell_fastai.evaluation.report import interval, percent
from bloodcell_fastai.reporter import Reporter
from bloodcell_fastai.serving import app

# The command, in a process that notes every address it binds, looks up or connects to.
SERVE = """
import sys
log = sys.argv.pop(1)
def note(event, args):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo"):
        address = args[0] if event == "socket.getaddrinfo" else args[1][0]
        with open(log, "a") as file:
            print(event, address, file=file)
sys.addaudithook(note)
from bloodcell_fastai.cli import main
main()
"""


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Run:
    """A run, calibrated and interpreted, with a warning."""
    run = Run(shutil.copytree(trained.path, tmp_path_factory.mktemp("runs") / "served"))
    warnings = ("DEMO DATA: drawn by code, not photographed.",)
    run.start(run.asked, run.config.changed(warnings=warnings), run.table)
    return run


@pytest.fixture(scope="module")
def paths(run) -> list[str]:
    """Images of the validation part."""
    return run.table.query("part == 'valid'").path.tolist()


@pytest.fixture(scope="module")
def expected(run, paths) -> dict[str, dict]:
    """What the library predicts for ten images, each on its own, by file name."""
    predictor = Predictor.load(run, min_confidence=0.5, device="cpu")
    return {Path(path).name: predictor([path]).iloc[0].to_dict() for path in paths[:10]}


@pytest.fixture(scope="module")
def service(run) -> app.Service:
    return app.Service(run, device="cpu")


@pytest.fixture
def client(service) -> TestClient:
    """The app in this process."""
    return TestClient(app.create_app(service))


class Server:
    """``bloodcell serve`` in a process of its own."""

    def __init__(self, run: Run, folder: Path, *options: str):
        self.addresses, self.temporary = folder / "addresses", folder / "tmp"
        self.temporary.mkdir()
        command = [sys.executable, "-c", SERVE, self.addresses, "serve", run.path, *options]
        self.process = subprocess.Popen(
            [*map(str, command), "--port", "0", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(self.temporary)},
        )
        self.url = self.process.stdout.readline().split(" at ")[1].split()[0]
        assert requests.get(f"{self.url}/api/model", timeout=60).status_code == 200

    def post(self, *files: tuple[str, bytes]) -> requests.Response:
        parts = [("files", file) for file in files]
        return requests.post(f"{self.url}/api/predict", files=parts, timeout=60)

    def ends_with(self, number: signal.Signals) -> str:
        """What it says when it ends by a signal, after checking that it ends well."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=20)
        assert self.process.returncode == 0
        for noise in ("Traceback", "KeyboardInterrupt", "CancelledError"):
            assert noise not in errors
        assert list(self.temporary.glob("bloodcell-*")) == []
        return output


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    server = Server(run, tmp_path_factory.mktemp("server"))
    yield server
    server.process.kill()
    server.process.communicate()


def sent(path: str) -> tuple[str, bytes]:
    return Path(path).name, Path(path).read_bytes()


def form(*files: tuple[str, bytes]) -> dict:
    return {"files": [("files", file) for file in files]}


def assert_is(prediction: dict, row: dict) -> None:
    """A prediction of the endpoint against a row of the library's table."""
    assert prediction["predicted"] == row["predicted"]
    assert prediction["flag"] == row["flag"]
    assert prediction["confidence"] == pytest.approx(row["confidence"], abs=1e-4)
    assert prediction["distance"] == pytest.approx(row["distance"], abs=1e-3)
    for name, probability in prediction["probabilities"].items():
        assert probability == pytest.approx(row[f"p_{name}"], abs=1e-4)


def test_fifty_requests_at_once(server, paths, expected):
    chosen = [paths[number % 10] for number in range(50)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda path: server.post(sent(path)), chosen))
    assert Counter(answer.status_code for answer in answers) == {200: 50}
    for path, answer in zip(chosen, answers, strict=True):
        (prediction,) = answer.json()["predictions"]
        assert prediction["file"] == Path(path).name
        assert_is(prediction, expected[prediction["file"]])


def test_several_files_are_answered_in_order(server, run, paths):
    table = Predictor.load(run, min_confidence=0.5, device="cpu")(paths[:5])
    answer = server.post(*map(sent, paths[:3]), ("notes.txt", b"no image"), *map(sent, paths[3:5]))
    assert answer.status_code == 200
    for prediction, row in zip(answer.json()["predictions"], table.to_dict("records"), strict=True):
        assert prediction["file"] == Path(row["path"]).name
        assert_is(prediction, row)
        assert prediction["nearest_label"] == Path(row["nearest"]).parent.name
    (error,) = answer.json()["errors"]
    assert error["file"] == "notes.txt"


def huge_png() -> bytes:
    """A few bytes that claim to be an image of 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)


@pytest.mark.parametrize(
    ("name", "content"),
    [("notes.txt", b"no image"), ("empty.jpg", b""), ("huge.png", huge_png())],
)
def test_no_image_at_all(server, name, content):
    answer = server.post((name, content))
    assert answer.status_code == 400
    assert name in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"data": {"files": "cell.jpeg"}},
        {"files": {"file": ("cell.jpeg", b"")}},
        {"data": b"--x", "headers": {"Content-Type": "multipart/form-data"}},
        {"data": b"--y\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ],
)
def test_no_files_at_all(server, body):
    answer = requests.post(f"{server.url}/api/predict", **body, timeout=20)
    assert answer.status_code == 400
    assert set(answer.json()) == {"detail"}


def test_a_file_that_is_too_large(server, paths):
    answer = server.post(sent(paths[0]), ("large.jpg", bytes(20_100_000)))
    assert answer.status_code == 413
    assert answer.json()["detail"].startswith("large.jpg has 20.1 MB")


def test_too_many_files(server, paths):
    answer = server.post(*[sent(paths[0])] * 33)
    assert answer.status_code == 413
    assert answer.json()["detail"] == "These are 33 files: send at most 32."


@pytest.mark.parametrize("path", ["/api/predict", "/predict"])
def test_a_body_that_is_too_large_is_refused_before_it_is_read(server, path):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert b"at most 641 MB" in answer.read()
    connection.close()


def test_a_body_without_end_is_cut_off(service, monkeypatch):
    """Its length is not announced, so that it is read as far as it may be large."""
    monkeypatch.setattr(app, "MAX_BODY", 10**6)
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    messages, read = [], []

    async def receive():
        read.append(bytes(10**5) if read else part)
        return {"type": "http.request", "body": read[-1], "more_body": True}

    async def send(message):
        messages.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/predict",
        "headers": [(b"content-type", b"multipart/form-data; boundary=x")],
    }
    asyncio.run(app.create_app(service)(scope, receive, send))
    assert messages[0]["status"] == 413
    assert len(read) == 11


def test_a_caller_who_leaves(server):
    """The server says nothing of it: see the end of it below."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /api/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x"
        )
    assert requests.get(f"{server.url}/api/model", timeout=20).status_code == 200


def test_the_endpoint_says_what_the_model_is(server, run):
    card, metrics = requests.get(f"{server.url}/api/model", timeout=20).json(), read_metrics(run)
    assert card["classes"] == list(run.config.classes)
    assert card["scores"]["photo_accuracy"] == metrics["photo_accuracy"]
    assert card["scores"]["photo_accuracy_ci95"] == list(metrics["photo_accuracy_ci95"])
    assert card["scores"]["n_known"] == card["scores"]["n_images"] == metrics["n_images"]
    assert card["leakage"].startswith("none")
    assert "no medical device" in card["limits"][0]
    assert any("DEMO DATA" in text for text in card["warnings"])
    assert any("RANDOM WEIGHTS" in text for text in card["warnings"])


def test_the_schema_describes_the_endpoint(server):
    schema = requests.get(f"{server.url}/openapi.json", timeout=20).json()
    assert set(schema["paths"]) == {"/api/model", "/api/predict"}
    assert set(schema["paths"]["/api/predict"]["post"]["responses"]) == {"200", "400", "413"}
    schemas = schema["components"]["schemas"]
    fields = schemas["Prediction"]["properties"]
    assert set(fields) == set(app.Prediction.model_fields)
    assert all("description" in field for field in fields.values())
    assert schemas["Upload"]["properties"]["files"]["maxItems"] == app.MAX_FILES
    named = {part.split('"')[0] for part in json.dumps(schema).split("#/components/schemas/")[1:]}
    assert named <= set(schemas)


@pytest.mark.parametrize("name", ["drawn.png", "../app.py", "%2e%2e/app.py", "page.css", ""])
def test_the_page_reads_no_file_but_those_uploaded(client, paths, name):
    for value in (name, paths[0]):
        answer = client.post("/predict", data={"example": value})
        assert answer.status_code == 400
        assert "<article" not in answer.text
    assert client.get("/app.py").status_code == 404
    assert client.get("/api/predict").json() == {"detail": "Method Not Allowed"}


@pytest.fixture(scope="module", params=[(1280, "light"), (390, "dark")])
def tab(browser, server, request):
    """The page, at two widths; ``said`` is its console, ``asked`` what it fetches."""
    width, scheme = request.param
    tab = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
    tab.said, tab.asked = [], []
    tab.on("console", lambda line: tab.said.append(line.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("request", lambda asked: tab.asked.append(asked.url))
    tab.goto(server.url)
    yield tab
    tab.close()


def wait_for(tab, name: str) -> None:
    """Wait for what the page says about a file."""
    tab.wait_for_selector(f'#answers:not([aria-busy]) [data-file="{name}"]', timeout=20_000)


def upload(tab, *files: str) -> None:
    tab.set_input_files("input[type=file]", list(files))
    wait_for(tab, Path(files[-1]).name)


def test_upload_and_read_the_answer(tab, paths, expected):
    upload(tab, *paths[:2])
    articles = tab.query_selector_all("#answers article")
    assert len(articles) == 2
    for article, path in zip(articles, paths, strict=False):
        row = expected[Path(path).name]
        assert article.query_selector(".class").inner_text() == row["predicted"]
        shown = {
            bar.get_attribute("data-class"): bar.query_selector(".value").inner_text()
            for bar in article.query_selector_all("[data-class]")
        }
        assert shown == {name[2:]: percent(row[name]) for name in row if name.startswith("p_")}
        assert list(shown.values()) == sorted(shown.values(), key=_number, reverse=True)
        flag = article.query_selector(".flag b")
        assert (flag.inner_text().lower().strip(".") if flag else "") == row["flag"]
        pictures = article.query_selector_all("img")
        assert len(pictures) == 2 + app.NEAREST
        assert min(picture.evaluate("image => image.naturalWidth") for picture in pictures) > 50
    assert Path(expected[Path(paths[0]).name]["nearest"]).parent.name in (
        articles[0].query_selector(".nearest figcaption").inner_text()
    )
    assert not tab.is_visible("#status")
    assert tab.evaluate("document.querySelector('#files').files.length") == 0  # for the next ones


def _number(text: str) -> float:
    return float(text.rstrip("%").strip())


def test_files_are_dropped(tab, paths):
    name, content = sent(paths[3])
    dropped = tab.evaluate_handle(
        """([name, content]) => {
            const files = new DataTransfer();
            files.items.add(new File([Uint8Array.from(content)], name));
            return files;
        }""",
        [name, list(content)],
    )
    tab.dispatch_event("footer, .about", "dragover", {"dataTransfer": dropped})
    assert "over" in tab.get_attribute("#upload", "class")
    tab.dispatch_event(".about", "drop", {"dataTransfer": dropped})
    wait_for(tab, name)
    assert "over" not in tab.get_attribute("#upload", "class")


def test_a_text_file_is_refused_beside_an_image(tab, paths, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    upload(tab, paths[2], str(tmp_path / "notes.txt"))
    assert "notes.txt: This is not an image" in tab.inner_text("#answers [role=alert]")
    assert tab.get_attribute("#answers article", "data-file") == Path(paths[2]).name
    upload(tab, shutil.copy(tmp_path / "notes.txt", tmp_path / "letter.txt"))
    assert tab.query_selector("#answers article") is None


def test_an_example_is_predicted_when_clicked(tab):
    assert len(tab.query_selector_all(".examples img")) == 5
    tab.locator(".examples button").last.click()
    wait_for(tab, "no-blood.png")
    assert "Unlike training." in tab.inner_text("#answers .flag")


def test_too_many_files_on_the_page(tab, tmp_path, paths):
    copies = [shutil.copy(paths[0], tmp_path / f"{number}.jpg") for number in range(33)]
    tab.set_input_files("input[type=file]", copies)
    tab.wait_for_selector("#answers >> text=These are 33 files")
    assert tab.said.pop().startswith("Failed to load resource: the server responded with a status")


def test_the_page_tells_the_score_and_its_limits(tab, run):
    metrics = read_metrics(run)
    about = tab.inner_text(".about")
    assert percent(metrics["photo_accuracy"]) in about
    assert interval(metrics["photo_accuracy_ci95"]) in about
    assert "no validation image has a copy of its photograph in training" in about
    assert "knows only EOSINOPHIL" in about
    header = tab.inner_text("header")
    assert "no medical device" in header
    assert "DEMO DATA" in header


def test_the_page_fits_and_is_quiet(tab, server):
    """Last of those on a page: nothing was fetched from elsewhere, no error shown."""
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]
    assert tab.said == []
    assert len(tab.asked) >= 8  # with style, script and examples
    elsewhere = [url for url in tab.asked if not url.startswith((server.url, "data:", "blob:"))]
    assert elsewhere == []


def test_the_page_works_without_javascript(browser, server, paths):
    tab = browser.new_page(java_script_enabled=False)
    tab.goto(server.url)
    tab.set_input_files("input[type=file]", paths[:2])
    tab.click("noscript button")
    assert len(tab.query_selector_all("#answers article")) == 2
    tab.locator(".examples button").first.click()
    assert tab.get_attribute("#answers article", "data-file") == "drawn-eosinophil.png"
    tab.close()


def test_the_page_says_when_the_server_is_gone(browser, server, paths):
    tab = browser.new_page()
    tab.goto(server.url)
    tab.route("**/predict", lambda route: route.abort())
    tab.set_input_files("input[type=file]", paths[:1])
    tab.wait_for_selector("text=The server did not answer")
    assert tab.get_attribute("#answers", "aria-busy") is None
    tab.close()


def test_ctrl_c_ends_it_and_nothing_is_left(server):
    """Last of those with the server."""
    assert list(server.temporary.glob("bloodcell-*")) == []  # those of requests are gone
    assert server.ends_with(signal.SIGINT) == "Stopped.\n"
    addresses = set(server.addresses.read_text().splitlines())
    assert "socket.bind 127.0.0.1" in addresses
    assert addresses <= {"socket.bind 127.0.0.1", "socket.bind ::1"}  # a library tries IPv6


@pytest.mark.slow
def test_sigterm_ends_it_below_a_path(run, tmp_path):
    server = Server(run, tmp_path, "--root-path", "/blood")
    page = requests.get(f"{server.url}/blood", timeout=20)
    assert page.url == f"{server.url}/blood/"
    assert page.text == requests.get(server.url, timeout=20).text
    assert server.ends_with(signal.SIGTERM) == "Stopped.\n"


@pytest.mark.parametrize("base", ["/blood/", "/blood"])
@pytest.mark.parametrize("root_path", ["", "/blood", "blood/"])
@pytest.mark.parametrize("removed", [True, False])
def test_below_the_path_of_a_proxy(service, paths, base, root_path, removed):
    """The proxy removes the path from the address, or, if ``root_path`` is given, leaves it."""
    if not (removed or root_path):
        pytest.skip("Nothing tells the path")
    inner = app.create_app(service, root_path)
    outer = Starlette(routes=[Mount("/blood", app=inner)]) if removed else inner
    client = TestClient(outer)
    page = client.get(base)
    html = BeautifulSoup(page.text, "html.parser")
    base_tag = html.select_one("base")
    start = urljoin(str(page.url), base_tag["href"] if base_tag else "")
    assert urlsplit(start).path == "/blood/"
    links = [tag.get("href") or tag.get("src") for tag in html.select("link, script, img, a")]
    for link in links:
        if not link.startswith("data:"):
            assert client.get(urljoin(start, link)).status_code == 200
    for kind in html.select("form"):
        answer = client.post(urljoin(start, kind["action"]), data={"example": "no-blood.png"})
        assert "<article" in answer.text
    answer = client.post(urljoin(start, "api/predict"), **form(sent(paths[0])))
    assert len(answer.json()["predictions"]) == 1
    servers = client.get(urljoin(start, "openapi.json")).json()["servers"]
    assert servers == [{"url": "/blood" if root_path else "/"}]


def test_the_page_allows_nothing_from_elsewhere(client):
    for answer in (client.get("/"), client.post("/predict"), client.post("/predict", data={})):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data:;")
        assert "unsafe" not in policy


def test_a_run_that_was_not_interpreted(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "plain")
    for name in ("metrics.json", "calibration.json"):
        (tmp_path / "plain" / name).unlink()
    service = app.Service(Run(tmp_path / "plain"), device="cpu")
    assert service.card.scores is None
    assert not service.card.calibrated
    assert service.card.leakage.startswith("none")
    client = TestClient(app.create_app(service))
    page = client.post("/predict", data={"example": "no-blood.png"}).text
    assert "bloodcell interpret plain" in page
    assert "not calibrated" in page
    assert "Nearest training photographs" not in page
    (prediction,) = client.post("/api/predict", **form(("a.png", png()))).json()["predictions"]
    assert prediction["distance"] is None
    assert prediction["nearest_label"] is None


def png() -> bytes:
    return app.draw_examples()["no-blood.png"]


def test_a_run_whose_metrics_are_damaged(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "damaged")
    (tmp_path / "damaged" / "metrics.json").write_text("{")
    with pytest.raises(BloodcellError, match=r"metrics\.json"):
        app.Service(Run(tmp_path / "damaged"), device="cpu")


@pytest.mark.parametrize(
    ("n_known", "words"),
    [(32, "validation photographs"), (30, "known for 30 of 32"), (0, "validation images")],
)
def test_the_page_says_how_many_photographs_are_known(run, n_known, words):
    service = app.Service(run, device="cpu")
    scores = service.card.scores.model_copy(update={"n_known": n_known, "n_images": 32})
    service.card = service.card.model_copy(update={"scores": scores})
    text = BeautifulSoup(TestClient(app.create_app(service)).get("/").text, "html.parser").text
    assert words in " ".join(text.split())


def test_a_training_image_that_is_gone(run, paths, tmp_path):
    shutil.copytree(run.path, tmp_path / "moved")
    listed = tmp_path / "moved" / "reference.csv"
    listed.write_text(listed.read_text().replace(".jpeg", ".gone"))
    client = TestClient(app.create_app(app.Service(Run(tmp_path / "moved"), device="cpu")))
    page = client.post("/predict", **form(sent(paths[0]))).text
    assert page.count("The file is gone") == app.NEAREST


def test_a_model_that_can_have_no_heat_map(client, paths, monkeypatch):
    def none(*_):
        raise NoHeatMap("It has no features with a place in the image.")

    assert "Heat map:" in client.post("/predict", **form(sent(paths[0]))).text
    monkeypatch.setattr(report, "heat_maps", none)
    page = client.post("/predict", **form(sent(paths[0]))).text
    assert "Heat map:" not in page
    assert "The image" in page


def test_another_error_of_the_heat_maps_is_not_hidden(client, paths, monkeypatch):
    def fail(*_):
        raise BloodcellError("There is no memory.")

    monkeypatch.setattr(report, "heat_maps", fail)
    with pytest.raises(BloodcellError):
        client.post("/predict", **form(sent(paths[0])))


def test_an_image_is_prepared_once(client, paths, monkeypatch):
    prepared, decode = [], cache.decode
    monkeypatch.setattr(
        cache, "decode", lambda path, *args: prepared.append(path) or decode(path, *args)
    )
    assert client.post("/predict", **form(*map(sent, paths[:3]))).text.count("<article") == 3
    assert len(prepared) == 3


def test_names_of_files_are_no_html(client, paths):
    name = "<img src=x onerror=alert(1)>\" autofocus '.png"
    kind = {"Content-Type": "multipart/form-data; boundary=end"}
    for content in (sent(paths[0])[1], b"no image"):
        quoted = name.replace('"', '\\"')
        head = f'--end\r\nContent-Disposition: form-data; name="files"; filename="{quoted}"\r\n\r\n'
        body = head.encode() + content + b"\r\n--end--\r\n"
        page = client.post("/predict", content=body, headers=kind).text
        html = BeautifulSoup(page, "html.parser")
        assert html.select_one("[data-file]")["data-file"] == name
        assert not html.select("[onerror], [autofocus], img[src=x]")
    name = "large <b>.png"
    page = client.post("/predict", **form((name, bytes(20_100_000)))).text
    assert "large &lt;b&gt;.png has 20.1 MB" in page


def test_examples_are_drawn():
    examples = app.draw_examples()
    assert len(set(examples.values())) == 5
    for file in examples.values():
        pixels = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
        assert pixels.shape == (240, 320, 3)


class Told(Reporter):
    def __init__(self):
        self.lines, self.warnings = [], []

    def say(self, text):
        self.lines.append(text)

    def warn(self, text):
        self.warnings.append(text)


@pytest.mark.parametrize(("host", "warnings"), [("127.0.0.1", 0), ("localhost", 0), ("0.0.0.0", 1)])
def test_beyond_loopback_it_warns(run, monkeypatch, host, warnings):
    monkeypatch.setattr(app, "create_app", lambda *_: None)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    reporter = Told()
    app.serve(run, host, port=0, device="cpu", reporter=reporter)
    assert len(reporter.warnings) == warnings
    assert reporter.lines[-1] == "Stopped."


def test_a_port_that_is_taken(run):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(BloodcellError, match="Cannot listen") as raised,
    ):
        app.serve(run, port=taken.getsockname()[1])
    assert "`port`" in raised.value.hint


def test_what_comes_with_the_package_is_served(shipped, trained):
    """It brings its scores and the split with it, and its training images not."""
    service = app.Service(Run(shipped), device="cpu")
    card, table = service.card, trained.table
    assert (card.run, card.n_train_images) == ("pbc", (table.part == "train").sum())
    assert card.scores.accuracy == read_metrics(trained)["accuracy"]
    client = TestClient(app.create_app(service))
    assert "The file is gone" in client.post("/predict", data={"example": "no-blood.png"}).text


def test_folds_are_not_served(trained, tmp_path):
    parent = Run(tmp_path / "cv")
    parent.start(trained.asked, trained.config.changed(folds=2), trained.table)
    with pytest.raises(BloodcellError, match="Run cv has 2 models, one for each fold"):
        app.Service(parent)
