"""splits/manifest.yaml: the published lists, by name and by hash. The lists themselves are fetched."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from allspark.config_io import CONFIG_ROOT, INSTALLED
from allspark.utils.errors import UserError

SHIPPED_SPLITS = CONFIG_ROOT.parent / "splits"
SPLITS_ROOT = Path("splits") if INSTALLED else SHIPPED_SPLITS  # where lists are written, and looked for first
MANIFEST = SHIPPED_SPLITS / "manifest.yaml"
RAW = "https://raw.githubusercontent.com"
HASH = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


def roots(first: Path) -> tuple[Path, ...]:
    """Where lists are looked for: below `first` and, where that is the default, among those that came with this."""
    return tuple(dict.fromkeys((first, SHIPPED_SPLITS))) if first == SPLITS_ROOT else (first,)


def list_hash(images: Iterable[str]) -> str:
    """sha256 of a list in normal form: the image column alone, in order, a line feed after each line."""
    return hashlib.sha256("".join(f"{image}\n" for image in images).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A public repository at one revision."""

    repository: str
    revision: str
    licence: str

    def __str__(self) -> str:
        return f"{self.repository} {self.revision[:7]}"


@dataclass(frozen=True)
class Place:
    """A folder of a source that holds the lists of a split."""

    source: Source
    path: str

    def file(self, kind: str) -> str:
        """The path of a list below the repository's root."""
        return f"{self.path}/{kind}.txt"

    def url(self, kind: str) -> str:
        return f"{RAW}/{self.source.repository}/{self.source.revision}/{self.file(kind)}"


@dataclass(frozen=True)
class Facts:
    """Of one list: its length, and list_hash of its lines and of its sorted lines; None where nobody computed it.

    derived: nobody publishes it, the data set itself gives it.
    """

    count: int
    sha256: str | None = None
    sorted: str | None = None
    derived: bool = False


@dataclass(frozen=True)
class Published:
    """A split as it was published. Its name is its folder in splits/: pascal/1_8; the data set's own has only one part.

    lists: kind -> facts, such as labeled, unlabeled, val; the file is <name>/<kind>.txt. places: none for our own.
    """

    name: str
    lists: Mapping[str, Facts]
    places: tuple[Place, ...] = ()
    used_by: tuple[str, ...] = ()
    note: str = ""
    traps: tuple[str, ...] = ()

    @property
    def whose(self) -> str:
        return self.places[0].source.repository if self.places else "this project"

    def list_name(self, kind: str) -> str:
        """pascal/1_8/labeled, pascal/val: the file below splits/, without its suffix."""
        return f"{self.name}/{kind}"


class Verdict(Enum):
    """How a list stands to the published one."""

    IDENTICAL = "identical"
    REORDERED = "same images in another order"
    UNRECORDED = "as many lines; no hash of it is recorded"
    COUNT = "another number of lines"
    OTHER = "other images"


def judge(images: Sequence[str], facts: Facts) -> Verdict:
    if facts.sha256 is not None and list_hash(images) == facts.sha256:
        return Verdict.IDENTICAL
    if facts.sorted is not None and list_hash(sorted(images)) == facts.sorted:
        return Verdict.REORDERED
    if len(images) != facts.count:
        return Verdict.COUNT
    return Verdict.UNRECORDED if facts.sha256 is None and facts.sorted is None else Verdict.OTHER


@dataclass(frozen=True)
class Manifest:
    """Every published split by its name."""

    splits: Mapping[str, Published]

    def all_lists(self, folder: str | None = None) -> Iterator[tuple[Published, str, Facts]]:
        """(split, kind, facts) of each list, of one data set's folder or of all."""
        for split in self.splits.values():
            if folder is None or split.name.split("/")[0] == folder:
                for kind, facts in split.lists.items():
                    yield split, kind, facts

    def find(self, name: str) -> tuple[Published, str, Facts] | None:
        """The list of a name such as pascal/1_8/labeled or pascal/val."""
        split, _, kind = name.rpartition("/")
        published = self.splits.get(split)
        return (published, kind, published.lists[kind]) if published and kind in published.lists else None

    def by_hash(self, sha256: str, folder: str | None = None) -> tuple[Published, str] | None:
        """The first list that has this hash."""
        found = (item for item in self.all_lists(folder) if item[2].sha256 == sha256)
        return next(((split, kind) for split, kind, _ in found), None)


