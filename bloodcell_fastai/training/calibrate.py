"""Calibration of a trained model on the validation images of its table."""

import pandas as pd
from torch.nn.functional import normalize

from ..data.cache import ImageReader
from ..data.loaders import check_labels
from ..model.calibration import (
    IN_DISTRIBUTION,
    Calibration,
    Reference,
    count_neighbours,
    fit_temperature,
    photo_weights,
    probability_error,
    reference_table,
    softmax,
    weighted_quantile,
)
from ..model.inference import Predictor


def calibrate(
    predictor: Predictor, table: pd.DataFrame, reader: ImageReader | None = None, seed: int = 42
) -> tuple[Calibration, Reference]:
    """Fit the temperature and the distance threshold of a model.

    One pass over the validation images gives the temperature (Guo et al. 2017), for which each
    photograph counts once however many copies of it there are, and, with the features of up to
    2,000 training images without augmentation, the distance threshold: 95 % of the validation
    photographs are within it (Sun et al. 2022).

    Both are optimistic where the split leaks. Copies of training photographs are predicted with
    a confidence, and are as near to the training images, as new photographs never will be: the
    temperature comes out too low and the threshold too strict.

    Args:
        predictor: the model; a calibration that it has already is not used.
        table: image table with ``part``.
        reader: where the images come from; their files by default.
        seed: of the choice of training images.

    Returns:
        The temperature and the threshold, a distance from 0 to 2, and the training images to
        measure distances from. The caller saves them: ``run.save_calibration(*calibrate(...))``.

    Raises:
        BloodcellError: a label is none of the model's classes, or an image cannot be read.

    Examples:
        >>> from bloodcell_fastai import Predictor, Run, calibrate
        >>> run = Run.open("mine")
        >>> calibration, reference = calibrate(Predictor.load(run), run.table)
        >>> calibration.temperature > 0, 0 < calibration.distance_threshold < 2
        (True, True)
        >>> len(reference.features) == len(reference.table)
        True
    """
    valid = table[table.part == "valid"]
    check_labels(valid.label, predictor.classes)
    labels = pd.Index(predictor.classes).get_indexer(valid.label)
    validated = predictor.predict_all(valid.path, reader)
    weights = photo_weights(valid)
    temperature = fit_temperature(validated.logits, labels, weights)

    chosen = reference_table(table[table.part == "train"], seed=seed)
    features = predictor.predict_all(chosen.path, reader).features
    reference = Reference(normalize(features).half(), chosen, count_neighbours(len(chosen)))
    distances, _ = reference.nearest(validated.features)
    calibration = Calibration(
        temperature=temperature,
        distance_threshold=weighted_quantile(distances, weights, IN_DISTRIBUTION),
        neighbours=reference.neighbours,
        ece_before=probability_error(softmax(validated.logits), labels),
        ece_after=probability_error(softmax(validated.logits, temperature), labels),
        n_images=len(labels),
    )
    return calibration, reference
