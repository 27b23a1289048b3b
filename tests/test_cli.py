"""The commands: what they print, what they call, and how they fail."""

import io
import os
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from PIL import Image
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

import bloodcell_fastai
from bloodcell_fastai import BloodcellError, Config, Run, cli
from bloodcell_fastai.config import ResolvedConfig, flags
from bloodcell_fastai.errors import UsageError
from bloodcell_fastai.evaluation import cross_validation, interpretation
from bloodcell_fastai.model.runs import all_runs
from bloodcell_fastai.serving import app, export
from bloodcell_fastai.training import train

CHECKOUT = Path(__file__).resolve().parents[1]
PANELS = ["Data", "Model", "Training", "Augmentation", "Run"]
COMMANDS = ["data", "audit", "fit", "interpret", "predict", "export", "serve"]
LITE0 = "tf_efficientnet_lite0"


def test_help_lists_every_command_with_a_line(bloodcell):
    done = bloodcell("--help", env={"COLUMNS": "120"})
    assert done.returncode == 0
    for name in COMMANDS:
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"│ {name} ")]
        assert len(lines) == 1, name
        assert len(lines[0].split()) > 5, name


@pytest.fixture(scope="module")
def fit_help() -> str:
    done = CliRunner().invoke(
        cli.app, ["fit", "--help"], terminal_width=100, env={"COLUMNS": "100"}
    )
    assert done.exit_code == 0
    return done.output


def test_the_help_of_fit_fits_a_screen(fit_help):
    assert len(fit_help.splitlines()) <= 48
    assert max(map(len, fit_help.splitlines())) <= 100
    assert re.findall(r"─ (\w+) ─", fit_help) == ["Options", *PANELS]


def test_the_help_of_fit_has_every_option_in_its_panel(fit_help):
    for name, field in Config.model_fields.items():
        panel = fit_help.partition(f"─ {field.title} ─")[2].partition("╰─")[0]
        (row,) = re.findall(rf"^│ {flags(name)[0]}\b.*?(?=^│ --|\Z)", panel, re.M | re.S)
        told = " ".join(row.replace("│", " ").split())
        assert field.description in told
        assert f"[default: {field.default}]" in told or field.default == ""
    for flag in ("--name", "--runs", "--resume", "--dry-run"):
        assert f"│ {flag} " in fit_help.partition("─ Run ─")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_of_every_command_is_explained(command):
    for parameter in get_command(cli.app).commands[command].params:
        assert parameter.help, parameter.name
        assert parameter.help[-1] in ".…", parameter.name


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"]])
def test_help_does_not_import_torch(words):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom bloodcell_fastai.cli import app\n"
        f"assert CliRunner().invoke(app, {words}).exit_code == 0\n"
        "assert not {'torch', 'fastai', 'timm', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# A script that runs cli.py of the checkout, without the metadata that an installation writes.
NOT_INSTALLED = f"""
import runpy, sys
from importlib.metadata import Distribution, PackageNotFoundError
def find(name, known=Distribution.from_name):
    if name == "bloodcell-fastai":
        raise PackageNotFoundError(name)
    return known(name)
Distribution.from_name = find
sys.path.insert(0, {str(CHECKOUT)!r})
sys.argv[0] = "cli.py"
runpy.run_path({str(CHECKOUT / "cli.py")!r}, run_name="__main__")
"""


def run_not_installed(folder, *words) -> str:
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("words", "shown"), [(["--help"], "interpret"), (["data", "--clear-cache"], "MB of decoded")]
)
def test_a_checkout_that_is_not_installed_runs_the_same_commands(
    tmp_path, monkeypatch, words, shown
):
    monkeypatch.setenv("BLOODCELL_CACHE", str(tmp_path / "cache"))
    assert shown in run_not_installed(tmp_path, *words)


@pytest.mark.slow
def test_a_checkout_that_is_not_installed_trains_and_exports(demo_root, tmp_path):
    small = ("--arch", "test_resnet", "--weights", "none", "--size", 32, "--epochs", 1)
    run_not_installed(tmp_path, "fit", "--data", demo_root, *small, "--name", "mine")
    versions = Run(tmp_path / "runs" / "mine").config.versions
    assert f"bloodcell-fastai {bloodcell_fastai.__version__}" in versions
    run_not_installed(tmp_path, "export", "mine", "--format", "onnx", "--data", demo_root)


