"""`prepare` for each data set: small archives in the official layouts, read by the project's readers."""

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from allspark.__main__ import main
from allspark.data.datasets import DATASETS, camvid
from allspark.data.entries import read_list
from allspark.data.mask_io import read_mask, read_pair
from allspark.data.spec import IGNORE_INDEX
from allspark.evaluation.dataset import SegmentationDataset
from allspark.prepare import PLANS
from allspark.prepare.archives import Found, Index
from allspark.prepare.camvid import split_of
from allspark.prepare.coco import map_categories
from allspark.prepare.voc import make_sbd_mask
from allspark.split_lists.layouts import voc_lists
from allspark.utils.errors import UserError
from helpers import REPO, SHARED
from helpers import archives as mini

TRAIN, VAL = ["2007_000032", "2007_000039"], ["2007_000033"]
SBD_TRAIN, SBD_VAL = ["2008_000003", "2007_000033", "2007_000032"], ["2008_000002"]


def prepare(name, *words):
    main(["prepare", name, "--workers", "1", *map(str, words)])


def write_list(path, *pairs):
    path.write_text(
        "\n".join(" ".join(pair) for pair in pairs), encoding="utf-8"
    )  # no newline at the end, as published
    return path


def files_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def voc(tmp_path):
    """The two archives; SBD labels an image of VOC's train and one of its val, too."""
    mini.write_tar(
        tmp_path / "in/VOCtrainval_11-May-2012.tar",
        mini.voc_files(TRAIN, VAL, [*SBD_TRAIN[:1], *SBD_VAL, "2009_000001"]),
    )
    mini.write_tar(tmp_path / "in/benchmark.tgz", mini.sbd_files(SBD_TRAIN, SBD_VAL))
    return tmp_path / "in"


