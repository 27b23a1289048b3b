"""What the timing scripts share: images, rounds and medians, and the plain fastai side."""

import argparse
import contextlib
import io
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import timm
import torch
from fastai.vision.all import (
    CrossEntropyLossFlat,
    DataLoaders,
    ImageDataLoaders,
    Learner,
    Normalize,
    Resize,
    ResizeMethod,
    accuracy,
    aug_transforms,
)

from bloodcell_fastai import augmentation, blood_dls, make_demo, open_dataset, split_table
from bloodcell_fastai.config import DEFAULT_ARCH

warnings.filterwarnings("ignore")


def arguments(doc: str, **defaults) -> argparse.Namespace:
    """The options of all scripts; ``defaults`` replaces some of them and adds others."""
    usual = {"data": "", "arch": DEFAULT_ARCH, "size": 256, "repeats": 3}
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    for name, default in (usual | defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def read_table(data: str, n_train: int, n_valid: int) -> pd.DataFrame:
    """An image table with so many training and validation images; demo images by default."""
    root = Path(tempfile.mkdtemp(prefix="bench-"))
    os.environ.setdefault("BLOODCELL_CACHE", str(root / "cache"))
    if not data:
        data = str(make_demo(root / "demo", photos_per_class=24, copies=8))
    table = split_table(open_dataset(data, home=root).table, "random")
    parts = [(table[table.part == part], n) for part, n in (("train", n_train), ("valid", n_valid))]
    return pd.concat(
        [rows.sample(n, random_state=0, replace=len(rows) < n) for rows, n in parts],
        ignore_index=True,
    )


def plain_dls(table: pd.DataFrame, arch: str, size: int, bs: int) -> ImageDataLoaders:
    """Batches as a fastai user makes them, with the same transforms as ours."""
    stats = timm.get_pretrained_cfg(arch)
    return ImageDataLoaders.from_df(
        table.assign(is_valid=table.part == "valid"),
        path="/",
        fn_col="path",
        label_col="label",
        valid_col="is_valid",
        item_tfms=Resize(size, method=ResizeMethod.Squish),
        batch_tfms=[
            *aug_transforms(flip_vert=True, max_rotate=180.0, max_warp=0.1),
            Normalize.from_stats(stats.mean, stats.std),
        ],
        bs=bs,
    )


def our_dls(table: pd.DataFrame, arch: str, size: int, bs: int = 64) -> DataLoaders:
    """Our batches of what ``plain_dls`` shows: whole images with fastai's own augmentation."""
    same = augmentation(zoom=1.1, lighting=0.2, stain=0, sharpness=0, noise=0)
    return blood_dls(table, arch, size, bs, crop="frame", batch_tfms=same)


def plain_learner(dls: ImageDataLoaders, model: torch.nn.Module) -> Learner:
    """A fastai learner with nothing but what fastai gives it."""
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)


def in_turn(cases: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Medians of what each case returns. The cases run in turn, so that other load on the machine
    affects all of them; a first round warms up and is not counted."""
    rounds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats + 1):
        for name, case in cases.items():
            value = case()
            print(f"  round {number}  {name:28s} {value:10.2f}", flush=True)
            if number:
                rounds[name].append(value)
    return {name: statistics.median(values) for name, values in rounds.items()}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of ``work``, that of the device included; its output is not shown."""
    synchronise()
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """Device and versions of the libraries, in a line."""
    device = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "fastai", "timm"))
    return f"{device}, Python {platform.python_version()}, {versions}"
