"""Peak memory of training: ours against plain fastai, each in a process of its own.

    python benchmarks/memory.py [--data PATH] [--size 256] [--batch-size 16]

Resident memory is the proportional set size of the process and its workers (shared pages count
once), read four times a second from /proc, so Linux only. Pages of the decoded images count too,
although the system may take them back at any time. On a GPU the peak of PyTorch's allocator is
printed as well.
"""

import multiprocessing
import time
from pathlib import Path

import torch
from common import arguments, machine, our_dls, plain_dls, read_table


def main() -> None:
    args = arguments(__doc__, batch_size=16, batches=3)
    table = read_table(args.data, args.batch_size * args.batches, 16)
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name, train in (("plain fastai", train_plain), ("ours", train_ours)):
        results = context.Queue()
        process = context.Process(target=train, args=(table, args, results))
        process.start()
        peak = 0
        while process.is_alive():
            peak = max(peak, resident(process.pid))
            time.sleep(0.25)
        peaks[name] = (peak, results.get())
        print(f"  {name:14s} {peak / 1e6:8.0f} MB, on the device {peaks[name][1] / 1e6:8.0f} MB")
    print(f"\n{args.arch}, {args.size} px, batches of {args.batch_size}, {machine()}")
    (theirs, their_device), (ours, our_device) = peaks.values()
    print(f"resident: ours / plain = {ours / theirs:.2f}")
    if their_device:
        print(f"device:   ours / plain = {our_device / their_device:.2f}")


def train_plain(table, args, results) -> None:
    from train_throughput import plain_recipe

    dls = plain_dls(table, args.arch, args.size, args.batch_size)
    _fit(plain_recipe(dls, args), results)


def train_ours(table, args, results) -> None:
    from bloodcell_fastai import blood_learner

    dls = our_dls(table, args.arch, args.size, args.batch_size)
    _fit(blood_learner(dls, weights="none"), results)


def _fit(learn, results) -> None:
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)
    results.put(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def resident(pid: int) -> int:
    """Bytes of a process and all below it, shared pages in proportion."""
    total = 0
    for child in [pid, *descendants(pid)]:
        try:
            lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
        except OSError:  # gone in the meantime
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def descendants(pid: int) -> list[int]:
    """Processes below another."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except OSError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


if __name__ == "__main__":
    main()
