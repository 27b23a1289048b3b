import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import load_learner
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from bloodcell_fastai import BloodcellError, Config, Run, export_run, interpret, split_table
from bloodcell_fastai.analysis.interpretation import write_results
from bloodcell_fastai.data.dataset import open_image
from bloodcell_fastai.data.framing import framed
from bloodcell_fastai.serving import export
from bloodcell_fastai.serving.card import model_card
from bloodcell_fastai.training.calibration import Calibration
from bloodcell_fastai.training.callbacks import precision_callback
from bloodcell_fastai.training.fit import make_learner, resolve
from bloodcell_fastai.training.learner import timm_model
from bloodcell_fastai.training.ready import READY

TEMPERATURE = 2.5
WARNING = "DEMO DATA: drawn by code, not photographed."


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(export, "TIMED_SECONDS", 0.1)


def make_run(folder: Path, arch: str, table: pd.DataFrame) -> Run:
    """A run whose answers differ from picture to picture, and its predictions in float32."""
    config = Config(
        data=str(Path(table.path[0]).parents[2]),
        arch=arch,
        weights="none",
        size=64,
        batch_size=8,
        epochs=1,
        workers=0,
        device="cpu",
        warnings=(WARNING,),
    )
    torch.manual_seed(0)
    learn = make_learner(config, table)
    for callback in precision_callback(learn.dls.device):
        learn.remove_cb(type(callback))
    model = timm_model(learn)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # average over all batches
    with torch.no_grad():
        batches = [images for images, _ in learn.dls.train]
        for images in batches:
            model(images)  # fills the statistics of BatchNorm
        model.eval()
        spread = torch.cat(
            [model.forward_head(model.forward_features(x), pre_logits=True) for x in batches]
        )
        classifier = model.get_classifier()
        classifier.weight.normal_(std=2 / spread.std(dim=0).mean() / spread.shape[1] ** 0.5)
        classifier.bias.copy_(-classifier.weight @ spread.mean(dim=0))
    run = Run(folder)
    run.start(resolve(config, learn), table)
    run.save_model(learn)
    with learn.no_bar():
        run.expected = interpret(learn)
    assert run.expected.predictions.predicted.nunique() > 1
    return run


@pytest.fixture(scope="module")
def run(demo_table, tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("runs") / "one", "resnet18", split_table(demo_table))


@pytest.fixture(scope="module")
def vit(demo_table, tmp_path_factory) -> Run:
    """A run of an architecture that is made for one size, with a mean of its own."""
    folder = tmp_path_factory.mktemp("runs") / "vit"
    return make_run(folder, "test_vit.r160_in1k", split_table(demo_table))


@pytest.fixture
def calibrated(monkeypatch):
    calibrate(monkeypatch)


def calibrate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "calibration", Calibration(TEMPERATURE, 1.0, 1, 0.1, 0.1, 10))


