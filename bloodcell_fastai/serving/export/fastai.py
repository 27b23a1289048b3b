"""For fastai: the pickle of ``learn.export``."""

from pathlib import Path

from ...evaluation.interpretation import load_learner
from ...files import atomic_path
from ...model.model import timm_model
from ...model.runs import Run
from ...reporter import Reporter
from ...training.callbacks import precision_callback
from .common import divide_by_temperature


def write(run: Run, folder: Path, reporter: Reporter) -> list[str]:
    """Write the learner's pickle, calibrated by its classifier; the name of the file.

    Raises:
        BloodcellError: the classifier cannot be calibrated, or validation images are gone.
    """
    reporter.warn(
        "PICKLE: loading export.pkl runs the code that it contains. Load no pickle from others; "
        "to pass the model on, use the format timm or onnx."
    )
    learn = load_learner(run)
    for callback in precision_callback(learn.dls.device):  # chosen for this machine
        learn.remove_cb(type(callback))
    divide_by_temperature(timm_model(learn), run.calibration)
    with atomic_path(folder / "export.pkl") as temporary:
        learn.export(temporary.absolute())
    return ["export.pkl"]
