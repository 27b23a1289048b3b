from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from bloodcell_fastai import BloodcellError, blood_dls, blood_learner, split_table
from bloodcell_fastai.analysis.explain import heat_maps, overlay
from bloodcell_fastai.data.blocks import image_dls
from bloodcell_fastai.data.dataset import open_image
from bloodcell_fastai.data.framing import crop_box
from bloodcell_fastai.training.calibration import predict_with_features
from bloodcell_fastai.training.learner import timm_model

CPU = torch.device("cpu")
COPY = (320, 240)


def make_learner(table, arch: str, size: int, weights="none"):
    # Whole frames: a map that looks nowhere in particular would lie on the cell of a crop.
    dls = blood_dls(table, arch, size, bs=8, crop="frame", device=CPU)
    return blood_learner(dls, arch, weights, size=size)


@pytest.fixture(scope="module")
def table(demo_table):
    return split_table(demo_table, "random")


@pytest.fixture(scope="module")
def lite0(table, lite0_weights):
    """ImageNet features under a classifier fitted to the demo set, by far quicker than training
    all: 93 % of the validation images are right, chance is 25 %."""
    learn = make_learner(table, "tf_efficientnet_lite0", 256, lite0_weights)
    train = table[table.part == "train"]
    images = image_dls(train.path, learn.arch, learn.size, 16, "frame", device=CPU)
    with learn.no_bar():
        _, features, _ = predict_with_features(learn, images.valid)
    fitted = LogisticRegression(max_iter=500).fit(features, train.label)
    assert tuple(fitted.classes_) == tuple(learn.dls.vocab)
    classifier = timm_model(learn).classifier
    with torch.no_grad():
        classifier.weight.copy_(torch.from_numpy(fitted.coef_))
        classifier.bias.copy_(torch.from_numpy(fitted.intercept_))
    return learn


@pytest.fixture(scope="module")
def cells(table, demo_root):
    """One copy of each photograph, and where its white cell is: x, y, radius in its pixels."""
    truth = pd.read_csv(demo_root / "truth.csv").drop(columns="photo").set_index("path")
    paths = table.groupby("photo").path.first().tolist()
    relative = [Path(path).relative_to(demo_root).as_posix() for path in paths]
    return truth.loc[relative].assign(path=paths)


@pytest.fixture(scope="module")
def maps(lite0, cells):
    return heat_maps(lite0, cells.path.tolist())


def times_its_share(maps: np.ndarray, cells: pd.DataFrame) -> float:
    """The heat on the cell's disc over its share of the picture; 1 for a map of no use."""
    y, x = np.mgrid[: COPY[1], : COPY[0]]
    ratios = []
    for heat, cell in zip(maps, cells.itertuples(), strict=True):
        heat = np.asarray(Image.fromarray(heat).resize(COPY, Image.BILINEAR))
        disc = (x - cell.x) ** 2 + (y - cell.y) ** 2 <= cell.radius**2
        ratios.append(heat[disc].sum() / heat.sum() / disc.mean())
    return float(np.mean(ratios))


def test_the_map_falls_on_the_white_cell(maps, cells):
    on_cell = times_its_share(maps, cells)
    assert on_cell > 2.3
    # Cells lie near the middle, and so would the heat of a map that looks nowhere in particular.
    elsewhere = np.mean([times_its_share(np.roll(maps, k, axis=0), cells) for k in (1, 5, 9)])
    assert on_cell > 1.4 * elsewhere
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(maps.reshape(len(maps), -1), axis=1).reshape(maps.shape)
    assert times_its_share(shuffled, cells) == pytest.approx(1, abs=0.1)


def test_maps_go_from_0_to_1(maps, cells):
    assert maps.shape == (len(cells), 256, 256)
    assert maps.dtype == np.float32
    assert maps.min() >= 0
    assert maps.max(axis=(1, 2)) == pytest.approx(np.ones(len(maps)))


