"""splits/manifest.yaml: names, hashes and sources of the published lists. The lists themselves are fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from allspark.config_io import CONFIG_ROOT, INSTALLED
from allspark.utils.errors import UserError, reason_of

SHIPPED_SPLITS = CONFIG_ROOT.parent / "splits"
SPLITS_ROOT = Path("splits") if INSTALLED else SHIPPED_SPLITS  # where lists are written, and searched first
MANIFEST = SHIPPED_SPLITS / "manifest.yaml"
RAW = "https://raw.githubusercontent.com"


def split_roots(first: Path) -> tuple[Path, ...]:
    """Where lists are searched: below `first` and, if that is the default, among the lists that ship with the code."""
    return tuple(dict.fromkeys((first, SHIPPED_SPLITS))) if first == SPLITS_ROOT else (first,)


def list_hash(images: Iterable[str]) -> str:
    """sha256 of a list in normal form: the image column only, in order, each line ended by a line feed."""
    return hashlib.sha256("".join(f"{image}\n" for image in images).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A public repository at one revision."""

    repository: str
    revision: str
    license: str

    def __str__(self) -> str:
        return f"{self.repository} {self.revision[:7]}"


@dataclass(frozen=True)
class Location:
    """The folder in a source with the lists of a split."""

    source: Source
    path: str

    def file(self, kind: str) -> str:
        """Path of a list in the repository."""
        return f"{self.path}/{kind}.txt"

    def url(self, kind: str) -> str:
        return f"{RAW}/{self.source.repository}/{self.source.revision}/{self.file(kind)}"


@dataclass(frozen=True)
class ListRecord:
    """What is known about one list.

    Args:
        count: number of lines.
        sha256: list_hash of its lines; None if unknown.
        sorted: list_hash of its sorted lines; None if unknown.
        derived: the list is not published, but follows from the data set itself.
    """

    count: int
    sha256: str | None = None
    sorted: str | None = None
    derived: bool = False


@dataclass(frozen=True)
class PublishedSplit:
    """A published split.

    Args:
        name: its folder in splits/, such as pascal/1_8, or pascal for the data set's own lists.
        lists: kind (labeled, unlabeled, val ...) -> its record; the file is <name>/<kind>.txt.
        places: where it is published; empty for this project's own splits.
        traps: known pitfalls.
    """

    name: str
    lists: Mapping[str, ListRecord]
    places: tuple[Location, ...] = ()
    used_by: tuple[str, ...] = ()
    note: str = ""
    traps: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        return self.places[0].source.repository if self.places else "this project"

    def list_name(self, kind: str) -> str:
        """Path of the file below splits/ without suffix: pascal/1_8/labeled, pascal/val."""
        return f"{self.name}/{kind}"


class Verdict(Enum):
    """How a list compares to the published one."""

    IDENTICAL = "identical"
    REORDERED = "same images in a different order"
    UNRECORDED = "same number of lines; no hash is recorded"
    COUNT = "different number of lines"
    OTHER = "different images"


def compare(images: Sequence[str], record: ListRecord) -> Verdict:
    if record.sha256 is not None and list_hash(images) == record.sha256:
        return Verdict.IDENTICAL
    if record.sorted is not None and list_hash(sorted(images)) == record.sorted:
        return Verdict.REORDERED
    if len(images) != record.count:
        return Verdict.COUNT
    return Verdict.UNRECORDED if record.sha256 is None and record.sorted is None else Verdict.OTHER


@dataclass(frozen=True)
class Manifest:
    """All published splits by name."""

    splits: Mapping[str, PublishedSplit]

    def all_lists(self, folder: str | None = None) -> Iterator[tuple[PublishedSplit, str, ListRecord]]:
        """(split, kind, record) of each list, of one folder of splits/ or of all."""
        for split in self.splits.values():
            if folder is None or split.name.split("/")[0] == folder:
                for kind, record in split.lists.items():
                    yield split, kind, record

    def find(self, name: str) -> tuple[PublishedSplit, str, ListRecord] | None:
        """The list with a name such as pascal/1_8/labeled or pascal/val."""
        split, _, kind = name.rpartition("/")
        published = self.splits.get(split)
        return (published, kind, published.lists[kind]) if published and kind in published.lists else None

    def by_hash(self, sha256: str, folder: str | None = None) -> tuple[PublishedSplit, str] | None:
        """The first list with this hash."""
        found = (item for item in self.all_lists(folder) if item[2].sha256 == sha256)
        return next(((split, kind) for split, kind, _ in found), None)


def published_name(sha256: str, folder: str | None = None) -> str | None:
    """'pascal/1_8 of LiheYoung/UniMatch' for the hash of a published list, None for other hashes.

    A labeled list gives the name of its split; other lists are named with their kind.
    """
    found = load_manifest().by_hash(sha256, folder)
    if found is None:
        return None
    split, kind = found
    return f"{split.name if kind == 'labeled' else split.list_name(kind)} of {split.owner}"


def name_clash(name: str, sha256: str, folder: str) -> str | None:
    """A warning if a split has the name of a published split but different images, else None.

    Args:
        name: of the split, such as 1_8.
        sha256: list_hash of its labeled list.
        folder: DatasetSpec.splits.
    """
    found = load_manifest().find(f"{folder}/{name}/labeled")
    if found is None or found[2].sha256 in (None, sha256):
        return None
    split, _, record = found
    is_known = published_name(sha256, folder)
    return (
        f"split {name} has the name of {split.name} of {split.owner}, but a different labeled list "
        f"(sha256 {sha256[:12]}{f', that of {is_known}' if is_known else ''}; published: {record.sha256[:12]}): "
        f"results cannot be compared with published ones. See `python -m allspark splits verify --dataset {folder}`"
    )


@lru_cache
def load_manifest(path: Path = MANIFEST) -> Manifest:
    """Read the manifest. It is part of this project, whose tests check its content."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        sources = {name: Source(**value) for name, value in content["sources"].items()}
        splits = [read_split(value, sources) for value in content["splits"]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); restore it") from None
    return Manifest({split.name: split for split in splits})


def read_split(value: Mapping[str, Any], sources: Mapping[str, Source]) -> PublishedSplit:
    lists = {kind: ListRecord(**record) for kind, record in value["lists"].items()}
    places = tuple(Location(sources[place["source"]], place["path"]) for place in value.get("places", ()))
    texts = {key: tuple(value[key]) for key in ("used_by", "traps") if key in value}
    return PublishedSplit(**{**value, **texts, "lists": lists, "places": places})