@pytest.fixture(scope="module")
def onnx_folder(run, tmp_path_factory) -> Path:
    """The export of the run, calibrated; ``said.txt`` holds what was told on the way."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, lines = tmp_path_factory.mktemp("onnx"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "TIMED_SECONDS", 0.1)
        calibrate(patch)
        export_run(run, "onnx", folder, reporter=SimpleNamespace(say=lines.append))
    (folder / "said.txt").write_text("\n".join(lines))
    return folder


def code_block(folder: Path) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]


def warmer(probabilities: np.ndarray) -> np.ndarray:
    """What the same logits give divided by the temperature."""
    powers = probabilities ** (1 / TEMPERATURE)
    return powers / powers.sum(axis=1, keepdims=True)


def test_onnx_takes_pictures_of_any_size_and_number(run, onnx_folder):
    from onnxruntime import InferenceSession

    session = InferenceSession(onnx_folder / "model.onnx")
    (wanted,) = session.get_inputs()
    assert (wanted.name, wanted.type, wanted.shape[3]) == ("images", "tensor(uint8)", 3)
    paths = run.expected.predictions.path[:6]
    images = [np.asarray(framed(open_image(path), "cell")) for path in paths]
    answers = [session.run(None, {"images": image[None]})[0] for image in images]
    expected = warmer(run.expected.probabilities[:6])
    np.testing.assert_allclose(np.concatenate(answers), expected, atol=2e-3)
    (together,) = session.run(None, {"images": np.stack([images[0]] * 3)})
    np.testing.assert_allclose(together, expected[[0] * 3], atol=2e-3)
    model, _ = export._load(run)
    for width, height in ((64, 64), (90, 200), (33, 47), (640, 480)):
        picture = Image.fromarray(images[0]).resize((width, height))
        (answer,) = session.run(None, {"images": np.asarray(picture)[None]})
        pixels = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR))
        with torch.inference_mode():
            logits = model(export._normalised(pixels[None], "resnet18"))
        expected = (logits / TEMPERATURE).softmax(dim=1)
        np.testing.assert_allclose(answer, expected, atol=2e-3)


def test_onnx_says_what_it_is_and_not_where_it_was_made(run, onnx_folder):
    from onnxruntime import InferenceSession

    known = InferenceSession(onnx_folder / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == list(run.config.classes)
    assert "uint8 RGB" in known["preprocessing"]
    assert json.loads(known["warnings"]) == [WARNING]
    content = (onnx_folder / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(export.__file__).parent).encode() not in content


def test_an_onnx_file_is_checked_and_timed(onnx_folder):
    said = (onnx_folder / "said.txt").read_text()
    assert re.search(r"Checked on \d+ validation images: .* at most \d\.\de-\d\d", said)
    assert re.search(r"ONNX Runtime [\d,.]+ images/s, PyTorch [\d,.]+ images/s", said)


def squeeze_without_antialiasing(self, images):
    pixels = images.permute(0, 3, 1, 2).float()
    inputs = nn.functional.interpolate(pixels, (self.size, self.size), mode="nearest") / 255
    return self.model((inputs - self.mean) / self.std).softmax(dim=1)


def scale_wrongly(self, images):
    pixels = nn.functional.interpolate(
        images.permute(0, 3, 1, 2), (self.size, self.size), mode="bilinear", antialias=True
    )
    return self.model((pixels.float() / 256 - self.mean) / self.std).softmax(dim=1)


@pytest.mark.parametrize(
    ("forward", "where"),
    [(squeeze_without_antialiasing, "resized"), (scale_wrongly, "same pixels")],
)
def test_an_onnx_file_that_answers_otherwise_is_not_kept(
    run, onnx_folder, tmp_path, monkeypatch, forward, where
):
    monkeypatch.setattr(export.PixelsToProbabilities, "forward", forward)
    with pytest.raises(BloodcellError, match=f"does not answer as PyTorch does.*{where}"):
        export_run(run, "onnx", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_onnx_needs_its_packages_and_images(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(
            BloodcellError,
            match=r"ONNX export needs the package onnxscript.*\n.*bloodcell-fastai\[export\]",
        ):
            export_run(run, "onnx", tmp_path)
    pytest.importorskip("onnxscript")
    gone = Run(shutil.copytree(run.path, tmp_path / "gone"))
    gone.start(gone.config, gone.table.assign(path="/nowhere.jpg"))
    with pytest.raises(BloodcellError, match="The validation images of gone are gone"):
        export_run(gone, "onnx")
    assert export_run(gone, "timm") == gone.path / "export" / "timm"


WITHOUT_THIS_PACKAGE = """
import json, os, sys
for name in ("bloodcell_fastai", "fastai"):
    sys.modules[name] = None
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(name + " can be imported")
import timm, torch
from PIL import Image

