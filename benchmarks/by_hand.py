"""Do techniques that ``bloodcell fit`` has no option for get more out of the photographs?

    python benchmarks/by_hand.py DATA [--techniques plain "random erasing" ...] [--epochs 3]

Each is put into the learner by hand, as in a notebook: one cycle of all layers after an epoch of
the head alone, on the folds of TRAIN's photographs that ``honest.py`` makes, and scored as there
against the first. No epoch is chosen: what the last one leaves is scored.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from fastai.callback.mixup import CutMix
from fastai.vision.all import Callback, Learner, RandomErasing, set_seed
from honest import few_copies, print_table, write_folder
from timm.utils import ModelEmaV3

from bloodcell_fastai import (
    augmentation,
    blood_dls,
    blood_learner,
    open_dataset,
    timm_model,
    with_photos,
)
from bloodcell_fastai.analysis.evaluation import Evaluation, evaluate
from bloodcell_fastai.data.splits import split_folds


class AverageWeights(Callback):
    """The exponential moving average of the weights takes their place when training ends."""

    def before_fit(self):
        self.average = ModelEmaV3(timm_model(self.learn), decay=0.98, use_warmup=True)

    def after_step(self):
        self.average.update(timm_model(self.learn))

    def after_fit(self):
        timm_model(self.learn).load_state_dict(self.average.module.state_dict())


def by_stage(model: torch.nn.Sequential) -> list[list[torch.nn.Parameter]]:
    """Parameter groups: the stem, the stages one by one, the head."""
    network = model[0].model
    head = torch.nn.ModuleList([network.norm, network.head])
    return [list(part.parameters()) for part in (network.stem, *network.stages, head)]


def layer_wise(learn: Learner) -> None:
    """Rates that fall from the head to the stem, in steps of about a half."""
    learn.splitter = by_stage
    learn.rates = slice(1e-3 / 30, 1e-3)


def add(callback: Callable[[], Callback]) -> Callable[[Learner], None]:
    """What adds a callback to a learner."""
    return lambda learn: learn.add_cb(callback())


def leave(learn: Learner) -> None:
    """The learner as the library makes it."""


def originals(split: pd.DataFrame, photographs: dict[str, str]) -> pd.DataFrame:
    """Every training copy gives way to its photograph; the images validated on stay copies."""
    given_way = (split.part == "train") & split.photo.isin(photographs.keys())
    return split.assign(path=split.path.mask(given_way, split.photo.map(photographs)))


def half_originals(split: pd.DataFrame, photographs: dict[str, str]) -> pd.DataFrame:
    """Every second training copy of a photograph gives way to it."""
    second = split.groupby(["photo", "label"]).cumcount() % 2 == 1
    return split.assign(path=originals(split, photographs).path.where(second, split.path))


@dataclass(frozen=True)
class Technique:
    """What differs from a training as the library makes it."""

    batches: dict = field(default_factory=dict)
    learner: dict = field(default_factory=dict)
    change: Callable[[Learner], None] = leave  # what is done to it before the long cycle
    images: Callable[[pd.DataFrame, dict[str, str]], pd.DataFrame] = lambda split, _: split


TECHNIQUES = {
    "plain": Technique(),
    "random erasing": Technique({"batch_tfms": [*augmentation(), RandomErasing(p=0.5)]}),
    "no label smoothing": Technique(learner={"label_smoothing": 0.0}),
    "layer-wise rates": Technique(change=layer_wise),
    "average of weights": Technique(change=add(AverageWeights)),
    "cutmix": Technique(change=add(CutMix)),
    "originals": Technique(images=originals),
    "half originals": Technique(images=half_originals),
}


def predicted(technique: str, split: pd.DataFrame, args: argparse.Namespace) -> pd.DataFrame:
    """Train on one split; the predictions for its validation part."""
    made = TECHNIQUES[technique]
    set_seed(42)
    dls = blood_dls(split, size=args.size, bs=32, **made.batches)
    learn = blood_learner(dls, wd=0.01, **made.learner)
    learn.rates = slice(1e-3 / 3, 1e-3)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)
        learn.unfreeze()
        made.change(learn)
        learn.create_opt()
        learn.fit_one_cycle(args.epochs - 1, learn.rates)
    return evaluate(learn).predictions


def cross_validated(
    technique: str, table: pd.DataFrame, photographs: dict[str, str], args: argparse.Namespace
) -> Evaluation:
    """The pooled predictions of a technique; what is finished is not done again."""
    how = f"{args.copies}-copies-{args.folds}-folds-{args.epochs}-epochs-{args.size}-px"
    file = args.out / f"{technique.replace(' ', '-')}-{how}.csv"
    if not file.exists():
        images = TECHNIQUES[technique].images
        folds = [images(split, photographs) for split in split_folds(table, args.folds, 42)]
        pd.concat([predicted(technique, split, args) for split in folds]).to_csv(file, index=False)
    return Evaluation(pd.read_csv(file), tuple(sorted(set(table.label))))


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
    table = with_photos(dataset.table, dataset.root)
    few = few_copies(table[table.subset == "TRAIN"], args.copies, per_class=10_000)
    folder = open_dataset(str(write_folder(few, args.out / f"train-{args.copies}")))
    images = with_photos(folder.table, folder.root)
    photographs = {path.stem: str(path) for path in dataset.originals}
    results = {name: cross_validated(name, images, photographs, args) for name in args.techniques}
    print_table(f"{args.folds} folds, {args.epochs} epochs, {args.size} px", results)


if __name__ == "__main__":
    main()
