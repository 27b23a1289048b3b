"""Every kind of image and of name: read as a viewer shows it, or listed as unreadable."""

import csv
import io
import json
import os
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bloodcell_fastai import BloodcellError, Config, Predictor, Run, cli, split_table
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.data import images
from bloodcell_fastai.data.cache import ImageReader
from bloodcell_fastai.data.datasets import read_folder
from bloodcell_fastai.data.duplicates import find_photos
from bloodcell_fastai.data.images import (
    TOO_LARGE,
    UNREAD_SUFFIXES,
    inspect_image,
    list_files,
    list_images,
    open_image,
    why_unreadable,
)
from bloodcell_fastai.serving.predict import PredictionFile, find_images

RED = (200, 30, 40)
SECOND = os.fsdecode("quo'te, [b]β$x^\n".encode() + b"\xff")  # the name of a class
SIZE = (24, 16)


def draw(colour=RED, size=SIZE) -> Image.Image:
    """One colour, with a blue left edge that tells how it is turned."""
    image = Image.new("RGB", size, colour)
    image.paste((0, 0, 255), (0, 0, size[0] // 4, size[1]))
    return image


def png(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3  # half a turn
    draw().save(path, exif=exif, quality=95)


def broken_exif(path: Path) -> None:
    draw().save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x12" * 60, quality=95)


def ramp(path: Path, dtype) -> None:
    values = np.full(SIZE[::-1], 0.5) * np.iinfo(dtype).max
    Image.fromarray(values.astype(dtype)).save(path)


def transparent(mode: str, path: Path) -> None:
    """Half of it opaque red, half of it black behind no opacity at all."""
    image = Image.new("RGBA", SIZE, (*RED, 255))
    image.paste((0, 0, 0, 0), (SIZE[0] // 2, 0, *SIZE))
    image.convert(mode).save(path)


def palette(path: Path) -> None:
    image = Image.new("P", SIZE, 0)
    image.putpalette([*RED, 0, 0, 0])
    image.paste(1, (SIZE[0] // 2, 0, *SIZE))
    image.save(path, transparency=1)


def animation(path: Path) -> None:
    frames = [draw((0, 255, 0)), draw((0, 0, 0))]
    draw().save(path, save_all=True, append_images=frames, lossless=True)


def of_a_phone(path: Path) -> None:
    """Two JPEGs in one file (MPO): the picture and its depth."""
    draw().save(path, "MPO", save_all=True, append_images=[draw((0, 0, 0))], quality=95)


def jpeg_2000(path: Path, **how) -> None:
    """Pillow writes it into no file whose name is not UTF-8."""
    data = io.BytesIO()
    draw().save(data, "JPEG2000", **how)
    path.write_bytes(data.getvalue())


def with_profile(path: Path) -> None:
    draw().save(path, icc_profile=b"not a real profile", quality=95)


# How to write a file, and the colour a viewer shows at its right edge: (r, g, b).
READABLE = {
    "plain.jpg": (lambda p: draw().save(p, quality=95), RED),
    "rotated.jpg": (rotated, (0, 0, 255)),
    "broken-exif.jpg": (broken_exif, RED),
    "cmyk.jpg": (lambda p: draw().convert("CMYK").save(p, quality=95), RED),
    "profile.jpg": (with_profile, RED),
    "trailing.jpg": (
        lambda p: (draw().save(p, quality=95), p.write_bytes(p.read_bytes() + b"x" * 999)),
        RED,
    ),
    "progressive.jpg": (lambda p: draw().save(p, progressive=True, quality=95), RED),
    "wrong-extension.jpg": (lambda p: draw().save(p, "PNG"), RED),
    "gif-inside.jpeg": (lambda p: draw().save(p, "GIF"), RED),
    "UPPER.JPG": (lambda p: draw().save(p, "JPEG", quality=95), RED),
    "grey.png": (lambda p: Image.new("L", SIZE, 77).save(p), (77, 77, 77)),
    "one-bit.png": (lambda p: Image.new("1", SIZE, 1).save(p), (255, 255, 255)),
    "16-bit.png": (lambda p: ramp(p, np.uint16), (127, 127, 127)),
    "16-bit.tif": (lambda p: ramp(p, np.uint16), (127, 127, 127)),
    "16-bit-other-end.tif": (
        lambda p: Image.frombytes("I;16B", SIZE, b"\x7f\xff" * SIZE[0] * SIZE[1]).save(p),
        (127, 127, 127),
    ),
    "rgba.png": (lambda p: transparent("RGBA", p), (255, 255, 255)),
    "rgba.webp": (lambda p: transparent("RGBA", p), (255, 255, 255)),
    "rgba.tiff": (lambda p: transparent("RGBA", p), (255, 255, 255)),
    "la.png": (lambda p: transparent("LA", p), (255, 255, 255)),
    "palette.png": (palette, (255, 255, 255)),
    "colour-key.png": (
        lambda p: Image.new("RGB", SIZE, RED).save(p, transparency=RED),
        (255, 255, 255),
    ),
    "animated.webp": (animation, RED),
    "animated.png": (animation, RED),
    "animated.gif": (animation, RED),
    "many-pages.tiff": (lambda p: draw().save(p, save_all=True, append_images=[draw()]), RED),
    "one-pixel.jpg": (lambda p: Image.new("RGB", (1, 1), RED).save(p, quality=95), RED),
    "one-pixel.png": (lambda p: Image.new("RGB", (1, 1), RED).save(p), RED),
    "one-line.bmp": (lambda p: Image.new("RGB", (500, 1), RED).save(p), RED),
    "windows.jfif": (lambda p: draw().save(p, "JPEG", quality=95), RED),
    "old.jpe": (lambda p: draw().save(p, "JPEG", quality=95), RED),
    "phone.jpg": (of_a_phone, RED),
    "new.avif": (lambda p: draw().save(p, quality=95), RED),
    "new.jp2": (jpeg_2000, RED),
    "stream.j2k": (lambda p: jpeg_2000(p, no_jp2=True), RED),
    "cell001": (lambda p: draw().save(p, "JPEG", quality=95), RED),
    "png.dat": (lambda p: draw().save(p, "PNG"), RED),
    "tiff.5": (lambda p: draw().save(p, "TIFF"), RED),
    "bitmap": (lambda p: draw().save(p, "BMP"), RED),
    "webp.txt": (lambda p: draw().save(p, "WEBP", lossless=True), RED),
    "avif-file": (lambda p: draw().save(p, "AVIF", quality=95), RED),
    "jp2-file": (jpeg_2000, RED),
    "gif-file": (lambda p: draw().save(p, "GIF"), RED),
    "large.png": (lambda p: Image.new("RGB", (4000, 3000), RED).save(p), RED),
}
HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
UNREADABLE = {
    "cut.heic": lambda p: p.write_bytes(HEIC_HEAD),
    "heic-file": lambda p: p.write_bytes(HEIC_HEAD),
    "cut-jpeg": lambda p: p.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF"),
    "empty.jpg": lambda p: p.touch(),
    "text.jpg": lambda p: p.write_text("no image"),
    "truncated.jpg": lambda p: (
        draw(size=(200, 200)).save(p),
        p.write_bytes(p.read_bytes()[:-60]),
    ),
    "truncated.png": lambda p: (draw().save(p), p.write_bytes(p.read_bytes()[:50])),
    "head-alone.tif": lambda p: p.write_bytes(b"II*\0\x08\0\0\0"),
    "bomb.png": lambda p: p.write_bytes(png(60_000, 60_000)),
    "half-a-bomb.png": lambda p: p.write_bytes(png(12_000, 9_000)),
    "no-pixels.png": lambda p: p.write_bytes(png(0, 10)),
    "float.tif": lambda p: Image.fromarray(np.ones((9, 9), np.float32)).save(p),
    "32-bit.tif": lambda p: Image.fromarray(np.ones((9, 9), np.int32)).save(p),
    "postscript.jpg": lambda p: p.write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(evil) (w) file closefile\nshowpage\n"
    ),
    "broken-link.jpg": lambda p: p.symlink_to("gone.jpg"),
    "circle.jpg": lambda p: p.symlink_to(p.name),
    "pipe.jpg": lambda p: os.mkfifo(p),
}
# What is neither an image nor named like one that is read, whatever it begins with.
OTHERS = {
    "BMI.csv": b"BM,I\n1,2\n",
    "labels.xml": b"<?xml version='1.0'?><annotation/>",
    "README": b"GIF is the format.",
    "empty": b"",
    "video.mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "slide.svs": b"II*\0\x08\0\0\0",
    "camera.NEF": b"MM\0*\0\0\0\x08",
    "stack.czi": b"ZISRAWFILE",
    "audio.wav": b"RIFF\0\0\0\0WAVE",
}
NAMES = [
    "with space.jpg",
    "quo'te\".jpg",
    "comma,semi;colon.jpg",
    "line\nbreak.jpg",
    "carriage\rreturn.jpg",
    "tab\tand\x1b[31mescape.jpg",
    "[red]markup:smile:.jpg",
    "per%cent{brace}.jpg",
    "-dash.jpg",
    "unicode-β-細胞-🩸.jpg",
    os.fsdecode(b"latin-\xe9\xff.jpg"),
    "x" * 251 + ".jpg",
    "NA.jpg",
    "a[1]*.jpg",
]


def fill(folder: Path, named=(), odd: bool = True) -> None:
    """``folder`` with plain images and, at will, all that is odd and can be read."""
    folder.mkdir(parents=True)
    for number in range(90):
        draw((number, 100, 150)).save(folder / f"plain-{number}.png")
    for name in named:
        draw().save(folder / name, "JPEG")
    if odd:
        for name, (write, _) in READABLE.items():
            write(folder / name)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """Two classes that hold every image, name and link there is, hidden and system files too."""
    root = tmp_path_factory.mktemp("zoo") / "cells"
    fill(root / "A", NAMES)
    fill(root / SECOND, NAMES)
    for number in range(80):
        draw((100, number, 150)).save(root / "A" / f"more-{number}.png")
    for name, write in UNREADABLE.items():
        write(root / "A" / name)
    (root / "A" / "other-class").symlink_to(root / SECOND)
    (root / "A" / "circle").symlink_to(root)
    (root / "A" / "linked.png").symlink_to("plain-0.png")
    (root / "A" / "gone.csv").symlink_to("nowhere")
    os.mkfifo(root / "A" / "pipe")
    for name, content in OTHERS.items():
        (root / "A" / name).write_bytes(content)
    for name in ("Thumbs.db", ".DS_Store", "._plain.jpg", ".hidden.jpg", "notes.txt", "no-suffix"):
        (root / "A" / name).write_bytes(b"\0\x05\x16\x07")
    for name in ("A/.cache", "A/@eaDir/plain.jpg", "__MACOSX/A", "$RECYCLE.BIN", ".git"):
        (root / name).mkdir(parents=True)
        draw().save(root / name / "1.jpg")
    return root


@pytest.fixture(scope="module")
def found(zoo):
    return read_folder(zoo)


@pytest.mark.parametrize("name", READABLE)
def test_an_image_is_read_as_a_viewer_shows_it(zoo, name):
    image = open_image(zoo / "A" / name)
    assert image.mode == "RGB"
    seen = image.getpixel((image.width - 1, image.height // 2))
    assert np.abs(np.subtract(seen, READABLE[name][1])).max() <= 6, seen
    assert min(inspect_image(zoo / "A" / name)) > 0


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_no_viewer_shows_is_unreadable(zoo, name):

    def read():
        with pytest.raises(OSError, match=r".") as caught:
            inspect_image(zoo / "A" / name)
        results.append(caught.value)

    reader, results = threading.Thread(target=read), []
    reader.start()
    reader.join(20)
    assert len(results) == 1
    with pytest.raises(OSError, match=r"."):
        open_image(zoo / "A" / name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("large.png", TOO_LARGE),
        ("larger.png", TOO_LARGE),  # Pillow itself refuses these, and names another limit
        ("grey.tif", "32 bits of grey have no agreed brightness"),
        ("text.jpg", "cannot identify image file"),
        ("cut.jpg", "truncated"),
    ],
)
def test_the_reason_is_told_without_the_path(tmp_path, monkeypatch, name, reason):
    path = tmp_path / name
    monkeypatch.setattr(images, "MAX_PIXELS", 5000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    if name == "text.jpg":
        path.write_text("text")
    elif name == "grey.tif":
        Image.new("F", (60, 80)).save(path)
    elif name == "cut.jpg":
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-300])
    else:
        Image.new("RGB", (100, 60 if name == "large.png" else 150)).save(path)
    with pytest.raises(OSError, match=reason) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        inspect_image(path)
    assert reason in (told := why_unreadable(path, caught.value))
    assert str(tmp_path) not in told


def test_heic_without_its_plugin_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._formats.cache_clear()
    (tmp_path / "a.jpg").write_bytes(HEIC_HEAD)
    (tmp_path / "b.jpg").write_text("text")
    try:
        with pytest.raises(OSError, match="pip install pillow-heif"):
            inspect_image(tmp_path / "a.jpg")
        with pytest.raises(OSError, match="cannot identify image file"):
            inspect_image(tmp_path / "b.jpg")
    finally:
        images._formats.cache_clear()


def test_heic_with_its_plugin(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    draw(size=(64, 64)).save(tmp_path / "a", "HEIF", quality=95)
    assert list_images(tmp_path) == [tmp_path / "a"]
    image = open_image(tmp_path / "a")
    assert np.abs(np.subtract(image.getpixel((60, 30)), RED)).max() <= 6
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-200])
    with pytest.raises(OSError, match="a: "):
        inspect_image(tmp_path / "a")


def test_what_an_audit_wrote_beside_the_images_is_passed_over(tmp_path):
    for name in ("audit.json", "labels.csv"):
        (tmp_path / name).write_text("{}")
    draw().save(tmp_path / "pair.png")
    (tmp_path / "A").mkdir()
    draw().save(tmp_path / "A" / "1.png")
    draw().save(tmp_path / "A" / "contact-sheet.png")
    found, others = list_files(tmp_path)
    assert found == [tmp_path / "A" / "1.png"]
    assert others == [tmp_path / "audit.json", tmp_path / "labels.csv"]


def test_an_image_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    draw().save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == SIZE[::-1]


def test_a_folder_lists_its_images_alone(zoo):
    """Neither hidden files nor those of the system, whatever is behind a link to a folder."""
    found, others = list_files(zoo / "A")
    assert found == list_images(zoo / "A")
    assert others == sorted(others)
    left = {path.relative_to(zoo / "A").as_posix() for path in others}
    assert left == {*OTHERS, "notes.txt", "no-suffix", "gone.csv", "pipe"}
    unread = {name for name in left if Path(name).suffix.lower() in UNREAD_SUFFIXES}
    assert unread == {"slide.svs", "camera.NEF", "stack.czi"}
    names = {path.relative_to(zoo / "A").as_posix() for path in found}
    odd = {*NAMES, *READABLE, *UNREADABLE, "linked.png"}
    assert names == odd | {n for n in names if n.startswith(("plain-", "more-"))}
    assert len(names) == len(odd) + 170


def test_each_file_is_read_or_listed_and_none_is_mislabelled(zoo, found):
    assert sorted(path.name for path in found.unreadable) == sorted(UNREADABLE)
    for folder in ("A", SECOND):
        names = {Path(path).name for path in found.table.path[found.table.label == folder]}
        plain = {f"plain-{n}.png" for n in range(90)} | {f"more-{n}.png" for n in range(80)}
        assert names - plain == {*NAMES, *READABLE}
    assert all(Path(row.path).parent == zoo / row.label for row in found.table.itertuples())
    assert "1 links to images that are in the set anyway" in found.warnings[0]


def test_the_table_comes_back_from_csv(found, tmp_path):
    table = split_table(found.table)
    run = Run(tmp_path)
    data = str(found.root)
    run.start(Config(data=data), ResolvedConfig(data=data, classes=("A", SECOND)), table)
    assert run.table.values.tolist() == table.astype(object).values.tolist()
    assert run.config.data == data


def test_batches_are_made_of_all_of_them(found):
    batches = ImageReader(16).batches(
        [found.table.path[:40].tolist(), found.table.path[-30:].tolist()]
    )
    assert [len(batch) for batch in batches] == [40, 30]


def test_photographs_are_looked_for_in_all_of_them(zoo, found):
    paths = [*found.table.path[::9], *(zoo / "A" / name for name in UNREADABLE)]
    assert len(find_photos(paths)) == len(paths)


def test_images_are_found_by_name_pattern_and_list(zoo, tmp_path):
    every = set(find_images([zoo]))
    assert {Path(path).name for path in every} >= {*NAMES, *READABLE, *UNREADABLE}
    assert list(find_images([zoo / "A" / name for name in NAMES])) == [
        str(zoo / "A" / name) for name in NAMES
    ]
    listed = [name for name in NAMES if "\n" not in name and "\r" not in name]
    (tmp_path / "list.txt").write_bytes(b"\n".join(os.fsencode(name) for name in listed))
    assert list(find_images([tmp_path / "list.txt"])) == listed
    assert {Path(path).name for path in find_images([f"{zoo}/**/plain-1*.png"])} == {
        "plain-1.png",
        *(f"plain-{n}.png" for n in range(10, 20)),
    }
    with pytest.raises(BloodcellError, match="No file or folder"):
        list(find_images(["x" * 300]))


def test_a_pattern_ends_where_links_lead_in_circles(tmp_path):
    (tmp_path / "A").mkdir()
    draw().save(tmp_path / "A" / "1.png")
    for name in "bcde":  # 4 ways at 40 levels: following them would never end
        (tmp_path / "A" / name).symlink_to(tmp_path)
    assert list(find_images([f"{tmp_path}/**/*.png"])) == [str(tmp_path / "A" / "1.png")]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_predictions_of_any_name_are_written_and_continued(tmp_path, suffix):
    columns = ["path", "predicted", "nearest"]
    table = pd.DataFrame({"path": NAMES, "predicted": "A", "nearest": NAMES[::-1]})
    out = tmp_path / f"out{suffix}"
    PredictionFile(out, columns).append(table)
    whole = out.read_bytes()
    for kept in range(len(whole) % 5, len(whole), 5):  # killed after some byte
        out.write_bytes(whole[:kept])
        done = PredictionFile(out, columns, resume=True).done
        assert done == set(NAMES[: len(done)])
    assert len(done) == len(NAMES) - 1
    PredictionFile(out, columns, resume=True).append(table[-1:])
    text = out.read_bytes().decode("utf-8", "surrogateescape")
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
    else:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert rows == table.to_dict("records")


def test_a_link_that_gives_an_image_a_second_label(tmp_path):
    fill(tmp_path / "A", odd=False)
    fill(tmp_path / "B", odd=False)
    (tmp_path / "B" / "x.png").symlink_to(tmp_path / "A" / "plain-3.png")
    with pytest.raises(BloodcellError, match="One image has two labels") as caught:
        read_folder(tmp_path)
    assert "plain-3.png" in caught.value.message


def test_a_class_that_is_a_link_is_read(tmp_path):
    fill(tmp_path / "elsewhere" / "A", odd=False)
    fill(tmp_path / "set" / "B", odd=False)
    (tmp_path / "set" / "A").symlink_to(tmp_path / "elsewhere" / "A")
    assert read_folder(tmp_path / "set").table.label.value_counts().to_dict() == {"A": 90, "B": 90}


def test_a_folder_that_holds_itself(tmp_path):
    (tmp_path / "only").symlink_to(tmp_path)
    with pytest.raises(BloodcellError, match="No images in"):
        read_folder(tmp_path)


def test_a_folder_beside_what_macos_adds_to_zips(tmp_path):
    fill(tmp_path / "set" / "A", odd=False)
    fill(tmp_path / "set" / "B", odd=False)
    (tmp_path / "__MACOSX" / "set").mkdir(parents=True)
    assert set(read_folder(tmp_path).table.label) == {"A", "B"}


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    fill(tmp_path / "A", odd=False)
    fill(tmp_path / "B", odd=False)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("B"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(images.os, "scandir", refuse)
    with pytest.raises(BloodcellError, match=r"/B cannot be listed: Permission denied"):
        read_folder(tmp_path)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command in this process: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bloodcell", *map(str, words)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        return ended.value.code or 0, shown.out, shown.err

    return run


def test_data_describes_them(command, zoo, tmp_path):
    code, out, err = command("data", "--data", zoo)
    assert code == 0, err
    assert f"Unreadable files: {len(UNREADABLE)}" in out
    for name in UNREADABLE:
        assert name in out
    with Image.open(tmp_path / "data" / "contact-sheet.png") as sheet:
        assert sheet.width > 500


def test_a_fit_on_them_is_planned(command, zoo, tmp_path):
    small = ("--arch", "resnet18", "--weights", "none", "--size", 32, "--batch-size", 8)
    code, out, err = command("fit", "--data", zoo, "--dry-run", *small, "--name", "plan")
    assert code == 0, err
    assert f"{len(UNREADABLE)} unreadable images are left out" in err
    assert "Time     about" in out
    assert set(Run(tmp_path / "runs" / "plan").config.classes) == {"A", SECOND}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_predicting_them_lists_those_that_cannot_be_read(command, zoo, trained, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    code, _, err = command("predict", zoo, "--run", trained.path, "--out", out)
    assert code == 1
    assert f"Unreadable, left out ({len(UNREADABLE)})" in err
    paths = set(find_images([zoo]))
    missing = paths - PredictionFile(out, Predictor.load(trained).columns, resume=True).done
    assert {Path(path).name for path in missing} == set(UNREADABLE)
    code, shown, _ = command("predict", zoo / "A", "--run", trained.path, "--out", out, "--resume")
    assert code == 1
    assert "were there already" in shown


def test_predictions_of_odd_names_are_shown(command, zoo, trained):
    code, out, err = command("predict", *(zoo / "A" / n for n in NAMES), "--run", trained.path)
    assert code == 0, err
    assert f"{len(NAMES)} images predicted" in out


def test_a_stream_goes_on_past_what_cannot_be_read(zoo, trained):
    names = [*UNREADABLE, *READABLE]
    batches = list(Predictor.load(trained).stream(zoo / "A" / name for name in names))
    assert [Path(p).name for b in batches for p in b.pictures.unreadable] == list(UNREADABLE)
    assert [Path(p).name for b in batches for p in b.table.path] == list(READABLE)
