"""The keys of a recipe: their paths, types and ranges, and how values of a YAML file are checked and converted."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from allspark.config import MethodConfig, Recipe
from allspark.utils.errors import UserError, short_repr

SYNONYMS = {  # what other programs call a key -> its path, for messages
    "amp": "precision",
    "backbone": "model.encoder",
    "batch": "batch_size",
    "bs": "batch_size",
    "early_stopping": "evaluation.patience",
    "imgsz": "data.crop_size",
    "learning_rate": "optim.lr",
    "num_classes": "data.custom.classes",
    "wd": "optim.weight_decay",
    "workers": "data.num_workers",
}


@functools.cache
def config_fields() -> dict[str, dataclasses.Field]:
    """Key path -> field of every key that is not a section, without the options of the methods."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field]]:
        for key in dataclasses.fields(kind):
            if key.metadata:
                yield prefix + key.name, key
            elif key.compare and (inner := section_type(type_hints(kind)[key.name])):
                yield from walk(inner, f"{prefix}{key.name}.")

    return dict(walk(Recipe, ""))


@functools.cache
def all_paths() -> list[str]:
    """The paths of all keys and sections."""
    parents = (path.split(".")[:depth] for path in config_fields() for depth in range(1, path.count(".") + 2))
    return list(dict.fromkeys(".".join(parts) for parts in parents))


@functools.cache
def type_hints(kind: type) -> dict[str, Any]:
    """Key -> type, of a section."""
    hints = typing.get_type_hints(kind)
    return {key.name: hints[key.name] for key in dataclasses.fields(kind) if key.compare}


def section_type(hint: Any) -> type | None:
    """The dataclass in a type such as CustomDataConfig | None."""
    return next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)


def is_runtime(path: str) -> bool:
    """Whether a resumed run may change this key."""
    return path in config_fields() and config_fields()[path].metadata["runtime"]


def closest_key(name: str, preferred: Mapping[str, str] | None = None) -> str | None:
    """The path of the key that was probably meant by an unknown name.

    Args:
        name: such as `batch` or `epoch`.
        preferred: name -> path of keys that win over others with the same last part.
    """
    places = {path.rpartition(".")[2]: path for path in all_paths()} | SYNONYMS | dict(preferred or {})
    close = difflib.get_close_matches(name, places, 1)
    return places[close[0]] if close else None


def check_ranges(recipe: Recipe, source: str) -> None:
    """Raises UserError for the first value that is out of its range."""
    for path, key in config_fields().items():
        low, above, high = (key.metadata[name] for name in ("low", "above", "high"))
        if low is above is None:
            continue
        value = functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), recipe)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or ((number > above if low is None else number >= low) and number <= high):
                continue  # NaN satisfies neither
            bound = f"at most {high}" if number > high else f"above {above}" if low is None else f"at least {low}"
            raise UserError(f"{source}: {path}={number} must be {bound}")
    smallest, largest = recipe.data.scale_range
    if smallest > largest:
        raise UserError(f"{source}: data.scale_range=[{smallest}, {largest}]: the smaller factor must come first")


def bind_options(kind: type, options: Mapping[str, Any], path: str) -> dict[str, Any]:
    """All keyword-only arguments of a constructor: the given options, checked against their types, and the defaults.

    A constructor with **options passes them on to its base class, whose arguments are then options, too.

    Args:
        kind: the class.
        options: name -> value, as YAML gives it.
        path: the section that the options are in, for error messages.

    Raises:
        UserError: an option is unknown or of the wrong type, or one without a default is missing.
    """
    hints, known = {}, {}
    for constructor in (base.__init__ for base in kind.__mro__):
        parameters = inspect.signature(constructor).parameters.values()
        known = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} | known
        hints = typing.get_type_hints(constructor) | hints
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    for key in options:
        if key not in known:
            raise UserError(f"{path}.{key}: unknown option; choose one of {', '.join(known) or 'none'}")
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise UserError(f"{path}.{name} is missing; it has no default")
    given = {key: convert(value, hints[key], f"{path}.{key}", "recipe") for key, value in options.items()}
    return {name: given.get(name, p.default) for name, p in known.items()}


def convert(value: Any, hint: Any, path: str, source: str) -> Any:
    """A YAML value as the hinted type; UserError names the key's path."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _convert_section(value, hint, path, source)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        kinds = [arg for arg in kinds if (typing.get_origin(arg) is Literal) == isinstance(value, str)] or kinds
        listed = [arg for arg in kinds if (typing.get_origin(arg) is tuple) == isinstance(value, list | tuple)]
        return convert(value, (listed or kinds)[0], path, source)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(convert(item, kind, path, source) for item, kind in zip(value, kinds, strict=True))
    if origin is dict and isinstance(value, Mapping):
        pairs = ((convert(k, args[0], path, source), v) for k, v in value.items())
        return {key: convert(item, args[1], f"{path}.{key}", source) for key, item in pairs}
    if hint is float and not isinstance(value, bool):  # YAML 1.1 reads 6e-4 as a string
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return float(value)
    if hint in (int, bool, str) and type(value) is hint and is_usable(value):
        return value
    if type(value) is hint:
        raise UserError(f"{source}: {path}={short_repr(value)} must be a 64-bit number or plain text")
    misread = hint is str and isinstance(value, bool)
    remedy = "; YAML reads yes, no, on and off as true or false: put it in quotes" if misread else ""
    keys = (key for name, key in config_fields().items() if f"{path}.".startswith(f"{name}."))
    meaning = "".join(f" ({key.metadata['help']})" for key in keys)
    raise UserError(
        f"{source}: {path}={short_repr(value)} is {type(value).__name__}, must be {type_text(hint)}{remedy}{meaning}"
    )


def _convert_section(value: Any, kind: type, path: str, source: str) -> Any:
    hints = type_hints(kind)
    if isinstance(value, str) and "name" in hints:
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: {path or 'the recipe'}={short_repr(value)} must be a section of keys")
    if kind is MethodConfig:  # the options are beside the name; bind_options checks them
        value = {"name": value.get("name"), "options": {k: v for k, v in value.items() if k != "name"}}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            meant = closest_key(str(key), {name: prefix + name for name in hints})
            remedy = f"did you mean {meant}?" if meant else f"known here are {', '.join(hints)}"
            raise UserError(f"{source}: {prefix}{key}: unknown key; {remedy}")
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in value:
            raise UserError(f"{source}: {prefix}{entry.name} is missing; it has no default")
    return kind(**{key: convert(item, hints[key], prefix + key, source) for key, item in value.items()})


def type_text(hint: Any) -> str:
    """A type as YAML writes its values: int or null, ce or ohem, [[int, int, int], ...], {int: int}."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else type_text(arg) for arg in args)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"[{', '.join('...' if arg is Ellipsis else type_text(arg) for arg in args)}]"
    if origin is dict:
        return f"{{{type_text(args[0])}: {type_text(args[1])}}}"
    return hint.__name__


def is_usable(value: int | bool | str) -> bool:
    """Whether files, file names and terminals can take the value: no surrogate or control character, 64 bits."""
    if isinstance(value, str):
        return not re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", value)
    return abs(value) < 2**63
