"""Damaged images, masks, checkpoints, weights and archives: exit code 2 and one line that names the file."""

import io
import os
import random
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import train
from allspark import __main__ as verbs
from allspark.config_io import load_config
from allspark.data.datasets import spec_for
from allspark.data.image_io import read_image
from allspark.data.mask_io import read_mask
from allspark.engine.checkpoint import load_checkpoint
from allspark.utils.errors import UserError, run_main
from allspark.weights.loading import read_weights
from helpers import archives as mini

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning:PIL")]


def told_by(main, argv, capfd):
    capfd.readouterr()
    assert run_main(main, list(map(str, argv))) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "Traceback" not in message, message
    return message


def encoded(array, form="PNG", **options):
    file = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array, np.uint8))).save(
        file, form, **options
    )
    return file.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


WHOLE = encoded(np.zeros((64, 80, 3)))
JPEG = encoded(np.random.default_rng(0).integers(0, 256, (64, 80, 3)), "JPEG")
IMAGES = {
    "empty": b"",
    "one byte": b"\x89",
    "text": b"hello",
    "signature alone": WHOLE[:8],
    "header alone": WHOLE[:33],
    "end missing": WHOLE[:-30],
    "no pixels": png(80, 64),
    "no width": png(0, 64),
    "huge": png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", zlib.compress(b"x"))),
    "wrong pixels": png(80, 64, chunk(b"IDAT", b"not zlib")),
    "text bomb": png(80, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20)))),
    "jpeg cut": JPEG[: len(JPEG) // 2],
    "jpeg of markers": JPEG[:20] + b"\xff" * 500,
    "tiff cut": encoded(np.zeros((64, 80)), "TIFF")[:200],
    "tiff to itself": b"II*\0\x08\0\0\0\x01\0\x01\x01\x04\0\xff\xff\xff\xff\x08\0\0\0\x08\0\0\0",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 64\n(x) print\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='80' height='64'/>",
    "gif header": b"GIF89a\xff\xff\xff\xff\0\0\0",
    "bmp header": b"BM" + bytes(52),
    "pickle": b"\x80\x04K\x01.",
    "zip": b"PK\x03\x04" + bytes(30),
    "floats": encoded(Image.fromarray(np.zeros((64, 80), np.float32)), "TIFF"),
    "another size": encoded(np.zeros((63, 80, 3))),
}


@pytest.mark.parametrize("kind", ["labeled", "unlabeled", "val"])
@pytest.mark.parametrize("name", IMAGES)
def test_images(name, kind, place, capfd):
    path = place.root / "images" / kind / f"{kind}1.png"
    path.write_bytes(IMAGES[name])
    if kind == "unlabeled" and name == "another size":
        path.write_bytes(b"")
    assert str(path) in told_by(verbs.main, ["check", "--data-only", "--config", place.config], capfd)


