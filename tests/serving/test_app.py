import http.client
import importlib
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
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from fastai.vision.all import set_seed

from bloodcell_fastai import BloodcellError, Config, Predictor, Run, interpret_run, split_table
from bloodcell_fastai.analysis.interpretation import read_results
from bloodcell_fastai.analysis.report import interval, percent
from bloodcell_fastai.reporter import Reporter
from bloodcell_fastai.training.fit import make_learner, resolve

pytest.importorskip("gradio", reason="the extra 'serve' is not installed")
httpx = pytest.importorskip("httpx", reason="gradio brings it")
uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
app = importlib.import_module("bloodcell_fastai.serving.app")

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
def run(demo_table, tmp_path_factory) -> Run:
    """An untrained run, calibrated and interpreted."""
    set_seed(1)
    config = Config(
        arch="resnet18",
        weights="none",
        size=64,
        batch_size=8,
        epochs=1,
        workers=0,
        device="cpu",
        warnings=("DEMO DATA: drawn by code, not photographed.",),
    )
    table = split_table(demo_table)
    learn = make_learner(config, table)
    run = Run(tmp_path_factory.mktemp("runs") / "served")
    run.start(resolve(config, learn), table)
    run.save_model(learn)
    interpret_run(run)
    return run


@pytest.fixture(scope="module")
def paths(run) -> list[str]:
    """Images of the validation part."""
    return run.table.query("part == 'valid'").path.tolist()


@pytest.fixture(scope="module")
def expected(run, paths) -> dict[str, dict]:
    """What the library says of ten images, each on its own, by file name."""
    predictor = Predictor.load(run, min_confidence=0.5, device="cpu")
    return {Path(path).name: predictor([path]).iloc[0].to_dict() for path in paths[:10]}


class Server:
    """``bloodcell serve`` in a process of its own."""

    def __init__(self, run: Run, folder: Path):
        self.addresses, self.temporary = folder / "addresses", folder / "tmp"
        self.temporary.mkdir()
        command = [sys.executable, "-c", SERVE, self.addresses, "serve", run.path]
        self.process = subprocess.Popen(
            [*map(str, command), "--port", "0", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(self.temporary)},
        )
        self.url = self.process.stdout.readline().split(" at ")[1].split()[0]
        assert httpx.get(f"{self.url}/api/model", timeout=60).status_code == 200

    def post(self, *files: tuple[str, bytes], **kwargs) -> "httpx.Response":
        parts = [("files", file) for file in files]
        return httpx.post(f"{self.url}/api/predict", files=parts, timeout=60, **kwargs)


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    server = Server(run, tmp_path_factory.mktemp("server"))
    yield server
    server.process.kill()
    server.process.communicate()


def sent(path: str) -> tuple[str, bytes]:
    return Path(path).name, Path(path).read_bytes()


def assert_is(prediction: dict, row: dict) -> None:
    """A prediction of the endpoint against a row of the library's table."""
    assert prediction["predicted"] == row["predicted"]
    assert prediction["flag"] == row["flag"]
    assert prediction["confidence"] == pytest.approx(row["confidence"], abs=1e-4)
    assert prediction["distance"] == pytest.approx(row["distance"], abs=1e-3)
    for name, share in prediction["probabilities"].items():
        assert share == pytest.approx(row[f"p_{name}"], abs=1e-4)


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


def test_no_files_at_all(server):
    assert httpx.post(f"{server.url}/api/predict").status_code == 422


def test_a_file_that_is_too_large(server, paths):
    answer = server.post(sent(paths[0]), ("large.jpg", bytes(20_000_001)))
    assert answer.status_code == 413
    assert "large.jpg has 20 MB" in answer.json()["detail"]


def test_a_file_that_is_too_large_for_the_page(server):
    large = {"files": ("large.jpg", bytes(22_000_000))}
    assert httpx.post(f"{server.url}/gradio_api/upload", files=large).status_code == 413


def test_too_many_files(server, paths):
    answer = server.post(*[sent(paths[0])] * 33)
    assert answer.status_code == 413
    assert answer.json()["detail"] == "These are 33 files: send at most 32 at a time."


def test_a_body_without_end_is_refused_before_it_is_read(server):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    connection.putrequest("POST", "/api/predict")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_the_endpoint_says_what_the_model_is(server, run):
    card = httpx.get(f"{server.url}/api/model").json()
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert card["classes"] == list(run.config.classes)
    assert card["scores"]["photo_accuracy"] == metrics["photo_accuracy"]
    assert card["scores"]["photo_accuracy_ci95"] == metrics["photo_accuracy_ci95"]
    assert card["leakage"].startswith("none")
    assert "no medical device" in card["limits"][0]
    assert any("DEMO DATA" in text for text in card["warnings"])
    assert any("RANDOM WEIGHTS" in text for text in card["warnings"])


