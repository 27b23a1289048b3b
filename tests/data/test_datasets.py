import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bloodcell_fastai import BloodcellError, Config, Run, cli
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.data import datasets
from bloodcell_fastai.data.datasets import open_dataset, read_folder
from bloodcell_fastai.data.splits import describe_leakage, leakage, split_table
from bloodcell_fastai.errors import NoNetworkError
from bloodcell_fastai.files import sole_writer, write_table
from bloodcell_fastai.model.runs import relative_to
from bloodcell_fastai.serving.predict import find_images


def write_images(folder: Path, *names: str, size=(32, 24)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


def zip_folder(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as zipped:
        for path in sorted(folder.rglob("*")):
            zipped.write(path, path.relative_to(folder))
    return target


def refuse_download() -> Path:
    raise NoNetworkError("There is no network (test).")


def test_demo_has_kaggles_layout(demo):
    assert set(demo.table.columns) == {"path", "label", "subset", "photo"}
    assert list(demo.counts.index) == ["TEST", "TEST_SIMPLE", "TRAIN"]
    assert demo.table.label.nunique() == 4
    assert len(demo.originals) == 32
    assert demo.sizes == {(320, 240): len(demo.table)}
    assert demo.warnings == ()


def test_the_photographs_of_a_data_set_are_filled_in(demo, demo_root):
    """From its ``photos.csv``, without another call."""
    found = open_dataset(demo_root)
    truth = pd.read_csv(demo_root / "photos.csv").set_index("path").photo
    assert found.table.photo.tolist() == [
        truth[Path(path).relative_to(demo_root).as_posix()] for path in found.table.path
    ]
    assert found.n_known == len(found.table) > found.table.photo.nunique()


def test_what_the_package_writes_is_not_read_as_images(tmp_path):
    """Where everything lies side by side: classes, a run with its report, an audit, a contact
    sheet, and a folder with the demo."""
    write_images(tmp_path / "A", "1.png", "2.png", "3.png")
    write_images(tmp_path / "B", "1.png", "2.png", "contact-sheet.png")
    write_images(tmp_path / "runs" / "mine" / "report", "top_losses.png")
    for name in ("config.json", "split.csv"):
        (tmp_path / "runs" / "mine" / name).touch()
    write_images(tmp_path / "audit", "pairs.png")
    (tmp_path / "audit" / "audit.json").touch()
    with sole_writer(tmp_path / "data"):
        write_images(tmp_path / "data" / "demo" / "A", "drawn.png")
    assert read_folder(tmp_path).table.label.value_counts().to_dict() == {"A": 3, "B": 2}
    assert len(list(find_images([str(tmp_path)]))) == 5


def test_photographs_that_are_not_known_are_empty(tmp_path):
    write_images(tmp_path / "A", "1.png", "2.png", "3.png", "4.png")
    write_images(tmp_path / "B", "1.png", "2.png", "3.png", "4.png", size=(30, 30))
    found = read_folder(tmp_path)
    assert (found.table.photo == "").all()
    assert found.n_known == 0

    (tmp_path / "photos.csv").write_text(
        "path,photo\nA/1.png,x\nA/2.png,x\nB/1.png,y\ngone.png,z\n"
    )
    found = read_folder(tmp_path)
    assert found.table.photo.tolist() == ["x", "x", "", "", "y", "", "", ""]
    assert found.n_known == 3
    assert "photos.csv tells the photograph of 3 of 8 images; 1 of" in found.warnings[0]
    assert "such as 'gone.png'" in found.warnings[0]
    split = split_table(found.table, "photo")
    assert leakage(split) == 0
    text = describe_leakage(leakage(split), found.n_known, len(split))
    assert text.startswith("none found")  # and not "none", which only a full list can tell
    assert "only 3 of 8 images" in text
    assert describe_leakage(0.0, 8, 8).startswith("none:")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "line",
    [
        "A/{}.png,x",
        "A\\{}.png,x",
        "cells/A/{}.png,x",
        "C:\\Users\\me\\cells\\A\\{}.png,x",
        "/elsewhere/cells/A/{}.png,x",
        "a{}.png,x",
        '"A/{}.png",x',
        " 'A/{}.png' , x ",
        "./A/{}.png,x",
        "{root}/A/{}.png,x",
    ],
)
def test_a_list_of_photographs_made_elsewhere(tmp_path, line, encoding):
    root = tmp_path / "cells"
    write_images(root / "A", "a1.png", "a2.png")
    write_images(root / "B", "1.png", "2.png")
    lines = [line.format("a1", root=root), line.format("a2", root=root)]
    if line.startswith("a"):
        lines = ["a1.png,x", "a2.png,x"]
    text = "\r\n".join(["path, photo", *lines, "B/1.png,y", "B/2.png,y", ""])
    (root / "photos.csv").write_bytes(text.encode(encoding))
    found = read_folder(root)
    assert found.table.photo.tolist() == ["x", "x", "y", "y"]
    assert found.warnings == ()


def test_a_list_of_photographs_that_matches_nothing_is_told(tmp_path):
    """File names alone do not match where two images have them."""
    write_images(tmp_path / "A", "1.png", "2.png")
    write_images(tmp_path / "B", "1.png", "2.png")
    (tmp_path / "photos.csv").write_text("path,photo\n1.png,x\nother/2.png,x\n")
    found = read_folder(tmp_path)
    assert found.n_known == 0
    assert "photograph of 0 of 4 images; 2 of its lines match no image" in found.warnings[0]
    (tmp_path / "photos.csv").write_text("path,photo\nA/1.png,\n")
    assert "photograph of 0 of 4 images. Its paths" in read_folder(tmp_path).warnings[0]


def test_what_the_audit_wrote_is_read_again(demo, demo_root, tmp_path):
    root = Path(shutil.copytree(demo_root, tmp_path / "set"))
    (root / "photos.csv").unlink()
    found = pd.DataFrame({"photo": demo.table.photo, "path": demo.table.path})
    found["path"] = [str(root / Path(path).relative_to(demo_root)) for path in found.path]
    write_table(root / "photos.csv", relative_to(found, root))
    again = read_folder(root)
    assert again.table.photo.tolist() == demo.table.photo.tolist()
    assert again.warnings == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,photo\nA/1.png,x\nA/1.png,y\n", "holds a path twice"),
        ("path,photo\nA/1.png,x\nA\\1.png,y\n", "holds a path twice"),
        ("path,field\nA/1.png,x\n", "0 columns photo"),
        ("path,photo\nA/1.png\n", "rows of another length"),
    ],
)
def test_a_list_of_photographs_that_is_none(tmp_path, text, message):
    write_images(tmp_path / "A", "1.png")
    write_images(tmp_path / "B", "1.png")
    (tmp_path / "photos.csv").write_text(text)
    with pytest.raises(BloodcellError, match=message) as caught:
        read_folder(tmp_path)
    assert isinstance(caught.value, ValueError)
    assert "bloodcell audit" in caught.value.hint


