from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from bloodcell_fastai import (
    BloodcellError,
    Predictor,
    blood_dls,
    blood_learner,
    heat_maps,
    overlay,
    split_table,
    timm_model,
)
from bloodcell_fastai.data.images import open_image
from bloodcell_fastai.model.model import load_model

COPY = (320, 240)
CLASSES = ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")


def make_predictor(arch: str, size: int, weights="none", crop: str = "frame") -> Predictor:
    # Whole images: in a crop even a map without any information would lie on the cell.
    model, _ = load_model(arch, len(CLASSES), size, weights)
    return Predictor(model, arch, size, crop, CLASSES)


def explain(predictor: Predictor, paths, targets=None) -> np.ndarray:
    return heat_maps(predictor, predictor.read(paths), targets)


@pytest.fixture(scope="module")
def table(demo_table):
    return split_table(demo_table, "random")


@pytest.fixture(scope="module")
def lite0(table, lite0_weights):
    """ImageNet features under a classifier fitted to the demo set, by far quicker than training
    all: 93 % of the validation images are right, chance is 25 %."""
    predictor = make_predictor("tf_efficientnet_lite0", 256, lite0_weights)
    train = table[table.part == "train"]
    features = predictor.predict_all(train.path).features
    fitted = LogisticRegression(max_iter=500).fit(features, train.label)
    assert tuple(fitted.classes_) == CLASSES
    classifier = predictor.model.classifier
    with torch.no_grad():
        classifier.weight.copy_(torch.from_numpy(fitted.coef_))
        classifier.bias.copy_(torch.from_numpy(fitted.intercept_))
    return predictor


@pytest.fixture(scope="module")
def cells(table, demo_root):
    """One copy of each photograph, and where its white cell is: x, y, radius in its pixels."""
    truth = pd.read_csv(demo_root / "truth.csv").drop(columns="photo").set_index("path")
    paths = table.groupby("photo").path.first().tolist()
    relative = [Path(path).relative_to(demo_root).as_posix() for path in paths]
    return truth.loc[relative].assign(path=paths)


@pytest.fixture(scope="module")
def maps(lite0, cells):
    return explain(lite0, cells.path)


def concentration(maps: np.ndarray, cells: pd.DataFrame) -> float:
    """The fraction of the heat on the cell's disc over its fraction of the image; 1 for a map
    without information."""
    y, x = np.mgrid[: COPY[1], : COPY[0]]
    ratios = []
    for heat, cell in zip(maps, cells.itertuples(), strict=True):
        heat = np.asarray(Image.fromarray(heat).resize(COPY, Image.BILINEAR))
        disc = (x - cell.x) ** 2 + (y - cell.y) ** 2 <= cell.radius**2
        ratios.append(heat[disc].sum() / heat.sum() / disc.mean())
    return float(np.mean(ratios))


def test_the_map_falls_on_the_white_cell(maps, cells):
    on_cell = concentration(maps, cells)
    assert on_cell > 2.3
    # Cells lie near the middle, and so would the heat of a map without information.
    elsewhere = np.mean([concentration(np.roll(maps, k, axis=0), cells) for k in (1, 5, 9)])
    assert on_cell > 1.4 * elsewhere
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(maps.reshape(len(maps), -1), axis=1).reshape(maps.shape)
    assert concentration(shuffled, cells) == pytest.approx(1, abs=0.1)


def test_maps_go_from_0_to_1(maps, cells):
    assert maps.shape == (len(cells), 256, 256)
    assert maps.dtype == np.float32
    assert maps.min() >= 0
    assert maps.max(axis=(1, 2)) == pytest.approx(np.ones(len(maps)))


def test_the_predicted_class_is_explained_or_the_one_asked_for(lite0, maps, cells):
    pictures = lite0.read(cells.path[:3])
    predicted = lite0.predict(pictures).logits.argmax(axis=1)
    same = heat_maps(lite0, pictures, predicted.tolist())
    assert np.allclose(same, maps[:3], atol=1e-3)
    other = heat_maps(lite0, pictures, ((predicted + 1) % 4).tolist())
    assert np.abs(other - same).mean(axis=(1, 2)).min() > 0.05
    assert explain(lite0, []).shape == (0, 256, 256)


def test_batches_do_not_matter(lite0, maps, cells):
    alone = explain(lite0, cells.path[-1:])  # of the last batch of the others
    assert np.allclose(alone, maps[-1:], atol=1e-3)


