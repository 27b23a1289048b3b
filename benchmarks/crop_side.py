"""How large should the crop around the nucleus be? Frozen features and a linear classifier.

    python benchmarks/crop_side.py KAGGLE PBC --weights LITE0.safetensors [--sides 2.4 1.8 1.4]

The features are those of EfficientNet-Lite0 with ImageNet weights, which has seen neither data set.
For each side of the crop, in square roots of the nucleus's area, a logistic regression is scored

- on grouped folds of the photographs behind Kaggle's TRAIN, and compared with the first side as in
  ``honest.py``;
- by accuracy and balanced accuracy on folds of the other data set with all its classes;
- by the same from one data set to the other, with the classes that both have.

TEST is not used.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import timm
from honest import few_copies, print_table
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from bloodcell_fastai import Predictor, open_dataset
from bloodcell_fastai.data import crop
from bloodcell_fastai.data.class_names import match_classes
from bloodcell_fastai.data.splits import photo_groups
from bloodcell_fastai.device import pick_device
from bloodcell_fastai.evaluation.metrics import Evaluation, labelled_predictions

ARCH = "tf_efficientnet_lite0"


def read_network(weights: str) -> Predictor:
    """The network with weights of a file, except those of its classifier, which is not used."""
    network = timm.create_model(ARCH, num_classes=1)
    state = {k: v for k, v in load_file(weights).items() if not k.startswith("classifier.")}
    network.load_state_dict(state, strict=False)
    device = pick_device()
    return Predictor(network, ARCH, 128, "cell", ["none"], device=device, full_precision=True)


def features(network: Predictor, table: pd.DataFrame) -> np.ndarray:
    """Features of each image, float32 (n, 1280)."""
    return network.predict_all(table.path).features.numpy()


def classifier() -> Pipeline:
    """Strongly regularised: there are more features than images of a rare class."""
    logistic = LogisticRegression(C=0.01, max_iter=300, class_weight="balanced")
    return make_pipeline(StandardScaler(), logistic)


def on_folds(table: pd.DataFrame, found: np.ndarray) -> Evaluation:
    """The pooled predictions of five folds that keep photographs whole."""
    folds, photos = StratifiedGroupKFold(5, shuffle=True, random_state=0), photo_groups(table)
    probabilities = cross_val_predict(
        classifier(), found, table.label, groups=photos, cv=folds, method="predict_proba"
    )
    classes = tuple(sorted(set(table.label)))
    predicted = {
        "path": table.path,
        "predicted": np.array(classes)[probabilities.argmax(axis=1)],
        "confidence": probabilities.max(axis=1),
    }
    predicted |= {f"p_{name}": probabilities[:, i] for i, name in enumerate(classes)}
    return Evaluation(labelled_predictions(table, pd.DataFrame(predicted)), classes)


def scores(labels: pd.Series, predicted: pd.Series | np.ndarray) -> str:
    """Accuracy and balanced accuracy."""
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

    network = read_network(args.weights)
    train = open_dataset(args.data, home=args.out / "data").table.query("subset == 'TRAIN'")
    train = few_copies(train, args.copies, per_class=10_000).reset_index(drop=True)
    other = open_dataset(args.other, home=args.out / "data").table
    other = few_copies(other, args.copies, args.per_class).reset_index(drop=True)
    mapped = match_classes(sorted(set(train.label)), sorted(set(other.label))).mapped
    ours = other.label.map(mapped)  # missing where TRAIN lacks the class
    both = ours.notna().to_numpy()

    on_train, elsewhere = {}, {}
    for crop.SIDES_OF_NUCLEUS in args.sides:
        side = f"{crop.SIDES_OF_NUCLEUS:g}"
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
