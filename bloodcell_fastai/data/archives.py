"""Safe extraction of untrusted archives: nothing appears unless all of one is right."""

import bz2
import errno
import gzip
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import BloodcellError, DataError
from ..files import atomic_folder
from ..reporter import Progress, no_progress
from .code_pages import decode_names
from .images import IMAGE_SUFFIXES, is_hidden

# Photographs compress little. A zip of text or of empty images seldom exceeds 100 to 1; deflate
# cannot exceed 1,032 to 1, but members that overlap can exceed any limit, and bzip2 nearly.
MAX_RATIO = 200
SMALL = 2**26  # bytes that anything may unpack to
MAX_BYTES = 2**38
MAX_MEMBERS = 5_000_000
MAX_LEVELS = 2  # of archives inside an archive
SPARE_DISK = 2**30  # bytes to leave free
LONGEST_NAME = 255  # bytes, of file systems in use
MAX_READ = 2**16  # bytes of a tar that are read at once: a header is kept in memory and searched

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
"""How the names end of the archives that are unpacked inside others."""

_COMPRESSED: dict[bytes, Callable[[Path, str], Any]] = {  # by the bytes such a file begins with
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
# What is in zips that are documents of Office, OpenDocument or Apple, or programs of Java, Android
# or Python. Their images are no data.
_IN_DOCUMENTS = re.compile(
    r"\[Content_Types\]\.xml|mimetype|Index/.*\.iwa|META-INF/MANIFEST\.MF|[^/]*\.dist-info/WHEEL"
)

# What zipfile and tarfile raise on bytes that are not an archive, besides their own errors; OSError
# is raised by gzip and bz2.
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError),
    *(OSError, NotImplementedError, RuntimeError, ValueError, OverflowError, LookupError),
)


@dataclass(frozen=True)
class _Member:
    """What an archive says of something in it.

    Attributes:
        name: its path.
        kind: ``a file``, ``a folder``, ``a link`` or ``a device``.
        size: bytes when unpacked.
        open: what opens it for reading.
        encrypted: whether that takes a password.
    """

    name: str
    kind: str
    size: int
    open: Callable[[], IO[bytes]]
    encrypted: bool = False


def unpack(archive: Path, target: Path, progress: Progress = no_progress) -> Path:
    """Unpack a zip or a tar into ``target``, which appears only when complete. Returns ``target``.

    A tar may be compressed by gzip, bzip2 or xz; what a file is, its content says. An archive
    inside that holds images (:data:`SUFFIXES`) is replaced by a folder of its name, two levels
    deep; others stay files. Names are decoded by :func:`.code_pages.decode_names`. Modes, owners
    and times are not taken over.

    Raises:
        BloodcellError: not an archive, damaged or encrypted; a member is a link or a device, would
            be written outside the target or over another member; or all would unpack to too much.
    """
    with atomic_folder(target) as folder:
        _unpack_to(folder, archive, archive, Allowance(archive), progress, MAX_LEVELS)
    return target


def content_key(archive: Path) -> str:
    """Eight hex digits that name what an archive contains: of a zip from its table of contents
    alone, of a tar from all bytes of the file.

    Raises:
        BloodcellError: neither a zip nor a tar, or a damaged zip.
    """
    with _opened(archive, archive, Allowance(archive).left) as opened:
        if isinstance(opened, zipfile.ZipFile):
            return f"{zlib.crc32(_listing(opened)):08x}"
    checksum = 0
    with archive.open("rb") as file:
        while content := file.read(2**20):
            checksum = zlib.crc32(content, checksum)
    return f"{checksum:08x}"


def holds_images(path: Path) -> bool:
    """Whether a file is an archive that :func:`unpack` reads and that has images, or archives
    inside that may have some.

    Only the names of the members are read; a compressed tar is decompressed as far as the first
    image. False for what is damaged, and for documents and programs that are zips with pictures.
    """
    try:
        if not path.is_file():
            return False
        with _opened(path, path, Allowance(path).left) as opened:
            return _may_hold_images(opened)
    except (BloodcellError, OSError):
        return False


def archive_stem(name: str) -> str:
    """The name of an archive without its suffix, as ``cells`` of ``cells.tar.gz``."""
    longest = max(filter(name.lower().endswith, SUFFIXES), key=len, default=Path(name).suffix)
    return name[: len(name) - len(longest)]


@contextmanager
def explained(archive: Path, kind: str) -> Iterator[None]:
    """Turn what libraries raise on a damaged archive into one error.

    Raises:
        BloodcellError: the block failed, and not because of the disk.
    """
    try:
        yield
    except BloodcellError:  # some are ValueErrors too
        raise
    except _DAMAGE as error:
        # Of the disk and not of the archive; EINVAL is what a place before its beginning gives.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(
            f"{archive} is not a {kind} that can be unpacked: {error}.", "Download it again."
        ) from None


