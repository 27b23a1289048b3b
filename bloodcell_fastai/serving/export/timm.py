"""For a program with timm and without this package: ``model.safetensors`` and ``config.json``."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from timm.models import save_for_hf

from ...files import atomic_path
from ...model.inference import Predictor
from ...model.runs import Run
from ...reporter import Reporter
from .common import divide_by_temperature, timm_copy

FILES = ["config.json", "model.safetensors"]
KEPT = (
    *("architecture", "first_conv", "classifier", "fixed_input_size", "min_input_size"),
    *("mean", "std"),  # with which the run was trained
)


def write(run: Run, folder: Path, reporter: Reporter) -> list[str]:
    """Write the model as timm reads it, calibrated by its classifier; the names of the files.

    Raises:
        BloodcellError: the classifier cannot be calibrated.
    """
    config = run.config
    predictor = Predictor.load(run, device="cpu")
    model, size_arguments = timm_copy(predictor)
    divide_by_temperature(model, predictor.calibration)
    # What describes the initial weights (address, tag, licence, test size) is left out.
    kept = {name: model.pretrained_cfg[name] for name in KEPT if name in model.pretrained_cfg}
    model.pretrained_cfg = kept | {
        "input_size": (3, config.size, config.size),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "num_classes": len(config.classes),
    }
    with TemporaryDirectory() as temporary:
        save_for_hf(
            model,
            temporary,
            model_config={"label_names": list(config.classes)},
            model_args=size_arguments,
            safe_serialization=True,
        )
        for name in FILES:
            with atomic_path(folder / name) as target:
                shutil.copyfile(Path(temporary, name), target)
    return FILES
