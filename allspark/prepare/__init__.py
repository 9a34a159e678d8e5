"""Official archives -> the layout the configs expect. Each data set has a Plan; plan.py carries it out."""

from __future__ import annotations

from allspark.prepare.ade20k import ADE20K
from allspark.prepare.camvid import CAMVID
from allspark.prepare.cityscapes import CITYSCAPES
from allspark.prepare.coco import COCO
from allspark.prepare.plan import Plan
from allspark.prepare.voc import PASCAL

PLANS: dict[str, Plan] = {"voc": PASCAL, "cityscapes": CITYSCAPES, "coco": COCO, "camvid": CAMVID, "ade20k": ADE20K}
