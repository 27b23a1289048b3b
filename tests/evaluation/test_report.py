import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bloodcell_fastai import Config, Predictor, Run, interpret_run, train
from bloodcell_fastai.config import ResolvedConfig, fit_command
from bloodcell_fastai.errors import BloodcellError
from bloodcell_fastai.evaluation import report
from bloodcell_fastai.evaluation.explain import NoHeatMap
from bloodcell_fastai.evaluation.interpretation import write_results
from bloodcell_fastai.evaluation.metrics import Evaluation, labelled_predictions
from bloodcell_fastai.evaluation.report import (
    DASH,
    GALLERY,
    fingerprint,
    percent,
    render_report,
    reproduce_command,
)
from bloodcell_fastai.reporter import SilentReporter

SECTIONS = [
    "data",
    "results",
    "training",
    "matrix",
    "classes",
    "calibration",
    "coverage",
    "losses",
    "use",
    "reproduce",
]
HISTORY = [
    {"train_loss": 1.5, "train_accuracy": 0.3, "valid_loss": 1.4, "valid_accuracy": 0.35},
    {"train_loss": 1.2, "train_accuracy": 0.5, "valid_loss": 1.3, "valid_accuracy": 0.45},
]


@pytest.fixture(scope="module")
def run(demo_root, tmp_path_factory) -> Run:
    """A run interpreted for real; it is hardly trained, which makes no difference to the page."""
    config = Config(data=str(demo_root), arch="resnet18", weights="none", size=64, bs=16, epochs=1)
    run = train(config, tmp_path_factory.mktemp("runs"), "reported", reporter=SilentReporter())
    warning = "DEMO DATA: drawn by code, not photographed."
    run.start(run.asked, run.config.changed(warnings=(warning,)), run.table)
    for epoch, row in enumerate(HISTORY, start=1):
        run.append_history({"epoch": epoch, **row, "lr": 1e-3, "seconds": 70})
    interpret_run(run)
    return run