def test_the_schema_describes_the_endpoint(server):
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert set(schema["paths"]) == {"/api/model", "/api/predict"}
    responses = schema["paths"]["/api/predict"]["post"]["responses"]
    assert {"200", "400", "413", "422"} <= set(responses)
    fields = schema["components"]["schemas"]["Prediction"]["properties"]
    assert set(fields) == set(app.Prediction.model_fields)
    assert all("description" in field for field in fields.values())


def ask_page(server: Server, path: str) -> dict:
    """Call the function behind the page's drop area as a program could, with a path of its own."""
    config = httpx.get(f"{server.url}/config").json()
    number = next(
        event["id"]
        for event in config["dependencies"]
        if any(target[1] == "upload" for target in event["targets"])
    )
    data = [[{"path": path, "meta": {"_type": "gradio.FileData"}}]]
    call = {"data": data, "fn_index": number, "session_hash": "test"}
    httpx.post(f"{server.url}/gradio_api/queue/join", json=call).raise_for_status()
    address = f"{server.url}/gradio_api/queue/data?session_hash=test"
    with httpx.stream("GET", address, timeout=30) as events:
        for line in events.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no answer")


def test_the_page_reads_no_file_but_those_uploaded(server, paths):
    parts = {"files": sent(paths[0])}
    uploaded = httpx.post(f"{server.url}/gradio_api/upload", files=parts).json()[0]
    answer = ask_page(server, uploaded)
    assert answer["success"]
    assert "<article" in answer["output"]["data"][0]
    for path in (paths[0], f"{uploaded}/../../../../examples/no-blood.png", "http://a.test/b.png"):
        answer = ask_page(server, path)
        assert not answer["success"]
        assert "uploaded" in answer["output"]["error"]


@pytest.fixture(scope="module", params=[1280, 390])
def tab(browser, server, request):
    """The page, at two widths; ``said`` is its console, ``asked`` what it fetches."""
    tab = browser.new_page(viewport={"width": request.param, "height": 850})
    tab.said, tab.asked = [], []
    tab.on("console", lambda line: tab.said.append(line.text) if line.type == "error" else None)
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("request", lambda asked: tab.asked.append(asked.url))
    tab.goto(server.url)
    tab.wait_for_selector("input[type=file]", state="attached")
    yield tab
    tab.close()


def upload(tab, *files: str) -> None:
    """Give files to the page and wait for what it says of the last one."""
    with tab.expect_response(lambda response: "/upload" in response.url):
        tab.set_input_files("input[type=file]", list(files))
    tab.wait_for_selector(f'#answers [data-file="{Path(files[-1]).name}"]', timeout=20_000)


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
        flag = article.query_selector(".flag b")
        assert (flag.inner_text().lower().strip(".") if flag else "") == row["flag"]
        pictures = article.query_selector_all("img")
        assert len(pictures) == 2 + app.NEAREST
        assert min(picture.evaluate("image => image.naturalWidth") for picture in pictures) > 50
    assert Path(expected[Path(paths[0]).name]["nearest"]).parent.name in (
        articles[0].query_selector(".nearest figcaption").inner_text()
    )
    tab.wait_for_selector("text=Drop File Here")  # ready for the next


def test_a_text_file_is_refused_beside_an_image(tab, paths, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    upload(tab, paths[2], str(tmp_path / "notes.txt"))
    assert "notes.txt is no image" in tab.inner_text("#answers [role=alert]")
    assert tab.get_attribute("#answers article", "data-file") == Path(paths[2]).name
    upload(tab, shutil.copy(tmp_path / "notes.txt", tmp_path / "letter.txt"))
    assert tab.query_selector("#answers article") is None


def test_an_example_answers_when_clicked(tab):
    assert len(tab.query_selector_all(".gallery-item")) == 5
    tab.locator(".gallery-item").last.click()
    tab.wait_for_selector('#answers [data-file="no-blood.png"] .flag')


def test_too_many_files_on_the_page(tab, tmp_path, paths):
    copies = [shutil.copy(paths[0], tmp_path / f"{number}.jpg") for number in range(33)]
    tab.set_input_files("input[type=file]", copies)
    tab.wait_for_selector("#answers >> text=These are 33 files")


def test_the_page_tells_the_score_and_its_limits(tab, run):
    metrics = json.loads((run.path / "metrics.json").read_text())
    about = tab.inner_text(".about")
    assert percent(metrics["photo_accuracy"]) in about
    assert interval(metrics["photo_accuracy_ci95"]) in about
    assert "no validation image has a copy of its photograph in training" in about
    assert "nothing else" in about
    header = tab.inner_text("header.bc")
    assert "no medical device" in header
    assert "DEMO DATA" in header


def test_the_page_fits_and_is_quiet(tab, server):
    """Last of those on a page: nothing was fetched from elsewhere, no error shown."""
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]
    assert tab.said == []
    assert len(tab.asked) > 10
    elsewhere = [url for url in tab.asked if not url.startswith((server.url, "data:", "blob:"))]
    assert elsewhere == []