class Allowance:
    """How much an archive may unpack to, with all archives inside it.

    Attributes:
        left: bytes that it still may.
    """

    def __init__(self, archive: Path):
        self._packed = archive.stat().st_size
        self._members = self._total = 0
        self.left = min(max(MAX_RATIO * self._packed, SMALL), MAX_BYTES)

    def take(self, members: int, total: int, archive: Path, target: Path) -> None:
        """Count what an archive says it unpacks to, before it is unpacked.

        Raises:
            BloodcellError: that is too much, as of a decompression bomb, or more than the disk of
                ``target`` has room for.
        """
        self._members, self._total = self._members + members, self._total + total
        if self._members > MAX_MEMBERS or total > self.left:
            to = f"{self._total:,} bytes in {self._members:,} files"
            raise _unsafe(archive, f"would unpack from {self._packed:,} to {to}")
        self.left -= total
        existing = next(folder for folder in target.absolute().parents if folder.is_dir())
        if (free := shutil.disk_usage(existing).free) < total + SPARE_DISK:
            raise BloodcellError(
                f"No room to unpack {archive}: it needs {total:,} bytes and {free:,} are free.",
                "Make room, or unpack it elsewhere and give the folder as `data`.",
            )


@contextmanager
def _opened(file: Path, shown: Path, limit: int) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    """The archive of a file, which errors call ``shown``; a tar of at most ``limit`` bytes."""
    with file.open("rb") as opened:
        head = opened.read(tarfile.BLOCKSIZE)
    opener: Callable[[Path, str], Any] | None = next(
        (o for magic, o in _COMPRESSED.items() if head.startswith(magic)), None
    )
    if opener or _is_tar_header(head):  # before zip: a zip at the end of a tar makes it look so
        with (
            explained(shown, "tar"),
            (opener or Path.open)(file, "rb") as content,
            tarfile.open(  # type: ignore[call-overload]
                fileobj=_Stream(content, shown, limit),
                mode="r:",
                encoding="utf-8",
                errors="surrogateescape",
            ) as tar,
        ):
            yield tar
    elif head.startswith(b"PK") or zipfile.is_zipfile(file):
        with explained(shown, "zip"), zipfile.ZipFile(file) as zipped:
            yield zipped
    else:
        raise DataError(
            f"{shown} is neither a zip nor a tar that can be unpacked.",
            "Download it again, or unpack it yourself and give the folder as `data`.",
        )


class _Stream:
    """What tarfile reads from, in small steps and up to a limit: the headers of a hostile tar say
    that anything is to be read into memory."""

    def __init__(self, file: IO[bytes], shown: Path, limit: int):
        self._file, self._shown, self._limit = file, shown, limit
        self.tell = file.tell

    def seek(self, position: int) -> None:
        self._check(position)
        self._file.seek(position)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise tarfile.ReadError(f"it has a header of {size} bytes")
        self._check(self.tell() + size)
        return self._file.read(size)

    def _check(self, position: int) -> None:
        if position > self._limit:
            raise _unsafe(self._shown, f"would unpack to more than {self._limit:,} bytes")


def _is_tar_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _members(opened: zipfile.ZipFile | tarfile.TarFile) -> list[_Member]:
    return _tar_members(opened) if isinstance(opened, tarfile.TarFile) else _zip_members(opened)


def _zip_members(zipped: zipfile.ZipFile) -> list[_Member]:
    infos = zipped.infolist()
    return [
        _Member(
            *(name, _kind_in_zip(info, name), info.file_size, partial(zipped.open, info)),
            encrypted=bool(info.flag_bits & 1),
        )
        for name, info in zip(decode_names(list(map(_packed_name, infos))), infos, strict=True)
    ]


def _listing(zipped: zipfile.ZipFile) -> bytes:
    return "".join(
        # Archives inside are marked: unpacked folders of a time when they stayed are of no use.
        f"{member.name}{'/' if _is_inner_archive(member.name) else ''}{info.CRC}"
        for member, info in zip(_zip_members(zipped), zipped.infolist(), strict=True)
    ).encode("utf-8", "surrogateescape")


def _packed_name(info: zipfile.ZipInfo) -> str | bytes:
    """The name of a member of a zip, as bytes where the zip does not say how it is encoded."""
    name = info.orig_filename.partition("\0")[0]
    if info.flag_bits & 0x800:
        return name
    packed = name.encode("cp437")  # as which zipfile has decoded it
    return _unicode_path(info.extra, packed) or packed


def _unicode_path(extra: bytes, packed: bytes) -> str:
    """The name in the extra field that Info-ZIP adds for it, or nothing (APPNOTE.TXT 4.6.9)."""
    while len(extra) >= 4:
        field, size = struct.unpack_from("<HH", extra)
        content, extra = extra[4 : 4 + size], extra[4 + size :]
        if field == 0x7075 and content[:5] == struct.pack("<BL", 1, zlib.crc32(packed)):
            return content[5:].decode("utf-8")
    return ""


def _kind_in_zip(info: zipfile.ZipInfo, name: str) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link" if kind == stat.S_IFLNK else "a device"
    return "a folder" if name.endswith(("/", "\\")) else "a file"