def test_the_model_is_left_as_it_was(table):
    """Also that of a learner whose body is frozen, and after an error."""
    dls = blood_dls(table, "resnet18", 64, bs=8, crop="frame", device="cpu")
    learn = blood_learner(dls, weights="none")
    learn.freeze()
    predictor = Predictor.from_learner(learn)
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    requires = [p.requires_grad for p in learn.model.parameters()]
    maps = explain(predictor, table.path[:2], [0, 1])
    with pytest.raises(RuntimeError, match="out of bounds"):
        explain(predictor, table.path[:2], [9, 9])
    assert np.array_equal(explain(predictor, table.path[:2], [0, 1]), maps)
    assert all(p.grad is None for p in learn.model.parameters())
    assert [p.requires_grad for p in learn.model.parameters()] == requires
    assert not any(module.training for module in timm_model(learn).modules())
    assert all(p.grad is None for p in learn.model.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in learn.model.modules()
    )
    after = learn.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("maxvit_nano_rw_256.sw_in1k", 64),
        ("swin_tiny_patch4_window7_224", 64),  # channels last
        ("test_vit", 64),  # the class token is classified
        ("test_vit2", 64),  # the mean of the tokens is, of which some are registers
        ("cait_xxs24_224", 64),  # the class token joins after the blocks
        ("mixer_s32_224", 224),  # tokens only
    ],
)
def test_any_timm_model(table, arch, size):
    predictor = make_predictor(arch, size)
    with torch.no_grad():  # fastai and timm start some classifiers and gates next to zero
        predictor.model.get_classifier().weight.normal_()
    pictures = predictor.read(table.path[:2])
    maps = np.stack([heat_maps(predictor, pictures, [k, k]) for k in range(4)])
    assert maps.shape == (4, 2, size, size)
    assert np.isfinite(maps).all()
    # Evidence for some class lies somewhere, not everywhere, and not where another's does.
    assert (maps.max(axis=(2, 3)) == 1).any(axis=0).all()
    assert maps.std(axis=(2, 3)).max() > 0.05
    assert np.ptp(maps, axis=0).max() > 0.1


@pytest.mark.parametrize("arch", ["swin_tiny_patch4_window7_224", "test_vit", "test_vit2"])
def test_tokens_keep_their_place(table, arch):
    """Features that are nothing but in one corner of the image give a map of that corner."""
    torch.manual_seed(0)
    predictor = make_predictor(arch, 64)
    model = predictor.model

    def keep_corner(module, args, output=None):
        features = args[0] if output is None else output
        kept = torch.zeros_like(features)
        if features.ndim == 4:
            kept[:, 0, -1] = features[:, 0, -1]  # the upper right of (n, h, w, c)
        else:
            prefix = model.num_prefix_tokens
            corner = prefix + int((features.shape[1] - prefix) ** 0.5) - 1
            kept[:, :prefix] = features[:, :prefix]
            kept[:, corner] = features[:, corner]
        return kept if output is not None else (kept, *args[1:])

    if model.global_pool == "token":
        model.blocks[-1].register_forward_pre_hook(keep_corner)
    else:
        whole = model.forward_features
        model.forward_features = lambda x: keep_corner(None, (x,), whole(x))
    maps = np.concatenate([explain(predictor, table.path[:1], [k]) for k in range(4)])
    hottest = [np.unravel_index(heat.argmax(), heat.shape) for heat in maps if heat.max() > 0]
    assert hottest
    assert all(y < 32 <= x for y, x in hottest)


def test_a_model_without_places_is_refused(table):
    predictor = make_predictor("test_vit", 64)
    model = predictor.model
    model.num_prefix_tokens, model.global_pool = 3, "avg"  # leaves no square of tokens
    with pytest.raises(BloodcellError, match="no features with a place") as caught:
        explain(predictor, table.path[:1])
    assert "`arch`" in caught.value.hint


def test_overlay():
    image = Image.new("RGB", (60, 20), (100, 150, 200))
    heat = np.zeros((8, 8), np.float32)
    heat[:, 4:] = 1
    laid = np.asarray(overlay(image, heat, (0, 0, 60, 20))).astype(int)
    assert laid.shape == (20, 60, 3)
    assert (laid[:, :20] == (100, 150, 200)).all()  # clear where it is cold
    hot = laid[:, 50:]
    assert (hot[..., 0] > 190).all()
    assert (hot[..., 2] < hot[..., 0] - 20).all()
    assert overlay(image.convert("L"), heat, (0, 0, 60, 20)).mode == "RGB"


def test_the_heat_lies_on_the_crop(demo_table):
    image = open_image(demo_table.path[0])
    pictures = make_predictor("resnet18", 64, crop="cell").read(demo_table.path[:1])
    left, top, right, bottom = pictures.boxes[0]
    assert (right - left) * (bottom - top) < image.width * image.height / 2
    laid = np.asarray(overlay(image, np.ones((8, 8), np.float32), pictures.boxes[0])).astype(int)
    changed = (laid != np.asarray(image)).any(axis=2)
    assert changed[top:bottom, left:right].mean() > 0.9
    changed[top:bottom, left:right] = False
    assert not changed.any()


def test_a_model_of_cells_explains_the_crop(table):
    cells = make_predictor("resnet18", 64, crop="cell")
    with torch.no_grad():  # or the evidence of an untrained model may be 0 everywhere
        cells.model.fc.weight.normal_()
    whole = Predictor(cells.model, "resnet18", 64, "frame", CLASSES)
    maps = [explain(p, table.path[:1].repeat(4), range(4)) for p in (cells, whole)]
    assert not np.allclose(*maps, atol=0.05)
