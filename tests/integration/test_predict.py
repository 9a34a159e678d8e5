"""`allspark predict`: accepted images, output files, messages."""

import csv
import math
import re
import shutil
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from allspark import __main__ as verbs
from allspark.cli import predict as verb
from allspark.cli.predict import batches, find_images, to_channels
from allspark.data.batch import normalize
from allspark.data.image_io import read_image
from allspark.data.spec import ImageReading
from allspark.data.transforms import to_tensor
from allspark.evaluation.sliding_window import Inference, average_views
from allspark.inference import load_for_inference
from allspark.memory_estimate import MemoryCounter
from allspark.utils.errors import UserError, run_main
from allspark.visualization import video
from allspark.visualization.pictures import colorize, is_own_file, overlay, save_image, save_pixels
from allspark.visualization.prediction_writer import unique_names

KINDS = ("", "_color", "_overlay", "_confidence")
SIZES = {"a": (64, 80), "b": (70, 45), "c": (64, 80), "d": (33, 96), "e": (64, 80)}  # height, width

pytestmark = pytest.mark.usefixtures("one_thread")  # equal thread counts, equal sums


@pytest.fixture
def photos(tmp_path):
    """A folder of five images of three sizes, two of them in a folder below."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, size in SIZES.items():
        place = folder / "more" if name in "de" else folder
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(place / f"{name}.png")
    return folder


@pytest.fixture
def predict(finished, tmp_path):
    """(words) -> the folder out, predicted into by the checkpoint of a finished run."""

    def run(*words, out="out"):
        argv = ["predict", "--checkpoint", finished.run / "best.pth", "--device", "cpu", "--out", tmp_path / out]
        verbs.main([*map(str, argv), *map(str, words)])
        return tmp_path / out

    return run


def stored(path):
    with Image.open(path) as picture:
        return np.array(picture)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_pictures_show_model_prediction(predict, photos, finished):
    out = predict(photos / "b.png")
    assert files(out) == sorted([*(f"b{kind}.png" for kind in KINDS), "legend.png"])
    loaded = load_for_inference(finished.run / "best.pth", torch.device("cpu"))
    image = to_tensor(read_image(photos / "b.png"))
    with torch.no_grad():
        logits = loaded.model(normalize(image)[None]).logits[0]
    prediction, prob = logits.argmax(0), logits.softmax(0).max(0).values
    assert len(prediction.unique()) > 1, "a prediction of one class alone shows nothing"
    with Image.open(out / "b.png") as picture:
        assert (picture.mode, picture.size) == ("P", (45, 70))
        np.testing.assert_array_equal(np.array(picture), prediction)
        np.testing.assert_array_equal(np.array(picture.convert("RGB")), stored(out / "b_color.png"))
    np.testing.assert_array_equal(stored(out / "b_color.png"), colorize(prediction, loaded.spec.palette))
    np.testing.assert_array_equal(stored(out / "b_overlay.png"), overlay(image, prediction, loaded.spec.palette))
    assert {*loaded.spec.palette} < {tuple(color) for row in stored(out / "legend.png").tolist() for color in row}
    with Image.open(out / "b_confidence.png") as picture:
        assert picture.mode == "L"
        assert np.abs(np.array(picture) - 255 * prob.numpy()).max() < 0.51


def test_legend_replaces_no_other_file(predict, photos, tmp_path):
    assert not (predict(photos / "b.png", "--what", "index", out="index") / "legend.png").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "legend.png").write_bytes(b"mine")
    assert (predict(photos / "b.png", out="used") / "legend.png").read_bytes() == b"mine"
    (photos / "a.png").rename(photos / "legend.png")
    assert stored(predict(photos / "legend.png", out="named") / "legend.png").shape == SIZES["a"]


def test_mode_scales_and_flip_reach_the_model(predict, photos, finished):
    out = predict(photos / "a.png", "--mode", "sliding_window", "--scales", "0.75,1", "--flip")
    loaded = load_for_inference(finished.run / "best.pth", torch.device("cpu"))
    image = normalize(to_tensor(read_image(photos / "a.png")))[None]
    prob = average_views(loaded.model, image, Inference("sliding_window", 65, (0.75, 1.0), True))[0]
    np.testing.assert_array_equal(stored(out / "a.png"), prob.argmax(0))
    assert np.abs(stored(out / "a_confidence.png") - 255 * prob.max(0).values.numpy()).max() < 0.51
    cropped = predict(photos / "a.png", "--mode", "center_crop", out="crop")
    inside = np.zeros((64, 80), bool)
    inside[:, 7:72] = True  # the crop of 65, all 64 rows
    assert ((stored(cropped / "a.png") != 255) == inside).all()
    assert ((stored(cropped / "a_confidence.png") != 0) == inside).all()


def test_image_is_independent_of_batch_mates(predict, photos):
    alone = predict(photos, out="alone")
    together = predict(photos, "--batch-size", 4, out="together")
    few = predict(photos / "more" / "e.png", photos / "a.png", "--batch-size", 2, out="few")
    assert len(files(alone)) == 5 * len(KINDS) + 1 and files(alone) == files(together)
    for name in files(alone):
        np.testing.assert_array_equal(stored(together / name), stored(alone / name), err_msg=name)
    for name in files(few):
        np.testing.assert_array_equal(stored(few / name), stored(alone / name), err_msg=name)


def test_memory_is_bounded_by_batch(photos):
    """The files of the second batch are opened when the first is done with: one that is gone by then is missed."""
    images = {photos / f"{name}.png": name for name in "abc"}
    unreadable = {}
    stream = batches(images, 2, unreadable)
    assert next(stream)[1] == ["a"] and next(stream)[1] == ["b"]
    (photos / "c.png").unlink()
    assert list(stream) == [] and list(unreadable) == [photos / "c.png"]


def test_16_bit_images_are_read_as_in_training(tmp_path, capsys):
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)  # 12 bits
    Image.fromarray(values).save(tmp_path / "a.png")
    for image_max, shift in ((None, 8), (4095, 4)):
        (image,), _ = next(batches({tmp_path / "a.png": "a"}, 1, {}, reading=ImageReading(image_max)))
        np.testing.assert_array_equal(image[0], values >> shift)
        assert ("no value above 4095" in capsys.readouterr().err) == (image_max is None)
    list(batches({tmp_path / "a.png": "a"}, 1, {}, reading=ImageReading(1023)))
    assert "values up to 4095; all above 1023" in capsys.readouterr().err


def test_paths_to_images(photos, tmp_path, capsys):
    (photos / "notes.md").write_text("no image")
    (photos / ".thumbs").mkdir()
    shutil.copy(photos / "a.png", photos / ".thumbs" / "hidden.png")
    shutil.copy(photos / "a.png", photos / "CAPITAL.PNG")
    (photos / "list.txt").write_text(f"more/d.png masks/of/d.png\n\n{photos}/b.png\n")

    def found(*words, data_root=None):
        return [path.stem for path in find_images([str(photos / word) for word in words], tmp_path / "out", data_root)]

    assert found("b.png") == ["b"]
    assert found("") == ["CAPITAL", "a", "b", "c", "d", "e"]
    assert "2 files without an image suffix are left out (.txt: 1, .md: 1)" in capsys.readouterr().err
    assert found("*.png") == ["a", "b", "c"] and found("**/*.png") == ["a", "b", "c", "d", "e"]
    assert found("list.txt") == ["d", "b"]
    assert found("c.png", "more", "list.txt", "*") == ["c", "d", "e", "b", "CAPITAL", "a"]  # each once
    (tmp_path / "below_root.txt").write_text("photos/a.png\n")
    assert found("../below_root.txt") == ["a"]
    shutil.move(tmp_path / "below_root.txt", photos / "below_root.txt")
    assert found("below_root.txt", data_root=tmp_path) == ["a"]


def test_links_to_images(photos, tmp_path):
    """A linked folder is one; a link to nothing is an image that cannot be read, which is told."""
    (tmp_path / "store").mkdir()
    shutil.copy(photos / "a.png", tmp_path / "store" / "z.png")
    (photos / "linked").symlink_to(tmp_path / "store")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "self.png").symlink_to(photos / "self.png")
    (photos / "circle").symlink_to(photos / "circle")
    (photos / "alias.png").symlink_to(photos / "b.png")  # the image goes by its own name
    found = [path.stem for path in find_images([str(photos)], tmp_path / "out", None)]
    assert found == ["a", "b", "c", "gone", "z", "d", "e", "self"]


def test_glob_characters_in_names(photos, tmp_path):
    shutil.copy(photos / "a.png", photos / "a[1].png")
    assert find_images([str(photos / "a[1].png")], tmp_path / "out", None) == [photos / "a[1].png"]


def test_earlier_predictions_are_skipped(predict, photos):
    out = predict(photos, "--index-only", out="photos/predicted")
    first = files(out)
    assert first == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert files(predict(photos, "--index-only", out="photos/predicted")) == first


def test_own_pictures_are_no_photos(predict, photos, tmp_path, capsys):
    predict(photos, out="photos/predicted")
    found = [path.stem for path in find_images([str(photos)], tmp_path / "other", None)]
    assert found == ["a", "b", "c", "d", "e"] and "21 pictures of this program are left out" in capsys.readouterr().err


def test_names_without_case():
    """Names that are one file on Windows and macOS."""
    assert unique_names([Path("x/A.jpg"), Path("y/a.jpg")]) == ["x/A", "y/a"]
    assert unique_names([Path("x/A.jpg"), Path("x/a.png"), Path("x/b.png")]) == ["A.jpg", "a.png", "b"]


def test_gray_video(clip, tmp_path):
    """Frames for a model of one channel are gray, as images are."""
    _, frame = next(video.read_frames(clip))
    gray = to_channels(frame, clip, 1)
    assert gray.shape == (64, 96, 1)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    np.testing.assert_array_equal(gray, read_image(tmp_path / "frame.png", ImageReading(channels=1)))


def test_equal_stems_use_folders(predict, photos):
    shutil.copy(photos / "b.png", photos / "more" / "a.png")
    out = predict(photos / "a.png", photos / "more" / "a.png", "--index-only")
    assert files(out) == ["a.png", "more/a.png"]
    assert stored(out / "more" / "a.png").shape == SIZES["b"]


def test_equal_stems_use_suffixes(predict, photos):
    Image.open(photos / "a.png").save(photos / "a.jpg")
    assert files(predict(photos / "a.png", photos / "a.jpg", "--index-only")) == ["a.jpg.png", "a.png.png"]


def test_mask_is_never_overwritten(predict, photos, tmp_path):
    """Masks have the names of their images: neither those that a list names are lost, nor any that lie there."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in "ab":
        Image.new("L", SIZES[name][::-1], 1).save(masks / f"{name}.png")
    before = (masks / "b.png").read_bytes()
    (tmp_path / "list.txt").write_text("photos/b.png masks/b.png\n")
    for words in ((tmp_path / "list.txt",), (photos,), (photos / "b.png", "--index-only")):
        with pytest.raises(UserError, match=r"masks/[ab]\.png: exists and was not written by this program"):
            predict(*words, out="masks")
    assert (masks / "b.png").read_bytes() == before and files(masks) == ["a.png", "b.png"]
    assert files(predict(photos / "c.png", "--index-only", out="masks")) == ["a.png", "b.png", "c.png"]
    predict(photos / "c.png", "--index-only", out="masks")  # its own it replaces


