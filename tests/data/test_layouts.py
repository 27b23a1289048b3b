"""Every layout of docs/layouts.md, on folders made like the public sets."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.data.datasets import Dataset, open_dataset, read_folder
from bloodcell_fastai.data.layouts import LAYOUTS
from bloodcell_fastai.data.public_sets import PUBLIC_SETS, public_sets_table
from bloodcell_fastai.data.splits import split_table

CELLS = ("Basophil", "Eosinophil", "Lymphocyte")
DOCS = Path(__file__).parents[2] / "docs" / "layouts.md"


def draw(path: Path, colours: int = 256) -> None:
    """A picture that no other path has, of many colours or of two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(list(str(path).encode()))
    pixels = chance.integers(0, colours, (20, 24, 3)) * (255 // (colours - 1))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def fill(root: Path, folder: str, n: int = 3, name: str = "{}.png", colours: int = 256) -> None:
    """``n`` pictures in a folder below ``root``; their names hold that of the folders above."""
    for number in range(1, n + 1):
        draw(root / folder / name.format(number, folder=folder.replace("/", "-")), colours)


def tops(root: Path, folders: str, classes=CELLS, name: str = "{folder}-{}.png") -> None:
    """Folders of classes below each of some folders."""
    for top in folders.split():
        for label in classes:
            fill(root, f"{top}/{label}".removeprefix("./"), name=name)


@dataclass(frozen=True)
class Twin:
    """A small folder in a layout, and what is read from it.

    Attributes:
        layout: its name.
        make: writes it below a folder.
        classes: the labels.
        subsets: the names of subsets.
        images: how many are taken.
        left_out: how many files are not.
        groups: patients or slides.
    """

    layout: str
    make: Callable[[Path], object]
    classes: tuple[str, ...]
    subsets: tuple[str, ...] = ("",)
    images: int = 9
    left_out: int = 0
    groups: tuple[str, ...] = ()


def lisc(root: Path) -> None:
    for label in ("Baso", "eosi", "lymp"):
        fill(root, f"Main Dataset/{label}", name="{}.bmp")
        fill(root, f"Ground Truth Segmentation/{label}/areaforexpert1", name="{}_expert.bmp")


def ssl_wbc(root: Path) -> None:
    for number in (1, 2):
        fill(root, f"Dataset {number}", 6, "{:03}.bmp")
        fill(root, f"Dataset {number}", 6, "{:03}.png", colours=2)
        rows = "".join(f"{image},{image % 3 + 1}\n" for image in range(1, 7))
        (root / f"Class Labels of Dataset {number}.csv").write_text(f"image ID,class\n{rows}")


def kaggle(root: Path) -> None:
    images = "dataset2-master/dataset2-master/images"
    tops(root, f"{images}/TRAIN {images}/TEST {images}/TEST_SIMPLE", ("EOSINOPHIL", "MONOCYTE"))
    fill(root, "dataset-master/dataset-master/JPEGImages", name="BloodImage_{:05}.jpg")
    (root / "dataset-master/dataset-master/Annotations").mkdir()


def label_table(root: Path) -> None:
    fill(root, "images", 6, "cell{}.png")
    rows = "".join(f"cell{number}.png,{'AB'[number % 2]}\n" for number in range(1, 7))
    (root / "labels.csv").write_text(f"filename,label\n{rows}")


def names(root: Path) -> None:
    for prefix in ("SNE", "LY", "MO"):
        fill(root, "cells", name=prefix + "_{}.jpg")


def all_idb(root: Path) -> None:
    for label in (0, 1):
        fill(root, "img", name=f"Im00{{}}_{label}.tif")


def classes_in_patients(root: Path) -> None:
    for label in ("abnormal", "normal"):
        for patient in (1, 2, 3):
            fill(root, f"{label}/patient {patient}", 2)


def deep(root: Path) -> None:
    for top, patient, slide, label in (
        *(("HospA", "P1", "slide1", "neutrophil"), ("HospA", "P1", "slide2", "lymphocyte")),
        *(("HospB", "P3", "slide1", "neutrophil"), ("HospB", "P4", "slide1", "lymphocyte")),
    ):
        fill(root, f"{top}/{patient}/{slide}/{label}/crops", 2)


def two_tables(root: Path) -> None:
    for part in ("train", "test"):
        fill(root, part, 6, "{}.png")
        rows = "".join(f"{number}.png,{'AB'[number % 2]}\n" for number in range(1, 7))
        (root / f"{part}.csv").write_text(f"filename,label\n{rows}")


TWINS = {
    "CLASS/image": Twin("class folders", lambda root: tops(root, "."), CELLS),
    "wrapper/images/CLASS/image": Twin(
        "class folders", lambda root: tops(root, "wrapper/images"), CELLS
    ),
    "Main Dataset/CLASS/image, Ground Truth Segmentation/CLASS/expert/image": Twin(
        "class folders", lisc, ("Baso", "eosi", "lymp"), left_out=9
    ),
    "train/CLASS/image, val/CLASS/image, test/CLASS/image": Twin(
        "subset folders",
        lambda root: tops(root, "train val test"),
        CELLS,
        ("test", "train", "val"),
        27,
    ),
    "training_set/CLASS/image, test_set/CLASS/image": Twin(
        "subset folders",
        lambda root: tops(root, "training_set test_set"),
        CELLS,
        ("test_set", "training_set"),
        18,
    ),
    "Train/CLASS/image, TestA/CLASS/image, Test-B/CLASS/image": Twin(
        "subset folders",
        lambda root: tops(root, "Train TestA Test-B"),
        CELLS,
        ("Test-B", "TestA", "Train"),
        27,
    ),
    "CLASS/train/image, CLASS/test/image": Twin(
        "subset folders",
        lambda root: [
            fill(root, f"{label}/{part}") for label in CELLS for part in ("train", "test")
        ],
        CELLS,
        ("test", "train"),
        18,
    ),
    "CLASS/image, test/CLASS/image": Twin(
        "subset folders", lambda root: tops(root, ". test"), CELLS, ("test", "train"), 18
    ),
    "dataset2-master/dataset2-master/images/TRAIN/CLASS/image": Twin(
        "subset folders",
        kaggle,
        ("EOSINOPHIL", "MONOCYTE"),
        ("TEST", "TEST_SIMPLE", "TRAIN"),
        18,
    ),
    "patient01/CLASS/image": Twin(
        "folders of patients",
        lambda root: tops(root, "patient01 patient02 patient03", ("A", "B")),
        ("A", "B"),
        images=18,
        groups=("patient01", "patient02", "patient03"),
    ),
    "fold_0/CLASS/image": Twin(
        "folders of patients",
        lambda root: tops(root, "fold_0 fold_1 fold_2", ("all", "hem")),
        ("all", "hem"),
        images=18,
        groups=("fold_0", "fold_1", "fold_2"),
    ),
    "CLASS/patient 1/image": Twin(
        "folders of patients",
        classes_in_patients,
        ("abnormal", "normal"),
        images=12,
        groups=("patient 1", "patient 2", "patient 3"),
    ),
    "train/patient01/CLASS/image, test/patient02/CLASS/image": Twin(
        "folders of patients",
        lambda root: tops(root, "train/P_patient1 train/P_patient2 test/P_patient3", ("A", "B")),
        ("A", "B"),
        ("test", "train"),
        18,
        groups=("P_patient1", "P_patient2", "P_patient3"),
    ),
    "HOSPITAL/patient/slide1/CLASS/crops/image": Twin(
        "folders of patients",
        deep,
        ("lymphocyte", "neutrophil"),
        ("HospA", "HospB"),
        8,
        groups=("P1", "P3", "P4"),
    ),
    "HOSPITAL/CLASS/image": Twin(
        "sets side by side",
        lambda root: tops(root, "Bergen Tromso", ("A", "B")),
        ("A", "B"),
        ("Bergen", "Tromso"),
        12,
    ),
    "images/image, labels.csv": Twin("label table", label_table, ("A", "B"), images=6),
    "train/image, test/image, train.csv, test.csv": Twin(
        "label table", two_tables, ("A", "B"), ("test", "train"), 12
    ),
    "Dataset 1/001.bmp, Dataset 1/001.png, Class Labels of Dataset 1.csv": Twin(
        "label table", ssl_wbc, ("lymphocyte", "monocyte", "neutrophil"), images=12, left_out=12
    ),
    "SNE_1.jpg": Twin("names", names, ("LY", "MO", "SNE")),
    "Im001_1.tif": Twin("names", all_idb, ("healthy", "lymphoblast"), images=6),
}


@pytest.mark.parametrize("example", TWINS)
def test_a_layout(tmp_path, example):
    twin, root = TWINS[example], tmp_path / "set"
    twin.make(root)
    found = read_folder(root)
    assert found.layout == twin.layout in {layout.name for layout in LAYOUTS}
    assert tuple(sorted(set(found.table.label))) == twin.classes
    assert tuple(sorted(set(found.table.subset))) == twin.subsets
    assert len(found.table) == twin.images
    assert sum(map(len, found.left_out.values())) == twin.left_out
    assert tuple(sorted(set(found.table.photo) - {""})) == twin.groups
    everything = [
        path for path in root.rglob("*") if path.suffix in (".png", ".bmp", ".jpg", ".tif")
    ]
    assert len(everything) == twin.images + twin.left_out + len(found.originals)
    # It can be trained on: every part that the plan promises is there.
    split = split_table(found.table)
    assert {"train", "valid"} <= set(split.part)
    groups = split[split.photo != ""].groupby("photo").part.nunique()
    assert (groups == 1).all()


def both_unknown(root: Path) -> None:
    tops(root, "x y", ("001", "002"))


def two_trees(root: Path) -> None:
    for top in ("x", "y"):
        for below in ("p", "q"):
            fill(root, f"{top}/{top}{below}")


def cells_at_both_levels(root: Path) -> None:
    for top in ("Neutrophil", "Lymphocyte"):
        for below in ("Eosinophil", "Monocyte"):
            fill(root, f"{top}/{below}")


def versions(root: Path) -> None:
    tops(root, "Original Segmented", ("Benign", "Pro"), "WBC-{}.jpg")


def augmented(root: Path) -> None:
    tops(root, ". aug", ("A", "B"))


def cropped(root: Path) -> None:
    tops(root, "A B", ("cropped", "raw"), "{}.png")


def only_versions(root: Path) -> None:
    tops(root, ".", ("raw", "cropped"), "{}.png")


def cases(root: Path) -> None:
    for name in ("case 1", "case 2", "control 1", "control 2"):
        fill(root, name)


def cross_validation(root: Path) -> None:
    tops(root, "fold1/train fold1/test fold2/train fold2/test", ("A", "B"), "c{}.png")


def same_names(root: Path) -> None:
    for folder in ("x", "y"):
        fill(root, folder, name="{}.png")
    (root / "labels.csv").write_text("file,label\n1.png,A\n2.png,B\n3.png,B\n")


def table_of_boxes(root: Path) -> None:
    fill(root, "images", 2, "c{}.png")
    lines = ("image,xmin,ymin,xmax,ymax,label", "c1.png,1,1,9,9,RBC", "c2.png,1,1,9,9,WBC")
    (root / "boxes.csv").write_text("\n".join(lines))


def boxes(root: Path) -> None:
    fill(root, "BCCD/JPEGImages", name="BloodImage_{:05}.jpg")
    draw(root / "example.jpg")
    for number in (1, 2, 3):
        voc = root / "BCCD" / "Annotations" / f"BloodImage_{number:05}.xml"
        voc.parent.mkdir(exist_ok=True)
        voc.write_text(
            "<annotation><object><name>WBC</name><bndbox></bndbox></object></annotation>"
        )


def yolo(root: Path) -> None:
    fill(root, "images/train", name="{}.jpg")
    (root / "labels" / "train").mkdir(parents=True)
    for number in (1, 2, 3):
        (root / "labels" / "train" / f"{number}.txt").write_text("0 0.5 0.5 0.25 0.25\n")


def folders_and_table(root: Path) -> None:
    fill(root, "x", 4, "a{}.png")
    fill(root, "y", 4, "b{}.png")
    rows = "".join(f"{letter}{n}.png,{'pq'[n % 2]}\n" for letter in "ab" for n in range(1, 5))
    (root / "labels.csv").write_text(f"file,label\n{rows}")


def loose(root: Path) -> None:
    fill(root, "images")
    (root / "labels.csv").write_text("file,label\n1.png,A\n2.png,A\n3.png,B\n")
    (root / "other.csv").write_text("file,label\n1.png,B\n2.png,A\n3.png,B\n")


REFUSED = {
    "x/001/image, y/001/image": (both_unknown, "not clear which folders", "classes_from=folder"),
    "x/p/image, x/q/image, y/r/image, y/s/image": (
        *(two_trees, "not clear which folders", "classes_from=parent"),
    ),
    "Neutrophil/Eosinophil/image": (
        *(cells_at_both_levels, "not clear which folders", "classes_from=parent"),
    ),
    "Original/CLASS/image, Segmented/CLASS/image": (versions, "versions of the same", "`data`"),
    "CLASS/cropped/image, CLASS/raw/image": (cropped, "versions of the same", "`data`"),
    "raw/image, cropped/image": (only_versions, "versions of the same", "classes_from=folder"),
    "CLASS/image, aug/CLASS/image": (augmented, "versions of the same", "`data`"),
    "fold1/train/CLASS/image, fold1/test/CLASS/image, fold2/…": (
        *(cross_validation, "folds of a cross-validation", "fold1"),
    ),
    "case 1/image, control 1/image": (*(cases, "called like patients", "classes_from=folder"),),
    "JPEGImages/image, Annotations/image.xml": (boxes, "boxes around them", "cut the boxes out"),
    "images/train/image, labels/train/image.txt": (
        *(yolo, "boxes around them", "cut the boxes out"),
    ),
    "x/image, y/image, labels.csv": (
        *(folders_and_table, "tell different classes", "labels=labels.csv"),
    ),
    "x/1.jpg, y/1.jpg, labels.csv of names": (
        *(same_names, "3 of its 3 lines match no image, or several", "classes_from=folder"),
    ),
    "images/image, boxes.csv": (table_of_boxes, "holds boxes", "labels=boxes.csv"),
    "images/image, labels.csv, other.csv": (loose, "two labels", "labels=FILE"),
}


@pytest.mark.parametrize("example", REFUSED)
def test_what_is_not_clear_is_refused(tmp_path, example):
    make, message, hint = REFUSED[example]
    make(tmp_path)
    with pytest.raises(BloodcellError, match=message) as caught:
        read_folder(tmp_path)
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_the_options_decide(tmp_path):
    both_unknown(tmp_path / "a")
    found = read_folder(tmp_path / "a", classes_from="folder")
    assert set(found.table.label) == {"001", "002"}
    found = read_folder(tmp_path / "a", classes_from="parent")
    assert set(found.table.label) == {"x", "y"}

    folders_and_table(tmp_path / "b")
    found = read_folder(tmp_path / "b", classes_from="folder")
    assert set(found.table.label) == {"x", "y"}
    found = read_folder(tmp_path / "b", labels="labels.csv")
    assert found.table.label.value_counts().to_dict() == {"p": 4, "q": 4}

    for kind in ("red", "blue"):
        fill(tmp_path / "c", "all", name=kind + "-{}.png")
    with pytest.raises(BloodcellError, match="Only one class|No classes"):
        read_folder(tmp_path / "c")
    found = read_folder(tmp_path / "c", classes_from="name")
    assert set(found.table.label) == {"red", "blue"}

    versions(tmp_path / "d")
    assert len(read_folder(tmp_path / "d", classes_from="folder").table) == 12
    assert len(read_folder(tmp_path / "d" / "Original").table) == 6


def test_a_subset_below_the_class_asked_for(tmp_path):
    tops(tmp_path, "train/x val/x", ("001", "002"))
    found = read_folder(tmp_path, classes_from="folder")
    assert set(found.table.label) == {"001", "002"}
    assert set(found.table.subset) == {"train", "val"}


@pytest.mark.parametrize(
    ("header", "rows", "file"),
    [
        ("filename,label", "{name}.png,{label}", "labels.csv"),
        ("image\tclass", "{name}\t{label}", "labels.tsv"),
        ("path;cell_type;quality", "cells/{name}.png;{label};good", "labels.csv"),
        ("Image,Category", "{number},{label}", "labels.csv"),
        ("", "{name}.png,{label}", "labels.csv"),
        ("id,A,B", "{name},{a},{b}", "labels.csv"),
        ("file,label,split,patient", "{name}.png,{label},{part},P{number}", "labels.csv"),
        ("file, label ", ' "set\\cells\\{name}.png" , {label} ', "labels.csv"),
    ],
)
def test_tables_of_labels(tmp_path, header, rows, file):
    root = tmp_path / "set"
    fill(root, "cells", 6, "c{}.png")
    lines = [header] if header else []
    for number in range(1, 7):
        label = "AB"[number % 2]
        values = {"name": f"c{number}", "number": number, "label": label}
        values |= {"a": int(label == "A"), "b": int(label == "B")}
        lines.append(rows.format(**values, part="train" if number < 4 else "test"))
    (root / file).write_text("\n".join(lines) + "\n")
    found = read_folder(root)
    assert found.layout == "label table"
    labels = {Path(path).stem: label for path, label in found.table[["path", "label"]].to_numpy()}
    assert labels == {f"c{number}": "AB"[number % 2] for number in range(1, 7)}
    if "patient" in header:
        assert set(found.table.subset) == {"train", "test"}
        assert found.table.photo.nunique() == 6


@pytest.mark.parametrize(
    ("lines", "subsets", "photos", "left_out"),
    [
        ("file,label,patient|,p1|,p1|,|,p2", "", ["p1", "p1", "", "p2"], 0),
        ("file,label,split|,train|,train|,|,test", "train train test", [""] * 3, 1),
        ("file,label,is_valid|,False|,False|,True|,True", "train train valid valid", [""] * 4, 0),
    ],
)
def test_a_column_of_patients_or_subsets_with_gaps(tmp_path, lines, subsets, photos, left_out):
    """A gap does not undo the column: a patient would be on both sides, and tests in training."""
    fill(tmp_path, "images", 4, "c{}.png")
    header, *rows = lines.split("|")
    rows = [f"c{n}.png,{'AB'[n % 2]}{rest}" for n, rest in enumerate(rows, start=1)]
    (tmp_path / "labels.csv").write_text("\n".join((header, *rows)))
    found = read_folder(tmp_path)
    assert found.table.subset.tolist() == (subsets.split() or [""] * len(photos))
    assert found.table.photo.tolist() == photos
    assert sum(map(len, found.left_out.values())) == left_out


def test_the_folders_above_images_in_a_table(tmp_path):
    """They are test sets and patients there too."""
    for part, patient in (("train", 1), ("train", 2), ("test", 3)):
        fill(tmp_path, f"{part}/patient {patient}", 2, f"p{patient}-{{}}.png")
    rows = "".join(f"p{p}-{n}.png,{'AB'[n - 1]}\n" for p in (1, 2, 3) for n in (1, 2))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    found = read_folder(tmp_path).table
    assert found.subset.value_counts().to_dict() == {"train": 4, "test": 2}
    assert found.photo.nunique() == 3


@pytest.mark.parametrize(
    "header_and_rows",
    [
        "index,label|{at},{label}",  # from 0, while the files are counted from 1
        "file,x|c{n}.png,{at}",
        "file,quality|c{n}.png,{label}",
        "id,label|{at},{label}",
    ],
)
@pytest.mark.parametrize("name", ["c{}.png", "{}.png", "{:03}.png"])
def test_what_is_no_table_of_labels(tmp_path, name, header_and_rows):
    fill(tmp_path, "images", 4, name)
    header, row = header_and_rows.split("|")
    values = [{"at": n - 1, "n": n, "label": "AB"[n % 2]} for n in range(1, 5)]
    rows = [row.replace("c{n}.png", name).format(each["n"], **each) for each in values]
    (tmp_path / "table.csv").write_text("\n".join((header, *rows)))
    with pytest.raises(BloodcellError, match="No classes") as caught:
        read_folder(tmp_path)
    assert "labels=table.csv" in caught.value.hint


def test_absolute_paths_of_another_machine(tmp_path):
    for folder in ("x", "y"):
        fill(tmp_path, f"set/{folder}", 2, "{}.png")
    rows = [f"D:\\home\\cells\\{folder}\\{n}.png,{n}{folder}" for folder in "xy" for n in (1, 2)]
    (tmp_path / "set" / "labels.csv").write_text("\n".join(("path,label", *rows)))
    found = read_folder(tmp_path / "set", labels="labels.csv").table
    assert found.label.tolist() == ["1x", "2x", "1y", "2y"]


def test_a_table_in_each_folder(tmp_path):
    """None takes the place of another of its name."""
    for patient in ("patient 1", "patient 2"):
        fill(tmp_path, patient, 2, "{}.png")
        (tmp_path / patient / "labels.csv").write_text("file,label\n1.png,A\n2.png,B\n")
    found = read_folder(tmp_path)
    assert found.table.label.tolist() == list("ABAB")
    assert found.left_out == {}


def test_a_table_that_gives_other_classes_than_folders_of_cells_is_told(tmp_path):
    for label in CELLS:
        fill(tmp_path, label, name="{folder}{}.png")
    rows = "".join(f"{label}1.png,{label}\n{label}2.png,Basophil\n" for label in CELLS)
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    (tmp_path / "areas.csv").write_text("file,area\nBasophil1.png,7\n")
    found = read_folder(tmp_path)
    assert found.layout == "class folders"
    assert any("labels.csv gives other classes" in each for each in found.warnings)


def test_a_spreadsheet_of_labels(tmp_path):
    fill(tmp_path, "images", 4, "c{}.png")
    sheet = pd.DataFrame({"Image": [f"c{n}.png" for n in range(1, 5)], "Cell type": list("xyxy")})
    sheet.to_excel(tmp_path / "sheet.xlsx", index=False)
    assert read_folder(tmp_path).table.label.tolist() == list("xyxy")


def test_what_a_table_of_labels_leaves_open_is_told(tmp_path):
    fill(tmp_path, "images", 6, "c{}.png")
    (tmp_path / "labels.csv").write_text(
        'file,label\nc1.png,A\nc2.png,B\nc3.png,a\nc4.png,\nc5.png,"A, B"\ngone.png,A\n'
    )
    found = read_folder(tmp_path)
    assert found.table.label.tolist() == ["A", "B", "A"]
    counts = {reason: len(paths) for reason, paths in found.left_out.items()}
    assert counts == {
        "not in labels.csv": 1,
        "without a label, or with several, in labels.csv": 2,
    }
    assert any("1 lines match no image, such as 'gone.png'" in each for each in found.warnings)
    assert any("A, a are taken for one class" in each for each in found.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "gone.csv"}, "No table"),
        ({"labels": "notes.csv"}, "none names the images"),
        ({"labels": "two.csv"}, "not clear which holds the classes"),
        ({"labels": "two.csv", "label_column": "z"}, "and none is called z"),
        ({"labels": "same.csv"}, "has two columns of one name"),
        ({"labels": "broken.xlsx"}, "no table that can be read"),
    ],
)
def test_a_table_of_labels_that_is_none(tmp_path, options, message):
    fill(tmp_path, "images", 4, "c{}.png")
    (tmp_path / "notes.csv").write_text("a,b\nx,y\nz,y\n")
    (tmp_path / "two.csv").write_text(
        "file,x,y\n" + "".join(f"c{n}.png,{'ab'[n % 2]},{'cd'[n % 2]}\n" for n in range(1, 5))
    )
    (tmp_path / "broken.xlsx").write_text("no sheet")
    (tmp_path / "same.csv").write_text("file,file\na,b\n")
    options = options | {"labels": str(tmp_path / options["labels"])}
    with pytest.raises(BloodcellError, match=message):
        read_folder(tmp_path, **options)
    found = read_folder(tmp_path, labels=str(tmp_path / "two.csv"), label_column="y")
    assert set(found.table.label) == {"c", "d"}


