import os
import shutil
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
from safetensors.torch import load_file, save_file
from timm.layers import convert_sync_batchnorm
from timm.layers.norm_act import BatchNormAct2d
from torch import distributed, nn

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.processes import Share, agree, by_first, gather, joined, sharing_batches
from bloodcell_fastai.serving import inference
from bloodcell_fastai.training.distributed import restore_norms, share_norms

# In double precision, where the order of a sum does not grow into another training.
IN_DOUBLE = """
from fastai.vision.all import Callback
import bloodcell_fastai.training.callbacks as callbacks
import bloodcell_fastai.training.workflow as workflow
from bloodcell_fastai.cli import main

class Double(Callback):
    def before_batch(self):
        self.learn.xb = (self.x.double(),)

def make_learner(*args, made=workflow.make_learner, **kwargs):
    learn = made(*args, **kwargs)
    learn.model.double()
    learn.add_cb(Double())
    return learn

callbacks.has_cpu_bfloat16 = lambda: False
workflow.make_learner = make_learner
main()
"""
FIT = ["--arch", "test_byobnet", "--weights", "none", "--size", "32", "--batch-size", "12"]
HOSTS, WIRES = ("bloodcell-a", "bloodcell-b"), ("bloodwire-a", "bloodwire-b")
FIRST = ["--weights", "first.safetensors", "--epochs", "2"]  # in place of none
PATIENCE = 240  # seconds; a fit of these takes about ten on two idle cores


class Job:
    """``accelerate launch`` of a number of processes in a folder; of two hosts on one of them."""

    def __init__(
        self, folder: Path, n: int, *args, script: str | None = None, host: int | None = None
    ):
        target = ["-m", "bloodcell_fastai"]
        if script:
            (folder / "main.py").write_text(script)  # the same for all hosts
            target = [folder / "main.py"]
        launch = ["--multi_gpu", "--num_processes", n, "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        within = []
        if host is None:
            launch += ["--num_machines", 1, "--main_process_port", 0]
        else:
            within = ["ip", "netns", "exec", HOSTS[host]]
            environment["GLOO_SOCKET_IFNAME"] = WIRES[host]
            launch += ["--num_machines", 2, "--machine_rank", host]
            launch += ["--main_process_ip", "10.93.0.1", "--main_process_port", 29500]
        command = [*within, sys.executable, "-m", "accelerate.commands.launch", *launch]
        command += [*target, *args]
        self.folder = folder
        self.log = folder / f"log-{host}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"it hangs: {self.log.read_text()[-2000:]}")

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + PATIENCE
        while text not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"no {text!r} in: {self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def workers(self) -> list[psutil.Process]:
        """The processes that train, in the order of their ranks."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [(p.environ().get("RANK"), p) for p in found]
        return [p for rank, p in sorted((r, p) for r, p in ranks if r is not None)]

    def kill(self) -> None:
        for process in (*self.workers(), self.process):
            process.kill()


def run_alone(folder: Path, *args, script: str | None = None) -> None:
    target = ["-c", script] if script else ["-m", "bloodcell_fastai"]
    subprocess.run([sys.executable, *target, *map(str, args)], cwd=folder, check=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_root) -> Path:
    """A folder with first weights and the run ``one``, trained by one process in double precision:
    an epoch of the head alone, then one of everything."""
    folder = tmp_path_factory.mktemp("jobs")
    torch.manual_seed(0)
    save_file(timm.create_model("test_byobnet").state_dict(), folder / "first.safetensors")
    run_alone(folder, "fit", "--data", demo_root, *FIT, *FIRST, "--name", "one", script=IN_DOUBLE)
    return folder


@pytest.fixture
def hosts():
    """Two network namespaces with a wire between them, which see nothing else."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    commands = [f"netns add {host}" for host in HOSTS]
    commands += [f"link add {WIRES[0]} type veth peer name {WIRES[1]}"]
    for number, (host, wire) in enumerate(zip(HOSTS, WIRES, strict=True), start=1):
        commands += [f"link set {wire} netns {host}", f"-n {host} link set lo up"]
        commands += [f"-n {host} addr add 10.93.0.{number}/24 dev {wire}"]
        commands += [f"-n {host} link set {wire} up"]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr}")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def same_training(folder: Path, name: str) -> None:
    one, other = (pd.read_csv(folder / "runs" / n / "history.csv") for n in ("one", name))
    assert len(other) == 2
    pd.testing.assert_frame_equal(
        one.drop(columns="seconds"), other.drop(columns="seconds"), rtol=1e-5
    )
    one, other = (load_file(folder / "runs" / n / "model.safetensors") for n in ("one", name))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_processes_train_as_one_would(folder, demo_root, n):
    args = ("fit", "--data", demo_root, *FIT, *FIRST, "--name", f"of-{n}")
    job = Job(folder, n, *args, script=IN_DOUBLE)
    assert job.wait() == 0, job.log.read_text()
    same_training(folder, f"of-{n}")
    assert job.log.read_text().count("Epoch [1/2]") == 1  # one of them speaks
    files = sorted(p.name for p in (folder / "runs" / f"of-{n}").rglob("*"))
    assert files == sorted(p.name for p in (folder / "runs" / "one").rglob("*"))


