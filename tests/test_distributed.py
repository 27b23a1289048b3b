"""Several processes: real ones on two cores, as ``accelerate launch`` starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import convert_sync_batchnorm
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.distributed import agree, by_first, joined, rank, world_size

ARCH = "test_byobnet"
FIT = ["--arch", ARCH, "--weights", "first.safetensors", "--size", "32", "--batch-size", "8"]
PATIENCE = 240  # seconds; a fit of these takes about ten on two idle cores


class Job:
    """``accelerate launch`` of two processes in a folder."""

    def __init__(self, folder: Path, *args):
        launch = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch]
        command += ["-m", "bloodcell_fastai", *args]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"it hangs: {self.output[-2000:]}")

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + PATIENCE
        while text not in self.output:
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"no {text!r} in: {self.output[-2000:]}")
            time.sleep(0.1)

    def workers(self) -> list[psutil.Process]:
        """The processes that train, in the order of their ranks."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [(p.environ().get("RANK"), p) for p in found]
        return [p for number, p in sorted((n, p) for n, p in ranks if n is not None)]

    def kill(self) -> None:
        for process in (*self.workers(), self.process):
            process.kill()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with initial weights, so that the head trains alone first."""
    torch.manual_seed(0)
    save_file(timm.create_model(ARCH).state_dict(), tmp_path / "first.safetensors")
    return tmp_path


@pytest.mark.slow
def test_two_processes_train_one_run_and_a_killed_one_ends_the_job_which_is_resumed(
    folder, demo_root
):
    job = Job(folder, "fit", "--data", demo_root, *FIT, "--epochs", 30, "--name", "two")
    job.wait_for("Epoch [2/30]")  # the head alone, then everything
    job.workers()[1].kill()
    assert job.wait() != 0
    assert job.output.count("\nError: ") == 1
    assert (
        "Error: Another process of this job has ended or hangs.\n"
        "Hint:  Continue, started as before: bloodcell fit --resume --name two\n"
    ) in job.output
    run = folder / "runs" / "two"
    config = (run / "config.json").read_text()
    done = len(pd.read_csv(run / "history.csv"))
    assert 2 <= done < 30
    fewer = config.replace('"epochs": 30', f'"epochs": {done + 1}')
    (run / "config.json").write_text(fewer)
    job = Job(folder, "fit", "--resume", "--name", "two")
    assert job.wait() == 0, job.output
    assert job.output.count("Done. Next: bloodcell interpret two") == 1  # one of them speaks
    history = pd.read_csv(run / "history.csv")
    assert history.epoch.tolist() == list(range(1, done + 2))
    assert history.notna().all(axis=None)
    assert (run / "calibration.json").is_file()
    assert [path.name for path in (folder / "runs").iterdir()] == ["two"]


@pytest.mark.slow
def test_a_signal_stops_both_processes_after_the_same_batch(folder, demo_root):
    job = Job(folder, "fit", "--data", demo_root, *FIT, "--epochs", 500, "--name", "stopped")
    job.wait_for("Epoch [1/500]")
    job.process.send_signal(signal.SIGINT)
    assert job.wait() != 0
    assert job.output.count("Error: Stopped in epoch") == 1
    assert "bloodcell fit --resume --name stopped" in job.output


@pytest.mark.slow
def test_folds_of_two_processes(folder, demo_root):
    folds = ("--epochs", 1, "--freeze-epochs", 0, "--folds", 2, "--name", "folds")
    job = Job(folder, "fit", "--data", demo_root, *FIT, *folds)
    assert job.wait() == 0, job.output
    predictions = pd.read_csv(folder / "runs/folds/predictions.csv")
    assert predictions.path.is_unique and len(predictions) == 96  # without the test folder
    assert job.output.count("Accuracy per photograph") == 1


@pytest.mark.slow
def test_two_processes_predict_what_one_does_and_continue_what_others_left(
    trained, demo_root, tmp_path
):
    run = ("--run", trained.path, "--out")
    job = Job(tmp_path, "predict", demo_root, *run, "all.csv")
    assert job.wait() == 0, job.output
    assert job.output.count("168 images predicted: ") == 1
    whole = pd.read_csv(tmp_path / "all.csv")
    one = [sys.executable, "-m", "bloodcell_fastai", "predict", demo_root, *run, "one.csv"]
    subprocess.run(list(map(str, one)), cwd=tmp_path, check=True, timeout=PATIENCE)
    pd.testing.assert_frame_equal(whole, pd.read_csv(tmp_path / "one.csv"), atol=1e-2)
    assert not list(tmp_path.glob("*.part-*"))

    lines = (tmp_path / "all.csv").read_text().splitlines(keepends=True)
    (tmp_path / "all.csv").write_text("".join(lines[:11]))
    (tmp_path / "all.part-0002-of-0004.csv").write_text("".join([lines[0], *lines[9:31]]))
    (tmp_path / "all.part-of-mine.csv").write_text("kept")
    job = Job(tmp_path, "predict", demo_root, *run, "all.csv", "--resume")
    assert job.wait() == 0, job.output
    assert "138 images predicted: " in job.output
    assert "written to all.csv" in job.output
    assert "30 were there already" in job.output
    found = pd.read_csv(tmp_path / "all.csv")
    assert found.path.tolist() == whole.path.tolist()
    assert [path.name for path in tmp_path.glob("*.part-*")] == ["all.part-of-mine.csv"]


def test_without_a_launcher_a_process_is_alone():
    with joined():
        assert (rank(), world_size()) == (0, 1)
    assert agree(lambda: 3) == 3
    written = []
    by_first(written.append)(1)
    assert written == [1]


def test_without_accelerate_an_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(BloodcellError, match="which needs Accelerate") as caught, joined():
        pass
    assert "bloodcell-fastai[distributed]" in caught.value.hint


def test_timms_conversion_of_norms_keeps_the_activations():
    """As used on CUDA, which no test reaches: torch's loses them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), BatchNormAct2d(5), nn.BatchNorm2d(5)).eval()
    x = torch.randn(2, 3, 4, 4)
    before = model(x)
    convert_sync_batchnorm(model)
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in model[1:])
    torch.testing.assert_close(model(x), before)
