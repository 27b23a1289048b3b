"""The one way to predict: a run's model, from image files to a table, a batch at a time."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import Learner

from ..data.cache import ImageReader, PictureBatch
from ..data.images import NEARLY_BLACK, NEARLY_WHITE
from ..data.loaders import normalization
from ..device import autocast, pick_device, prediction_batch_size
from ..errors import BloodcellError, DataError, UsageError, is_out_of_memory
from .calibration import Calibration, Reference, softmax
from .model import TimmModel, load_model, load_weights, timm_model
from .runs import Run

# The later one stands where several hold.
UNCERTAIN, UNLIKE, NO_CELL = "uncertain", "unlike training", "no cell"
BLACK, WHITE = "nearly black", "nearly white"


@dataclass(frozen=True)
class Predictions:
    """Predictions of some images.

    Attributes:
        table: see :meth:`Predictor.__call__`.
        logits: float64 (n, classes); of an ensemble the logarithms of its probabilities.
        features: penultimate features, float32 (n, d) on the CPU.
    """

    table: pd.DataFrame
    logits: np.ndarray
    features: torch.Tensor


@dataclass(frozen=True)
class PredictedBatch(Predictions):
    """Predictions, and in ``pictures`` what the network saw and what could not be read."""

    pictures: PictureBatch


class Predictor:
    """A model, ready to predict; made by ``load`` from a run or ``from_learner``.

    Args:
        model: the timm model, with its weights.
        arch: its architecture, whose normalisation it expects.
        size: its input size in pixels.
        crop: ``cell`` or ``frame``, what it was trained on.
        classes: names in the order of its outputs.
        calibration: None leaves the probabilities as they are.
        reference: training images to compare with; None: no image is flagged as unlike them.
        tta: average over the eight ways to turn and mirror an image, at eight times the cost. The
            temperature was fitted for one view: the probabilities are not calibrated. The distance
            is that of the image as it is.
        min_confidence: below it an image is flagged as uncertain, 0 to 1.
        device: torch device.
        full_precision: compute in float32 even where the device is faster in less.

    Examples:
        >>> from bloodcell_fastai import Predictor, Run
        >>> predictor = Predictor.load("mine", min_confidence=0.5)
        >>> table = predictor(Run.open("mine").table.path[:2])
        >>> list(table.columns)[:5]
        ['path', 'predicted', 'confidence', 'flag', 'p_EOSINOPHIL']
        >>> probabilities = table.filter(like="p_").sum(axis=1)
        >>> probabilities.round(6).tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        model: TimmModel,
        arch: str,
        size: int,
        crop: str,
        classes: Sequence[str],
        calibration: Calibration | None = None,
        reference: Reference | None = None,
        tta: bool = False,
        min_confidence: float = 0.0,
        device: torch.device | str = "cpu",
        full_precision: bool = False,
    ):
        if not 0 <= min_confidence <= 1:
            raise UsageError(
                f"min_confidence is {min_confidence}.", "Give `min_confidence` from 0 to 1."
            )
        self.device = torch.device(device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).eval()
        self.arch, self.size, self.crop, self.classes = arch, size, crop, tuple(classes)
        self.calibration, self.reference = calibration, reference
        self.tta, self.min_confidence, self.full_precision = tta, min_confidence, full_precision
        self.batch_size = prediction_batch_size(self.device, size)
        self.reader = ImageReader(size, crop)
        stats = normalization(arch)
        self._mean, self._std = stats.mean.to(self.device), stats.std.to(self.device)

    @classmethod
    def load(
        cls,
        run: Run | str | Path,
        tta: bool = False,
        min_confidence: float = 0.0,
        device: str = "auto",
        full_precision: bool = False,
    ) -> "Predictor":
        """The predictor of a run, given as such or by its folder or name; ``pbc`` is the
        pretrained model that ships with the package. Of a cross-validation it is an
        :class:`Ensemble`.

        Raises:
            BloodcellError: there is no such run, it has no model yet, or its files do not fit
                together; ``min_confidence`` is not between 0 and 1.
        """
        run = run if isinstance(run, Run) else Run.open(run)
        config = run.config
        if config.folds:
            members = [
                cls.load(fold, tta, min_confidence, device, full_precision) for fold in _folds(run)
            ]
            return Ensemble(members)
        run.require_model()
        model, _ = load_model(config.arch, len(config.classes), config.size, "none")
        load_weights(model, run.path / "model.safetensors", config.classes)
        return cls(
            model,
            config.arch,
            config.size,
            config.crop,
            config.classes,
            run.calibration,
            run.reference,
            tta,
            min_confidence,
            pick_device(device),
            full_precision,
        )

    @classmethod
    def from_learner(cls, learn: Learner, **kwargs) -> "Predictor":
        """The predictor of a learner of :func:`~bloodcell_fastai.blood_learner`, as it is now.

        It uses the learner's own model, which it puts into evaluation mode.

        Args:
            learn: its batches are of :func:`~bloodcell_fastai.blood_dls`.
            **kwargs: ``calibration`` and the arguments after it.
        """
        model, classes = timm_model(learn), learn.dls.vocab
        kwargs = {"device": learn.dls.device} | kwargs
        return cls(model, learn.arch, learn.size, learn.crop, classes, **kwargs)

    @property
    def temperature(self) -> float:
        """What the logits are divided by; 1 without a calibration."""
        return self.calibration.temperature if self.calibration else 1.0

    @property
    def calibrated(self) -> bool:
        """Whether the probabilities are those that the temperature was fitted for."""
        return self.calibration is not None and not self.tta

    @property
    def columns(self) -> list[str]:
        """Of the tables it makes."""
        return list(self._nothing().table.columns)

    def __call__(self, paths: Sequence[str | Path]) -> pd.DataFrame:
        """Predict images, prepared as those that the model was validated on.

        Args:
            paths: image files.

        Returns:
            One row per image, in order, with ``path``, ``predicted``, ``confidence``, ``flag``
            (empty, or the last that holds of ``uncertain``, ``unlike training``, ``no cell``,
            ``nearly black`` and ``nearly white``), ``p_<CLASS>`` (probabilities, 0 to 1; see
            :attr:`calibrated`) and, where the run has a reference, ``distance`` to the training
            images and ``nearest``, the path of the nearest one.

        Raises:
            BloodcellError: an image cannot be read.
        """
        return self.predict_all(paths).table

    def predict_all(
        self, paths: Sequence[str | Path], reader: ImageReader | None = None
    ) -> Predictions:
        """All of ``paths`` in one pass.

        Args:
            paths: image files.
            reader: where the images come from; see :meth:`stream`.

        Raises:
            BloodcellError: an image cannot be read.
        """
        batches: list[Predictions] = []
        unreadable: list[str] = []
        for batch in self.stream(paths, reader):
            unreadable += batch.pictures.unreadable
            # Without the pixels: those of a whole data set may not fit into memory.
            batches.append(Predictions(batch.table, batch.logits, batch.features))
        if unreadable:
            raise DataError(
                f"{len(unreadable)} of the images cannot be read, such as {unreadable[0]}.",
                "Leave them out, or use Predictor.stream, which passes over them.",
            )
        batches = batches or [self._nothing()]
        return Predictions(
            pd.concat([batch.table for batch in batches], ignore_index=True),
            np.concatenate([batch.logits for batch in batches]),
            torch.cat([batch.features for batch in batches]),
        )

    def stream(
        self, paths: Iterable[str | Path], reader: ImageReader | None = None
    ) -> Iterator[PredictedBatch]:
        """Predict images a batch at a time, while the next ones are being decoded.

        Args:
            paths: image files; drawn from as they are needed.
            reader: where the images come from, at the size and crop of the model; the files by
                default.

        Yields:
            The predictions of each batch, in order, and its unreadable files.
        """
        names = map(str, paths)
        chunks = iter(lambda: list(itertools.islice(names, self.batch_size)), [])
        for pictures in (reader or self.reader).batches(chunks):
            yield self.predict(pictures)

    def read(self, paths: Sequence[str | Path]) -> PictureBatch:
        """Images as the network sees them, and those that cannot be read."""
        return self.reader.read(paths)

    def predict(self, pictures: PictureBatch) -> PredictedBatch:
        """Predict images that are decoded already, at the size and crop of the model.

        Raises:
            BloodcellError: there is no memory for a single image.
        """
        probabilities, logits, features = self._probabilities(pictures.pixels)
        table = self._table(pictures, probabilities, features)
        return PredictedBatch(table, logits, features, pictures)

    def forward(self, pixels: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """One pass of the network; in halves, and from now on so, if memory is short.

        Args:
            pixels: uint8 (n, 3, size, size), RGB.

        Returns:
            Logits, float64 (n, classes), and penultimate features, float32 (n, d) on the CPU.

        Raises:
            BloodcellError: there is no memory for a single image.
        """
        results = []
        for part in pixels.split(self.batch_size):
            try:
                results.append(self._forward(part))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(part))
                results.append(self.forward(part))
        logits, features = zip(*results, strict=True)
        return np.concatenate(logits), torch.cat(features)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, size, size) to what the network takes: float32 on its device."""
        x = pixels.to(self.device, non_blocking=True).float().div_(255)
        return x.sub_(self._mean).div_(self._std)

    def distances(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """How unlike the training images some images are.

        Args:
            features: as of :meth:`forward`.

        Returns:
            Distances, float (n,) from 0 to 2, whether they are beyond the threshold, bool (n,), and
            the path of the nearest training image of each; None without a reference.
        """
        if self.calibration is None or self.reference is None:
            return None
        distance, rows = self.reference.nearest(features)
        nearest = self.reference.table.path.to_numpy()[rows]
        return distance, distance > self.calibration.distance_threshold, nearest

    def _probabilities(self, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Probabilities and logits, float64 (n, classes), and features (n, d)."""
        if not len(pixels):
            nothing = np.empty((0, len(self.classes)))
            width = 0 if self.reference is None else self.reference.features.shape[1]
            return nothing, nothing, torch.empty(0, width)
        if not self.tta:
            logits, features = self.forward(pixels)
            return softmax(logits, self.temperature), logits, features
        views = [self.forward(_view(pixels, number)) for number in range(8)]
        probabilities = np.mean([softmax(logits, self.temperature) for logits, _ in views], axis=0)
        logits = np.mean([logits for logits, _ in views], axis=0)
        return probabilities, logits, views[0][1]  # as the threshold was fitted

    def _table(
        self, pictures: PictureBatch, probabilities: np.ndarray, features: torch.Tensor
    ) -> pd.DataFrame:
        confidence = probabilities.max(axis=1)
        flag = np.where(confidence < self.min_confidence, UNCERTAIN, "").astype(object)
        compared = {}
        if (found := self.distances(features)) is not None:
            distance, unlike, nearest = found
            flag[unlike] = UNLIKE
            compared = {"distance": distance, "nearest": nearest}
        flag[~pictures.has_cell] = NO_CELL
        flag[pictures.brightness < NEARLY_BLACK] = BLACK
        flag[pictures.brightness > NEARLY_WHITE] = WHITE
        columns = {
            "path": pictures.paths,
            "predicted": np.array(self.classes)[probabilities.argmax(axis=1)],
            "confidence": confidence,
            "flag": flag,
        }
        columns |= {f"p_{name}": probabilities[:, i] for i, name in enumerate(self.classes)}
        return pd.DataFrame(columns | compared)

    def _nothing(self) -> PredictedBatch:
        return self.predict(self.read([]))

    @torch.inference_mode()
    def _forward(self, pixels: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        classifier = self.model.get_classifier()  # of distilled models the first of several
        classifier = classifier[0] if isinstance(classifier, tuple) else classifier
        inputs: list[torch.Tensor] = []
        hook = classifier.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            with nullcontext() if self.full_precision else autocast(self.device):
                logits = self.model(self.normalise(pixels))
        finally:
            hook.remove()
        return logits.double().cpu().numpy(), inputs[0].flatten(1).float().cpu()

    def _halve(self, n: int) -> None:
        if n == 1:
            raise BloodcellError(
                f"There is no memory on {self.device} for one image of {self.size} px.",
                "Close other programs, or use `device=cpu`.",
            )
        self.batch_size = n // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"Memory is short: going on with {self.batch_size} images at a time.", stacklevel=2
        )


