"""Predictions per second: ours against learn.predict in a loop and learn.get_preds on a test_dl.

    python benchmarks/predict_throughput.py [--data PATH] [--size 256] [--images 96]

All three have the same network with the same weights and read the same files; the slow loop
runs over a tenth of them. Ours is Predictor with everything that `bloodcell predict` computes:
calibration, flags, the nearest training image.
"""

from copy import deepcopy

import numpy as np
from common import (
    arguments,
    in_turn,
    machine,
    our_dls,
    plain_dls,
    plain_learner,
    read_table,
    seconds,
)
from fastai.vision.all import PILImage

from bloodcell_fastai import Predictor, blood_learner, calibrate, timm_model

TOLERANCE = 0.03  # of a probability in bfloat16


def main() -> None:
    args = arguments(__doc__, images=96)
    table = read_table(args.data, 64, args.images)
    paths = table.path[table.part == "valid"].tolist()
    untrained = blood_learner(our_dls(table, args.arch, args.size), weights="none")
    # A copy: Predictor changes the memory layout of its own.
    model = deepcopy(timm_model(untrained))
    learn = plain_learner(plain_dls(table, args.arch, args.size, 64), model)
    predictor = Predictor.from_learner(untrained)
    calibration, predictor.reference = calibrate(predictor, table)
    # fastai's probabilities are not calibrated.
    predictor.calibration = calibration.model_copy(update={"temperature": 1.0})
    few = paths[: max(4, len(paths) // 10)]
    results = {}

    def loop():
        with learn.no_bar():
            results["learn.predict"] = [learn.predict(PILImage.create(p))[2].numpy() for p in few]

    def get_preds():
        with learn.no_bar():
            results["get_preds"] = learn.get_preds(dl=learn.dls.test_dl(paths))[0].numpy()

    def ours():
        columns = [f"p_{name}" for name in predictor.classes]
        results["ours"] = predictor(paths)[columns].to_numpy()

    medians = in_turn(
        {
            "learn.predict": lambda: len(few) / seconds(loop),
            "get_preds": lambda: len(paths) / seconds(get_preds),
            "ours": lambda: len(paths) / seconds(ours),
        },
        args.repeats,
    )
    for name in ("learn.predict", "get_preds"):
        theirs = np.stack(results[name])
        difference = np.abs(results["ours"][: len(theirs)] - theirs).max()
        print(f"largest difference of a probability to {name}: {difference:.4f}")
        assert difference < TOLERANCE
    print(f"\n{args.arch}, {args.size} px, {machine()}")
    for name, rate in medians.items():
        print(f"{name:28s} {rate:8.2f} images/s   ours / it: {medians['ours'] / rate:5.2f}")


if __name__ == "__main__":
    main()