def test_masks_beside_the_images(tmp_path):
    """By the name of their folder, by a word behind the name of their image, or by their colours;
    two photographs of one name are no masks."""
    for label in ("A", "B"):
        fill(tmp_path, label, name="cell{}.png")
        fill(tmp_path, label, name="cell{}_mask.png", colours=2)
        fill(tmp_path, f"{label}/masks", name="cell{}.png", colours=2)
        fill(tmp_path, label, name="photo{}.png")
        fill(tmp_path, label, name="photo{}.bmp")
        fill(tmp_path, label, name="drawn{}.bmp")
        fill(tmp_path, label, name="drawn{}.png", colours=2)
    found = read_folder(tmp_path)
    assert {reason: len(paths) for reason, paths in found.left_out.items()} == {"masks": 18}
    assert len(found.table) == 24
    assert any(line.startswith("Left out: 18 .png masks") for line in found.describe())


def test_every_file_that_looks_like_an_image_is_counted(tmp_path):
    tops(tmp_path, "train val", ("A", "B"))
    fill(tmp_path, "val", 2)
    fill(tmp_path, "other", 1)
    fill(tmp_path, "docs", 1)
    draw(tmp_path / "figure.jpg")
    (tmp_path / "train" / "A" / "slide.czi").write_bytes(b"ZISRAWFILE")
    (tmp_path / "notes.txt").write_text("no image")
    found = read_folder(tmp_path)
    text = "\n".join(found.describe())
    assert "2 .png directly in val, in no folder of a class" in text
    assert "1 .png beside train, val" in text
    assert re.search(r"1 \.\w+, 1 \.\w+ in no folder of a class", text)
    assert "1 .czi of a format that is not read" in text
    assert ".txt" not in text
    assert any("2 images are directly in val" in each for each in found.warnings)