@pytest.mark.slow
def test_a_dead_process_ends_the_job_which_can_be_resumed(folder, demo_root):
    args = ("fit", "--data", demo_root, *FIT, *FIRST, "--name", "dead")
    slow = IN_DOUBLE.replace(
        "main()\n", "import time\nDouble.after_epoch = lambda self: time.sleep(2)\nmain()\n"
    )
    job = Job(folder, 2, *args, script=slow)
    job.wait_for("Epoch [1/2]")
    job.workers()[1].kill()
    assert job.wait() != 0
    assert "Another process of this job has ended" in job.log.read_text()
    assert "--resume --name dead" in job.log.read_text()
    job = Job(folder, 2, "fit", "--resume", "--name", "dead", script=IN_DOUBLE)
    assert job.wait() == 0, job.log.read_text()
    same_training(folder, "dead")


@pytest.mark.slow
def test_two_hosts_train_as_one_and_one_notices_the_loss_of_the_other(folder, demo_root, hosts):
    args = ("fit", "--data", demo_root, *FIT, *FIRST, "--name", "hosts")
    jobs = [Job(folder, 2, *args, script=IN_DOUBLE, host=host) for host in (0, 1)]
    for job in jobs:
        assert job.wait() == 0, job.log.read_text()
    same_training(folder, "hosts")
    args = ("fit", "--data", demo_root, *FIT, "--epochs", 500, "--name", "lost")
    first, second = (Job(folder, 2, *args, host=host) for host in (0, 1))
    first.wait_for("Epoch [1/500]")
    second.kill()
    assert first.wait() != 0
    assert "Another process of this job has ended" in first.log.read_text()


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_the_same_batch(tmp_path, demo_root):
    args = ("fit", "--data", demo_root, *FIT, "--epochs", 500, "--name", "stopped")
    job = Job(tmp_path, 2, *args)
    job.wait_for("Epoch [1/500]")
    job.process.send_signal(signal.SIGINT)
    assert job.wait() != 0
    log = job.log.read_text()
    assert log.count("Error: Stopped in epoch") == 1
    assert "bloodcell fit --resume --name stopped" in log


@pytest.mark.slow
def test_folds_of_several_processes(tmp_path, demo_root):
    args = ("fit", "--data", demo_root, *FIT, "--epochs", 1, "--folds", 2, "--name", "folds")
    job = Job(tmp_path, 2, *args)
    assert job.wait() == 0, job.log.read_text()
    predictions = pd.read_csv(tmp_path / "runs/folds/predictions.csv")
    assert predictions.path.is_unique and len(predictions) == 136
    assert "Accuracy per photograph" in job.log.read_text()


@pytest.mark.slow
def test_processes_predict_what_one_does(trained, demo_root, tmp_path):
    run = ("--run", trained.path, "--out")
    run_alone(tmp_path, "predict", demo_root, *run, "one.csv")
    job = Job(tmp_path, 3, "predict", demo_root, *run, "three.csv")
    assert job.wait() == 0, job.log.read_text()
    assert "168 images predicted to three.csv" in job.log.read_text()
    one, three = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("one", "three"))
    pd.testing.assert_frame_equal(one, three, atol=1e-2)  # bfloat16, in other batches
    assert not list(tmp_path.glob("*.part-*"))


