"""Seconds from a trained model to its report: ours against fastai's own sequence.

    python benchmarks/interpret.py [--data PATH] [--size 256] [--images 96]

fastai: ClassificationInterpretation.from_learner, plot_confusion_matrix,
print_classification_report, plot_top_losses. Ours: the same with BloodInterpretation, which
predicts once. Network, weights and images are the same.
"""

from copy import deepcopy

import matplotlib
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
from fastai.vision.all import ClassificationInterpretation
from matplotlib import pyplot

from bloodcell_fastai import BloodInterpretation, blood_learner, timm_model

matplotlib.use("agg")


def main() -> None:
    args = arguments(__doc__, images=96)
    table = read_table(args.data, 64, args.images)
    ours = blood_learner(our_dls(table, args.arch, args.size), weights="none")
    # A copy: BloodInterpretation changes the memory layout of its own.
    model = deepcopy(timm_model(ours))
    plain = plain_learner(plain_dls(table, args.arch, args.size, 64), model)
    matrices = {}

    def fastais():
        with plain.no_bar():
            found = ClassificationInterpretation.from_learner(plain)
            found.plot_confusion_matrix()
            found.print_classification_report()
            found.plot_top_losses(9)
            matrices["fastai"] = found.confusion_matrix()
        pyplot.close("all")

    def mine():
        found = BloodInterpretation.from_learner(ours)
        found.plot_confusion_matrix()
        found.print_classification_report()
        found.plot_top_losses(9)
        matrices["ours"] = found.confusion_matrix()
        pyplot.close("all")

    medians = in_turn(
        {"fastai": lambda: seconds(fastais), "ours": lambda: seconds(mine)}, args.repeats
    )
    moved = int(np.abs(matrices["ours"] - matrices["fastai"]).sum()) // 2
    print(f"images that changed their class: {moved} of {args.images}")
    # An untrained network is undecided, so that bfloat16 may tip a few images.
    assert moved <= args.images * 0.05
    print(f"\n{args.arch}, {args.size} px, {args.images} images, {machine()}")
    for name, value in medians.items():
        print(f"{name:28s} {value:8.2f} s   it / ours: {value / medians['ours']:5.2f}")


if __name__ == "__main__":
    main()
