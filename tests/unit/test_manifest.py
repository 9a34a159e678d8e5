"""The manifest of published lists: reading it, look-up by hash, and properties of the lists."""

import hashlib
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

import helpers
from allspark.data.entries import read_list, split_columns
from allspark.split_lists import manifest
from allspark.split_lists.layouts import LAYOUTS, complement
from allspark.split_lists.manifest import (
    MANIFEST,
    SPLITS_ROOT,
    ListRecord,
    Verdict,
    compare,
    list_hash,
    load_manifest,
    name_clash,
    published_name,
)
from allspark.utils.errors import UserError

SHARED = helpers.SHARED / "splits"
VOC_TRAIN, CITYSCAPES_TRAIN, COCO_TRAIN = 10582, 2975, 118287
LABELED = {  # methods.md 8.2 of the specification: labeled images of each split
    "pascal": {"92": 92, "183": 183, "366": 366, "732": 732, "1464": 1464}
    | {"1_16": 662, "1_8": 1323, "1_4": 2646, "1_2": 5291},
    "cityscapes": {"1_30": 100, "1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488},
    "coco": {"1_512": 232, "1_256": 463, "1_128": 925, "1_64": 1849, "1_32": 3697},
}
TRAIN = {"pascal": VOC_TRAIN, "cityscapes": CITYSCAPES_TRAIN, "coco": COCO_TRAIN}


@cache
def images(name: str) -> list[str]:
    """The images of a published list; the test is skipped where it is not beside the project."""
    path = SHARED / f"{name}.txt"
    if not path.is_file():
        pytest.skip(f"{path} is absent: no published lists beside the project")
    return [split_columns(line)[0] for line in path.read_text(encoding="utf-8").splitlines()]


def shared(first: str, second: str) -> int:
    return len(set(images(first)) & set(images(second)))


@pytest.fixture
def content() -> dict:
    """A small manifest, as plain values."""
    source = {"repository": "somebody/lists", "revision": "0" * 40, "license": "MIT"}
    facts = {"count": 1, "sha256": "1" * 64, "sorted": None}
    split = {"name": "pascal/7", "lists": {"labeled": facts}, "places": [{"source": "s", "path": "splits/7"}]}
    return {"sources": {"s": source}, "splits": [split]}


def load(content, tmp_path):
    path = tmp_path / f"{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_manifest(path)


def test_read_manifest(content, tmp_path):
    read = load(content, tmp_path)
    split, kind, facts = read.find("pascal/7/labeled")
    assert (split.name, kind, facts) == ("pascal/7", "labeled", ListRecord(1, "1" * 64))
    assert split.places[0].url("labeled") == (
        "https://raw.githubusercontent.com/somebody/lists/" + "0" * 40 + "/splits/7/labeled.txt"
    )
    assert read.by_hash("1" * 64) == (split, "labeled") and read.by_hash("2" * 64) is None
    assert read.find("pascal/7/val") is None and read.find("pascal/8/labeled") is None
    assert list(read.all_lists("coco")) == [] and len(list(read.all_lists("pascal"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("splits"), "splits"),
        (lambda c: c["sources"]["s"].pop("license"), "license"),
        (lambda c: c["splits"][0]["lists"]["labeled"].update(hash="9"), "hash"),
        (lambda c: c["splits"][0]["places"].append({"source": "t", "path": "x"}), "'t'"),
    ],
)
def test_manifest_errors(content, tmp_path, change, message):
    change(content)
    with pytest.raises(UserError, match=rf"\.yaml: cannot be read \(.*{message}.*; restore it"):
        load(content, tmp_path)


@pytest.mark.parametrize("text", ["- 1", "a: [", "sources: {}\nsplits: []\nx: !!python/object:os.system {}"])
def test_not_a_manifest(tmp_path, text):
    with pytest.raises(UserError, match=str(tmp_path)):
        load(text, tmp_path)


def test_types_in_project_manifest():
    content = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    assert content.keys() == {"sources", "splits"}
    names = [split["name"] for split in content["splits"]]
    assert len(set(names)) == len(names)
    for split in load_manifest(MANIFEST).splits.values():
        assert all(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) for name in (split.name, *split.lists))
        assert all(isinstance(text, str) and len(text) > 1 for text in (*split.used_by, *split.traps))
        assert all(re.fullmatch(r"[0-9a-f]{40}", place.source.revision) for place in split.places)
        for record in split.lists.values():
            assert type(record.count) is int and type(record.derived) is bool
            assert all(re.fullmatch(r"[0-9a-f]{64}", text) for text in (record.sha256, record.sorted) if text)