class Ensemble(Predictor):
    """The models of a cross-validation, which predict together.

    Probabilities are the mean of those of the models (a deep ensemble, Lakshminarayanan et al.
    2017). They are not calibrated: every image was trained on by all models but one. ``distance``
    is the mean of their distances, and an image is unlike training where it is so for most of
    them, each by its own threshold; ``nearest`` is that of the model with the smallest distance.
    Features are those of the models beside one another.

    Args:
        members: predictors of models with the same input and the same classes.
    """

    def __init__(self, members: Sequence[Predictor]):
        vars(self).update(vars(members[0]))  # the same input, classes and settings
        self.calibration = self.reference = None
        self.members = list(members)

    def forward(self, pixels: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """Logarithms of the mean probabilities, and the features; see :meth:`Predictor.forward`."""
        _, logits, features = self._probabilities(pixels)
        return logits, features

    def distances(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """See :meth:`Predictor.distances`; None if a member has no reference."""
        parts = features.tensor_split(len(self.members), dim=1)
        found = [member.distances(part) for member, part in zip(self.members, parts, strict=True)]
        if any(each is None for each in found):
            return None
        each = zip(*filter(None, found), strict=True)
        distances, unlike, paths = map(np.stack, each)
        nearest = paths[distances.argmin(axis=0), np.arange(len(features))]
        return distances.mean(axis=0), unlike.mean(axis=0) > 0.5, nearest

    def _probabilities(self, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        found = [member._probabilities(pixels) for member in self.members]
        probabilities = np.mean([each[0] for each in found], axis=0)
        logits = np.log(np.maximum(probabilities, np.finfo(float).tiny))
        return probabilities, logits, torch.cat([each[2] for each in found], dim=1)


def _folds(run: Run) -> list[Run]:
    """The runs of a cross-validation.

    Raises:
        BloodcellError: one is not trained to its end, or they are not of one kind.
    """
    folds = [run.fold(number) for number in range(1, run.config.folds + 1)]
    if left := [fold.name for fold in folds if not (fold.started and fold.finished)]:
        raise BloodcellError(
            f"Run {run.name} is not trained to its end: {left[0]} is missing.",
            f"Go on with it: {run.resume_command}",
        )
    kinds = {(c.arch, c.size, c.crop, c.classes) for c in (fold.config for fold in folds)}
    if len(kinds) > 1:
        raise DataError(
            f"The folds of run {run.name} are models of different kinds.", "Was a config edited?"
        )
    return folds


def _view(pixels: torch.Tensor, number: int) -> torch.Tensor:
    """One of the eight ways to turn and mirror square images; 0 leaves them as they are."""
    return (pixels.flip(-1) if number >= 4 else pixels).rot90(number % 4, (-2, -1))
