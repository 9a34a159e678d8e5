"""ADE20K: images and masks of the Scene Parsing Challenge 2016 unchanged, after checking the mask values."""

from __future__ import annotations

from allspark.data.datasets.ade20k import CLASSES, OTHER
from allspark.prepare.archives import Index, Kind
from allspark.prepare.images import check_values, decode_indices, encode_png
from allspark.prepare.plan import Archive, Output, Plan, Sample

VALUES = range(len(CLASSES) + 1)  # stored values
FOLDERS = {"train": "training", "val": "validation"}


def samples(index: Index, ignore_unknown: bool) -> dict[str, list[Sample]]:
    def sample(folder: str, name: str) -> Sample:
        return (
            Output(f"images/{folder}/{name}.jpg", ("image", folder, name)),
            Output(f"annotations/{folder}/{name}.png", ("mask", folder, name), check_mask, (ignore_unknown,)),
        )

    found = sorted({key[1:] for key in index.files})
    return {split: [sample(*key) for key in found if key[0] == folder] for split, folder in FOLDERS.items()}


def check_mask(content: bytes, name: str, ignore_unknown: bool) -> bytes:
    """The file itself, unless illegal values have to be replaced by OTHER."""
    stored = decode_indices(content, name)
    known = check_values(stored, VALUES, OTHER, name, ignore_unknown)
    return content if known is stored else encode_png(known)


ADE20K = Plan(
    dataset="ade20k",
    archives=(
        Archive(
            "ADEChallengeData2016.zip",
            "sceneparsing.csail.mit.edu",
            (
                "https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            ),
            "md5:7328b3957e407ddae1d3cbf487f149ef",  # unofficial; public loaders agree on it
        ),
    ),
    kinds=(
        Kind("image", r"images/(training|validation)/(ADE_\w+)\.jpg"),
        Kind("mask", r"annotations/(training|validation)/(ADE_\w+)\.png"),
    ),
    counts={"train": 20210, "val": 2000},
    samples=samples,
    split="1_8",
)
