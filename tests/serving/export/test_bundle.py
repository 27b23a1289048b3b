import json
import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from bloodcell_fastai import BloodcellError, Predictor, Run, export_run
from bloodcell_fastai.evaluation.interpretation import read_metrics
from bloodcell_fastai.files import LOCK
from bloodcell_fastai.serving.export import bundle
from bloodcell_fastai.serving.export.bundle import half_precision


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        (torch.randn(4, 3, 3, 3), torch.float16),
        (torch.zeros(2, 2), torch.float16),
        (torch.tensor([[1e5, 1.0]]), torch.float32),  # beyond float16
        (torch.full((3, 3), 1e-7), torch.float32),  # where float16 has a digit left
        (torch.tensor([[1.0, 1e-9]]), torch.float16),  # nothing beside the 1
        (torch.tensor([[float("nan"), 1.0]]), torch.float32),
        (torch.tensor([1e-6, 2.0]), torch.float32),  # as a running variance
        (torch.tensor(7), torch.int64),  # as BatchNorm's number of batches
        (torch.ones(2, 2, dtype=torch.int64), torch.int64),
    ],
)
def test_what_half_precision_would_spoil_stays_whole(tensor, dtype):
    kept = half_precision({"x": tensor})["x"]
    assert kept.dtype is dtype
    assert torch.allclose(kept.double(), tensor.double(), rtol=1e-3, atol=1e-6, equal_nan=True)


def test_a_bundle_predicts_what_the_run_does(trained, bundled):
    paths = trained.table.path[trained.table.part == "valid"].tolist()
    before = Predictor.load(trained, device="cpu")(paths)
    after = Predictor.load(Run(bundled / "pbc", trained.root), device="cpu")(paths)
    columns = before.filter(like="p_").columns
    assert np.abs(after[columns] - before[columns]).to_numpy().max() < 0.01
    assert np.allclose(after.distance, before.distance, atol=0.01)
    assert (after.nearest == before.nearest).mean() > 0.9  # two may be as near, to half precision


def test_it_has_half_the_bytes_and_predicts_with_five_of_its_files(trained, bundled, tmp_path):
    sizes = [(run / "model.safetensors").stat().st_size for run in (bundled / "pbc", trained.path)]
    assert 0.5 < sizes[0] / sizes[1] < 0.52
    for name in (
        *("config.json", "model.safetensors", "calibration.json"),
        *("reference.safetensors", "reference.csv"),
    ):
        shutil.copy(bundled / "pbc" / name, tmp_path)
    assert len(Predictor.load(tmp_path)(trained.table.path[:2])) == 2


def test_it_names_the_classes_and_no_folder_of_this_machine(trained, bundled):
    with safe_open(bundled / "pbc" / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(trained.config.classes)
    files = [path for path in (bundled / "pbc").rglob("*") if path.is_file()]
    left_out = {path.name for path in trained.path.glob("*.*")} - {path.name for path in files}
    assert left_out == {LOCK}
    for path in files:
        assert str(trained.root.parent).encode() not in path.read_bytes(), path.name
    run = Run(bundled / "pbc")
    assert run.asked.data == run.config.data == trained.root.name
    assert Run(run.path, trained.root).table.equals(trained.table)
    assert run.finished


def test_a_data_folder_named_like_one_of_its_own(run, tmp_path):
    inner = tmp_path / run.root.name
    (inner / run.root.name).parent.mkdir()
    (inner / run.root.name).symlink_to(run.root)
    table = run.table.assign(
        path=[str(inner / run.root.name / path) for path in run.relative(run.table).path]
    )
    nested = Run(shutil.copytree(run.path, tmp_path / "run"))
    nested.start(*(c.changed(data=str(inner)) for c in (run.asked, run.config)), table)
    folder = export_run(nested, "bundle", tmp_path / "out")
    assert Run(folder, inner).table.equals(table)


def test_the_running_statistics_are_those_of_the_run(trained, bundled):
    before = load_file(trained.path / "model.safetensors")
    after = load_file(bundled / "pbc" / "model.safetensors")
    for name in before:
        if "running" in name:
            assert torch.equal(before[name], after[name])
        elif name.endswith("conv1.weight"):
            assert after[name].dtype is torch.float16


def test_it_is_checked_and_tells_what_it_is(run, tmp_path, capsys):
    folder = export_run(run, "bundle", tmp_path / "mine")
    said = capsys.readouterr().out
    assert re.search(r"changes by at most [\d.]+e-0[3-9]\. \d\d\.\d MB", said), said
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license) == ("bloodcell-fastai", None)
    assert card.text.lstrip().startswith("# mine")
    for words in ("bloodcell predict IMAGES --run FOLDER", "bloodcell fit --data demo", "DRAWN"):
        assert words in card.text
    assert "{{" not in card.content
    assert str(run.root.parent) not in card.content


def test_an_earlier_bundle_is_replaced(trained, run, tmp_path):
    folder = export_run(trained, "bundle", tmp_path / "mine")
    assert Run(folder).calibration.temperature == trained.calibration.temperature
    assert read_metrics(Run(folder))["weights"] == Run(folder).weights_hash != trained.weights_hash
    export_run(run, "bundle", folder)
    assert Run(folder).calibration.temperature == run.calibration.temperature
    assert not (folder / "metrics.json").exists()
    assert Run(folder).finished


@pytest.mark.slow
def test_the_commands_of_the_card_run(bundled, trained, bloodcell, tmp_path):
    shutil.copytree(bundled / "pbc", tmp_path / "FOLDER")
    card = (tmp_path / "FOLDER" / "README.md").read_text()
    commands = re.findall(r"^    bloodcell (predict|fit) (.+)$", card, re.MULTILINE)[:2]
    assert [name for name, _ in commands] == ["predict", "fit"]
    shutil.copytree(trained.root, tmp_path / "IMAGES")
    for name, words in commands:
        more = ["--size", 64, "--epochs", 1] if name == "fit" else []
        result = bloodcell(name, *words.split(), *more)
        assert result.returncode == 0, result.stderr


def test_weights_that_half_precision_spoils_are_not_kept(run, tmp_path, monkeypatch):
    def coarse(state):
        return {k: v.half().float().mul(8).round().div(8).to(v.dtype) for k, v in state.items()}

    monkeypatch.setattr(bundle, "half_precision", coarse)
    with pytest.raises(
        BloodcellError, match=r"In half precision the model's probabilities change.*0\.01"
    ):
        export_run(run, "bundle", tmp_path / "out")
    assert not (tmp_path / "out").exists()