def test_order_differs_from_images():
    facts = ListRecord(3, list_hash("bac"), list_hash("abc"))
    assert compare("bac", facts) is Verdict.IDENTICAL and compare("abc", facts) is Verdict.REORDERED
    assert compare("ab", facts) is Verdict.COUNT and compare("abd", facts) is Verdict.OTHER
    assert compare("xyz", ListRecord(3)) is Verdict.UNRECORDED and compare("xy", ListRecord(3)) is Verdict.COUNT
    assert compare("cab", ListRecord(3, None, list_hash("abc"))) is Verdict.REORDERED
    assert compare("cad", ListRecord(3, None, list_hash("abc"))) is Verdict.OTHER


def test_project_manifest():
    read = load_manifest(MANIFEST)
    for folder, splits in LABELED.items():
        for split, count in splits.items():
            lists = read.splits[f"{folder}/{split}"].lists
            assert (lists["labeled"].count, lists["unlabeled"].count) == (count, TRAIN[folder] - count), split
            assert lists["labeled"].sha256 and read.splits[f"{folder}/{split}"].places
        assert LAYOUTS[folder].train in read.splits[folder].lists
    hashes = [facts.sha256 for _, _, facts in read.all_lists() if facts.sha256]
    assert len(hashes) == len(set(hashes)) > 50


def test_hash_identifies_list():
    ours = load_manifest().splits["camvid/1_8"].lists["labeled"].sha256
    theirs = load_manifest().splits["pascal/1_8"].lists
    assert published_name(ours) == "camvid/1_8 of this project"
    assert published_name(theirs["labeled"].sha256) == "pascal/1_8 of LiheYoung/UniMatch"
    assert published_name(theirs["unlabeled"].sha256, "pascal") == "pascal/1_8/unlabeled of LiheYoung/UniMatch"
    assert published_name(theirs["labeled"].sha256, "coco") is None and published_name("0" * 64) is None


def test_published_name_with_other_images_warns():
    splits = load_manifest().splits
    published, u2pl = (splits[f"pascal/{name}"].lists["labeled"].sha256 for name in ("1_8", "u2pl_1_8"))
    assert name_clash("1_8", published, "pascal") is None
    assert name_clash("mine", "0" * 64, "pascal") is None and name_clash("1_8", "0" * 64, "mine") is None
    warning = name_clash("1_8", u2pl, "pascal")
    assert f"sha256 {u2pl[:12]}, that of pascal/u2pl_1_8 of Haochen-Wang409/U2PL" in warning
    assert f"published: {published[:12]}" in warning and "split 1_8" in warning
    assert name_clash("u2pl_1_2", "0" * 64, "pascal") is None  # nobody knows its hash


def test_own_lists_match_manifest():
    for name in ("camvid", "shapes"):
        for split, kind, facts in load_manifest().all_lists(name):
            listed = read_list(SPLITS_ROOT / f"{split.list_name(kind)}.txt", Path())
            assert compare([sample.image.as_posix() for sample in listed], facts) is Verdict.IDENTICAL


def test_no_published_list_in_repository():
    """They are other people's: what is fetched stays untracked."""
    ignored = (SPLITS_ROOT.parent / ".gitignore").read_text().split()
    assert all(f"/splits/{folder}/" in ignored for folder in LABELED)


@pytest.mark.parametrize("folder", LABELED)
def test_published_list_counts(folder):
    for split, count in LABELED[folder].items():
        assert len(images(f"{folder}/{split}/labeled")) == count == len(set(images(f"{folder}/{split}/labeled")))
        if folder != "coco":
            unlabeled = images(f"{folder}/{split}/unlabeled")
            assert len(unlabeled) == TRAIN[folder] - count == len(set(unlabeled))
            assert not shared(f"{folder}/{split}/labeled", f"{folder}/{split}/unlabeled")
    assert len(images(f"{folder}/val")) == {"pascal": 1449, "cityscapes": 500, "coco": 5000}[folder]


