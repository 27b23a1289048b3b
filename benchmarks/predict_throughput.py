"""Predictions per second: ours against learn.predict in a loop and learn.get_preds on a test_dl.

    python benchmarks/predict_throughput.py [--data PATH] [--size 256] [--images 96]

All three have the same network with the same weights and read the same files. The loop runs
over a tenth of them: it takes long. Ours is Predictor, with everything that `bloodcell predict`
computes besides: calibration, flags, the nearest training image.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import arguments, in_turn, machine, plain_dls, plain_learner, read_table, seconds
from fastai.vision.all import PILImage

from bloodcell_fastai import Config, Predictor, Run, timm_model
from bloodcell_fastai.training.calibration import calibrate
from bloodcell_fastai.training.fit import make_learner, resolve

TOLERANCE = 0.03  # of a probability in bfloat16


def main() -> None:
    args = arguments(__doc__, images=96)
    table = read_table(args.data, 64, args.images)
    paths = table.path[table.part == "valid"].tolist()
    run, model = make_run(table, args)
    predictor = Predictor.load(run)
    # fastai's probabilities are not calibrated.
    predictor.calibration = replace(predictor.calibration, temperature=1.0)
    learn = plain_learner(plain_dls(table, args.arch, args.size, 64), model)
    few = paths[: max(4, len(paths) // 10)]
    results = {}

    def loop():
        with learn.no_bar():
            results["learn.predict"] = [learn.predict(PILImage.create(p))[2].numpy() for p in few]

    def get_preds():
        with learn.no_bar():
            results["get_preds"] = learn.get_preds(dl=learn.dls.test_dl(paths))[0].numpy()

    def ours():
        columns = [f"p_{name}" for name in predictor.config.classes]
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


def make_run(table, args):
    """An untrained run, and its model in float32 and the default layout."""
    config = Config(
        arch=args.arch, size=args.size, weights="none", crop="frame", epochs=1, batch_size=16
    )
    learn = make_learner(config, table)
    run = Run(Path(tempfile.mkdtemp(prefix="bench-")) / "run")
    run.start(resolve(config, learn), table)
    run.save_model(learn)
    calibrate(learn, run)
    return run, timm_model(learn)


if __name__ == "__main__":
    main()
