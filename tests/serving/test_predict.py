import io
import json
import shutil

import pandas as pd
import pytest

from bloodcell_fastai import BloodcellError, Predictor
from bloodcell_fastai.serving import predict as predict_module
from bloodcell_fastai.serving.predict import PredictionFile, find_images, predict


@pytest.fixture(scope="module")
def predictor(trained):
    return Predictor.load(trained, device="cpu")


@pytest.fixture(scope="module")
def paths(trained):
    table = trained.table
    return table.path[table.part == "valid"].tolist()


@pytest.fixture
def folder(paths, tmp_path):
    """Two images, one in a folder below, a file that is none, and a list of both."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(paths[0], tmp_path / "in" / "deep" / "a b.jpg")
    shutil.copy(paths[1], tmp_path / "in" / "b.jpg")
    (tmp_path / "in" / "c.jpg").write_text("no image")
    both = [str(tmp_path / "in" / "b.jpg"), str(tmp_path / "in" / "deep" / "a b.jpg")]
    (tmp_path / "list.txt").write_text("\n".join([*both, ""]))
    return tmp_path / "in", both


def test_sources(folder):
    root, both = folder
    assert list(find_images([*both])) == both
    assert [path for path in find_images([root]) if path in both] == both
    assert list(find_images([root.parent / "list.txt"])) == both
    assert list(find_images(["-"], [f"{path}\n" for path in both])) == both
    assert list(find_images([f"{root}/*/*.jpg"])) == both[1:]
    assert list(find_images([f"{root}/**/a*.jpg"])) == both[1:]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_made_elsewhere(folder, monkeypatch, encoding):
    """On Windows or by hand, with paths relative to the list or as they are seen from above it."""
    root, both = folder
    lines = ["b.jpg", '"deep\\a b.jpg"', " in/b.jpg\t", "in\\deep\\a b.jpg", "", "  ", "gone.jpg "]
    content = "\r\n".join(lines).encode(encoding)
    (root / "list.txt").write_bytes(content)
    assert list(find_images([root / "list.txt"])) == [*both, both[0], both[1], "gone.jpg"]
    monkeypatch.chdir(root)  # from where the paths of standard input are seen
    stream = io.BytesIO(content)
    seen = ["b.jpg", "deep/a b.jpg", "in/b.jpg", "in/deep/a b.jpg", "gone.jpg"]
    assert list(find_images(["-"], stream)) == seen


def test_paths_in_a_list_are_relative_to_the_working_folder_first(folder, monkeypatch):
    root, _ = folder
    (root / "list.txt").write_text("./b.jpg\n")
    monkeypatch.chdir(root)
    assert list(find_images(["list.txt"])) == ["./b.jpg"]
    shutil.copy(root / "b.jpg", root / "deep")
    monkeypatch.chdir(root / "deep")
    assert list(find_images([root / "list.txt"])) == ["./b.jpg"]


@pytest.mark.parametrize("source", ["none.jpg", "none/*.jpg"])
def test_a_source_that_is_not_there(tmp_path, source):
    with pytest.raises(FileNotFoundError, match="No file or folder"):
        list(find_images([tmp_path / source]))


def test_a_folder_is_predicted_and_unreadable_files_are_listed_with_the_reason(predictor, folder):
    root, both = folder
    outcome = predict(predictor, find_images([root, *both]))
    pd.testing.assert_frame_equal(outcome.table, predictor(both))
    assert list(outcome.unreadable) == [str(root / "c.jpg")]
    assert "cannot identify image" in outcome.unreadable[str(root / "c.jpg")]
    assert outcome.n_images == sum(outcome.classes.values()) == 2


def test_nothing_to_predict(predictor, tmp_path):
    with pytest.raises(BloodcellError, match="no readable image"):
        predict(predictor, find_images([tmp_path]))


def read(path):
    if path.suffix == ".csv":
        return pd.read_csv(path, keep_default_na=False)
    return pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_a_file_grows_with_every_batch(trained, paths, tmp_path, name):
    predictor = Predictor.load(trained)
    predictor.batch_size = 4
    lengths = []
    predict(
        predictor,
        paths[:10],
        tmp_path / name,
        progress=lambda *_: lengths.append(len(read(tmp_path / name))),
    )
    assert lengths == [4, 8, 10]
    written = read(tmp_path / name)
    pd.testing.assert_frame_equal(written, predictor(paths[:10]), check_dtype=False, atol=1e-6)


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_a_file_cut_short_is_continued(predictor, paths, tmp_path, name):
    out = tmp_path / name
    predict(predictor, paths[:6], out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-30])  # killed in the middle of a row
    outcome = predict(predictor, paths[:10], out, resume=True)
    assert outcome.already_done == 5
    assert outcome.n_images == 5
    assert read(out).path.tolist() == paths[:10]
    rows = whole.splitlines()
    assert out.read_bytes().splitlines()[: len(rows) - 1] == rows[:-1]  # digit by digit
    assert predict(predictor, paths[:10], out, resume=True).already_done == 10


def test_without_resume_a_file_is_replaced(predictor, paths, tmp_path):
    predict(predictor, paths[:3], tmp_path / "out.csv")
    predict(predictor, paths[3:5], tmp_path / "out.csv")
    assert read(tmp_path / "out.csv").path.tolist() == paths[3:5]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.csv", "path,other\na,b\n"),
        ("out.csv", "path,predicted\na\n"),
        ("out.csv", "path,predicted,confidence\na,B,1\n"),
        ("out.jsonl", '{"path": "a", "other": "b"}\n'),
        ("out.jsonl", '["path", "predicted"]\n'),
        ("out.jsonl", "path,predicted\n"),
    ],
)
def test_a_file_of_another_kind_is_not_continued_and_stays_as_it_is(tmp_path, name, content):
    (tmp_path / name).write_text(content + "x")
    with pytest.raises(BloodcellError, match="another kind"):
        PredictionFile(tmp_path / name, ["path", "predicted"], resume=True)
    assert (tmp_path / name).read_text() == content + "x"


def test_a_file_has_a_suffix_that_says_its_format(tmp_path):
    with pytest.raises(BloodcellError, match="Cannot write"):
        PredictionFile(tmp_path / "out.xlsx", ["path"])


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_any_name_of_a_file_is_written_and_read(tmp_path, name):
    columns, names = ["path", "flag"], ["caf\udce9.jpg", 'a "b", c.jpg', "new\nline.jpg", "r\r.jpg"]
    file = PredictionFile(tmp_path / name, columns)
    file.append(pd.DataFrame({"path": names, "flag": ""}))
    assert PredictionFile(tmp_path / name, columns, resume=True).done == set(names)
    whole = (tmp_path / name).read_bytes()
    for length in range(0, len(whole), 3):  # killed anywhere
        (tmp_path / name).write_bytes(whole[:length])
        kept = PredictionFile(tmp_path / name, columns, resume=True)
        assert kept.done == set(names[: len(kept.done)])
        kept.append(pd.DataFrame({"path": names[len(kept.done) :], "flag": ""}))
        assert PredictionFile(tmp_path / name, columns, resume=True).done == set(names)


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_shards_are_joined_once_each(tmp_path, name):
    columns = ["path", "p_A"]
    shards = [tmp_path / f"shard-{number}{name}" for number in (1, 2)]
    for shard, part in zip(shards, ("abc", "cde"), strict=True):
        PredictionFile(shard, columns).append(pd.DataFrame({"path": list(part), "p_A": 0.1}))
    file = PredictionFile(tmp_path / name, columns)
    file.append(pd.DataFrame({"path": ["a"], "p_A": [0.1]}))
    file = PredictionFile(tmp_path / name, columns, resume=True)
    file.join(shards)
    assert read(tmp_path / name).path.tolist() == list("abcde")
    assert read(tmp_path / name).p_A.tolist() == [0.1] * 5
    assert not any(shard.exists() for shard in shards)


def test_one_process_goes_on_with_what_several_left(predictor, paths, tmp_path):
    out, shard = tmp_path / "out.csv", tmp_path / "out.part-0001-of-0002.csv"
    predict(predictor, paths[:4], shard)
    outcome = predict(predictor, paths[:6], out, resume=True)
    assert (outcome.already_done, outcome.n_images) == (4, 2)
    assert read(out).path.tolist() == paths[:6]
    predict(predictor, paths[:1], shard)
    predict(predictor, paths[1:2], out)  # anew: what was left is of no use
    assert read(out).path.tolist() == paths[1:2]
    assert not shard.exists()


def test_several_processes_need_a_file_and_share_no_standard_input(monkeypatch):
    monkeypatch.setattr(predict_module, "world_size", lambda: 2)
    with pytest.raises(BloodcellError, match="Standard input cannot be read by several"):
        list(find_images(["-"], ["a.jpg"]))
    with pytest.raises(BloodcellError, match="Several processes need a file to write"):
        predict(None, ["cell.png"])
