"""ADE20K, the example of docs/adding_a_benchmark.md: specification, archive, lists."""

import functools
import http.server
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from allspark.__main__ import main
from allspark.config_io import load_recipe
from allspark.data.datasets import DATASETS
from allspark.data.mask_io import read_mask, read_pair
from allspark.data.splits import resolve
from allspark.prepare import PLANS
from allspark.prepare.plan import Archive
from allspark.split_lists.layouts import LAYOUTS
from allspark.split_lists.manifest import list_hash, load_manifest
from allspark.utils.download import file_digest
from allspark.utils.errors import UserError
from helpers import archives as mini

SPEC, PLAN = DATASETS["ade20k"], PLANS["ade20k"]
NAMES = {
    "training": [f"ADE_train_{number:08d}" for number in range(1, 6)],
    "validation": ["ADE_val_00000001", "ADE_val_00000002"],
}
ZIP = "ADEChallengeData2016.zip"
ROOT = "ADEChallengeData2016"


@pytest.fixture
def archive(tmp_path):
    files = mini.ade20k_files(NAMES)
    return mini.write_zip(tmp_path / "in" / ZIP, files), files


def prepare(*words):
    main(["prepare", "ade20k", "--workers", "1", *map(str, words)])


def test_classes_are_stored_values_minus_one(tmp_path):
    path = tmp_path / "m.png"
    Image.fromarray(np.array([[0, 1, 2, 13, 67, 150]], np.uint8)).save(path)
    assert read_mask(path, SPEC).tolist() == [[255, 0, 1, 12, 66, 149]]
    named = {1: "wall", 3: "sky", 13: "person", 67: "flower", 100: "buffet", 137: "traffic light", 150: "flag"}
    assert {value: SPEC.classes[value - 1] for value in named} == named  # objectInfo150.txt
    Image.fromarray(np.array([[151, 3]], np.uint8)).save(path)
    with pytest.raises(UserError, match=r"m.png: illegal mask values 151 \(1 pixel\).*0 = no class"):
        read_mask(path, SPEC)


def test_server_prediction_format():
    stored = np.arange(151, dtype=np.uint8)[None]
    assert np.array_equal(SPEC.submission(SPEC.decode_mask(stored)), stored)


def test_prepare_archive(archive, tmp_path, capsys):
    source, files = archive
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"train 5 of 20210, val 2 of 2000.*ADEChallengeData2016.zip.*--allow-partial"):
        prepare("--from", source, "--out", out)
    prepare("--from", source, "--out", out, "--allow-partial")
    assert "train 5, val 2 images; 14 files written" in capsys.readouterr().out
    there = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    kept = {name.removeprefix(f"{ROOT}/"): data for name, data in files.items() if not name.endswith(".txt")}
    assert there == kept  # nothing is decoded and written anew
    unpacked = mini.unpack(tmp_path / "unpacked", files)
    prepare("--from", unpacked, "--out", tmp_path / "b", "--allow-partial")
    again = {path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert again == set(kept)


def test_value_without_class(tmp_path):
    mask = np.full((32, 40), 12, np.uint8)
    mask[0, :3] = 200
    source = mini.write_zip(tmp_path / ZIP, mini.ade20k_files(NAMES, {"ADE_val_00000002": mask}))
    words = ("--from", source, "--out", tmp_path / "out", "--allow-partial")
    with pytest.raises(UserError, match=r"ADE_val_00000002.png: unexpected mask values 200 \(3 pixels\)"):
        prepare(*words)
    prepare(*words, "--ignore-unknown")
    found = read_mask(tmp_path / "out/annotations/validation/ADE_val_00000002.png", SPEC)
    assert (found[0, :3] == 255).all() and (found[1:] == 11).all()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """An address of this machine that serves the folder `in`."""
    handler = functools.partial(Quiet, directory=tmp_path / "in")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_download_and_resume(archive, server, tmp_path, monkeypatch, capsys):
    """The real code on a server of this machine: the address and the digest alone are another archive's."""
    digest = f"md5:{file_digest(archive[0], 'md5')}"
    there = Archive(ZIP, "here", (f"{server}/gone.zip", f"{server}/{ZIP}"), digest)
    monkeypatch.setitem(PLANS, "ade20k", replace(PLAN, archives=(there,)))
    out = tmp_path / "data"
    prepare("--download", "--out", out, "--allow-partial")
    assert "train 5, val 2 images; 14 files written" in capsys.readouterr().out
    assert (out / ZIP).read_bytes() == archive[0].read_bytes()
    prepare("--download", "--out", out, "--allow-partial")
    assert "0 files written, 14 existed" in capsys.readouterr().out
    official = PLAN.archives[0]
    assert official.urls[0].startswith("https://") and official.urls[0].endswith(f"/{official.name}")
    assert official.digest.startswith("md5:") and len(official.digest) == len(digest)


def test_make_splits_and_load_recipe(archive, tmp_path, capsys):
    source, files = archive
    out, lists = tmp_path / "out", tmp_path / "splits"
    prepare("--from", source, "--out", out, "--allow-partial")
    built = LAYOUTS["ade20k"].own_lists(out)
    assert built["train"] == [f"images/training/{name}.jpg" for name in NAMES["training"]]
    pairs = {kind: [f"{image} {LAYOUTS['ade20k'].mask_of(image)}\n" for image in built[kind]] for kind in built}
    chosen = {"val": pairs["val"], "2/labeled": pairs["train"][:2], "2/unlabeled": pairs["train"][2:]}
    for name, listed in chosen.items():
        path = lists / "ade20k" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(listed), encoding="utf-8")
    recipe = load_recipe("ade20k", "allspark", {"data.split": "2", "data.data_root": str(out)})
    found = resolve(recipe.data, lists)
    assert (len(found.labeled), len(found.unlabeled), len(found.val), len(found.hidden)) == (2, 3, 2, 3)
    image, mask = read_pair(found.labeled[1], SPEC)
    stored = np.array(Image.open(io.BytesIO(files[f"{ROOT}/annotations/training/ADE_train_00000002.png"])), int)
    assert image.shape == (32, 40, 3) and np.array_equal(mask, np.where(stored == 0, 255, stored - 1))


def test_manifest_entries():
    """Counts as methods.md 8.2 of the specification has them; val and train are all images, whatever their order."""
    known = load_manifest().splits
    splits = {name.partition("/")[2]: split for name, split in known.items() if name.startswith("ade20k")}
    labeled = {"1_64": 316, "1_32": 631, "1_16": 1263, "1_8": 2526, "1_4": 5052, "1_2": 10105}
    assert {name: split.lists["labeled"].count for name, split in splits.items() if name} == labeled
    for name, count in labeled.items():
        assert splits[name].lists["unlabeled"].count == PLAN.counts["train"] - count
        assert splits[name].places[0].file("labeled") == f"splits/ade20k/{name}/labeled.txt"
    for kind, folder, short in (("train", "training", "train"), ("val", "validation", "val")):
        count = PLAN.counts[kind]
        images = [f"images/{folder}/ADE_{short}_{number:08d}.jpg" for number in range(1, count + 1)]
        facts = splits[""].lists[kind]
        assert (facts.count, facts.sorted) == (count, list_hash(images))
