"""python -m allspark predict: which images it takes, what it writes, and what it says of those it cannot take."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from allspark import __main__ as verbs
from allspark.batch import normalize
from allspark.cli.loading import load_for_inference
from allspark.cli.predict import batches, find_images
from allspark.data.base import read_image, to_tensor
from allspark.errors import UserError, run_main
from allspark.evaluation.inference import Inference, class_prob
from allspark.evaluation.pictures import colorize, overlay, save_image, save_pixels

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


def test_the_pictures_are_the_models_own_prediction(predict, photos, finished):
    out = predict(photos / "b.png")
    assert files(out) == sorted(f"b{kind}.png" for kind in KINDS)
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
    with Image.open(out / "b_confidence.png") as picture:
        assert picture.mode == "L"
        assert np.abs(np.array(picture) - 255 * prob.numpy()).max() < 0.51


def test_mode_scales_and_flip_reach_the_model(predict, photos, finished):
    out = predict(photos / "a.png", "--mode", "sliding_window", "--scales", "0.75,1", "--flip")
    loaded = load_for_inference(finished.run / "best.pth", torch.device("cpu"))
    image = normalize(to_tensor(read_image(photos / "a.png")))[None]
    prob = class_prob(loaded.model, image, Inference("sliding_window", 65, (0.75, 1.0), True))[0]
    np.testing.assert_array_equal(stored(out / "a.png"), prob.argmax(0))
    assert np.abs(stored(out / "a_confidence.png") - 255 * prob.max(0).values.numpy()).max() < 0.51
    cropped = predict(photos / "a.png", "--mode", "center_crop", out="crop")
    inside = np.zeros((64, 80), bool)
    inside[:, 7:72] = True  # the crop of 65, all 64 rows
    assert ((stored(cropped / "a.png") != 255) == inside).all()
    assert ((stored(cropped / "a_confidence.png") != 0) == inside).all()


def test_an_image_is_predicted_alike_whatever_stands_beside_it(predict, photos):
    alone = predict(photos, out="alone")
    together = predict(photos, "--batch-size", 4, out="together")
    few = predict(photos / "more" / "e.png", photos / "a.png", "--batch-size", 2, out="few")
    assert len(files(alone)) == 5 * len(KINDS) and files(alone) == files(together)
    for name in files(alone):
        np.testing.assert_array_equal(stored(together / name), stored(alone / name), err_msg=name)
    for name in files(few):
        np.testing.assert_array_equal(stored(few / name), stored(alone / name), err_msg=name)


def test_no_more_than_a_batch_is_held(photos):
    """The files of the second batch are opened when the first is done with: one that is gone by then is missed."""
    images = {photos / f"{name}.png": name for name in "abc"}
    unreadable = {}
    stream = batches(images, 2, unreadable)
    assert next(stream)[1] == ["a"] and next(stream)[1] == ["b"]
    (photos / "c.png").unlink()
    assert list(stream) == [] and list(unreadable) == [photos / "c.png"]


def test_which_images_a_path_means(photos, tmp_path):
    (photos / "notes.md").write_text("no image")
    (photos / ".thumbs").mkdir()
    shutil.copy(photos / "a.png", photos / ".thumbs" / "hidden.png")
    shutil.copy(photos / "a.png", photos / "CAPITAL.PNG")
    (photos / "list.txt").write_text(f"more/d.png masks/of/d.png\n\n{photos}/b.png\n")

    def found(*words, data_root=None):
        return [path.stem for path in find_images([str(photos / word) for word in words], tmp_path / "out", data_root)]

    assert found("b.png") == ["b"]
    assert found("") == ["CAPITAL", "a", "b", "c", "d", "e"]
    assert found("*.png") == ["a", "b", "c"] and found("**/*.png") == ["a", "b", "c", "d", "e"]
    assert found("list.txt") == ["d", "b"]
    assert found("c.png", "more", "list.txt", "*") == ["c", "d", "e", "b", "CAPITAL", "a"]  # each once
    (tmp_path / "below_root.txt").write_text("photos/a.png\n")
    assert found("../below_root.txt") == ["a"]
    shutil.move(tmp_path / "below_root.txt", photos / "below_root.txt")
    assert found("below_root.txt", data_root=tmp_path) == ["a"]


def test_a_name_with_the_signs_of_a_glob_is_a_name(photos, tmp_path):
    shutil.copy(photos / "a.png", photos / "a[1].png")
    assert find_images([str(photos / "a[1].png")], tmp_path / "out", None) == [photos / "a[1].png"]


def test_earlier_predictions_below_a_folder_are_no_images_of_it(predict, photos):
    out = predict(photos, "--index-only", out="photos/predicted")
    first = files(out)
    assert first == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert files(predict(photos, "--index-only", out="photos/predicted")) == first


def test_images_of_equal_stems_are_told_apart_by_their_folders(predict, photos):
    shutil.copy(photos / "b.png", photos / "more" / "a.png")
    out = predict(photos / "a.png", photos / "more" / "a.png", "--index-only")
    assert files(out) == ["a.png", "more/a.png"]
    assert stored(out / "more" / "a.png").shape == SIZES["b"]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "picture.png"
    save_pixels(np.full((4, 4), 7, np.uint8), path)
    with pytest.raises(UserError, match=r"picture\.png: cannot be written.*CMYK"):
        save_image(Image.new("CMYK", (4, 4)), path)  # which PNG cannot hold: the write dies behind the file's opening
    assert files(tmp_path) == ["new/picture.png"] and (stored(path) == 7).all()


def test_images_that_cannot_be_read_do_not_stop_the_others(predict, photos, tmp_path, capsys, finished):
    data = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (100, 20)).save(photos / "c.png")
    argv = ["predict", "--checkpoint", finished.run / "best.pth", "--device", "cpu", "--index-only"]
    argv += ["--out", tmp_path / "out", "--batch-size", 3, photos]
    assert run_main(verbs.main, list(map(str, argv))) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]*a\.png: truncated[^\n]*1 more: [^\n]*c\.png\)\n", printed.err)
    assert "3 of 5 images predicted" in printed.out
    assert files(tmp_path / "out") == ["b.png", "d.png", "e.png"]


@pytest.mark.parametrize(
    "words, told",
    [
        (("{photos}/gone.png",), r"gone\.png: no such image"),
        (("{photos}/*.jpg",), r"\*\.jpg: no images there"),
        (("{photos}/empty",), "empty: no images there"),
        (("{photos}", "--out", "{photos}"), "photos: no images there.*--out"),
        (("{photos}/a.png", "--out", "{photos}"), r"photos/a\.png.*part of the data"),
        (("{photos}/a.png", "--out", "{photos}/b.png"), r"b\.png: the folder cannot be made"),
        (("{photos}/twice",), r"a\.png: both .*a\.jpg and .*a\.png"),
        (("{photos}/like_color",), r"f_color\.png: both .*f\.png and .*f_color\.png"),
        (("{photos}/missing.txt",), r"missing\.txt line 2: .*gone\.png does not exist.*without --data-root"),
        (("{photos}/nothing.txt",), r"nothing\.txt: this list names no image"),
        (("{photos}/small.png",), r"small\.png: 40 x 20 pixels"),
        (("{photos}/text.png",), r"text\.png: truncated or not an image"),
        (("{photos}/a.png", "--dataset", "pascal"), "--dataset pascal.*trained on tiny"),
        (("{photos}/a.png", "--scales", "0"), "scales"),
        (("{photos}/a.png", "--checkpoint", "{photos}/b.png"), r"b\.png: not a readable checkpoint"),
    ],
)
def test_what_it_cannot_do_is_one_message(photos, finished, tmp_path, capsys, words, told):
    for name in ("empty", "twice", "like_color"):
        (photos / name).mkdir()
    with Image.open(photos / "a.png") as image:
        image.save(photos / "twice" / "a.jpg")
        for name in ("twice/a", "like_color/f", "like_color/f_color"):
            image.save(photos / f"{name}.png")
        image.resize((40, 20)).save(photos / "small.png")
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


def test_a_real_process(start_process, finished, photos, tmp_path):
    words = ["--checkpoint", finished.run / "best.pth", "--out", tmp_path / "out", "--index-only", photos / "*.png"]
    process = start_process(["-m", "allspark", "predict", *words])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "3 of 3 images predicted" in out and not err  # no progress bar where nobody watches
    assert files(tmp_path / "out") == ["a.png", "b.png", "c.png"]
