"""Recipes from YAML files and `key.path=value` overrides, and back. Errors name the key by its full path."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from allspark.config import MethodConfig, Recipe
from allspark.config_keys import all_paths, check_ranges, convert, is_runtime, type_hints
from allspark.utils.errors import UserError, short_repr
from allspark.utils.safe_yaml import parse_yaml

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "configs").is_dir()  # a wheel has configs, splits, train.py and eval.py inside the package
CONFIG_ROOT = (PACKAGE if INSTALLED else PACKAGE.parent) / "configs"  # in a checkout they are beside it
MAX_YAML = 4 << 20  # bytes
SECTIONS = {name for name, kind in type_hints(Recipe).items() if dataclasses.is_dataclass(kind)}  # of a whole recipe
MAPS = ("value_map", "color_map")  # replaced as a whole; sections are merged key by key

# Old key path -> new key path, or a function (content without the old key, its value) -> (content, note).
# Applied to YAML files, overrides and the recipes in checkpoints.
Translation = Callable[[Mapping[str, Any], Any], tuple[Mapping[str, Any], str]]
RENAMED: dict[str, str | Translation] = {
    "log_interval": "log.interval",
    "optim.late": "optim.lr_one_step_late",
    "method.warmup_epochs": "model.bottleneck.warmup_epochs",
}


def load_recipe(dataset: str, method: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a data set and a method, from configs/.

    Later values replace earlier ones: configs/datasets/<dataset>.yaml, configs/methods/<method>.yaml (after the file
    named by its `base`), the section `datasets: <dataset>:` of that file, overrides.

    Args:
        dataset, method: names of the files.
        overrides: key path -> value, as parse_overrides returns them.

    Raises:
        UserError: a file is missing, or a key or value is invalid.
    """
    notes: list[str] = []
    content = _with_method(_read(_recipe_file("datasets", dataset), notes), dataset, method, notes)
    return build_recipe(content, overrides, f"--dataset {dataset} --method {method}", notes)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None, method: str | None = None) -> Recipe:
    """A complete recipe from one file, such as the config.yaml of a run.

    `method: NAME` in it may also name a recipe of configs/methods, such as allspark_revised, whose keys are then the
    defaults of the file.

    Args:
        path: the YAML file.
        overrides: key path -> value, as parse_overrides returns them.
        method: replaces the file's method and bottleneck by everything that `configs/methods/<method>.yaml` sets.

    Raises:
        UserError: the file cannot be read, or a key or value is invalid.
    """
    notes: list[str] = []
    content = _read(Path(path), notes)
    if method is not None:
        model = content.get("model")
        content = {key: value for key, value in content.items() if key != "method"}
        if isinstance(model, Mapping):
            content["model"] = {key: value for key, value in model.items() if key != "bottleneck"}
            bottleneck = model.get("bottleneck")
            if isinstance(bottleneck, Mapping) and "warmup_epochs" in bottleneck:  # belongs to the data set
                content["model"]["bottleneck"] = {"warmup_epochs": bottleneck["warmup_epochs"]}
        content = _with_method(content, _dataset_name(content), method, notes)
    else:
        content = _with_named_recipe(content, notes)
    return build_recipe(content, overrides, str(path), notes)


def build_recipe(
    content: Mapping[str, Any], overrides: Mapping[str, Any] | None, source: str, notes: Sequence[str] = ()
) -> Recipe:
    """Fill the dataclasses.

    Args:
        content: nested plain values, as YAML or to_plain give them.
        overrides: key path -> value.
        source: where content comes from, for error messages.
        notes: what was translated already.

    Raises:
        UserError: a key is unknown, missing, of the wrong type or out of range.
    """
    content, notes = translate(content, source, [*notes])
    given = {full_key(key): value for key, value in (overrides or {}).items()}
    file_batch_size = content.get("batch_size") if isinstance(content, Mapping) else None
    for key, value in given.items():
        update, notes = translate(_nest(key, value), "command line", notes)
        content = merge(content, update)
    content, notes = _rename_self_training(content, notes)
    recipe = dataclasses.replace(convert(content, Recipe, "", source), notes=tuple(dict.fromkeys(notes)))
    if recipe.optim.lr_scaling != "none" and recipe.optim.lr_batch is None:
        stated = recipe.batch_size if file_batch_size is None else file_batch_size
        lr_batch = convert(stated, int, "batch_size", source)
        recipe = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, lr_batch=lr_batch))
    root = os.environ.get(root_variable(recipe.data.dataset))
    if root and "data.data_root" not in given:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, data_root=root))
    check_ranges(recipe, source)
    return recipe


