import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.main import get_command

from bloodcell_fastai import Config, Run, interpret_run, split_table
from bloodcell_fastai.analysis.evaluation import prediction_table
from bloodcell_fastai.analysis.interpretation import Interpretation, write_results
from bloodcell_fastai.analysis.report import (
    DASH,
    GALLERY,
    fingerprint,
    fit_command,
    percent,
    render_report,
)
from bloodcell_fastai.cli import app
from bloodcell_fastai.training.fit import make_learner, resolve

SECTIONS = [
    "what",
    "headline",
    "curves",
    "matrix",
    "classes",
    "calibration",
    "worst",
    "use",
    "again",
]
HISTORY = [
    {"train_loss": 1.5, "train_accuracy": 0.3, "valid_loss": 1.4, "valid_accuracy": 0.35},
    {"train_loss": 1.2, "train_accuracy": 0.5, "valid_loss": 1.3, "valid_accuracy": 0.45},
]


@pytest.fixture(scope="module")
def run(demo, demo_table, tmp_path_factory) -> Run:
    """A run interpreted for real; that its model is untrained makes no difference to the page."""
    config = Config(
        data=str(demo.root),
        arch="resnet18",
        weights="none",
        size=64,
        batch_size=16,
        epochs=2,
        workers=0,
        device="cpu",
        warnings=("DEMO DATA: drawn by code, not photographed.",),
    )
    table = split_table(demo_table, "photo")
    learn = make_learner(config, table)
    run = Run(tmp_path_factory.mktemp("runs") / "reported")
    run.start(resolve(config, learn), table)
    run.save_model(learn)
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
    """That a reader sees ``value``, as a share where the page shows a percentage."""
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


def make_result(labels: list[str], classes: tuple[str, ...], paths=None, photos=None, leakage=None):
    paths = paths or [f"/data/{i}.jpg" for i in range(len(labels))]
    table = pd.DataFrame({"path": paths, "label": labels, "photo": photos or paths})
    probabilities = np.random.default_rng(0).dirichlet(np.ones(len(classes)), len(labels))
    return Interpretation(prediction_table(table, probabilities, classes), classes, leakage)


def make_run(path, result, **options) -> Run:
    """A run of these predictions that has nothing but its options and its table."""
    run, table = Run(path), result.predictions[["path", "label", "photo"]]
    run.start(Config(data="/data", **options), table.assign(subset="", part="valid"))
    return run


def test_its_figures_are_those_of_metrics_json(page, run):
    assert_agrees(page.metrics, run)


def test_the_sections_come_in_their_order(page):
    assert page.headings == SECTIONS


def test_warnings_and_leakage_stand_before_everything_else(page):
    first = page.text[: page.text.index("What was trained on what")]
    assert "DEMO DATA: drawn by code" in first
    assert "RANDOM WEIGHTS" in first
    assert "no validation image has a copy of its photograph in training" in " ".join(first.split())
    assert "no medical device" in first


