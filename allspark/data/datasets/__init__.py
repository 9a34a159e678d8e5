"""The data sets by name: one module each, one line here."""

from __future__ import annotations

from allspark.config import DataConfig
from allspark.data.datasets import ade20k, camvid, cityscapes, coco, custom, shapes, voc
from allspark.data.spec import DatasetSpec
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
    """The spec of data.dataset: from DATASETS, or built from the section data.custom."""
    if data.custom is not None:
        if data.dataset in DATASETS:
            raise UserError(f"data.dataset: {data.dataset} is a built-in data set; give data.custom another name")
        return custom.make_spec(data.dataset, data.custom)
    if data.dataset not in DATASETS:
        raise UserError(
            f"data.dataset: unknown data set '{data.dataset}'; choose one of {', '.join(DATASETS)}. "
            "For your own data describe it in data.custom (at least its classes) and start with --config FILE"
        )
    return DATASETS[data.dataset]
