import numpy as np
import pytest
from PIL import Image

from bloodcell_fastai.data.crop import crop_image, find_nucleus
from bloodcell_fastai.data.demo import CLASSES, draw_photograph

DRAWN = [(label, seed) for label in CLASSES for seed in range(6)]


def grey(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(180, 200, (height, width, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def photographs():
    return [draw_photograph(label, seed) for label, seed in DRAWN]


def test_the_nucleus_found_is_that_of_the_white_cell(photographs):
    for image, cell in photographs:
        nucleus = find_nucleus(image)
        assert np.hypot(nucleus.x - cell.x, nucleus.y - cell.y) < cell.radius
        assert 0.5 < nucleus.side / cell.radius < 2


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_it_is_found_however_the_image_is_turned(photographs, turns):
    image = photographs[0][0]
    turned = find_nucleus(np.ascontiguousarray(np.rot90(image, turns)))
    upright = find_nucleus(image)
    assert abs(turned.side / upright.side - 1) < 0.05


def test_black_corners_are_no_nucleus(photographs):
    for image, cell in photographs[::3]:
        damaged = image.copy()
        damaged[:90, :160] = 0
        damaged[-60:, -200:] = 3
        if not (cell.x < 200 and cell.y < 130) and not (cell.x > 400 and cell.y > 380):
            nucleus = find_nucleus(damaged)
            assert np.hypot(nucleus.x - cell.x, nucleus.y - cell.y) < cell.radius


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 150, 150)])
def test_where_nothing_is_stained_nothing_is_found(colour):
    assert find_nucleus(np.full((60, 80, 3), colour, np.uint8)) is None
    assert find_nucleus(np.asarray(grey(80, 60))) is None


def test_the_crop_is_a_square_inside_the_image_with_the_cell_in_it(photographs):
    for image, cell in photographs:
        part, (left, top, right, bottom), has_cell = crop_image(Image.fromarray(image), "cell")
        assert has_cell
        assert part.size == (right - left, bottom - top)
        assert 0 <= left < right <= image.shape[1]
        assert 0 <= top < bottom <= image.shape[0]
        assert right - left == bottom - top < min(image.shape[:2])
        assert left < cell.x < right
        assert top < cell.y < bottom


def test_the_nucleus_is_whole_in_the_crop(photographs):
    for image, _ in photographs:
        left, top, right, bottom = crop_image(Image.fromarray(image), "cell").box
        seen = find_nucleus(image[top:bottom, left:right])
        assert seen.side / find_nucleus(image).side == pytest.approx(1, abs=0.2)


def test_without_a_cell_the_middle_is_taken():
    assert crop_image(grey(80, 60), "cell")[1:] == ((10, 0, 70, 60), False)
    assert crop_image(grey(60, 80), "cell")[1:] == ((0, 10, 60, 70), False)
    assert crop_image(Image.new("RGB", (80, 60)), "cell")[1:] == ((10, 0, 70, 60), False)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 2), (32, 32)])
def test_any_image_can_be_cropped(size):
    for image in (grey(*size), Image.new("RGB", size), Image.new("RGB", size, "white")):
        part = crop_image(image, "cell").image
        assert part.width == part.height == min(size)
        assert part.mode == "RGB"


def test_the_whole_image_is_left_as_it_is(photographs):
    image = Image.fromarray(photographs[0][0])
    assert crop_image(image, "frame") == (image, (0, 0, *image.size), True)


def test_the_scale_of_the_image_does_not_matter(photographs):
    """Half the magnification shows the network nearly the same square."""
    for image, _ in photographs[::5]:
        whole = Image.fromarray(image)
        half = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.LANCZOS)
        boxes = np.array(
            [crop_image(whole, "cell").box, np.multiply(crop_image(half, "cell").box, 2)]
        )
        assert np.abs(boxes[0] - boxes[1]).max() < 0.1 * (boxes[0][2] - boxes[0][0])


def test_the_light_of_the_lamp_does_not_matter(photographs):
    """A tinted, dimmer lamp: images far apart become nearly the same."""
    for image, _ in photographs[::5]:
        tinted = np.clip(image * np.array([0.95, 0.8, 0.7]), 0, 255).round().astype(np.uint8)
        seen = [
            np.asarray(crop_image(Image.fromarray(one), "cell").image.resize((64, 64)), float)
            for one in (image, tinted)
        ]
        assert np.abs(seen[0] - seen[1]).mean() < 3
        assert np.abs(image.astype(float) - tinted).mean() > 20
