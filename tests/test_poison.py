"""A pickle that would write a file, under every name that is read: refused, and nothing is run."""

import ast
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bloodcell_fastai
from bloodcell_fastai import BloodcellError, Predictor, Run, export_run, interpret_run, open_dataset
from bloodcell_fastai.data.cache import ImageReader, cache_file, decode
from bloodcell_fastai.data.duplicates import known_photos
from bloodcell_fastai.evaluation.interpretation import read_metrics
from bloodcell_fastai.evaluation.robustness import read_robustness
from bloodcell_fastai.model.model import load_model
from bloodcell_fastai.reporter import SilentReporter
from bloodcell_fastai.serving.predict import PredictionFile
from bloodcell_fastai.training.fit import make_learner
from bloodcell_fastai.training.train import resume

PACKAGE = Path(bloodcell_fastai.__file__).parent


class Poison:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A folder that only the poison makes."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def raw(marker: Path) -> bytes:
    return pickle.dumps({"weight": Poison(marker)})


def as_zip(marker: Path) -> bytes:
    torch.save({"weight": Poison(marker)}, buffer := io.BytesIO())
    return buffer.getvalue()


def legacy(marker: Path) -> bytes:
    torch.save(
        {"weight": Poison(marker)}, buffer := io.BytesIO(), _use_new_zipfile_serialization=False
    )
    return buffer.getvalue()


def array(marker: Path) -> bytes:
    np.save(buffer := io.BytesIO(), np.array([Poison(marker)], object), allow_pickle=True)
    return buffer.getvalue()


def arrays(marker: Path) -> bytes:
    np.savez(buffer := io.BytesIO(), a=np.array([Poison(marker)], object))
    return buffer.getvalue()


