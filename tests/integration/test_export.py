"""Exported models: same logits at any size, evaluated weights, the scripts of the docs, refusals."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import train
from allspark.__main__ import main
from allspark.cli import export as cli_export
from allspark.cli.export import CHECKED, EXAMPLE, NEEDS, Exported, open_onnx, verify
from allspark.config import ModelConfig
from allspark.data.batch import normalize
from allspark.engine.checkpoint import TO_RESUME, load_checkpoint
from allspark.inference import load_for_inference
from allspark.models.segmentor import build_model
from allspark.utils.errors import UserError, run_main
from allspark.weights.loading import init_from
from helpers import REPO
from helpers.tiny_dataset import Place, write_recipe

DOCS = REPO / "docs" / "export.md"
SIZES = ((1, 64, 64), (4, 65, 80), (1, 170, 96))  # batch, height, width


@pytest.fixture(scope="module")
def trained(tiny_root, tmp_path_factory, one_thread):
    """A short run of a network with bottleneck, padding and an EMA teacher, and the teacher. Read it, no more."""
    folder = tmp_path_factory.mktemp("trained")
    place = Place(tiny_root, write_recipe(folder / "recipe.yaml", tiny_root), folder / "run")
    teacher = ("method.teacher=ema", "method.teacher_momentum=0.99")
    train.main(place.train("epochs=1", "warmup_epochs=0", "model.encoder=timm:test_resnet", *teacher))
    yield place.run / "best.pth", load_for_inference(place.run / "best.pth", torch.device("cpu"))
    for file in folder.rglob("*.pth"):
        file.unlink()


def export(checkpoint, form, out, *words):
    return run_main(main, ["export", "--checkpoint", str(checkpoint), "--format", form, "--out", str(out), *words])


def differences(run, model):
    """Largest difference between the file and the network, at each size."""
    generator = torch.Generator().manual_seed(3)
    for batch, height, width in SIZES:
        image = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            got, want = run(image), model(normalize(image)).logits
        assert got.shape == (batch, 3, height, width)
        yield float((got - want).abs().max())


def run_script_of_docs(mark, folder, monkeypatch, classes):
    """The script as it stands in the docs, beside a photo -> (the mask that it wrote, the photo, its names)."""
    (code,) = (
        text for text in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S) if mark in text
    )
    assert "allspark" not in code and len(re.findall(r"^[^#\s]", code, re.M)) <= 14
    photo = np.random.default_rng(0).integers(0, 256, (90, 121, 3)).astype(np.uint8)
    Image.fromarray(photo).save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "docs/export.md", "exec"), names)
    mask = Image.open(folder / "mask.png")
    assert mask.mode == "P" and mask.size == (121, 90) and np.asarray(mask).max() < classes
    return np.asarray(mask), np.array(Image.open(folder / "photo.jpg")), names


def assert_no_paths(file, *folders):
    """Neither this machine's folders nor the traces of an exporter, in the file or in a member of the archive."""
    contents = [file.read_bytes()]
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            contents = [name.encode() + archive.read(name) for name in archive.namelist()]
    for content in contents:
        for folder in (REPO, "site-packages", *folders):
            assert str(folder).encode() not in content


def agrees(mask, photo, model):
    """The share of pixels in which the mask is the network's."""
    with torch.no_grad():
        want = model(normalize(torch.from_numpy(photo).permute(2, 0, 1)[None])).logits.argmax(1)[0]
    return (want.numpy() == mask).mean()


def test_torch_program(trained, tmp_path, monkeypatch, capsys):
    """What is exported is the EMA teacher, which is evaluated, and not its student."""
    (checkpoint, loaded), file = trained, tmp_path / "model.pt2"
    assert export(checkpoint, "torch", file) == 0
    assert re.search(r"checked: logits differ by at most \d.\de[-+]\d\d", capsys.readouterr().out)
    assert_no_paths(file, checkpoint.parent)
    mask, photo, names = run_script_of_docs("torch.export", tmp_path, monkeypatch, 3)
    assert agrees(mask, photo, loaded.model) > 0.999
    run = names["network"]  # to load the file takes seconds
    assert max(differences(run, loaded.model)) < 1e-4
    student = build_model(loaded.recipe.model, 3, loaded.crop_size)
    student.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    assert max(differences(run, student.eval())) > 1e-3
    before = file.read_bytes()
    assert export(checkpoint, "torch", file) == 2 and file.read_bytes() == before  # without --force
    assert "overwrite it with --force" in capsys.readouterr().err