@pytest.mark.slow
def test_a_prediction_cut_off_goes_on_with_another_number_of_processes(
    trained, demo_root, tmp_path
):
    run = ("--run", trained.path, "--out", "all.csv")
    run_alone(tmp_path, "predict", demo_root, *run)
    lines = (tmp_path / "all.csv").read_text().splitlines(keepends=True)
    (tmp_path / "all.csv").write_text("".join(lines[:11]))
    (tmp_path / "all.part-0002-of-0004.csv").write_text("".join([lines[0], *lines[9:31]]))
    (tmp_path / "all.part-of-mine.csv").write_text("kept")
    job = Job(tmp_path, 2, "predict", demo_root, *run, "--resume")
    assert job.wait() == 0, job.log.read_text()
    assert "138 images predicted to all.csv" in job.log.read_text()
    assert "30 were there already" in job.log.read_text()
    found = pd.read_csv(tmp_path / "all.csv")
    assert found.path.is_unique and len(found) == 168
    assert [path.name for path in tmp_path.glob("*.part-*")] == ["all.part-of-mine.csv"]


@pytest.mark.slow
def test_what_all_processes_get_wrong_is_said_once(tmp_path, demo_root):
    job = Job(tmp_path, 2, "fit", "--data", demo_root, *FIT[:-1], 13, "--name", "odd")
    assert job.wait() != 0
    log = job.log.read_text()
    assert log.count("Error: 2 processes cannot share batches of 13") == 1
    assert "use 12" in log


def test_standard_input_is_not_shared(monkeypatch):
    monkeypatch.setattr(inference, "world_size", lambda: 2)
    with pytest.raises(BloodcellError, match="cannot share the lines"):
        list(inference.find_images(["-"], ["a.jpg"]))


def test_the_parts_of_all_processes_are_the_whole():
    for n in (0, 1, 5, 12):
        parts = [Share(rank, 3).of(list(range(n))) for rank in range(3)]
        assert [item for part in parts for item in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_is_drawn_is_a_part_of_what_one_process_draws():
    torch.manual_seed(0)
    whole = torch.rand(6, 2)
    for rank in range(3):
        torch.manual_seed(0)
        assert torch.equal(
            Share(rank, 3).drawn(2, lambda n: torch.rand(n, 2)), whole[2 * rank :][:2]
        )


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    with joined() as share:
        assert share == Share(0, 1)
    assert agree(lambda: 3) == 3 and gather(4) == [4]
    written = []
    by_first(written.append)(1)
    assert written == [1]


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_shared_norms_are_those_of_torch(group, kind):
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(8, 5, 4, 4, dtype=torch.float64)
    results = []
    for shared in (False, True):
        model = nn.Sequential(kind(5)).double()
        nn.init.constant_(model[0].weight, 1.5)
        inputs = x.clone().requires_grad_()
        norms = share_norms(model) if shared else None
        with sharing_batches():
            output = model(inputs)
        (output**3).sum().backward()
        if shared:
            restore_norms(model, norms)
        results.append([output, inputs.grad, model[0].weight.grad, *model.state_dict().values()])
        results[-1].append(model.eval()(x))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_shared_norms_leave_the_model_as_it_was(group):
    model = nn.Sequential(nn.Conv2d(3, 5, 1), BatchNormAct2d(5))
    before = [(name, type(module)) for name, module in model.named_modules()]
    restore_norms(model, share_norms(model))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert "forward" not in vars(model[1])


def test_norms_converted_as_for_cuda_compute_the_same_and_are_restored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), BatchNormAct2d(5), nn.BatchNorm2d(5)).eval()
    norms = {name: module for name, module in model.named_children() if name != "0"}
    x = torch.randn(2, 3, 4, 4)
    before = model(x)
    convert_sync_batchnorm(model)
    assert isinstance(model[1], nn.SyncBatchNorm) and isinstance(model[2], nn.SyncBatchNorm)
    torch.testing.assert_close(model(x), before)  # the activation inside the norm is kept
    model[1].running_mean += 1  # as training does
    restore_norms(model, norms)
    assert [type(module) for module in model] == [nn.Conv2d, BatchNormAct2d, nn.BatchNorm2d]
    torch.testing.assert_close(model[1].running_mean, torch.ones(5))


def test_without_accelerate_an_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(BloodcellError, match="distributed"), joined():
        pass


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(BloodcellError, match="which needs Accelerate") as caught, joined():
        pass
    assert "pip install" in caught.value.hint


def test_several_processes_need_a_file_for_their_predictions(monkeypatch):
    monkeypatch.setattr(inference, "world_size", lambda: 2)
    with pytest.raises(BloodcellError, match="Several processes need a file to write"):
        inference.predict(None, ["cell.png"])