def test_a_user_whom_the_system_does_not_know(tmp_path):
    """As in a container that runs under any number: no $HOME, and no entry in the table of users.
    Libraries look for a home when they are imported."""
    code = (
        "import pwd, sys\n"
        "def unknown(number): raise KeyError(number)\n"
        "pwd.getpwuid = unknown\n"
        "sys.argv[0] = 'bloodcell'\n"
        "from bloodcell_fastai.cli import main\n"
        "try: main()\n"
        "finally: import kagglehub, huggingface_hub.constants as hub; print(hub.HF_HOME)\n"
    )
    hidden = ("HOME", "XDG_CACHE_HOME", "BLOODCELL_CACHE", "HF_HOME")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "--clear-cache"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    home = tmp_path / f"bloodcell_fastai-{os.getuid()}"
    assert f"removed from {home / '.cache' / 'bloodcell_fastai'}" in done.stdout
    assert str(home) in done.stdout.splitlines()[-1]
    assert not (tmp_path / "~").exists()


def test_the_version_has_one_source():
    """No module asks the metadata of an installation, which a checkout need not have."""
    source = Path(bloodcell_fastai.__file__)
    for path in source.parent.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"version\(.bloodcell-fastai.\)", text), path
        assert (bloodcell_fastai.__version__ in text) == (path == source), path


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run the command line in this process: its exit code and its lines on standard error."""

    def run(*words) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["bloodcell", *map(str, words)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("fit --batch-size 0", "bs is 0: input should be greater than or", "Change --batch-size"),
        ("fit --size big", "size is big: input should be a valid integer", "Change --size"),
        ("fit --split magic", "input should be 'photo', 'official' or", "Change --split"),
        ("fit --folds 2 --split random", "folds is 2 with split random", "Use --split photo or"),
        ("fit --resume --lr 0", "lr is 0: input should be greater than 0", "Change --lr"),
        ("interpret --subset TEST", "--subset is a part of --data, which is", "Give --data."),
        ("data --data gone", "No file or folder gone.", "Check --data."),
        ("fit --nonsense", "No such option: --nonsense", "See bloodcell fit --help."),
    ],
)
def test_errors_name_the_flags(fails, tmp_path, monkeypatch, words, message, hint):
    monkeypatch.chdir(tmp_path)
    code, (first, second) = fails(*words.split())
    assert code == (1 if words.startswith("data") else 2)
    assert first.startswith("Error: ")
    assert message in first
    assert second.startswith(f"Hint:  {hint}")


@pytest.mark.parametrize(
    ("command", "text", "shown"),
    [
        ("fit", "Check `data`.", "Check --data."),
        ("fit", "Use `bs=8` or less `size`.", "Use --batch-size 8 or less --size."),
        ("fit", "Another `name`, or `resume`.", "Another --name, or --resume."),
        ("predict", "Use `device=cuda:1`; see `run`.", "Use --device cuda:1; see --run."),
        ("interpret", "Name a `run`.", "Name a RUN."),
        ("predict", "Give `paths`.", "Give PATHS."),
        ("data", "Fewer `epochs`.", "Fewer --epochs."),
        ("serve", "Set `root_path=/x`.", "Set --root-path /x."),
        ("export", "`push_to_hub` is for `format=timm`.", "--push-to-hub is for --format timm."),
        ("fit", "In `blood_learner` it is `wd=0.1`.", "In `blood_learner` it is `wd=0.1`."),
        ("fit", "A lone ` and `a b` and ``.", "A lone ` and `a b` and ``."),
        ("fit", "[bold]no markup[/bold] :smile:", "[bold]no markup[/bold] :smile:"),
    ],
)
def test_arguments_of_the_library_are_shown_as_flags(
    fails, monkeypatch, capsys, command, text, shown
):
    """In errors, warnings and lines alike."""

    def fail(*_, **__):
        cli.TerminalReporter().say(text)
        cli.TerminalReporter().warn(text)
        printed = capsys.readouterr()
        assert printed.out == f"{shown}\n"
        assert f"│ {shown} " in printed.err
        raise BloodcellError(text, text)

    monkeypatch.setattr(typer.Typer, "__call__", fail)
    assert fails(command) == (1, [f"Error: {shown}", f"Hint:  {shown}"])


def test_what_timm_says_of_its_own_insides_is_not_shown(monkeypatch):
    """As it does when pbc's weights, of 128 px, are brought to 256 px."""
    monkeypatch.setattr(sys, "argv", ["bloodcell", "--help"])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            cli.main()
        for module in ("timm.layers.interpolate", "mine"):
            warnings.warn_explicit("slow", UserWarning, "x.py", 1, module)
    assert len(shown) == 1


