import io
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from bloodcell_fastai import Config, cli

COMMANDS = ["data", "audit", "fit", "interpret", "predict", "export", "serve"]
LITE0 = "tf_efficientnet_lite0"


def test_help_lists_every_command_with_a_line(bloodcell):
    done = bloodcell("--help", env={"COLUMNS": "120"})
    assert done.returncode == 0
    for name in COMMANDS:
        lines = [line for line in done.stdout.splitlines() if f" {name} " in line]
        assert len(lines) == 1, name
        assert len(lines[0].split()) > 5, name


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom bloodcell_fastai.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'fastai', 'timm', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_checkouts_cli_runs_the_same_commands():
    script = Path(__file__).parents[1] / "cli.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "interpret" in done.stdout


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
        assert "THE MODEL THAT COMES WITH THE PACKAGE: pbc" in told
        assert "no medical device" in told
        assert "PACKAGE" not in printed.out
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
    (config,) = tmp_path.glob("runs/*/config.json")
    assert "RANDOM WEIGHTS" in Config.load(config).warnings[0]


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
    assert (copy / "siblings-random.png").is_file()

    done = bloodcell(*plan, *small, "--split", "random")
    assert "have a copy of their own photograph in training" in done.stdout
    done = bloodcell(*plan, *small)
    assert "Leakage  none" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [(["fit", "--resume"], 1, "No unfinished run"), (["nonsense"], 2, "nonsense")],
)
def test_errors_are_two_lines_and_an_exit_code(bloodcell, args, code, message):
    """As the installed command gives them; test_errors.py drives all of them."""
    done = bloodcell(*args)
    assert done.returncode == code
    start, hint = done.stderr.strip().splitlines()
    assert start.startswith("Error: ")
    assert message in start
    assert hint.startswith("Hint:  ")


def test_debug_shows_the_traceback(bloodcell):
    done = bloodcell("--debug", "interpret")
    assert "Traceback" in done.stderr


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