def test_ctrl_c_ends_it_and_nothing_is_left(server):
    """Last of those with the server."""
    assert len(list(server.temporary.glob("bloodcell-*"))) == 1  # those of requests are gone
    server.process.send_signal(signal.SIGINT)
    output, errors = server.process.communicate(timeout=20)
    assert server.process.returncode == 0
    assert output == "Stopped.\n"
    assert "KeyboardInterrupt" not in errors
    assert "CancelledError" not in errors
    assert list(server.temporary.glob("bloodcell-*")) == []
    addresses = set(server.addresses.read_text().splitlines())
    assert "socket.bind 127.0.0.1" in addresses
    assert addresses <= {"socket.bind 127.0.0.1", "socket.bind ::1"}  # a library tries IPv6


def test_a_run_that_was_not_interpreted(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "plain")
    for name in ("metrics.json", "calibration.json"):
        (tmp_path / "plain" / name).unlink()
    service = app.Service(Run(tmp_path / "plain"), device="cpu")
    assert service.card.scores is None
    assert not service.card.calibrated
    assert service.card.leakage.startswith("none")
    about = app._template().about(service.card)
    assert "bloodcell interpret plain" in about
    assert "not calibrated" in about


def test_a_training_image_that_is_gone(run, paths, tmp_path):
    shutil.copytree(run.path, tmp_path / "moved")
    listed = tmp_path / "moved" / "reference.csv"
    listed.write_text(listed.read_text().replace(".jpeg", ".gone"))
    service = app.Service(Run(tmp_path / "moved"), device="cpu")
    cards, unreadable = app._cards(service, paths[:1])
    shown = app._template().answers(cards, unreadable, service.card)
    assert shown.count("The file is gone") == app.NEAREST


def test_a_model_that_can_have_no_heat_map(run, paths, monkeypatch):
    def none(*_):
        raise BloodcellError("It has no features with a place in the image.")

    monkeypatch.setattr(app, "network_heat_maps", none)
    service = app.Service(run, device="cpu")
    cards, unreadable = app._cards(service, paths[:1])
    shown = app._template().answers(cards, unreadable, service.card)
    assert "What spoke for" not in shown
    assert "The image" in shown


def test_names_of_files_are_no_html(run):
    page = app._template()
    assert "<b>" not in page.problem("<b>.png")
    assert "<img" not in page.answers([], ["<img src=x>.png"], app.Service(run).card)


def test_examples_are_drawn(tmp_path):
    examples = app.draw_examples(tmp_path)
    assert len(examples) == 5
    assert len({path.read_bytes() for path in examples}) == 5
    assert {np.asarray(app.Image.open(path)).shape for path in examples} == {(240, 320, 3)}


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
    assert "--port" in raised.value.hint


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "bloodcell_fastai.serving.app")
    with pytest.raises(BloodcellError, match="Serving needs the package gradio") as raised:
        importlib.import_module("bloodcell_fastai.serving.app")
    assert raised.value.hint == 'pip install "bloodcell-fastai[serve]"'


def test_what_comes_with_the_package_is_served(shipped, trained):
    """It brings its scores and the split with it, and its training images not."""
    service = app.Service(Run(shipped), device="cpu")
    card, table = service.card, trained.table
    assert (card.run, card.n_train_images) == ("pbc", (table.part == "train").sum())
    assert card.scores.accuracy == read_results(trained).metrics["accuracy"]
    batch = service.predict(table.path[:2].tolist())
    assert not Path(service.nearest(batch.features, 1)[0].path.iloc[0]).is_file()


def test_folds_are_not_served(trained, tmp_path):
    parent = Run(tmp_path / "cv")
    parent.start(replace(trained.config, folds=2), trained.table)
    with pytest.raises(BloodcellError, match="Run cv has 2 models, one for each fold"):
        app.Service(parent)
