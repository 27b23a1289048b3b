import threading

import pandas as pd
import pytest
from pydantic import BaseModel, ConfigDict, Field

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.files import (
    atomic_folder,
    atomic_path,
    read_json,
    read_model,
    read_table,
    sole_writer,
    write_json,
    write_table,
    write_text,
)


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 2\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "file.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_folder_is_never_overwritten(tmp_path):
    with pytest.raises(FileExistsError), atomic_folder(tmp_path):
        pass


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """A process that is killed runs no ``finally``: the writer is left where it was."""
    (tmp_path / "mine.txt").write_text("mine")
    writer, maker = atomic_path(tmp_path / "file.txt"), atomic_folder(tmp_path / "out")
    writer.__enter__().write_text("half")
    (maker.__enter__() / "file").write_text("half")
    assert len(list(tmp_path.iterdir())) == 3
    with sole_writer(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "mine.txt"}


def test_one_writer_at_a_time(tmp_path):
    with sole_writer(tmp_path):
        failed = []

        def wait():
            try:
                with sole_writer(tmp_path, timeout=0):
                    pass
            except TimeoutError as error:
                failed.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        assert len(failed) == 1
    with sole_writer(tmp_path, timeout=0):
        pass


NAMES = ["plain", "a,b", 'quo"te', "line\nbreak", "carriage\rreturn", "caf\udce9", "NA", "007", ""]


def test_any_text_comes_back_from_a_table(tmp_path):
    table = pd.DataFrame({"path": NAMES, "size": range(len(NAMES))})
    write_table(tmp_path / "t.csv", table)
    found = read_table(tmp_path / "t.csv", ["path"], ["size"])
    assert found.path.tolist() == NAMES
    assert found["size"].tolist() == list(range(len(NAMES)))


def test_a_table_of_another_program(tmp_path):
    """Spreadsheets begin a file with a mark, and end lines otherwise."""
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfpath,photo\r\n\r\na,1\r\n")
    assert read_table(tmp_path / "t.csv", ["path", "photo"]).values.tolist() == [["a", "1"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path\na\n", "0 columns size"),
        (b"path,size,size\na,1,2\n", "2 columns size"),
        (b"path,size\na\n", "rows of another length"),
        (b"path,size\na,1,2\n", "rows of another length"),
        (b"path,size\na,big\n", "a value of size is no number"),
        (b"path,size\na,0x1\0\n", "zero bytes"),
        (b'path,size\n"a,1\n', "not a CSV table"),
        (b"", "not a CSV table"),
    ],
)
def test_a_table_that_is_none(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(tmp_path / "t.csv", ["path"], ["size"], "Make it anew.")
    assert isinstance(caught.value, BloodcellError)
    assert caught.value.hint == "Make it anew."


@pytest.mark.parametrize("read", [read_json, lambda path: read_table(path, ["path"])])
def test_a_file_that_is_not_there(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="is missing") as caught:
        read(tmp_path / "none")
    assert isinstance(caught.value, BloodcellError)


@pytest.mark.parametrize("text", ["", "{", "[1]", "1", "[" * 100_000, "\udcff"])
def test_json_that_is_none(tmp_path, text):
    write_text(tmp_path / "file.json", text)
    with pytest.raises(
        ValueError, match=r"file\.json (is not JSON|holds no JSON object)"
    ) as caught:
        read_json(tmp_path / "file.json")
    assert isinstance(caught.value, BloodcellError)


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(ge=1)


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    parts: list[Part] = []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name: field required"),
        ({"name": 1}, "name is 1: "),
        ({"name": "x", "more": 1}, "more: extra inputs are not permitted"),
        ({"name": "x", "parts": [{"size": 1}, {"size": 0}]}, r"parts\.1\.size is 0: "),
        ({"name": "x" * 999, "parts": "y" * 999}, "parts is 'yyy"),
    ],
)
def test_values_that_a_model_refuses(tmp_path, values, message):
    """The first that is wrong is named, briefly."""
    write_json(tmp_path / "file.json", values)
    with pytest.raises(ValueError, match=rf"file\.json: {message}") as caught:
        read_model(tmp_path / "file.json", Whole)
    assert isinstance(caught.value, BloodcellError)
    assert len(caught.value.message) < 300
    write_json(tmp_path / "file.json", {"name": "x", "parts": [{"size": 2}]})
    assert read_model(tmp_path / "file.json", Whole).parts[0].size == 2
