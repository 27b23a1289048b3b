import gzip
import io
import random
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from bloodcell_fastai import BloodcellError
from bloodcell_fastai.data import archives
from bloodcell_fastai.data.archives import archive_stem, content_key, holds_images, unpack
from bloodcell_fastai.data.datasets import open_dataset


def pack(path: Path, *members, **options) -> Path:
    """A zip of (name or ZipInfo, bytes)."""
    with zipfile.ZipFile(path, "w", **options) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return path


def zipped(*members) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as inner:
        for name, content in members:
            inner.writestr(name, content)
    return buffer.getvalue()


def tar(path: Path, *members, compression: str = "") -> Path:
    """A tar of (name or TarInfo, bytes)."""
    with tarfile.open(path, f"w:{compression}") as packed:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


def in_tar(name: str, kind: bytes, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def patched(path: Path, at: int, content: bytes) -> Path:
    """A tar with other bytes in its first header, whose checksum is right again."""
    whole = bytearray(path.read_bytes())
    whole[at : at + len(content)] = content
    checksum = sum(whole[:148]) + 8 * ord(" ") + sum(whole[156:512])
    whole[148:156] = f"{checksum:06o}\0 ".encode()
    path.write_bytes(whole)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    paths = folder.rglob("*")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths if p.is_file()}


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
def test_a_bomb(tmp_path, monkeypatch, method):
    monkeypatch.setattr(archives, "SMALL", 2**20)
    archive = pack(tmp_path / "x.zip", ("A/1.bmp", bytes(2**21)), compression=method)
    refused(archive, tmp_path, r"would unpack from .* to 2,097,152 bytes in 1 files")


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


def test_no_archive_is_run_or_made_executable(tmp_path):
    archive = pack(tmp_path / "x.zip", (special("A/run.sh", stat.S_IFREG | 0o4777), b"#!/bin/sh"))
    unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out" / "A" / "run.sh").stat().st_mode & 0o7111


def test_a_name_nearly_too_long_for_its_folder(tmp_path):
    archive = pack(tmp_path / f"{'x' * 250}.zip", ("A/1.jpg", b"x"))
    with pytest.raises(BloodcellError, match="Only one class"):
        open_dataset(archive, tmp_path / "home")


COMPRESSIONS = pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])


@COMPRESSIONS
def test_a_tar_whatever_its_suffix(tmp_path, compression):
    members = [
        (in_tar(".", tarfile.DIRTYPE), b""),
        ("./A/1.jpg", b"x"),
        ("./A/b/2.jpg", b"y" * 999),
    ]
    archive = tar(tmp_path / "x.dat", *members, compression=compression)
    shown = []
    unpack(archive, tmp_path / "out", progress=lambda *step: shown.append(step))
    assert contents(tmp_path / "out") == {"A/1.jpg": b"x", "A/b/2.jpg": b"y" * 999}
    assert shown == [("Unpacking", 1, 2), ("Unpacking", 2, 2)]
    assert holds_images(archive)
    assert content_key(archive) == content_key(archive.rename(tmp_path / "other"))
    other = tar(tmp_path / "y.dat", *members[:-1], ("./A/b/2.jpg", b"z"), compression=compression)
    assert content_key(other) != content_key(tmp_path / "other")


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "a/../../evil.jpg", "C:\\evil.jpg"])
def test_a_member_of_a_tar_outside_the_target(tmp_path, name):
    archive = tar(tmp_path / "x.tar", ("A/1.jpg", b"x"), (name, b"x"), compression="gz")
    refused(archive, tmp_path, "outside its")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (in_tar("A/x.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), "holds a link, 'A/x.jpg'"),
        (in_tar("A/x.jpg", tarfile.LNKTYPE, linkname="A/1.jpg"), "holds a link"),
        (in_tar("A/x.jpg", tarfile.CHRTYPE), "holds a device"),
        (in_tar("A/x.jpg", tarfile.BLKTYPE), "holds a device"),
        (in_tar("A/x.jpg", tarfile.FIFOTYPE), "holds a device"),
        ("A/1.jpg", "'A/1.jpg' twice"),
        ("A\\1.jpg", "twice"),
        ("A/1.jpg/2.jpg", "inside a file"),
        ("A/" + "x" * 256, "name of more than 255 bytes"),
    ],
)
def test_a_tar_that_is_hostile(tmp_path, member, message):
    refused(tar(tmp_path / "x.tar", ("A/1.jpg", b"x"), (member, b"")), tmp_path, message)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_bomb_in_a_tar(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(archives, "SMALL", 2**20)
    archive = tar(tmp_path / "x.tar", ("A/1.bmp", bytes(2**20)), compression=compression)
    refused(archive, tmp_path, "would unpack to more than 1,048,576 bytes")


def test_a_bomb_in_a_tar_is_stopped_while_it_is_read(tmp_path):
    """The header says 8 GB: what follows need not be read to refuse it."""
    header = tarfile.TarInfo("A/1.bmp")
    header.size = 8 * 10**9
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(gzip.compress(header.tobuf() + bytes(5000)))
    refused(archive, tmp_path, "would unpack to more than")


def test_a_header_of_a_tar_that_would_fill_the_memory(tmp_path):
    header = in_tar("x", tarfile.XHDTYPE, size=2**25)
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(gzip.compress(header.tobuf() + bytes(2**25)))
    refused(archive, tmp_path, "has a header of 33554432 bytes")


def test_a_hole_that_fills_the_disk(tmp_path):
    """Of a sparse file a tar holds only what is not zero."""
    info = tarfile.TarInfo("A/1.bmp")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(2**40),
    }
    archive = tar(tmp_path / "x.tar", (info, b"1\n0\n512\n".ljust(1024, b"\0")))
    refused(archive, tmp_path, "would unpack from .* to 1,099,511,627,776 bytes")


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_that_leads_in_a_circle(tmp_path, size, kind):
    archive = tar(tmp_path / "x.tar", ("A/1.jpg", b"x" * 600), ("A/2.jpg", b"y"))
    patched(archive, 124, size.to_bytes(12, signed=True))
    refused(patched(archive, 156, kind), tmp_path, "not a tar that can be unpacked")


