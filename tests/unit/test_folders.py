"""Folders and lists of one's own: which files become samples, and that what is left out is counted and named."""

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from allspark.__main__ import main
from allspark.config import CustomDataConfig, DataConfig
from allspark.data.datasets import spec_for
from allspark.data.entries import folder_entries, read_entries
from allspark.data.image_io import read_image
from allspark.data.splits import check_files, find_data, resolve
from allspark.utils.errors import UserError, run_main


@pytest.fixture
def make(tmp_path):
    """(names) writes small images with these names below the data root."""

    def write(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")

    return write


def found(root: Path, labeled="images", masks="masks", unlabeled=None, mask_suffix=".png", **data):
    """The lists of folders, with the labeled images for evaluation, too."""
    folders = dict(labeled_images=labeled, labeled_masks=masks, val_images=labeled, val_masks=masks)
    custom = CustomDataConfig(classes=("a", "b"), unlabeled_images=unlabeled, mask_suffix=mask_suffix, **folders)
    return resolve(
        DataConfig(dataset="mine", data_root=str(root), crop_size=(64, 64), allow_overlap=True, custom=custom, **data)
    )


def names(samples):
    return [sample.image.name for sample in samples]


def test_images_and_masks_in_one_folder(make, tmp_path):
    make("a.jpg", "a.png", "b.JPG", "b.png", "c.tif", "c.png")
    lists = found(tmp_path, ".", ".", ".")
    for samples in (lists.labeled, lists.unlabeled, lists.val):
        assert names(samples) == ["a.jpg", "b.JPG", "c.tif"]
    assert [sample.mask.name for sample in lists.labeled] == ["a.png", "b.png", "c.png"] and not lists.left_out
    make("d.png")
    assert "1 of 7 images are in no list, such as" in found(tmp_path, ".", ".").left_out[0]
    make("only/a.png")
    with pytest.raises(UserError, match="a.png is both"):
        found(tmp_path, "only", "only")


def test_masks_among_unlabeled_images(make, tmp_path):
    """As in exports with an image and its mask side by side in every folder."""
    make("images/a.jpg", "masks/a_mask.png", "more/b.jpg", "more/b_mask.png", "more/c.png", "more/x/d_mask.jpg")
    lists = found(tmp_path, unlabeled="more", mask_suffix="_mask.png")
    assert names(lists.unlabeled) == ["b.jpg", "c.png", "d_mask.jpg"]
    assert "more/b_mask.png" in lists.left_out[0]
    make("masks/a.png", "more/b.tif")
    assert names(found(tmp_path, unlabeled="more").unlabeled) == ["b.jpg", "b_mask.png", "c.png", "d_mask.jpg"]


@pytest.mark.parametrize("masks", ["images", "masks"])
def test_mask_suffix(make, tmp_path, masks):
    make("images/a.jpg", "images/x/b.v1.png", f"{masks}/a_mask.png", f"{masks}/x/b.v1_mask.tif")
    lists = found(tmp_path, masks=masks, mask_suffix="_mask.png")
    assert names(lists.labeled) == ["a.jpg", "b.v1.png"]
    assert [sample.mask.name for sample in lists.labeled] == ["a_mask.png", "b.v1_mask.tif"] and not lists.left_out
    make(f"{masks}/c_mask.png")
    if masks == "images":  # an image without a mask
        with pytest.raises(UserError, match=r"c_mask_mask\.png"):
            found(tmp_path, masks=masks, mask_suffix="_mask.png")
    else:
        assert "c_mask.png" in found(tmp_path, masks=masks, mask_suffix="_mask.png").left_out[0]


def test_mask_suffix_before_other_formats(make, tmp_path):
    make("images/a.jpg", "masks/a.png", "masks/a.tif")
    for suffix in (".tif", ".png"):
        assert [s.mask.name for s in found(tmp_path, mask_suffix=suffix).labeled] == [f"a{suffix}"]


def test_several_unlabeled_folders(make, tmp_path):
    make("images/a.png", "masks/a.png", "u1/b.png", "u1/notes.txt", "u2/x/c.png", "u2/b.png")
    lists = found(tmp_path, unlabeled=("u1", "u2", "u1"))
    assert names(lists.unlabeled) == ["b.png", "b.png", "c.png"]
    assert len(lists.left_out) == 1 and "u1: 1 files" in lists.left_out[0]


@pytest.mark.parametrize("line", ["images/a.png images/a.png", "images/a.png masks/a.png\nmasks/a.png masks/b.png"])
def test_list_with_a_mask_as_image(make, tmp_path, line):
    make("images/a.png", "masks/a.png", "masks/b.png")
    (tmp_path / "list.txt").write_text(line)
    with pytest.raises(UserError, match="listed as an image and as a mask"):
        found(tmp_path, labeled_id_path=str(tmp_path / "list.txt"))


@pytest.mark.parametrize("separator", [",", ";"])
def test_list_with_other_separators(make, tmp_path, separator):
    make("images/a.png", "masks/a.png")
    (tmp_path / "list.txt").write_text(f"images/a.png{separator}masks/a.png")
    with pytest.raises(UserError, match="separate image and mask by a blank or tab"):
        found(tmp_path, labeled_id_path=str(tmp_path / "list.txt"))


def test_folders_below_home(make, tmp_path, monkeypatch):
    make("photos/a.jpg", "masks/a.png", "more/b.jpg")
    (tmp_path / "root").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    words = dict(labeled="~/photos", masks="~/masks", unlabeled="~/more")
    lists = found(tmp_path / "root", **words)
    assert [lists.labeled[0].mask, lists.unlabeled[0].image] == [tmp_path / "masks/a.png", tmp_path / "more/b.jpg"]
    assert not lists.left_out
    (tmp_path / "l.txt").write_text(f"{tmp_path}/photos/a.jpg {tmp_path}/masks/a.png\n")
    by_list = found(tmp_path / "root", **words, labeled_id_path="~/l.txt")
    assert names(by_list.labeled) == ["a.jpg"]


def test_left_out_files_are_named(make, tmp_path):
    make("images/a.jpg", "images/b.jfif", "images/c.JPE", "masks/a.png", "masks/b.png", "masks/c.png")
    assert names(found(tmp_path).labeled) == ["a.jpg", "b.jfif", "c.JPE"] and not found(tmp_path).left_out
    make("images/d", "images/e.heic", "images/f.heic", "images/.hidden", "masks/g.png", "more/h.jpg", "more/.x/i.jpg")
    others, masks = found(tmp_path, unlabeled="more").left_out
    assert "3 files without an image suffix are left out (.heic: 2, none: 1), such as" in others
    assert others.endswith("; convert photos to JPEG or PNG")
    with pytest.raises(UserError, match=r"e\.heic: \.heic files are not supported; convert them to JPEG or PNG"):
        read_image(tmp_path / "images/e.heic")
    with pytest.raises(UserError, match=r"picture: no such folder \(.* has images, masks, more\); correct data.custom"):
        folder_entries(tmp_path, "picture", None)
    assert masks.startswith(f"{tmp_path}/masks: 1 masks have no image, such as {tmp_path}/masks/g.png")
    (tmp_path / "list.txt").write_text("images/a.jpg masks/a.png\n")
    by_list = {f"{kind}_id_path": str(tmp_path / "list.txt") for kind in ("labeled", "unlabeled")}
    unused = [line for line in found(tmp_path, unlabeled="more", **by_list).left_out if "in no list" in line]
    assert unused == [f"{tmp_path}/more: 1 of 1 images are in no list, such as {tmp_path}/more/h.jpg"]
    (tmp_path / "list.txt").write_text(f"images/a.jpg masks/a.png\n../{tmp_path.name}/more/h.jpg masks/b.png\n")
    assert not [line for line in found(tmp_path, unlabeled="more", **by_list).left_out if "/h.jpg" in line]
    assert f"{tmp_path}/moer: no such folder" in found(tmp_path, unlabeled="moer", **by_list).left_out[0]


def test_names_that_are_not_utf8(make, tmp_path, capsys):
    make("images/a.jpg", "masks/a.png")
    name = os.fsdecode(b"images/\xe4.jpg")
    make(name)
    recipe = (
        f"data: {{dataset: mine, data_root: '{tmp_path}', crop_size: 64, custom: {{classes: [a, b], "
        "labeled_images: images, labeled_masks: masks, val_images: images, val_masks: masks}}\n"
        "model: {encoder: mit_b0}\nmethod: supervised\nepochs: 1\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    config = ["--config", str(tmp_path / "recipe.yaml")]
    make_splits = ["splits", "make", *config, "--train", "images", "--masks", "masks", "--sizes", "1"]
    for words in (["check", *config, "--data-only"], make_splits):
        assert run_main(main, words) == 2
        assert capsys.readouterr().err == f"error: {tmp_path}/images/\\udce4.jpg: the name is not UTF-8; rename it\n"


@pytest.mark.parametrize("line", ["images\\a.jpg", unicodedata.normalize("NFD", "images/\xe4.jpg")])
def test_names_that_look_right(make, tmp_path, line):
    make("images/a.jpg", "images/\xe4.jpg")
    (tmp_path / "list.txt").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="write / instead of" if "\\" in line else "in other Unicode characters"):
        check_files(read_entries(tmp_path / "list.txt", tmp_path))


def test_missing_data_set_names_the_command(tmp_path):
    data = DataConfig(dataset="pascal", data_root=str(tmp_path / "gone"), crop_size=(64, 64))
    with pytest.raises(UserError, match="python -m allspark prepare pascal --download"):
        find_data(data, spec_for(data))
    (tmp_path / "list.txt").write_text("a.jpg a.png\n")
    lists = {f"{kind}_id_path": str(tmp_path / "list.txt") for kind in ("labeled", "unlabeled", "val")}
    with pytest.raises(UserError, match="5 of 5 files are missing.*python -m allspark prepare pascal --download"):
        resolve(replace(data, data_root=str(tmp_path), allow_overlap=True, **lists))
