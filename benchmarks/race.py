"""The shortest time to 99.9 % on the published split: small pictures first, 256 px at the end.

    python benchmarks/race.py --data PATH [--weights auto] [--epochs 20] [--batch-size 128]

20 epochs of the published split's training images at most, as published; the clock runs from the
first batch to the end of the first validation at or above the goal, decoding included. MaxViT's
windows and position biases are resized in place by timm's ``set_input_size``. Written for one
large GPU; on a CPU it takes hours. It prints which weights it started from.
"""

import time

import torch
from common import arguments, machine, synchronise
from fastai.vision.all import Callback, CancelFitException

from bloodcell_fastai import blood_dls, blood_learner, open_dataset, split_table, timm_model
from bloodcell_fastai.training.callbacks import Compile

SIZES = ((0.5, 128), (0.8, 192), (1.0, 256))  # up to this share of the epochs, this size


class GrowingSize(Callback):
    """Pictures and network of the size that the epoch calls for."""

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
        size = self.dls.train.pixels.size
        print(
            f"epoch {self.epoch + 1:2d}  {size} px  {accuracy:.4f}"
            f"  {time.perf_counter() - self.started:7.1f} s",
            flush=True,
        )
        if accuracy >= self.goal:
            raise CancelFitException


def stages(epochs: int, sizes=SIZES) -> list[int]:
    """The size of each epoch."""
    return [next(s for share, s in sizes if epoch < share * epochs) for epoch in range(epochs)]


def main() -> None:
    args = arguments(
        __doc__, epochs=20, batch_size=128, lr=2e-3, goal=0.999, weights="auto", compile=0
    )
    dataset = open_dataset(args.data or None)
    table = split_table(dataset.table, "random")
    plan = stages(args.epochs, [(share, size * args.size // 256) for share, size in SIZES])
    started = StopAtGoal(args.goal)
    loaders = {size: blood_dls(table, args.arch, size, args.batch_size) for size in set(plan)}
    first = loaders[plan[0]]
    callbacks = [GrowingSize(loaders, plan), started, *([Compile()] if args.compile else [])]
    learn = blood_learner(first, args.arch, args.weights, plan[0], cbs=callbacks)
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(args.epochs, args.lr)
    print(f"\nfrom {learn.weights_used} weights, {args.arch}, {machine()}")


if __name__ == "__main__":
    main()
