"""The list of all keys of a recipe: `train.py --keys`, and a page of the documentation."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from allspark.config import MAX, Recipe
from allspark.config_keys import config_fields, section_type, type_hints, type_text

INTRODUCTION = """\
Keys are set by key=value, e.g. optim.lr=0.01, or by the last part of the key if it is unique: lr=0.01. Those with an
asterisk can be changed when a run is resumed: they affect where and how it runs; micro_batch also what batch norm,
OHEM, CutMix and memory see, evaluation.interval which epochs can be the best. The options of the methods, method.*, are
in docs/methods.md."""


def describe_keys(part: str = "") -> str:
    """Default, values and meaning of each key that contains `part`."""
    lines = [INTRODUCTION, ""]
    for key in keys_with_help():
        if part in key.path:
            lines.append(f"{key.path}{' *' if key.runtime else ''} = {key.default}    ({key.values})")
            lines.append(textwrap.fill(key.help, 118, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)


@dataclass(frozen=True)
class KeyHelp:
    """What is said about a key. runtime: a resumed run may change it."""

    path: str
    runtime: bool
    default: str
    values: str
    help: str


def keys_with_help() -> Iterator[KeyHelp]:
    for path, key in config_fields().items():
        default = "required" if key.default is MISSING else key.default
        default = default if isinstance(default, str) else json.dumps(default)
        values = type_text(_type_of(path))
        values = (values.removesuffix(" or null") if key.default is None else values) + _range(key.metadata)
        yield KeyHelp(path, key.metadata["runtime"], default, values, key.metadata["help"])


def _type_of(path: str) -> Any:
    kind: Any = Recipe
    for name in path.split("."):
        kind = type_hints(section_type(kind))[name]
    return kind


def _range(bounds: Mapping[str, Any]) -> str:
    low, above, high = bounds["low"], bounds["above"], bounds["high"]
    if low is above is None:
        return ""
    if high == MAX:
        return f" > {above}" if low is None else f" >= {low:g}"
    return f" > {above}, <= {high:g}" if low is None else f" {low:g} to {high:g}"
