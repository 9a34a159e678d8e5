"""Checkpoints of train.py and imported ones: the network that predicts, its data, and refusals."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import train
from allspark import __main__ as verbs
from allspark.build import build_method, complete
from allspark.config import BottleneckConfig, DataConfig, MethodConfig, ModelConfig, Recipe
from allspark.config_io import load_config, to_plain
from allspark.data.batch import normalize
from allspark.data.datasets import DATASETS, spec_for
from allspark.data.image_io import read_image
from allspark.data.spec import voc_palette
from allspark.data.transforms import to_tensor
from allspark.engine.checkpoint import save_checkpoint
from allspark.inference import load_for_inference, training_crop
from allspark.models.segmentor import build_model
from allspark.utils.download import file_digest
from allspark.utils.errors import UserError, run_main
from allspark.weights.loading import init_from, load_encoder

CPU = torch.device("cpu")
SOURCE = {"format": "released", "file": "allspark.pth", "sha256": "1" * 64}
CAMVID = DATASETS["camvid"].num_classes


def small(bottleneck="allspark"):
    return ModelConfig(encoder="mit_b0", decoder_channels=32, bottleneck=BottleneckConfig(name=bottleneck))


def plain(config: ModelConfig) -> dict:
    """A ModelConfig as the dicts and values that files hold."""
    data = DataConfig(dataset="any", data_root="", crop_size=64)
    return to_plain(Recipe(data=data, model=config, method=MethodConfig(name="any"), epochs=1))["model"]


def imported_content(num_classes=CAMVID, crop=65, bottleneck="allspark", seed=0):
    torch.manual_seed(seed)
    model = build_model(small(bottleneck), num_classes, crop or 64).eval()
    architecture = {"model": plain(small(bottleneck)), "num_classes": num_classes, "crop_size": crop}
    return model, {"model": model.state_dict(), "architecture": architecture, "source": SOURCE}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Equal thread counts, equal sums."""


@pytest.fixture
def imported(tmp_path):
    """(path, model) of an imported checkpoint with as many classes as CamVid."""
    model, content = imported_content()
    save_checkpoint(tmp_path / "imported.pth", content)
    yield tmp_path / "imported.pth", model
    (tmp_path / "imported.pth").unlink(missing_ok=True)


@pytest.fixture
def camvid(tmp_path):
    """Three images in CamVid's layout with a val list: the root."""
    rng, root = np.random.default_rng(0), tmp_path / "camvid"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)).save(root / "images" / f"{index}.png")
        Image.fromarray(rng.integers(0, 12, (64, 80), np.uint8)).save(root / "labels" / f"{index}.png")
    (root / "val.txt").write_text("".join(f"images/{index}.png labels/{index}.png\n" for index in range(3)))
    return root


def classes_of(model, image: Path) -> np.ndarray:
    with torch.no_grad():
        return model(normalize(to_tensor(read_image(image)))[None]).logits.argmax(1)[0].numpy()


def stored(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def predict(*words):
    verbs.main(["predict", "--device", "cpu", *map(str, words)])


def told(main, words, capsys) -> str:
    """The one line that a refusal is."""
    capsys.readouterr()
    assert run_main(main, list(map(str, words))) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


# Imported weights


@pytest.mark.parametrize("crop, bottleneck", [(65, "allspark"), (None, "none")])
def test_imported_weights_equal_network(tmp_path, crop, bottleneck):
    model, content = imported_content(4, crop, bottleneck)
    content["architecture"]["model"]["pretrained"] = "/gone/mit_b0.pth"  # of the time before: nobody's business
    save_checkpoint(tmp_path / "imported.pth", content)
    loaded = load_for_inference(tmp_path / "imported.pth", CPU)
    picture = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded.model(picture).logits, model(picture).logits)
    assert not loaded.model.training
    assert (loaded.recipe, loaded.crop_size, loaded.spec.num_classes) == (None, crop, 4)
    assert loaded.spec.palette == voc_palette(4) and loaded.inference().mode == "whole"
    assert loaded.meta == {"source": SOURCE, "sha256": file_digest(tmp_path / "imported.pth")}


def test_eval_imported_weights(imported, camvid, tmp_path, capsys):
    path, model = imported
    words = ["--checkpoint", path, "--device", "cpu", "--data-root", camvid, "--list", camvid / "val.txt"]
    words += ["--json", tmp_path / "scores.json", "--save-dir", tmp_path / "out"]
    message = told(eval_script.main, words, capsys)
    assert f"{path}" in message and "--dataset" in message and "camvid" in message and "pascal" not in message
    eval_script.main([*map(str, words), "--dataset", "camvid"])
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["split"] == {"name": None, "sha256": None}
    assert result["source"] == SOURCE and result["num_images"] == 3
    assert list(result["iou"]) == list(DATASETS["camvid"].classes)
    for index in range(3):
        expected = classes_of(model, camvid / "images" / f"{index}.png")
        np.testing.assert_array_equal(stored(tmp_path / "out" / f"{index}.png"), expected)


