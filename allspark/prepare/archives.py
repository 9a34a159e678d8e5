"""Files in zips, tars and folders, found in one pass. Nothing is unpacked: needed files are read directly."""

from __future__ import annotations

import io
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

from allspark.utils.errors import UserError

MAX_ARCHIVE = 64 << 30  # bytes, all files of an archive together; the largest official archive has 19 GB
MAX_FILE = 32 << 20  # bytes per needed file, unless its kind sets another limit
MAX_FILES = 10**6  # in an archive
MAX_HEADER = 1 << 20  # bytes of a long name or attributes in a tar
MAX_HEADERS = 256 << 20  # bytes of all of them
MAX_END = 64 << 20  # bytes after the last file of a tar
HEADER_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz")
DAMAGE_ERRORS = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, RuntimeError, ValueError, LookupError, OverflowError),
)

Key = tuple[str, ...]  # kind and parts of the name: ("image", "train", "000000391895")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        tail: regular expression for the end of the path, starting at a folder; its groups form the key.
        text: read the file as soon as it is found; for lists and annotations.
        limit: bytes.
    """

    name: str
    tail: str
    text: bool = False
    limit: int = MAX_FILE

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"(?:.*/)?{self.tail}", re.ASCII)

    def key(self, path: str) -> Key | None:
        match = self.pattern.fullmatch(path)
        return (self.name, *match.groups()) if match else None


@dataclass(frozen=True)
class Entry:
    """A file in a source. name: with / between folders; path: set if it is a file of its own on the disk."""

    name: str
    size: int
    regular: bool
    read: Callable[[], bytes]
    path: Path | None = None


@dataclass(frozen=True)
class Found:
    """Where the file with a key is."""

    source: Path
    name: str
    size: int
    path: Path | None


@dataclass
class Index:
    """The files of a data set in the sources; the first source wins. texts: contents of files with Kind.text."""

    files: dict[Key, Found]
    texts: dict[Key, bytes]


def find_sources(paths: Sequence[Path], archives: Sequence[str]) -> list[Path]:
    """Archives as given; for a folder, the archives with these names in it, then the folder itself."""
    sources = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; correct --from")
        if path.is_dir():
            sources += [path / name for name in archives if (path / name).is_file()]
        elif not path.is_file():
            raise UserError(f"{path}: is neither a folder nor a regular file; correct --from")
        sources.append(path)
    return sources


def index_sources(sources: Sequence[Path], kinds: Sequence[Kind]) -> Index:
    """Index all sources in one pass. A .tgz is decompressed for this, cheap compared to the work that follows."""
    index = Index({}, {})
    texts = {kind.name for kind in kinds if kind.text}
    for source in sources:
        for key, entry in select_entries(source, kinds):
            if key not in index.files:
                index.files[key] = Found(source, entry.name, entry.size, entry.path)
                if key[0] in texts:
                    index.texts[key] = entry.read()
    return index


def select_entries(source: Path, kinds: Sequence[Kind]) -> Iterator[tuple[Key, Entry]]:
    """The files of these kinds, in the source's order; read each before the next. UserError: one is not acceptable."""
    for entry in iter_entries(source):
        for kind in kinds:
            if key := kind.key(entry.name):
                if not entry.regular:
                    raise UserError(f"{source}: {entry.name} is a link or a device, not a file; {NOT_OFFICIAL}")
                if entry.size > kind.limit:
                    raise UserError(
                        f"{source}: {entry.name} has {entry.size} bytes, the limit is {kind.limit}; {NOT_OFFICIAL}"
                    )
                yield key, entry
                break


NOT_OFFICIAL = "this is not the official archive; download it again"


def iter_entries(source: Path) -> Iterator[Entry]:
    """All files of a folder, zip or tar (compressed or not), recognized by its suffix."""
    if source.is_dir():
        yield from folder_entries(source)
    elif source.suffix.lower() == ".zip":
        yield from zip_entries(source)
    elif source.name.lower().endswith(TAR_SUFFIXES):
        yield from tar_entries(source)
    else:
        raise UserError(f"{source}: neither a folder nor one of .zip, {', '.join(TAR_SUFFIXES)}; correct --from")