def test_what_is_beside_a_training_set_is_not_trained_on(tmp_path):
    """It may be a test set, called so in a language that is not known."""
    tops(tmp_path, "Training Prüfung", ("A", "B"))
    found = read_folder(tmp_path)
    assert set(found.table.subset) == {"Training"}
    assert sum(map(len, found.left_out.values())) == 6
    assert any("6 images are beside Training" in each for each in found.warnings)


def test_patients_in_the_training_and_the_test_set_are_told(tmp_path):
    tops(tmp_path, "train/p_patient1 train/p_patient2 test/p_patient2", ("A", "B"))
    (warning,) = read_folder(tmp_path).warnings
    assert warning.startswith("p_patient2: in the training set and")


def test_copies_by_their_names_stay_with_their_image(tmp_path):
    for label in ("A", "B"):
        for name in ("c{}", "c{}_aug1", "c{}_rot90", "d_aug{}", "e_jpg.rf.0a{}"):
            fill(tmp_path, label, 2, name + ".png")
    found = read_folder(tmp_path)
    assert found.layout == "class folders"
    names = found.table.path.map(lambda path: Path(path).name)
    photos = dict(zip(names, found.table.photo, strict=True))
    assert photos["c1.png"] == photos["c1_aug1.png"] == photos["c1_rot90.png"] == "B/c1"
    assert photos["d_aug1.png"] == photos["d_aug2.png"] == ""
    assert photos["e_jpg.rf.0a1.png"] == photos["e_jpg.rf.0a2.png"] != ""
    assert any("12 images are taken for copies" in each for each in found.warnings)


