import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bloodcell_fastai import Predictor, Run
from bloodcell_fastai.training.packing import half_precision, relative_paths


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
def test_what_would_not_survive_stays_whole(tensor, dtype):
    kept = half_precision({"x": tensor})["x"]
    assert kept.dtype is dtype
    assert torch.allclose(kept.double(), tensor.double(), rtol=1e-3, atol=1e-6, equal_nan=True)


def test_a_packed_run_predicts_what_the_run_does(trained, packed):
    paths = trained.table.path[trained.table.part == "valid"].tolist()
    before = Predictor.load(trained, device="cpu")(paths)
    after = Predictor.load(packed / "pbc", device="cpu")(paths)
    shares = before.filter(like="p_")
    assert np.abs(after[shares.columns] - shares).to_numpy().max() < 0.01
    assert np.allclose(after.distance, before.distance, atol=0.01)
    root = trained.config.data
    nearest = before.nearest.map(lambda path: path.removeprefix(f"{root}/"))
    assert (after.nearest == nearest).mean() > 0.9  # two may be as near, to half precision


def test_it_needs_only_half_the_bytes_and_three_files(trained, packed, tmp_path):
    sizes = [(run / "model.safetensors").stat().st_size for run in (packed / "pbc", trained.path)]
    assert 0.5 < sizes[0] / sizes[1] < 0.52
    for name in ("config.json", "model.safetensors", "calibration.json"):
        (tmp_path / name).write_bytes((packed / "pbc" / name).read_bytes())
    for name in ("reference.safetensors", "reference.csv"):
        (tmp_path / name).write_bytes((packed / "pbc" / name).read_bytes())
    assert len(Predictor.load(tmp_path)(trained.table.path[:2])) == 2


def test_it_names_the_classes_and_no_folder_of_this_machine(trained, packed):
    with safe_open(packed / "pbc" / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(trained.config.classes)
    root = trained.config.data
    files = [path for path in (packed / "pbc").rglob("*") if path.is_file()]
    assert {path.name for path in trained.path.glob("*.*")} - {path.name for path in files} == {
        ".lock"
    }
    for path in files:
        assert root.rsplit("/", 1)[0].encode() not in path.read_bytes(), path.name
    run = Run(packed / "pbc")
    assert run.config.data == root.rsplit("/", 1)[1]
    assert [f"{root}/{path}" for path in run.table.path] == trained.table.path.tolist()
    assert run.finished


def test_the_running_statistics_are_those_of_the_run(trained, packed):
    before = load_file(trained.path / "model.safetensors")
    after = load_file(packed / "pbc" / "model.safetensors")
    for name in before:
        if "running" in name:
            assert torch.equal(before[name], after[name])
        elif name.endswith("conv1.weight"):
            assert after[name].dtype is torch.float16


def test_paths_outside_the_images_keep_their_name_alone(tmp_path):
    paths = [str(tmp_path / "A" / "1.png"), "/elsewhere/2.png", "A/3.png"]
    table = pd.DataFrame({"path": paths, "photo": ["7", *paths[1:]], "label": "/A"})
    relative = relative_paths(table, tmp_path)
    assert relative.path.tolist() == ["A/1.png", "2.png", "A/3.png"]
    assert relative.photo.tolist() == ["7", "2.png", "A/3.png"]
    assert relative.label.tolist() == ["/A"] * 3
