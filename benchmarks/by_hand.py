"""Do techniques that ``bloodcell fit`` has no option for get more out of the photographs?

    python benchmarks/by_hand.py DATA [--techniques plain "random erasing" ...] [--epochs 3]

Each is put into the learner by hand, as in a notebook: an epoch of the head alone, then one cycle
of all layers, on the folds of TRAIN's photographs that ``honest.py`` makes. The last epoch is
scored, and compared with the first technique as there.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.vision.all import Callback, Learner, RandomErasing, TrainEvalCallback, set_seed
from honest import few_copies, print_table, read_predictions, write_folder
from timm.utils import ModelEmaV3

from bloodcell_fastai import (
    BloodInterpretation,
    augmentation,
    blood_dls,
    blood_learner,
    open_dataset,
    timm_model,
)
from bloodcell_fastai.data.splits import split_folds
from bloodcell_fastai.evaluation.metrics import Evaluation


class FreezeNorm(Callback):
    """Batch normalisation keeps the statistics of the initial weights."""

    order = TrainEvalCallback.order + 1

    def before_train(self):
        for module in self.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()


class AverageWeights(Callback):
    """The exponential moving average of the weights replaces them when training ends."""

    def before_fit(self):
        self.average = ModelEmaV3(timm_model(self.learn), decay=0.98, use_warmup=True)

    def after_step(self):
        self.average.update(timm_model(self.learn))

    def after_fit(self):
        timm_model(self.learn).load_state_dict(self.average.module.state_dict())


def by_stage(model: torch.nn.Sequential) -> list[list[torch.nn.Parameter]]:
    """Parameter groups: the stem, each stage, the head."""
    network = model[0].model
    head = torch.nn.ModuleList([network.norm, network.head])
    return [list(part.parameters()) for part in (network.stem, *network.stages, head)]


def layer_wise(learn: Learner) -> None:
    """Learning rates that fall from the head to the stem, in steps of about a half."""
    learn.splitter = by_stage
    learn.rates = slice(1e-3 / 30, 1e-3)


def add(callback: Callable[[], Callback]) -> Callable[[Learner], None]:
    """What adds a callback to a learner."""
    return lambda learn: learn.add_cb(callback())


def leave(learn: Learner) -> None:
    """The learner as the library makes it."""


def originals(split: pd.DataFrame, photographs: dict[str, str]) -> pd.DataFrame:
    """Every training copy is replaced by its photograph; validation images stay copies."""
    replaced = (split.part == "train") & split.photo.isin(photographs.keys())
    return split.assign(path=split.path.mask(replaced, split.photo.map(photographs)))


def half_originals(split: pd.DataFrame, photographs: dict[str, str]) -> pd.DataFrame:
    """Every second training copy of a photograph is replaced by it."""
    second = split.groupby(["photo", "label"]).cumcount() % 2 == 1
    return split.assign(path=originals(split, photographs).path.where(second, split.path))


@dataclass(frozen=True)
class Technique:
    """What differs from a training as the library makes it."""

    batches: dict = field(default_factory=dict)
    learner: dict = field(default_factory=dict)
    change: Callable[[Learner], None] = leave  # before the long cycle
    images: Callable[[pd.DataFrame, dict[str, str]], pd.DataFrame] = lambda split, _: split


def augmented(transforms: list) -> Technique:
    """Another augmentation."""
    return Technique({"batch_tfms": transforms})


TECHNIQUES = {
    "plain": Technique(),
    "random erasing": augmented([*augmentation(), RandomErasing(p=0.5)]),
    "fastai's augmentation": augmented(augmentation(stain=0, sharpness=0, noise=0)),
    "no rotation": augmented(augmentation(rotate=0)),
    "no light": augmented(augmentation(lighting=0)),
    "no noise": augmented(augmentation(noise=0)),
    "no label smoothing": Technique(learner={"label_smoothing": 0.0}),
    "ten times the decay": Technique(learner={"wd": 0.1}),
    "frozen norm": Technique(learner={"cbs": FreezeNorm}),
    "layer-wise rates": Technique(change=layer_wise),
    "average of weights": Technique(change=add(AverageWeights)),
    "cutmix": Technique(change=add(CutMix)),
    "mixup": Technique(change=add(lambda: MixUp(0.2))),
    "originals": Technique(images=originals),
    "half originals": Technique(images=half_originals),
}


def predicted(technique: str, split: pd.DataFrame, args: argparse.Namespace) -> pd.DataFrame:
    """Train on one split and predict its validation images."""
    made = TECHNIQUES[technique]
    set_seed(42)
    dls = blood_dls(split, size=args.size, bs=32, **made.batches)
    learn = blood_learner(dls, **({"wd": 0.01} | made.learner))
    learn.rates = slice(1e-3 / 3, 1e-3)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)
        learn.unfreeze()
        made.change(learn)
        learn.create_opt()
        learn.fit_one_cycle(args.epochs - 1, learn.rates)
    return BloodInterpretation.from_learner(learn).predictions


def cross_validated(
    technique: str, table: pd.DataFrame, photographs: dict[str, str], args: argparse.Namespace
) -> Evaluation:
    """The pooled predictions of a technique, which are kept in a file."""
    how = f"{args.copies}-copies-{args.folds}-folds-{args.epochs}-epochs-{args.size}-px"
    file = args.out / f"{technique.replace(' ', '-')}-{how}.csv"
    if not file.exists():
        images = TECHNIQUES[technique].images
        folds = [images(split, photographs) for split in split_folds(table, args.folds, 42)]
        pd.concat([predicted(technique, split, args) for split in folds]).to_csv(file, index=False)
    return read_predictions(file, tuple(sorted(set(table.label))))


def main() -> None:
    """Compare techniques on folds of TRAIN."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=list(TECHNIQUES))
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("by_hand"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    dataset = open_dataset(args.data, home=args.out / "data")
    train = dataset.table.query("subset == 'TRAIN'")
    few = few_copies(train, args.copies, per_class=10_000)
    images = open_dataset(write_folder(few, args.out / f"train-{args.copies}")).table
    photographs = {path.stem: str(path) for path in dataset.originals}
    results = {name: cross_validated(name, images, photographs, args) for name in args.techniques}
    print_table(f"{args.folds} folds, {args.epochs} epochs, {args.size} px", results)


if __name__ == "__main__":
    main()
