from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.model.calibration import Calibration
from bloodcell_fastai.serving.export.common import divide_by_temperature


def calibration(temperature: float) -> Calibration:
    return Calibration(
        temperature=temperature,
        distance_threshold=1.0,
        neighbours=1,
        ece_before=0.1,
        ece_after=0.1,
        n_images=10,
    )


def test_the_temperature_divides_the_logits():
    linear, features = nn.Linear(3, 2), torch.randn(5, 3)
    before = linear(features).detach()
    divide_by_temperature(SimpleNamespace(get_classifier=lambda: linear), calibration(2.5))
    torch.testing.assert_close(linear(features), before / 2.5)


def test_only_a_linear_classifier_can_be_divided():
    model = SimpleNamespace(get_classifier=lambda: (nn.Linear(2, 2), nn.Linear(2, 2)))
    divide_by_temperature(model, None)
    divide_by_temperature(model, calibration(1.0))
    with pytest.raises(
        BloodcellError,
        match=r"cannot be written into the classifier of .*SimpleNamespace.*\n.*`format=onnx`",
    ):
        divide_by_temperature(model, calibration(2.0))
