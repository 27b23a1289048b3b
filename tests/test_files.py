import errno
import os
import stat
import threading
from pathlib import Path

import pandas as pd
import pytest
from pydantic import BaseModel, ConfigDict, Field

import bloodcell_fastai
from bloodcell_fastai import BloodcellError
from bloodcell_fastai.files import (
    LOCK,
    atomic_folder,
    atomic_path,
    decode_text,
    parse_csv,
    read_json,
    read_model,
    read_table,
    sole_writer,
    spellings,
    user_home,
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


@pytest.mark.parametrize("name", ["touch", "replace"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch, name):
    """And not the temporary one beside it."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", self)

    monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(PermissionError) as caught:
        write_text(tmp_path / "file.txt", "new")
    assert caught.value.filename == str(tmp_path / "file.txt")
    assert not list(tmp_path.iterdir())


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
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, "mine.txt"}


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


@pytest.fixture
def umask():
    """The usual one, which gives a group no right to write."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(("folder", "lock"), [(0o775, 0o664), (0o777, 0o666), (0o700, 0o600)])
def test_who_may_write_to_a_folder_may_lock_it(tmp_path, umask, folder, lock):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(folder)
    with sole_writer(tmp_path / "shared"):
        pass
    assert stat.S_IMODE((tmp_path / "shared" / LOCK).stat().st_mode) == lock


def test_the_umask_holds_and_is_not_touched(tmp_path, umask, monkeypatch):
    """To read it is to change it, for all threads: another would make files anyone may write."""
    monkeypatch.setattr(os, "umask", None)
    write_text(tmp_path / "file.txt", "")
    with atomic_folder(tmp_path / "out"), sole_writer(tmp_path / "locked"):
        pass
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    for path in Path(bloodcell_fastai.__file__).parent.rglob("*.py"):
        assert "umask(" not in path.read_text(), path
    monkeypatch.undo()


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_of_other_programs(encoding):
    mark = "\ufeff" if encoding[-3:] in ("-le", "-be") else ""
    text = "path,photo\r\nA\\zellčß.png,1\r\n"
    content = (mark + text).encode(encoding)
    assert decode_text(content) == text
    assert parse_csv(content).values.tolist() == [["A\\zellčß.png", "1"]]


def test_a_name_in_any_encoding_is_not_taken_for_another():
    for content in (b"caf\xe9.png", b"\xff\xfea.png"):  # the second begins as UTF-16 does
        assert os.fsencode(decode_text(content)) == content


@pytest.mark.parametrize(
    ("listed", "last"),
    [
        ("A/1.png", "A/1.png"),
        ("  A/1 2.png\t", "A/1 2.png"),
        ('"A/1.png"', "A/1.png"),
        (" 'A\\1.png' ", "A/1.png"),
        ('"', '"'),
        ("  ", ""),
    ],
)
def test_the_spellings_of_a_path_in_a_list(listed, last):
    found = spellings(listed)
    assert found[0] == listed and found[-1] == last
    assert len(set(found)) == len(found)


def test_a_user_without_a_home_has_a_folder_among_the_temporary_files(monkeypatch, tmp_path):
    """As in a container that runs under a number of which its system knows nothing."""

    def unknown(number):
        raise KeyError(number)

    assert user_home() == Path.home()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert user_home() == tmp_path / f"bloodcell_fastai-{os.getuid()}"


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