def test_a_zip_gives_the_same_table_as_its_folder(demo, demo_root, tmp_path):
    archive = zip_folder(demo_root, tmp_path / "blood.zip")
    found = open_dataset(archive, home=tmp_path / "data")
    for column in ("label", "subset"):
        assert found.table[column].tolist() == demo.table[column].tolist()
    assert len(found.originals) == len(demo.originals)


def test_a_zip_is_unpacked_once(tmp_path):
    write_images(tmp_path / "set/A", "1.png", "2.png")
    write_images(tmp_path / "set/B", "1.png", "2.png")
    archive = zip_folder(tmp_path / "set", tmp_path / "set.zip")
    calls = []
    for _ in range(2):
        found = open_dataset(
            archive, tmp_path / "data", progress=lambda what, *_: calls.append(what)
        )
    assert len(found.table) == 4
    assert calls.count("Unpacking") == 4  # the four members of the first time


@pytest.mark.parametrize(
    ("folders", "subsets"),
    [
        (["A", "B"], {""}),
        (["train/A", "train/B", "valid/A", "valid/B"], {"train", "valid"}),
        (["train/A", "train/B", "test/A", "test/B"], {"train", "test"}),
        (["nested/once/A", "nested/once/B"], {""}),
        (["A/more", "B/.hidden", "B"], {""}),
    ],
)
def test_folder_trees(tmp_path, folders, subsets):
    for folder in folders:
        write_images(tmp_path / folder, "1.png", "2.jpg")
    found = read_folder(tmp_path)
    assert set(found.table.label) == {"A", "B"}
    assert set(found.table.subset) == subsets
    assert len(found.table) == 2 * len([f for f in folders if ".hidden" not in f])