@pytest.fixture(scope="module")
def page(run) -> "Page":
    return Page((run.report / "index.html").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a test asks of the page: its text, figures, addresses and headings."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.text, self.metrics = html, "", {}
        self.addresses, self.headings, self.alts = [], [], []
        self._open, self._skipped = [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        if tag == "h2":
            self.headings.append(found["id"])
        if tag == "img":
            self.alts.append(found["alt"])
        if tag == "style":
            self._skipped = tag
        if tag not in ("meta", "img", "br"):
            self._open.append((tag, found.get("data-metric")))

    def handle_endtag(self, tag):
        self._skipped = None
        assert self._open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self._skipped:
            return
        self.text += data
        if self._open and self._open[-1][1]:
            self.metrics[self._open[-1][1]] = data


def flatten(value, name="") -> dict:
    """Numbers of metrics.json by the path to them; an interval is one value."""
    if name.endswith("_ci95") or not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [flatten(inner, f"{name}.{key}" if name else str(key)) for key, inner in items]
    return {key: number for part in parts for key, number in part.items()}


def assert_shows(shown: str, value) -> None:
    """That a reader sees ``value``, as a percentage where the page shows one."""
    if value is None:
        assert shown == DASH
        return
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", shown.replace(",", ""))]
    digits = len(shown.split(".")[-1].rstrip("\u202f%")) if "." in shown else 0
    scale = 100 if "%" in shown else 1
    assert numbers == pytest.approx(np.atleast_1d(value) * scale, abs=0.5 * 10**-digits + 1e-9)


def assert_agrees(figures: dict[str, str], run: Run) -> None:
    """That every figure of the page is that of metrics.json, and the chief ones are there."""
    metrics = json.loads((run.path / "metrics.json").read_text())
    expected = flatten(metrics)
    for name, shown in figures.items():
        assert_shows(shown, expected[name])
    classes = metrics["classes"]
    scores = ("precision", "recall", "f1", "specificity", "auroc")
    wanted = {"accuracy", "accuracy_ci95", "photo_accuracy", "photo_accuracy_ci95", "ece"}
    wanted |= {f"per_class.{name}.{score}" for name in classes for score in scores}
    wanted |= {f"per_class.{name}.{score}_ci95" for name in classes for score in scores}
    wanted |= {f"per_class.{name}.{count}" for name in classes for count in ("support", "photos")}
    wanted |= {name for name in expected if name.startswith("confusion_matrix.")}
    assert wanted <= figures.keys()


def make_result(labels: list[str], classes: tuple[str, ...], paths=None, photos="", leakage=None):
    paths = paths or [f"/data/{i}.jpg" for i in range(len(labels))]
    table = pd.DataFrame({"path": paths, "label": labels, "photo": photos})
    probabilities = np.random.default_rng(0).dirichlet(np.ones(len(classes)), len(labels))
    predicted = pd.DataFrame(probabilities, columns=[f"p_{name}" for name in classes])
    predicted.insert(0, "path", paths)
    predicted.insert(1, "predicted", np.array(classes)[probabilities.argmax(axis=1)])
    predicted.insert(2, "confidence", probabilities.max(axis=1))
    predicted.insert(3, "flag", "")
    return Evaluation(labelled_predictions(table, predicted), classes, leakage)


def make_run(path, result, asked=None, **resolved) -> Run:
    """A run of these predictions that has nothing but its options and its table."""
    run, table = Run(path), result.predictions[["path", "label", "photo"]]
    asked = asked or Config()
    config = ResolvedConfig(**asked.model_dump() | {"data": "/data"} | resolved)
    run.start(asked, config, table.assign(subset="", part="valid"))
    return run


def test_its_figures_are_those_of_metrics_json(page, run):
    assert_agrees(page.metrics, run)


def test_the_sections_come_in_their_order(page):
    assert page.headings == SECTIONS


def test_warnings_and_leakage_stand_before_everything_else(page):
    first = " ".join(page.text[: page.text.index("Model and data")].split())
    assert "DEMO DATA: drawn by code" in first
    assert "RANDOM WEIGHTS" in first
    assert "no validation image has a copy of its photograph in training" in first
    assert "Not a medical device" in first


def test_it_is_one_file(page, run):
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\(|@import|<script|<link|<iframe", page.html)
    assert (run.report / "index.html").stat().st_size < 4e6


def test_the_largest_losses_are_shown_with_what_is_known_of_them(page, run):
    pictures = [address for address in page.addresses if address.startswith("data:image/jpeg")]
    predictions = pd.read_csv(run.path / "predictions.csv")
    shown = min(GALLERY, predictions.photo.nunique())
    assert len(pictures) == 3 * shown  # the image, its heat map, the nearest
    assert len({*pictures[::3], *pictures[1::3]}) == 2 * shown
    assert all(page.alts)
    worst = predictions.sort_values("loss").iloc[-1]
    for name in ("path", "nearest"):
        assert worst[name] in page.text
        assert str(run.root / worst[name]) not in page.text
    assert f"{worst.loss:.2f}" in page.text
    assert percent(worst.confidence) in page.text


def test_it_tells_how_to_reproduce_it(page, run):
    assert reproduce_command(run) in page.text
    assert run.config.versions and all(version in page.text for version in run.config.versions)
    assert fingerprint(run.relative(run.table)) in page.text
    text = " ".join(page.text.split())
    assert "2 epochs in 2 min; best epoch 2: training accuracy 50.0" in text
    assert "deviceauto → cpu" in text and "bs16" in text  # asked and resolved


def test_an_image_that_is_gone_has_no_heat_map(run):
    result = interpret_run(run)
    result.predictions.loc[result.predictions.loss.idxmax(), "path"] = "/gone.jpg"
    page = Page(render_report(run, result, Predictor.load(run)))
    assert page.text.count("cannot be read any more") == 2
    shown = min(GALLERY, len(result.top_losses(GALLERY, one_per_photo=True)))
    assert sum(alt.startswith("Heat map") for alt in page.alts) == shown - 1


def test_a_model_without_spatial_features_has_no_heat_maps(run, monkeypatch):
    def refuse(*args):
        raise error

    error: BloodcellError = NoHeatMap("No.")
    result, predictor = interpret_run(run), Predictor.load(run)
    monkeypatch.setattr(report, "heat_maps", refuse)
    page = Page(render_report(run, result, predictor))
    assert "resnet18 has no spatial features" in page.text
    assert not any(alt.startswith("Heat map") for alt in page.alts)
    error = BloodcellError("The model file is damaged.")
    with pytest.raises(BloodcellError, match="is damaged"):
        render_report(run, result, predictor)


def test_names_cannot_break_the_page(tmp_path):
    """Markup, quotes and mathematics in a class, a path and a warning are shown as they are."""
    classes = ("<script>alert(1)</script>", 'A&B "quoted" $x$ $\\bad$', "C")
    paths = [str(tmp_path / f"<img src=x>'{number}'\".png") for number in range(6)]
    for path in paths:
        Image.new("RGB", (8, 6)).save(path)
    result = make_result(list(classes) * 2, classes, paths)
    run = make_run(tmp_path / "run", result, warnings=("<b>bold</b>",), versions=("<i>1",))
    write_results(run, result)
    page = Page((run.report / "index.html").read_text(encoding="utf-8"))
    assert not re.search("<script|<b>bold|<i>1|<img src=x", page.html)
    for text in (*classes, "<b>bold</b>", "<i>1", *paths):
        assert text in page.text


def make_poor_run(path, count: int) -> tuple[Run, Evaluation]:
    """No history, photographs, calibration, versions or images, and a class of none."""
    classes = tuple(f"A_CLASS_WITH_A_VERY_LONG_NAME_{i}" for i in range(count))
    result = make_result([*classes[1:]] * 3, classes)
    return make_run(path, result), result


@pytest.mark.parametrize("count", [2, 20])
def test_a_run_of_which_little_is_known(tmp_path, count):
    run, result = make_poor_run(tmp_path, count)
    classes, page = result.classes, Page(render_report(run, result))
    assert page.headings == SECTIONS
    assert "no history" in page.text
    assert "cannot be read any more" in page.text  # there are no such images
    assert "every image counts as its own" in page.text
    assert "Leakage." in page.text and "leakage" not in page.metrics
    assert page.metrics[f"per_class.{classes[0]}.recall"] == DASH
    assert page.metrics[f"per_class.{classes[0]}.recall_ci95"] == DASH
    assert page.metrics[f"per_class.{classes[1]}.support"] == "3"


@pytest.mark.parametrize("leakage, word", [(0.0, "None"), (0.2, "20.0"), (1.0, "100.0")])
def test_leakage_is_told_in_words_and_in_colour(tmp_path, leakage, word):
    result = make_result(["A", "B"] * 4, ("A", "B"), photos=list("aabbccdd"), leakage=leakage)
    html = render_report(make_run(tmp_path, result, Config(split="random")), result)
    alert = leakage_alert(html)
    assert word in alert[0]
    assert ("good" in alert[1]) == (leakage == 0)
    assert ("have a copy in training" in html) == (leakage > 0)


def test_how_many_photographs_are_known(tmp_path):
    """One known photograph does not make all of them known."""
    result = make_result(["A", "B"] * 4, ("A", "B"), photos=["a", *[""] * 7], leakage=0.0)
    html = render_report(make_run(tmp_path, result), result)
    page = Page(html)
    assert page.metrics["n_known"] == "1" and page.metrics["n_photos"] == "8"
    assert "1 of 8 images have a known photograph" in page.text
    assert "the true intervals are wider" in page.text
    alert = leakage_alert(html)
    assert "only 1 of 8 images have a known photograph" in alert[0]
    assert "good" not in alert[1]


def leakage_alert(html: str) -> re.Match:
    """The first lines' paragraph on leakage; its classes are the first group."""
    found = re.search(r'<p class="([^"]*)" role="note"><strong>Leakage.*?</p>', html, re.S)
    assert found
    return found


def test_the_command_asks_for_the_same_run(tmp_path):
    def command(asked: Config, path="run", **resolved) -> str:
        return reproduce_command(make_run(tmp_path / path, result, asked, **resolved))

    result = make_result(["A", "B"], ("A", "B"))
    asked = Config(data="/my data/it's", split="random", weights="/w/a b.safetensors")
    words = shlex.split(command(asked, initial_weights="a b.safetensors", device="cpu", lr=0.5))
    assert words == shlex.split(fit_command(asked))
    for used in ("none", "imagenet (resnet18)", "pbc (blood cells)"):
        assert f"--weights {used.split()[0]} " in command(Config(), initial_weights=used) + " "
    assert "--data demo" in command(Config(), warnings=("DEMO DATA: drawn.",))
    folds = Config(folds=2, epochs=3)
    assert command(folds) == command(Config(epochs=3), "run/fold-1") == fit_command(folds)


def test_the_fingerprint_is_that_of_the_data_alone():
    table = pd.DataFrame({"path": ["A/1.jpg", "B/2.jpg"], "label": ["A", "B"], "part": "train"})
    here = fingerprint(table)
    assert len(here) == 64
    assert fingerprint(table[::-1]) == here
    for name, value in {"path": "C.jpg", "label": "A", "part": "valid", "fold": "1"}.items():
        assert fingerprint(table.assign(**{name: value})) != here, name


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser, page, run, width):
    context = browser.new_context(viewport={"width": width, "height": 850}, offline=True)
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    address = (run.report / "index.html").resolve().as_uri()
    tab.goto(address)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    widths = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == len(page.alts) and min(widths) > 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    figures = tab.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-metric]')]"
        ".map(element => [element.dataset.metric, element.innerText.trim()]))"
    )
    assert_agrees(figures, run)
    context.close()


def test_many_long_names_fit_on_a_phone(browser, tmp_path):
    run, result = make_poor_run(tmp_path, 20)
    tab = browser.new_page(viewport={"width": 390, "height": 850})
    tab.set_content(render_report(run, result))
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.close()