def test_name_too_long(predict, photos, tmp_path):
    stem = "写" * 81  # 243 bytes
    (photos / "b.png").rename(photos / f"{stem}.png")
    with pytest.raises(UserError, match="写_confidence.png: the file name is too long"):
        predict(photos)
    assert not files(tmp_path / "out")
    assert files(predict(photos, "--index-only"))[-1] == f"{stem}.png"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as allspark.data.image_io
def test_pictures_are_written_atomically(tmp_path):
    path = tmp_path / "new" / "picture.png"
    save_pixels(np.full((4, 4), 7, np.uint8), path)
    with pytest.raises(UserError, match=r"picture\.png: cannot be written.*CMYK"):
        save_image(Image.new("CMYK", (4, 4)), path)  # which PNG cannot hold: the write dies behind the file's opening
    assert files(tmp_path) == ["new/picture.png"] and (stored(path) == 7).all()
    save_image(Image.new("1", (18000, 10000)), path)  # more than Pillow opens unasked
    assert is_own_file(path)


def test_unreadable_images_are_skipped(predict, photos, tmp_path, capsys, finished):
    data = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (100, 20)).save(photos / "c.png")
    argv = ["predict", "--checkpoint", finished.run / "best.pth", "--device", "cpu", "--index-only"]
    argv += ["--out", tmp_path / "out", "--batch-size", 3, photos]
    assert run_main(verbs.main, list(map(str, argv))) == 2
    printed = capsys.readouterr()
    told = r"left out: [^\n]*c\.png: 100 x 20 pixels[^\n]*\nerror: [^\n]*a\.png: truncated[^\n]*\(and 1 more, above\)\n"
    assert re.fullmatch(told, printed.err)
    assert "3 of 5 images predicted" in printed.out
    assert files(tmp_path / "out") == ["b.png", "d.png", "e.png"]