# Words of ours, of pandas, of CSV, of Python and of spreadsheets, as names of folders.
WORDS = ("all", "(all)", "total", "none", "nan", "NA", "null", "True", "1", "007", "1e3")
WORDS += ("subset", "label", "photo", "path", "part", "p_all", "=1+1", "a|b", "a,b", 'a"b', " a ")


def test_classes_called_as_words_of_ours_or_of_a_library(tmp_path, capsys, monkeypatch):
    for word in WORDS:
        write_images(tmp_path / "set" / word, *(f"{n}.png" for n in range(1, 6)))
    dataset = read_folder(tmp_path / "set")
    assert set(dataset.table.label) == set(WORDS)
    counts = dataset.counts_with_totals
    assert set(counts.columns) - set(WORDS) == {"((all))"} == set(counts.index) - {""}
    assert counts.loc["", "((all))"] == 5 * len(WORDS)
    assert (dataset.counts.loc[""] == 5).all()
    for how in ("photo", "random"):
        split = split_table(dataset.table, how)
        run = Run(tmp_path / how)
        run.start(Config(data="set"), ResolvedConfig(data="set", classes=WORDS), split)
        assert run.config.classes == WORDS
        assert run.table.label.tolist() == split.label.tolist()
        assert run.table.photo.tolist() == split.photo.tolist()
    (tmp_path / "set" / "photos.csv").write_text(
        "path,photo\n"
        + "".join(f"{name}/{n}.png,{name}\n" for name in ("NA", "007") for n in (1, 2))
    )
    assert set(read_folder(tmp_path / "set").table.photo) == {"", "NA", "007"}
    monkeypatch.setattr(sys, "argv", ["bloodcell", "data", "--data", str(tmp_path / "set")])
    monkeypatch.setattr("bloodcell_fastai.evaluation.figures.contact_sheet", lambda table: None)
    monkeypatch.setattr("bloodcell_fastai.evaluation.figures.save_figure", lambda *args: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert "Images whose photograph is known: 4" in capsys.readouterr().out


def test_unreadable_images_are_listed_and_left_out(tmp_path):
    names = [f"{number}.jpg" for number in range(30)]
    write_images(tmp_path / "A", *names)
    write_images(tmp_path / "B", *names)
    truncated = tmp_path / "A" / "3.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    (tmp_path / "B" / "7.jpg").write_text("no image")
    found = read_folder(tmp_path)
    assert [path.name for path in found.unreadable] == ["3.jpg", "7.jpg"]
    assert "truncated" in found.unreadable[truncated]
    assert found.unreadable[tmp_path / "B" / "7.jpg"] == "cannot identify image file"
    assert len(found.table) == 58


def test_too_many_unreadable_images_are_an_error(tmp_path):
    write_images(tmp_path / "A", "1.jpg", "2.jpg")
    write_images(tmp_path / "B", "1.jpg")
    (tmp_path / "B" / "2.jpg").write_bytes(b"")
    with pytest.raises(BloodcellError, match=r"1 of 4 images cannot be read, such as .*2\.jpg \("):
        read_folder(tmp_path)


def test_whole_files_that_are_not_read_are_told_with_the_reason_and_not_to_be_copied(tmp_path):
    write_images(tmp_path / "A", "1.png", "2.png")
    for number in range(3):
        (tmp_path / "B").mkdir(exist_ok=True)
        Image.new("F", (9, 9)).save(tmp_path / "B" / f"{number}.tif")
    (tmp_path / "B" / "9.jpg").write_text("no image")
    with pytest.raises(BloodcellError, match=r"such as .*0\.tif \(32 bits of grey") as caught:
        read_folder(tmp_path)
    assert "9.jpg (cannot identify image file)" in caught.value.message
    assert "1.tif" not in caught.value.message  # one of each reason
    assert "convert or shrink" in caught.value.hint and "Download" not in caught.value.hint


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "No images"),
        (lambda root: write_images(root / "A", "1.png"), "Only one class"),
        (lambda root: shutil.rmtree(root), "No folder"),
    ],
)
def test_folders_without_data(tmp_path, prepare, message):
    root = tmp_path / "root"
    root.mkdir()
    prepare(root)
    with pytest.raises(BloodcellError, match=message):
        read_folder(root)