def test_the_predicted_class_is_explained_or_the_one_asked_for(lite0, maps, cells):
    paths = cells.path.tolist()[:3]
    images = image_dls(paths, lite0.arch, 256, 8, "frame", device=CPU)
    with lite0.no_bar():
        predicted = predict_with_features(lite0, images.valid)[0].argmax(axis=1)
    same = heat_maps(lite0, paths, predicted.tolist())
    assert np.allclose(same, maps[:3], atol=1e-3)
    other = heat_maps(lite0, paths, ((predicted + 1) % 4).tolist())
    assert np.abs(other - same).mean(axis=(1, 2)).min() > 0.05
    assert heat_maps(lite0, []).shape == (0, 256, 256)


def test_batches_do_not_matter(lite0, maps, cells):
    alone = heat_maps(lite0, cells.path.tolist()[-1:])  # of the last batch of the others
    assert np.allclose(alone, maps[-1:], atol=1e-3)


def test_the_learner_is_left_as_it_was(table):
    learn = make_learner(table, "resnet18", 64)
    learn.model.train()
    timm_model(learn).bn1.eval()  # as fastai leaves a frozen body
    learn.freeze()
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    modes = [module.training for module in learn.model.modules()]
    heat_maps(learn, table.path[:2].tolist())
    with pytest.raises(OSError):
        heat_maps(learn, ["/no/such.jpg"])
    assert [module.training for module in learn.model.modules()] == modes
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
    learn = make_learner(table, arch, size)
    with torch.no_grad():  # fastai and timm start some classifiers and gates next to zero
        timm_model(learn).get_classifier().weight.normal_()
    paths = table.path[:2].tolist()
    maps = np.stack([heat_maps(learn, paths, [k, k]) for k in range(4)])
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
    learn = make_learner(table, arch, 64)
    model = timm_model(learn)

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
        handle = model.blocks[-1].register_forward_pre_hook(keep_corner)
    else:
        handle = learn.model[0].register_forward_hook(keep_corner)
    with handle:
        maps = np.concatenate([heat_maps(learn, table.path[:1].tolist(), [k]) for k in range(4)])
    hottest = [np.unravel_index(heat.argmax(), heat.shape) for heat in maps if heat.max() > 0]
    assert hottest
    assert all(y < 32 <= x for y, x in hottest)


def test_a_model_without_places_is_refused(table, monkeypatch):
    learn = make_learner(table, "test_vit", 64)
    model = timm_model(learn)
    model.num_prefix_tokens, model.global_pool = 3, "avg"  # leaves no square of tokens
    with pytest.raises(BloodcellError, match="no features with a place"):
        heat_maps(learn, table.path[:1].tolist())


def test_overlay():
    picture = Image.new("RGB", (60, 20), (100, 150, 200))
    heat = np.zeros((8, 8), np.float32)
    heat[:, 4:] = 1
    laid = np.asarray(overlay(picture, heat, "frame")).astype(int)
    assert laid.shape == (20, 60, 3)
    assert (laid[:, :20] == (100, 150, 200)).all()  # clear where it is cold
    hot = laid[:, 50:]
    assert (hot[..., 0] > 190).all()
    assert (hot[..., 2] < hot[..., 0] - 20).all()
    assert overlay(picture.convert("L"), heat, "frame").mode == "RGB"


def test_the_heat_lies_where_the_network_looked(demo_table):
    picture = open_image(demo_table.path[0])
    left, top, right, bottom = crop_box(picture, "cell")
    laid = np.asarray(overlay(picture, np.ones((8, 8), np.float32))).astype(int)
    changed = (laid != np.asarray(picture)).any(axis=2)
    assert changed[top:bottom, left:right].mean() > 0.9
    changed[top:bottom, left:right] = False
    assert not changed.any()


def test_a_learner_of_cells_explains_the_cell(table):
    dls = blood_dls(table, "resnet18", 64, bs=8, device=CPU)
    learn = blood_learner(dls, "resnet18", "none", size=64)
    assert learn.crop == "cell"
    paths = table.path[:2].tolist()
    maps = heat_maps(learn, paths, [0, 0])
    learn.crop = "frame"
    assert not np.allclose(maps, heat_maps(learn, paths, [0, 0]), atol=0.05)
