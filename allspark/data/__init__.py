"""The data sets by name. Reading, transforms, lists and loaders are the modules beside this one."""

from __future__ import annotations

from allspark.config import DataConfig
from allspark.data.base import DatasetSpec
from allspark.data.datasets import ade20k, camvid, cityscapes, coco, custom, shapes, voc
from allspark.utils.errors import UserError

DATASETS: dict[str, DatasetSpec] = {
    "pascal": voc.SPEC,
    "cityscapes": cityscapes.SPEC,
    "cityscapes_labelids": cityscapes.SPEC_LABEL_IDS,
    "coco": coco.SPEC,
    "camvid": camvid.SPEC,
    "ade20k": ade20k.SPEC,
    "shapes": shapes.SPEC,
}


def spec_for(data: DataConfig) -> DatasetSpec:
    """The spec of data.dataset: one of DATASETS, or the one that the section data.custom describes."""
    if data.custom is not None:
        if data.dataset in DATASETS:
            raise UserError(f"data.dataset: {data.dataset} is a data set of its own; give data.custom another name")
        return custom.make_spec(data.dataset, data.custom)
    if data.dataset not in DATASETS:
        raise UserError(
            f"data.dataset: there is no '{data.dataset}'; there are {', '.join(DATASETS)}. "
            "For a data set of your own write data.custom (at least its classes) and start with --config FILE"
        )
    return DATASETS[data.dataset]
