import pytest
import torch
from fastai.vision.all import AffineCoordTfm, TensorImage, aug_transforms, set_seed

from bloodcell_fastai.data.augment import (
    DYES,
    Noise,
    Sharpness,
    Stain,
    augmentation,
    blur,
    resample,
    restain,
)

PLAIN = {"stain": 0, "sharpness": 0, "noise": 0}
OPTIONS = {"rotate": 180.0, "zoom": 1.3, "warp": 0.2, "lighting": 0.3} | PLAIN
FASTAIS = {
    "flip_vert": True,
    "max_rotate": 180.0,
    "min_zoom": 1 / 1.3,
    "max_zoom": 1.3,
    "max_warp": 0.2,
}


@pytest.fixture(scope="module")
def batch():
    set_seed(0)
    coarse = torch.rand(32, 3, 8, 8)
    return TensorImage(torch.nn.functional.interpolate(coarse, 48, mode="bicubic").clamp(0, 1))


def fastais(batch, **options):
    """The batch after fastai's own transforms, with the parameters that the seed gives."""
    transforms = aug_transforms(**options)
    for transform in transforms:
        batch = transform(batch.clone(), split_idx=0)
    return batch, transforms


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (OPTIONS, FASTAIS | {"max_lighting": 0.3}),
        (OPTIONS | {"flip": False}, FASTAIS | {"do_flip": False, "max_lighting": 0.3}),
        (OPTIONS | {"warp": 0.0}, FASTAIS | {"max_warp": 0, "max_lighting": 0.3}),
        (OPTIONS | {"lighting": 0.0}, FASTAIS | {"max_lighting": 0}),
    ],
    ids=["all", "no flip", "no warp", "no lighting"],
)
def test_it_makes_fastais_images(batch, ours, theirs):
    set_seed(1)
    expected, _ = fastais(batch, **theirs)
    set_seed(1)
    result = batch.clone()
    for transform in augmentation(**ours):
        result = transform(result, split_idx=0)
    assert type(result) is TensorImage
    # Mirrored edges jump where rounding lands on the other side of a border.
    assert (result - expected).abs().mean() < 1e-4
    assert (result - batch).abs().mean() > 0.05


def test_its_parameters_are_distributed_as_fastais():
    """Rotation and mirroring of thousands of images, by their quantiles."""
    set_seed(2)
    matrices = augmentation(**OPTIONS)[0].draw(20_000)
    set_seed(3)
    affine, _ = aug_transforms(**FASTAIS, max_lighting=0.3)
    affine.before_call(TensorImage(torch.zeros(20_000, 1, 2, 2)), 0)
    determinants = torch.linalg.det(affine.mat[:, :, :2])
    # The warp multiplies by a projective matrix whose own determinant is near 1.
    assert torch.allclose(
        (matrices.det() < 0).float().mean(), (determinants < 0).float().mean(), atol=0.01
    )
    angles = [torch.atan2(m[:, 1, 0], m[:, 0, 0]) for m in (matrices, affine.mat)]
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        ours, theirs = (a.quantile(quantile) for a in angles)
        assert abs(ours - theirs) < 0.12


def test_validation_images_are_not_changed(batch):
    for transform in augmentation():
        assert torch.equal(transform(batch, split_idx=1), batch)


def test_nothing_asked_for_is_nothing_done():
    assert augmentation(flip=False, rotate=0, zoom=1, warp=0, lighting=0, **PLAIN) == []


def test_the_identity_changes_nothing(batch):
    plain = batch.as_subclass(torch.Tensor)
    assert torch.allclose(resample(plain, torch.eye(3).repeat(32, 1, 1)), plain, atol=1e-5)