def test_folders_that_hold_nothing_are_told(tmp_path):
    tops(tmp_path, "train val", ("A", "B"))
    (tmp_path / "train" / "LYMPHOCYTE").mkdir()
    (tmp_path / "test").mkdir()
    (warning,) = read_folder(tmp_path).warnings
    assert "test, train/LYMPHOCYTE" in warning


def test_names_of_one_class_in_two_subsets(tmp_path):
    """Accents as macOS and as others write them, case, blanks, plurals and abbreviations."""
    accented = "Éosinophile"
    train = (unicodedata.normalize("NFC", accented), "Band Neutrophil", "LYMPHOCYTE", "other")
    valid = (unicodedata.normalize("NFD", accented), "band_neutrophil", "lymphocytes", "other")
    for part, names in (("train", train), ("val", valid)):
        for name in names:
            fill(tmp_path, f"{part}/{name}")
    found = read_folder(tmp_path)
    assert set(found.table.label) == set(train)
    assert found.counts.shape == (2, 4)
    assert len(found.warnings) == 3
    split_table(found.table, "official")


def test_names_that_differ_in_case_side_by_side_are_refused(tmp_path):
    fill(tmp_path, "Neutrophil")
    if (tmp_path / "NEUTROPHIL").exists():
        pytest.skip("the file system knows no case")
    fill(tmp_path, "NEUTROPHIL")
    with pytest.raises(BloodcellError, match="differ in case and blanks alone"):
        read_folder(tmp_path)
    for name in ("PMN", "neutrophil"):  # which a laboratory may tell apart
        fill(tmp_path / "more", name)
    assert set(read_folder(tmp_path / "more").table.label) == {"PMN", "neutrophil"}