def folder_entries(root: Path) -> Iterator[Entry]:
    seen, top = set(), root.resolve().name
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back: it would loop forever
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            if not file.startswith(".") and path.is_file():
                relative = PurePosixPath(top, *path.relative_to(root).parts)
                yield Entry(str(relative), path.stat().st_size, True, path.read_bytes, path)


def zip_entries(source: Path) -> Iterator[Entry]:
    with archive_errors(source), zipfile.ZipFile(source) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        check_total(source, sum(info.file_size for info in infos), len(infos))
        for info in infos:
            check_path(source, info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the zip was not written on Unix
            read = partial(read_member, source, info.filename, info.file_size, partial(archive.open, info))
            yield Entry(info.filename, info.file_size, kind in (0, stat.S_IFREG), read)


class PlainHeader(tarfile.TarInfo):
    """Rejects headers that tarfile would read into memory before their size can be checked.

    These are very long names and maps of sparse files: a few kB of a compressed tar may expand to gigabytes of them.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a sparse file")
        if self.type in HEADER_TYPES:
            archive.header_bytes = getattr(archive, "header_bytes", 0) + self.size
            if self.size > MAX_HEADER or archive.header_bytes > MAX_HEADERS:
                raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError("a sparse file")


def tar_entries(source: Path) -> Iterator[Entry]:
    """Read forward only: seeking back in a compressed tar means decompressing it from the start."""
    total = 0
    with archive_errors(source), tarfile.open(source, tar_mode(source), tarinfo=PlainHeader) as archive:
        for count, member in enumerate(archive, start=1):
            archive.members.clear()  # otherwise kept to the end
            total += member.size
            check_total(source, total, count)
            check_path(source, member.name)
            if not member.isdir():
                read = partial(read_member, source, member.name, member.size, partial(archive.extractfile, member))
                yield Entry(member.name, member.size, member.isreg(), read)
        check_end(archive)


def tar_mode(source: Path) -> str:
    """By the first bytes; tarfile would try all compressions, and lzma reads zeros to their end, slowly."""
    with source.open("rb") as file:
        start = file.read(6)
    kinds = {b"\x1f\x8b": "r:gz", b"BZh": "r:bz2", b"\xfd7zXZ\0": "r:xz"}
    return next((mode for magic, mode in kinds.items() if start.startswith(magic)), "r:")


def check_end(archive: tarfile.TarFile) -> None:
    """Detect truncation, unlike tarfile: a plain tar ends with zero blocks, a compressed one with a checksum."""
    if isinstance(archive.fileobj, io.BufferedReader):
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("it is truncated")
    else:
        left = MAX_END
        while data := archive.fileobj.read(1 << 20):
            left -= len(data)
            if left < 0:
                raise tarfile.ReadError(f"more than {MAX_END} bytes after its last file")


def read_member(source: Path, name: str, size: int, open_member: Callable) -> bytes:
    with archive_errors(source), open_member() as file:
        data = file.read(size + 1)
        if len(data) != size:
            raise EOFError(f"{name} ends early")
        return data


@contextmanager
def archive_errors(source: Path) -> Iterator[None]:
    """Turn whatever the libraries raise for a damaged archive into a UserError."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{source}: truncated, damaged or not readable ({reason}); download it again, then run the same command: "
            "finished files are kept"
        ) from None


def check_total(source: Path, size: int, files: int) -> None:
    if size > MAX_ARCHIVE or files > MAX_FILES:
        raise UserError(
            f"{source}: unpacks to more than {MAX_ARCHIVE >> 30} GiB or {MAX_FILES:,} files; {NOT_OFFICIAL}"
        )


def check_path(source: Path, name: str) -> None:
    """Targets are never derived from these names, but a path outside the archive shows that it is not trustworthy."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or re.match("[A-Za-z]:", name):
        raise UserError(f"{source}: the path {name!r} points outside the archive; {NOT_OFFICIAL}")
