"""Evaluation of files: same scores for any batch size, worker count and number of processes; pictures."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import eval as eval_script
from allspark.config import CustomDataConfig, DataConfig, MethodConfig, ModelConfig, Recipe
from allspark.config_io import to_plain
from allspark.data import splits
from allspark.data.batch import normalize
from allspark.data.datasets import DATASETS, cityscapes
from allspark.data.entries import read_list
from allspark.data.image_io import read_image
from allspark.data.mask_io import read_mask
from allspark.data.spec import DatasetSpec, Sample
from allspark.data.transforms import to_tensor
from allspark.engine.checkpoint import save_checkpoint
from allspark.evaluation.dataset import SegmentationDataset
from allspark.evaluation.evaluate import evaluate
from allspark.evaluation.metrics import ConfusionMatrix
from allspark.evaluation.sliding_window import Inference
from allspark.models.segmentor import build_model
from allspark.utils.errors import UserError, run_main
from allspark.visualization import pictures

PALETTE = ((0, 0, 0), (200, 30, 30), (30, 200, 30), (30, 30, 200))
SPEC = DatasetSpec("tiny", ("ground", "red", "green", "blue"), PALETTE)
SIZES = [(40, 33), (33, 40), (40, 33), (64, 48), (40, 33)]  # height, width: five images, three sizes
CPU = torch.device("cpu")


class Pointwise(nn.Module):
    """A 1x1 convolution with fixed weights: its predictions are known from the pixels alone."""

    def __init__(self, num_classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, num_classes, 1)

    def forward(self, image):
        return SimpleNamespace(logits=self.conv(image))


def write_dataset(root: Path) -> SegmentationDataset:
    rng = np.random.RandomState(0)
    samples = []
    for index, (height, width) in enumerate(SIZES):
        mask = rng.randint(0, 4, (height, width)).astype(np.uint8)
        mask[rng.rand(height, width) < 0.1] = 255
        sample = Sample(root / f"image{index}.png", root / f"mask{index}.png")
        Image.fromarray(rng.randint(0, 256, (height, width, 3)).astype(np.uint8)).save(sample.image)
        Image.fromarray(mask).save(sample.mask)
        samples.append(sample)
    return SegmentationDataset(samples, SPEC)


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path)


def run(dataset, inference=None, model=None, **options):
    return evaluate(model or Pointwise(), dataset, SPEC, CPU, inference or Inference(), **options)


def same(first, second):
    np.testing.assert_equal(vars(first), vars(second))  # nan equals nan here


def test_scores_equal_single_images(dataset):
    model, confusion = Pointwise(), ConfusionMatrix(4, 255)
    for image, mask, _ in dataset:
        confusion.update(model(normalize(image)[None]).logits.argmax(1)[0], mask)
    scores = run(dataset)
    same(scores, confusion.result(5))
    assert 0 < scores.miou < 100


@pytest.mark.parametrize("inference", [Inference(), Inference("sliding_window", 36), Inference("center_crop", 35)])
def test_batch_size_and_workers(dataset, inference):
    expected = run(dataset, inference)
    same(run(dataset, inference, batch_size=5), expected)
    same(run(dataset, inference, batch_size=2, num_workers=2), expected)


def test_mode_and_random_state_are_restored(dataset):
    model, before = Pointwise().train(), torch.get_rng_state()
    run(dataset, model=model, num_workers=1)
    assert model.training and model.conv.training
    assert torch.equal(torch.get_rng_state(), before)


def test_center_crop(dataset):
    saved = {}
    run(
        dataset, Inference("center_crop", 34), save=lambda name, image, mask, guess: saved.update({name: (mask, guess)})
    )
    confusion = ConfusionMatrix(4, 255)
    for mask, guess in saved.values():
        assert guess.shape == mask.shape
        inside = guess != 255
        assert inside.sum() == min(34, mask.shape[0]) * min(34, mask.shape[1])
        confusion.update(guess[inside], mask[inside])
    same(confusion.result(5), run(dataset, Inference("center_crop", 34)))


def test_every_image_is_saved_once(dataset):
    names = []

    def save(name, image, mask, prediction):
        assert image.dtype == mask.dtype == prediction.dtype == torch.uint8
        assert image.shape[1:] == mask.shape == prediction.shape
        names.append(name)

    run(dataset, batch_size=3, save=save)
    assert sorted(names) == [f"image{index}" for index in range(5)]


def share(samples):
    """In a process of a group: the scores, and the names of the images that were its own."""
    names = []
    options = {"batch_size": 2, "save": lambda name, *tensors: names.append(name)}
    return vars(run(SegmentationDataset(samples, SPEC), **options)), names


def test_two_processes_equal_one(dataset, pair):
    """Five images on two processes: none is counted twice to make the set divide."""
    shares = pair(share, dataset.samples)
    for scores, _ in shares:
        np.testing.assert_equal(scores, vars(run(dataset)))
    assert sorted(name for _, names in shares for name in names) == [f"image{index}" for index in range(5)]
    assert all(names for _, names in shares)


def test_bad_input(dataset, tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        run(SegmentationDataset([], SPEC))
    with pytest.raises(UserError, match="7 classes.*tiny has 4"):
        run(dataset, model=Pointwise(7))
    (tmp_path / "mask3.png").write_bytes((tmp_path / "mask3.png").read_bytes()[:60])
    for workers in (0, 1):
        with pytest.raises(UserError, match="^[^\n]*mask3.png[^\n]*$"):  # one line, from a worker too
            run(dataset, num_workers=workers)


def test_small_image_is_named(tmp_path):
    sample = Sample(tmp_path / "thin.png", tmp_path / "thin_mask.png")
    Image.new("RGB", (100, 20)).save(sample.image)
    Image.new("L", (100, 20)).save(sample.mask)
    with pytest.raises(UserError, match="thin: 100 x 20"):
        run(SegmentationDataset([sample], SPEC))


def test_index_png(tmp_path):
    mask = torch.tensor([[0, 1, 2], [3, 255, 1]], dtype=torch.uint8)
    pictures.save_index_png(mask, PALETTE, tmp_path / "new" / "mask.png")
    with Image.open(tmp_path / "new" / "mask.png") as stored:
        assert stored.mode == "P"
        np.testing.assert_array_equal(np.array(stored), mask.numpy())
        np.testing.assert_array_equal(np.array(stored.convert("RGB")), pictures.colorize(mask, PALETTE))


def test_overlay():
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    mask = torch.full((4, 4), 255, dtype=torch.uint8)
    np.testing.assert_array_equal(pictures.overlay(image, mask, PALETTE), pictures.to_rgb(image))
    mixed = pictures.overlay(image, torch.ones(4, 4, dtype=torch.uint8), PALETTE, alpha=0.5)
    np.testing.assert_array_equal(mixed[0, 0], [150, 65, 65])
    assert PALETTE[0] == (0, 0, 0), "the black class is a background: it must not darken the photo"
    plain = pictures.overlay(image, torch.zeros(4, 4, dtype=torch.uint8), PALETTE)
    np.testing.assert_array_equal(plain, pictures.to_rgb(image))


def test_grid_and_curves(dataset, tmp_path):
    examples = [pictures.GridRow(name, image, (mask, mask)) for image, mask, name in dataset]
    page = pictures.draw_grid(examples, ("image", "truth", "prediction"), SPEC.classes, PALETTE, panel_width=60)
    assert np.unique(np.asarray(page).reshape(-1, 3), axis=0).shape[0] > 10
    scores = {"supervised": [[(10, 20.0), (20, 30.0)]], "empty": [[]]}
    losses = {"supervised": [{"loss": [(5, 2.0), (10, 1.0)]}], "empty": [{}]}
    pictures.plot_curves(scores, "val mIoU (%)", tmp_path / "out" / "curves.png")
    pictures.plot_losses(losses, tmp_path / "out" / "losses.png")
    for name in ("curves", "losses"):
        with Image.open(tmp_path / "out" / f"{name}.png") as drawn:
            assert drawn.width > drawn.height > 100


@pytest.fixture
def checkpoint(dataset, tmp_path):
    """A random MiT-B0 that knows the files of `dataset` as a custom data set, written as train.py writes it."""
    custom = CustomDataConfig(classes=SPEC.classes, palette=PALETTE)
    lines = [f"{sample.image.name} {sample.mask.name}\n" for sample in dataset.samples]
    (tmp_path / "val.txt").write_text("".join(lines))
    data = DataConfig(
        dataset="tiny",
        data_root=str(tmp_path),
        crop_size=64,
        val_id_path=str(tmp_path / "val.txt"),
        num_workers=0,
        custom=custom,
    )
    recipe = Recipe(
        data=data, model=ModelConfig(encoder="mit_b0"), method=MethodConfig(name="supervised"), epochs=1, device="cpu"
    )
    torch.manual_seed(0)
    model = build_model(recipe.model, 4, 64)
    content = {"recipe": to_plain(recipe), "model": model.state_dict(), "method": {}, "step": 7, "epoch": 1}
    save_checkpoint(tmp_path / "best.pth", content | {"split": {"name": "1_8", "sha256": "5" * 64}})
    return tmp_path / "best.pth"


def arguments(checkpoint, *more):
    return ["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, more)]


def test_eval_output_files(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    more = ("--confusion", tmp_path / "confusion.png")
    eval_script.main(arguments(checkpoint, "--json", out / "scores.json", "--save-dir", out, "--local-rank", 0, *more))
    table = capsys.readouterr().out
    assert all(name in table for name in SPEC.classes) and "pixel accuracy" in table
    result = json.loads((out / "scores.json").read_text())
    keys = ["miou", "iou", "dice", "class_precision", "recall", "confusion", "pixel_accuracy", "num_images"]
    keys += ["split", "val", "checkpoint_sha256"]
    how = {"mode": "whole", "window": 64, "windows": "inside", "scales": [1.0], "flip": False}
    how |= {"precision": "fp32", "absent_as_zero": False}
    assert list(result) == [*keys, *how] and {key: result[key] for key in how} == how
    assert list(result["iou"]) == list(SPEC.classes)
    assert result["num_images"] == 5
    assert result["split"] == {"name": "1_8", "sha256": "5" * 64} and "source" not in result
    images = "".join(f"image{index}.png\n" for index in range(5))
    assert result["val"] == {"name": f"{tmp_path}/val.txt", "sha256": hashlib.sha256(images.encode()).hexdigest()}
    assert result["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    expected = {f"image{index}{kind}.png" for index in range(5) for kind in ("", "_color", "_overlay")}
    assert {path.name for path in out.iterdir()} == expected | {"scores.json"}
    confusion = ConfusionMatrix(4, 255)
    for index in range(5):  # the index PNGs are the predictions that were counted
        guess, mask = (np.array(Image.open(f / f"{n}{index}.png")) for f, n in ((out, "image"), (tmp_path, "mask")))
        confusion.update(torch.from_numpy(guess), torch.from_numpy(mask))
    counted = confusion.result(5)
    assert counted.miou == pytest.approx(result["miou"]) and counted.confusion == tuple(map(tuple, result["confusion"]))
    assert result["recall"] == counted.by_class(SPEC.classes, "recall")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300 and len(picture.getcolors(1 << 24)) > 50
    for wrong, told in (("a.jpg", "must end in .png"), ("image0.png", "exists and was not written by this program")):
        with pytest.raises(UserError, match=told):
            eval_script.main(arguments(checkpoint, "--confusion", tmp_path / wrong))


def test_eval_options(checkpoint, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("image1.png mask1.png\nimage3.png mask3.png\n")
    options = ("--mode", "sliding_window", "--scales", "0.75,1", "--flip", "--batch-size", 2, "--absent-as-zero")
    more = ("--list", tmp_path / "two.txt", "--data-root", tmp_path, "--json", tmp_path / "scores.json")
    eval_script.main(arguments(checkpoint, *options, *more))
    result = json.loads((tmp_path / "scores.json").read_text())
    assert (result["num_images"], result["mode"], result["window"]) == (2, "sliding_window", 64)
    assert (result["scales"], result["flip"], result["absent_as_zero"]) == ([0.75, 1.0], True, True)
    assert None not in result["iou"].values() and "absent" not in capsys.readouterr().out


def test_precision_of_the_network(checkpoint, tmp_path):
    masks = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        options = ("--precision", precision, "--save-dir", out, "--json", out / "scores.json")
        eval_script.main(arguments(checkpoint, *options))
        assert json.loads((out / "scores.json").read_text())["precision"] == precision
        masks[precision] = np.concatenate([np.array(Image.open(out / f"image{i}.png")).ravel() for i in range(5)])
    assert 0.5 < (masks["fp32"] == masks["bf16"]).mean() < 1  # of random weights: many pixels are near a tie
    with pytest.raises(UserError, match="precision=fp16 needs a GPU"):
        eval_script.main(arguments(checkpoint, "--precision", "fp16"))


def test_equal_stems_are_distinguished(checkpoint, tmp_path):
    lines = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "image0.png", tmp_path / folder / "frame.png")
        lines.append(f"{folder}/frame.png mask0.png\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    eval_script.main(arguments(checkpoint, "--list", tmp_path / "list.txt", "--save-dir", tmp_path / "out"))
    assert (tmp_path / "out/a/frame.png").is_file() and (tmp_path / "out/b/frame_overlay.png").is_file()


def checkpoint_of(dataset, folder, **split):
    """A random MiT-B0 of a data set of this package: the file, and the model in it."""
    data = DataConfig(dataset=dataset, data_root=str(folder), crop_size=64, num_workers=0)
    model = ModelConfig(encoder="mit_b0", decoder_channels=32)
    recipe = Recipe(data=data, model=model, method=MethodConfig(name="supervised"), epochs=1)
    torch.manual_seed(0)
    network = build_model(model, DATASETS[dataset].num_classes, 64).eval()
    content = {"recipe": to_plain(recipe), "model": network.state_dict(), "method": {}, "step": 7, "epoch": 1}
    save_checkpoint(folder / "run.pth", content | {"split": {"name": "1_8", "sha256": "5" * 64, **split}})
    return folder / "run.pth", network


def read(path):
    with Image.open(path) as picture:
        return np.array(picture), picture.mode


def frames(folder, count=2):
    """Images named as those of Cityscapes, with masks of both kinds, and a list of each kind."""
    rng, lines = np.random.RandomState(1), []
    for index in range(count):
        name = f"frankfurt_000000_{index:06}"
        Image.fromarray(rng.randint(0, 256, (64, 128, 3)).astype(np.uint8)).save(folder / f"{name}_leftImg8bit.png")
        train_ids = rng.randint(0, 19, (64, 128)).astype(np.uint8)
        Image.fromarray(train_ids).save(folder / f"{name}_gtFine_labelTrainIds.png")
        Image.fromarray(cityscapes.TO_LABEL_IDS(train_ids)).save(folder / f"{name}_gtFine_labelIds.png")
        lines.append(f"{name}_leftImg8bit.png {name}_gtFine_labelTrainIds.png\n")
    (folder / "frames.txt").write_text("".join(lines))
    (folder / "test.txt").write_text("".join(line.split()[0] + "\n" for line in lines))
    return [folder / line.split()[0] for line in lines]


@pytest.mark.parametrize("dataset", ["cityscapes", "cityscapes_labelids"])
def test_cityscapes_server_format(dataset, tmp_path, one_thread):
    images = frames(tmp_path)
    path, model = checkpoint_of(dataset, tmp_path)
    out = tmp_path / "out"
    options = ("--list", tmp_path / "frames.txt", "--mode", "whole", "--save-dir", out)
    eval_script.main(arguments(path, *options))
    for image in images:
        prefix = image.name.removesuffix("leftImg8bit.png")  # the server takes the one file <city>_<seq>_<frame>*.png
        (found,) = out.rglob(f"{prefix}*.png")
        values, mode = read(found)
        with torch.no_grad():
            prediction = model(normalize(to_tensor(read_image(image)))[None]).logits.argmax(1)[0].numpy()
        assert mode == "L" and values.shape == (64, 128) and len(np.unique(prediction)) > 1
        assert set(np.unique(values)) <= set(cityscapes.LABEL_IDS)
        np.testing.assert_array_equal(read_mask(found, DATASETS["cityscapes_labelids"]), prediction)
    eval_script.main(arguments(path, *options, "--pictures"))
    kinds = ("", "_color", "_overlay")
    assert {file.name for file in out.iterdir()} == {f"{image.stem}{kind}.png" for image in images for kind in kinds}


def test_center_crop_server_format(tmp_path):
    (image, *_) = frames(tmp_path)
    path, _ = checkpoint_of("cityscapes", tmp_path)
    more = ("--list", tmp_path / "frames.txt", "--mode", "center_crop", "--save-dir", tmp_path / "out")
    eval_script.main(arguments(path, *more))
    values, _ = read(tmp_path / "out" / image.name)
    assert (values[:, :32] == 0).all() and (values[:, 96:] == 0).all() and (values[:, 32:96] != 0).all()


def test_pascal_server_format(tmp_path):
    (image, *_) = frames(tmp_path, 1)
    path, _ = checkpoint_of("pascal", tmp_path)
    eval_script.main(arguments(path, "--list", tmp_path / "test.txt", "--save-dir", tmp_path / "out"))
    with Image.open(tmp_path / "out" / image.name) as picture:
        assert picture.mode == "P" and np.array(picture).max() < 21
        assert picture.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]  # background, aeroplane, bicycle


def test_test_set_without_masks(tmp_path, capsys):
    images = frames(tmp_path)
    path, _ = checkpoint_of("cityscapes", tmp_path)
    options = ["--list", tmp_path / "test.txt", "--save-dir", tmp_path / "out", "--mode", "whole"]
    eval_script.main(arguments(path, *options))
    assert "2 predictions" in capsys.readouterr().out
    assert all((tmp_path / "out" / image.name).is_file() for image in images)
    mixed = (tmp_path / "frames.txt").read_text().splitlines()[0] + "\n" + images[1].name
    (tmp_path / "test.txt").write_text(mixed)
    for more in ((), ("--json", tmp_path / "scores.json")):  # a mask that was forgotten; scores that cannot be
        assert run_main(eval_script.main, arguments(path, *options, *more)) == 2
        assert re.search(r"test.txt line 2.*no mask", capsys.readouterr().err)
        (tmp_path / "test.txt").write_text(f"\n{images[0].name}\n")


def test_changed_list_is_reported(tmp_path, capsys, monkeypatch):
    """Checkpoints of CamVid's split 1_8, which is in the manifest, and of one that lies here alone."""
    (image,) = frames(tmp_path, 1)
    here = tmp_path / "splits" / "camvid"
    shutil.copytree(splits.SPLITS_ROOT / "camvid", here)
    (here / "mine").mkdir()
    (here / "mine" / "labeled.txt").write_text("images/train/one.jpg labels/train/one.png\n")
    monkeypatch.setattr(splits, "SPLITS_ROOT", tmp_path / "splits")
    today = {}
    for name in ("1_8", "mine"):
        listed = read_list(here / name / "labeled.txt", Path())
        today[name] = splits.list_hash(sample.image.as_posix() for sample in listed)
    (tmp_path / "val.txt").write_text(f"{image.name} mask.png\n")
    Image.fromarray(np.zeros((64, 128), np.uint8)).save(tmp_path / "mask.png")
    val = splits.list_hash([image.name])

    def warnings(*more, **split):
        path, _ = checkpoint_of("camvid", tmp_path, **split)
        content = torch.load(path, weights_only=True)
        content["recipe"]["data"]["val_id_path"] = str(tmp_path / "val.txt")
        torch.save(content, path)
        eval_script.main(arguments(path, "--json", tmp_path / "scores.json", *more))
        assert json.loads((tmp_path / "scores.json").read_text())["split"].items() >= split.items()
        return capsys.readouterr().err.splitlines()

    assert warnings() == []  # a checkpoint of the time before the lists had hashes of their own
    for name, now in today.items():
        assert warnings(name=name, labeled=now, unlabeled="1" * 64, val=val) == []
        (warning,) = warnings(name=name, labeled="0" * 64, val=val)
        assert warning.startswith(f"warning: split {name}") and "0" * 12 in warning and now[:12] in warning
    (warning,) = warnings(name=name, labeled=now, val="2" * 64)
    assert "val.txt" in warning and "2" * 64 in warning and val in warning
    by_hand = ("--list", tmp_path / "val.txt")
    assert warnings(*by_hand, name=name, labeled=now, val="2" * 64) == []
    assert warnings(name="gone", labeled="0" * 64, val=val) == []


