"""Cityscapes: images, labelIds and the labelTrainIds that cityscapesscripts would create."""

from __future__ import annotations

from allspark.data.datasets.cityscapes import SPEC_LABEL_IDS
from allspark.data.spec import IGNORE_INDEX
from allspark.prepare.archives import Index, Kind
from allspark.prepare.images import check_values, decode_indices, encode_png
from allspark.prepare.plan import Archive, Output, Plan, Sample

# all labelIds; license plate, -1, is stored as 255 (cityscapesscripts, helpers/labels.py)
VALUES = (*range(34), IGNORE_INDEX)


def samples(index: Index, ignore_unknown: bool) -> dict[str, list[Sample]]:
    """Test images have no usable labels: their labelIds only mark what is outside the camera's view."""

    def sample(split: str, city: str, name: str) -> Sample:
        image = ("image", split, city, name)
        image_output = Output(f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", image)
        if split == "test":
            return (image_output,)
        ids, stem = ("ids", split, city, name), f"gtFine/{split}/{city}/{name}_gtFine"
        return (
            image_output,
            Output(f"{stem}_labelIds.png", ids),
            Output(f"{stem}_labelTrainIds.png", ids, make_train_ids, (ignore_unknown,)),
        )

    found = sorted({key[1:] for key in index.files})
    return {split: [sample(*key) for key in found if key[0] == split] for split in ("train", "val", "test")}


def make_train_ids(content: bytes, name: str, ignore_unknown: bool) -> bytes:
    label_ids = check_values(decode_indices(content, name), VALUES, IGNORE_INDEX, name, ignore_unknown)
    return encode_png(SPEC_LABEL_IDS.decode_mask(label_ids))


CITYSCAPES = Plan(
    dataset="cityscapes",
    archives=(
        Archive("leftImg8bit_trainvaltest.zip", "www.cityscapes-dataset.com/downloads, with a login"),
        Archive("gtFine_trainvaltest.zip", "from the same page"),
    ),
    kinds=(
        Kind("image", r"leftImg8bit/(train|val|test)/([\w-]+)/(\w+)_leftImg8bit\.png"),
        Kind("ids", r"gtFine/(train|val)/([\w-]+)/(\w+)_gtFine_labelIds\.png"),
    ),
    counts={"train": 2975, "val": 500, "test": 1525},
    optional=("test",),
    samples=samples,
    split="1_8",
)
