"""A run made small and passed on: weights in half precision, no path of this machine."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from ..files import atomic_path, read_table, write_table
from .calibration import Reference
from .runs import Run

MAX_HALF_ERROR = 2**-10  # of a tensor's largest value; rounding to half precision costs 2**-11
PACKED_FILES = (
    *("config.json", "split.csv", "history.csv", "model.safetensors"),
    *("calibration.json", "reference.safetensors", "reference.csv"),
    *("predictions.csv", "metrics.json", "last/finished.json"),
)
"""What of a run is passed on."""
PATH_COLUMNS = ("path", "photo", "nearest")
"""Columns that hold paths; ``photo`` too, as an image whose photograph is unknown is its own."""


def half_precision(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model with its weights as float16, half the size.

    What has one dimension (biases, norms, the running statistics of BatchNorm) stays as it is:
    it is small, and its values may lie beyond float16 or below it. So does a tensor that loses
    more than rounding costs, because its values are too large or all too small.
    """
    return {name: _halved(tensor) for name, tensor in state.items()}


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    error = (half.float() - tensor).abs().max()  # infinite where a value is too large
    return half if error <= MAX_HALF_ERROR * tensor.abs().max() else tensor


def pack(run: Run, folder: str | Path, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Write a run for others, which all that reads a run can read.

    Paths become relative to the folder of the images, or lose all folders where they are not in
    it; what only training needs is left out. ``config.json`` comes last and makes it a run.

    Args:
        run: a trained one; its results come along if it was interpreted.
        folder: what to write; files of an earlier packing are replaced.
        state: the weights to write.

    Returns:
        Those files of :data:`PACKED_FILES` that the run has.
    """
    config, packed = run.config, Run(folder)
    root = Path(config.data)
    packed.save_weights(state, config.classes)
    calibration, seen = run.calibration, run.reference
    if calibration is not None and seen is not None:  # they come together
        listed = relative_paths(seen.table, root)
        packed.save_calibration(calibration, Reference(seen.features, listed, seen.neighbours))
    for name in ("history.csv", "metrics.json", "predictions.csv"):
        source, target = run.path / name, packed.path / name
        if not source.is_file():
            target.unlink(missing_ok=True)  # of another model
        elif name == "predictions.csv":
            write_table(target, relative_paths(read_table(source, ["path"]), root))
        else:
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
    packed.finish()
    first = Path(config.weights).name  # a file's, or a word
    packed.start(replace(config, data=root.name, weights=first), relative_paths(run.table, root))
    return [name for name in PACKED_FILES if (packed.path / name).is_file()]


def relative_paths(table: pd.DataFrame, root: Path) -> pd.DataFrame:
    """``table`` with its :data:`PATH_COLUMNS` relative to ``root``."""
    columns = [name for name in PATH_COLUMNS if name in table]
    return table.assign(**{name: [_relative(v, root) for v in table[name]] for name in columns})


def _relative(value: str, root: Path) -> str:
    path = Path(value)
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return path.name if path.is_absolute() else value