@pytest.mark.slow
def test_from_images_to_report(bloodcell, demo_root, lite0_weights, tmp_path):
    """The whole way through the installed command; the figures must agree with one another."""
    done = bloodcell(
        *("fit", "--data", demo_root, "--split", "random", "--epochs", 2, "--name", "first"),
        *("--arch", LITE0, "--weights", lite0_weights, "--size", 64, "--batch-size", 16),
    )
    assert done.returncode == 0, done.stderr
    assert "Epoch [1/2]  Train Loss: " in done.stdout
    assert "Saved new best model with val_acc: " in done.stdout
    assert "Leakage" in done.stdout
    assert "\r" not in done.stdout
    run = tmp_path / "runs" / "first"

    done = bloodcell("interpret")
    assert done.returncode == 0, done.stderr
    assert "precision" in done.stdout
    for name in (
        *("config.json", "split.csv", "history.csv", "model.safetensors", "predictions.csv"),
        *("metrics.json", "report/index.html", "report/confusion_matrix.png", "report/curves.png"),
        *("report/top_losses.png", "report/classification_report.txt"),
    ):
        assert (run / name).stat().st_size > 0, name

    metrics = pd.read_json(run / "metrics.json", typ="series")
    predictions = pd.read_csv(run / "predictions.csv")
    history = pd.read_csv(run / "history.csv")
    split = pd.read_csv(run / "split.csv")
    matrix = np.array(metrics.confusion_matrix)
    valid = split[split.part == "valid"]
    assert matrix.sum() == len(valid) == len(predictions) == metrics.n_images
    assert metrics.accuracy == pytest.approx(np.trace(matrix) / matrix.sum())
    assert metrics.accuracy == pytest.approx(history.valid_accuracy.max(), abs=1e-4)
    supports = {name: row["support"] for name, row in metrics.per_class.items()}
    assert supports == valid.label.value_counts().sort_index().to_dict()
    assert predictions.filter(like="p_").sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-3)

    done = bloodcell("predict", demo_root / "dataset-master", "--out", "out.csv")
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "out.csv")) == 32


def test_it_predicts_right_after_installation(shipped, demo_root, tmp_path, monkeypatch, capsys):
    """Without a run, by the model that comes with the package, and says so beside the table."""
    monkeypatch.chdir(tmp_path)
    words = ["bloodcell", "predict", str(demo_root / "dataset-master"), "--out", "out.csv"]
    for extra in ([], ["--run", "pbc", "--resume"]):
        monkeypatch.setattr(sys, "argv", [*words, *extra])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        told = " ".join(printed.err.replace("│", " ").split())
        assert "PRETRAINED MODEL that ships with the package: pbc" in told
        assert "no medical device" in told
        assert "PRETRAINED" not in printed.out
    assert "32 were there already" in printed.out
    assert len(pd.read_csv("out.csv")) == 32
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_dry_run_writes_the_plan_and_stops(bloodcell, demo_root, tmp_path):
    done = bloodcell(
        *("fit", "--data", demo_root, "--dry-run", "--name", "plan", "--arch", "resnet18"),
        *("--weights", "none", "--size", 64, "--batch-size", 16, "--epochs", 3),
    )
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "runs" / "plan").glob("[!.]*"))
    assert names == ["config.json", "split.csv"]
    for word in ("Split", "Leakage", "Steps", "Time     about", "3 epochs"):
        assert word in done.stdout


@pytest.mark.slow
def test_random_weights_are_announced_and_remembered(bloodcell, demo_root, tmp_path):
    done = bloodcell(
        *("fit", "--data", demo_root, "--dry-run", "--arch", "resnet18", "--size", 64),
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": "no-cache"},
    )
    assert done.returncode == 0, done.stderr
    assert "RANDOM WEIGHTS" in done.stderr
    (run,) = all_runs(tmp_path / "runs")
    assert "RANDOM WEIGHTS" in run.config.warnings[0]


@pytest.mark.slow
def test_data_describes_and_draws(bloodcell, demo_root, tmp_path):
    done = bloodcell("data", "--data", demo_root)
    assert done.returncode == 0, done.stderr
    assert "TEST_SIMPLE" in done.stdout
    assert "320x240" in done.stdout
    with Image.open(tmp_path / "data" / "contact-sheet.png") as sheet:
        assert min(sheet.size) > 500