def known_as(sha256: str, folder: str | None = None) -> str | None:
    """'pascal/1_8 of LiheYoung/UniMatch' for the hash of a published list, None for any other.

    The labeled list speaks for its split; other lists are named with their kind.
    """
    found = load_manifest().by_hash(sha256, folder)
    if found is None:
        return None
    split, kind = found
    return f"{split.name if kind == 'labeled' else split.list_name(kind)} of {split.whose}"


def other_images(name: str, sha256: str, folder: str) -> str | None:
    """The warning for a split that has the name of a published one and is not it; None where all is well.

    name: the split's, such as 1_8; sha256: of its labeled list's normal form; folder: DatasetSpec.splits.
    """
    found = load_manifest().find(f"{folder}/{name}/labeled")
    if found is None or found[2].sha256 in (None, sha256):
        return None
    split, _, facts = found
    is_known = known_as(sha256, folder)
    return (
        f"split {name} has the name of {split.name} of {split.whose}, but its labeled list is another one "
        f"(sha256 {sha256[:12]}{f', that of {is_known}' if is_known else ''}; published: {facts.sha256[:12]}): "
        f"results on it do not compare with published ones. `python -m allspark splits verify --dataset {folder}`"
    )


@lru_cache
def load_manifest(path: Path = MANIFEST) -> Manifest:
    """The manifest of a file; UserError names the file and the place in it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); restore it") from None
    top = checked(content, {"sources": dict, "splits": list}, str(path))
    sources = {name: read_source(value, f"{path}: sources.{name}") for name, value in top["sources"].items()}
    splits = {}
    for index, value in enumerate(top["splits"]):
        split = read_split(value, sources, f"{path}: splits[{index}]")
        if split.name in splits:
            raise UserError(f"{path}: {split.name} stands there twice; remove one")
        splits[split.name] = split
    return Manifest(splits)


def checked(value: Any, types: Mapping[str, type], where: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping that has these keys of these types and no others."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping of {', '.join(types)}")
    if wrong := [key for key in value if key not in types]:
        raise UserError(f"{where}: unknown key '{wrong[0]}'; there are {', '.join(types)}")
    if missing := [key for key in types if key not in value and key not in optional]:
        raise UserError(f"{where}: the key '{missing[0]}' is missing")
    for key, item in value.items():
        if type(item) is not types[key]:
            raise UserError(f"{where}.{key}: {item!r} is no {types[key].__name__}")
    return value


def read_source(value: Any, where: str) -> Source:
    source = Source(**checked(value, {field.name: str for field in fields(Source)}, where))
    if not re.fullmatch(r"[0-9a-f]{40}", source.revision):
        raise UserError(f"{where}.revision: '{source.revision}' is no full commit hash of 40 digits")
    return source


def read_split(value: Any, sources: Mapping[str, Source], where: str) -> Published:
    types = {"name": str, "lists": dict, "places": list, "used_by": list, "note": str, "traps": list}
    value = checked(value, types, where, optional=[f.name for f in fields(Published) if f.default is not MISSING])
    for name in (value["name"], *value["lists"]):
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"{where}: '{name}' is no name of a split or list")
    lists = {kind: read_facts(facts, f"{where}.lists.{kind}") for kind, facts in value["lists"].items()}
    places = []
    for place in value.get("places", ()):
        place = checked(place, {"source": str, "path": str}, f"{where}.places")
        if place["source"] not in sources:
            raise UserError(f"{where}.places: there is no source '{place['source']}'; there are {', '.join(sources)}")
        places.append(Place(sources[place["source"]], place["path"]))
    texts = {key: tuple(map(str, value.get(key, ()))) for key in ("used_by", "traps")}
    return Published(value["name"], lists, tuple(places), note=value.get("note", ""), **texts)


def read_facts(value: Any, where: str) -> Facts:
    hashes = {"sha256": str, "sorted": str}
    present = {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value
    types = {"count": int, **hashes, "derived": bool}
    facts = checked(present, types, where, optional=[*hashes, "derived"])
    for key in hashes:
        if key in facts and not HASH.fullmatch(facts[key]):
            raise UserError(f"{where}.{key}: '{facts[key]}' is no SHA-256 of 64 hex digits")
    return Facts(**facts)