def translate(content: Mapping[str, Any], source: str, notes: list[str]) -> tuple[Mapping[str, Any], list[str]]:
    """Move the values of old keys to their new keys.

    Returns:
        The content, and the notes with one more for each old key.
    """
    for old, new in RENAMED.items():
        rest, value = _pop_path(content, old)
        if value is dataclasses.MISSING:
            continue
        if callable(new):
            content, note = new(rest, value)
        else:
            if _pop_path(rest, new)[1] is not dataclasses.MISSING:
                raise UserError(f"{source}: has both {old} and {new}, its new name; remove {old}")
            content, note = merge(rest, _nest(new, value)), f"{old} is now {new}"
        notes = [*notes, note]
    return content, notes


def _rename_self_training(content: Any, notes: list[str]) -> tuple[Any, list[str]]:
    """method=allspark without a bottleneck is now method=selftrain."""
    method, model = (content.get(key) if isinstance(content, Mapping) else None for key in ("method", "model"))
    options = {"name": method} if isinstance(method, str) else method
    bottleneck = model.get("bottleneck", "none") if isinstance(model, Mapping) else None
    kind = bottleneck.get("name", "none") if isinstance(bottleneck, Mapping) else bottleneck
    if not isinstance(options, Mapping) or (options.get("name"), kind) != ("allspark", "none"):
        return content, notes
    options = {key: value for key, value in options.items() if key != "pseudo_context"}  # an option of the bottleneck
    note = "method=allspark without a bottleneck is now method=selftrain"
    return {**content, "method": {**options, "name": "selftrain"}}, [*notes, note]


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """key path -> value, from `key.path=value` arguments of a command line; the value is YAML."""
    overrides = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"'{item}': not an override; write key.path=value, e.g. optim.lr=0.01")
        try:
            overrides[key] = parse_yaml(value)
        except ValueError as error:
            raise UserError(f"{' '.join(item.split())[:200]}: the value is not YAML ({str(error)[:200]})") from error
    return overrides


def full_key(key: str) -> str:
    """The full path of a key given by its last part, if only one key ends so: lr -> optim.lr."""
    known, old = ([p for p in paths if p == key or p.endswith(f".{key}")] for paths in (all_paths(), RENAMED))
    paths = known or old
    if key.startswith("method.") or key in paths or not paths:
        return key
    if len(paths) > 1:
        raise UserError(f"{key}: ambiguous; write one of {', '.join(paths)}")
    return paths[0]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if the file cannot be read or is not a mapping."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_YAML + 1)
        if len(text) > MAX_YAML:
            raise UserError(f"{path}: larger than {MAX_YAML >> 20} MiB; give the path of a YAML recipe")
        content = parse_yaml(text.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML recipe") from error
    except ValueError as error:  # neither UTF-8 nor YAML
        raise UserError(f"{path}: not valid YAML: {str(error)[:300]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is a {type(content).__name__}, must be a mapping of keys to values")
    return content


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key, other values replaced. A string updates a section's name: criterion: ohem."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, Mapping):
            old = {"name": old}
        if isinstance(old, Mapping) and isinstance(value, str):
            value = {"name": value}
        sections = isinstance(old, Mapping) and isinstance(value, Mapping) and key not in MAPS
        merged[key] = merge(old, value) if sections else value
    return merged


def to_plain(value: Any) -> Any:
    """A recipe or a section as nested dicts and lists: what config.yaml and checkpoints hold and build_recipe reads."""
    if isinstance(value, MethodConfig):
        return {"name": value.name, **to_plain(value.options)}
    if dataclasses.is_dataclass(value):
        return {key.name: to_plain(getattr(value, key.name)) for key in dataclasses.fields(value) if key.compare}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple | list) else value


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "", *, runtime: bool = False
) -> list[tuple[str, Any, Any]]:
    """(key path, old value, new value) of each key in which two plain recipes differ.

    Args:
        old, new: the recipes.
        prefix: of the key paths.
        runtime: False: of keys that define a run; True: of those that a resumed run may change.
    """
    changed = []
    for name in sorted({*old, *new}, key=str):  # the keys of a value_map are numbers
        path, a, b = f"{prefix}{name}", old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if path == "model.bottleneck" and a.get("name") == b.get("name") == "none":
                continue  # its options have no effect
            changed += differences(a, b, f"{path}.", runtime=runtime)
        elif a != b and is_runtime(path) == runtime:
            changed.append((path, a, b))
    return changed