answers = {}
for folder, paths in json.loads(sys.argv[1]).items():
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    prepare = timm.data.create_transform(**config)
    images = torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths])
    with torch.inference_mode():
        answers[folder] = {
            "probabilities": model(images).softmax(dim=1).tolist(),
            "config": config,
            "labels": model.pretrained_cfg["label_names"],
            "classes": model.num_classes,
        }
    os.chdir(folder)
    exec(open("snippet.py").read())
print(json.dumps(answers))
"""


def write_framed(paths, folder: Path) -> list[str]:
    """The pictures as the networks saw them, for those who cannot frame them."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}.png" for number in range(len(paths))]
    for path, file in zip(paths, files, strict=True):
        framed(open_image(path), "cell").save(file)
    return list(map(str, files))


def test_timm_alone_predicts_what_the_run_does(run, vit, tmp_path, monkeypatch):
    """In a process that cannot import this package; so do the lines of the model card."""
    folders = {"plain": run, "vit": vit, "calibrated": run}
    for name, source in folders.items():
        if name == "calibrated":
            calibrate(monkeypatch)
        folder = export_run(source, "timm", tmp_path / name)
        shutil.copy(
            write_framed(source.expected.predictions.path, tmp_path / "seen")[0],
            folder / "cell.jpg",
        )
        (folder / "snippet.py").write_text(code_block(folder).replace("FOLDER", str(folder)))
    asked = {
        str(tmp_path / name): write_framed(
            source.expected.predictions.path, tmp_path / name / "seen"
        )
        for name, source in folders.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THIS_PACKAGE, json.dumps(asked)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *snippets, last = done.stdout.strip().splitlines()
    answers = json.loads(last)
    for (name, source), printed in zip(folders.items(), snippets, strict=True):
        answer = answers[str(tmp_path / name)]
        expected = source.expected.probabilities
        if name == "calibrated":
            expected = warmer(expected)
        np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
        best = np.argmax(answer["probabilities"], axis=1)
        predicted = source.expected.predictions.predicted.tolist()
        assert [answer["labels"][index] for index in best] == predicted
        assert answer["classes"] == len(answer["labels"]) == len(source.config.classes)
        assert answer["config"]["input_size"] == [3, 64, 64]
        assert answer["config"]["crop_mode"] == "squash"
        assert f"'{source.config.classes[0]}': {expected[0, 0]:.3f}"[:-1] in printed
    means = [answers[str(tmp_path / name)]["config"]["mean"] for name in ("plain", "vit")]
    assert means == [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]]


def test_timm_is_told_the_size_only_where_it_asks(run, vit, tmp_path):
    texts = {}
    for source in (run, vit):
        export_run(source, "timm", tmp_path / source.name)
        texts[source.name] = json.loads((tmp_path / source.name / "config.json").read_text())
    assert "img_size" not in texts["one"].get("model_args", {})
    assert texts["vit"]["model_args"]["img_size"] in (64, [64, 64])
    described = texts["one"]["pretrained_cfg"]
    assert (described["first_conv"], described["classifier"]) == ("conv1", "fc")
    assert not {"tag", "license", "url", "hf_hub_id"} & described.keys()
    assert texts["one"]["num_features"] == 512
    assert texts["one"]["global_pool"] == "avg"


def test_fastai_loads_its_pickle(run, calibrated, tmp_path, capsys):
    export_run(run, "fastai", tmp_path)
    assert "runs whatever it contains" in capsys.readouterr().err
    learn = load_learner(tmp_path / "export.pkl")
    first = run.expected.predictions.iloc[0]
    with learn.no_bar():
        label, _, probabilities = learn.predict(first.path)
    expected = warmer(run.expected.probabilities[:1])[0]
    assert label == first.predicted
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_only_a_linear_classifier_takes_up_the_temperature():
    model = SimpleNamespace(get_classifier=lambda: (nn.Linear(2, 2), nn.Linear(2, 2)))
    export.divide_by_temperature(model, 1.0, "two_heads")
    with pytest.raises(BloodcellError, match=r"two_heads.*\n.*--format onnx"):
        export.divide_by_temperature(model, 2.0, "two_heads")


