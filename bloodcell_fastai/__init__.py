"""Fine-tune MaxViT-nano on blood-cell photographs with fastai, and know how good it really is.

The public names are imported when they are first used, because torch and fastai take seconds.
"""

from importlib import import_module

_PUBLIC = {
    "BloodcellError": "errors",
    "Config": "config",
    "open_dataset": "data.dataset",
    "make_demo": "data.smears",
    "split_table": "data.splits",
    "leakage": "data.splits",
    "with_photos": "data.provenance",
    "find_photos": "data.provenance",
    "audit": "analysis.audit",
    "cross_validate": "analysis.crossval",
    "blood_dls": "data.blocks",
    "augmentation": "data.augmentation",
    "blood_learner": "training.learner",
    "timm_model": "training.learner",
    "calibrate": "training.calibration",
    "Run": "training.runs",
    "train": "training.workflow",
    "interpret": "analysis.interpretation",
    "interpret_run": "analysis.interpretation",
    "interpret_external": "analysis.interpretation",
    "stress_images": "analysis.stress",
    "stress_test": "analysis.stress",
    "load_learner": "analysis.interpretation",
    "heat_maps": "analysis.explain",
    "overlay": "analysis.explain",
    "Predictor": "serving.inference",
    "export_run": "serving.export",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