def without_absolute_paths(plain: Any) -> Any:
    """Plain values, in which a string that is an absolute path (or below ~) is replaced by its last part."""
    if isinstance(plain, Mapping):
        return {key: without_absolute_paths(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [without_absolute_paths(value) for value in plain]
    absolute = isinstance(plain, str) and (plain.startswith(("/", "~")) or PureWindowsPath(plain).is_absolute())
    return PureWindowsPath(plain).name if absolute else plain  # which knows / and \


def root_variable(dataset: str) -> str:
    """The environment variable that gives the root folder of a data set."""
    return "ALLSPARK_DATA_" + re.sub(r"\W", "_", dataset.upper())


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    """read_yaml with old keys translated; their notes are appended to `notes`."""
    content, notes[:] = translate(read_yaml(path), str(path), notes)
    return dict(content)


def _with_method(
    content: Mapping[str, Any], dataset: str, method: str, notes: list[str], derived: tuple[str, ...] = ()
) -> dict[str, Any]:
    """content updated by the file of the method's `base`, the method's file and its section for the data set.

    Args:
        derived: the methods whose `base` led to this one.
    """
    if ":" in method:  # package.module:Class, which has no file
        return merge(content, {"method": method})
    path = _recipe_file("methods", method)
    own = _read(path, notes)
    if (base := own.pop("base", None)) is not None:
        derived = (*derived, method)
        if base in derived:
            chain = " -> ".join((*derived, base))
            raise UserError(f"{path}: base={base!r} leads back to the same file ({chain}); remove or correct it")
        content = _with_method(content, dataset, str(base), notes, derived)
    sections = own.pop("datasets", None) or {}
    if not isinstance(sections, Mapping):
        raise UserError(f"{path}: datasets={short_repr(sections)} must be a section of data set names")
    for name in sections:
        _recipe_file("datasets", str(name))
    special = sections.get(dataset) or {}
    if not isinstance(special, Mapping):
        raise UserError(f"{path}: datasets.{dataset}={short_repr(special)} must be a section of keys")
    special, notes[:] = translate(special, str(path), notes)
    return merge(merge(content, own), special)


def _with_named_recipe(content: Mapping[str, Any], notes: list[str]) -> Mapping[str, Any]:
    """content over the recipe of configs/methods that its method names; as it is if it is complete, as of a run."""
    options = {"name": content.get("method")} if isinstance(content.get("method"), str) else content.get("method")
    name = str(options.get("name")) if isinstance(options, Mapping) else ""
    if not re.fullmatch(r"\w+", name) or not (CONFIG_ROOT / "methods" / f"{name}.yaml").is_file():
        return content
    recipe = _with_method({"method": {}}, _dataset_name(content), name, notes)
    if recipe["method"]["name"] == name and content.keys() >= SECTIONS:
        return content
    return merge(recipe, {**content, "method": {key: value for key, value in options.items() if key != "name"}})


def _dataset_name(content: Mapping[str, Any]) -> str:
    data = content.get("data")
    return str(data.get("dataset")) if isinstance(data, Mapping) else ""


def _recipe_file(folder: str, name: str) -> Path:
    path = CONFIG_ROOT / folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"--{folder.removesuffix('s')} {name}: {path} does not exist; choose one of {known}")
    return path


def _nest(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _pop_path(content: Any, path: str) -> tuple[Any, Any]:
    """content without the key at `path`, and the key's value; MISSING if it is not there."""
    name, _, rest = path.partition(".")
    if not isinstance(content, Mapping) or name not in content:
        return content, dataclasses.MISSING
    if not rest:
        return {key: value for key, value in content.items() if key != name}, content[name]
    section, value = _pop_path(content[name], rest)
    return {**content, name: section}, value