def test_voc_and_sbd_give_augmented_set(voc, tmp_path, capsys):
    out = tmp_path / "out"
    prepare("voc", "--from", voc, "--out", out, "--allow-partial")
    assert "train 2, val 1, train_aug 4 images; 10 files written" in capsys.readouterr().out
    source, sbd = mini.voc_files(TRAIN, VAL, [*SBD_TRAIN[:1], *SBD_VAL]), mini.sbd_files(SBD_TRAIN, SBD_VAL)
    names = {*TRAIN, *VAL, SBD_TRAIN[0], *SBD_VAL}
    assert {path.stem for path in (out / "JPEGImages").iterdir()} == names  # 2009_000001 is of no list
    for name in names:
        image = f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg"
        assert (out / f"JPEGImages/{name}.jpg").read_bytes() == source[image]
        mask = Image.open(out / f"SegmentationClass/{name}.png")
        if name in (*TRAIN, *VAL):  # VOC's own mask, although SBD has one
            expected = np.array(Image.open(io.BytesIO(source[f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"])))
            assert 255 in expected
        else:
            expected = np.array(np.random.default_rng(2).integers(0, 21, (4, 32, 40)), np.uint8)
            expected = expected[[*SBD_TRAIN, *SBD_VAL].index(name)]
        assert mask.mode == "L"
        assert np.array_equal(np.array(mask), expected), name
    assert f"benchmark_RELEASE/dataset/cls/{VAL[0]}.mat" in sbd


def test_voc_with_published_lists(voc, tmp_path):
    out = tmp_path / "out"
    prepare(
        "pascal", "--from", voc / "benchmark.tgz", voc / "VOCtrainval_11-May-2012.tar", "--out", out, "--allow-partial"
    )
    pairs = [(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in (*SBD_VAL, *VAL)]
    samples = read_list(write_list(tmp_path / "val.txt", *pairs), out)
    for image, mask, name in SegmentationDataset(samples, DATASETS["pascal"]):
        assert image.shape[1:] == mask.shape == (32, 40)
        assert name in (*SBD_VAL, *VAL)
    folder = out / "ImageSets/Segmentation"
    assert (folder / "train_aug.txt").read_text().split() == sorted([*TRAIN, SBD_TRAIN[0], *SBD_VAL])
    lists = voc_lists(out)
    assert lists["1464/labeled"] == [f"JPEGImages/{name}.jpg" for name in TRAIN]
    assert lists["val"] == [f"JPEGImages/{VAL[0]}.jpg"]
    assert len(lists["train_aug"]) == 4


def test_unpacked_folders_give_same_files(voc, tmp_path):
    prepare("voc", "--from", voc, "--out", tmp_path / "a", "--allow-partial")
    files = mini.voc_files(TRAIN, VAL, [*SBD_TRAIN[:1], *SBD_VAL, "2009_000001"])
    unpacked = mini.unpack(tmp_path / "unpacked", files | mini.sbd_files(SBD_TRAIN, SBD_VAL))
    prepare("voc", "--from", unpacked, "--out", tmp_path / "b", "--allow-partial")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_other_devkit_years_are_untouched(voc, tmp_path):
    prepare("voc", "--from", voc, "--out", tmp_path / "a", "--allow-partial")
    files = mini.voc_files(TRAIN, VAL, [*SBD_TRAIN[:1], *SBD_VAL]) | mini.sbd_files(SBD_TRAIN, SBD_VAL)
    older = {name.replace("VOC2012", "VOC2007"): b"older" for name in files if "VOC2012" in name}
    prepare("voc", "--from", mini.unpack(tmp_path / "in", files | older), "--out", tmp_path / "b", "--allow-partial")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_incomplete_voc_is_refused(voc, tmp_path):
    with pytest.raises(UserError, match=r"train 2 of 1464, val 1 of 1449, train_aug 4 of 10582.*--allow-partial"):
        prepare("voc", "--from", voc, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"train_aug 2 of 10582.*benchmark.tgz \(home"):
        prepare("voc", "--from", voc / "VOCtrainval_11-May-2012.tar", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="train.txt and val.txt not found"):
        prepare("voc", "--from", voc / "benchmark.tgz", "--out", tmp_path / "out")


@pytest.mark.skipif(not (SHARED / "splits/pascal").is_dir(), reason=f"no published lists in {SHARED} (ALLSPARK_SHARED)")
def test_train_aug_definition():
    ids = {
        name: [Path(s.image).stem for s in read_list(SHARED / f"splits/pascal/{name}.txt", Path())]
        for name in ("1464/labeled", "val", "train_aug")
    }
    only_sbd = set(ids["train_aug"]) - set(ids["1464/labeled"])
    sbd = {"train": [*only_sbd, *ids["val"][::2]], "val": ids["1464/labeled"][::3]}
    texts = {("voc list", "train"): mini.lines(ids["1464/labeled"]), ("voc list", "val"): mini.lines(ids["val"])}
    texts |= {("sbd list", split): mini.lines(names) for split, names in sbd.items()}
    index = Index({key: Found(Path("x"), "", 0, None) for key in texts}, texts)
    samples = PLANS["voc"].samples(index, False)
    assert {split: len(listed) for split, listed in samples.items()} == PLANS["voc"].counts
    assert [Path(sample[0].target).stem for sample in samples["train_aug"]] == ids["train_aug"]
    kinds = Counter(sample[1].source[0] for sample in samples["train_aug"])
    assert kinds == {"mask": 1464, "sbd": 9118}


def test_bad_masks_then_second_run(tmp_path):
    masks = {TRAIN[0]: np.full((32, 40), 77, np.uint8)}
    masks[TRAIN[0]][:, 4:] = 255
    files = mini.voc_files(TRAIN, VAL, SBD_VAL, masks)
    files[f"VOCdevkit/VOC2012/SegmentationClass/{VAL[0]}.png"] = mini.picture(0, form="PNG")  # colors, no indices
    sbd = mini.sbd_files([], SBD_VAL)
    good = dict(sbd)
    sbd[f"benchmark_RELEASE/dataset/cls/{SBD_VAL[0]}.mat"] = b"MATLAB 5.0" * 20
    mini.write_tar(tmp_path / "VOCtrainval_11-May-2012.tar", files)
    mini.write_tar(tmp_path / "benchmark.tgz", sbd)
    words = ("--from", tmp_path, "--out", tmp_path / "out", "--allow-partial")
    with pytest.raises(UserError, match=rf"{TRAIN[0]}.png: unexpected mask values 77 \(128 pixels\).*and 2 more of 8"):
        prepare("voc", *words)
    mini.write_tar(tmp_path / "benchmark.tgz", good)
    with pytest.raises(UserError, match=rf"{VAL[0]}.png: expected a mask of 8-bit indices, found RGB"):
        prepare("voc", *words, "--ignore-unknown")
    mask = read_mask(tmp_path / f"out/SegmentationClass/{TRAIN[0]}.png", DATASETS["pascal"])
    assert (mask == IGNORE_INDEX).all()
    mini.write_tar(tmp_path / "VOCtrainval_11-May-2012.tar", mini.voc_files(TRAIN, VAL, SBD_VAL))
    prepare("voc", *words)
    assert len(list((tmp_path / "out/SegmentationClass").iterdir())) == 4


CITY = {
    "train": ["aachen_000000_000019", "jena_000078_000019"],
    "val": ["frankfurt_000001_062250"],
    "test": ["berlin_000000_000019"],
}

# cityscapesscripts, helpers/labels.py
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
TRAIN_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


def test_cityscapes_train_ids(tmp_path, capsys):
    archives = mini.city_files(CITY)
    for name, files in archives.items():
        mini.write_zip(tmp_path / "in" / name, files)
    out = tmp_path / "out"
    prepare("cityscapes", "--from", tmp_path / "in", "--out", out, "--allow-partial")
    assert "train 2, val 1, test 1 images; 10 files written" in capsys.readouterr().out
    pair = ["leftImg8bit/{}_leftImg8bit.png", "gtFine/{}_gtFine_labelTrainIds.png"]
    places = [f"{split}/{name.split('_')[0]}/{name}" for split in ("train", "val") for name in CITY[split]]
    listed = write_list(tmp_path / "l.txt", *([part.format(place) for part in pair] for place in places))
    raw = DATASETS["cityscapes_labelids"]
    for place, sample, raw_sample in zip(places, read_list(listed, out), read_list(listed, out, raw.mask_path)):
        image, mask = read_pair(sample, DATASETS["cityscapes"])
        stored = np.array(
            Image.open(io.BytesIO(archives["gtFine_trainvaltest.zip"][f"gtFine/{place}_gtFine_labelIds.png"]))
        )
        assert {0, 33, 255} <= set(stored.ravel())
        assert np.array_equal(mask, np.array([TRAIN_IDS.get(value, 255) for value in range(256)])[stored])
        assert np.array_equal(mask, read_pair(raw_sample, raw)[1])
    assert [path.name for path in (out / "leftImg8bit/test").rglob("*.png")] == ["berlin_000000_000019_leftImg8bit.png"]
    assert not (out / "gtFine/test").exists()


def test_cityscapes_in_place(tmp_path):
    """An unpacked tree gets its labelTrainIds; nothing else in it is touched."""
    root = mini.unpack(
        tmp_path / "cityscapes", {k: v for files in mini.city_files(CITY).values() for k, v in files.items()}
    )
    before = files_of(root)
    prepare("cityscapes", "--out", root, "--allow-partial")
    after = files_of(root)
    assert {name: after[name] for name in before} == before
    assert sorted(Path(name).name for name in after.keys() - before.keys()) == sorted(
        f"{name}_gtFine_labelTrainIds.png" for split in ("train", "val") for name in CITY[split]
    )
    with pytest.raises(UserError, match="train 2 of 2975, val 1 of 500, test 1 of 1525"):
        prepare("cityscapes", "--out", root)


def test_cityscapes_unknown_label(tmp_path):
    mask = np.zeros((32, 40), np.uint8)
    mask[0, :3] = 40
    for name, files in mini.city_files(CITY, {CITY["val"][0]: mask}).items():
        mini.write_zip(tmp_path / name, files)
    with pytest.raises(
        UserError, match=r"frankfurt_000001_062250_gtFine_labelIds.png: unexpected mask values 40 \(3 pixels\)"
    ):
        prepare("cityscapes", "--from", tmp_path, "--out", tmp_path / "out", "--allow-partial")


def write_coco(folder, train, val=((), ())):
    for name, files in mini.coco_files(train, val).items():
        mini.write_zip(folder / name, files)
    return folder


@pytest.fixture
def coco():
    return pytest.importorskip("pycocotools", reason="prepare coco needs pycocotools: pip install pycocotools")


def test_coco_masks(coco, tmp_path):
    crowd = np.zeros((48, 64), bool)
    crowd[30:40, 10:60] = True
    annotations = [
        (391895, 18, mini.polygon(12, 12, 20, 20), 0),  # dog, the smaller: on top, although it comes first
        (391895, 90, mini.polygon(10, 10, 40, 40), 0),  # toothbrush
        (391895, 1, mini.runs(crowd), 1),
        (391895, 13, [[1, 1, 3, 1]], 0),  # two points enclose nothing
        (25, 13, mini.polygon(0, 0, 4, 4) + mini.polygon(6, 6, 8, 8), 0),  # stop sign, two parts
    ]
    train = ([(391895, 64, 48), (25, 40, 32), (30, 40, 32)], annotations)
    source = write_coco(tmp_path / "in", train, ([(139, 40, 32)], [(139, 44, mini.polygon(1, 2, 3, 4), 0)]))
    out = tmp_path / "out"
    prepare("coco", "--from", source, "--out", out, "--allow-partial")
    expected = np.zeros((48, 64), np.uint8)
    expected[30:40, 10:60] = 255
    expected[10:40, 10:40] = 80  # on the crowd, too
    expected[12:20, 12:20] = 17
    pairs = [
        ("train2017/000000391895.jpg", "masks/000000391895.png"),
        ("train2017/000000000030.jpg", "masks/000000000030.png"),
    ]
    samples = read_list(
        write_list(tmp_path / "l.txt", *pairs, ("val2017/000000000139.jpg", "masks/000000000139.png")), out
    )
    masks = [read_pair(sample, DATASETS["coco"])[1] for sample in samples]
    assert np.array_equal(masks[0], expected)
    assert masks[1].shape == (32, 40)
    assert not masks[1].any()
    assert set(masks[2].ravel()) == {0, 40}
    assert DATASETS["coco"].classes[40] == "bottle"
    parts = np.array(Image.open(out / "masks/000000000025.png"))
    assert (parts[:4, :4] == 12).all()
    assert (parts[6:8, 6:8] == 12).all()
    assert (parts > 0).sum() == 20


def test_coco_contiguous_ids():
    content = mini.coco_json([], [])
    by_id = {category["id"]: category["name"] for category in content["categories"]}
    assert by_id[90] == "toothbrush"
    assert by_id[13] == "stop sign"
    assert by_id[44] == "bottle"
    mapping = map_categories(content["categories"][::-1], "x.json")
    assert sorted(mapping.values()) == list(range(1, 81))
    assert (mapping[1], mapping[11], mapping[13], mapping[90]) == (1, 11, 12, 80)
    content["categories"][3]["name"] = "aeroplane"
    with pytest.raises(UserError, match=r"x.json: category number 4 is 'aeroplane', expected 'motorcycle'"):
        map_categories(content["categories"], "x.json")


def test_coco_unknown_category(coco, tmp_path):
    bad = [(25, 1, mini.polygon(0, 0, 4, 4), 0), (25, 12, mini.polygon(5, 5, 9, 9), 0), (25, 12, [], 0)]
    source, out = write_coco(tmp_path / "in", ([(25, 40, 32)], bad)), tmp_path / "out"
    words = ("--from", source, "--out", out, "--allow-partial")
    with pytest.raises(
        UserError, match=r"instances_train2017.json: unknown category 12 \(2 annotations\), first in annotation 901"
    ):
        prepare("coco", *words)
    assert not out.exists()
    prepare("coco", *words, "--ignore-unknown")
    mask = read_mask(out / "masks/000000000025.png", DATASETS["coco"])
    assert set(mask[5:9, 5:9].ravel()) == {255}
    assert set(mask[:4, :4].ravel()) == {1}
    write_coco(source, ([(25, 40, 32)], bad[:1]))
    prepare("coco", *words, "--force")
    assert set(read_mask(out / "masks/000000000025.png", DATASETS["coco"]).ravel()) == {0, 1}


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[0, 0, 1e9, 0, 4, 4]], "far outside"),
        ([[0, 0, float("nan"), 0, 4, 4]], "far outside"),
        ([[0, 0, 4, 0, 4, 4, 4]], "odd"),
        ({"size": [32, 40], "counts": [10, 5]}, "run lengths of 15 pixels"),
        ({"size": [40, 32], "counts": [1280]}, "another size"),
        ({"size": [32, 40], "counts": [1290, -10]}, "negative ones"),
        ({"size": [32, 40], "counts": "0]"}, "run lengths of"),
        ({"size": [32, 40], "counts": "ooooooooooooooooo0"}, "damaged run lengths"),
        ("polygon", "string indices"),
    ],
)
def test_coco_bad_segmentation(coco, tmp_path, segmentation, reason):
    source = write_coco(tmp_path / "in", ([(25, 40, 32)], [(25, 1, segmentation, 0)]))
    with pytest.raises(UserError, match=f"annotation 900: not a segmentation of a 40 x 32 image.*{reason}"):
        prepare("coco", "--from", source, "--out", tmp_path / "out", "--allow-partial")


def test_coco_bad_json(coco, tmp_path):
    source = write_coco(tmp_path / "in", ([(25, 40, 32)], []))
    for text, reason in (
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("9" * 10_000, "ValueError"),
        ('{"categories": []}', "category number 1 is 'none'"),
    ):
        mini.write_zip(source / "annotations_trainval2017.zip", {"annotations/instances_train2017.json": text})
        with pytest.raises(
            UserError, match=f"instances_train2017.json.*{reason}.*download annotations_trainval2017.zip again"
        ):
            prepare("coco", "--from", source, "--out", tmp_path / "out", "--allow-partial")


def test_coco_without_pycocotools(tmp_path):
    source = write_coco(tmp_path / "in", ([(25, 40, 32)], []))
    code = (
        "import sys; sys.modules['pycocotools'] = None\n"  # as if it were not installed
        "from allspark.__main__ import main; from allspark.utils.errors import run_main; sys.exit(run_main(main))"
    )
    words = [sys.executable, "-c", code, "prepare", "coco", "--from", source, "--out", tmp_path / "out"]
    result = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install pycocotools" in result.stderr
    assert "Traceback" not in result.stderr


def test_camvid_splits_equal_tutorial():
    names = mini.camvid_names(REPO)
    assert {split: len(listed) for split, listed in names.items()} == PLANS["camvid"].counts
    for split, listed in names.items():
        assert {split_of(name) for name in listed} == {split}


@pytest.mark.parametrize(
    ("path", "is_source"),
    [
        ("CamVid/train/0001TP_006690.png", True),
        ("camvid_images/train/0001TP_006690.png", True),
        ("images/train/0001TP_006690.png", False),  # of a prepared data set
        ("data/labels/train/0001TP_006690.png", False),
    ],
)
def test_camvid_sources(path, is_source):
    assert any(kind.key(path) for kind in PLANS["camvid"].kinds) == is_source


# CamVid's label_colors.txt and the grouping, in another order than in the code: class of the 11 -> colors
GROUPS = {
    "Sky": [(128, 128, 128)],
    "Building": [(0, 128, 64), (128, 0, 0), (64, 192, 0), (64, 0, 64), (192, 0, 128)],
    "Pole": [(192, 192, 128), (0, 0, 64)],
    "Road": [(128, 64, 128), (128, 0, 192), (192, 0, 64)],
    "Pavement": [(0, 0, 192), (64, 192, 128), (128, 128, 192)],
    "Tree": [(128, 128, 0), (192, 192, 0)],
    "SignSymbol": [(192, 128, 128), (128, 128, 64), (0, 64, 64)],
    "Fence": [(64, 64, 128)],
    "Car": [(64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)],
    "Pedestrian": [(64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)],
    "Bicyclist": [(0, 128, 192), (192, 0, 192)],
    None: [(0, 0, 0)],
}


def color_files(names, labels):
    """The two original archives; labels: colors (H, W, 3) of every frame."""
    frames = {
        f"701_StillsRaw_full/{name}.png": mini.picture(seed, (960, 720), "PNG") for seed, name in enumerate(names)
    }
    return frames, {f"{name}_L.png": mini.encode(Image.fromarray(labels)) for name in names}


def test_camvid_original_colors(tmp_path):
    colors = [(color, group) for group, listed in GROUPS.items() for color in listed]
    assert len({color for color, _ in colors}) == 32
    colors = [colors[number * 13 % 32] for number in range(32)]  # neighbors far apart, so that no mean goes unseen
    stripes = np.repeat(np.array([color for color, _ in colors], np.uint8), 30, axis=0)  # 960 columns
    names = ["0016E5_00390", "0016E5_07959", "Seq05VD_f00000"]
    frames, labels = color_files(names, np.broadcast_to(stripes, (720, 960, 3)).copy())
    mini.write_zip(tmp_path / "in/701_StillsRaw_full.zip", frames)
    mini.write_zip(tmp_path / "in/LabeledApproved_full.zip", labels)
    out = tmp_path / "out"
    prepare("camvid", "--from", tmp_path / "in", "--out", out, "--allow-partial")
    pairs = [(f"images/{s}/{n}.jpg", f"labels/{s}/{n}.png") for s, n in zip(("train", "val", "test"), names)]
    for sample in read_list(write_list(tmp_path / "l.txt", *pairs), out):
        image, mask = read_pair(sample, DATASETS["camvid"])
        assert image.shape == (360, 480, 3)
        expected = [255 if group is None else camvid.CLASSES.index(group) for _, group in colors]
        assert np.array_equal(mask, np.broadcast_to(np.repeat(np.array(expected), 15), (360, 480)))
        assert set(np.array(Image.open(sample.mask)).ravel()) == set(range(12))
    # the picture is the original's at half the size: its mean stays
    original = np.array(Image.open(io.BytesIO(frames["701_StillsRaw_full/0016E5_00390.png"])))
    assert np.allclose(np.array(Image.open(out / "images/train/0016E5_00390.jpg")).mean(), original.mean(), atol=1)


def test_camvid_unexpected_color(tmp_path):
    labels = np.zeros((720, 960, 3), np.uint8)
    labels[:10, :10] = (1, 2, 3)
    labels[0, :2] = (64, 0, 1)
    frames, masks = color_files(["0016E5_00390"], labels)
    mini.unpack(tmp_path / "in", frames | masks)
    words = ("--from", tmp_path / "in", "--out", tmp_path / "out", "--allow-partial")
    with pytest.raises(
        UserError, match=r"00390_L.png: unexpected colors \(1, 2, 3\) \(98 pixels\), \(64, 0, 1\) \(2 pixels\)"
    ):
        prepare("camvid", *words)
    prepare("camvid", *words, "--ignore-unknown")
    assert set(np.array(Image.open(tmp_path / "out/labels/train/0016E5_00390.png")).ravel()) == {11}


def test_oversized_label_file():
    """80 kB that hold 81 MB: refused before they do."""
    buffer = io.BytesIO()
    big = {"GTcls": {"Segmentation": np.zeros((9000, 9000), np.uint8)}}
    scipy.io.savemat(buffer, big, do_compression=True)
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(UserError, match=r"a\.mat: not a label file of SBD \(it unpacks to more than 64 MB\)"):
        make_sbd_mask(buffer.getvalue(), "a.mat", False)