def test_it_does_not_wait_for_the_device(batch, monkeypatch):
    def refuse(*args):
        raise AssertionError("reads a value back from the device")

    transforms = augmentation()
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    monkeypatch.setattr(torch.Tensor, "__bool__", refuse)
    for transform in transforms:
        transform(batch.clone(), split_idx=0)
    with pytest.raises(AssertionError):  # fastai's own does, so that the trap works
        next(t for t in aug_transforms() if isinstance(t, AffineCoordTfm))(batch, split_idx=0)


def test_the_dyes_are_those_of_the_paper():
    """An image of one dye alone keeps its colour, however much of it there is."""
    density = torch.tensor([0.2, 0.5])[:, None, None]  # of two images
    haematoxylin = torch.exp(-density * DYES[0][:, None])[..., None]  # (2, 3, 1, 1)
    twice = DYES.inverse() @ torch.diag(torch.tensor([2.0, 1.0, 1.0])) @ DYES
    stained = restain(haematoxylin, twice.expand(2, 3, 3), torch.zeros(2, 3))
    assert torch.allclose(stained, haematoxylin**2, atol=1e-5)
    eosin = torch.exp(-density * DYES[1][:, None])[..., None]
    assert torch.allclose(
        restain(eosin, twice.expand(2, 3, 3), torch.zeros(2, 3)), eosin, atol=1e-5
    )
    darker = restain(eosin, torch.eye(3).expand(2, 3, 3), torch.tensor([[0.1, 0, 0]] * 2))
    assert torch.allclose(darker[:, 0], eosin[:, 0] * torch.exp(torch.tensor(-0.1)))


@pytest.mark.parametrize(
    "transform", [Stain(0.4), Sharpness(0.7), Noise(0.05)], ids=["stain", "sharpness", "noise"]
)
def test_each_image_changes_in_its_own_way(transform):
    set_seed(4)
    alike = TensorImage(
        torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), 48).expand(16, -1, -1, -1)
    )
    result = transform(alike.clone(), split_idx=0)
    assert type(result) is TensorImage
    assert result.min() >= 0 and result.max() <= 1
    changes = (result - alike).abs().mean(dim=(1, 2, 3))
    assert len(changes.unique()) >= 12  # a blur cannot go further than all the way
    assert 0.005 < changes.mean() < 0.2
    set_seed(5)
    one = transform(alike.clone(), split_idx=0)
    set_seed(5)
    assert torch.equal(transform(alike.clone(), split_idx=0), one)


def test_sharpness_goes_both_ways():
    """Contrast between neighbours falls in some images and rises in others."""

    def steps(images):
        return (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))

    set_seed(6)
    fine = TensorImage(0.3 + 0.4 * torch.rand(32, 3, 64, 64))
    ratio = steps(Sharpness(0.7).encodes(fine)) / steps(fine)
    assert ratio.min() < 0.4
    assert ratio.max() > 1.2
    assert (steps(blur(fine)) < 0.4 * steps(fine)).all()


def test_noise_is_as_strong_as_asked_at_most():
    set_seed(7)
    grey = TensorImage(torch.full((64, 3, 32, 32), 0.5))
    deviations = Noise(0.1).encodes(grey).std(dim=(1, 2, 3))
    assert 0.09 < deviations.max() < 0.105
    assert deviations.min() < 0.02


def test_each_image_gets_another_amount_of_every_dye(monkeypatch):
    """Whatever the tint does: images of one dye keep its direction among the densities."""
    given = []
    monkeypatch.setattr(
        "bloodcell_fastai.data.augment.restain",
        lambda images, mixed, tints: given.append(mixed) or images,
    )
    set_seed(8)
    Stain(0.4).encodes(TensorImage(torch.rand(500, 3, 4, 4)))
    amounts = (DYES @ given[0] @ DYES.inverse()).diagonal(dim1=1, dim2=2).log()  # (500, 3)
    assert amounts.abs().max() <= 0.8
    assert (amounts.amax(0) > 0.6).all()
    assert (amounts.amin(0) < -0.6).all()
    assert (amounts - amounts.mean(1, keepdim=True)).abs().amax() > 0.2  # not all dyes alike
