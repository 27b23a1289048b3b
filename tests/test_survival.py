"""What a run survives: real processes killed, stopped, starved of disk and memory.

Importing torch and fastai takes seconds, so the commands run in processes forked from one that has
imported everything and trained nothing: this file, run as a script.
"""

import errno
import functools
import importlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pandas as pd
import pytest

KILLS = 20
SMALL = ("--arch", "test_resnet.r160_in1k", "--weights", "none", "--size", 32, "--batch-size", 16)
NOBODY = 65534
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Warm:
    """Runs ``bloodcell`` commands in forks of a process that has imported what they need."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.server.stdout.readline() == "0\n"

    def start(self, folder: Path, *args, faults=(), env=None) -> "Process":
        """Begin ``bloodcell args`` in ``folder``, with faults: functions of this file and their
        arguments."""
        output = folder / f"output-{time.monotonic_ns()}.txt"
        request = {"args": list(map(str, args)), "faults": faults, "env": env or {}}
        output.touch()
        return Process(self, self._ask(request | {"output": str(output)}), output)

    def run(self, folder: Path, *args, faults=(), env=None) -> "Process":
        process = self.start(folder, *args, faults=faults, env=env)
        process.wait()
        return process

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def _ask(self, request: dict) -> int:
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)


class Process:
    """A command that runs. ``code`` is its exit code, or minus the signal that killed it."""

    def __init__(self, warm: Warm, pid: int, output: Path):
        self.warm, self.pid, self.output_file, self.code = warm, pid, output, None

    def wait(self) -> int:
        self.code = self.warm.wait(self.pid)
        return self.code

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    @property
    def output(self) -> str:
        return self.output_file.read_text()

    def wait_for(self, text: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < until, self.output
            time.sleep(0.005)

    @property
    def error(self) -> tuple[str, str]:
        """The two lines an error is."""
        lines = self.output.splitlines()
        assert "Traceback" not in self.output
        assert lines[-2].startswith("Error: "), self.output
        assert lines[-1].startswith("Hint:  "), self.output
        assert sum(line.startswith(("Error: ", "Hint: ")) for line in lines) == 2
        return lines[-2].removeprefix("Error: "), lines[-1].removeprefix("Hint:  ")


def serve() -> None:
    """Fork a child for each command asked for on standard input."""
    for module in ("bloodcell_fastai.evaluation.cross_validation", "matplotlib.pyplot"):
        importlib.import_module(module)
    print(0, flush=True)  # ready
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            work(**request)


def work(args: list[str], faults: list[list], env: dict[str, str], output: str) -> None:
    """The command, in a child."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in the foreground
    os.chdir(Path(output).parent)
    os.environ.update(env)
    sys.argv = ["bloodcell", *args]
    code = 1
    try:
        for name, *values in faults:
            globals()[name](*values)
        from bloodcell_fastai.cli import main

        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def killed_at(number: int, events=("os.rename", "os.remove", "os.mkdir"), learn=None) -> None:
    """Die just before the n-th change of the file system, as Python's audit events tell of them.

    These are the moments that differ: a file or folder that is complete or not under its temporary
    name, one that is renamed, one that is no longer wanted and still there.
    """
    left = number

    def watch(event: str, values: tuple) -> None:
        nonlocal left
        if event in events and (event != "open" or ".tmp-" in str(values[0])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def after_epoch(number: int, fault: str, *values) -> None:
    """Bring in another fault when so many epochs are done and saved."""
    from bloodcell_fastai.training.callbacks import SaveLast

    plain = SaveLast.after_epoch

    @functools.wraps(plain)
    def faulty(callback):
        plain(callback)
        if callback.first_epoch + callback.epoch + 1 == number:
            globals()[fault](*values, learn=callback.learn)

    SaveLast.after_epoch = faulty


def disk_full(learn=None) -> None:
    def fsync(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fsync


def largest_file(size: int, learn=None) -> None:
    """The system itself refuses to write more bytes than these into one file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def memory(spare: int, learn=None) -> None:
    """The system itself gives no more memory than these bytes beyond what is taken."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def device_memory(learn) -> None:
    import torch

    def refuse(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    learn.model.register_forward_pre_hook(refuse)


def read_only(*folders: str, learn=None) -> None:
    for folder in folders:
        Path(folder).chmod(0o555)
    if os.getuid() == 0:  # who may write anywhere
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def nan(learn) -> None:
    import torch

    with torch.no_grad():
        next(learn.model.parameters()).fill_(float("nan"))


def images_gone(learn) -> None:
    for path in learn.dls.train_ds.items.path[::2]:
        Path(path).unlink()


def broken_decoder(learn) -> None:
    from bloodcell_fastai.data import cache

    def open_image(path, bits=None):
        raise IndexError("a bug in a decoder")

    cache.open_image = open_image


def short_lr_find() -> None:
    from fastai.learner import Learner

    Learner.lr_find = functools.partialmethod(Learner.lr_find, num_it=12)


def slow_batches(seconds: float) -> None:
    from bloodcell_fastai.training.callbacks import SeedEpoch

    def sleep(callback):
        print("asleep", flush=True)
        time.sleep(seconds)

    SeedEpoch.after_batch = sleep


def no_new_folder() -> None:
    """What mkdir says in a folder that is read-only; a test may run as root, whom it obeys."""
    plain = os.mkdir

    def mkdir(path, *args, **kwargs):
        if "runs" in Path(path).parts:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        plain(path, *args, **kwargs)

    os.mkdir = mkdir


def fold(number: int, *fault) -> None:
    """Bring in another fault when this fold begins."""
    from bloodcell_fastai.evaluation import cross_validation

    plain = cross_validation.train_table

    def train_table(asked, resolved, table, run, *args):
        if run.name == f"fold-{number}":
            globals()[fault[0]](*fault[1:])
        return plain(asked, resolved, table, run, *args)

    cross_validation.train_table = train_table


if __name__ == "__main__":
    serve()
    raise SystemExit


@pytest.fixture(scope="module")
def warm():
    warm = Warm()
    yield warm
    warm.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    from bloodcell_fastai import make_demo

    return make_demo(tmp_path_factory.mktemp("photos") / "demo", photos_per_class=4, copies=3)


@pytest.fixture(scope="module")
def undisturbed(warm, photos, tmp_path_factory):
    """Three epochs that nothing befell: the files they leave."""
    home = tmp_path_factory.mktemp("undisturbed")
    process = warm.run(home, *fit(photos, 3))
    assert process.code == 0, process.output
    return files(home)


def fit(photos: Path, epochs: int, *more) -> tuple:
    return ("fit", "--data", photos, "--name", "run", "--epochs", epochs, *SMALL, *more)


def resume(*more) -> tuple:
    return ("fit", "--resume", "--name", "run", *more)


def files(home: Path) -> dict[str, bytes]:
    """Every file of the run in ``home``; the history without the seconds it took."""
    run = home / "runs" / "run"
    found = {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".bloodcell.lock"
    }
    history = pd.read_csv(run / "history.csv", dtype=str).drop(columns="seconds")
    return found | {"history.csv": history.to_csv().encode()}


def epochs_kept(home: Path) -> int:
    from bloodcell_fastai import Run

    last = Run(home / "runs" / "run").load_last()
    return last.epochs_done if last else 0


def assert_resumes(warm: Warm, home: Path, expected: dict[str, bytes]) -> None:
    """The run goes on where it was and ends as the undisturbed one did."""
    process = warm.run(home, *resume())
    assert process.code == 0, process.output
    assert files(home) == expected


@pytest.mark.slow
def test_killed_at_random_times(warm, photos, tmp_path):
    epochs, luck = 60, random.Random(time.time_ns())
    (whole := tmp_path / "whole").mkdir()
    (home := tmp_path / "killed").mkdir()
    began = time.monotonic()
    process = warm.start(whole, *fit(photos, epochs))
    process.wait_for("Epoch [1/")
    start = time.monotonic() - began
    assert process.wait() == 0, process.output
    epoch = (time.monotonic() - began - start) / epochs

    kills, kept, trained = 0, 0, 0
    while kills < KILLS:
        begun = (home / "runs" / "run" / "config.json").is_file()
        process = warm.start(home, *(resume() if begun else fit(photos, epochs)))
        if kills % 3 == 0:  # while it gets ready
            time.sleep(luck.uniform(0, start / 2))
        elif kills % 3 == 1:  # in its first epoch, more or less
            process.wait_for("Resuming" if begun else "Steps")
            time.sleep(luck.uniform(0, start / 2))
        else:  # in a later one
            process.wait_for("Epoch [")
            time.sleep(luck.uniform(0, max(3 * epoch, 0.5)))  # a slow disk takes its time
        assert process.kill() == -signal.SIGKILL, process.output
        kills += 1
        now = epochs_kept(home)
        seen = process.output.count("Epoch [")
        assert kept <= now <= epochs
        assert kept + seen - now <= 1  # epochs that were told of and are lost
        kept, trained = now, trained + seen
    assert 0 < kept < epochs
    assert_resumes(warm, home, files(whole))
    print(f"{kills} kills over {kept} epochs, {trained - kept} epochs trained twice")


@pytest.mark.slow
def test_killed_at_every_write(warm, photos, tmp_path):
    """Also while the images are decoded into the cache, while lr_find works, and while the run
    is calibrated; the run stops early."""
    command = fit(photos, 9, "--lr", "auto", "--patience", 1)

    def begin(home: Path, args: tuple, *faults) -> Process:
        env = {"BLOODCELL_CACHE": str(home / "cache")}
        return warm.start(home, *args, faults=[["short_lr_find"], *faults], env=env)

    (whole := tmp_path / "whole").mkdir()
    assert begin(whole, command).wait() == 0
    expected = files(whole)
    kills, survived = 0, False
    while not survived:
        numbers = (kills + 1, kills + 2)  # two at a time
        homes = [tmp_path / str(number) for number in numbers]
        for home in homes:
            home.mkdir()
        processes = [begin(home, command, ["killed_at", int(home.name)]) for home in homes]
        codes = [process.wait() for process in processes]
        assert set(codes) <= {0, -signal.SIGKILL}, [process.output for process in processes]
        killed = [home for home, code in zip(homes, codes, strict=True) if code]
        survived = 0 in codes  # it wrote all there is to write
        kills += len(killed)
        runs = [home / "runs" / "run" for home in killed]
        over = [(run / "last" / "finished.json").is_file() for run in runs]
        again = [resume() if (run / "config.json").is_file() else command for run in runs]
        processes = [begin(home, args) for home, args in zip(killed, again, strict=True)]
        assert [process.wait() for process in processes] == over
        for home in killed:
            assert files(home) == expected, home.name
            assert not list(home.rglob(".tmp-*")), home.name
            shutil.rmtree(home)
    assert kills > 40
    print(f"{kills} kills")


@pytest.mark.slow
def test_killed_while_unpacking(warm, photos, tmp_path):
    archive = shutil.make_archive(tmp_path / "small", "zip", photos / "dataset2-master")
    command = fit(archive, 1, "--dry-run")
    for number in range(1, 400, 7):
        (home := tmp_path / str(number)).mkdir()
        kill = ["killed_at", number, ["os.rename", "os.mkdir", "open"]]
        process = warm.run(home, *command, faults=[kill])
        assert process.code == -signal.SIGKILL, process.output
        if list((home / "data").glob("[!.]*")):
            break  # it is all there
        process = warm.run(home, *command)
        assert process.code == 0, process.output
        (complete,) = (home / "data").glob("[!.]*")
        assert len(list(complete.rglob("*.jpeg"))) == 52
        assert not list(home.rglob(".tmp-*"))
    print(f"{number // 7} kills")


@pytest.mark.slow
def test_early_stopping_waits_as_long_after_a_kill(warm, photos, tmp_path):
    command = fit(photos, 30, "--patience", 3)
    (whole := tmp_path / "whole").mkdir()
    process = warm.run(whole, *command)
    assert process.code == 0, process.output
    assert "Stopped early" in process.output
    expected = files(whole)
    last = process.output.count("Epoch [")
    assert 3 < last < 30
    for killed in (last - 1, last):
        (home := tmp_path / str(killed)).mkdir()
        process = warm.run(home, *command, faults=[["after_epoch", killed, "killed_at", 1]])
        assert process.code == -signal.SIGKILL
        assert epochs_kept(home) == killed
        assert_resumes(warm, home, expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_batch_and_says_how_to_go_on(
    warm, photos, tmp_path, undisturbed, number, code
):
    process = warm.start(tmp_path, *fit(photos, 3), faults=[["slow_batches", 0.3]])
    process.wait_for("Epoch [1/")
    os.kill(process.pid, number)
    assert process.wait() == code
    message, hint = process.error
    assert message == (
        f"Stopped in epoch 2; the 1 before it and the best model are kept in {Path('runs', 'run')}."
    )
    assert hint == "Continue: bloodcell fit --resume --name run"
    assert epochs_kept(tmp_path) == 1
    assert_resumes(warm, tmp_path, undisturbed)


def test_a_second_signal_stops_at_once(warm, photos, tmp_path):
    process = warm.start(tmp_path, *fit(photos, 3), faults=[["slow_batches", 30]])
    process.wait_for("asleep")
    os.kill(process.pid, signal.SIGINT)
    process.wait_for("once more stops at once")
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert time.monotonic() - began < 5
    assert "--resume" in process.error[1]


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        (["disk_full"], "No space left on device: runs/run/history.csv", "Make room on the disk"),
        (["largest_file", 100_000], "File too large", "Make room on the disk"),
        (["read_only", "runs/run", "runs/run/last"], "Permission denied", "--runs"),
        (["device_memory"], "No memory left for 16 images of 32 px", "--batch-size 8"),
    ],
)
def test_what_an_epoch_reached_is_kept(warm, photos, tmp_path, undisturbed, fault, message, hint):
    tmp_path.chmod(0o755)  # for another user to see
    process = warm.run(tmp_path, *fit(photos, 3), faults=[["after_epoch", 1, *fault]])
    assert process.code == 1, process.output
    assert message in process.error[0]
    assert hint in process.error[1]
    assert epochs_kept(tmp_path) == 1
    for folder in ("runs/run", "runs/run/last"):
        (tmp_path / folder).chmod(0o755)
    assert_resumes(warm, tmp_path, undisturbed)


def test_memory_the_system_does_not_give(warm, photos, tmp_path):
    fault = ["after_epoch", 1, "memory", 2**24]
    process = warm.run(tmp_path, *fit(photos, 2, "--size", 256, "--batch-size", 38), faults=[fault])
    assert process.code == 1, process.output
    assert "No memory left for 24 images of 256 px at once, in epoch 2" in process.error[0]
    assert "--batch-size 12" in process.error[1]
    assert epochs_kept(tmp_path) == 1


def test_a_folder_of_runs_that_is_read_only(warm, photos, tmp_path):
    (tmp_path / "runs").mkdir()
    process = warm.run(tmp_path, *fit(photos, 1), faults=[["no_new_folder"]])
    assert process.code == 1
    assert "Permission denied" in process.error[0]
    assert "--runs" in process.error[1]


def test_nan_keeps_the_last_good_model(warm, photos, tmp_path):
    process = warm.run(tmp_path, *fit(photos, 3), faults=[["after_epoch", 2, "nan"]])
    assert process.code == 1, process.output
    message, hint = process.error
    assert message.startswith("The loss became NaN in epoch 3; the 2 before it")
    assert "--lr below 0.001" in hint
    assert epochs_kept(tmp_path) == 2
    assert files(tmp_path)["model.safetensors"]


def test_a_run_continues_where_its_data_are_now(warm, photos, tmp_path, undisturbed):
    before = shutil.copytree(photos, tmp_path / "before")
    process = warm.run(tmp_path, *fit(before, 3), faults=[["after_epoch", 1, "killed_at", 1]])
    assert process.code == -signal.SIGKILL, process.output
    after = before.rename(tmp_path / "after")
    process = warm.run(tmp_path, *resume("--data", after))
    assert process.code == 0, process.output
    found = files(tmp_path)
    assert {name for name in found if found[name] != undisturbed[name]} == {"config.json"}


def test_images_that_vanish_are_not_missed_where_they_are_cached(
    warm, photos, tmp_path, undisturbed
):
    copy = shutil.copytree(photos, tmp_path / "photos")
    process = warm.run(tmp_path, *fit(copy, 3), faults=[["after_epoch", 1, "images_gone"]])
    assert process.code == 0, process.output
    assert files(tmp_path)["model.safetensors"] == undisturbed["model.safetensors"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [("images_gone", "no such file"), ("broken_decoder", "IndexError: a bug in a decoder")],
)
def test_images_that_cannot_be_read_without_a_cache(warm, photos, tmp_path, fault, message):
    copy = shutil.copytree(photos, tmp_path / "photos")
    process = warm.run(
        tmp_path,
        *fit(copy, 3),
        faults=[["after_epoch", 1, fault]],
        env={"BLOODCELL_CACHE": os.devnull},
    )
    assert process.code == 1, process.output
    assert "cannot be read: " in process.error[0]
    assert message in process.error[0]
    assert "--resume" in process.error[1]
    assert epochs_kept(tmp_path) == 1


def test_a_disk_with_no_room_for_the_cache(warm, photos, tmp_path, undisturbed):
    env = {"BLOODCELL_CACHE": str(tmp_path / "cache")}
    process = warm.run(tmp_path, *fit(photos, 3), faults=[["largest_file", 100_000]], env=env)
    assert "File too large" in process.error[0]
    assert "Steps" in process.output  # it came as far as training
    assert not list((tmp_path / "cache").glob("*.npy"))
    assert_resumes(warm, tmp_path, undisturbed)


def test_two_processes_on_one_run(warm, photos, tmp_path, undisturbed):
    first = warm.start(tmp_path, *fit(photos, 3), faults=[["slow_batches", 30]])
    first.wait_for("Steps")
    second = warm.run(tmp_path, *resume())
    assert second.code == 1
    message, hint = second.error
    assert f"is being trained by process {first.pid} on {socket.gethostname()} since" in message
    assert "--name" in hint
    third = warm.run(tmp_path, *fit(photos, 3))
    assert "There is a run named run" in third.error[0]
    first.kill()
    assert_resumes(warm, tmp_path, undisturbed)  # a killed process holds nothing


def test_two_processes_that_want_one_cache(warm, photos, tmp_path, undisturbed):
    env = {"BLOODCELL_CACHE": str(tmp_path / "cache")}
    homes = [tmp_path / "1", tmp_path / "2"]
    for home in homes:
        home.mkdir()
    processes = [warm.start(home, *fit(photos, 3), env=env) for home in homes]
    for process in processes:
        assert process.wait() == 0, process.output
    for home in homes:
        assert files(home) == undisturbed
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


@pytest.mark.slow
def test_folds_go_on(warm, photos, tmp_path):
    command = fit(photos, 1, "--folds", 2)
    results = []
    for kill in (False, True):
        (home := tmp_path / str(kill)).mkdir()
        last = command
        if kill:  # when the epoch of the first fold is over, and again in the second
            for number, args in ((1, command), (2, resume())):
                fault = ["fold", number, "after_epoch", 1, "killed_at", 1]
                process = warm.run(home, *args, faults=[fault])
                assert process.code == -signal.SIGKILL, process.output
            last = resume()
        process = warm.run(home, *last)
        assert process.code == 0, process.output
        results.append((home / "runs" / "run" / "metrics.json").read_bytes())
    assert results[0] == results[1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(photos, tmp_path, undisturbed, bloodcell):
    """In another interpreter, with other hashes of strings."""
    process = bloodcell(*fit(photos, 3), env={"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    assert files(tmp_path) == undisturbed