def test_a_list_of_photographs_goes_before_the_folders_of_patients(tmp_path):
    tops(tmp_path, "patient1 patient2", ("A", "B"))
    first = next((tmp_path / "patient1" / "A").iterdir())
    name = first.relative_to(tmp_path).as_posix()
    (tmp_path / "photos.csv").write_text(f"path,photo\n{name},p7\n")
    found = read_folder(tmp_path).table.set_index("path").photo
    assert found[str(first)] == "p7"
    assert set(found) == {"p7", "patient1", "patient2"}


# Where no data is named


def find(home: Path) -> Dataset:
    def refuse() -> Path:
        raise AssertionError("nothing is to be downloaded")

    return open_dataset(home=home, download=refuse)


@pytest.mark.parametrize(
    ("make", "classes"),
    [
        (kaggle, {"EOSINOPHIL", "MONOCYTE"}),
        (lambda root: tops(root, "."), set(CELLS)),
        (lambda root: tops(root, ".", ("A", "B")), {"A", "B"}),
        (lambda root: tops(root, "train val test"), set(CELLS)),
        (lambda root: tops(root, "patient1 patient2", ("A", "B")), {"A", "B"}),
        (lambda root: tops(root, "mycells"), set(CELLS)),
        (label_table, {"A", "B"}),
    ],
)
def test_the_data_set_in_its_home(tmp_path, make, classes):
    make(tmp_path)
    (tmp_path / "README.md").write_text("Put data here.")
    (tmp_path / "contact-sheet.png").write_bytes(b"")
    (tmp_path / "sheet.docx").write_bytes(b"PK\x05\x06" + bytes(18))  # an empty zip
    found = find(tmp_path)
    assert set(found.table.label) == classes