def test_too_many_files_in_a_tar(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 2)
    unpack(tar(tmp_path / "x.tar", ("A/1.jpg", b""), ("A/2.jpg", b"")), tmp_path / "two")
    archive = tar(tmp_path / "x.tar", ("A/1.jpg", b""), ("A/2.jpg", b""), ("A/3.jpg", b""))
    refused(archive, tmp_path, "can be unpacked")


@pytest.mark.parametrize("keep", [100, 512, 1024, 1536, 2048, 2300])
def test_a_tar_cut_short(tmp_path, keep):
    """Where a member ends, too, which Python and GNU tar take for the end of the archive."""
    archive = tar(tmp_path / "x.tar", ("A/1.jpg", bytes(512)), ("A/2.jpg", bytes(512)))
    archive.write_bytes(archive.read_bytes()[:keep])
    refused(archive, tmp_path, "can be unpacked")


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_compressed_tar_cut_short_or_damaged(tmp_path, compression):
    noise = random.Random(0).randbytes(9000)
    archive = tar(tmp_path / "x.tar", ("A/1.jpg", noise), compression=compression)
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-12])
    refused(archive, tmp_path, "x.tar is not a tar that can be unpacked")
    (tmp_path / "deep").rmdir()
    archive.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])
    refused(archive, tmp_path, "x.tar is not a tar that can be unpacked")