@pytest.mark.parametrize(
    "words, told",
    [
        (("{photos}/gone.png",), r"gone\.png: no such image"),
        (("",), "a PATH is empty"),
        (("{photos}/*.jpg",), r"\*\.jpg: no images found"),
        (("{photos}/empty",), "empty: no images found"),
        (("{photos}", "--out", "{photos}"), "photos: no images found.*--out"),
        (("{photos}/a.png", "--out", "{photos}"), r"photos/a\.png.*part of the input"),
        (("{photos}/a.png", "--out", "{photos}/b.png"), r"b\.png: the folder cannot be created"),
        (("{photos}/like_color",), r"f_color\.png: both .*f\.png and .*f_color\.png"),
        (("{photos}/missing.txt",), r"missing\.txt line 2: .*gone\.png does not exist.*without --data-root"),
        (("{photos}/nothing.txt",), r"nothing\.txt: this list is empty"),
        (("{photos}/small.png",), r"small\.png: 40 x 20 pixels"),
        (("{photos}/text.png",), r"text\.png: truncated or not an image"),
        (("{photos}/a.png", "--dataset", "pascal"), "--dataset pascal.*trained on tiny"),
        (("{photos}/a.png", "--scales", "0"), "scales"),
        (("{photos}/a.png", "--checkpoint", "{photos}/b.png"), r"b\.png: not a readable checkpoint"),
        (
            ("{photos}/a.png", "--checkpoint", "{photos}/nan.pth"),
            r"nan\.pth: contains weights that are NaN",
        ),
    ],
)
def test_impossible_requests(photos, finished, tmp_path, capsys, words, told):
    for name in ("empty", "like_color"):
        (photos / name).mkdir()
    with Image.open(photos / "a.png") as image:
        for name in ("like_color/f", "like_color/f_color"):
            image.save(photos / f"{name}.png")
        image.resize((40, 20)).save(photos / "small.png")
    if "nan.pth" in words[-1]:
        content = torch.load(finished.run / "best.pth", weights_only=True)
        content["model"]["decoder.classifier.bias"][0] = math.nan
        torch.save(content, photos / "nan.pth")
    (photos / "missing.txt").write_text("a.png\ngone.png\n")
    (photos / "nothing.txt").write_text("\n")
    (photos / "text.png").write_text("hello")
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    words = [word.format(photos=photos) for word in words]
    argv = ["predict", "--checkpoint", finished.run / "best.pth", "--device", "cpu", "--out", tmp_path / "out", *words]
    assert run_main(verbs.main, list(map(str, argv))) == 2
    message = capsys.readouterr().err
    assert re.search(told, message) and message.count("\n") == 1, message
    assert before == {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    assert not files(tmp_path / "out")


def as_every_kind(folder, rgb):
    """Files of different kinds that all show `rgb`, or the gray of it: name -> what it shows."""
    folder.mkdir()
    picture, gray = Image.fromarray(rgb), rgb[..., 0]
    repeated = np.repeat(gray[..., None], 3, 2)
    few = rgb // 128 * 255  # of eight colors
    shown = {}

    def save(name, image, shows, **options):
        image.save(folder / name, **options)
        shown[name.partition(".")[0]] = shows

    save("plain.png", picture, rgb)
    save("gray.png", Image.fromarray(gray), repeated)
    save("deep.png", Image.fromarray(gray.astype(np.uint16) * 256 + 77), repeated)
    save("deep_tiff.tif", Image.fromarray(gray.astype(np.uint16) * 256 + 77), repeated)
    save("palette.png", Image.fromarray(few).quantize(8), few)
    save("cmyk.tif", Image.merge("CMYK", [*Image.fromarray(255 - rgb).split(), Image.new("L", picture.size)]), rgb)
    opaque = picture.convert("RGBA")
    save("opaque.png", opaque, rgb)
    half = np.array(opaque)
    half[:, :40, 3] = 0
    white = rgb.copy()
    white[:, :40] = 255
    save("transparent.png", Image.fromarray(half), white)
    hole = Image.fromarray(gray)
    save("hole.png", hole, np.where(repeated == 9, 255, repeated), transparency=9)
    with_alpha = Image.merge("LA", [hole, Image.fromarray(half[..., 3])])
    save("gray_alpha.png", with_alpha, np.where(white == 255, 255, repeated))
    exif = Image.Exif()
    for orientation, turns in ((6, 1), (3, 2), (8, 3)):  # how far the file is turned against the photo
        exif[0x0112] = orientation
        save(f"turned{orientation}.png", Image.fromarray(np.rot90(rgb, turns)), rgb, exif=exif)
    return shown


def test_image_modes(predict, tmp_path):
    rgb = np.random.default_rng(3).integers(0, 250, (64, 80, 3), np.uint8)
    rgb[..., 0][rgb[..., 0] == 9] = 10
    rgb[5:9, 5:9] = 9
    shown = as_every_kind(tmp_path / "kinds", rgb)
    (tmp_path / "as_rgb").mkdir()
    for name, pixels in shown.items():
        Image.fromarray(pixels).save(tmp_path / "as_rgb" / f"{name}.png")
    found, expected = (predict(tmp_path / kind, out=f"of_{kind}") for kind in ("kinds", "as_rgb"))
    assert len(shown) == 13
    for name in shown:
        for kind in KINDS:
            file = f"{name}{kind}.png"
            np.testing.assert_array_equal(stored(found / file), stored(expected / file), err_msg=file)


@pytest.fixture
def clip(tmp_path):
    """A video of ten frames, in which a bright square moves over a dark ground: MJPEG, so that a cut is found."""
    path, rng = tmp_path / "clip.avi", np.random.default_rng(0)
    video = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for number in range(10):
        frame = rng.integers(20, 60, (64, 96, 3), np.uint8)
        frame[20:40, 8 * number : 8 * number + 20] = (60, 80, 220)
        video.write(frame)
    video.release()
    return path


def test_video_frames(predict, clip, photos, capsys):
    alone = ("--batch-size", 1)  # how a sum is rounded depends on how many images there are
    out = predict(clip, photos / "a.png", "--every", 4, *alone)
    names = [f"clip/00000{number}" for number in (0, 4, 8)]
    assert files(out) == sorted([*(f"{name}{kind}.png" for name in ("a", *names) for kind in KINDS), "legend.png"])
    assert "1 of 1 images and 3 frames of 1 video(s) predicted" in capsys.readouterr().out
    decoded = dict(video.read_frames(clip, 4))
    assert sorted(decoded) == [0, 4, 8]
    assert decoded[8][30, 74, 0] > 200 > 90 > decoded[8][30, 20, 0], "red first, and each frame its own"
    (photos / "frames").mkdir()
    for number, frame in decoded.items():
        Image.fromarray(frame).save(photos / "frames" / f"{number:06d}.png")
    expected = predict(photos / "frames", *alone, out="stills")
    for name in set(files(expected)) - {"legend.png"}:
        np.testing.assert_array_equal(stored(out / "clip" / name), stored(expected / name), err_msg=name)


def test_what_and_shares(predict, clip, photos, tmp_path):
    shares = tmp_path / "shares.csv"
    out = predict(photos, clip, "--what", "overlay, index", "--every", 5, "--shares", shares)
    names = ["a", "b", "c", "d", "e", "clip/000000", "clip/000005"]
    assert files(out) == sorted([*(f"{name}{kind}.png" for name in names for kind in ("", "_overlay")), "legend.png"])
    head, *rows = csv.reader(shares.read_text().splitlines())
    assert head == ["image", "ground", "left", "right"] and sorted(row[0] for row in rows) == sorted(names)
    for name, *values in rows:
        counts = np.bincount(stored(out / f"{name}.png").ravel(), minlength=3)
        np.testing.assert_allclose(np.array(values, float), 100 * counts / counts.sum(), atol=1e-4)
    again = tmp_path / "again.csv"
    predict(photos, clip, "--what", "index", "--every", 5, "--shares", again, "--batch-size", 4, out="batched")
    assert [row[0] for row in csv.reader(again.read_text().splitlines())] == [head[0], *(row[0] for row in rows)]
    with pytest.raises(UserError, match="shares.csv: already exists"):
        predict(photos, "--shares", shares, out="again")
    assert not (tmp_path / "again/a.png").exists()


def test_video_of_overlays(predict, clip, photos, tmp_path):
    """As long and as large as the video, each frame like the picture of its frame, but for the compression."""
    frames = predict(clip, "--what", "overlay", out="frames")
    out = predict(clip, photos / "a.png", "--video", "--what", "index", "--batch-size", 4)
    assert files(out) == ["a.png", "clip.mp4", "legend.png"]
    read = list(video.read_frames(out / "clip.mp4"))
    assert len(read) == 10 and video.frame_rate(out / "clip.mp4") == 10
    for number, frame in read:
        expected = stored(frames / f"clip/{number:06d}_overlay.png").astype(int)
        assert frame.shape == expected.shape and np.abs(frame - expected).mean() < 20
    assert np.abs(read[8][1].astype(int) - read[0][1]).mean() > 1
    with pytest.raises(UserError, match="clip.mp4: already exists"):
        predict(clip, "--video")
    (tmp_path / "slow" / "clip").mkdir(parents=True)
    shutil.copy(photos / "a.png", tmp_path / "slow" / "clip")  # the video is no folder of frames
    slow = predict(clip, "--video", "--every", 4, out="slow")
    assert len(list(video.read_frames(slow / "clip.mp4"))) == 3
    assert video.frame_rate(slow / "clip.mp4") == 2.5


@pytest.mark.parametrize("rate", [0.5, 29.97, 59.977, 119.947, 1000])
def test_frame_rates(tmp_path, rate):
    """MPEG-4 takes no more than 65535 parts of a second; the averages of variable rates have any value."""
    frames = [np.full((64, 96, 3), 20 * number, np.uint8) for number in range(6)]
    video.write_video(tmp_path / "a.mp4", frames, rate)
    assert abs(video.frame_rate(tmp_path / "a.mp4") / rate - 1) < 1e-3


def test_truncated_video(predict, clip, photos, tmp_path, capfd):
    whole = clip.read_bytes()
    clip.write_bytes(whole[: len(whole) * 7 // 10])
    (tmp_path / "text.mp4").write_text("#EXTM3U\nhttp://127.0.0.1:9/x.ts\n")
    with pytest.raises(UserError, match=r"clip\.avi: \d frames can be read, its header states.*1 more, above"):
        predict(clip, tmp_path / "text.mp4", photos / "a.png", "--index-only")
    assert "text.mp4" in capfd.readouterr().err
    assert (tmp_path / "out/a.png").is_file() and (tmp_path / "out/clip/000001.png").is_file()
    assert not capfd.readouterr().err, "what FFmpeg has to say would be a second message"


def test_rotated_video(tmp_path):
    """Turned by a quarter as a phone writes it: by the matrix of the track's header, the pixels as they were."""
    path = tmp_path / "phone.mp4"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 64))
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:32, :48] = 255
    for _ in range(3):
        writer.write(frame)
    writer.release()
    content = bytearray(path.read_bytes())
    struct.pack_into(">9i", content, content.index(b"tkhd") + 44, 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    path.write_bytes(content)
    shown = next(video.read_frames(path))[1]
    assert shown.shape == (96, 64, 3) and np.abs(shown.astype(int) - np.rot90(frame, -1)).mean() < 5


def test_frame_folders(predict, clip, photos, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(clip, clip.with_suffix(".mkv"))
    both = predict(clip, clip.with_suffix(".mkv"), "--every", 20, "--index-only")
    assert files(both) == ["clip.avi/000000.png", "clip.mkv/000000.png"]
    for folder in (tmp_path / "clip", photos / "clip"):
        folder.mkdir()
        shutil.copy(photos / "a.png", folder / "a.png")
    with pytest.raises(UserError, match=r"clip: both .*clip/a\.png and the frames of .*clip\.avi"):
        predict(clip, tmp_path / "clip" / "a.png", tmp_path / "photos" / "a.png", out="not")
    with pytest.raises(UserError, match="clip: this folder contains other images"):
        predict(clip, out="photos")
    assert find_images([str(tmp_path / "*")], tmp_path / "out", None) == [clip, clip.with_suffix(".mkv")]
    with pytest.raises(UserError, match="path of a video itself"):
        shutil.move(clip, tmp_path / "other")
        find_images([str(tmp_path / "other")], tmp_path / "out", None)


def test_tiled_large_image(predict, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "LARGE", 64 * 80)
    monkeypatch.setattr(verb, "free_memory", lambda kind: 100_000)
    with pytest.raises(UserError, match=r"a\.png: 80 x 64 pixels need.* 0\.0 GB; --mode sliding_window"):
        predict(photos / "a.png", photos / "b.png", "--index-only")
    assert files(tmp_path / "out") == ["b.png"]
    assert files(predict(photos / "a.png", "--index-only", "--mode", "sliding_window")) == ["a.png", "b.png"]
    check = verb.memory_check(None, Inference("sliding_window", 64), torch.device("cpu"))
    check(torch.empty(3, 9000, 9000, dtype=torch.uint8), tmp_path)  # windows always fit


def test_forward_peak_estimate(finished):
    model = load_for_inference(finished.run / "best.pth", torch.device("cpu")).model
    with torch.no_grad(), MemoryCounter() as ledger:
        model(torch.zeros(1, 3, 96, 128))
    foreseen = verb.forward_peak(model, torch.Size((3, 96, 128)), 1.0, torch.device("cpu"))
    assert abs(foreseen / ledger.peak - 1) < 0.2


def test_real_process(fork_process, finished, photos, tmp_path):
    words = ["--checkpoint", finished.run / "best.pth", "--out", tmp_path / "out", "--index-only", photos / "*.png"]
    process = fork_process(["-m", "allspark", "predict", *words])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "3 of 3 images predicted" in out and not err  # no progress bar where nobody watches
    assert files(tmp_path / "out") == ["a.png", "b.png", "c.png"]
