"""All methods by name. To add one: a file here, a line in METHODS, a recipe configs/methods/<name>.yaml. A class from
outside of this package is named package.module:Class.

"Released" in a comment or docstring introduces what the published code of the paper does.
"""

from __future__ import annotations

from allspark.methods.allspark import AllSpark
from allspark.methods.base import Method, Progress
from allspark.methods.fixmatch import FixMatch
from allspark.methods.imas import IMAS
from allspark.methods.maskmatch import MaskMatch
from allspark.methods.pseudoseg import PseudoSeg
from allspark.methods.self_training import SelfTraining
from allspark.methods.supervised import Supervised
from allspark.methods.unimatch import UniMatch
from allspark.methods.unimatch_v2 import UniMatchV2

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "selftrain": SelfTraining,
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
    "unimatch_v2": UniMatchV2,
    "imas": IMAS,
    "maskmatch": MaskMatch,
    "pseudoseg": PseudoSeg,
    "allspark": AllSpark,
}

__all__ = ["METHODS", "Method", "Progress"]