def test_onnx(trained, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    (checkpoint, loaded), file = trained, tmp_path / "model.onnx"
    file.write_text("an older one")
    assert export(checkpoint, "onnx", file, "--force") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert max(differences(open_onnx(file), loaded.model)) < 1e-4
    assert_no_paths(file, checkpoint.parent)
    proto = onnx.load(file)
    (value,) = proto.graph.input
    sides = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
    assert (value.name, sides) == ("image", ["batch", 3, "height", "width"])
    about = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(about["classes"]) == ["ground", "left", "right"]
    assert json.loads(about["image_max"]) is None
    assert json.loads(about["evaluated"]) == {"mode": "whole", "window": 65, "windows": "inside"}
    assert json.loads(about["channels"]) == 3 and about["orientation"] == "shown"
    mask, photo, _ = run_script_of_docs("onnxruntime", tmp_path, monkeypatch, 3)
    assert agrees(mask, photo, loaded.model) > 0.999


def test_onnx_size(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    monkeypatch.setattr(cli_export, "ONNX_LIMIT", 1000)
    assert export(trained[0], "onnx", tmp_path / "model.onnx") == 2
    assert "an ONNX file holds less than 2 GiB, use --format torch" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()


def test_weights_to_hand_on(trained, tmp_path, tiny_root):
    """The teacher alone, in a small file without absolute paths, for every use of a checkpoint but resuming."""
    (checkpoint, loaded), file = trained, tmp_path / "model.pth"
    content = torch.load(checkpoint, weights_only=True)
    content["recipe"]["model"]["pretrained"] = "/home/me/mit.pth"
    content["split"]["name"] = str(tmp_path / "lists" / "labeled.txt")
    torch.save(content, tmp_path / "best.pth")
    assert run_main(main, ["weights", "export", str(tmp_path / "best.pth"), "--out", str(file)]) == 0
    assert_no_paths(file, checkpoint.parent, tiny_root, tmp_path, "/home/me")
    network_bytes = sum(value.nbytes for value in loaded.model.state_dict().values())
    assert file.stat().st_size < 1.5 * network_bytes + 100_000 < checkpoint.stat().st_size / 2
    again = load_for_inference(file, torch.device("cpu"))
    image = torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        assert torch.equal(again.model(image).logits, loaded.model(image).logits)
    assert again.spec == loaded.spec and again.inference() == loaded.inference()
    assert again.meta["split"]["name"] == "labeled.txt" and again.recipe.data.data_root == "data"

    for name, options in (("own", ()), ("handed", ("--data-root", tiny_root))):
        source = checkpoint if name == "own" else file
        evaluate = ["--checkpoint", source, "--json", tmp_path / f"{name}.json", "--device", "cpu", *options]
        assert run_main(eval_script.main, [*map(str, evaluate)]) == 0
    own, handed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "handed"))
    assert own["iou"] == handed["iou"]
    model = build_model(loaded.recipe.model, 3, 65)
    assert "loaded" in init_from(model, file)
    for name, value in again.model.state_dict().items():
        assert name.startswith("decoder.classifier.") or torch.equal(model.state_dict()[name], value), name
    with pytest.raises(UserError, match="has no 'optimizer'"):
        load_checkpoint(file, TO_RESUME)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Exported(build_model(ModelConfig(encoder="timm:test_convnext", decoder_channels=8), 3, 65)).eval()


def test_mismatch_is_not_written(network):
    """A little everywhere, at one size alone, in windows alone, not at all; and a size that is not taken."""

    def at(sizes, more):
        return lambda image: network(image) + more * (tuple(image.shape[-2:]) in sizes)

    whole = {(height, width) for _, height, width in CHECKED}
    assert EXAMPLE[1:] not in whole
    assert "differ by at most 0.0e+00" in verify(network, network, 65, Path("m.onnx"))
    for run in (at(whole, 1e-3), at({(300, 190)}, 2e-4), at({(300, 190)}, float("nan"))):
        with pytest.raises(UserError, match="m.onnx: not written: its logits differ"):
            verify(run, network, 65, Path("m.onnx"))
    ramp = torch.linspace(0, 1, 3).view(1, 3, 1, 1)
    with pytest.raises(UserError, match="in windows by"):
        verify(at({(65, 65)}, ramp), network, 65, Path("m.onnx"))
    with pytest.raises(UserError, match=r"does not accept images of \(1, 3, 224, 224\)"):
        verify(lambda image: network(image if image.shape[-1] != 224 else image[:, :2]), network, 65, Path("m.onnx"))


@pytest.mark.parametrize(
    ("form", "name", "told"),
    [
        ("torch", "m.onnx", "ends in .pt2 for --format torch"),
        ("torch", "m.pt2", "best.pth"),
        ("torch", ".", "ends in .pt2"),
    ],
)
def test_refusals(form, name, told, tmp_path, capsys):
    """A wrong name before anything is read; a checkpoint that is not there; a folder."""
    assert export(tmp_path / "best.pth", form, tmp_path / name) == 2
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_missing_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(NEEDS, "onnx", ("torch", "nobody_has_this", "nor_that"))
    assert export("best.pth", "onnx", tmp_path / "m.onnx") == 2
    assert "pip install nobody_has_this nor_that" in capsys.readouterr().err
