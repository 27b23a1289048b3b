"""The shortest time to 99.9 % on the published split: small images first, 256 px at the end.

    python benchmarks/race.py --data PATH [--weights auto] [--epochs 20] [--batch-size 128]

At most 20 epochs, as published. The time is from before the images are decoded to the end of the
first validation at or above the goal. timm's ``set_input_size`` resizes MaxViT's windows and
position biases. Written for one large GPU; on a CPU it takes hours. It prints the initial weights.
"""

import time

import torch
from common import arguments, machine, synchronise
from fastai.vision.all import Callback, CancelFitException

from bloodcell_fastai import blood_dls, blood_learner, open_dataset, split_table, timm_model

SIZES = ((0.5, 128), (0.8, 192), (1.0, 256))  # up to this fraction of the epochs, this size


class GrowingSize(Callback):
    """Batches and network of the size of the epoch."""

    order = -10

    def __init__(self, loaders: dict, stages: list[int]):
        self.loaders, self.stages = loaders, stages

    def before_epoch(self):
        size = self.stages[self.epoch]
        self.learn.dls = self.loaders[size]
        timm_model(self.learn).set_input_size((size, size))
        timm_model(self.learn).to(self.dls.device, memory_format=torch.channels_last)


class StopAtGoal(Callback):
    """End the fit at the first validation that reaches the goal."""

    order = 80

    def __init__(self, goal: float):
        self.goal, self.started = goal, time.perf_counter()

    def after_epoch(self):
        synchronise()
        accuracy = self.recorder.values[-1][-1]
        size = self.dls.size
        print(
            f"epoch {self.epoch + 1:2d}  {size} px  {accuracy:.4f}"
            f"  {time.perf_counter() - self.started:7.1f} s",
            flush=True,
        )
        if accuracy >= self.goal:
            raise CancelFitException


def stages(epochs: int, sizes=SIZES) -> list[int]:
    """The size of each epoch."""
    return [next(s for part, s in sizes if epoch < part * epochs) for epoch in range(epochs)]


def main() -> None:
    args = arguments(__doc__, epochs=20, batch_size=128, lr=2e-3, goal=0.999, weights="auto")
    table = split_table(open_dataset(args.data or None).table, "random")
    plan = stages(args.epochs, [(part, size * args.size // 256) for part, size in SIZES])
    started = StopAtGoal(args.goal)
    loaders = {size: blood_dls(table, args.arch, size, args.batch_size) for size in set(plan)}
    callbacks = [GrowingSize(loaders, plan), started]
    learn = blood_learner(loaders[plan[0]], weights=args.weights, cbs=callbacks)
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(args.epochs, args.lr)
    print(f"\ninitial weights: {learn.initial_weights}, {args.arch}, {machine()}")


if __name__ == "__main__":
    main()
