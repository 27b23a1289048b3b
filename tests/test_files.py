import pytest

from bloodcell_fastai.files import atomic_folder, atomic_path, write_json


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
