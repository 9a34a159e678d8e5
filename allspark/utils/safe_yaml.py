"""YAML from untrusted files: plain values only, no code, and no expansion beyond a bound."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_YAML = 1 << 20  # characters
MAX_NODES = 100_000  # with aliases expanded
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)$")


class Loader(yaml.SafeLoader):
    """SafeLoader, for which 1_8, the name of a split, is text and not the number 18."""

    yaml_implicit_resolvers = {
        first: [(tag, INTEGER if tag == "tag:yaml.org,2002:int" else pattern) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parse_yaml(text: str) -> Any:
    """yaml.safe_load with bounds on the text and on what its aliases expand to.

    Raises:
        ValueError: the text is not valid YAML, too long, nested too deep or expands too far.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"{len(text)} characters are too many; at most {MAX_YAML} are read")
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None and count_expanded(node, {}) > MAX_NODES:
                raise ValueError(f"its aliases expand to more than {MAX_NODES} values")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("values are nested too deep") from None
    except Exception as error:  # yaml.YAMLError, or what int, float, date etc. raise for a value
        raise ValueError(" ".join(re.split(r"\s+", str(error))) or type(error).__name__) from None


def count_expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of nodes with every alias expanded, at most MAX_NODES + 1; known: id -> count of nodes seen so far.

    Raises:
        ValueError: a mapping has a key twice, of which yaml would take the last one.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MAX_NODES + 1  # until it is counted: a node that contains itself never ends
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
        keys = set()
        for key, _ in node.value:
            value = int(key.value, 0) if key.tag == "tag:yaml.org,2002:int" else str(key.value)  # 0x0 is 0
            if (key.tag, value) in keys:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value} is given twice; remove one")
            keys.add((key.tag, value))
    count = 1
    for child in children:
        count = min(count + count_expanded(child, known), MAX_NODES + 1)
    known[id(node)] = count
    return count
