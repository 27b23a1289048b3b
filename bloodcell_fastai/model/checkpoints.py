"""Checkpoints, from which training continues: written, read and validated."""

import json
import re
from pathlib import Path
from typing import Annotated

import torch
from fastai.vision.all import Learner
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from safetensors import safe_open

from ..errors import DataError
from ..files import describe_invalid
from .model import timm_model, write_tensors

MAX_EPOCHS = 100_000  # as in a config
_Int = Annotated[int, Field(ge=-(10**15), le=10**15)]
_Float = Annotated[float, Field(ge=-1e15, le=1e15)]
_Table = dict[str, bool | _Int | _Float]


class OptimizerState(BaseModel):
    """What of fastai's optimizer state is no tensor: a table for each parameter and each group."""

    model_config = ConfigDict(extra="forbid")

    state: list[_Table]
    hypers: list[_Table]


class Checkpoint(BaseModel):
    """The end of an epoch: weights, optimizer, best score.

    Attributes:
        epochs_done: epochs finished so far.
        best: best validation accuracy so far, 0 to 1.
        wait: epochs since then.
        optimizer: what of its state is no tensor.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    epochs_done: int = Field(ge=1, le=MAX_EPOCHS)
    best: float = Field(ge=0, le=1)
    wait: int = Field(ge=0, le=MAX_EPOCHS)
    optimizer: OptimizerState
    _path: Path = PrivateAttr()
    _tensors: dict[str, torch.Tensor] = PrivateAttr()

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read what :func:`write_checkpoint` wrote.

        Raises:
            BloodcellError: the file is damaged, or the message names the value that is wrong.
        """
        try:
            with safe_open(path, framework="pt") as file:
                checkpoint = cls.model_validate(json.loads((file.metadata() or {})["state"]))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except ValidationError as error:
            raise _unusable(path, describe_invalid(error)) from None
        except Exception as error:  # safetensors has an error of its own; json and torch have more
            reason = str(error).partition("\n")[0]
            raise _unusable(path, f"it is damaged ({type(error).__name__}: {reason})") from None
        checkpoint._path, checkpoint._tensors = path, tensors
        return checkpoint

    def restore_model(self, learn: Learner) -> None:
        """Put the weights into ``learn``."""
        model = {k[6:]: v for k, v in self._tensors.items() if k.startswith("model.")}
        try:
            timm_model(learn).load_state_dict(model)
        except (RuntimeError, TypeError):
            raise _unusable(self._path, "its weights are those of another model") from None

    def restore_optimizer(self, learn: Learner) -> None:
        """Put the optimizer's state into ``learn``; after freezing, which clears it."""
        learn.create_opt()
        state: list[dict] = [dict(entry) for entry in self.optimizer.state]
        hypers, parameters = self.optimizer.hypers, [each[0] for each in learn.opt.all_params()]
        if [set(entry) for entry in hypers] != [set(entry) for entry in learn.opt.hypers]:
            raise _unusable(self._path, "hypers are those of another optimizer")
        if len(state) != len(parameters):
            raise _unusable(self._path, f"it has {len(state)} parameters, unlike the model")
        for key, value in self._tensors.items():
            if not key.startswith("opt."):
                continue
            found = re.fullmatch(r"opt\.([0-9]{1,8})\.(.+)", key)
            if not found or int(found[1]) >= len(state):
                raise _unusable(self._path, f"{key[:40]} belongs to no parameter")
            index, name = int(found[1]), found[2]
            shape = torch.Size() if name == "step" else parameters[index].shape
            # torch's fused step trusts these shapes and would read beyond their end.
            if value.shape != shape or not value.is_floating_point():
                raise _unusable(self._path, f"a {name[:40]} has another shape than its parameter")
            state[index][name] = value
        learn.opt.load_state_dict({"state": state, "hypers": hypers})


def write_checkpoint(path: Path, learn: Learner, epochs_done: int, best: float, wait: int) -> None:
    """Write what resuming needs, in one file, so that its parts always belong together.

    Args:
        path: the file.
        learn: its weights and its optimizer's state are written.
        epochs_done: see :class:`Checkpoint`, as ``best`` and ``wait``.
        best: best validation accuracy so far, 0 to 1.
        wait: epochs since then.
    """
    state, hypers = learn.opt.state_dict()["state"], learn.opt.state_dict()["hypers"]
    tensors = {f"model.{k}": v for k, v in timm_model(learn).state_dict().items()}
    plain: list[dict] = []
    for index, entry in enumerate(state):
        tensors |= {f"opt.{index}.{k}": v for k, v in entry.items() if torch.is_tensor(v)}
        plain.append({k: v for k, v in entry.items() if not torch.is_tensor(v)})
    optimizer = {"state": plain, "hypers": [dict(hyper) for hyper in hypers]}
    values = {"epochs_done": epochs_done, "best": best, "wait": wait, "optimizer": optimizer}
    write_tensors(path, tensors, {"state": json.dumps(values)})


def _unusable(path: Path, problem: str) -> DataError:
    return DataError(f"{path} cannot be resumed: {problem}.", "Train again under another `name`.")
