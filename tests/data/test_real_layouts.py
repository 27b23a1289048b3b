"""Real photographs in their own layouts, and turned into those of other data sets.

They are those of Kaggle's set, whose zip ``$BLOODCELL_DATA`` names, and of ``pbc.zip`` and
``laboratories.zip`` beside it. Of each class a few are taken. An image is known again by its
pixels, so that a label that landed on another image is found.
"""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.data.datasets import KAGGLE_COUNTS, Dataset, open_dataset
from bloodcell_fastai.data.duplicates import known_photos
from bloodcell_fastai.data.images import open_image
from bloodcell_fastai.data.public_sets import PUBLIC_SETS
from bloodcell_fastai.data.splits import photo_groups, split_table

KAGGLE, PBC, LABORATORIES = "blood-cells.zip", "pbc.zip", "laboratories.zip"
PBC_COUNTS = {
    **{"basophil": 841, "eosinophil": 2049, "erythroblast": 1054, "ig": 1909},
    **{"lymphocyte": 803, "monocyte": 970, "neutrophil": 2206, "platelet": 1620},
}
LISC = {
    **{"basophil": "Baso", "eosinophil": "eosi", "lymphocyte": "lymp"},
    **{"monocyte": "mono", "neutrophil": "neut"},
}
SSL_WBC = next(known.codes for known in PUBLIC_SETS if known.name == "SSL-WBC")


def real_zip(name: str) -> Path:
    """One of the three archives, or a skipped test."""
    kaggle = os.environ.get("BLOODCELL_DATA")
    if not kaggle:
        pytest.skip("BLOODCELL_DATA does not name Kaggle's zip")
    path = Path(kaggle) if name == KAGGLE else Path(kaggle).with_name(name)
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return path


@dataclass(frozen=True)
class Photo:
    """A real image.

    Attributes:
        name: of its file, without folders.
        label: the folder it was in.
        content: bytes of the file.
    """

    name: str
    label: str
    content: bytes

    @property
    def pixels(self) -> np.ndarray:
        """uint8 (height, width, 3), RGB."""
        with Image.open(io.BytesIO(self.content)) as image:
            return np.asarray(image.convert("RGB"))

    @property
    def smear(self) -> str:
        """What the names of Raabin-WBC begin with."""
        return self.name.partition("_")[0]