def test_the_model_card(run, tmp_path, calibrated):
    scored = Run(shutil.copytree(run.path, tmp_path / "scored"))
    before = ModelCard.load(export_run(scored, "timm") / "README.md")
    assert "Not evaluated" in before.text
    assert before.data.eval_results is None
    write_results(scored, run.expected)
    card = ModelCard.load(export_run(scored, "timm") / "README.md")
    metrics = run.expected.metrics
    assert (card.data.library_name, card.data.license) == ("timm", None)
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["Accuracy per image"] == round(metrics["accuracy"], 4)
    assert results["Accuracy per photograph"] == round(metrics["photo_accuracy"], 4)
    assert f"| {metrics['accuracy']:.2%} |" in card.text
    for bound in metrics["photo_accuracy_ci95"]:
        assert f"{bound:.2%}" in card.text
    for name, row in metrics["per_class"].items():
        assert f"| {name} | {row['precision']:.4f} | {row['recall']:.4f} |" in card.text
    for words in (WARNING, "no medical\ndevice", "no validation image has a copy", "2.500"):
        assert words in card.text
    assert str(Path(run.config.data).parent) not in card.content
    assert "{{" not in card.content


def test_a_packed_run_is_checked_and_tells_what_it_is(run, tmp_path, capsys):
    folder = export_run(run, "ready", tmp_path / "mine")
    said = capsys.readouterr().out
    assert re.search(r"change a probability by at most [\d.]+e-0[3-9]\. \d\d\.\d MB", said), said
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license) == ("bloodcell-fastai", None)
    assert card.text.lstrip().startswith("# mine")
    for words in ("bloodcell predict IMAGES --run FOLDER", "bloodcell fit --data demo", WARNING):
        assert words in card.text
    assert "{{" not in card.content
    assert str(Path(run.config.data).parent) not in card.content
    shutil.rmtree(folder / "last")
    again = export_run(run, "ready", folder)  # over what is there
    assert (again / "last" / "finished.json").is_file()


