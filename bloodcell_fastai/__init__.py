"""Fine-tune MaxViT-nano on blood-cell photographs with fastai, and know how good it really is.

The public names are imported when they are first used, because torch and fastai take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config
    from .data.augment import augmentation
    from .data.datasets import open_dataset
    from .data.demo import make_demo
    from .data.duplicates import find_photos
    from .data.loaders import blood_dls
    from .data.splits import leakage, split_table
    from .errors import BloodcellError
    from .evaluation.audit import audit
    from .evaluation.cross_validation import cross_validate
    from .evaluation.explain import heat_maps, overlay
    from .evaluation.interpretation import (
        BloodInterpretation,
        interpret_external,
        interpret_run,
        load_learner,
    )
    from .evaluation.robustness import measure_robustness, robustness_images
    from .model.inference import Predictor
    from .model.model import timm_model
    from .model.runs import Run
    from .serving.export import export_run
    from .training.calibrate import calibrate
    from .training.learner import blood_learner
    from .training.train import train

__version__ = "0.1.0"

_MODULES = {
    "BloodcellError": "errors",
    "BloodInterpretation": "evaluation.interpretation",
    "Config": "config",
    "Predictor": "model.inference",
    "Run": "model.runs",
    "audit": "evaluation.audit",
    "augmentation": "data.augment",
    "blood_dls": "data.loaders",
    "blood_learner": "training.learner",
    "calibrate": "training.calibrate",
    "cross_validate": "evaluation.cross_validation",
    "export_run": "serving.export",
    "find_photos": "data.duplicates",
    "heat_maps": "evaluation.explain",
    "interpret_external": "evaluation.interpretation",
    "interpret_run": "evaluation.interpretation",
    "leakage": "data.splits",
    "load_learner": "evaluation.interpretation",
    "make_demo": "data.demo",
    "measure_robustness": "evaluation.robustness",
    "open_dataset": "data.datasets",
    "overlay": "evaluation.explain",
    "robustness_images": "evaluation.robustness",
    "split_table": "data.splits",
    "timm_model": "model.model",
    "train": "training.train",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
