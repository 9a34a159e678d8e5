"""Cityscapes fine annotations: one spec for labelTrainIds files, one for labelIds files."""

from __future__ import annotations

from allspark.data.spec import IGNORE_INDEX, DatasetSpec, LookupTable

# labelId, class, color; the position is the class index (trainId), all other labelIds are ignored
TRAIN_CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
LABEL_IDS, CLASSES, PALETTE = zip(*TRAIN_CLASSES, strict=True)

# Class index -> labelId, as the server expects (cityscapesscripts, evaluation/evalPixelLevelSemanticLabeling.py).
# Pixels without a class become 0, unlabeled: the server rejects values above 33.
TO_LABEL_IDS = LookupTable.from_mapping(dict(enumerate(LABEL_IDS)), default=0)


def label_ids_path(path: str) -> str:
    """Published lists contain ..._labelTrainIds.png; the raw file beside it is ..._labelIds.png."""
    return path.replace("_labelTrainIds.png", "_labelIds.png")


SPEC = DatasetSpec(
    name="cityscapes",
    classes=CLASSES,
    palette=PALETTE,
    eval_mode="sliding_window",
    submission=TO_LABEL_IDS,
    mask_hint="This data set expects labelTrainIds files; for raw labelIds files use dataset cityscapes_labelids",
)

SPEC_LABEL_IDS = DatasetSpec(
    name="cityscapes_labelids",
    classes=CLASSES,
    palette=PALETTE,
    eval_mode="sliding_window",
    decode_mask=LookupTable.from_mapping(
        {label_id: index for index, label_id in enumerate(LABEL_IDS)}, default=IGNORE_INDEX
    ),
    split_folder="cityscapes",
    mask_path=label_ids_path,
    submission=TO_LABEL_IDS,
)