def few(name: str, below: str = "", per_class: int = 6) -> list[Photo]:
    """Some images of each class from an archive, spread over its list."""
    with zipfile.ZipFile(real_zip(name)) as archive:
        folders: dict[str, list[str]] = {}
        for each in sorted(archive.namelist()):
            if each.startswith(below) and each.lower().endswith((".jpg", ".jpeg")):
                folders.setdefault(Path(each).parent.name, []).append(each)
        return [
            Photo(Path(each).name, label, archive.read(each))
            for label, names in folders.items()
            for each in names[:: max(len(names) // per_class, 1)][:per_class]
        ]


def raabin() -> list[Photo]:
    return few(LABORATORIES, "raabin/", 12)


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def put(path: Path, content: bytes | np.ndarray) -> None:
    """Write the bytes of a file, or pixels in the format that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(content).save(path)


def mask(photo: Photo) -> np.ndarray:
    """The darker part of an image, 0 or 255: the cell, more or less."""
    grey = cv2.cvtColor(photo.pixels, cv2.COLOR_RGB2GRAY)
    return cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY_INV | cv2.THRESH_OTSU)[1]


@dataclass(frozen=True)
class Turned:
    """A data set in another layout, and what should be read from it.

    Attributes:
        layout: its name.
        rows: of each image the pixels as :func:`digest` names them, label, subset and patient.
        source: a folder or an archive; None: it lies in the home folder.
        left_out: how many files for which reason.
    """

    layout: str
    rows: Sequence[tuple[str, str, str, str]]
    source: Path | None
    left_out: dict[str, int]


def row(photo: Photo, label: str = "", subset: str = "", group: str = "") -> tuple:
    return digest(photo.pixels), label or photo.label, subset, group


def alternate(photos: Sequence[Photo], *subsets: str) -> list[tuple[Photo, str]]:
    """The images, dealt out to subsets."""
    return [(photo, subsets[at % len(subsets)]) for at, photo in enumerate(photos)]


def keras(root: Path) -> Turned:
    dealt = alternate(few(KAGGLE, "dataset2-master/dataset2-master/images/TRAIN/"), *"112")
    dealt = [(photo, {"1": "training_set", "2": "test_set"}[n]) for photo, n in dealt]
    for photo, subset in dealt:
        put(root / "dataset" / subset / photo.label / photo.name, photo.content)
    # Which photograph an image of Kaggle's set was made from is known by its bytes.
    photo = known_photos(sorted(root.rglob("*.jpeg"))).set_index("path").photo
    photo_of = {Path(path).name: name for path, name in photo.items()}
    rows = [row(photo, subset=subset, group=photo_of[photo.name]) for photo, subset in dealt]
    return Turned("subset folders", rows, root, {})


def lisc(root: Path) -> Turned:
    photos = raabin()
    for number, photo in enumerate(photos):
        label, truth = LISC[photo.label], root / "Ground Truth Segmentation"
        put(root / "Main Dataset" / label / f"{number}.bmp", photo.pixels)
        put(truth / label / "areaforexpert1" / f"{number}_expert.bmp", mask(photo))
        put(truth / label / "areaforexpert2" / f"{number}_expert.bmp", mask(photo))
    # Of no class; it counts as a mask for the sake of its name.
    put(root / "More Dataset without Ground Truth" / "1.bmp", few(PBC)[0].pixels)
    rows = [row(photo, LISC[photo.label]) for photo in photos]
    return Turned("class folders", rows, root, {"masks": 121})


def ssl_wbc(root: Path) -> Turned:
    lines: dict[str, list[str]] = {"1": [], "2": []}
    number_of = {label: number for number, label in SSL_WBC.items()}
    dealt = alternate(raabin(), "1", "2")
    for photo, part in dealt:
        lines[part].append(f"{len(lines[part]) + 1},{number_of[photo.label]}")
        name = f"Dataset {part}/{len(lines[part]):03}"
        put(root / f"{name}.bmp", photo.pixels)
        put(root / f"{name}.png", mask(photo))
    for part, rows in lines.items():
        table = root / f"Class Labels of Dataset {part}.csv"
        table.write_text("\n".join(["image ID,class label", *rows]))
    return Turned("label table", [row(photo) for photo, _ in dealt], root, {"masks": 60})


def patients(root: Path) -> Turned:
    photos = raabin()
    for photo in photos:
        put(root / photo.smear / photo.label / photo.name, photo.content)
    rows = [row(photo, group=photo.smear) for photo in photos]
    return Turned("folders of patients", rows, root, {})


def raabin_subsets(root: Path) -> Turned:
    rows = []
    for photo, subset in alternate(raabin(), "Train", "Train", "TestA", "TestB"):
        # TestB has two of the classes alone.
        in_b = photo.label in ("lymphocyte", "neutrophil")
        subset = "TestA" if subset == "TestB" and not in_b else subset
        put(root / subset / photo.label.capitalize() / photo.name, photo.content)
        rows.append(row(photo, photo.label.capitalize(), subset))
    return Turned("subset folders", rows, root, {})


def _table(root: Path) -> tuple[pd.DataFrame, list[tuple]]:
    photos = raabin()
    table = pd.DataFrame(
        {
            "Image": [photo.name for photo in photos],
            "Cell type": [photo.label for photo in photos],
            "Slide": [photo.smear for photo in photos],
            "Quality": ["good", "poor"] * (len(photos) // 2),
        }
    )
    for photo in photos:
        put(root / "images" / photo.name, photo.content)
    return table, [row(photo, group=photo.smear) for photo in photos]


def csv(root: Path) -> Turned:
    table, rows = _table(root)
    table.to_csv(root / "labels.csv", index=False)
    return Turned("label table", rows, root, {})


def xlsx(root: Path) -> Turned:
    table, rows = _table(root)
    table.sample(frac=1, random_state=0).to_excel(root / "cells.xlsx", index=False)
    return Turned("label table", rows, root, {})


def medmnist(root: Path) -> Turned:
    classes = sorted(PBC_COUNTS)
    parts = alternate(few(PBC), "train", "train", "train", "val", "val", "test")
    arrays, rows = {}, []
    for part in ("train", "val", "test"):
        photos = [photo for photo, subset in parts if subset == part]
        small = [cv2.resize(photo.pixels, (64, 64)) for photo in photos]
        arrays[f"{part}_images"] = np.stack(small)
        labels = [classes.index(photo.label) for photo in photos]
        arrays[f"{part}_labels"] = np.array(labels, np.uint8)[:, None]
        rows += [
            (digest(pixels), photo.label.replace("ig", "immature granulocytes"), part, "")
            for pixels, photo in zip(small, photos, strict=True)
        ]
    root.mkdir()
    np.savez(root / "bloodmnist_64.npz", **arrays)
    return Turned("subset folders", rows, root / "bloodmnist_64.npz", {})


def zip_in_zip(root: Path) -> Turned:
    """As Mendeley packs them: one zip a class, in a zip."""
    photos = few(PBC)
    root.mkdir()
    with zipfile.ZipFile(root / "set.zip", "w") as outer:
        for label in PBC_COUNTS:
            inner = io.BytesIO()
            with zipfile.ZipFile(inner, "w") as archive:
                for photo in photos:
                    if photo.label == label:
                        archive.writestr(photo.name, photo.content)
            outer.writestr(f"PBC/{label}.zip", inner.getvalue())
    return Turned("class folders", list(map(row, photos)), root / "set.zip", {})


def tar_gz(root: Path) -> Turned:
    photos = few(PBC)
    root.mkdir()
    with tarfile.open(root / "set.tar.gz", "w:gz") as archive:
        for photo in photos:
            info = tarfile.TarInfo(f"PBC_dataset/{photo.label}/{photo.name}")
            info.size = len(photo.content)
            archive.addfile(info, io.BytesIO(photo.content))
    return Turned("class folders", list(map(row, photos)), root / "set.tar.gz", {})


def names(root: Path) -> Turned:
    """PBC in one folder: its names begin with the type of the cell."""
    photos = few(PBC)
    for photo in photos:
        put(root / photo.name, photo.content)
    rows = [row(photo, photo.name.partition("_")[0]) for photo in photos]
    return Turned("names", rows, root, {})


def home(root: Path) -> Turned:
    photos = few(PBC)
    for photo in photos:
        put(root.parent / "home" / photo.label / photo.name, photo.content)
    return Turned("class folders", list(map(row, photos)), None, {})


def twelve_bits(root: Path) -> Turned:
    photos = raabin()
    for photo in photos:
        path = root / photo.label / f"{Path(photo.name).stem}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), photo.pixels[..., ::-1].astype(np.uint16) * 16)
    return Turned("class folders", list(map(row, photos)), root, {})


TURNS: tuple[Callable[[Path], Turned], ...] = (
    *(keras, lisc, ssl_wbc, patients, raabin_subsets, csv, xlsx, medmnist, zip_in_zip, tar_gz),
    *(names, home, twelve_bits),
)


def opened(source: Path | None, home: Path) -> Dataset:
    def refuse() -> Path:
        raise AssertionError("nothing is to be downloaded")

    return open_dataset(source, home, download=refuse)


@pytest.mark.parametrize("turn", TURNS, ids=lambda turn: turn.__name__)
def test_real_images_in_another_layout(tmp_path, turn):
    turned = turn(tmp_path / "set")
    found = opened(turned.source, tmp_path / "home")
    assert found.layout == turned.layout
    digests = [digest(np.asarray(open_image(path, found.bits))) for path in found.table.path]
    columns = [found.table[name] for name in ("label", "subset", "photo")]
    assert sorted(zip(digests, *columns, strict=True)) == sorted(turned.rows)
    assert {why: len(paths) for why, paths in found.left_out.items()} == turned.left_out
    assert found.unreadable == {}

    if photo_groups(found.table).groupby(found.table.label).nunique().min() < 2:
        # All of the 100 neutrophils of Raabin-WBC that are here are from one smear.
        with pytest.raises(BloodcellError, match="single photograph"):
            split_table(found.table)
        return
    split = split_table(found.table)
    assert {"train", "valid"} <= set(split.part)
    tests = split.subset.str.lower().str.startswith("test")
    assert set(split.part[tests]) <= {"test"}
    groups = split[split.photo != ""].groupby("photo").part.nunique()
    assert (groups == 1).all()


@pytest.mark.slow
def test_kaggles_set(real_data):
    assert real_data.layout == "subset folders"
    assert real_data.counts.T.to_dict() == KAGGLE_COUNTS
    assert len(real_data.originals) == 366
    assert (dict(real_data.left_out), real_data.unreadable) == ({}, {})
    assert real_data.warnings == ()


def test_the_laboratories(tmp_path):
    found = opened(real_zip(LABORATORIES), tmp_path)
    assert found.layout == "sets side by side"
    assert found.counts.shape == (3, 5)
    assert found.counts.sum(axis=1).to_dict() == {"bcisc": 268, "krd": 25, "raabin": 500}
    assert set(found.counts.loc["raabin"]) == {100}
    assert (dict(found.left_out), found.unreadable, found.warnings) == ({}, {}, ())


@pytest.mark.slow
def test_pbc(tmp_path):
    found = opened(real_zip(PBC), tmp_path)
    assert found.layout == "class folders"
    assert found.table.label.value_counts().to_dict() == PBC_COUNTS
    assert len(found.table) == 11_452
    assert set(found.table.subset) == set(found.table.photo) == {""}
    assert (dict(found.left_out), found.unreadable, found.warnings) == ({}, {}, ())
