"""Cameras that write 10, 12 or 14 bits into files of 16: scaled by what the data set uses."""

import re
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from bloodcell_fastai import Config, Predictor, blood_dls, split_table
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.data.cache import ImageReader, cache_file
from bloodcell_fastai.data.datasets import Dataset, read_folder
from bloodcell_fastai.data.images import ImageInfo, describe_light, inspect_image, open_image
from bloodcell_fastai.evaluation.external import open_external, open_test
from bloodcell_fastai.evaluation.interpretation import interpret_external, interpret_run
from bloodcell_fastai.model.runs import Run
from bloodcell_fastai.reporter import Reporter
from bloodcell_fastai.training.train import prepare

OPTIONS = {"arch": "resnet18", "weights": "none", "size": 32, "bs": 4, "epochs": 1}


def cell(number: int = 0, size: tuple[int, int] = (48, 40)) -> np.ndarray:
    """A purple nucleus on a pale ground, float (height, width, 3), 0 to 1."""
    y, x = np.mgrid[: size[1], : size[0]]
    nucleus = (x - 20 - number % 8) ** 2 + (y - 18) ** 2 < 60
    ground = np.array([0.92, 0.88, 0.9]) - 0.002 * (x + number)[..., None]
    return np.where(nucleus[..., None], [0.4, 0.2, 0.6], ground)


def as_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    return (pixels * (2**bits - 1)).round().astype(np.uint16)


