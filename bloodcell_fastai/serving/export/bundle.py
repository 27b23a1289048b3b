"""For other users of this package: a run of half the size, without the folders of this machine."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import BloodcellError
from ...files import atomic_path, read_json, write_json
from ...model.inference import Predictor
from ...model.runs import Run
from ...reporter import Reporter
from .common import largest_difference, probabilities, validation_pictures

CHECKED_IMAGES = 256
MAX_DIFFERENCE = 0.01  # of a probability, between weights in half and in full precision
MAX_ROUNDING = 2**-10  # of a tensor's largest value; rounding to half precision costs 2**-11
COPIED = ("history.csv", "predictions.csv", "reference.safetensors", "reference.csv")
RESULTS = ("metrics.json", "calibration.json")  # they carry the hash of the weights
FILES = ("config.json", "split.csv", "model.safetensors", *COPIED, *RESULTS, "last/finished.json")


def write(run: Run, folder: Path, reporter: Reporter) -> list[str]:
    """Write a run that everything can read which reads runs; the names of its files.

    What only training needs is left out. ``config.json``, written last, makes it a run.

    Raises:
        BloodcellError: weights in half precision give other probabilities, or the validation
            images are gone.
    """
    predictor = Predictor.load(run, device="cpu", full_precision=True)
    pictures = validation_pictures(run, predictor, CHECKED_IMAGES)
    expected = probabilities(predictor, pictures)
    state = half_precision(predictor.model.state_dict())
    predictor.model.load_state_dict(state)
    difference = largest_difference(probabilities(predictor, pictures), expected)
    if not difference <= MAX_DIFFERENCE:  # NaN too
        raise BloodcellError(
            f"In half precision the model's probabilities change by up to {difference:.1e} on "
            f"{len(pictures)} images, more than {MAX_DIFFERENCE}. Nothing was written.",
            "Use `format=timm`, which keeps full precision.",
        )
    _write_run(run, Run(folder), state)
    files = [name for name in FILES if (folder / name).is_file()]
    size = sum((folder / name).stat().st_size for name in files)
    reporter.say(
        f"Checked on {len(pictures)} validation images: in half precision a probability changes "
        f"by at most {difference:.1e}. {size / 1e6:.1f} MB in all."
    )
    return files


def half_precision(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model with its weights as float16, half the size.

    What has one dimension (biases, norms, the running statistics of BatchNorm) stays as it is:
    it is small, and its values may be beyond float16 or below it. So does a tensor that loses
    more than rounding costs, because its values are too large or all too small.
    """
    halved = dict(state)
    for name, tensor in state.items():
        if tensor.ndim > 1 and tensor.is_floating_point():
            half = tensor.half()
            error = (half.float() - tensor).abs().max()  # infinite where a value is too large
            if error <= MAX_ROUNDING * tensor.abs().max():
                halved[name] = half
    return halved


def _write_run(run: Run, bundle: Run, state: Mapping[str, torch.Tensor]) -> None:
    bundle.save_weights(state, run.config.classes)
    for name in COPIED:
        if (run.path / name).is_file():
            with atomic_path(bundle.path / name) as temporary:
                shutil.copyfile(run.path / name, temporary)
        else:
            (bundle.path / name).unlink(missing_ok=True)  # of another model
    for name in RESULTS:
        if (run.path / name).is_file():
            values = read_json(run.path / name)
            run.require_weights(
                values.get("weights", ""), run.path / name, "Interpret the run again."
            )
            write_json(bundle.path / name, values | {"weights": bundle.weights_hash})
    bundle.finish()
    data, table = run.root.name, run.relative(run.table)  # names without their folders
    asked = run.asked.changed(data=data, weights=Path(run.asked.weights).name)
    resolved = run.config.changed(data=data, weights=Path(run.config.weights).name)
    bundle.start(asked, resolved, table.assign(path=f"{data}/" + table.path))
