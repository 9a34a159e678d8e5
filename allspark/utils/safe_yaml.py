"""Parsing YAML from untrusted sources: memory stays bounded, also with aliases."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_YAML = 1 << 20  # characters
MAX_NODES = 100_000  # of a YAML text with its aliases expanded


def parse_yaml(text: str) -> Any:
    """yaml.safe_load for texts of bounded size, including expanded aliases; raises ValueError for anything else."""
    if len(text) > MAX_YAML:
        raise ValueError(f"too long for a config: {len(text)} characters, the limit is {MAX_YAML}")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None and count_nodes(node, {}) > MAX_NODES:
                raise ValueError(f"its aliases expand to more than {MAX_NODES} values")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("values are nested too deep") from None
    except Exception as error:  # besides yaml.YAMLError whatever int, float, date etc. raise for a value
        raise ValueError(" ".join(re.split(r"\s+", str(error))) or type(error).__name__) from None


def count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of nodes with all aliases expanded, at most MAX_NODES + 1; `known`: counts of nodes seen so far."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MAX_NODES + 1  # until it is counted: a node that contains itself is infinite
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    count = 1
    for child in children:
        count = min(count + count_nodes(child, known), MAX_NODES + 1)
    known[id(node)] = count
    return count