def _tar_members(tar: tarfile.TarFile) -> list[_Member]:
    infos = list(_tar_infos(tar))
    file: Any = tar.fileobj
    # tarfile takes a damaged header, and the end of the file, for the end of the archive.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it ends before its end mark, after {file.tell()} bytes")
    while file.read(MAX_READ):
        pass  # up to the checksum of what is compressed
    names = decode_names([info.name.encode("utf-8", "surrogateescape") for info in infos])
    return [
        # None, which extractfile says it may return, it does for what is no file.
        _Member(name, _kind_in_tar(info), info.size, partial(tar.extractfile, info))  # type: ignore[arg-type]
        for name, info in zip(names, infos, strict=True)
    ]


def _tar_infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for n, info in enumerate(tar):
        if info.size < 0 or n == MAX_MEMBERS:
            raise tarfile.ReadError(f"it has {n} files, then one of {info.size} bytes")
        yield info


def _kind_in_tar(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "a link"
    if info.isdir():
        return "a folder"
    return "a file" if info.isreg() else "a device"


def _may_hold_images(opened: zipfile.ZipFile | tarfile.TarFile) -> bool:
    if isinstance(opened, tarfile.TarFile):
        names = (info.name for info in _tar_infos(opened) if info.isreg())
        return any(map(_is_image_or_archive, names))
    if any(map(_IN_DOCUMENTS.fullmatch, opened.namelist())):
        return False
    return any(_is_image_or_archive(m.name) for m in _zip_members(opened) if m.kind == "a file")


def _is_image_or_archive(name: str) -> bool:
    path = _plain_path(name)
    visible = not any(map(is_hidden, path.parts))
    return visible and (path.suffix.lower() in IMAGE_SUFFIXES or _is_inner_archive(name))


def _is_inner_archive(name: str) -> bool:
    """Whether a member has the name of an archive, and macOS did not put its attributes there."""
    path = _plain_path(name)
    return path.name.lower().endswith(SUFFIXES) and not any(map(is_hidden, path.parts))


def _plain_path(name: str) -> PurePosixPath:
    """A path of an archive; some Windows programs write backslashes."""
    return PurePosixPath(name.replace("\\", "/"))


def _unpack_to(
    folder: Path, file: Path, shown: Path, allowance: Allowance, progress: Progress, levels: int
) -> None:
    """Unpack a file, which errors call ``shown``, and the archives inside it."""
    with _opened(file, shown, allowance.left) as opened:
        files = _checked(_members(opened), shown)
        total = sum(member.size for member in files.values())
        allowance.take(len(files), total, shown, folder)
        for done, (name, member) in enumerate(files.items(), 1):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # "x": names that differ here may be one on the disk, which knows no case.
            with member.open() as source, path.open("xb") as out:
                shutil.copyfileobj(source, out, MAX_READ)
            progress("Unpacking", done, len(files))
    for name in filter(lambda name: levels and _is_inner_archive(str(name)), files):
        inner, inside = folder / name, shown / name
        with _opened(inner, inside, allowance.left) as opened:
            if not _may_hold_images(opened):
                continue
        target = inner.with_name(archive_stem(inner.name))
        if target.exists():
            raise DataError(
                f"{shown} holds {str(name)!r} and, beside it, {target.name!r}: both may be "
                "the same images.",
                "Unpack it yourself and give the folder as `data`.",
            )
        target.mkdir()
        _unpack_to(target, inner, inside, allowance, progress, levels - 1)
        inner.unlink()


def _checked(members: list[_Member], shown: Path) -> dict[PurePosixPath, _Member]:
    """The members that are files, by their path below the target."""
    files: dict[PurePosixPath, _Member] = {}
    for member in members:
        path = _checked_path(member, shown)
        if path in files:
            raise _unsafe(shown, f"holds {member.name!r} twice")
        if path:
            files[path] = member
    for path in files:
        if not files.keys().isdisjoint(path.parents):
            raise _unsafe(shown, f"holds {str(path)!r} inside a file")
    return files


def _checked_path(member: _Member, shown: Path) -> PurePosixPath | None:
    path, is_folder = _plain_path(member.name), member.kind == "a folder"
    parts = path.parts
    is_root = is_folder and not parts  # as tars of "." begin
    if path.is_absolute() or ".." in parts or not (parts or is_root) or ":" in "".join(parts[:1]):
        raise _unsafe(shown, f"would write outside its folder: {member.name!r}")
    if any(len(part.encode("utf-8", "surrogateescape")) > LONGEST_NAME for part in parts):
        raise DataError(
            f"{shown} holds a name of more than {LONGEST_NAME} bytes: {parts[-1][:40]!r}...",
            "Shorten it and pack the archive again.",
        )
    if member.kind not in ("a file", "a folder"):
        raise _unsafe(shown, f"holds {member.kind}, {member.name!r}")
    if member.encrypted:
        raise DataError(
            f"{shown} is encrypted.", "Unpack it yourself and give the folder as `data`."
        )
    return None if is_folder else path


def _unsafe(archive: Path, problem: str) -> BloodcellError:
    return DataError(f"{archive} {problem}.", "Do not use this archive: it is damaged or hostile.")
