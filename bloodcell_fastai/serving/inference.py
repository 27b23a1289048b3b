"""Predict files and folders with a trained run."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from fastai.vision.all import Learner

from ..config import Config
from ..data.blocks import image_dls, pick_device
from ..data.dataset import image_size, list_folder
from ..errors import BloodcellError, usage_error
from ..files import write_text
from ..training.callbacks import use_progress
from ..training.learner import blood_learner
from ..training.runs import Run


class Predictor:
    """A run's best model, ready to predict.

    >>> Predictor.load(run)(["cell.jpg"])  # doctest: +SKIP
    """

    def __init__(self, run: Run, config: Config):
        self.run, self.config = run, config
        self._learn: Learner | None = None

    @classmethod
    def load(cls, run: Run | str | Path) -> "Predictor":
        """The predictor of a run, given as such or by its folder or name.

        Raises:
            BloodcellError: there is no such run or it has no model yet.
        """
        run = run if isinstance(run, Run) else Run.open(run)
        run.require_model()
        return cls(run, run.config)

    def __call__(self, paths: Sequence[str | Path]) -> pd.DataFrame:
        """Predict images, which pass through the code that made the validation pictures.

        Args:
            paths: image files.

        Returns:
            One row per image, in order: ``path``, ``predicted``, ``confidence`` and
            ``p_<CLASS>``, probabilities from 0 to 1.

        Raises:
            OSError: an image cannot be read.
        """
        config = self.config
        dls = image_dls(paths, config.arch, config.size, config.batch_size, device=pick_device())
        if self._learn is None:
            self._learn = blood_learner(
                dls, config.arch, "none", size=config.size, n_out=len(config.classes)
            )
            self.run.load_model(self._learn)
            use_progress(self._learn)
        probabilities = self._learn.get_preds(dl=dls.valid)[0].double().numpy()
        best = probabilities.argmax(axis=1)
        table = pd.DataFrame(
            {
                "path": [str(path) for path in paths],
                "predicted": [config.classes[index] for index in best],
                "confidence": probabilities.max(axis=1),
            }
        )
        return table.assign(
            **{f"p_{name}": probabilities[:, i] for i, name in enumerate(config.classes)}
        )


def predict(run: Run, paths: Sequence[str | Path]) -> tuple[pd.DataFrame, list[Path]]:
    """Predict files, and every image below folders.

    Returns:
        The table of :meth:`Predictor.__call__` and the files that cannot be read, which are
        left out of it.

    Raises:
        BloodcellError: a path does not exist, or there is no readable image.
    """
    files = [file for path in paths for file in _expand(Path(path))]
    readable = [file for file in files if image_size(file) is not None]
    unreadable = sorted(set(files) - set(readable))
    if not readable:
        raise BloodcellError(
            f"No readable image in {', '.join(map(str, paths))}.", "Give image files or folders."
        )
    return Predictor.load(run)(readable), unreadable


def write_predictions(table: pd.DataFrame, path: Path) -> None:
    """Write a table of predictions as CSV, or as a JSON list of objects, by the file's suffix.

    Raises:
        BloodcellError: another suffix.
    """
    if path.suffix == ".csv":
        write_text(path, table.to_csv(index=False))
    elif path.suffix == ".json":
        write_text(path, json.dumps(table.to_dict("records"), indent=1) + "\n")
    else:
        raise usage_error(f"Cannot write {path}.", "Use a name that ends in .csv or .json.")


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return list_folder(path)
    if not path.exists():
        raise BloodcellError(f"No file or folder {path}.", "Check the path.")
    return [path]
