"""Files in zips, tars and folders, looked through in one pass. Nothing is unpacked: what is needed is read."""

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

MAX_ARCHIVE = 64 << 30  # bytes, all files of an archive together; the largest official one holds 19 GB
MAX_FILE = 32 << 20  # bytes, one file that is needed, where its kind does not say otherwise
MAX_HEADER = 1 << 20  # bytes, of a long name or attributes in a tar
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

Key = tuple[str, ...]  # a file by its kind and what its name says: ("image", "train", "000000391895")


@dataclass(frozen=True)
class Kind:
    """Files of one sort. tail: expression for the end of their paths, from a folder on; its groups make the key.

    text: lists and annotations, read when they are seen. limit: bytes.
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
    """A file in a source. name: with / between folders; path: of a file that lies on the disk by itself."""

    name: str
    size: int
    regular: bool
    read: Callable[[], bytes]
    path: Path | None = None


@dataclass(frozen=True)
class Found:
    """Where a file of a key is."""

    source: Path
    name: str
    size: int
    path: Path | None


@dataclass
class Index:
    """What the sources hold of a data set; where two have the same file, the first. texts: contents of Kind.text."""

    files: dict[Key, Found]
    texts: dict[Key, bytes]


def find_sources(paths: Sequence[Path], archives: Sequence[str]) -> list[Path]:
    """What to look through: archives as they are given; of a folder the archives of these names in it, then itself."""
    sources = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; correct --from")
        if path.is_dir():
            sources += [path / name for name in archives if (path / name).is_file()]
        sources.append(path)
    return sources


def index_sources(sources: Sequence[Path], kinds: Sequence[Kind]) -> Index:
    """One pass over every source. A .tgz is decompressed for it, which is cheap beside the work that follows."""
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
    """The files of these kinds, in the source's order; read each before the next. UserError: one is unfit."""
    for entry in iter_entries(source):
        for kind in kinds:
            if key := kind.key(entry.name):
                if not entry.regular:
                    raise UserError(f"{source}: {entry.name} is a link or a device, not a file; {NOT_OFFICIAL}")
                if entry.size > kind.limit:
                    raise UserError(
                        f"{source}: {entry.name} has {entry.size} bytes, such a file has {kind.limit} at most; {NOT_OFFICIAL}"
                    )
                yield key, entry
                break


NOT_OFFICIAL = "this is not the official archive as published; download it again"


def iter_entries(source: Path) -> Iterator[Entry]:
    """Every file of a folder, zip or tar (compressed or not), known by its suffix."""
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
        if real in seen:  # a link back: it would lead round and round
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
        check_total(source, sum(info.file_size for info in infos))
        for info in infos:
            check_path(source, info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the zip was not made on a Unix
            read = partial(read_member, source, info.filename, info.file_size, partial(archive.open, info))
            yield Entry(info.filename, info.file_size, kind in (0, stat.S_IFREG), read)


class PlainHeader(tarfile.TarInfo):
    """A tar header without what tarfile reads into memory before anybody sees its size.

    Names longer than any path, and maps of sparse files: a few kB of a compressed tar may stand for gigabytes of them.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a sparse file")
        if self.type in HEADER_TYPES and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError("a sparse file")


def tar_entries(source: Path) -> Iterator[Entry]:
    """Forward only: going back in a compressed tar means decompressing it from its beginning."""
    total = 0
    with archive_errors(source), tarfile.open(source, "r:*", tarinfo=PlainHeader) as archive:
        for member in archive:
            total += member.size
            check_total(source, total)
            check_path(source, member.name)
            if not member.isdir():
                read = partial(read_member, source, member.name, member.size, partial(archive.extractfile, member))
                yield Entry(member.name, member.size, member.isreg(), read)
        check_end(archive)


def check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes any end for the end. A plain tar ends with blocks of zeros, a compressed one with a checksum."""
    if isinstance(archive.fileobj, io.BufferedReader):
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("it has no end")
    else:
        while archive.fileobj.read(1 << 20):
            pass


def read_member(source: Path, name: str, size: int, start: Callable) -> bytes:
    with archive_errors(source), start() as file:
        data = file.read(size + 1)
        if len(data) != size:
            raise EOFError(f"{name} ends early")
        return data


@contextmanager
def archive_errors(source: Path) -> Iterator[None]:
    """What the libraries raise on a damaged archive, as one UserError."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{source}: truncated, damaged or not readable ({reason}); download it again, then run the same command: "
            "what is done already stays"
        ) from None


def check_total(source: Path, size: int) -> None:
    if size > MAX_ARCHIVE:
        raise UserError(f"{source}: unpacks to more than {MAX_ARCHIVE >> 30} GiB; {NOT_OFFICIAL}")


def check_path(source: Path, name: str) -> None:
    """Targets are never made from these names; one that leads out still says what kind of archive this is."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or re.match("[A-Za-z]:", name):
        raise UserError(f"{source}: the path {name!r} leads out of the archive; {NOT_OFFICIAL}")