def test_the_card_of_what_comes_with_the_package_names_its_images(shipped, tmp_path, monkeypatch):
    source = READY["pbc"]
    own = (shipped / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # its own folder is nobody's to write to
    folder = export_run(Run(shipped), "timm")
    assert folder == Path("pbc/export/timm")
    for card in (own, (folder / "README.md").read_text(encoding="utf-8")):
        assert ModelCard(card).data.license == "cc-by-4.0"
        for words in (
            source.citation,
            source.limits,
            "no medical\ndevice",
            "passes these weights on",
        ):
            assert words in card
    assert "Not evaluated" not in own


def test_the_card_of_a_model_that_started_from_it_names_its_images(run, tmp_path):
    started = Run(shutil.copytree(run.path, tmp_path / "started"))
    used = replace(run.config, pretrained=True, weights_used="pbc (blood cells)")
    started.start(used, run.table)
    card = model_card(started, "timm")
    assert f"(cc-by-4.0, trained on the images of {READY['pbc'].citation})" in card
    assert ModelCard(card).data.license is None


def test_weights_that_half_precision_spoils_are_not_kept(run, tmp_path, monkeypatch):
    def coarse(state):
        return {k: v.half().float().mul(8).round().div(8).to(v.dtype) for k, v in state.items()}

    monkeypatch.setattr(export, "half_precision", coarse)
    with pytest.raises(
        BloodcellError, match=r"In half precision the model answers otherwise.*0\.01"
    ):
        export_run(run, "ready", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["timm", "ready"])
def test_a_run_is_not_written_over(run, format):
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(BloodcellError, match="is the run itself, which would be written over"):
        export_run(run, format, run.path)
    assert (run.path / "config.json").read_bytes() == before


@pytest.fixture
def hub():
    """A stand-in for the Hugging Face Hub: it keeps what it is sent and checks nothing else."""
    requests, stored = [], {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, value: dict | None = None, status: int = 200) -> None:
            content = json.dumps(value or {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self):
            path, body = self.path.split("?")[0], self.body()
            requests.append((path, body, self.headers.get("Authorization")))
            home = f"http://{self.headers['Host']}"
            if path == "/api/repos/create":
                self.answer({"url": f"{home}/me/cells"})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path.endswith("/preupload/main"):
                names = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [self.upload_mode(name) for name in names]})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = [
                    item | {"actions": {"upload": {"href": f"{home}/store/{item['oid']}"}}}
                    for item in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif path.endswith("/commit/main"):
                self.answer({"commitUrl": f"{home}/me/cells/commit/1", "commitOid": "1" * 40})
            else:
                self.answer(status=404)

        def upload_mode(self, name: str) -> dict:
            mode = "lfs" if name.endswith("safetensors") else "regular"
            return {"path": name, "uploadMode": mode, "shouldIgnore": False}

        def do_PUT(self):
            stored[self.path.rsplit("/", 1)[1]] = self.body()
            self.answer()

        def do_GET(self):
            self.answer(status=404)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield SimpleNamespace(url=url, requests=requests, stored=stored)
    server.shutdown()
    server.server_close()


def test_a_model_is_pushed(run, hub, bloodcell, tmp_path):
    """To a stand-in: that the right files go where the Hub's client sends them, by Git LFS
    (not Xet), and no other; what the real Hub answers is not tested."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "private.txt").write_text("not to be uploaded")
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_stand_in",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = bloodcell("export", run.path, "--out", "out", "--push-to-hub", "me/cells", env=env)
    assert done.returncode == 0, done.stderr
    assert f"Uploaded: {hub.url}/me/cells" in done.stdout
    paths = [path for path, _, _ in hub.requests]
    assert paths[0] == "/api/repos/create"
    assert json.loads(hub.requests[0][1])["name"] == "cells"
    assert {token for _, _, token in hub.requests} == {"Bearer hf_stand_in"}
    (commit,) = [body for path, body, _ in hub.requests if path.endswith("/commit/main")]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    assert sent == {n: (tmp_path / "out" / n).read_bytes() for n in ("README.md", "config.json")}
    assert b'"hf-hub:me/cells"' in sent["README.md"]
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    (large,) = [line["value"] for line in lines if line["key"] == "lfsFile"]
    assert (large["path"], large["oid"]) == (
        "model.safetensors",
        hashlib.sha256(weights).hexdigest(),
    )
    assert hub.stored == {large["oid"]: weights}


def test_a_push_that_cannot_be(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(export, "get_token", lambda: None)
    with pytest.raises(BloodcellError, match=r"no Hugging Face token.*\n.*hf auth login"):
        export_run(run, "timm", tmp_path / "out", "me/cells")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export, "get_token", lambda: "hf_stand_in")
    for format, name in (("onnx", "me/cells"), ("timm", "cells"), ("timm", "me/bad name")):
        with pytest.raises(BloodcellError, match="--push-to-hub") as refused:
            export_run(run, format, tmp_path / "out", name)
        assert refused.value.exit_code == 2
    with pytest.raises(
        BloodcellError, match="The Hugging Face Hub did not take me/cells"
    ) as refused:
        export_run(run, "timm", tmp_path / "out", "me/cells")
    assert "hf auth whoami" in refused.value.hint
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_cannot_be_exported(run, tmp_path):
    with pytest.raises(BloodcellError, match="onnx, timm, fastai") as refused:
        export_run(run, "tflite")
    assert refused.value.exit_code == 2
    empty = Run(tmp_path)
    empty.start(run.config, run.table)
    with pytest.raises(BloodcellError, match="no model yet"):
        export_run(empty)