def test_it_is_one_file(page, run):
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\(|@import|<script|<link|<iframe", page.html)
    assert (run.report / "index.html").stat().st_size < 4e6


def test_the_worst_images_are_shown_with_what_is_known_of_them(page, run):
    pictures = [address for address in page.addresses if address.startswith("data:image/jpeg")]
    predictions = pd.read_csv(run.path / "predictions.csv")
    shown = min(GALLERY, predictions.photo.nunique())
    assert len(pictures) == 3 * shown  # the image, its heat map, the nearest
    assert len({*pictures[::3], *pictures[1::3]}) == 2 * shown
    assert all(page.alts)
    worst = predictions.sort_values("loss").iloc[-1]
    data = run.config.data
    for name in ("path", "nearest"):
        assert worst[name].removeprefix(f"{data}/") in page.text
        assert worst[name] not in page.text
    assert f"{worst.loss:.2f}" in page.text
    assert percent(worst.confidence) in page.text


def test_it_tells_how_to_run_it_again(page, run):
    config = run.config
    assert fit_command(config) in page.text
    assert all(version in page.text for version in config.versions)
    assert fingerprint(run.table, config.data) in page.text
    assert "2 epochs in 2 min; kept epoch 2: training accuracy 50.0" in " ".join(page.text.split())


def test_names_cannot_break_the_page(tmp_path):
    """Markup, quotes and mathematics in a class, a path and a warning are shown as they are."""
    classes = ("<script>alert(1)</script>", 'A&B "quoted" $x$ $\\bad$', "C")
    paths = [str(tmp_path / f"<img src=x>'{number}'\".png") for number in range(6)]
    for path in paths:
        Image.new("RGB", (8, 6)).save(path)
    result = make_result(list(classes) * 2, classes, paths)
    run = make_run(tmp_path / "run", result, warnings=("<b>bold</b>",))
    write_results(run, result)
    page = Page((run.report / "index.html").read_text(encoding="utf-8"))
    assert not re.search("<script|<b>bold|<img src=x", page.html)
    for text in (*classes, "<b>bold</b>", *paths):
        assert text in page.text


def make_poor_run(path, count: int) -> tuple[Run, Interpretation]:
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
    assert "every image counts as its" in page.text
    assert "Leakage." in page.text and "leakage" not in page.metrics
    assert page.metrics[f"per_class.{classes[0]}.recall"] == DASH
    assert page.metrics[f"per_class.{classes[0]}.recall_ci95"] == DASH
    assert page.metrics[f"per_class.{classes[1]}.support"] == "3"


@pytest.mark.parametrize("leakage, word", [(0.0, "None"), (0.2, "20.0"), (1.0, "100.0")])
def test_leakage_is_told_in_words_and_in_colour(tmp_path, leakage, word):
    result = make_result(["A", "B"] * 4, ("A", "B"), photos=list("aabbccdd"), leakage=leakage)
    html = render_report(make_run(tmp_path, result, split="random"), result)
    alert = re.search(r'<p class="([^"]*)" role="note"><strong>Leakage.*?</p>', html, re.S)
    assert word in alert[0]
    assert ("good" in alert[1]) == (leakage == 0)
    assert ("have a copy in training" in html) == (leakage > 0)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(data="/my data/it's", split="random", lr=3e-4, flip=False, label_smoothing=0.0),
        Config(arch="resnet18", weights="/w/a b.safetensors", folds=5, epochs=3, mixup=0.4, seed=7),
    ],
)
def test_the_command_asks_for_the_same_run(config):
    """The command line reads from it what the config says."""
    program, command, *words = shlex.split(fit_command(config))
    assert (program, command) == ("bloodcell", "fit")
    asked = get_command(app).commands["fit"].make_context("fit", words).params
    asked |= {"lr": float(asked["lr"]), "data": asked["data"] or ""}
    assert {name: value for name, value in asked.items() if name in vars(config)} == {
        name: value for name, value in vars(config).items() if name in asked
    }


def test_the_command_names_the_weights_and_the_demo_it_came_to():
    config = Config(data="/home/me/data/demo", weights_used="none", warnings=("DEMO DATA: drawn.",))
    assert fit_command(config) == "bloodcell fit --data demo --weights none --epochs 20"
    for used in ("imagenet (resnet18)", "pbc (blood cells)"):
        pretrained = replace(config, weights_used=used, pretrained=True)
        assert f"--weights {used.split()[0]} " in fit_command(pretrained)


def test_the_fingerprint_is_that_of_the_data_alone(tmp_path):
    def table(root, part="train"):
        return pd.DataFrame(
            {"path": [f"{root}/A/1.jpg", f"{root}/B/2.jpg"], "label": ["A", "B"], "part": part}
        )

    here = fingerprint(table("/here"), "/here")
    assert len(here) == 64
    assert fingerprint(table("/there")[::-1], "/there") == here
    assert fingerprint(table("/here", "valid"), "/here") != here
    assert fingerprint(table("/here").assign(label="A"), "/here") != here
    assert fingerprint(table("/here").assign(fold="1"), "/here") != here


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
