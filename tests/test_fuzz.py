"""Whatever is in a file: it is read, or a BloodcellError says what is wrong, in bounded time.

``BLOODCELL_FUZZ=20000 pytest tests/test_fuzz.py`` tries so many cases a test, new ones each time;
what such a run found is kept as ``@example``.
"""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from bloodcell_fastai import BloodcellError, Config, Run
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.data.archives import content_key, unpack
from bloodcell_fastai.data.duplicates import known_photos, with_photos
from bloodcell_fastai.data.images import inspect_image, open_image
from bloodcell_fastai.errors import printable
from bloodcell_fastai.evaluation.interpretation import read_metrics
from bloodcell_fastai.files import read_table, write_table
from bloodcell_fastai.model.calibration import Reference
from bloodcell_fastai.model.checkpoints import Checkpoint
from bloodcell_fastai.serving.predict import PredictionFile, find_images

CASES = os.environ.get("BLOODCELL_FUZZ")


def cases(usual: int) -> settings:
    return settings(
        max_examples=int(CASES or usual),
        derandomize=not CASES,
        deadline=5000,  # milliseconds a case: bounded time
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder of a run."""
    path = tmp_path_factory.mktemp("run")
    (path / "config.json").write_bytes(as_json(CONFIG))
    return path


def only_ours(read):
    """What ``read`` returns; None where it is refused properly."""
    try:
        return read()
    except BloodcellError as error:
        assert error.message
        assert error.hint
        assert len(str(error)) < 10_000
        return None


@st.composite
def damaged(draw, whole: bytes):
    """``whole`` with a few places overwritten, cut out or doubled, or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        piece = draw(st.one_of(st.binary(max_size=12), st.sampled_from(NASTY)))
        if draw(st.booleans()):
            piece += bytes(data[start:end])
        data[start:end] = piece
    return bytes(data)


NASTY = [
    *(b"\0", b"\r", b"\n", b'"', b",", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"NaN", b"1e999"),
    *(b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"-1", b"null", b"Infinity", b"\x1a", b"../"),
    *(b"\xff" * 4, b"\x00" * 8, b"PK\x01\x02", b"PK\x05\x06", b"\\ud800", b'"' * 3, b",,,,,,"),
]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -1, 0, 2**64, "", "../x", "\0", "\ud800", "\x1b[31m"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def edited(values: dict):
    """``values`` with some of them replaced, removed, or some added."""
    return st.builds(
        lambda new, gone, extra: {k: v for k, v in (values | new | extra).items() if k not in gone},
        st.dictionaries(st.sampled_from(sorted(values)), json_values, max_size=3),
        st.sets(st.sampled_from(sorted(values)), max_size=1),
        st.dictionaries(st.text(max_size=8), json_values, max_size=1),
    )


def as_json(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


ASKED = Config(data="data")
RESOLVED = ResolvedConfig(classes=("A", "B"), data="/data", versions=("torch 2",)).model_dump()
CONFIG = {"asked": ASKED.model_dump(), "resolved": RESOLVED}
CALIBRATION = {
    **{"temperature": 1.5, "distance_threshold": 0.25, "neighbours": 2},
    **{"ece_before": 0.04, "ece_after": 0.01, "n_images": 30},
}
METRICS = {
    **{"accuracy": 0.9, "balanced_accuracy": 0.9, "macro_f1": 0.9, "photo_accuracy": 0.9},
    **{"accuracy_ci95": [0.8, 1.0], "photo_accuracy_ci95": [0.8, 1.0], "leakage": None},
    **{"n_images": 2, "n_photos": 2, "n_known": 2, "classes": ["A", "B"], "temperature": 1.5},
}
SPLIT = b'path,label,subset,photo,part\na/1.jpg,A,,,train\n"/a/2,\n.jpg",B,TEST,p2,valid\n'
HISTORY = (
    b"epoch,train_loss,train_accuracy,valid_loss,valid_accuracy,lr,seconds\n"
    b"1,1.5,0.25,1.25,0.5,0.001,2.5\n2,1.0,0.5,1.0,0.75,0.001,2.5\n"
)
PHOTOS = b"path,photo\n1.jpg,p1\n2.jpg,p2\n"
KNOWN = b"digest,original,photo,inliers,margin\n0123456789abcdef,o1,p1,20,10\n"
OUT = b'path,predicted,p_A\n/1.jpg,A,0.5\n"/2\n.jpg",B,0.25\n'
OUT_LINES = b'{"path": "/1.jpg", "predicted": "A", "p_A": 0.5}\n' * 2


TABLE = pd.DataFrame({"path": ["1.jpg", "2.jpg"], "label": "A"})


@example(content=b"[" * 100_000)
@example(content=b'{"lr": ' + b"9" * 5000 + b"}")
@example(content=b'{"seed": 1e400}')
@example(content=b'{"lr": ' + b"9" * 400 + b"}")
@example(content=b"\xff\xfe{}")
@example(content=b'{"asked": {"\\ud800": 1}, "resolved": {}}')
@given(
    content=damaged(as_json(CONFIG))
    | edited(CONFIG).map(as_json)
    | edited(RESOLVED).map(lambda values: as_json(CONFIG | {"resolved": values}))
)
@cases(400)
def test_config(folder, content):
    (folder / "config.json").write_bytes(content)
    run = Run(folder)
    if (config := only_ours(lambda: run.config)) is not None:
        run.start(run.asked, config, TABLE)
        assert Run(folder).config == config


@example(content=as_json(CALIBRATION | {"temperature": 10**400}))
@given(content=damaged(as_json(CALIBRATION)) | edited(CALIBRATION).map(as_json))
@cases(250)
def test_calibration(folder, content):
    (folder / "calibration.json").write_bytes(content)
    found = only_ours(lambda: Run(folder).calibration)
    assert found is None or found.temperature > 0


FEATURES = save({"features": torch.eye(2, 3).half()})
LISTED = b"path,label,photo\n/1,A,p1\n/2,B,p2\n"


@given(tensors=damaged(FEATURES), listed=damaged(LISTED) | st.just(LISTED))
@cases(150)
def test_reference(home, tensors, listed):
    (home / "calibration.json").write_bytes(as_json(CALIBRATION))
    (home / "reference.safetensors").write_bytes(tensors)
    (home / "reference.csv").write_bytes(listed)
    found = only_ours(lambda: Run(home).reference)
    if isinstance(found, Reference):
        only_ours(lambda: found.nearest(torch.ones(2, 3)))


STATE = {
    **{"epochs_done": 1, "best": 0.5, "wait": 0},
    "optimizer": {"state": [{"step": 1}], "hypers": [{"lr": 0.1}]},
}


@given(
    content=edited(STATE).map(
        lambda state: save({"a": torch.ones(2)}, {"state": json.dumps(state)})
    )
    | damaged(save({"opt.0.a": torch.ones(2)}, {"state": json.dumps(STATE)}))
)
@cases(250)
def test_checkpoint(folder, content):
    (folder / "c.safetensors").write_bytes(content)
    found = only_ours(lambda: Checkpoint.read(folder / "c.safetensors"))
    assert found is None or 1 <= found.epochs_done <= 100_000


@pytest.mark.parametrize(
    ("name", "whole", "read"),
    [
        ("split.csv", SPLIT, lambda run: run.table),
        ("history.csv", HISTORY, lambda run: run.history),
        ("photos.csv", PHOTOS, lambda run: with_photos(TABLE, run.path)[0]),
        ("known.csv", KNOWN, lambda run: known_photos([__file__], run.path / "known.csv")),
        ("known.csv.xz", KNOWN, lambda run: known_photos([__file__], run.path / "known.csv.xz")),
    ],
)
def test_tables(home, name, whole, read):
    @example(content=b"")
    @example(content=b"path,label,subset,photo,part\n1,2\n")
    @example(content=b"path,label,subset,photo,part\n1,2,3,4,5,6\n7,8,9,10,11,12\n")
    @example(content=b"path,path,label,subset,photo,part\n1,2,3,4,5,6\n")
    @example(content=whole + b'"')
    @example(content=whole + b"\xff\xed\xa0\x80,,,,\n")
    @given(content=damaged(whole))
    @cases(150)
    def read_it(content):
        (home / name).write_bytes(content)
        found = only_ours(lambda: read(Run(home)))
        assert found is None or isinstance(found, pd.DataFrame)

    read_it()


@example(metrics=as_json({k: v for k, v in METRICS.items() if k != "leakage"}))
@example(metrics=as_json(METRICS | {"accuracy": 10**400}))
@given(metrics=damaged(as_json(METRICS)) | edited(METRICS).map(as_json))
@cases(200)
def test_metrics(home, metrics):
    (home / "metrics.json").write_bytes(metrics)
    found = only_ours(lambda: read_metrics(Run(home)))
    assert found is None or 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize(("suffix", "whole"), [(".csv", OUT), (".jsonl", OUT_LINES)])
def test_predictions_to_go_on_with(folder, suffix, whole):
    @example(content=b"[1]\n")
    @example(content=b"[" * 100_000 + b"\n")
    @example(content=b'{"path": 1, "predicted": 2, "p_A": 3}\n')
    @example(content=b'{"path": [1], "predicted": "A", "p_A": 0.5}\n')
    @example(content=b"path,predicted,p_A\n" + b'"' + b"x" * 200_000 + b'",A,1\n')
    @example(content=b'path,predicted,p_A\n"x\n')
    @given(content=damaged(whole))
    @cases(200)
    def go_on(content):
        path = folder / f"out{suffix}"
        path.write_bytes(content)
        found = only_ours(lambda: PredictionFile(path, ["path", "predicted", "p_A"], resume=True))
        if found is None:
            assert path.read_bytes() == content  # refused, and left alone
        else:
            assert all(isinstance(name, str) for name in found.done)

    go_on()


names = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")
    | st.sampled_from([os.fsdecode(bytes([byte])) for byte in range(0x80, 0x100)])
    | st.sampled_from('\r\n",\u2028\u0085\x1b'),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_predictions_of_any_name_come_back(folder, suffix):
    @example(paths=["a\rb"])
    @example(paths=["\u2028"])
    @example(paths=[os.fsdecode(b"\xff")])
    @given(paths=st.lists(names, max_size=4, unique=True))
    @cases(100)
    def come_back(paths):
        path, columns = folder / f"again{suffix}", ["path", "predicted"]
        PredictionFile(path, columns).append(pd.DataFrame({"path": paths, "predicted": "A"}))
        assert PredictionFile(path, columns, resume=True).done == set(paths)

    come_back()


@example(values=["a\rb"])
@example(values=["NA"])
@example(values=[os.fsdecode(b"\xff")])
@given(values=st.lists(names, min_size=1, max_size=4))
@cases(150)
def test_tables_of_any_name_come_back(folder, values):
    table = pd.DataFrame({"path": values, "label": values[::-1]})
    write_table(folder / "t.csv", table)
    found = read_table(folder / "t.csv", ["path", "label"])
    assert found.values.tolist() == table.values.tolist()


@given(lines=st.lists(st.binary(max_size=30), max_size=4))
@cases(100)
def test_lists_of_images(folder, lines):
    (folder / "list.txt").write_bytes(b"\n".join(lines))
    for name in find_images([folder / "list.txt"]):
        with pytest.raises(OSError, match=r"."):
            inspect_image(name)


@given(pattern=st.text(st.sampled_from("ab*?[]{}/.\\~!-") | st.characters(), max_size=20))
@cases(100)
def test_patterns(folder, pattern):
    only_ours(lambda: list(find_images([f"{folder}/none/{pattern}".replace("\0", "")])))


def archive() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("A/1.jpg", b"hello" * 20)
        zipped.writestr("B/2.jpg", bytes(50), compress_type=zipfile.ZIP_STORED)
        zipped.writestr("B/3.jpg", bytes(50), compress_type=zipfile.ZIP_LZMA)
        zipped.writestr("B/4.jpg", bytes(50), compress_type=zipfile.ZIP_BZIP2)
    return buffer.getvalue()


member_names = st.text(st.sampled_from("ab./\\:é \0\n") | st.characters(), max_size=8)


@st.composite
def archives(draw):
    """Well-formed archives of odd members."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as zipped:
        for name in draw(st.lists(member_names, max_size=4)):
            member = zipfile.ZipInfo(name.encode("utf-8", "replace").decode() or "x")
            member.external_attr = draw(
                st.integers(0, 2**32 - 1) | st.sampled_from([0, 0o644 << 16])
            )
            zipped.writestr(member, b"x")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@example(content=archive()[1:])  # members lie before the beginning of the file
@given(content=damaged(archive()) | archives())
@cases(300)
def test_archives(folder, content):
    path, target = folder / "x.zip", folder / "deep" / "out"
    path.write_bytes(content)
    before = {p for p in folder.rglob("*") if p.name != "deep"}
    only_ours(lambda: content_key(path))
    written = only_ours(lambda: unpack(path, target))
    after = {p for p in folder.rglob("*") if p.name != "deep"}
    if written is None:
        assert after == before
    else:
        assert all(p.is_relative_to(target) for p in after - before)
        assert not any(p.is_symlink() for p in after)
        for p in sorted(after - before, reverse=True):
            p.rmdir() if p.is_dir() else p.unlink()


def picture(kind: str, mode: str = "RGB") -> bytes:
    image = Image.fromarray(np.arange(27, dtype=np.uint8).reshape(3, 3, 3)).convert(mode)
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_images(folder, kind):
    def can(read, path) -> bool:
        try:
            read(path)
        except OSError:
            return False
        return True

    @example(content=picture(kind))  # Pillow divides by zero where an eighth of it is nothing
    @given(content=damaged(picture(kind)))
    @cases(60)
    def read_it(content):
        path = folder / "x.jpg"
        path.write_bytes(content)
        if can(inspect_image, path):
            assert open_image(path).mode == "RGB"
        else:
            assert not can(open_image, path)

    read_it()


@given(text=st.text())
@cases(100)
def test_what_is_shown_gives_a_terminal_no_orders(text):
    shown = printable(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    shown.encode("utf-8")
