"""The checkpoint of a run is read like a letter from a stranger."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import BloodcellError, is_number

MOST_EPOCHS = 100_000  # as in a config


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a checkpoint and its state, each value of which makes sense.

    The state has ``epochs_done``, ``best``, ``wait`` (epochs since the best) and ``optimizer``
    (``state`` and ``hypers``, lists of tables of plain values), and may have more.

    Raises:
        BloodcellError: the file is damaged, or the message names what in it makes no sense.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has an error of its own; json and torch have more
        reason = str(error).partition("\n")[0]
        raise bad_checkpoint(path, f"it is damaged ({type(error).__name__}: {reason})") from None
    if not isinstance(state, dict):
        raise bad_checkpoint(path, "state is no table")
    epochs, best = state.get("epochs_done"), state.get("best")
    if type(epochs) is not int or not 1 <= epochs <= MOST_EPOCHS:
        raise bad_checkpoint(path, f"epochs_done is {str(epochs)[:40]}")
    if not is_number(best, 0, 1):
        raise bad_checkpoint(path, f"best is {str(best)[:40]}")
    if type(state.get("wait")) is not int or not 0 <= state["wait"] <= MOST_EPOCHS:
        raise bad_checkpoint(path, f"wait is {str(state.get('wait'))[:40]}")
    optimizer = state.get("optimizer")
    if not isinstance(optimizer, dict) or not all(
        isinstance(optimizer.get(part), list)
        and all(isinstance(entry, dict) and _is_plain(entry) for entry in optimizer[part])
        for part in ("state", "hypers")
    ):
        raise bad_checkpoint(path, "optimizer is no table of plain values")
    for key in tensors:
        kind, _, rest = key.partition(".")
        index, _, name = rest.partition(".")
        is_state = index.isascii() and index.isdigit() and name and len(index) < 9
        if kind == "opt" and not (is_state and int(index) < len(optimizer["state"])):
            raise bad_checkpoint(path, f"{key[:40]} belongs to no parameter")
    return tensors, state


def check_optimizer(path: Path, optimizer, state: dict) -> None:
    """Refuse a state that is not of ``optimizer``, before its first step fails or goes astray.

    Raises:
        BloodcellError: other parameter groups, or averages of another shape than the weights.
    """
    if [set(entry) for entry in state["hypers"]] != [set(entry) for entry in optimizer.hypers]:
        raise bad_checkpoint(path, "hypers are those of another optimizer")
    parameters = [entry[0] for entry in optimizer.all_params()]
    if len(state["state"]) != len(parameters):
        raise bad_checkpoint(path, f"it has {len(state['state'])} parameters, unlike the model")
    for parameter, entry in zip(parameters, state["state"], strict=True):
        for name, value in entry.items():
            shape = torch.Size() if name == "step" else parameter.shape
            # torch's fused step trusts these shapes and would read beyond their end.
            if torch.is_tensor(value) and not (value.shape == shape and value.is_floating_point()):
                raise bad_checkpoint(path, f"a {name[:40]} has another shape than its parameter")


def bad_checkpoint(path: Path, problem: str) -> BloodcellError:
    """The error of a checkpoint that cannot be gone on with."""
    return BloodcellError(
        f"{path} cannot be resumed: {problem}.", "Train again under another --name."
    )


def _is_plain(values: dict) -> bool:
    return all(_is_number(value) for value in values.values())


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float) and -1e15 < value < 1e15