def test_a_damaged_header_in_a_tar(tmp_path):
    """Python takes it for the end of the archive: what follows would be lost."""
    archive = tar(tmp_path / "x.tar", ("A/1.jpg", b"x"), ("A/2.jpg", b"y"))
    content = bytearray(archive.read_bytes())
    content[1024] ^= 1
    archive.write_bytes(content)
    refused(archive, tmp_path, "ends before its end mark")


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    archive = tar(tmp_path / "x.tar", ("A/1.jpg", b"x"), ("b.zip", zipped(("C/2.jpg", b"y"))))
    unpack(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == {"A/1.jpg": b"x", "b/C/2.jpg": b"y"}


@pytest.mark.parametrize("content", [b"", b"x" * 5000, gzip.compress(b"A,B\n" * 500)])
def test_a_file_that_is_no_archive(tmp_path, content):
    (path := tmp_path / "x.tar.gz").write_bytes(content)
    assert not holds_images(path)
    refused(path, tmp_path, "x.tar.gz is (neither|not a tar)")


def test_archives_inside_become_folders(tmp_path):
    """As Mendeley packs them: two levels deep, and a third stays."""
    third = zipped(("D/4.jpg", b"4"))
    second = zipped(("C/3.jpg", b"3"), ("third.zip", third))
    first = zipped(("B/2.jpg", b"2"), ("second.ZIP", second))
    packed = tar(tmp_path / "x", ("E/5.jpg", b"5"), compression="gz").read_bytes()
    archive = pack(
        tmp_path / "x.zip", ("A/1.jpg", b"1"), ("set/first.v2.zip", first), ("y.tar.gz", packed)
    )
    unpack(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == {
        "A/1.jpg": b"1",
        "set/first.v2/B/2.jpg": b"2",
        "set/first.v2/second/C/3.jpg": b"3",
        "set/first.v2/second/third.zip": third,
        "y/E/5.jpg": b"5",
    }


def test_an_archive_in_an_archive_that_has_nothing_else(tmp_path):
    archive = pack(tmp_path / "x.zip", ("b.zip", zipped(("c.zip", zipped(("A/1.jpg", b"1"))))))
    assert holds_images(archive)
    unpack(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == {"b/c/A/1.jpg": b"1"}


def test_what_has_no_images_stays_a_file(tmp_path):
    inside = {
        "labels.xlsx": zipped(("[Content_Types].xml", b""), ("xl/media/image1.png", b"x")),
        "paper.zip": zipped(("[Content_Types].xml", b""), ("word/media/image1.png", b"x")),
        "code.zip": zipped(("run.py", b"x"), ("../x", b"")),
        "code.tar.gz": tar(tmp_path / "x", ("run.py", b"x"), compression="gz").read_bytes(),
        "cells.npz": zipped(("train_images.npy", b"x")),
        "labels.csv.gz": gzip.compress(b"A,B"),
        "__MACOSX/._b.zip": b"not a zip, but what macOS knows about one",
        ".hidden.zip": b"x",
    }
    unpack(pack(tmp_path / "x.zip", *inside.items()), tmp_path / "out")
    assert contents(tmp_path / "out") == inside


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (zipped(("A/1.jpg", b"x"), ("../../evil.jpg", b"x")), "would write outside its folder"),
        (zipped((special("A/x.jpg", stat.S_IFLNK), b"/tmp"), ("1.jpg", b"")), "holds a link"),
        (zipped(("A/1.jpg", b"x"))[:-9], "is not a zip that can be unpacked"),
        (b"", "is neither a zip nor a tar"),
    ],
)
def test_a_bad_archive_inside(tmp_path, inner, message):
    archive = pack(tmp_path / "x.zip", ("A/1.jpg", b"x"), ("b/inner.zip", inner))
    refused(archive, tmp_path, f"x.zip/b/inner.zip {message}")


def test_a_bomb_of_archives_inside(tmp_path, monkeypatch):
    """Each may unpack to so much, all of them together may not."""
    monkeypatch.setattr(archives, "SMALL", 2**20)
    inner = zipped(("A/1.bmp", bytes(2**19)))
    unpack(pack(tmp_path / "x.zip", ("1.zip", inner)), tmp_path / "one")
    archive = pack(tmp_path / "x.zip", ("1.zip", inner), ("2.zip", inner))
    refused(archive, tmp_path, r"x.zip/2.zip would unpack from .* in 4 files")


def test_no_room_for_an_archive_inside(tmp_path, monkeypatch):
    archive = pack(tmp_path / "x.zip", ("1.zip", zipped(("A/1.bmp", bytes(10**6)))))
    usage = archives.shutil.disk_usage(tmp_path)
    free = archives.SPARE_DISK + 10**5
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage._replace(free=free))
    refused(archive, tmp_path, "No room to unpack .*x.zip/1.zip")


@pytest.mark.parametrize("other", ["b/1.jpg", "b.tar"])
def test_an_archive_inside_beside_what_has_its_name(tmp_path, other):
    content = tar(tmp_path / "y", ("A/1.jpg", b"x")).read_bytes()
    archive = pack(tmp_path / "x.zip", ("b.zip", zipped(("A/1.jpg", b"x"))), (other, content))
    refused(archive, tmp_path, "and, beside it, 'b'")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["A/1.jpg"], True),
        (["A/1.TIFF"], True),
        (["a.txt", "b/c/x.zip"], True),
        (["a.txt", "b/cells.tar.gz"], True),
        (["labels.csv", "notes.txt", "1.jpg/"], False),
        (["__MACOSX/A/._1.jpg", "A/.1.jpg", "__MACOSX/x.zip"], False),
        (["train_images.npy", "train_labels.npy"], False),
        (["[Content_Types].xml", "xl/workbook.xml", "xl/media/image1.png"], False),
        (["mimetype", "Pictures/1.png"], False),
        (["Index/Document.iwa", "preview.jpg"], False),
        (["META-INF/MANIFEST.MF", "icon.png"], False),
        (["a/icon.png", "a-1.0.dist-info/WHEEL"], False),
        (["A/1.jpg", "venv/lib/a-1.0.dist-info/WHEEL", "paper/mimetype"], True),
        ([], False),
    ],
)
def test_which_zips_hold_images(tmp_path, members, expected):
    assert holds_images(pack(tmp_path / "x", *((name, b"") for name in members))) is expected


