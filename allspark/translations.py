"""Old names in recipes, config.yaml files and checkpoints, and their names of today."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

RENAMED = {"method.warmup_epochs": "model.bottleneck.warmup_epochs"}  # old key -> new key


def rename_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """Move the keys of RENAMED in the plain content of a recipe, which may be incomplete; warn about each."""
    content = dict(content)
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        if isinstance(content.get(section), Mapping) and key in content[section]:
            options = dict(content[section])
            value = options.pop(key)
            content[section] = options
            _set(content, new.split("."), value)
            _warn(f"{old} is now called {new}")
    return content


def rename_method(content: Mapping[str, Any]) -> dict[str, Any]:
    """method=allspark without a bottleneck is now method=selftrain; content is that of a whole recipe."""
    method, model = content.get("method"), content.get("model")
    options = {"name": method} if isinstance(method, str) else method
    bottleneck = model.get("bottleneck", "none") if isinstance(model, Mapping) else None
    kind = bottleneck.get("name", "none") if isinstance(bottleneck, Mapping) else bottleneck
    if not isinstance(options, Mapping) or (options.get("name"), kind) != ("allspark", "none"):
        return dict(content)
    _warn("method.name=allspark without a bottleneck is now called method.name=selftrain")
    options = {key: value for key, value in options.items() if key != "pseudo_context"}  # an option of the bottleneck
    return {**content, "method": {**options, "name": "selftrain"}}


def _set(content: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested key; on the way, sections are copied and a bare name becomes a section."""
    for key in path[:-1]:
        section = content.get(key) or {}
        content[key] = {"name": section} if isinstance(section, str) else dict(section)
        content = content[key]
    content[path[-1]] = value


def _warn(message: str) -> None:
    warnings.warn(message, FutureWarning, stacklevel=2)  # the same place and text: shown once for many old files