def test_several_data_sets_in_their_home_are_asked_about(tmp_path):
    tops(tmp_path, "mine theirs", ("A", "B"))
    with pytest.raises(BloodcellError, match="Several data sets.*mine, theirs") as caught:
        find(tmp_path)
    assert f"`data={tmp_path / 'mine'}`" in caught.value.hint


def test_a_damaged_archive_does_not_lead_to_a_download(tmp_path):
    (tmp_path / "blood-cells.zip").write_text("cut off")
    with pytest.raises(BloodcellError, match="blood-cells.zip"):
        find(tmp_path)


def test_images_that_are_no_data_set_do_not_lead_to_a_download(tmp_path):
    fill(tmp_path, "A")
    with pytest.raises(BloodcellError, match="Only one class"):
        find(tmp_path)


# The docs


def test_the_docs_list_the_layouts_and_the_public_sets():
    text = DOCS.read_text()
    rows = re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
    assert set(rows) == {*TWINS, *REFUSED}
    assert public_sets_table() in text
    names = {layout.name for layout in LAYOUTS}
    without = [layout.name for layout in LAYOUTS if not layout.public_sets]
    assert without == ["sets side by side"]  # laboratories make these, no public set is one
    assert {known.layout for known in PUBLIC_SETS} <= names
    assert {twin.layout for twin in TWINS.values()} | {"boxes", "arrays"} == names