@pytest.mark.parametrize("source", ["nowhere", "nowhere.zip"])
def test_data_that_is_not_there(tmp_path, source):
    """As Python itself would say it, for who catches that."""
    with pytest.raises(FileNotFoundError, match="No file or folder") as caught:
        open_dataset(tmp_path / source)
    assert isinstance(caught.value, BloodcellError)
    assert "`data`" in caught.value.hint


def test_a_file_that_is_no_zip(tmp_path):
    (tmp_path / "notes.zip").write_text("hello")
    with pytest.raises(BloodcellError, match="neither a zip nor a tar"):
        open_dataset(tmp_path / "notes.zip", home=tmp_path / "data")


def test_data_in_its_home_is_found(tmp_path):
    write_images(tmp_path / "data/mine/A", "1.png")
    write_images(tmp_path / "data/mine/B", "1.png")
    found = open_dataset(home=tmp_path / "data", download=refuse_download)
    assert found.root == tmp_path / "data/mine"


def test_a_download_is_used(tmp_path):
    write_images(tmp_path / "kaggle/A", "1.png")
    write_images(tmp_path / "kaggle/B", "1.png")
    found = open_dataset(home=tmp_path / "data", download=lambda: tmp_path / "kaggle")
    assert found.root == tmp_path / "kaggle"


def test_without_data_or_network_the_demo_comes_with_a_warning(tmp_path, demo_root, monkeypatch):
    monkeypatch.setattr(datasets, "make_demo", lambda folder: shutil.copytree(demo_root, folder))
    found = open_dataset(home=tmp_path / "data", download=refuse_download)
    assert found.root == tmp_path / "data" / "demo"
    assert "DEMO DATA" in found.warnings[0]
    assert "There is no network (test)." in found.warnings[0]


def test_a_download_that_failed_is_not_replaced_by_the_demo(tmp_path):
    def broken() -> Path:
        raise BloodcellError("broken")

    with pytest.raises(BloodcellError, match="broken"):
        open_dataset(home=tmp_path / "data", download=broken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BloodcellError, match="No images in"):
        open_dataset(home=tmp_path / "data", download=lambda: tmp_path / "empty")
    assert not (tmp_path / "data" / "demo").exists()


def test_an_incomplete_kaggle_set_is_noticed(demo_root, tmp_path):
    copy = shutil.copytree(demo_root, tmp_path / "copy")
    (copy / "truth.csv").unlink()  # what tells the demo from the real set
    assert "Not the whole Kaggle set" in read_folder(copy).warnings[0]


def test_real_counts(real_data):
    expected = datasets.KAGGLE_COUNTS
    assert real_data.counts.to_dict("index") == expected
    assert real_data.warnings == ()
    assert len(real_data.originals) == 366
    assert real_data.unreadable == {}