@pytest.mark.parametrize(
    "more, told",
    [
        (("--data-root", "/nowhere"), "/nowhere"),
        (("--list", "/nowhere.txt"), "/nowhere.txt.*--list"),
        (("--dataset", "pascal"), "pascal.*trained on tiny"),
        (("--scales", "0"), "scales"),
        (("--json", "{root}"), "--json.*folder"),
        (("--json", "{root}/val.txt"), "--json.*val.txt: exists"),
        (("--save-dir", "{root}/val.txt"), "val.txt"),
        (("--save-dir", "{root}"), "part of the input"),
        (("--list", "{root}/missing.txt"), "gone.png"),
        (("--list", "{root}/bare.txt"), "no mask"),
        (("--list", "{root}/ignored.txt"), "all mask pixels are ignored"),
        (("--list", "{root}/ignored.txt", "--absent-as-zero"), "all mask pixels are ignored"),
        (("--checkpoint", "{root}/val.txt"), "val.txt"),
    ],
)
def test_eval_errors_name_remedy(checkpoint, tmp_path, capsys, more, told):
    (tmp_path / "missing.txt").write_text("image0.png mask0.png\ngone.png mask1.png\n")
    (tmp_path / "bare.txt").write_text("image0.png\n")
    (tmp_path / "ignored.txt").write_text("image0.png void.png\n")
    Image.new("L", SIZES[0][::-1], 255).save(tmp_path / "void.png")
    more = [text.format(root=tmp_path) for text in more]
    assert run_main(eval_script.main, arguments(checkpoint, *more)) == 2
    message = capsys.readouterr().err
    assert re.search(told, message) and message.count("\n") == 1
