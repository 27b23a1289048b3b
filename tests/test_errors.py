"""Every error of the commands: two lines, what is wrong and what to do, and an exit code."""

import ast
import json
import os
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file

import bloodcell_fastai
from bloodcell_fastai import BloodcellError, cli, split_table
from bloodcell_fastai.data import splits
from bloodcell_fastai.model import model, pretrained

PACKAGE = Path(bloodcell_fastai.__file__).parent
RUN = Path("runs/mine")
SMALL = "--arch resnet18 --weights none --size 64 --batch-size 16"
FIT = f"fit --data DEMO --dry-run {SMALL}"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, demo_root):
    """Run a command line in this process: its exit code and its lines on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(line: str | list[str]) -> tuple[int, list[str]]:
        words = line.split() if isinstance(line, str) else line
        words = [str(demo_root) if word == "DEMO" else word for word in words]
        monkeypatch.setattr(sys, "argv", ["bloodcell", *words])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture
def run_folder(tmp_path, trained) -> Path:
    return Path(shutil.copytree(trained.path, tmp_path / RUN))


def images(*folders: str, n: int = 4) -> None:
    for folder in folders:
        Path(folder).mkdir(parents=True)
        for number in range(n):
            Image.new("RGB", (20, 20), (number * 9, 80, 80)).save(Path(folder, f"{number}.png"))


def text(path: str, content: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)


def edit(name: str, **values) -> None:
    path = RUN / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def resolved(**values) -> None:
    path = RUN / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"resolved": config["resolved"] | values}))


def archive(name: str = "A/1.png", **member) -> None:
    with zipfile.ZipFile("x.zip", "w") as zipped:
        info = zipfile.ZipInfo(name)
        for field, value in member.items():
            setattr(info, field, value)
        zipped.writestr(info, b"x")


def encrypted() -> None:
    archive()
    content = bytearray(Path("x.zip").read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    Path("x.zip").write_bytes(content)


def tensors(path: str, **values) -> None:
    save_file({name: value.contiguous() for name, value in values.items()}, path)


def gone_images() -> None:
    table = (RUN / "split.csv").read_text()
    (RUN / "split.csv").write_text(table.replace(".jpeg", ".gone").replace(".jpg", ".gone"))


def other_label() -> None:
    table = (RUN / "split.csv").read_text()
    (RUN / "split.csv").write_text(table.replace(",LYMPHOCYTE,", ",LYMPHOMA,"))


def short_reference() -> None:
    listed = RUN / "reference.csv"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[:-1]))


def other_weights() -> None:
    state = load_file(RUN / "model.safetensors")
    save_file(state | {"conv1.weight": torch.zeros(1)}, RUN / "model.safetensors")


def unfinished() -> None:
    (RUN / "last" / "finished.json").unlink()
    (RUN / "last" / "checkpoint.safetensors").write_bytes(b"x")


LINK = 0o120777 << 16

# Command line; what is there before; message and hint, as regular expressions; exit code.
DATA_ERRORS = [
    ("data --data gone", None, "No file or folder gone", "Check --data", 1),
    ("data --data x", lambda: Path("x").mkdir(), "No images in .*/x", "one folder of images", 1),
    ("data --data x", lambda: images("x/A"), "Only one class in .*/x: A", "one sub-folder per", 1),
    (
        "data --data x.zip",
        lambda: text("x.zip", "no"),
        "is neither a zip nor a tar",
        "Download it again",
        1,
    ),
    (
        "data --data x",
        lambda: os.mkfifo("x"),
        "x is neither a folder nor an archive of images",
        "Give a zip",
        1,
    ),
    (
        "data --data x",
        lambda: (images("x/A", "x/B"), text("x/A/9.png", "no")),
        "1 of 9 images cannot be read, such as .*/x/A/9.png",
        "Copy damaged files again",
        1,
    ),
    (
        "data --data x",
        lambda: (images("x/A", "x/B"), Path("x/B/9.png").symlink_to("../A/1.png")),
        "One image has two labels: .* are the same file",
        "Remove the link",
        1,
    ),
    (
        "data --data x.zip",
        lambda: archive("../x"),
        "x.zip would write outside its folder",
        "Do not",
        1,
    ),
    (
        "data --data x.zip",
        lambda: archive(external_attr=LINK),
        "x.zip holds a link",
        "Do not use",
        1,
    ),
    ("data --data x.zip", encrypted, "x.zip is encrypted", "Unpack it yourself", 1),
    (
        "data --data x.zip",
        lambda: archive("é" * 200),
        "holds a name of more than 255",
        "Shorten",
        1,
    ),
    (
        "data --data x.zip",
        lambda: (archive(), Path("x.zip").write_bytes(b"?" * 40 + Path("x.zip").read_bytes()[40:])),
        "x.zip is not a zip that can be unpacked",
        "Download it again",
        1,
    ),
    (
        f"fit --data x --dry-run {SMALL}",
        lambda: (images("x/A", "x/B"), text("x/photos.csv", "path\n1\n")),
        "photos.csv has 0 columns photo",
        "bloodcell audit",
        1,
    ),
    (
        f"fit --data x --dry-run {SMALL}",
        lambda: (images("x/A", "x/B"), text("x/photos.csv", "path,photo\nA/1.png,a\nA/1.png,b\n")),
        "photos.csv holds a path twice",
        "bloodcell audit",
        1,
    ),
]
SPLIT_ERRORS = [
    (
        f"fit --data x --split official {SMALL}",
        lambda: images("x/A", "x/B"),
        "has no folders of its own for training and validation",
        "--split photo",
        1,
    ),
    (
        f"fit --data x --split official {SMALL}",
        lambda: images("x/train/A", "x/train/B", "x/test/A", "x/test/C"),
        "Only in validation, never in training: C",
        "Rename the folder",
        1,
    ),
    (
        f"fit --data x --split official {SMALL}",
        lambda: images("x/train/A", "x/test/A", "x/other/B", "x/test/B"),
        "Only in validation, never in training: B",
        "Rename the folder",
        1,
    ),
    (
        f"fit --data x --split random {SMALL}",
        lambda: (images("x/A"), images("x/B", n=1)),
        "Class B has a single image, too few to split",
        "Add images",
        1,
    ),
    (
        f"fit --data x {SMALL}",
        lambda: (images("x/A"), images("x/B", n=1)),
        "Class B has a single photograph or patient, which cannot be on both sides of a split",
        "Add photographs",
        1,
    ),
    (
        f"fit --data x --folds 9 {SMALL}",
        lambda: images("x/A", "x/B"),
        "Class A has 4 photographs, too few for 9 folds",
        "--folds 4 or fewer",
        1,
    ),
]
OPTION_ERRORS = [
    ("nonsense", None, "No such command 'nonsense'", "See bloodcell --help", 2),
    ("fit --nonsense", None, "No such option", "See bloodcell fit --help", 2),
    ("serve --port many", None, "Invalid value for '--port'", "See bloodcell serve --help", 2),
    ("predict", None, "Missing argument", "See bloodcell predict --help", 2),
    ("fit --epochs 0", None, "epochs is 0: input should be greater than", "Change --epochs", 2),
    (
        "fit --epochs many",
        None,
        "epochs is many: input should be a valid integer",
        "Change --epochs",
        2,
    ),
    ("fit --lr -1", None, "lr is -1: input should be greater than 0", "Change --lr", 2),
    ("fit --lr fast", None, "lr is fast: input should be a valid number", "Change --lr", 2),
    ("fit --size 7", None, "size is 7: input should be greater than or equal", "Change --size", 2),
    (
        "fit --batch-size 65536 --size 4096",
        None,
        "bs is 65536 with size 4096; no memory holds such a batch",
        "smaller --batch-size or --size",
        2,
    ),
    (
        "fit --split best",
        None,
        "split is best: input should be 'photo', 'official' or 'random'",
        "Change --split",
        2,
    ),
    ("fit --folds 1", None, "folds is 1; it must be 0 or at least 2", "Change --folds", 2),
    (
        "fit --folds 3 --split random",
        None,
        "folds is 3 with split random; folds are made by photograph",
        "Use --split photo or leave out --folds",
        2,
    ),
    (
        "fit --epochs 2 --freeze-epochs 2",
        None,
        "freeze_epochs is 2; it must be less than epochs, 2",
        "more --epochs or fewer --freeze-epochs",
        2,
    ),
    (f"{FIT} --arch resnat18", None, "timm has no architecture 'resnat18'", "Did you mean", 2),
    (f"{FIT} --arch hf-hub:a/b", None, "timm has no architecture 'hf-hub:a/b'", "", 2),
    (
        f"{FIT} --arch maxvit_nano_rw_256 --size 100",
        None,
        "maxvit_nano_rw_256 cannot take 100 px",
        "--size 96 or 128",
        2,
    ),
    (f"{FIT} --weights gone.pth", None, "No weights file gone.pth", "Use auto, pbc, imagenet", 1),
    (
        f"{FIT} --weights x.pth",
        lambda: text("x.pth", "no"),
        "x.pth is damaged or holds more than tensors",
        "state_dict",
        1,
    ),
    (
        f"{FIT} --weights x.pth",
        lambda: torch.save([torch.ones(1)], "x.pth"),
        "x.pth is not a table of tensors",
        "state_dict",
        1,
    ),
    (
        f"{FIT} --weights x.safetensors",
        lambda: tensors("x.safetensors", a=torch.ones(1)),
        "x.safetensors does not fit the architecture: of its .* are missing",
        "Give the --arch that",
        1,
    ),
    (
        f"{FIT} --bs 1 --size 32",
        None,
        "resnet18 normalises over the images of a batch, and bs is 1",
        "--batch-size 2 or more, or a larger --size",
        2,
    ),
    (f"{FIT} --device tpu", None, "No device 'tpu' here", "--device auto", 1),
    (f"{FIT} --device meta", None, "No device 'meta' here", "--device auto", 1),
    (
        f"{FIT} --arch maxvit_tiny_pm_256 --weights imagenet",
        None,
        "No ImageNet weights for maxvit_tiny_pm_256: timm has no weights for it",
        "or use --weights none",
        1,
    ),
    (f"{FIT} --name a/b", None, "'a/b' cannot name a run", "letters, digits", 2),
    ("fit --resume", None, "No unfinished run in runs/", "bloodcell fit", 1),
    ("interpret", None, "No trained run in runs/", "bloodcell fit", 1),
    ("interpret gone", None, "gone is not a run, nor is runs/gone", "Runs here: none", 1),
    ("audit --data DEMO --run gone", None, "gone is not a run", "Runs here", 1),
]
RUN_ERRORS = [
    (
        "interpret --data x",
        lambda: images("x/BLAST", "x/ARTEFACT"),
        "x has no class of the model",
        "knows EOSINOPHIL, .* has ARTEFACT, BLAST. Rename its folders",
        1,
    ),
    (
        "interpret --data x --subset TEST",
        lambda: images("x/train/EO", "x/train/LY", "x/valid/EO"),
        "The data set has no subset TEST",
        "classes are: train, valid",
        1,
    ),
    ("interpret --subset TEST", None, "--subset is a part of --data", "Give --data", 2),
    (
        "audit --data x --run mine",
        lambda: images("x/A", "x/B"),
        "Run mine was not validated on images of .*/x",
        "Check --data",
        1,
    ),
    (f"{FIT} --name mine", None, "There is a run named mine in runs", "another --name", 1),
    ("fit --resume", None, "No unfinished run in runs/", "bloodcell fit", 1),
    (
        "fit --resume --name mine",
        None,
        "Run mine came to its end after 1 epochs",
        "interpret mine",
        1,
    ),
    (
        "fit --resume",
        unfinished,
        "checkpoint.safetensors cannot be resumed: it is damaged",
        "--name",
        1,
    ),
    (
        "interpret",
        lambda: text(f"{RUN}/config.json", "{"),
        "config.json is not JSON",
        "folder of a run",
        1,
    ),
    (
        "interpret",
        lambda: text(f"{RUN}/config.json", "[1]"),
        "config.json holds no JSON object",
        "folder of a run",
        1,
    ),
    (
        "interpret",
        lambda: edit("config.json", more={}),
        "config.json does not hold the tables asked and resolved",
        "folder of a run",
        1,
    ),
    ("interpret", lambda: resolved(evil=1), "config.json: evil is not an option", "edited", 1),
    (
        "interpret",
        lambda: resolved(size="x"),
        "config.json: size is x: input should be a valid integer",
        "edited",
        1,
    ),
    (
        "interpret",
        lambda: resolved(data="\0"),
        "config.json: data is .*: input should have at most 4096 characters",
        "edited",
        1,
    ),
    (
        "predict DEMO",
        lambda: resolved(classes=["A", "B"]),
        "classes in config.json lists 2 names, but .* has 4 outputs",
        "edited",
        1,
    ),
    (
        "predict DEMO",
        lambda: resolved(classes=["A", "B", "C", "D"]),
        "classes in config.json are not those of",
        "edited.* in this order",
        1,
    ),
    (
        "predict DEMO",
        lambda: resolved(classes=["A", "A", "C", "D"]),
        "config.json: classes holds a name twice",
        "edited",
        1,
    ),
    (
        "predict DEMO",
        lambda: resolved(classes=["A", "..", "C", "D"]),
        r"config.json: classes holds '\.\.'; it must be the name of a folder",
        "edited",
        1,
    ),
    (
        "interpret",
        lambda: resolved(folds=3),
        "Run mine has 3 models, one for each fold",
        "mine/fold-1",
        1,
    ),
    (
        "interpret",
        lambda: (RUN / "model.safetensors").unlink(),
        "Run mine has no model yet",
        "bloodcell fit",
        1,
    ),
    (
        "interpret mine",
        lambda: (RUN / "split.csv").unlink(),
        "split.csv is missing",
        "bloodcell fit",
        1,
    ),
    (
        "interpret",
        lambda: text(f"{RUN}/split.csv", "path\n1\n"),
        "split.csv has 0 columns label",
        "bloodcell fit",
        1,
    ),
    (
        "interpret",
        lambda: text(f"{RUN}/split.csv", "path,label,subset,photo,part\n1,2\n"),
        "split.csv is not a CSV table: it has rows of another length than its header",
        "bloodcell fit",
        1,
    ),
    (
        "interpret",
        lambda: text(f"{RUN}/split.csv", "path,label,subset,photo,part\n\0\n"),
        "split.csv is not a CSV table: it holds zero bytes",
        "bloodcell fit",
        1,
    ),
    (
        "interpret",
        lambda: text(f"{RUN}/split.csv", ""),
        "split.csv is not a CSV table: not enough values",
        "bloodcell fit",
        1,
    ),
    (
        "interpret",
        lambda: text(
            f"{RUN}/history.csv",
            "epoch,train_loss,train_accuracy,valid_loss,valid_accuracy,lr,seconds\nx,1,1,1,1,1,1\n",
        ),
        "history.csv: a value of epoch is no number",
        "edited",
        1,
    ),
    (
        "interpret",
        lambda: text(f"{RUN}/split.csv", "path,label,subset,photo,part\n1,2,3,4,\n"),
        "Run mine has no validation images",
        "bloodcell fit",
        1,
    ),
    (
        "interpret --data DEMO --stress",
        None,
        "--stress is for a run's own images",
        "Leave out --data or --stress",
        2,
    ),
    (
        "interpret",
        gone_images,
        "images are gone, such as",
        "Put the data back to .*, or say where it is now: --data",
        1,
    ),
    ("interpret", other_label, "Not a class of this model: LYMPHOMA", "rename the folders", 1),
    (
        "interpret",
        other_weights,
        "does not fit the architecture: .* have another shape",
        "--arch",
        1,
    ),
    (
        "interpret",
        lambda: edit("calibration.json", temperature=-1),
        "calibration.json: temperature is -1",
        "Calibrate it anew",
        1,
    ),
    (
        "predict DEMO",
        lambda: text(f"{RUN}/calibration.json", "{"),
        "calibration.json is not JSON",
        "Calibrate it anew",
        1,
    ),
    ("predict DEMO", short_reference, "reference.csv do not belong together", "Calibrate it", 1),
    (
        "predict DEMO",
        lambda: tensors(
            f"{RUN}/reference.safetensors",
            features=load_file(RUN / "reference.safetensors")["features"][:, :3],
        ),
        "reference.safetensors has 3 features an image, the model 512",
        "calibrate anew",
        1,
    ),
    ("predict DEMO --min-confidence 2", None, "min_confidence is 2.0", "from 0 to 1", 2),
    ("predict gone.jpg", None, "No file or folder gone.jpg", "Check the path", 1),
    ("predict DEMO --out x.txt", None, "Cannot write x.txt", r"ends in \.csv or \.jsonl", 2),
    (
        "predict DEMO --out x.csv --resume",
        lambda: text("x.csv", "a,b\n1,2\n"),
        "x.csv holds predictions of another kind",
        "Give another --out, or leave out --resume",
        1,
    ),
    (
        "predict x.png",
        lambda: text("x.png", "no"),
        "There is no readable image",
        "Give image files or folders",
        1,
    ),
    ("export --format pdf", None, "format is 'pdf'", "Use one of", 2),
    (f"export --out {RUN}", None, "mine is the run itself", "Give another --out", 2),
    ("export --format onnx --push-to-hub a/b", None, "--push-to-hub does not take onnx", "timm", 2),
    ("export --push-to-hub a", None, "--push-to-hub names no repository", "USER/NAME", 2),
    (
        "export",
        lambda: text(f"{RUN}/metrics.json", '{"photo_accuracy": 2}'),
        "metrics.json: photo_accuracy is 2",
        "interpret mine",
        1,
    ),
]


PRETRAINED_ERRORS = [
    (
        f"{FIT} --arch resnet34 --weights pbc",
        None,
        "The pretrained weights pbc are for resnet18, not for resnet34",
        "Use --arch resnet18, or other --weights",
        2,
    ),
    ("interpret", None, "No trained run in runs/", "bloodcell fit", 1),
    ("interpret pbc", None, "pbc ships with the package, without the", "--data FOLDER", 1),
    ("predict DEMO --run gone", None, "gone is not a run", "Pretrained models: pbc", 1),
    (
        "export --format bundle",
        None,
        "The validation images of pbc are gone",
        "Put the data back to demo",
        1,
    ),
    (
        "predict DEMO",
        lambda: (pretrained.FOLDER / "pbc" / "model.safetensors").unlink(),
        "The pretrained model pbc is missing from this installation",
        "pip install --force-reinstall bloodcell-fastai",
        1,
    ),
]


def check(command, line: str, prepare, message: str, hint: str, code: int) -> None:
    if prepare:
        prepare()
    ended, lines = command(line)
    assert lines[-1].startswith("Hint:  "), lines
    assert lines[-2].startswith("Error: "), lines
    assert re.search(message, lines[-2]), lines
    assert re.search(hint, lines[-1]), lines
    assert ended == code
    assert "Traceback" not in "".join(lines)
    assert "Unexpected" not in lines[-2]


@pytest.mark.parametrize(
    ("line", "prepare", "message", "hint", "code"), [*DATA_ERRORS, *SPLIT_ERRORS, *OPTION_ERRORS]
)
def test_without_a_run(command, line, prepare, message, hint, code):
    check(command, line, prepare, message, hint, code)


@pytest.mark.parametrize(("line", "prepare", "message", "hint", "code"), RUN_ERRORS)
def test_with_a_run(command, run_folder, line, prepare, message, hint, code):
    check(command, line, prepare, message, hint, code)


@pytest.mark.parametrize(("line", "prepare", "message", "hint", "code"), PRETRAINED_ERRORS)
def test_with_the_pretrained_model(
    command, shipped, tmp_path, monkeypatch, line, prepare, message, hint, code
):
    shutil.copytree(shipped, tmp_path / "weights" / "pbc")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "weights")
    check(command, line, prepare, message, hint, code)


def test_ctrl_c(command, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(typer.Typer, "__call__", stop)
    assert command("fit") == (
        130,
        ["Error: Stopped.", "Hint:  Continue a fit with: bloodcell fit --resume"],
    )


def test_what_nobody_expected(command, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("line one\nline two \x1b[31m")

    monkeypatch.setattr(typer.Typer, "__call__", fail)
    code, lines = command("fit")
    assert code == 1
    assert lines[0] == "Error: Unexpected: ZeroDivisionError: line one"
    assert re.fullmatch(
        "Hint:  Run it again as bloodcell --debug .* report what it shows.", lines[1]
    )


def test_debug_lets_every_error_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bloodcell", "--debug", "interpret"])
    with warnings.catch_warnings(), pytest.raises(BloodcellError):
        cli.main()


def test_a_name_gives_the_terminal_no_orders(command):
    name = "x\x1b[31m[red]:smile:\n/tmp"
    code, lines = command(["data", "--data", name])
    assert code == 1
    assert "\x1b" not in "".join(lines)
    assert len(lines) == 2


def test_weights_that_only_the_hub_has(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(model, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(model, "get_hf_file_metadata", unreachable)
    reason = r"for resnet18: Hugging Face cannot be reached \(no network\)\."
    with pytest.raises(BloodcellError, match=f"No ImageNet weights {reason}"):
        model.load_model("resnet18", 2, 64, "imagenet")


def test_a_model_that_torch_cannot_write_as_a_graph(command, run_folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    code, lines = command("export --format onnx")
    assert code == 1
    assert lines[-2] == "Error: torch cannot convert resnet18 to ONNX: no such operator"
    assert lines[-1] == "Hint:  Use --format timm."


def test_a_split_without_images_to_validate_on(demo_table, monkeypatch):
    class EmptyFold:
        def __init__(self, *args, **kwargs):
            pass

        def split(self, images, labels, groups):
            yield range(len(images)), []

    monkeypatch.setattr(splits, "StratifiedGroupKFold", EmptyFold)
    with pytest.raises(BloodcellError, match="No image is left for validation"):
        split_table(demo_table)


# --- No error without a test ------------------------------------------------------------------

# The message among the arguments of each class and function that makes an error.
MAKERS = {
    **dict.fromkeys(["BloodcellError", "UsageError", "DataError"], 0),
    **dict.fromkeys(["MissingFileError", "NoNetworkError"], 0),
    **{"NoHeatMap": 0, "_unusable": 1, "_unsafe": 1},
}
FEWEST = 8  # characters that tell one message from another


def words(node: ast.expr) -> list[str]:
    """The constant pieces of a message, without arguments, which the command line renames."""
    texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    pieces = [p for text in texts if isinstance(text, str) for p in re.split("`[^`]*`", text)]
    return [piece.strip(" .:,") for piece in pieces]


def raised() -> Iterator[tuple[str, list[str]]]:
    """Every error the package makes: where, and the pieces of its message."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            place = MAKERS.get(node.func.id)
            if place is not None and len(node.args) > place:
                pieces = [p for p in words(node.args[place]) if len(p) >= FEWEST]
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", pieces


def expected() -> set[str]:
    """The messages that tests look for: their strings, taken apart where a pattern is free."""
    found = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces = re.split(r"\||\.\*|\d+", node.value.replace("\\", ""))
                found |= {piece.strip(" .:,") for piece in pieces}
    return {piece for piece in found if len(piece) >= FEWEST}


def test_every_error_is_looked_for_in_a_test():
    """A new error needs a row above or a test of its own that matches words of its message."""
    seen = expected()
    untested = [
        (place, pieces)
        for place, pieces in raised()
        if pieces
        and not any(
            piece in known or (" " in known and known in piece)
            for piece in pieces
            for known in seen
        )
    ]
    assert untested == []
    assert len(list(raised())) > 70
