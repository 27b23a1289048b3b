"""What several formats need: the model with its calibration, and images to compare models on."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...data.cache import PictureBatch, require_readable
from ...errors import BloodcellError, MissingFileError
from ...model.calibration import Calibration
from ...model.inference import Predictor
from ...model.model import TimmModel, create_sized
from ...model.runs import Run


def timm_copy(predictor: Predictor, **kwargs) -> tuple[TimmModel, dict[str, int]]:
    """A copy of a predictor's model as timm makes it with ``kwargs``, and what timm was told of
    the size."""
    model, size_arguments = create_sized(
        predictor.arch, len(predictor.classes), predictor.size, **kwargs
    )
    model.load_state_dict(predictor.model.state_dict())
    return model.eval(), size_arguments


def divide_by_temperature(model: TimmModel, calibration: Calibration | None) -> None:
    """Divide the weights of the classifier by the temperature, so that a plain softmax of the
    logits is calibrated (Guo et al. 2017).

    Raises:
        BloodcellError: the classifier is not a single linear layer.
    """
    if calibration is None or calibration.temperature == 1:
        return
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        raise BloodcellError(
            f"The calibration cannot be written into the classifier of {type(model).__name__}.",
            "Use `format=onnx`, which divides the logits in its graph.",
        )
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.div_(calibration.temperature)


def validation_pictures(run: Run, predictor: Predictor, n: int) -> PictureBatch:
    """Validation images of a run as its network sees them: ``n``, evenly spread, or all it has.

    Raises:
        BloodcellError: none of them is there any more, or one cannot be read.
    """
    table = run.table
    there = [path for path in table.path[table.part == "valid"] if Path(path).is_file()]
    if not there:
        raise MissingFileError(
            f"The validation images of {run.name} are gone. Without them an export cannot be "
            "checked, and none is written.",
            f"Put the data back to {run.root}, say where it is now with `data`, or use "
            "`format=timm`, which needs no images.",
        )
    spread = np.linspace(0, len(there) - 1, min(n, len(there))).round().astype(int)
    pictures = predictor.read([there[index] for index in spread])
    require_readable(pictures)
    return pictures


def probabilities(predictor: Predictor, pictures: PictureBatch) -> np.ndarray:
    """Calibrated probabilities, float64 (n, classes)."""
    table = predictor.predict(pictures).table
    return table[[f"p_{name}" for name in predictor.classes]].to_numpy(float)


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Between probabilities (n, classes) of two models; NaN where one of them is NaN."""
    return float(np.abs(one - other).max())
