"""How much around the nucleus should the network see? Frozen features and a linear classifier.

    python benchmarks/crop_side.py KAGGLE PBC --weights LITE0.safetensors [--sides 2.4 1.8 1.4]

EfficientNet-Lite0 with ImageNet weights is the judge, because it has seen neither laboratory. For
each side of the cut, in square roots of the nucleus's area, a logistic regression on its features
is scored on grouped folds of the photographs behind Kaggle's TRAIN, measured against the first
side as ``honest.py`` does it; then, as the share of right images and the balanced accuracy, on
folds of the other set with all its classes, and from one laboratory to the other with the classes
they share. TEST is not looked at.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from honest import few_copies, print_table
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from bloodcell_fastai import open_dataset, with_photos
from bloodcell_fastai.analysis.evaluation import Evaluation, prediction_table
from bloodcell_fastai.data import framing
from bloodcell_fastai.data.blocks import image_dls
from bloodcell_fastai.data.cell_names import match_classes

ARCH = "tf_efficientnet_lite0"


@torch.inference_mode()
def features(network: torch.nn.Module, table: pd.DataFrame) -> np.ndarray:
    """What the network makes of each image, float32 (n, 1280)."""
    dls = image_dls(table.path, arch=ARCH, size=128)
    network.to(dls.device)
    return torch.cat([network(images).cpu() for (images,) in dls.valid]).numpy()


def classifier() -> Pipeline:
    """Strongly regularised: there are more features than images of a rare class."""
    logistic = LogisticRegression(C=0.01, max_iter=300, class_weight="balanced")
    return make_pipeline(StandardScaler(), logistic)


def on_folds(table: pd.DataFrame, found: np.ndarray) -> Evaluation:
    """The pooled predictions of five folds that keep photographs whole."""
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    probabilities = cross_val_predict(
        classifier(), found, table.label, groups=table.photo, cv=folds, method="predict_proba"
    )
    classes = tuple(sorted(set(table.label)))
    return Evaluation(prediction_table(table, probabilities, classes), classes)


def scores(labels: pd.Series, predicted: pd.Series | np.ndarray) -> str:
    """The share of right images, and the balanced accuracy."""
    right = np.mean(labels.to_numpy() == np.asarray(predicted))
    return f"{right:.1%} / {balanced_accuracy_score(labels, predicted):.1%}"


def main() -> None:
    """Print a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("other")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--sides", nargs="+", type=float, default=[2.4, 2.2, 2.0, 1.8, 1.6, 1.4])
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--per-class", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("crop_side"))
    args = parser.parse_args()

    network = timm.create_model(ARCH, num_classes=0).eval()
    network.load_state_dict(load_file(args.weights), strict=False)  # but for the classifier
    kaggle = open_dataset(args.data, home=args.out / "data")
    train = with_photos(kaggle.table, kaggle.root).query("subset == 'TRAIN'")
    train = few_copies(train, args.copies, per_class=10_000).reset_index(drop=True)
    other = open_dataset(args.other, home=args.out / "data").table
    other = few_copies(other, args.copies, args.per_class).reset_index(drop=True)
    mapped = match_classes(sorted(set(train.label)), sorted(set(other.label))).mapped
    ours = other.label.map(mapped)  # missing where TRAIN lacks the class
    both = ours.notna().to_numpy()

    on_train, elsewhere = {}, {}
    for framing.SIDES_OF_NUCLEUS in args.sides:
        side = f"{framing.SIDES_OF_NUCLEUS:g}"
        here, there = features(network, train), features(network, other)
        of_other = on_folds(other, there).predictions
        on_train[side] = on_folds(train, here)
        elsewhere[side] = (
            scores(of_other.label, of_other.predicted),
            scores(train.label, classifier().fit(there[both], ours[both]).predict(here)),
            scores(ours[both], classifier().fit(here, train.label).predict(there[both])),
        )
    print_table(f"five folds of {len(train)} images of TRAIN", on_train)
    print(f"\n{len(other)} images of the other set\n")
    print("| side | the other, folds | the other to TRAIN | TRAIN to the other |")
    print("|---|---|---|---|")
    for side, columns in elsewhere.items():
        print("|", " | ".join([side, *columns]), "|")


if __name__ == "__main__":
    main()
