"""Official archives -> the layout that the configs expect. A data set's file says what is where; plan.py does it."""

from __future__ import annotations

from allspark.data.prepare.ade20k import ADE20K
from allspark.data.prepare.camvid import CAMVID
from allspark.data.prepare.cityscapes import CITYSCAPES
from allspark.data.prepare.coco import COCO
from allspark.data.prepare.plan import Plan
from allspark.data.prepare.voc import PASCAL

PLANS: dict[str, Plan] = {"voc": PASCAL, "cityscapes": CITYSCAPES, "coco": COCO, "camvid": CAMVID, "ade20k": ADE20K}