def write(path: Path, samples: np.ndarray) -> Path:
    """A PNG or a TIFF, which OpenCV compresses by LZW; with the samples as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), samples[..., ::-1] if samples.ndim == 3 else samples)
    return path


def tiff(samples: np.ndarray, order: str = "<", turned: int = 1, tags=()) -> bytes:
    """An uncompressed TIFF; ``tags`` are (number, text or number)."""
    colours, text, end = 1 if samples.ndim == 2 else 3, b"", order
    data = samples.astype(f"{end}u2").tobytes()
    height, width = samples.shape[:2]
    entries = {256: width, 257: height, 259: 1, 262: 2 if colours == 3 else 1, 274: turned}
    entries |= {258: 16, 273: 8, 277: colours, 278: height, 279: len(data)} | dict(tags)
    place = 8 + len(data) + 2 + 12 * len(entries) + 4
    directory = struct.pack(f"{end}H", len(entries))
    for number, value in sorted(entries.items()):
        if number == 258 and colours == 3:
            entry = struct.pack(f"{end}HHII", number, 3, 3, place + len(text))
            text += struct.pack(f"{end}3H", 16, 16, 16)
        elif isinstance(value, str):
            entry = struct.pack(f"{end}HHII", number, 2, len(value) + 1, place + len(text))
            text += value.encode() + b"\0"
        else:
            entry = struct.pack(f"{end}HHII", number, 4, 1, value)
        directory += entry
    start = (b"II*\0" if end == "<" else b"MM\0*") + struct.pack(f"{end}I", 8 + len(data))
    return start + data + directory + bytes(4) + text


def planar_tiff(samples: np.ndarray) -> bytes:
    """An uncompressed TIFF with a plane for each colour: PlanarConfiguration 2."""
    height, width = samples.shape[:2]
    size, n = 2 * height * width, samples.shape[2]
    place = 8 + n * size + 2 + 12 * 10 + 4
    entries = [(256, 1, width), (257, 1, height), (258, n, place), (259, 1, 1), (262, 1, 2)]
    entries += [(273, n, place + 4 * n), (277, 1, n), (278, 1, height)]
    entries += [(279, n, place + 8 * n), (284, 1, 2)]
    directory = b"".join(struct.pack("<HHII", key, 4, *rest) for key, *rest in entries)
    tail = [*[16] * n, *(8 + size * plane for plane in range(n)), *[size] * n]
    data = samples.astype("<u2").transpose(2, 0, 1).tobytes()
    start = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries))
    return start + directory + bytes(4) + struct.pack(f"<{3 * n}I", *tail)


def with_sbit(path: Path, bits: int) -> None:
    """Put the chunk sBIT into a PNG."""
    content = path.read_bytes()
    with Image.open(path) as image:
        body = b"sBIT" + bytes([bits] * len(image.getbands()))
    crc = struct.pack(">I", zlib.crc32(body))
    chunk = struct.pack(">I", len(body) - 4) + body + crc
    path.write_bytes(content[:33] + chunk + content[33:])


def error(shown: Image.Image, pixels: np.ndarray) -> float:
    """The largest difference from ``pixels``, 0 to 255."""
    values = np.asarray(shown, float)
    return np.abs(values - 255 * (pixels if pixels.ndim == 3 else pixels[..., None])).max()


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("colour", [True, False], ids=["colour", "grey"])
def test_samples_are_scaled_by_the_bits_they_use(tmp_path, bits, suffix, colour):
    pixels = cell() if colour else cell()[..., 1]
    path = write(tmp_path / f"a{suffix}", as_bits(pixels, bits))
    assert error(open_image(path), pixels) <= 1
    info = inspect_image(path)
    assert info[:4] == (48, 40, bits, as_bits(pixels, bits).max())
    assert abs(info.brightness - 255 * pixels.mean()) <= 1


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_twelve_bits_give_the_picture_of_eight_bit_for_bit(tmp_path, suffix):
    eight = (255 * cell()).astype(np.uint8)
    path = write(tmp_path / f"a{suffix}", eight.astype(np.uint16) << 4)
    assert np.array_equal(open_image(path), eight)


def test_left_justified_samples_use_all_bits(tmp_path):
    path = write(tmp_path / "a.tif", as_bits(cell(), 12) << 4)
    assert inspect_image(path).bits == 16
    assert error(open_image(path), cell()) <= 1


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("colour", [True, False], ids=["colour", "grey"])
def test_tiffs_of_either_byte_order_are_turned_as_they_say(tmp_path, order, turned, colour):
    pixels = cell() if colour else cell()[..., 1]
    (tmp_path / "16.tif").write_bytes(tiff(as_bits(pixels, 12), order, turned))
    shown = open_image(tmp_path / "16.tif")
    eight = Image.fromarray((255 * pixels).round().astype(np.uint8))
    exif = Image.Exif()
    exif[274] = turned
    eight.save(tmp_path / "8.png", exif=exif)
    expected = np.asarray(open_image(tmp_path / "8.png"), int)
    assert np.abs(np.asarray(shown, int) - expected).max() <= 1
    eight.save(tmp_path / "8.tif", tiffinfo={274: turned})
    assert np.array_equal(open_image(tmp_path / "8.tif"), expected)


def test_a_tiff_of_planes_is_refused_and_not_read_wrongly(tmp_path):
    (tmp_path / "a.tif").write_bytes(planar_tiff(as_bits(cell(), 12)))
    with pytest.raises(OSError, match="a plane for each colour"):
        inspect_image(tmp_path / "a.tif")


@pytest.mark.parametrize("colour", [True, False], ids=["colour", "grey"])
def test_a_png_of_16_bits_is_turned_as_its_exif_says(tmp_path, colour):
    pixels = cell() if colour else cell()[..., 1]
    path = write(tmp_path / "a.png", as_bits(pixels, 12))
    exif = Image.Exif()
    exif[274] = 6
    Image.new("L", (1, 1)).save(tmp_path / "b.png", exif=exif)
    (chunk,) = re.findall(rb".{4}eXIf.*?(?=.{4}IDAT)", (tmp_path / "b.png").read_bytes(), re.S)
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunk + content[33:])
    assert error(open_image(path), np.rot90(pixels, -1)) <= 1


OME = '<OME><Image><Pixels SignificantBits="12" Type="uint16"/></Image></OME>'


@pytest.mark.parametrize(
    "tags", [{281: 4095}, {270: OME}, {281: 4000, 50838: 7}], ids=["value", "ome", "unknown"]
)
@pytest.mark.parametrize("colour", [True, False], ids=["colour", "grey"])
def test_a_tiff_says_how_many_bits_it_uses(tmp_path, tags, colour, capfd):
    """So that an underexposed picture stays dark."""
    pixels = (cell() if colour else cell()[..., 1]) / 8
    (tmp_path / "a.tif").write_bytes(tiff(as_bits(pixels, 12), tags=tags))
    assert inspect_image(tmp_path / "a.tif").bits == 12
    assert error(open_image(tmp_path / "a.tif"), pixels) <= 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("said", "bits"), [(255, 12), (1023, 12), (65535, 12), (16383, 14)])
def test_what_a_file_says_wrongly_or_without_meaning_is_passed_over(tmp_path, said, bits):
    (tmp_path / "a.tif").write_bytes(tiff(as_bits(cell(), 12), tags={281: said}))
    assert inspect_image(tmp_path / "a.tif").bits == bits


def test_twelve_bits_packed_without_gaps(tmp_path):
    grey = as_bits(cell()[..., 1], 12) // 8
    pairs = grey.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1]])
    data = packed.T.astype(np.uint8)
    head = tiff(np.zeros((40, 36), np.uint16), tags={256: 48, 258: 12})
    (tmp_path / "a.tif").write_bytes(head[:8] + data.tobytes() + head[8 + data.size :])
    assert inspect_image(tmp_path / "a.tif").bits == 12
    assert error(open_image(tmp_path / "a.tif"), cell()[..., 1] / 8) <= 1


@pytest.mark.parametrize("colour", [True, False], ids=["colour", "grey"])
def test_a_png_says_how_many_bits_it_uses(tmp_path, colour):
    """Its samples are as they were, or use all bits as the standard asks."""
    pixels = cell() if colour else cell()[..., 1]
    path = write(tmp_path / "a.png", as_bits(pixels / 8, 12))
    with_sbit(path, 12)
    assert error(open_image(path), pixels / 8) <= 1
    path = write(tmp_path / "b.png", as_bits(pixels, 16))
    with_sbit(path, 12)
    assert inspect_image(path).bits == 16
    assert error(open_image(path), pixels) <= 1


def test_transparent_parts_of_16_bits_are_white(tmp_path):
    opaque = np.full((40, 48, 1), 65535, np.uint16)
    opaque[:, 24:] = 0
    samples = np.dstack([as_bits(cell(), 12)[..., ::-1], opaque])
    cv2.imwrite(str(tmp_path / "a.png"), samples)
    shown = np.asarray(open_image(tmp_path / "a.png"))
    assert (shown[:, 24:] == 255).all()
    assert error(shown[:, :24], cell()[:, :24]) <= 1


def test_bits_that_are_given_are_taken(tmp_path):
    path = write(tmp_path / "a.tif", as_bits(cell() / 8, 12))  # alone it would seem to have 10
    assert error(open_image(path, 12), cell() / 8) <= 1
    bright = write(tmp_path / "b.tif", as_bits(cell(), 14))
    assert (np.asarray(open_image(bright, 12))[0, 0] == 255).all()
    Image.new("RGB", (9, 9), (100, 3, 250)).save(tmp_path / "c.png")
    assert open_image(tmp_path / "c.png", 12).getpixel((4, 4)) == (100, 3, 250)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_damaged_files_of_16_bits_are_unreadable(tmp_path, suffix, capfd):
    noise = np.random.default_rng(0).integers(0, 4096, (40, 48, 3)).astype(np.uint16)
    path = write(tmp_path / f"a{suffix}", noise)
    content = path.read_bytes()
    path.write_bytes(content[:4000])
    for read in (open_image, inspect_image):
        with pytest.raises(OSError, match="a"):
            read(path)
    path.write_bytes(content)
    assert inspect_image(path).bits == 12
    assert "error" not in capfd.readouterr().err.lower()


def fill(root: Path, write_one, n: int = 6) -> Path:
    for kind in "AB":
        for number in range(n):
            write_one(root / kind / f"{number}", cell(number + (kind == "B") * 10))
    return root


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """A data set of 12 bits in 16, one picture of it underexposed, and the same of 8 bits."""
    deep, plain = (tmp_path_factory.mktemp("twins") / name for name in ("deep", "plain"))

    def save(path, pixels):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels).round().astype(np.uint8)).save(f"{path}.png")

    fill(deep, lambda path, pixels: write(path.with_suffix(".tif"), as_bits(pixels, 12)))
    fill(plain, save)
    write(deep / "A" / "dim.tif", as_bits(cell() / 9, 12))
    save(plain / "A" / "dim", cell() / 9)
    return deep, plain


def test_the_bits_are_those_of_the_whole_data_set(twins):
    deep, plain = map(read_folder, twins)
    assert (deep.bits, plain.bits) == (12, None)
    warning, dark = deep.warnings
    largest = as_bits(cell(), 12).max()
    assert warning == (
        f"13 images are of 16 bits per sample, of which 12 are used (values up to {largest:,}): "
        "they are scaled by that; without it they would be nearly black."
    )
    assert dark.startswith("1 images are nearly black, such as ")
    assert "dim.tif" in dark
    assert plain.warnings == (dark.replace(str(twins[0]), str(twins[1])).replace(".tif", ".png"),)
    assert deep.sizes == plain.sizes == {(48, 40): 13}


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_of_12_bits_is_that_of_8(twins, cache):
    batches = []
    for root in twins:
        dataset = read_folder(root)
        table = split_table(dataset.table, "random", 0)
        dls = blood_dls(
            table, "resnet18", 32, 8, batch_tfms=[], cache=cache, device="cpu", bits=dataset.bits
        )
        names = [Path(path).stem for path in dls.valid.items.path]
        whole = dls.reader.read(table.path.tolist()).pixels.int()
        of_item = [np.asarray(dls.train_ds[0][0], int), np.asarray(dls.valid_ds[0][0], int)]
        batches.append((names, dls.valid.one_batch()[0], whole, of_item))
    (names, deep, all_deep, items), (others, plain, all_plain, other_items) = batches
    assert names == others
    # The levels after the light is evened out: a rounding of the sample is up to three.
    assert (all_deep - all_plain).abs().max() <= 4
    assert (deep - plain).abs().max() <= 4 / 255 / 0.22
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(items, other_items, strict=True))


def test_the_cache_tells_bits_apart(twins):
    paths = [str(path) for path in sorted(twins[0].rglob("*.tif"))]
    plain, deep = cache_file(paths, 32, "frame"), cache_file(paths, 32, "frame", 12)
    assert plain.name.split("-")[1] == "32px_frame" and plain != deep
    dim = [paths.index(path) for path in paths if path.endswith("dim.tif")]
    seen = [
        ImageReader.open(paths, 32, "frame", build=True, bits=bits).read(paths)
        for bits in (None, 12, 12)
    ]
    alone, together, cached = (batch.pixels[dim].float().mean() for batch in seen)
    assert abs(together - 255 * (cell() / 9).mean()) < 2 < alone - together
    assert together == cached
    assert np.allclose(seen[1].brightness, ImageReader(32, bits=12).read(paths).brightness)


def test_light_is_told_at_the_depth_of_the_data_set():
    infos = [ImageInfo(9, 9, 12, 4000, 150.0), ImageInfo(9, 9, 10, 900, 100.0)]
    told = describe_light(["a", "b"], [*infos, ImageInfo(9, 9, 8, 255, 31.0)][:2])
    assert len(told) == 2
    assert told[1].startswith("1 images are nearly black, such as b:")
    assert describe_light(["a"], [ImageInfo(9, 9, 8, 255, 33.0)]) == ()
    (white,) = describe_light(["a", "b"], [ImageInfo(9, 9, 8, 255, m) for m in (240.0, 251.0)])
    assert white.startswith("1 images are nearly white, such as b:")
    assert describe_light(["a"], [ImageInfo(9, 9, 16, 60_000, 150.0)]) == ()


class Told(Reporter):
    def __init__(self):
        self.warnings = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_run_keeps_the_bits(twins):
    reporter = Told()
    resolved, _ = prepare(Config(data=str(twins[0]), **OPTIONS), reporter)
    assert resolved.bits == 12
    assert "12 are used" in reporter.warnings[0] == resolved.warnings[0]
    assert ResolvedConfig(**resolved.model_dump()).bits == 12
    assert prepare(Config(data=str(twins[1]), **OPTIONS), Told())[0].bits is None


@pytest.mark.parametrize("crop", ["cell", "frame"])
def test_grey_pictures_without_white_cells_are_told_before_the_training(tmp_path, crop):
    def save(path, pixels):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels[..., 1]).astype(np.uint8)).save(f"{path}.png")

    fill(tmp_path / "grey", save, n=25)
    for number in range(3):  # the cells of few are found
        Image.fromarray((255 * cell(number)).astype(np.uint8)).save(
            tmp_path / "grey" / "A" / f"{number}.png"
        )
    reporter = Told()
    config = Config(data=str(tmp_path / "grey"), crop=crop, **OPTIONS)
    resolved, _ = prepare(config, reporter)
    if crop == "frame":
        assert reporter.warnings == []
        return
    (warning,) = reporter.warnings
    found = re.match(
        r"No white cell is found in (\d+) of 40 images looked at, such as (.*?):", warning
    )
    assert found is not None and 36 <= int(found[1]) <= 39
    assert Path(found[2]).is_file()
    assert "`crop=frame`" in warning
    assert resolved.warnings == (warning,)


@pytest.fixture
def on_twins(twins, trained, tmp_path) -> list[tuple[Run, Dataset]]:
    """A run on each of the twins, with the model of another one."""
    found = []
    for root in twins:
        dataset = read_folder(root)
        table = dataset.table.assign(label=trained.config.classes[0])
        run = Run(shutil.copytree(trained.path, tmp_path / root.name))
        parts = table.assign(part=[*["train", "valid"] * 6, "test"], subset="")
        parts.loc[parts.path.str.contains("dim"), "part"] = "valid"
        config = trained.config.changed(bits=dataset.bits, data=str(root))
        run.start(trained.asked, config, parts)
        found.append((run, replace(dataset, table=table)))
    return found


@pytest.mark.slow
def test_a_run_is_interpreted_at_the_depth_of_its_data_set(on_twins):
    deep, plain = (interpret_run(run).predictions for run, _ in on_twins)
    assert [open_test(run).bits for run, _ in on_twins] == [12, None]
    assert np.abs(deep.confidence - plain.confidence).max() < 0.02
    for table in (deep, plain):  # alone it would not be nearly black
        assert table.flag[table.path.str.contains("dim")].tolist() == ["nearly black"]


@pytest.mark.slow
def test_another_data_set_is_scored_at_its_own_depth(on_twins, trained):
    (_, deep), (_, plain) = on_twins
    run = Run(on_twins[1][0].path)  # its own images are of 8 bits
    run.start(trained.asked, trained.config, trained.table)
    assert [open_external(run, dataset).bits for dataset in (deep, plain)] == [12, None]
    ours, theirs = (interpret_external(run, each)[0].predictions for each in (deep, plain))
    assert np.abs(ours.confidence - theirs.confidence).max() < 0.02
    for table in (ours, theirs):
        assert table.flag[table.path.str.contains("dim")].tolist() == ["nearly black"]


def test_a_picture_to_predict_is_read_by_its_own_depth(twins, trained):
    path = twins[0] / "A" / "dim.tif"
    assert "nearly" not in Predictor.load(trained)([path]).flag[0]
