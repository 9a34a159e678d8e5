"""PASCAL VOC 2012 with SBD's labels, also known as SegmentationClassAug, from the two archives."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np

from allspark.data.datasets.voc import CLASSES
from allspark.data.spec import IGNORE_INDEX
from allspark.prepare.archives import Index, Kind
from allspark.prepare.images import check_values, decode_indices, encode_png
from allspark.prepare.plan import Archive, Output, Plan, Sample, read_names
from allspark.utils.errors import UserError

VALUES = (*range(len(CLASSES)), IGNORE_INDEX)
OTHER_YEARS = r"(?<!VOC20(?:0\d|1[01])/)"  # a VOCdevkit may contain several years, with equal file names
COMPRESSED = 15  # miCOMPRESSED, an element type of MATLAB files
MAX_UNPACKED = 64 << 20  # bytes; a label file of SBD has less than 1 MB
VOC, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"


def samples(index: Index, ignore_unknown: bool) -> dict[str, list[Sample]]:
    """train_aug: VOC's train and all images of SBD without VOC's val: 10,582 (VOC's val overlaps with SBD's train).

    VOC's masks take precedence: SBD's are coarser and have no 255 along the contours.
    """
    train, val = (read_names(index, ("voc list", split)) for split in ("train", "val"))
    if not train or not val:
        raise UserError(
            f"pascal: ImageSets/Segmentation/train.txt and val.txt not found; pass the complete {VOC} with --from, "
            "or the folder it unpacks to"
        )
    sbd = [name for split in ("train", "val") for name in read_names(index, ("sbd list", split))]
    own = {*train, *val}

    def sample(name: str) -> Sample:
        kind, make = ("mask", make_voc_mask) if name in own else ("sbd", make_sbd_mask)
        mask = Output(f"SegmentationClass/{name}.png", (kind, name), make, (ignore_unknown,))
        return Output(f"JPEGImages/{name}.jpg", ("image", name)), mask

    lists = {"train": train, "val": val, "train_aug": sorted({*train, *sbd} - set(val))}
    return {split: [sample(name) for name in ids] for split, ids in lists.items()}


def make_voc_mask(content: bytes, name: str, ignore_unknown: bool) -> bytes:
    return encode_png(check_values(decode_indices(content, name), VALUES, IGNORE_INDEX, name, ignore_unknown))


def make_sbd_mask(content: bytes, name: str, ignore_unknown: bool) -> bytes:
    """From the (H, W) uint8 field GTcls.Segmentation of a MATLAB file."""
    from scipy.io import loadmat  # slow to import, and only workers need it

    try:
        check_unpacked(content)
        mask = loadmat(io.BytesIO(content), variable_names=["GTcls"])["GTcls"]["Segmentation"].item()
        if mask.ndim != 2 or mask.dtype != np.uint8:
            raise ValueError(f"GTcls.Segmentation is {mask.dtype} of shape {mask.shape}")
    except Exception as error:  # loadmat raises nearly anything on a damaged file
        raise UserError(f"{name}: not a label file of SBD ({error}); download {SBD} again") from None
    return encode_png(check_values(mask, VALUES, IGNORE_INDEX, name, ignore_unknown))


def check_unpacked(content: bytes) -> None:
    """ValueError for a MATLAB file (level 5) whose compressed elements are far larger than the masks of a photo."""
    order, place, total = "<" if content[126:128] == b"IM" else ">", 128, 0
    while place + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, place)
        if kind == COMPRESSED:
            total += len(zlib.decompressobj().decompress(content[place + 8 : place + 8 + size], MAX_UNPACKED + 1))
        if total > MAX_UNPACKED:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED >> 20} MB")
        place += 8 + size


PASCAL = Plan(
    dataset="pascal",
    # urls and MD5 as in torchvision 0.29, datasets/voc.py (2012) and datasets/sbd.py
    archives=(
        Archive(
            VOC,
            "thor.robots.ox.ac.uk/pascal/VOC/voc2012",
            ("https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",),
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
        ),
        Archive(
            SBD,
            "home.bharathh.info/pubs/codes/SBD/download.html",
            ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
            "md5:82b4d87ceb2ed10f6038a1cba92111cb",
        ),
    ),
    kinds=(
        Kind("voc list", OTHER_YEARS + r"ImageSets/Segmentation/(train|val)\.txt", text=True),
        Kind("sbd list", r"dataset/(train|val)\.txt", text=True),
        Kind("image", OTHER_YEARS + r"JPEGImages/(\w+)\.jpg"),
        Kind("mask", OTHER_YEARS + r"SegmentationClass/(\w+)\.png"),
        Kind("sbd", r"cls/(\w+)\.mat", limit=4 << 20),
    ),
    counts={"train": 1464, "val": 1449, "train_aug": 10582},
    samples=samples,
    split="1_8",
    lists="ImageSets/Segmentation/{split}.txt",
)