def test_holds_images_of_a_tar_reads_to_the_first(tmp_path):
    archive = tar(tmp_path / "x.tgz", ("1.jpg", b"x"), ("2.jpg", bytes(9**6)), compression="gz")
    archive.write_bytes(archive.read_bytes()[:200])
    assert holds_images(archive)
    archive = tar(tmp_path / "x.tgz", ("1.txt", b"x"), ("2.csv", bytes(9**6)), compression="gz")
    assert not holds_images(archive)


def test_holds_images_of_what_cannot_be_opened(tmp_path):
    assert not holds_images(tmp_path)
    assert not holds_images(tmp_path / "nowhere.zip")
    cut = pack(tmp_path / "x.zip", ("A/1.jpg", b"x"))
    cut.write_bytes(cut.read_bytes()[:-9])
    assert not holds_images(cut)


def test_the_key_of_a_zip_tells_that_archives_inside_are_unpacked(tmp_path):
    """Folders of a version that left them packed are not taken for what is unpacked now."""
    keys = []
    for name in ("b.zip", "b.zap"):
        archive = pack(tmp_path / "x.zip", (name, b"x"))
        listing = f"{name}{zlib.crc32(b'x')}".encode()
        keys.append(content_key(archive) == f"{zlib.crc32(listing):08x}")
    assert keys == [False, True]


def without_mark(path: Path, pairs: list[tuple[str, str]]) -> Path:
    """A zip with names in a code page, as programs on Windows write them: (name, code page)."""
    archive = pack(path, *((f"{n:04}/{n}.jpg", b"%d" % n) for n in range(len(pairs))))
    content = archive.read_bytes()
    for n, (name, page) in enumerate(pairs):
        raw, size = name.encode(page), len(f"{n:04}")
        assert len(raw) == size, "the twin replaces bytes"
        content = content.replace(f"{n:04}/{n}.jpg".encode(), raw + f"/{n}.jpg".encode())
    archive.write_bytes(content)
    return archive


def test_names_in_a_chinese_zip(tmp_path):
    archive = without_mark(tmp_path / "x.zip", [("淋巴", "gbk"), ("单核", "gbk"), ("细胞", "gbk")])
    unpack(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == {
        "淋巴/0.jpg": b"0",
        "单核/1.jpg": b"1",
        "细胞/2.jpg": b"2",
    }
    assert len(content_key(archive)) == 8


def test_a_backslash_that_is_half_of_a_character(tmp_path):
    """Of katakana SO the second byte is one, and no separator."""
    archive = without_mark(tmp_path / "x.zip", [("ソテ", "cp932"), ("細胞", "cp932")])
    unpack(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == {"ソテ/0.jpg": b"0", "細胞/1.jpg": b"1"}


def test_the_name_that_info_zip_adds(tmp_path):
    """The extra field of Unicode paths holds, if it is of the name that is there."""
    good, stale = zipfile.ZipInfo("A/1.jpg"), zipfile.ZipInfo("A/2.jpg")
    for info, of in ((good, b"A/1.jpg"), (stale, b"A/9.jpg")):
        path = "Ж/" + info.filename[2:]
        field = struct.pack("<BL", 1, zlib.crc32(of)) + path.encode()
        info.extra = struct.pack("<HHHHH", 0x5455, 0, 0x7075, len(field), 0)[:8] + field
    unpack(pack(tmp_path / "x.zip", (good, b"1"), (stale, b"2")), tmp_path / "out")
    assert contents(tmp_path / "out") == {"Ж/1.jpg": b"1", "A/2.jpg": b"2"}


@pytest.mark.parametrize(("page", "name"), [("utf-8", "Größe-細胞"), ("cp1251", "Лимфоцит")])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_in_a_tar(tmp_path, page, name, format):
    with tarfile.open(tmp_path / "x.tar", "w", format=format, encoding=page) as packed:
        packed.addfile(tarfile.TarInfo(f"{name}/1.jpg"))
    unpack(tmp_path / "x.tar", tmp_path / "out")
    assert contents(tmp_path / "out") == {f"{name}/1.jpg": b""}


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.zip", "a"), ("a.b.TAR.GZ", "a.b"), ("a.tgz", "a"), ("a.v2", "a"), ("a", "a")],
)
def test_the_stem_of_an_archive(name, stem):
    assert archive_stem(name) == stem


def test_a_folder_of_a_windows_program(tmp_path):
    archive = pack(tmp_path / "x.zip", ("A\\", b""), ("A\\1.jpg", b"x"))
    unpack(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == {"A/1.jpg": b"x"}
