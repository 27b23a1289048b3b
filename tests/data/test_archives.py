import stat
import struct
import zipfile
import zlib
from pathlib import Path

import pytest

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.data import archives
from bloodcell_fastai.data.archives import content_key, unpack
from bloodcell_fastai.data.datasets import open_dataset


def pack(path: Path, *members, **options) -> Path:
    """A zip of (name or ZipInfo, bytes)."""
    with zipfile.ZipFile(path, "w", **options) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return path


def special(name: str, mode: int) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, mode << 16
    return member


def refused(archive: Path, tmp_path: Path, match: str) -> None:
    """Refused as a whole, with nothing written anywhere."""
    target = tmp_path / "deep" / "out"
    target.parent.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BloodcellError, match=match) as caught:
        unpack(archive, target)
    assert caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        *("../evil.jpg", "/evil.jpg", "a/../../evil.jpg", "C:/evil.jpg", "C:\\evil.jpg"),
        *("..\\evil.jpg", "a\\..\\..\\evil.jpg", "\\\\server\\share\\evil.jpg", ".", "/"),
    ],
)
def test_a_member_outside_the_target(tmp_path, name):
    refused(pack(tmp_path / "x.zip", ("A/1.jpg", b"x"), (name, b"x")), tmp_path, "outside its")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (stat.S_IFLNK, "holds a link, 'A/x.jpg'"),
        (stat.S_IFBLK, "holds a device"),
        (stat.S_IFCHR, "holds a device"),
        (stat.S_IFIFO, "holds a device"),
        (stat.S_IFSOCK, "holds a device"),
    ],
)
def test_links_and_devices(tmp_path, kind, message):
    archive = pack(
        tmp_path / "x.zip", ("A/1.jpg", b"x"), (special("A/x.jpg", kind | 0o777), b"/etc/passwd")
    )
    refused(archive, tmp_path, message)


def test_a_link_to_a_folder_that_a_member_goes_through(tmp_path):
    archive = pack(
        tmp_path / "x.zip", (special("A", stat.S_IFLNK | 0o777), b"/tmp"), ("A/evil.jpg", b"x")
    )
    refused(archive, tmp_path, "holds a link")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["A/1.jpg", "A\\1.jpg", "A//1.jpg", "./A/1.jpg"])
def test_two_members_of_one_name(tmp_path, second):
    archive = pack(tmp_path / "x.zip", ("A/1.jpg", b"x"), (second, b"y"))
    refused(archive, tmp_path, "twice")


def test_a_member_inside_another(tmp_path):
    refused(pack(tmp_path / "x.zip", ("A", b"x"), ("A/1.jpg", b"y")), tmp_path, "inside a file")


def test_an_encrypted_member(tmp_path):
    archive = pack(tmp_path / "x.zip", ("A/1.jpg", b"x"), ("A/2.jpg", b"y"))
    content = bytearray(archive.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 8] |= 1  # the flags of the second member in the table of contents
    archive.write_bytes(content)
    refused(archive, tmp_path, "is encrypted")


def test_a_name_too_long_for_a_disk(tmp_path):
    archive = pack(tmp_path / "x.zip", (f"A/{'ü' * 130}.jpg", b"x"))
    refused(archive, tmp_path, "name of more than 255 bytes")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb(tmp_path, method):
    archive = pack(tmp_path / "x.zip", ("A/1.bmp", bytes(2**27)), compression=method)
    refused(archive, tmp_path, r"would unpack from .* to 134,217,728 bytes in 1 files")


def test_a_bomb_of_members_that_share_their_bytes(tmp_path):
    """All of them point to the same data, so that none alone is suspicious (Fifield 2019)."""
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("A/0.bmp", bytes(2**20) + b"x" * 2**20)
        first = zipped.infolist()[0]
        for number in range(1, 400):
            copy = zipfile.ZipInfo(f"A/{number}.bmp")
            for field in ("CRC", "compress_size", "file_size", "compress_type", "header_offset"):
                setattr(copy, field, getattr(first, field))
            zipped.filelist.append(copy)
    refused(archive, tmp_path, "would unpack from|can be unpacked")


@pytest.mark.parametrize("says", [10, 2**31])
def test_a_table_of_contents_that_lies(tmp_path, says):
    archive = pack(tmp_path / "x.zip", ("A/1.bmp", bytes(2**20)), compression=zipfile.ZIP_DEFLATED)
    content = bytearray(archive.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", says)
    archive.write_bytes(content)
    refused(archive, tmp_path, "can be unpacked|would unpack")


def test_no_more_is_written_than_the_table_of_contents_says(tmp_path):
    archive = pack(tmp_path / "x.zip", ("A/1.bmp", bytes(2**20)), compression=zipfile.ZIP_DEFLATED)
    content = bytearray(archive.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 16 : at + 20] = struct.pack("<I", zlib.crc32(bytes(10)))
    content[at + 24 : at + 28] = struct.pack("<I", 10)
    archive.write_bytes(content)
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out/A/1.bmp").read_bytes() == bytes(10)


def test_no_room(tmp_path, monkeypatch):
    archive = pack(tmp_path / "x.zip", ("A/1.jpg", b"x"))
    usage = archives.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(archive, tmp_path, "No room to unpack")


def test_an_interrupted_unpack_leaves_nothing(tmp_path):
    archive = pack(tmp_path / "x.zip", ("A/1.jpg", b"x"), ("A/2.jpg", b"y"))

    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]
    unpack(archive, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 2


def test_a_damaged_member(tmp_path):
    """Found only while it is unpacked; nothing of the others stays."""
    archive = pack(tmp_path / "x.zip", ("A/1.jpg", b"x" * 100), ("A/2.jpg", b"y" * 500))
    content = bytearray(archive.read_bytes())
    content[content.index(b"yyyy") + 9] = 0
    archive.write_bytes(content)
    refused(archive, tmp_path, "can be unpacked")


@pytest.mark.parametrize("keep", [0, 30, 100, -10])
def test_a_zip_cut_short(tmp_path, keep):
    archive = pack(tmp_path / "x.zip", ("A/1.jpg", bytes(1000)), ("B/1.jpg", bytes(1000)))
    archive.write_bytes(archive.read_bytes()[:keep])
    refused(archive, tmp_path, "can be unpacked")
    with pytest.raises(BloodcellError, match="can be unpacked"):
        content_key(archive)


def test_names_of_windows_programs(tmp_path):
    archive = pack(tmp_path / "x.zip", ("A\\1.jpg", b"x"), ("A\\deep\\2.jpg", b"y"))
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "A" / "deep" / "2.jpg").read_bytes() == b"y"


def test_a_zip_inside_stays_packed(tmp_path):
    inner = pack(tmp_path / "inner.zip", ("A/1.jpg", b"x"))
    archive = pack(tmp_path / "x.zip", ("A/inner.zip", inner.read_bytes()))
    unpack(archive, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["inner.zip"]


def test_no_archive_is_run_or_made_executable(tmp_path):
    archive = pack(tmp_path / "x.zip", (special("A/run.sh", stat.S_IFREG | 0o4777), b"#!/bin/sh"))
    unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out" / "A" / "run.sh").stat().st_mode & 0o7111


def test_a_name_nearly_too_long_for_its_folder(tmp_path):
    archive = pack(tmp_path / f"{'x' * 250}.zip", ("A/1.jpg", b"x"))
    with pytest.raises(BloodcellError, match="Only one class"):
        open_dataset(archive, tmp_path / "home")
