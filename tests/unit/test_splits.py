"""Lists and folders, messages for wrong ones, the data check, and making new splits."""

import argparse
import hashlib
import itertools
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from allspark.arguments import parse
from allspark.cli import splits as verb
from allspark.config import CustomDataConfig, DataConfig
from allspark.data.audit import preflight
from allspark.data.datasets import DATASETS, shapes, spec_for
from allspark.data.entries import Entry, read_entries, read_list
from allspark.data.spec import Sample
from allspark.data.splits import SPLITS_ROOT, describe_lists, find_data, hash_samples, list_hash, resolve
from allspark.split_lists.make_splits import balanced_order, hold_out, list_line, make_splits, parse_sizes
from allspark.utils.errors import UserError
from helpers import SHARED

CUSTOM = CustomDataConfig(classes=("a", "b", "c"))


def write_images(root: Path, folder: str, count: int, masks: str | None = None) -> list[str]:
    """`count` images of 48 x 40 and, below `masks`, masks that hold class 0 and, in every third image, 1 and 2."""
    for name in filter(None, (folder, masks)):
        (root / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        Image.fromarray(np.full((40, 48, 3), index, np.uint8)).save(root / folder / f"{index:03}.jpg")
        line = f"{folder}/{index:03}.jpg"
        if masks:
            mask = np.zeros((40, 48), np.uint8)
            mask[:2] = index % 3
            Image.fromarray(mask).save(root / masks / f"{index:03}.png")
            line += f" {masks}/{index:03}.png"
        lines.append(line)
    return lines


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Data set `mine`: a split with 6 labeled, 9 unlabeled and 4 val images under <tmp>/splits."""
    train = write_images(tmp_path / "data", "train", 15, "train_masks")
    val = write_images(tmp_path / "data", "val", 4, "val_masks")
    (tmp_path / "splits" / "mine" / "few").mkdir(parents=True)
    lists = {"few/labeled": train[:6], "few/unlabeled": train[6:], "val": val}
    for name, lines in lists.items():
        (tmp_path / "splits" / "mine" / f"{name}.txt").write_text("\n".join(lines))
    return DataConfig(dataset="mine", data_root=str(tmp_path / "data"), crop_size=64, split="few", custom=CUSTOM)


def edit(tmp_path: Path, name: str, line: int, text: str) -> Path:
    path = tmp_path / "splits" / "mine" / name
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines))
    return path


def check(data: DataConfig, tmp_path: Path) -> list[str]:
    return preflight(data, spec_for(data), resolve(data, tmp_path / "splits"))


def test_read_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa/1.jpg m/1.png\r\n\r\nb/2.jpg \r\nwith blank.jpg\tits mask.png".encode())
    first, second, third = read_list(path, Path("root"))
    assert first == Sample(Path("root/a/1.jpg"), Path("root/m/1.png"))
    assert second == Sample(Path("root/b/2.jpg"))
    assert third == Sample(Path("root/with blank.jpg"), Path("root/its mask.png"))

    path.write_text("a b\na b c\n")
    with pytest.raises(UserError, match=r"list.txt line 2: 3 columns.*tab"):
        read_list(path, Path("root"))


@pytest.mark.parametrize("mask", [None, "m/a b.png", "m/a.png", "m/a\u2028b.png"])
@pytest.mark.parametrize("image", ["with  two blanks.jpg", "no_blank.jpg", "a\u3000wide\xa0or\x85other.jpg"])
def test_line_round_trip(tmp_path, image, mask):
    sample = Sample(tmp_path / image, tmp_path / mask if mask else None)
    (tmp_path / "list.txt").write_text(f"{list_line(sample, tmp_path)}\n", encoding="utf-8")
    assert read_list(tmp_path / "list.txt", tmp_path) == [sample]


def test_counts_without_final_newline():
    path = SHARED / "splits" / "camvid" / "1_8_anchor" / "labeled.txt"
    if not path.is_file():
        pytest.skip(f"{path} is absent: no published lists beside the project")
    assert len(read_list(path, Path())) == 46
    assert len(read_list(SHARED / "splits" / "pascal" / "92" / "labeled.txt", Path())) == 92
    spec = DATASETS["cityscapes_labelids"]
    sample = read_list(SHARED / "splits" / "cityscapes" / "1_30" / "labeled.txt", Path(), spec.mask_path)[0]
    assert sample.mask.name.endswith("_gtFine_labelIds.png")


def test_hash_of_normalized_image_column(tmp_path):
    expected = hashlib.sha256(b"a.jpg\nb.jpg\n").hexdigest()
    assert list_hash(["a.jpg", "b.jpg"]) == expected != list_hash(["b.jpg", "a.jpg"])
    for text in ("a.jpg m.png\nb.jpg n.png", "a.jpg\r\nb.jpg \r\n\r\n", "a.jpg\tx\nb.jpg\ty\n"):
        (tmp_path / "l.txt").write_bytes(text.encode())
        assert hash_samples(read_list(tmp_path / "l.txt", tmp_path), tmp_path) == expected


def test_resolve_split(data, tmp_path):
    lists = resolve(data, tmp_path / "splits")
    assert (len(lists.labeled), len(lists.unlabeled), len(lists.val), lists.name) == (6, 9, 4, "few")
    assert all(sample.mask is None for sample in lists.unlabeled)
    assert all(sample.mask.is_file() for sample in (*lists.labeled, *lists.val))
    moved = tmp_path / "elsewhere"
    (tmp_path / "data").rename(moved)
    again = resolve(replace(data, data_root=str(moved)), tmp_path / "splits")
    assert again.hash == lists.hash and again.labeled != lists.labeled
    edit(tmp_path, "few/unlabeled.txt", 1, "train/000.jpg")
    assert resolve(replace(data, data_root=str(moved)), tmp_path / "splits").hash != lists.hash


def test_lists_by_path_override_split(data, tmp_path):
    (tmp_path / "own.txt").write_text("train/001.jpg train_masks/001.png\n")
    own = str(tmp_path / "own.txt")
    twice = replace(data, labeled_id_path=own, val_id_path=own)
    with pytest.raises(UserError, match="1 of 1 val images are also labeled images, such as .*allow_overlap"):
        resolve(twice, tmp_path / "splits")
    (tmp_path / "val.txt").write_text("../data/train/001.jpg ../data/train_masks/001.png\n")
    with pytest.raises(UserError, match="1 of 1 val images are also labeled images"):  # however a path is written
        resolve(replace(twice, val_id_path=str(tmp_path / "val.txt")), tmp_path / "splits")
    problems = []
    resolve(twice, tmp_path / "splits", problems)
    assert len(problems) == 1 and "also labeled images" in problems[0]
    lists = resolve(replace(twice, allow_overlap=True), tmp_path / "splits")
    assert (len(lists.labeled), len(lists.unlabeled), len(lists.val), lists.name) == (1, 9, 1, own)
    lists = resolve(replace(data, split="gone", labeled_id_path=own, unlabeled_id_path=own), tmp_path / "splits")
    assert len(lists.unlabeled) == 1 and lists.unlabeled[0].mask is None


def test_custom_dataset_folders(data, tmp_path):
    folders = replace(
        CUSTOM,
        labeled_images="train",
        labeled_masks="train_masks",
        unlabeled_images="extra",
        val_images="val",
        val_masks="val_masks",
    )
    write_images(tmp_path / "data", "extra/b", 2)
    write_images(tmp_path / "data", "extra/a", 1)
    (tmp_path / "data" / "extra" / "notes.txt").write_text("no image")
    data = replace(data, split=None, custom=folders)
    lists = resolve(data, tmp_path / "nowhere")
    assert (len(lists.labeled), len(lists.val), lists.name) == (15, 4, "folders")
    names = [sample.image.relative_to(tmp_path / "data" / "extra").as_posix() for sample in lists.unlabeled]
    assert names == ["a/000.jpg", "b/000.jpg", "b/001.jpg"]
    (tmp_path / "data" / "train_masks" / "004.png").unlink()
    with pytest.raises(UserError, match=r"train_masks/004.png does not exist \(1 of 41 files"):
        resolve(data, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no/such: no such folder"):
        resolve(replace(data, custom=replace(folders, labeled_images="no/such")), tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"000.jpg has no mask.*data.custom"):
        resolve(replace(data, custom=replace(folders, labeled_masks=None)), tmp_path / "nowhere")


def test_missing_split(data, tmp_path):
    with pytest.raises(UserError) as caught:
        resolve(replace(data, split="1_8"), tmp_path / "splits")
    message = str(caught.value)
    assert str(tmp_path / "splits" / "mine" / "1_8" / "labeled.txt") in message and "splits of mine: few" in message
    assert "python -m allspark splits make --config FILE" in message and "--sizes 1_8" in message


def test_missing_published_list(tmp_path):
    for name, split in (("pascal", "1_8"), ("cityscapes_labelids", "1_30")):
        data, folder = DataConfig(dataset=name, data_root=str(tmp_path), crop_size=64, split=split), name.split("_")[0]
        command = f"python -m allspark splits fetch --dataset {folder} --split"
        with pytest.raises(UserError, match=rf"{folder}/{split}/labeled.txt does not exist.*{command} {split}"):
            resolve(data, tmp_path / "splits")
        own = tmp_path / "own.txt"
        own.write_text("")
        data = replace(data, labeled_id_path=str(own), unlabeled_id_path=str(own))
        with pytest.raises(UserError, match=rf"{folder}/val.txt does not exist.*{command} val"):
            resolve(data, tmp_path / "splits")
    (tmp_path / "splits" / "coco" / "1_512").mkdir(parents=True)
    (tmp_path / "splits" / "coco" / "1_512" / "labeled.txt").write_text("")
    data = DataConfig(dataset="coco", data_root=str(tmp_path), crop_size=64, split="1_512")
    with pytest.raises(UserError, match=r"1_512/unlabeled.txt.*splits fetch.*1_512.*splits build --dataset coco"):
        resolve(data, tmp_path / "splits")


def test_run_names_origin_of_lists(data, tmp_path):
    lists = resolve(data, tmp_path / "splits")
    labeled = list_hash(f"train/{i:03}.jpg" for i in range(6))
    assert lists.split == {"name": "few", "sha256": lists.hash, **lists.hashes} and lists.hashes["labeled"] == labeled
    assert lists.hashes["val"] == list_hash(f"val/{i:03}.jpg" for i in range(4))
    note = describe_lists(lists)
    assert note.startswith(f"split few: labeled list sha256 {labeled[:12]} (not published), val list sha256 ")
    clash = "WARNING: split 1_8 has the name of shapes/1_8"
    shapes = replace(spec_for(data), split_folder="shapes")
    assert not any(line.startswith(clash) for line in preflight(data, shapes, lists))
    assert any(line.startswith(clash) for line in preflight(data, shapes, replace(lists, name="1_8")))
    lists = resolve(DataConfig(dataset="shapes", data_root="data/shapes", crop_size=64, split="1_8"))
    assert "(= shapes/1_8 of this project)" in describe_lists(lists)


def test_missing_root(data, tmp_path):
    with pytest.raises(UserError, match=r"data_root: .*gone is not a folder.*ALLSPARK_DATA_MINE"):
        resolve(replace(data, data_root=str(tmp_path / "gone")), tmp_path / "splits")


def test_missing_lists_are_named(data, tmp_path):
    with pytest.raises(UserError, match=r"nope.txt: this list does not exist.*data.labeled_id_path"):
        resolve(replace(data, labeled_id_path="nope.txt"), tmp_path / "splits")
    with pytest.raises(UserError, match=r"no labeled images: set data.split \(--split NAME; splits of mine: few\)"):
        resolve(replace(data, split=None), tmp_path / "splits")
    (tmp_path / "splits" / "mine" / "val.txt").unlink()
    with pytest.raises(UserError, match=r"no validation images: .*mine/val.txt does not exist.*val_images"):
        resolve(data, tmp_path / "splits")


@pytest.mark.parametrize("name", ["few/labeled.txt", "few/unlabeled.txt", "val.txt"])
def test_listed_file_is_missing(data, tmp_path, name):
    path = edit(tmp_path, name, 3, "train/gone.jpg train_masks/001.png")
    with pytest.raises(UserError, match=rf"{path} line 3: .*train/gone.jpg does not exist \(1 of 29 files"):
        resolve(data, tmp_path / "splits")


def test_labeled_line_without_mask(data, tmp_path):
    edit(tmp_path, "few/labeled.txt", 2, "train/001.jpg")
    with pytest.raises(UserError, match=r"labeled.txt line 2: .*001.jpg has no mask"):
        resolve(data, tmp_path / "splits")


def test_masks_of_unlabeled_are_ignored(data, tmp_path):
    for index in range(6, 10):
        (tmp_path / "data" / "train_masks" / f"{index:03}.png").write_bytes(b"not a mask")
    for index in range(10, 15):
        (tmp_path / "data" / "train_masks" / f"{index:03}.png").unlink()
    assert "9 unlabeled" in check(data, tmp_path)[0]


def test_generated_datasets_are_created(tmp_path):
    spec = replace(DATASETS["shapes"], prepare=partial(shapes.generate, counts={"train": 1, "val": 1}))
    data = DataConfig(dataset="shapes", data_root=str(tmp_path / "new"), crop_size=64)
    assert find_data(data, spec) == tmp_path / "new"
    assert (tmp_path / "new" / "images" / "val" / "0000.png").is_file()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("not the data set")
    with pytest.raises(UserError, match="another data_root"):  # and a folder that holds something else is left alone
        find_data(replace(data, data_root=str(tmp_path / "there")), spec)
    assert (tmp_path / "there" / "mine.txt").is_file()


def test_check_warnings(data, tmp_path):
    notes = check(data, tmp_path)
    assert len(notes) == 1 and "6 labeled, 9 unlabeled, 4 val images" in notes[0]
    edit(tmp_path, "few/unlabeled.txt", 1, "train/000.jpg")
    edit(tmp_path, "few/unlabeled.txt", 2, "val/000.jpg")
    edit(tmp_path, "few/unlabeled.txt", 3, "val/000.jpg")
    notes = check(replace(data, custom=replace(CUSTOM, classes=("a", "b", "c", "d"))), tmp_path)[1:]
    assert "none of the labeled images: d" in notes[0]
    assert "1 images occur more than once in the unlabeled list" in notes[1]
    assert "both labeled and unlabeled, such as" in notes[2] and notes[2].endswith("train/000.jpg")
    assert notes[3].startswith("WARNING: 1 images are both unlabeled and val") and len(notes) == 4


def test_mask_of_two_images(data, tmp_path):
    edit(tmp_path, "few/labeled.txt", 1, "train/000.jpg train_masks/001.png")
    edit(tmp_path, "few/labeled.txt", 2, "train/001.jpg train_masks/001.png")
    (warning,) = (note for note in check(data, tmp_path) if "are those of several images" in note)
    assert "1 masks are" in warning and "001.png of " in warning and "000.jpg and" in warning


@pytest.mark.parametrize("folder", ["train", "val"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((40, 48), 7, np.uint8), r"001.png: illegal mask values 7 \(1920 pixels\)"),
        (np.zeros((40, 48, 3), np.uint8), r"001.png: masks must hold class indices.*found RGB"),
        (np.zeros((48, 40), np.uint8), r"001.jpg is 48 x 40, .*001.png is 40 x 48"),
    ],
)
def test_check_refuses_masks(data, tmp_path, folder, mask, message):
    Image.fromarray(mask).save(tmp_path / "data" / f"{folder}_masks" / "001.png")
    with pytest.raises(UserError, match=message):
        check(data, tmp_path)


@pytest.mark.parametrize("name", ["train/002.jpg", "train/010.jpg", "val/002.jpg", "val_masks/003.png"])
def test_check_refuses_damaged_files(data, tmp_path, name):
    path = tmp_path / "data" / name
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(UserError, match=f"{name}: truncated"):
        check(data, tmp_path)


def test_check_counts_failures(data, tmp_path):
    for index in (1, 3):
        (tmp_path / "data" / "train" / f"{index:03}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"001.jpg: truncated.*1 more files"):
        check(data, tmp_path)


def test_check_refuses_fully_ignored_masks(data, tmp_path):
    for path in (tmp_path / "data" / "train_masks").glob("*.png"):
        Image.fromarray(np.full((40, 48), 255, np.uint8)).save(path)
    with pytest.raises(UserError, match="no pixel of the labeled masks"):
        check(data, tmp_path)


def test_balanced_order():
    """Class 0 is everywhere, 1 in a fifth, 2 in one of 40 images: a random draw of 10 would mostly miss it."""
    shares = np.zeros((200, 3))
    shares[:, 0], shares[::5, 1], shares[3::40, 2] = 0.8, 0.1, 0.01
    drawn = balanced_order(shares, 50, seed=0)
    assert len(set(drawn)) == 50 and drawn == balanced_order(shares, 50, seed=0) != balanced_order(shares, 50, seed=1)
    assert drawn[:20] == balanced_order(shares, 20, seed=0)
    for length in (3, 10):
        shown = (shares[drawn[:length]] > 0).sum(0)
        assert shown[2] >= length // 3 and abs(shown[1] - shown[2]) <= 1
    assert len(balanced_order(shares, 200, seed=0)) == 200


def test_balanced_order_uses_specks_last():
    shares = np.tile([0.9, 0.0, 0.0], (50, 1))
    shares[:25, 1], shares[25:30, 1], shares[40, 2] = 1e-5, 0.05, 1e-5
    drawn = balanced_order(shares, 5, seed=0)
    assert 40 in drawn and len({25, 26, 27, 28, 29} & set(drawn)) >= 2


def test_images_without_class_come_last():
    shares = np.array([[0.0], [1.0], [0.0], [1.0]])
    assert set(balanced_order(shares, 2, seed=0)) == {1, 3} and len(balanced_order(shares, 4, seed=0)) == 4


def test_splits_partition_the_list(data, tmp_path):
    lines = [f"train/{i:03}.jpg train_masks/{i:03}.png" for i in range(15)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    entries = read_entries(tmp_path / "train.txt", tmp_path / "data")
    splits = make_splits(entries, spec_for(data), {"1_3": 5, "9": 9}, seed=0)
    small, large = splits["1_3"][0], splits["9"][0]
    assert len(small) == 5 and small == large[:5]
    for labeled, unlabeled in splits.values():
        assert sorted(e.source for e in (*labeled, *unlabeled)) == sorted(e.source for e in entries)
        assert unlabeled == [entry for entry in entries if entry not in labeled]
    for size in (0, 16):
        with pytest.raises(UserError, match=rf"split x: {size} labeled of 15 images; give 1..15"):
            make_splits(entries, spec_for(data), {"x": size}, seed=0)
    everything = make_splits(entries, spec_for(data), {"x": 15}, seed=0)["x"]  # for supervised training
    assert len(everything[0]) == 15 and everything[1] == []


@pytest.mark.parametrize("seed", range(6))
def test_group_that_is_too_large_is_not_held_out(seed):
    """80 and 20 images, 20 are wanted: the 20, whichever is drawn first."""
    entries = [Entry(Sample(Path(f"{'a' if i < 80 else 'b'}/{i}.jpg")), "list") for i in range(100)]
    val, rest = hold_out(entries, 20, seed, group=lambda entry: entry.sample.image.parent.name)
    assert (len(val), len(rest)) == (20, 80)


def test_sizes_round_as_published():
    assert parse_sizes("1_16,1_8,1_4, 1_2,32", 367) == {"1_16": 23, "1_8": 46, "1_4": 92, "1_2": 184, "32": 32}
    assert parse_sizes("1_30,1_16", 2975) == {"1_30": 100, "1_16": 186}
    for wrong in ("a", "1_0", "", "1/8"):
        with pytest.raises(UserError, match="--sizes"):
            parse_sizes(wrong, 100)


def run_verb(*words: str) -> None:
    verb.main(parse("splits", words))


@pytest.fixture
def make(tmp_path) -> list[str]:
    """The words that draw splits of pictures in VOC's layout (any data set without decoding would do)."""
    lines = write_images(tmp_path / "voc", "JPEGImages", 12, "SegmentationClass")
    (tmp_path / "train.txt").write_text("\n".join(lines))
    words = ["make", "--dataset", "pascal", "--data-root", str(tmp_path / "voc"), "--out", str(tmp_path / "out")]
    return [*words, "--sizes", "1_4,6", "--train"]


def test_make_writes_readable_lists(make, tmp_path, capsys):
    run_verb(*make, str(tmp_path / "train.txt"))
    assert "3 labeled, 9 unlabeled, sha256 " in capsys.readouterr().out
    out = tmp_path / "out"
    labeled = {name: read_list(out / name / "labeled.txt", tmp_path / "voc") for name in ("1_4", "6")}
    assert labeled["6"][:3] == labeled["1_4"] and all(sample.mask.is_file() for sample in labeled["6"])
    assert len(read_list(out / "1_4" / "unlabeled.txt", tmp_path / "voc")) == 9
    before = (out / "6" / "labeled.txt").read_bytes()
    assert before.endswith(b".png\n") and b"\r" not in before
    with pytest.raises(UserError, match=r"1_4/labeled.txt already exists.*--force"):
        run_verb(*make, str(tmp_path / "train.txt"), "--seed", "5")
    assert (out / "6" / "labeled.txt").read_bytes() == before
    run_verb(*make, str(tmp_path / "train.txt"), "--seed", "5", "--force")
    assert (out / "6" / "labeled.txt").read_bytes() != before


def test_make_from_folders_is_the_same_draw(make, tmp_path):
    run_verb(*make, str(tmp_path / "train.txt"))
    before = (tmp_path / "out" / "6" / "labeled.txt").read_bytes()
    run_verb(*make, "JPEGImages", "--masks", "SegmentationClass", "--force")
    assert (tmp_path / "out" / "6" / "labeled.txt").read_bytes() == before


def test_make_draws_images_not_lines(make, tmp_path, capsys):
    run_verb(*make, str(tmp_path / "train.txt"))
    drawn = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.txt")}
    lines = (tmp_path / "train.txt").read_text().splitlines()
    (tmp_path / "twice.txt").write_text("\n".join([*lines, *lines[:3]]))
    run_verb(*make, str(tmp_path / "twice.txt"), "--force")
    assert "3 repeated images are dropped" in capsys.readouterr().out
    assert drawn == {path: path.read_bytes() for path in drawn}
    (tmp_path / "twice.txt").write_text("\n".join([*lines, f"{lines[0].split()[0]} {lines[1].split()[1]}"]))
    with pytest.raises(UserError, match=r"twice\.txt line 13: .* has another mask in .*twice\.txt line 1; "):
        run_verb(*make, str(tmp_path / "twice.txt"), "--force")


def test_make_holds_out_whole_groups(tmp_path, capsys):
    """Frames of five videos; of the drawn ones no frame is left to train on, with or without a mask."""
    root = tmp_path / "voc"
    write_images(tmp_path / "made", "JPEGImages", 12, "SegmentationClass")
    for folder, suffix, count in (("JPEGImages", "jpg", 12), ("SegmentationClass", "png", 8)):
        (root / folder).mkdir(parents=True)
        for video, frame in itertools.product("abcde", range(count)):
            made = tmp_path / "made" / folder / f"{frame:03}.{suffix}"
            shutil.copy(made, root / folder / f"{video}_{frame}.{suffix}")
    words = ["make", "--dataset", "pascal", "--data-root", str(root), "--train", "JPEGImages", "--masks"]
    words += ["SegmentationClass", "--val", "1_3", "--sizes", "4", "--group", "([a-z])_[0-9]+", "--out"]
    run_verb(*words, str(tmp_path / "out"))
    assert "2 groups to evaluate on" in capsys.readouterr().out
    read = {x: read_list(tmp_path / "out" / f"{x}.txt", root) for x in ("val", "4/labeled", "4/unlabeled")}
    videos = {kind: {sample.image.name[0] for sample in samples} for kind, samples in read.items()}
    assert len(read["val"]) == 16 and len(videos["val"]) == 2  # of 40, a third is 14
    assert not videos["val"] & (videos["4/labeled"] | videos["4/unlabeled"])
    assert len(read["4/labeled"]) + len(read["4/unlabeled"]) == 3 * 12
    for pattern, told in (("(", "not a regular"), ("x", "does not match"), ("[.]jpg", "are one group")):
        with pytest.raises(UserError, match=told):
            run_verb(*words, str(tmp_path / "other"), "--group", pattern)
    assert not (tmp_path / "other").exists()


def write_frames(tmp_path):
    """A recipe, mine.yaml, and frames of three videos: with masks in photos, without in more."""
    custom = {"classes": ["a", "b"], "labeled_images": "photos", "labeled_masks": "masks", "unlabeled_images": "more"}
    data = {"dataset": "mine", "data_root": str(tmp_path), "crop_size": 64, "custom": custom}
    recipe = {"data": data, "model": {"encoder": "mit_b0"}, "method": "fixmatch", "epochs": 1}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    rng = np.random.default_rng(0)
    for folder in ("photos", "masks", "more"):
        (tmp_path / folder).mkdir()
        for video, frame in itertools.product("abc", range(4)):
            values = rng.integers(0, 2, (8, 8) if folder == "masks" else (8, 8, 3), np.uint8)
            Image.fromarray(values).save(tmp_path / folder / f"{video}_{frame + 4 * (folder == 'more')}.png")


@pytest.mark.parametrize("pattern, alike", [("^(.*)_[0-9]+", True), ("([^/]*)_[0-9]+[.]", False)])
def test_groups_in_two_folders(tmp_path, capsys, pattern, alike):
    """A pattern that matches the folder as well would leave frames of a validation video among the unlabeled ones."""
    write_frames(tmp_path)
    lists = ["--sizes", "1_1", "--out", str(tmp_path / "out")]
    run_verb("make", "--config", str(tmp_path / "mine.yaml"), "--val", "1_3", "--group", pattern, *lists)
    printed = capsys.readouterr().out
    names = ("val", "1_1/unlabeled")
    val, rest = ({s.image.name[0] for s in read_list(tmp_path / f"out/{name}.txt", tmp_path)} for name in names)
    assert ("photos/a and more/a are two groups" in printed) == bool(val & rest) == alike


def test_further_sizes_keep_the_val_list(tmp_path, capsys):
    """A later call leaves out the recipe's val images and, with --group, the rest of their videos."""
    write_frames(tmp_path)
    words = ["make", "--config", str(tmp_path / "mine.yaml"), "--group", "([^/]*)_[0-9]+[.]", "--out"]
    run_verb(*words, str(tmp_path / "out"), "--val", "1_3", "--sizes", "1_1", "--write-recipe")
    run_verb(*words, str(tmp_path / "more_lists"), "--sizes", "1_2")
    assert "4 images of the 1 groups in the val list are left out" in capsys.readouterr().out
    lists = [tmp_path / "out/val.txt", *(tmp_path / f"more_lists/1_2/{kind}.txt" for kind in ("labeled", "unlabeled"))]
    val, *rest = ({sample.image.name[0] for sample in read_list(path, tmp_path)} for path in lists)
    assert len(val) == 1 and val.isdisjoint(rest[0] | rest[1]) and len(read_list(lists[2], tmp_path)) == 2 * 8 - 4
    (tmp_path / "out/val.txt").write_text("photos/a_0.png masks/a_0.png 3\n")
    with pytest.raises(UserError, match=r"val.txt line 1"):
        run_verb(*words[:-3], "--sizes", "1_2", "--out", str(tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_make_errors(make, tmp_path):
    with pytest.raises(UserError, match="--write-recipe: needs --config"):
        run_verb(*make, "x", "--write-recipe")
    with pytest.raises(UserError, match="--group: .* add --val"):
        run_verb(*make, str(tmp_path / "train.txt"), "--group", "x")
    with pytest.raises(UserError, match="nope.txt: this list does not exist.*--train"):
        run_verb(*make, "nope.txt")
    with pytest.raises(UserError, match="'nope'"):
        run_verb("make", "--dataset", "nope", "--train", "x", "--sizes", "1_2")
    with pytest.raises(SystemExit):
        run_verb(*make, "x", "--seed", "-1")


def test_list_prints_counts_and_hashes(data, tmp_path, capsys):
    verb.show(argparse.Namespace(dataset=None), tmp_path / "splits")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert [line[:2] for line in lines] == [["mine/few/labeled", "6"], ["mine/few/unlabeled", "9"], ["mine/val", "4"]]
    assert lines[0][2] == list_hash(f"train/{i:03}.jpg" for i in range(6))[:12]
    with pytest.raises(UserError, match="no lists of other; there are mine"):
        verb.show(argparse.Namespace(dataset="other"), tmp_path / "splits")


def test_list_prints_origin_and_warnings(tmp_path, capsys):
    shutil.copytree(SPLITS_ROOT / "shapes", tmp_path / "shapes")
    (tmp_path / "shapes" / "1_8" / "labeled.txt").write_text("images/train/0001.png labels/train/0001.png\n")
    verb.show(argparse.Namespace(dataset="shapes"), tmp_path)
    out = capsys.readouterr().out
    assert "    = shapes/1_4 of this project\n" in out and "    WARNING: split 1_8 has the name of" in out
    verb.show(argparse.Namespace(dataset="cityscapes_labelids"), tmp_path)
    assert "available with `splits fetch`: cityscapes/val, cityscapes/1_30" in capsys.readouterr().out
    published = SHARED / "splits" / "pascal"
    if not published.is_dir():
        pytest.skip(f"{published} is absent: no published lists beside the project")
    shutil.copytree(published / "u2pl_1_8", tmp_path / "pascal" / "mine")
    verb.show(argparse.Namespace(dataset="pascal"), tmp_path)
    out = capsys.readouterr().out
    assert "= pascal/u2pl_1_8 of Haochen-Wang409/U2PL ab3d2be data/splits/pascal/1323 (Apache-2.0)" in out
    assert "    used by U2PL" in out and "    trap: Often set beside results on pascal/1_8" in out


def test_own_lists_use_relative_paths():
    for path in (path for name in ("camvid", "shapes") for path in (SPLITS_ROOT / name).glob("**/*.txt")):
        assert all(not sample.image.is_absolute() for sample in read_list(path, Path()))