def test_halves_complete_each_other():
    for folder, train in (("pascal", "pascal/train_aug"), ("cityscapes", None)):
        splits = [name.partition("/")[2] for name in load_manifest().splits if name.startswith(f"{folder}/")]
        splits = [split for split in splits if (SHARED / folder / split).is_dir()]
        halves = [{*images(f"{folder}/{s}/labeled"), *images(f"{folder}/{s}/unlabeled")} for s in splits]
        whole = set(images(train)) if train else halves[0]
        assert len(splits) >= 5 and all(half == whole for half in halves) and len(whole) == TRAIN[folder]
        assert not whole & set(images(f"{folder}/val"))
        facts = load_manifest().splits[folder].lists[LAYOUTS[folder].train]
        assert compare(sorted(whole), facts) is Verdict.IDENTICAL


@pytest.mark.parametrize(
    ("split", "fine"),
    [("1_16", 93), ("1_8", 193), ("1_4", 388), ("1_2", 742), ("u2pl_1_16", 662), ("u2pl_1_8", 1323), ("u2pl_1_4", 1464)]
    + [(split, int(split)) for split in ("92", "183", "366", "732", "1464")],
)
def test_fine_masks_of_voc_lists(split, fine):
    """methods.md 8.4: the blended lists of UniMatch are random, those of U2PL prefer VOC's own masks."""
    assert shared(f"pascal/{split}/labeled", "pascal/1464/labeled") == fine


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ("pascal/1_16", "pascal/1_8", 662),  # nested
        ("pascal/1_8", "pascal/1_4", 1323),
        ("pascal/1_4", "pascal/1_2", 2646),
        ("pascal/u2pl_1_16", "pascal/u2pl_1_8", 662),
        ("pascal/u2pl_1_8", "pascal/u2pl_1_4", 1323),
        ("cityscapes/1_16", "cityscapes/1_8", 186),
        ("cityscapes/1_8", "cityscapes/1_4", 372),
        ("cityscapes/1_4", "cityscapes/1_2", 744),
        ("coco/1_512", "coco/1_32", 232),
        ("pascal/92", "pascal/183", 9),  # not nested: the traps of the manifest
        ("pascal/92", "pascal/366", 28),
        ("pascal/183", "pascal/366", 42),
        ("pascal/366", "pascal/732", 188),
        ("cityscapes/1_30", "cityscapes/1_16", 7),
        ("cityscapes/1_30", "cityscapes/1_2", 55),
        ("coco/1_256", "coco/1_128", 4),
        ("pascal/1_16", "pascal/u2pl_1_16", 43),  # equal name and size, other images
        ("pascal/1_8", "pascal/u2pl_1_8", 172),
        ("pascal/1_4", "pascal/u2pl_1_4", 666),
    ],
)
def test_intersections(first, second, count):
    assert shared(f"{first}/labeled", f"{second}/labeled") == count


def test_published_list_hashes():
    missing = []
    for split, kind, facts in load_manifest().all_lists():
        if facts.sha256 and split.places and not facts.derived and (SHARED / split.name).is_dir():
            name = split.list_name(kind)
            assert compare(images(name), facts) is Verdict.IDENTICAL, name
            assert list_hash(sorted(images(name))) == facts.sorted and len(images(name)) == facts.count
        elif split.places:
            missing.append(split.list_name(kind))
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: no published lists beside the project")
    known = ("u2pl", "coco", "ade20k", "cityscapes/train")
    assert all(any(part in name for part in known) for name in missing)


def test_unlabeled_complements_in_order():
    """So that what `splits build` says of them is known: blended VOC lists identical, the others reordered."""
    for split in LABELED["pascal"]:
        derived = complement(images("pascal/train_aug"), images(f"pascal/{split}/labeled"))
        verdict = compare(derived, manifest.load_manifest().splits[f"pascal/{split}"].lists["unlabeled"])
        assert verdict is (Verdict.IDENTICAL if split.startswith("1_") else Verdict.REORDERED), split
