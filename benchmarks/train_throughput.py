"""Training images per second: ours, the plain fastai recipe, and the upper limit.

    python benchmarks/train_throughput.py [--data PATH] [--size 256] [--batch-size 32]

Plain: ImageDataLoaders, aug_transforms, vision_learner, fit_one_cycle, as fastai's tutorials
have it, in fastai's default precision (and in .to_fp16() where there is a GPU). Ours:
blood_dls, blood_learner, fit_one_cycle. Ceiling: the same model in the same precision and
layout with the same optimizer, on one batch that is already on the device.

Architecture, size, batch size and augmentation are the same. fastai's own head costs next to
nothing beside the body. The time is from the end of the first batch to the end of the last, so
that starting worker processes does not count.
"""

import time

import torch
from common import arguments, in_turn, machine, our_dls, plain_dls, read_table, synchronise
from fastai.vision.all import Callback, accuracy, vision_learner

from bloodcell_fastai import blood_learner, timm_model
from bloodcell_fastai.device import autocast
from bloodcell_fastai.training.optimizer import FusedAdam

TOLERANCE = 0.03  # of a probability in bfloat16


class Rate(Callback):
    """Images per second from the end of the first batch to the end of the last."""

    order = 100

    def after_batch(self):
        if self.training and self.iter in (0, self.n_iter - 1):
            synchronise()
            now = time.perf_counter()
            if self.iter:
                self.value = self.iter * self.dl.bs / (now - self.started)
            self.started = now


def main() -> None:
    args = arguments(__doc__, batch_size=32, batches=4)
    bs = args.batch_size
    table = read_table(args.data, bs * args.batches, 8)
    dls = plain_dls(table, args.arch, args.size, bs)
    plain = {"plain fastai": plain_recipe(dls, args)}
    if torch.cuda.is_available():
        plain["plain fastai, to_fp16"] = plain_recipe(dls, args).to_fp16()
    ours = blood_learner(our_dls(table, args.arch, args.size, bs), weights="none")
    print(f"largest difference of a probability to float32: {check(ours):.4f}", flush=True)
    learners = plain | {"ours": ours}
    cases = {name: lambda learn=learn: fit(learn) for name, learn in learners.items()}
    cases["ceiling"] = lambda: ceiling(ours, args.batches)
    medians = in_turn(cases, args.repeats)
    print(f"\n{args.arch}, {args.size} px, batches of {bs}, {machine()}")
    for name, rate in medians.items():
        print(f"{name:28s} {rate:8.2f} images/s   ours / it: {medians['ours'] / rate:5.2f}")


def plain_recipe(dls, args):
    """fastai's own learner. MaxViT needs its input size when it is made."""
    options = {"img_size": args.size} if "vit" in args.arch else {}
    return vision_learner(
        dls, args.arch, pretrained=False, metrics=accuracy, normalize=False, **options
    )


def fit(learn) -> float:
    """One epoch of ``fit_one_cycle``, its validation left out."""
    rate = Rate()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([rate]):
        learn.fit_one_cycle(1, 1e-3)
    return rate.value


def ceiling(learn, batches: int) -> float:
    """The bare loop on one batch."""
    model, x, y = learn.model, *learn.dls.train.one_batch()
    model.to(memory_format=torch.channels_last).train()
    x, y = (t.as_subclass(torch.Tensor) for t in (x, y))
    optimizer = FusedAdam(list(model.parameters()), lr=1e-3)
    for number in range(batches):
        with autocast(x.device):
            logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), y, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            synchronise()
            started = time.perf_counter()
    synchronise()
    return (batches - 1) * len(x) / (time.perf_counter() - started)


@torch.inference_mode()
def check(learn) -> float:
    """Our precision and layout against float32 in the default layout, on validation images."""
    model = timm_model(learn).eval()
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    expected = model(x.contiguous()).softmax(1)
    with autocast(x.device):
        found = model(x.contiguous(memory_format=torch.channels_last)).float().softmax(1)
    difference = (found - expected).abs().max().item()
    assert difference < TOLERANCE, difference
    return difference


if __name__ == "__main__":
    main()
