"""Every method by name. Adding one: a file here, a line below, configs/methods/<name>.yaml."""

from __future__ import annotations

from allspark.methods.allspark import AllSpark
from allspark.methods.base import Method, Progress
from allspark.methods.fixmatch import FixMatch
from allspark.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "fixmatch": FixMatch,
    "allspark": AllSpark,
}

__all__ = ["METHODS", "Method", "Progress"]