def test_damage_some_readers_accept(tmp_path):
    """A wrong orientation, a wrong checksum: read or refused, by the version of Pillow, and nothing else."""
    whole = encoded(np.zeros((64, 80, 3)), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\xff")
    for content in (whole, WHOLE[:30] + b"\0\0\0" + WHOLE[33:]):
        path = tmp_path / "image.png"
        path.write_bytes(content)
        try:
            assert read_image(path).shape == (64, 80, 3)
        except UserError as error:
            assert str(path) in str(error)


MASKS = {
    "RGB": encoded(np.zeros((64, 80, 3))),
    "gray and alpha": encoded(Image.new("LA", (80, 64))),
    "16 bits": encoded(Image.fromarray(np.full((64, 80), 900, np.uint16))),
    "floats": encoded(Image.fromarray(np.zeros((64, 80), np.float32)), "TIFF"),
    "a class too many": encoded(np.full((64, 80), 3)),
    "254": encoded(np.full((64, 80), 254)),
    "another size": encoded(np.zeros((64, 81))),
    "turned": encoded(np.zeros((80, 64))),
    "jpeg": encoded(np.random.default_rng(0).integers(0, 256, (64, 80)), "JPEG"),
}


@pytest.mark.parametrize("kind", ["labeled", "val"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, kind, place, capfd):
    path = place.root / "masks" / kind / f"{kind}1.png"
    path.write_bytes(MASKS[name])
    assert str(path) in told_by(verbs.main, ["check", "--data-only", "--config", place.config], capfd)


def test_not_a_file(place, capfd):
    """A folder, a pipe, a device, a link to nothing in an image's place: none is waited for."""
    path = place.root / "images" / "labeled" / "labeled1.png"
    for make in (
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("x"),
    ):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make()
        assert str(path) in told_by(verbs.main, ["check", "--data-only", "--config", place.config], capfd)


def mutations(content, count, seed):
    """The content with some bytes changed, cut out, doubled, mostly near its beginning."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data) if rng.random() < 0.4 else min(len(data), 200))
            data[at : at + rng.choice([0, 1, 1, 1, 20])] = rng.choice(
                [bytes([rng.randrange(256)]), b"\xff" * 4, data[:9]]
            )
        yield bytes(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM"])
def test_mutated_images(form, place, tmp_path):
    spec, path, refusals = spec_for(load_config(place.config).data), tmp_path / "image", 0
    whole = encoded(np.random.default_rng(0).integers(0, 3, (20, 24)), form)
    for content in mutations(whole, 150, form):
        path.write_bytes(content)
        for read in (read_image, lambda file: read_mask(file, spec)):
            try:
                assert read(path).dtype == np.uint8
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refusals += 1
    assert refusals > 30


@pytest.fixture(scope="module")
def saved(finished):
    return torch.load(finished.run / "best.pth", weights_only=True)


ODD = {
    "nothing": None,
    "a fraction": 7.5,
    "text": "x",
    "a list": [1, [2]],
    "other names": {"a": {"b": 1}},
    "sparse": {"x": torch.eye(3).to_sparse()},
    "on no device": {"x": torch.empty(3, device="meta")},
    "without memory": {"x": torch.zeros(1).expand(10**9)},
}
PARTS = ["model", "method", "recipe", "split", "epoch", "step", "best", "optimizer"]


@pytest.mark.parametrize("part", PARTS)
def test_partial_checkpoint(part, saved, place, capfd):
    """Something else in its place, or nothing: the run is not resumed, and its file stays as it is."""
    place.run.mkdir()
    file = place.run / "latest.pth"
    number = PARTS.index(part)
    for value in (ODD[list(ODD)[number]], ...):
        content = {key: part_of for key, part_of in saved.items() if key != part}
        torch.save(content if value is ... else {**content, part: value}, file)
        before = file.read_bytes()
        assert str(place.run) in told_by(train.main, place.train("device=cpu"), capfd)
        assert file.read_bytes() == before


def test_mutated_checkpoints(finished, tmp_path):
    file, whole = tmp_path / "file.pth", (finished.run / "best.pth").read_bytes()
    head, tail = whole[:4000], whole[4000:]
    refusals = 0
    for number, content in enumerate(mutations(head, 24, "checkpoint")):
        file.write_bytes(content + (tail if number % 2 else tail[: -500 * number or None]))
        for read in (load_checkpoint, read_weights):
            try:
                read(file)
            except UserError as error:
                assert str(file) in str(error) and "\n" not in str(error)
                refusals += 1
    assert refusals > 12


@pytest.mark.parametrize("name", ["camvid.zip", "camvid.tar", "camvid.tgz"])
def test_mutated_archives(name, tmp_path, capfd):
    names = {"train": ["0001TP_006690"], "val": ["0016E5_07959"]}
    file = tmp_path / name
    whole = (mini.write_zip if name.endswith("zip") else mini.write_tar)(file, mini.tutorial_files(names)).read_bytes()
    for content in mutations(whole, 60, name):
        file.write_bytes(content)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        words = ["prepare", "camvid", "--from", file, "--out", tmp_path / "out", "--workers", 1, "--allow-partial"]
        code = run_main(verbs.main, list(map(str, words)))
        message = capfd.readouterr().err
        assert code in (0, 2) and message.count("\n") == code // 2 and "Traceback" not in message, message


def test_zip_member_without_name(tmp_path, capfd):
    """Found by mutation: zipfile looks at the last letter of its name."""
    file = mini.write_zip(tmp_path / "camvid.zip", {"a": b"x"})
    content = file.read_bytes()
    at = content.index(b"PK\x01\x02")
    file.write_bytes(content[: at + 28] + b"\0\0" + content[at + 30 :])
    words = ["prepare", "camvid", "--from", file, "--out", tmp_path / "out", "--allow-partial"]
    assert str(file) in told_by(verbs.main, words, capfd)


LONG = "x" * 300


@pytest.mark.parametrize(
    ("main", "argv", "told"),
    [
        (eval_script.main, ["--checkpoint", LONG], "too long"),
        (eval_script.main, ["--checkpoint", "/dev/zero"], "no such checkpoint"),
        (eval_script.main, ["--checkpoint", "/"], "no such checkpoint"),
        (verbs.main, ["predict", "--checkpoint", "x.pth", "--out", "out", LONG], "too long"),
        (verbs.main, ["predict", "--checkpoint", "x.pth", "--out", "out", "~nobody_of_this_name"], "no such image"),
        (verbs.main, ["weights", "inspect", "/dev/null"], "no such weight file"),
        (verbs.main, ["prepare", "camvid", "--from", "/dev/null", "--out", "out"], "/dev/null"),
        (verbs.main, ["prepare", "voc", "--from", "/no/where", "--out", "out"], "/no/where"),
        (verbs.main, ["check", "--config", "/"], "cannot be read"),
        (train.main, ["--config", "/proc/self/mem"], "/proc/self/mem"),
        (train.main, ["--config", LONG], "too long"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_missing_path(main, argv, told, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in told_by(main, argv, capfd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["/proc/nowhere", "/dev/null"])
def test_unwritable_place(out, finished, capfd):
    """Found by trying: drawing splits ended with a traceback."""
    best, image = finished.run / "best.pth", finished.root / "images/val/val0.png"
    lists = finished.root / "lists" / "labeled.txt"
    splits = ["splits", "make", "--config", finished.config, "--train", lists, "--sizes", 1, "--out", out]
    for main, argv in [
        (verbs.main, splits),
        (verbs.main, ["weights", "import", best, "--out", f"{out}/x.pth"]),
        (verbs.main, ["predict", "--checkpoint", best, "--device", "cpu", "--out", f"{out}/x", image]),
        (eval_script.main, ["--checkpoint", best, "--device", "cpu", "--json", f"{out}/x.json"]),
        (train.main, ["--config", finished.config, "--save-path", f"{out}/x"]),
    ]:
        assert out in told_by(main, argv, capfd)