def script(marker: Path) -> bytes:
    """As a TorchScript archive would be recognised."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as zipped:
        zipped.writestr("x/data.pkl", raw(marker))
        zipped.writestr("x/constants.pkl", raw(marker))
        zipped.writestr("x/version", "3")
    return buffer.getvalue()


FORMS = {form.__name__: form for form in (raw, as_zip, legacy, array, arrays, script)}


@pytest.mark.parametrize("form", [raw, as_zip, legacy, array])
def test_the_poison_works(tmp_path, form):
    """Or the tests below would prove nothing."""
    path = tmp_path / "x"
    path.write_bytes(form(tmp_path / "marker"))
    if form is array:
        np.load(path, allow_pickle=True)
    elif form is raw:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.fixture
def run(trained, tmp_path) -> Run:
    return Run(shutil.copytree(trained.path, tmp_path / "runs" / "mine"))


def cut_off(run: Run) -> None:
    (run.path / "last" / "finished.json").unlink()


# Every file of a run, and who reads it.
READERS = {
    "config.json": Predictor.load,
    "model.safetensors": Predictor.load,
    "calibration.json": Predictor.load,
    "reference.safetensors": Predictor.load,
    "reference.csv": Predictor.load,
    "split.csv": interpret_run,
    "history.csv": lambda run: run.history,
    "robustness.csv": read_robustness,
    "metrics.json": read_metrics,
    "last/checkpoint.safetensors": lambda run: resume(run.path.parent, run.name, SilentReporter()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", READERS)
def test_a_file_of_a_run(run, marker, name, form):
    cut_off(run)
    (run.path / name).write_bytes(FORMS[form](marker))
    with pytest.raises(BloodcellError) as caught:
        READERS[name](run)
    assert Path(name).name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("form", FORMS)
def test_the_other_readers_of_a_run(run, marker, form):
    for name in ("model.safetensors", "calibration.json", "split.csv"):
        kept = (run.path / name).read_bytes()
        (run.path / name).write_bytes(FORMS[form](marker))
        with pytest.raises(BloodcellError):
            export_run(run, "timm", run.path / "out", reporter=SilentReporter())
        (run.path / name).write_bytes(kept)
    export_run(run, "timm", run.path / "out", reporter=SilentReporter())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pkl", ".ckpt", ".safetensors", ""])
def test_first_weights(tmp_path, marker, form, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(FORMS[form](marker))
    with pytest.raises(BloodcellError, match="more than tensors") as caught:
        load_model("resnet18", 4, 64, path)
    assert caught.value.hint


@pytest.mark.parametrize("form", FORMS)
def test_decoded_images(tmp_path, demo_table, monkeypatch, marker, form):
    """A file that is no cache is replaced."""
    monkeypatch.setenv("BLOODCELL_CACHE", str(tmp_path / "cache"))
    paths = sorted(demo_table.path[:4])
    file = cache_file(paths, 32, "cell")
    file.parent.mkdir()
    file.write_bytes(FORMS[form](marker))
    batch = ImageReader.open(paths, 32, build=True).read(paths)
    assert np.array_equal(batch.pixels[0].permute(1, 2, 0), decode(paths[0], 32).pixels)
    assert np.load(file).shape == (4,)


def test_decoded_images_of_another_type(tmp_path, demo_table, monkeypatch):
    monkeypatch.setenv("BLOODCELL_CACHE", str(tmp_path / "cache"))
    paths = sorted(demo_table.path[:4])
    file = cache_file(paths, 32, "cell")
    file.parent.mkdir()
    np.save(file, np.zeros((4, 32, 32, 3), np.float64))
    assert ImageReader.open(paths, 32, build=True).read(paths).pixels.any()


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_photographs(tmp_path, demo_table, marker, form):
    for name in ("known.csv.xz", "known.csv"):
        (tmp_path / name).write_bytes(FORMS[form](marker))
        with pytest.raises(BloodcellError, match="no table of known photographs"):
            known_photos(demo_table.path[:2], tmp_path / name)
    for label in "AB":
        (tmp_path / "set" / label).mkdir(parents=True)
        shutil.copy(demo_table.path[0], tmp_path / "set" / label)
    (tmp_path / "set" / "photos.csv").write_bytes(FORMS[form](marker))
    with pytest.raises(BloodcellError, match=r"photos\.csv"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("form", FORMS)
def test_predictions_to_go_on_with(tmp_path, marker, form):
    for suffix in (".csv", ".jsonl"):
        path = tmp_path / f"out{suffix}"
        path.write_bytes(FORMS[form](marker) + b"\n")
        with pytest.raises(BloodcellError, match="another kind"):
            PredictionFile(path, ["path", "predicted"], resume=True)


@pytest.mark.parametrize("form", FORMS)
def test_images(tmp_path, marker, form):
    for label in "AB":
        (tmp_path / "set" / label).mkdir(parents=True)
        for suffix in (".jpg", ".png", ".bmp", ".tif", ".webp", ".gif"):
            (tmp_path / "set" / label / f"1{suffix}").write_bytes(FORMS[form](marker))
    with pytest.raises(BloodcellError, match="12 of 12 images cannot be read"):
        open_dataset(tmp_path / "set")


def test_nothing_in_the_package_unpickles_or_evaluates():
    """A reader added later has to say here why it is safe."""
    suspicious = {"load_learner", "load_pickle", "read_pickle", "pickle", "dill", "joblib"}
    calls = {"eval", "exec", "compile", "__import__"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                ours = getattr(node, "level", 0) > 0  # load_learner is a name of ours too
                if names & suspicious and not ours:
                    found.append((path.name, node.lineno))
            if isinstance(node, ast.Call):
                text = ast.unparse(node.func)
                allowed = {keyword.arg for keyword in node.keywords}
                if (
                    text in calls
                    or (text == "torch.load" and "weights_only" not in allowed)
                    or text in ("np.load", "pd.read_pickle", "learn.load")
                    or "allow_pickle" in allowed
                ):
                    found.append((path.name, node.lineno))
    assert found == []


def edit(run: Run, **values) -> None:
    path = run.path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"resolved": config["resolved"] | values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evil": 1}, "evil is not an option"),
        ({"e" * 5000: 1}, "eee is not an option"),
        ({"size": "many"}, "size is many"),
        ({"size": 64.5}, "size is 64.5"),
        ({"size": [64]}, r"size is \[64\]"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"bs": 10**6}, "bs is 1000000"),
        ({"bs": 65536, "size": 4096}, "bs is 65536 with size 4096; no memory holds"),
        ({"epochs": 10**12}, "epochs is"),
        ({"lr": 1e400}, "lr is inf"),
        ({"lr": "fast"}, "lr is fast"),
        ({"workers": 10**6}, "workers is"),
        ({"arch": "hf-hub:someone/evil"}, "no architecture 'hf-hub:someone/evil'"),
        ({"arch": "local-dir:/tmp/evil"}, "no architecture 'local-dir:/tmp/evil'"),
        ({"arch": "../../evil"}, "no architecture"),
        ({"arch": "x" * 5000}, "arch is x+: input should have at most 4096"),
        ({"data": "a\0b"}, "data is .*: input should have at most 4096"),
        ({"classes": ["A", "B", "C"]}, "classes in config.json lists 3 names, but .* 4 outputs"),
        ({"classes": ["A", "B", "C", "D", "E"]}, "classes in config.json lists 5 names"),
        ({"classes": []}, "classes in config.json lists 0 names"),
        ({"classes": ["A", "A", "B", "C"]}, "classes holds a name twice"),
        ({"classes": ["A", "../B", "C", "D"]}, "classes holds '../B'"),
        ({"classes": ["A", "", "C", "D"]}, "classes holds ''"),
        ({"classes": "ABCD"}, "classes is ABCD"),
        ({"classes": [str(n) for n in range(2000)]}, "classes is .* at most 1000 items"),
        ({"split": "../x"}, "split is ../x"),
    ],
)
def test_a_config_that_makes_no_sense(run, values, message):
    edit(run, **values)
    for reader in (Predictor.load, lambda run: export_run(run, "timm", reporter=SilentReporter())):
        with pytest.raises(BloodcellError, match=message) as caught:
            reader(run)
        assert caught.value.hint


def test_classes_in_another_order(run):
    """The weights say in which order theirs are."""
    edit(run, classes=list(run.config.classes)[::-1])
    with pytest.raises(BloodcellError, match="classes in config.json are not those of"):
        Predictor.load(run)


def checkpoint(run: Run, change, tensors=None) -> None:
    """The checkpoint of an unfinished run with its state changed."""
    cut_off(run)
    path = run.path / "last" / "checkpoint.safetensors"
    learn = make_learner(run.config.changed(weights="none"), run.table)
    learn.create_opt()
    model = {f"model.{k}": v for k, v in load_file(run.path / "model.safetensors").items()}
    state = {
        "epochs_done": 1,
        "best": 0.5,
        "wait": 0,
        "optimizer": {
            "state": [{} for _ in learn.opt.all_params()],
            "hypers": [dict(hyper) for hyper in learn.opt.hypers],
        },
    }
    metadata = change(state)
    save_file(model | (tensors or {}), path, metadata)


def as_metadata(state) -> dict:
    return {"state": json.dumps(state)}


def resumed(run: Run):
    return resume(run.path.parent, run.name, SilentReporter())


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        (lambda s: None, None, "is damaged"),
        (lambda s: {"state": "{"}, None, "is damaged"),
        (lambda s: {"state": "[" * 100_000}, None, "is damaged"),
        (lambda s: as_metadata([1]), None, r"it is \[1\]"),
        (lambda s: as_metadata(s | {"evil": 1}), None, "evil: "),
        (lambda s: as_metadata(s | {"epochs_done": -1}), None, "epochs_done is -1"),
        (lambda s: as_metadata(s | {"epochs_done": 10**30}), None, "epochs_done is 1000"),
        (lambda s: as_metadata(s | {"epochs_done": True}), None, "epochs_done is True"),
        (lambda s: as_metadata(s | {"best": float("nan")}), None, "best is nan"),
        (lambda s: as_metadata(s | {"best": "high"}), None, "best is 'high'"),
        (lambda s: as_metadata(s | {"optimizer": None}), None, "optimizer is None"),
        (
            lambda s: as_metadata(s | {"optimizer": {"state": [{"a": [1]}], "hypers": []}}),
            None,
            r"optimizer.state.0.a.* is \[1\]",
        ),
    ],
)
def test_a_checkpoint_that_makes_no_sense(run, change, tensors, message):
    checkpoint(run, change, tensors)
    with pytest.raises(BloodcellError, match=message) as caught:
        resumed(run)
    assert "cannot be resumed" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        (
            lambda o: o | {"hypers": o["hypers"][:1]},
            None,
            "hypers are those of another optimizer",
        ),
        (lambda o: o | {"state": o["state"][:3]}, None, "it has 3 parameters, unlike the model"),
        (
            lambda o: o,
            {"opt.0.grad_avg": torch.ones(2)},
            "grad_avg has another shape than its parameter",
        ),
        (lambda o: o, {"opt.0.step": torch.ones(2)}, "step has another shape"),
        (lambda o: o, {"opt.99999.grad_avg": torch.ones(1)}, "belongs to no parameter"),
        (lambda o: o, {"opt.x.y": torch.ones(1)}, "belongs to no parameter"),
    ],
)
def test_an_optimizer_of_another_model(run, change, tensors, message):
    checkpoint(run, lambda s: as_metadata(s | {"optimizer": change(s["optimizer"])}), tensors)
    edit(run, epochs=2)  # there is one more to train
    with pytest.raises(BloodcellError, match=message):
        resumed(run)


def test_weights_of_another_model_in_a_checkpoint(run):
    checkpoint(run, as_metadata, {"model.fc.weight": torch.ones(7, 7)})
    with pytest.raises(BloodcellError, match="its weights are those of another model"):
        resumed(run)


def test_reference_features_of_another_model(run):
    save_file(
        {"features": torch.ones(len(run.reference.table), 3)}, run.path / "reference.safetensors"
    )
    with pytest.raises(BloodcellError, match="has 3 features an image, the model 512"):
        interpret_run(run)


def test_the_weights_know_their_classes(run):
    with safe_open(run.path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(run.config.classes)
