"""How fast several processes train: images a second of one, two, ... on the same global batch.

    python benchmarks/scaling.py --processes 1 2

Every process gets as many of this machine's cores as the others, or a GPU of its own where there
are enough. The second epoch of a short training on demo images is timed; the first warms up. The
time to send the gradients is measured with the same number of processes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import timm
from common import machine

from bloodcell_fastai import make_demo

LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --main_process_port 0"
LAUNCH += " --mixed_precision no --dynamo_backend no"
ALL_REDUCE = """
import time, torch
from torch import distributed
from bloodcell_fastai.distributed import joined, rank
with joined():
    gradients = torch.zeros({n}, device="cuda" if torch.cuda.is_available() else "cpu")
    for _ in range({times} + 1):
        distributed.barrier()
        begun = time.perf_counter()
        distributed.all_reduce(gradients)
        gradients[0].item()
        seconds = gradients.new_tensor(time.perf_counter() - begun)
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    if rank() == 0:
        print(seconds.item())
"""


def launch(n: int, target: list, folder: Path) -> str:
    """Run a Python target in ``n`` processes; return what they print."""
    threads = str(max((os.cpu_count() or 1) // n, 1))
    several = [*LAUNCH.split(), "--num_processes", str(n)] if n > 1 else []
    return subprocess.run(
        [sys.executable, *several, *map(str, target)],
        check=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": threads},
    ).stdout


def images_per_second(n: int, args: argparse.Namespace, data: Path, folder: Path) -> float:
    """Training speed of ``n`` processes in the second epoch."""
    own_batch = args.batch_size // n
    options = {"size": args.size, "batch-size": own_batch, "epochs": 2, "arch": args.arch}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    fixed = ["--data", data, "--freeze-epochs", 0, "--name", f"of-{n}"]
    launch(n, ["-m", "bloodcell_fastai", "fit", *fixed, *words], folder)
    run = folder / "runs" / f"of-{n}"
    images = (pd.read_csv(run / "split.csv").part == "train").sum() // args.batch_size
    return images * args.batch_size / pd.read_csv(run / "history.csv").seconds[1]


def all_reduce_seconds(n: int, parameters: int, folder: Path) -> float:
    """Time of the third sum of so many float32 numbers over ``n`` processes."""
    script = folder / "all_reduce.py"
    script.write_text(ALL_REDUCE.format(n=parameters, times=2))
    return float(launch(n, [script], folder))


def main() -> None:
    """Print a row for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arch", default="maxvit_nano_rw_256.sw_in1k")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    os.environ.setdefault("BLOODCELL_CACHE", str(folder / "cache"))
    data = make_demo(folder / "demo", photos_per_class=10, copies=8)
    parameters = sum(p.numel() for p in timm.create_model(args.arch).parameters())
    print(f"{machine()}; {args.arch} at {args.size} px, {args.batch_size} images a step")
    print(f"{parameters / 1e6:.1f} million parameters, {4 * parameters / 1e6:.0f} MB of gradients")
    first = None
    for n in args.processes:
        begun = time.monotonic()
        rate = images_per_second(n, args, data, folder)
        first = first or rate
        sending = all_reduce_seconds(n, parameters, folder) if n > 1 else 0.0
        print(
            f"{n} processes: {rate:.1f} images/s, {rate / first:.2f} of one; a step takes "
            f"{args.batch_size / rate:.2f} s, of which sending alone would take {sending:.3f} s "
            f"({time.monotonic() - begun:.0f} s in all)",
            flush=True,
        )


if __name__ == "__main__":
    main()