@pytest.mark.slow
def test_audit_finds_the_photographs_and_fit_uses_them(bloodcell, demo_root, tmp_path):
    copy = shutil.copytree(demo_root, tmp_path / "mine")
    (copy / "photos.csv").unlink()
    plan = ("fit", "--data", copy, "--dry-run", "--arch", "resnet18", "--weights", "none")
    small = ("--size", 64, "--batch-size", 16)
    done = bloodcell(*plan, *small, "--split", "random")
    assert "Leakage  unknown" in done.stdout
    assert "bloodcell audit" in done.stdout

    done = bloodcell("audit", "--data", copy, "--out", copy)
    assert done.returncode == 0, done.stderr
    assert "31 independent fields" in done.stdout
    assert (copy / "copies-random.png").is_file()

    done = bloodcell(*plan, *small, "--split", "random")
    assert "have a copy of their own photograph in training" in done.stdout
    done = bloodcell(*plan, *small)
    assert "Leakage  none" in done.stdout


def test_errors_are_two_lines_and_an_exit_code(bloodcell):
    """As the installed command gives them; test_errors.py drives all of them."""
    done = bloodcell("fit", "--resume")
    assert done.returncode == 1
    start, hint = done.stderr.strip().splitlines()
    assert start.startswith("Error: No unfinished run")
    assert hint.startswith("Hint:  ")


@pytest.mark.slow
def test_debug_shows_the_traceback(bloodcell):
    done = bloodcell("--debug", "interpret")
    assert "Traceback" in done.stderr
    assert done.returncode == 1