def test_predict_imported_weights(imported, camvid, tmp_path):
    path, model = imported
    image = camvid / "images" / "0.png"
    for name, more in (("bare", ()), ("named", ("--dataset", "camvid"))):
        predict("--checkpoint", path, "--out", tmp_path / name, image, *more)
        np.testing.assert_array_equal(stored(tmp_path / name / "0.png"), classes_of(model, image))
    for name, palette in (("bare", voc_palette(CAMVID)), ("named", DATASETS["camvid"].palette)):
        with Image.open(tmp_path / name / "0.png") as picture:
            assert picture.getpalette()[: 3 * CAMVID] == [value for color in palette for value in color]


def test_window_is_training_crop(tmp_path):
    """Cityscapes' recipe says 801; a memory of side 26, which 801 to 832 pixels have, does not contradict it."""
    assert [training_crop(stated, 801) for stated in (None, 801, 832)] == [801, 801, 801]
    assert [training_crop(stated, 801) for stated in (800, 833, 513)] == [800, 833, 513]
    for crop, bottleneck, window in ((832, "allspark", 801), (97, "allspark", 97), (None, "none", 801)):
        _, content = imported_content(19, crop, bottleneck)
        save_checkpoint(tmp_path / "imported.pth", content)
        for dataset in ("cityscapes", "cityscapes_labelids"):
            loaded = load_for_inference(tmp_path / "imported.pth", CPU, dataset)
            inference = loaded.inference()
            assert (inference.mode, inference.window) == ("sliding_window", window)
            assert (loaded.spec.name, loaded.recipe.data.dataset) == (dataset, dataset)
            assert loaded.recipe.data.crop_size == loaded.crop_size == window
    with pytest.raises(UserError, match="sliding_window.*--dataset"):
        load_for_inference(tmp_path / "imported.pth", CPU).inference("sliding_window")


def change(content, **entries):
    content["architecture"].update(entries)


DAMAGES = {
    "no-source": (lambda c: c.pop("source"), "no 'source'"),
    "source-of-tensors": (lambda c: c.update(source={"file": torch.zeros(1)}), "its 'source'"),
    "no-model": (lambda c: c.pop("model"), "no 'model'"),
    "no-architecture": (lambda c: c.pop("architecture"), "not a checkpoint of train.py"),
    "architecture-list": (lambda c: c.update(architecture=[1]), "'architecture' has no 'model'"),
    "no-class-count": (lambda c: c["architecture"].pop("num_classes"), "'architecture' has no 'num_classes'"),
    "no-crop": (lambda c: c["architecture"].pop("crop_size"), "'architecture' has no 'crop_size'"),
    "unknown-key": (lambda c: c["architecture"]["model"].update(depth=3), "model.depth: unknown key"),
    "wrong-type": (lambda c: c["architecture"]["model"].update(dropout="much"), "model.dropout='much'"),
    "unknown-encoder": (lambda c: c["architecture"]["model"].update(encoder="mit_b9"), "mit_b9: unknown encoder"),
    "many-classes": (lambda c: change(c, num_classes=300), "num_classes=300"),
    "no-classes": (lambda c: change(c, num_classes=0), "num_classes=0"),
    "text-classes": (lambda c: change(c, num_classes="21"), "num_classes='21'"),
    "text-crop": (lambda c: change(c, crop_size="65"), "crop_size='65'"),
    "other-crop": (lambda c: change(c, crop_size=129), "bottleneck.memory.queue"),
    "other-classes": (lambda c: change(c, num_classes=12), "(12, "),
    "no-tensors": (lambda c: c.update(model={"weight": 1}), "does not hold tensors by name"),
    "no-names": (lambda c: c.update(model=torch.zeros(2)), "does not hold tensors by name"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_imported_checkpoint(damage, tmp_path, capsys):
    do, words = DAMAGES[damage]
    _, content = imported_content()
    do(content)
    save_checkpoint(tmp_path / "imported.pth", content)
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    argv = ["predict", "--checkpoint", tmp_path / "imported.pth", "--out", tmp_path / "out", tmp_path / "image.png"]
    message = told(verbs.main, argv, capsys)
    assert words in message and "imported.pth" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "dataset, words",
    [
        ("pascal", r"--dataset pascal has 21 classes, .*imported.pth predicts 11: .*camvid"),
        ("pascl", r"--dataset pascl: no such data set; choose one of pascal"),
    ],
)
def test_imported_weights_class_mismatch(imported, dataset, words, capsys):
    for main, verb in ((eval_script.main, []), (verbs.main, ["predict", "--out", imported[0].parent / "o", __file__])):
        argv = [*verb, "--checkpoint", imported[0], "--dataset", dataset]
        assert re.search(words, told(main, argv, capsys))


def test_start_from_imported_weights(place, tmp_path, capsys):
    _, content = imported_content(3)
    place.run.mkdir()
    save_checkpoint(place.run / "latest.pth", content)
    before = file_digest(place.run / "latest.pth")
    message = told(train.main, place.train(), capsys)
    assert "latest.pth" in message and "model.init_from=FILE" in message
    assert file_digest(place.run / "latest.pth") == before
    shutil.move(place.run / "latest.pth", tmp_path / "start.pth")
    train.main(place.train(f"model.init_from={tmp_path / 'start.pth'}", "epochs=1", "warmup_epochs=0"))
    assert "init_from" in (place.run / "train.log").read_text()


# Checkpoints of train.py


def test_trained_checkpoint_is_self_contained(finished):
    loaded = load_for_inference(finished.run / "best.pth", CPU, "tiny")
    content = torch.load(finished.run / "best.pth", weights_only=True)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, content["model"][name]), name
    assert (loaded.recipe.data.dataset, loaded.crop_size, loaded.inference().window) == ("tiny", 65, 65)
    assert loaded.meta["split"] == content["split"] and loaded.meta["epoch"] == content["epoch"]


