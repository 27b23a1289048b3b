"""Runs that were never trained, but whose predictions differ from image to image."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from bloodcell_fastai import Config, Predictor, Run, export_run, split_table
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.model.calibration import Calibration, Reference
from bloodcell_fastai.model.model import load_model

SIZE = 64


def make_run(folder: Path, root: Path, table: pd.DataFrame, arch: str, crop: str) -> Run:
    asked = Config(data=str(root), arch=arch, weights="none", size=SIZE, crop=crop)
    classes = tuple(sorted(set(table.label)))
    torch.manual_seed(0)
    model, _ = load_model(arch, len(classes), SIZE, "none")
    predictor = Predictor(model, arch, SIZE, crop, classes, full_precision=True)
    trained_on = table[table.part == "train"].reset_index(drop=True)
    images = predictor.normalise(predictor.read(trained_on.path).pixels)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics are those of these images
    with torch.no_grad():
        model.train()(images)
        features = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        classifier = model.get_classifier()
        classifier.weight.normal_(std=2 / features.std(dim=0).mean() / features.shape[1] ** 0.5)
        classifier.bias.copy_(-classifier.weight @ features.mean(dim=0))
    run = Run(folder)
    resolved = ResolvedConfig(
        **asked.model_dump(), classes=classes, initial_weights="none", warnings=("DRAWN CELLS.",)
    )
    run.start(asked, resolved, table)
    run.save_weights(model.state_dict(), classes)
    assert Predictor.load(run, device="cpu")(trained_on.path).predicted.nunique() > 1
    run.features = torch.nn.functional.normalize(features)
    return run


@pytest.fixture(scope="session")
def run(demo_root, demo_table, tmp_path_factory) -> Run:
    """A calibrated ResNet on the crop."""
    folder, table = tmp_path_factory.mktemp("runs") / "one", split_table(demo_table)
    run = make_run(folder, demo_root, table, "resnet18", "cell")
    trained_on = table[table.part == "train"]
    calibration = Calibration(
        temperature=2.5,
        distance_threshold=1.0,
        neighbours=1,
        ece_before=0.1,
        ece_after=0.1,
        n_images=10,
    )
    listed = trained_on[["path", "label", "photo"]]
    run.save_calibration(calibration, Reference(run.features, listed, 1))
    return run


@pytest.fixture(scope="session")
def vit(demo_root, demo_table, tmp_path_factory) -> Run:
    """An uncalibrated ViT on the whole image, made for one size and with a mean of its own."""
    folder = tmp_path_factory.mktemp("runs") / "vit"
    return make_run(folder, demo_root, split_table(demo_table), "test_vit.r160_in1k", "frame")


@pytest.fixture(scope="session")
def expected(run, vit) -> dict[str, pd.DataFrame]:
    """The predictions for the validation images, in float32."""
    return {
        each.name: Predictor.load(each, device="cpu", full_precision=True)(
            each.table.path[each.table.part == "valid"]
        )
        for each in (run, vit)
    }


@pytest.fixture(scope="session")
def exported(run, vit, tmp_path_factory) -> Callable[[str, str], Path]:
    """``exported("one", "onnx")`` is that export's folder; ``said.txt`` in it what was told."""

    @cache
    def export(name: str, format: str) -> Path:
        folder, lines = tmp_path_factory.mktemp("export") / name, []
        reporter = SimpleNamespace(say=lines.append, warn=lines.append)
        export_run({"one": run, "vit": vit}[name], format, folder, reporter=reporter)
        (folder / "said.txt").write_text("\n".join(lines))
        return folder

    return export