def test_a_reader_who_has_seen_enough_gets_no_error():
    """Such as head."""
    reader, writer = os.pipe()
    os.close(reader)
    command = Path(sys.executable).with_name("bloodcell")
    done = subprocess.run([command, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_decoded_images_are_removed_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOODCELL_CACHE", str(tmp_path))
    (tmp_path / "decoded.npy").write_bytes(bytes(3_000_000))
    done = CliRunner().invoke(cli.app, ["data", "--clear-cache"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("3 MB of decoded images removed")
    assert not (tmp_path / "decoded.npy").exists()


def test_a_long_table_is_cut_in_the_terminal(shipped, demo_root):
    images = demo_root / "dataset2-master/dataset2-master/images/TRAIN"
    n = len(list(images.rglob("*.jpeg")))
    done = CliRunner().invoke(cli.app, ["predict", str(images), "--run", "pbc"])
    assert done.exit_code == 0, done.output
    assert f"{n - cli.MOST_ROWS} more rows." in done.output
    assert f"{n} images predicted" in done.output


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_for_each_job_in_a_terminal_alone(terminal, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=screen, force_terminal=terminal, width=80))
    reporter = cli.TerminalReporter()
    for what in ("Decoding", "Searching"):
        for done in range(3):
            reporter.progress(what, done, 2)
    shown = screen.getvalue()
    assert ("Decoding" in shown, "Searching" in shown, "2/2" in shown) == (terminal,) * 3


@pytest.fixture
def calls(monkeypatch):
    """Replace functions of the library by ones that only note their arguments, those that are
    named last and as a dict."""
    noted = []

    def replace(module, *names: str, returns=None) -> list:
        def note(function: str, *args, **named):
            noted.append((function, *args, *([named] if named else [])))
            return returns

        for name in names:
            monkeypatch.setattr(module, name, partial(note, name))
        return noted

    return replace


def run_of(root: Path, data: Path, folds: int = 0) -> Run:
    """An unfinished run without a model, whose images were ``data/A/1.png`` and so on."""
    table = pd.DataFrame(
        {
            "path": [str(data / label / f"{n}.png") for label in "AB" for n in range(2)],
            "label": list("AABB"),
            "subset": "",
            "photo": "",
            "part": ["train", "valid"] * 2,
        }
    )
    asked = Config(data=str(data), folds=folds)
    run = Run.create(root, "mine")
    run.start(asked, ResolvedConfig(**asked.model_dump(), classes=("A", "B")), table)
    return run


def put_images(root: Path) -> None:
    for label in "AB":
        (root / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 20)).save(root / label / f"{number}.png")


@pytest.mark.parametrize("name", [[], ["--name", "mine"]])
def test_resume_says_where_the_images_are_now(calls, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run_of(Path("runs"), tmp_path / "old")
    noted = calls(train, "resume")
    done = CliRunner().invoke(cli.app, ["fit", "--resume", *name, "--data", "new"])
    assert done.exit_code == 0, done.output
    ((_, root, path, _, given),) = noted
    assert (root, Path(path), given) == (Path("runs"), Path("runs/mine"), {"data": "new"})


def test_resume_gets_the_options_that_were_given_and_no_default(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_of(Path("runs"), tmp_path / "old")
    noted = calls(train, "resume")
    words = "fit --resume --epochs 20 --device cpu --workers 0"  # 20 is the default too
    assert CliRunner().invoke(cli.app, words.split()).exit_code == 0
    assert noted[0][-1] == {"epochs": 20, "device": "cpu", "workers": 0}


def test_a_resumed_run_is_not_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["fit", "--resume", "--dry-run"])
    assert isinstance(done.exception, UsageError)
    assert "`dry_run` plans a new run" in done.exception.message


def test_folds_are_resumed_as_folds(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_of(Path("runs"), tmp_path / "old", folds=2)
    noted = calls(cross_validation, "resume_folds", returns=Run("runs/mine"))
    assert CliRunner().invoke(cli.app, ["fit", "--resume", "--data", "new"]).exit_code == 0
    ((_, run, _, given),) = noted
    assert given == {"data": "new"}
    assert (run.path, run.root) == (Path("runs/mine"), tmp_path / "new")


@pytest.mark.parametrize(
    ("old_is_there", "words", "expected"),
    [
        (False, [], "interpret_run"),
        (True, [], "interpret_external"),
        (False, ["--subset", "A"], "interpret_external"),
    ],
)
def test_interpret_finds_the_images_of_a_run_that_have_moved(
    calls, tmp_path, monkeypatch, old_is_there, words, expected
):
    monkeypatch.chdir(tmp_path)
    put_images(tmp_path / "new")
    if old_is_there:
        put_images(tmp_path / "old")
    run_of(Path("runs"), tmp_path / "old")
    noted = calls(interpretation, "interpret_run", returns=None)
    calls(interpretation, "interpret_external", returns=(None, None, Path("there")))
    monkeypatch.setattr(interpretation, "summarise", lambda *_: "Summary")
    done = CliRunner().invoke(cli.app, ["interpret", "mine", "--data", "new", *words])
    assert done.exit_code == 0, done.output
    ((name, run, *_),) = noted
    assert name == expected
    assert run.root == tmp_path / ("new" if name == "interpret_run" else "old")


def test_interpret_finds_the_images_of_a_run_in_a_zip(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_images(tmp_path / "new")
    shutil.make_archive("packed", "zip", tmp_path / "new")
    run_of(Path("runs"), tmp_path / "old")
    noted = calls(interpretation, "interpret_run")
    monkeypatch.setattr(interpretation, "summarise", lambda *_: "Summary")
    done = CliRunner().invoke(cli.app, ["interpret", "mine", "--data", "packed.zip"])
    assert done.exit_code == 0, done.output
    ((_, run, *_),) = noted
    assert all(Path(path).is_file() for path in run.table.path)


def test_export_and_serve_take_the_place_of_the_images(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_of(Path("runs"), tmp_path / "old")
    noted = calls(export, "export_run")
    calls(app, "serve")
    for words in (
        ["export", "mine", "--format", "onnx", "--data", "new", "--out", "x"],
        ["serve", "mine", "--data", "new", "--root-path", "/cells", "--port", "0"],
    ):
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, done.output
    (_, exported, *rest), (_, served, host, port, confidence, device, _, root_path) = noted
    assert exported.root == served.root == tmp_path / "new"
    assert rest[:3] == ["onnx", Path("x"), None]
    assert (host, port, confidence, device) == ("127.0.0.1", 0, 0.5, "auto")
    assert root_path == "/cells"


def test_unreadable_images_are_listed_with_the_reason(shipped, demo_root, tmp_path, fails):
    (tmp_path / "bad\nname.png").write_bytes(b"no image")
    good = next(demo_root.rglob("TRAIN/*/*.jpeg"))
    code, lines = fails("predict", good, tmp_path / "bad\nname.png", "--run", "pbc")
    assert code == 1
    assert lines[-2] == "Unreadable, left out (1):"
    assert re.match(r"  .*/bad\\nname\.png: \S", lines[-1])