@pytest.fixture
def with_teacher(place, tmp_path):
    """(path, student, teacher) of a run with an EMA teacher whose weights are wholly different from the student's."""
    edited = load_config(place.config, {"method.teacher": "ema"})
    recipe, spec = complete(edited), spec_for(edited.data)
    torch.manual_seed(0)
    student = build_model(recipe.model, 3, recipe.data.crop_size).eval()
    method = build_method(recipe, spec)
    method.attach(student)
    torch.manual_seed(1)
    fresh = build_model(recipe.model, 3, recipe.data.crop_size).state_dict()
    method.teacher.model.load_state_dict({name: fresh[name] for name in method.teacher.model.state_dict()})
    content = {"recipe": to_plain(recipe), "model": student.state_dict(), "method": method.state_dict()}
    rest = {"epoch": 1, "step": 3, "split": {"name": "folders", "sha256": "0" * 64}}
    save_checkpoint(tmp_path / "ema.pth", content | rest)
    return tmp_path / "ema.pth", student, method.predictor(student)


def test_teacher_is_used_for_inference(with_teacher, place, tmp_path):
    path, student, teacher = with_teacher
    assert teacher is not student
    eval_script.main(["--checkpoint", str(path), "--device", "cpu", "--save-dir", str(tmp_path / "eval")])
    predict("--checkpoint", path, "--out", tmp_path / "predict", place.root / "images" / "val")
    for name in ("val0", "val1"):
        image = place.root / "images" / "val" / f"{name}.png"
        of_teacher = classes_of(teacher, image)
        assert (of_teacher != classes_of(student, image)).mean() > 0.1
        for folder in ("eval", "predict"):
            np.testing.assert_array_equal(stored(tmp_path / folder / f"{name}.png"), of_teacher)


def test_teacher_is_used_to_start_from(with_teacher):
    """As by everything else that reads the run's network; the log says so."""
    path, student, teacher = with_teacher
    for load in (load_encoder, init_from):
        fresh = copy.deepcopy(student)
        assert f"{path} (EMA teacher): " in load(fresh, path)
        expected = teacher.state_dict()
        for name, value in fresh.state_dict().items():
            if name.startswith("encoder."):
                assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("key, value", [("orientation", "stored"), ("image_max", 4095)])
def test_import_keeps_how_images_are_read(finished, tmp_path, capsys, key, value):
    """An imported file has no data.custom."""
    content = torch.load(finished.run / "latest.pth", weights_only=True)
    content["recipe"]["data"]["custom"][key] = value
    save_checkpoint(tmp_path / "run.pth", {name: part for name, part in content.items() if name != "format"})
    words = ["weights", "import", str(tmp_path / "run.pth"), "--out", str(tmp_path / "no.pth")]
    assert run_main(verbs.main, words) == 2 and "use `weights export`" in capsys.readouterr().err


def test_student_is_imported_on_request(with_teacher, tmp_path):
    path, student, teacher = with_teacher
    for words, network in (((), teacher), (("--student",), student)):
        words = ["weights", "import", str(path), "--out", str(tmp_path / "a.pth"), "--force", *words]
        assert run_main(verbs.main, words) == 0
        tensors = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
        assert all(torch.equal(tensors[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "do, words",
    [
        (lambda c: c.pop("method"), "has no 'method'"),
        (lambda c: c["method"].popitem(), "tensors differ, first teacher.model"),
        (lambda c: c["recipe"]["method"].update(teacher="none"), "does not match"),
        (lambda c: c["recipe"]["method"].update(name="gone"), "ema.pth: method.name=gone: unknown method"),
        (lambda c: c.update(split=["1_8"]), "its 'split'"),
        (lambda c: c.update(recipe=3), "ema.pth: its recipe: the recipe=3"),
    ],
    ids=["no-method", "no-tensor", "no-teacher", "no-such-method", "no-split", "no-recipe"],
)
def test_method_state_must_match(with_teacher, do, words, capsys):
    content = torch.load(with_teacher[0], weights_only=True)
    do(content)
    torch.save(content, with_teacher[0])
    assert words in told(eval_script.main, ["--checkpoint", with_teacher[0], "--device", "cpu"], capsys)
