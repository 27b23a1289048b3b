"""Safe extraction of untrusted archives: all of one is checked before a byte is written."""

import errno
import lzma
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import BloodcellError, DataError
from ..files import atomic_folder
from ..reporter import Progress, no_progress

# Photographs compress little. A zip of text or of empty images seldom exceeds 100 to 1; deflate
# cannot exceed 1,032 to 1, but members that overlap can exceed any limit.
MAX_RATIO = 200
SMALL = 2**26  # bytes that anything may unpack to
MAX_BYTES = 2**38
MAX_MEMBERS = 5_000_000
SPARE_DISK = 2**30  # bytes to leave free
LONGEST_NAME = 255  # bytes, of file systems in use

# What zipfile raises on bytes that are not a zip, besides its own error; OSError is raised by bz2.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError),
    *(NotImplementedError, RuntimeError, ValueError, OverflowError, IndexError),
)


def unpack(archive: Path, target: Path, progress: Progress = no_progress) -> Path:
    """Unpack a zip into ``target``, which appears only when complete. Returns ``target``.

    Archives inside are left as they are. Modes, owners and times are not taken over.

    Raises:
        BloodcellError: not a zip, damaged or encrypted; a member is a link or a device, would be
            written outside the target or over another member; or all would unpack to too much.
    """
    with _opened(archive) as zipped:
        members = _checked(zipped, archive, target)
        with atomic_folder(target) as folder:
            for done, (name, member) in enumerate(members.items(), start=1):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out)
                progress("Unpacking", done, len(members))
    return target


def content_key(archive: Path) -> str:
    """Eight hex digits that name what a zip contains, from its table of contents alone.

    Raises:
        BloodcellError: not a zip, or damaged.
    """
    with _opened(archive) as zipped:
        listing = "".join(f"{m.filename}{m.CRC}" for m in zipped.infolist())
    return f"{zlib.crc32(listing.encode('utf-8', 'surrogateescape')):08x}"


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as zipped:
            yield zipped
    except BloodcellError:  # some are ValueErrors too
        raise
    except _DAMAGE as error:
        # Of the disk and not of the archive; EINVAL is what a place before its beginning gives.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(
            f"{archive} is not a zip that can be unpacked: {error}.", "Download it again."
        ) from None


def _checked(zipped: zipfile.ZipFile, archive: Path, target: Path) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive by their relative path, checked as a whole."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in zipped.infolist():
        name = _safe_name(member, archive)
        _check_kind(member, archive)
        if member.is_dir():
            continue
        if name in members:
            raise _unsafe(archive, f"holds {member.filename!r} twice")
        members[name] = member
    for name in members:
        if any(str(parent) in members for parent in PurePosixPath(name).parents):
            raise _unsafe(archive, f"holds {name!r} inside a file")
    _check_amount(members, archive, target)
    return members


def _safe_name(member: zipfile.ZipInfo, archive: Path) -> str:
    """The path of a member below the target; some Windows programs write backslashes."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    parts = path.parts
    if path.is_absolute() or not parts or ".." in parts or ":" in parts[0]:
        raise _unsafe(archive, f"would write outside its folder: {member.filename!r}")
    if any(len(part.encode("utf-8", "surrogateescape")) > LONGEST_NAME for part in parts):
        raise DataError(
            f"{archive} holds a name of more than {LONGEST_NAME} bytes: {parts[-1][:40]!r}...",
            "Shorten it and pack the archive again.",
        )
    return str(path)


def _check_kind(member: zipfile.ZipInfo, archive: Path) -> None:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if kind == stat.S_IFLNK else "a device"
        raise _unsafe(archive, f"holds {what}, {member.filename!r}")
    if member.flag_bits & 1:
        raise DataError(
            f"{archive} is encrypted.", "Unpack it yourself and give the folder as `data`."
        )


def _check_amount(members: dict[str, zipfile.ZipInfo], archive: Path, target: Path) -> None:
    """Refuse decompression bombs by the table of contents: zipfile reads no more than it says."""
    total, packed = sum(m.file_size for m in members.values()), archive.stat().st_size
    if len(members) > MAX_MEMBERS or total > MAX_BYTES or total > max(MAX_RATIO * packed, SMALL):
        to = f"{total:,} bytes in {len(members):,} files"
        raise _unsafe(archive, f"would unpack from {packed:,} to {to}")
    existing = next(folder for folder in target.absolute().parents if folder.is_dir())
    if (free := shutil.disk_usage(existing).free) < total + SPARE_DISK:
        raise BloodcellError(
            f"No room to unpack {archive}: it needs {total:,} bytes and {free:,} are free.",
            "Make room, or unpack it elsewhere and give the folder as `data`.",
        )


def _unsafe(archive: Path, problem: str) -> BloodcellError:
    return DataError(f"{archive} {problem}.", "Do not use this archive: it is damaged or hostile.")
