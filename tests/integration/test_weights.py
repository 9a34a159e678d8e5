"""`allspark weights`: recognized formats, refusals, written and fetched files.

The mathematics behind foreign names is tested in test_encoder_parity.py and test_mmsegmentation.py.
"""

import argparse
import functools
import hashlib
import json
import re
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from allspark.build import complete
from allspark.cli.weights import license_of_trained
from allspark.config import ModelConfig
from allspark.config_io import build_recipe
from allspark.data.datasets import spec_for
from allspark.inference import build_method, load_for_inference
from allspark.models import mit
from allspark.models.segmentor import build_model
from allspark.models.student import predict
from allspark.weights.loading import init_from, load_encoder
from helpers.released import GOLDEN, NAMES, close, formula, image, rename_released

CPU = torch.device("cpu")


def released(config):
    """The state_dict of the released model by the golden formula. Replace its tensors, never write to them."""
    return dict(filled(config))


@functools.cache
def filled(config):
    return {name: formula(name, shape) for name, shape in NAMES[config].items()}


@pytest.fixture(scope="module")
def original():
    """mit_b0.pth as its authors published it, with the classifier."""
    state = {n.removeprefix("backbone."): t for n, t in released("b0_pascal_baseline").items() if "backbone." in n}
    return {**state, "head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}


# Whole models of the released code


BATCH = "2x65x65_batch_context"
CONFIGS = {  # of names.json: classes, heads, crop, cases of golden/ with seed, batch and height of their image
    "b0_pascal_crop65": (21, 2, 65, {"1x65x65": (2, 1, 65), "1x97x65": (3, 1, 97), BATCH: (4, 2, 65)}),
    "b0_pascal_crop97_heads1": (21, 1, 97, {}),
    "b0_city_crop129": (19, 2, 129, {"1x129x129": (5, 1, 129)}),
    "b0_coco_crop65": (81, 2, 65, {}),
    "b0_pascal_baseline": (21, None, None, {"1x65x65": (2, 1, 65)}),
    "b0_city_crop65": (19, 2, 65, {}),
}


def save_released(state, path):
    """With the prefix of DistributedDataParallel and what else such a checkpoint holds."""
    content = {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 79}
    content["previous_best"] = max(np.mean([78.4]), 0.0)  # no number of Python
    torch.save({**content, "optimizer": {"state": {}, "param_groups": [{"lr": 0.001}]}}, path)


def model_of(path):
    """The network of an imported checkpoint, built from `architecture` alone."""
    content = torch.load(path, weights_only=True)
    architecture = content["architecture"]
    stand_in = {"data": {"dataset": "none", "data_root": "", "crop_size": 65}, "method": "supervised", "epochs": 1}
    cfg = build_recipe({**stand_in, "model": architecture["model"]}, None, str(path)).model
    model = build_model(cfg, architecture["num_classes"], architecture["crop_size"])
    model.load_state_dict(content["model"], strict=True)
    return model.eval(), content


def test_every_configuration_exists():
    assert CONFIGS.keys() == NAMES.keys()


@pytest.mark.parametrize("config", CONFIGS)
def test_released_checkpoint(config, call, tmp_path):
    classes, heads, crop, cases = CONFIGS[config]
    save_released(released(config), tmp_path / "best.pth")
    said = call("import", tmp_path / "best.pth", "--out", tmp_path / "ours.pth")
    assert "AllSpark, released code" in said and f"{len(NAMES[config])} matched, 0 missing, 0 unexpected" in said
    model, content = model_of(tmp_path / "ours.pth")
    assert content.keys() == {"format", "model", "architecture", "source"}
    assert content["source"]["file"] == "best.pth"
    assert content["source"]["sha256"] == hashlib.sha256((tmp_path / "best.pth").read_bytes()).hexdigest()
    assert content["architecture"]["num_classes"] == classes and content["architecture"]["crop_size"] == crop
    bottleneck = content["architecture"]["model"]["bottleneck"]
    assert (bottleneck["name"], bottleneck["num_heads"]) == (("none", 2) if heads is None else ("allspark", heads))
    for size, inputs in cases.items():
        width = int(size.split("_")[0].split("x")[2])
        name = "baseline" if heads is None else config.split("_")[1]
        golden = np.load(GOLDEN / f"eval_b0_{name}_{size}.npz")
        logits = predict(model, image(*inputs, width), share_keys=size == BATCH).logits
        close(logits.mean((2, 3)), golden["logits_mean"])
        close(logits[:, :, ::4, ::4], golden["logits_sub"])


def b5_shapes():
    """Names and shapes of a released MiT-B5 by analogy from B0: twice the width, a decoder of 768, more blocks."""
    shapes = {}
    for name, shape in NAMES["b0_pascal_crop65"].items():
        if name.startswith("decoder.decoder."):
            wide = [{256: 768, 1024: 3072}.get(size, size) for size in shape]
            if "linear_c" in name and name.endswith("weight"):
                wide[1] = 2 * shape[1]
        elif "queue" in name:
            wide = [shape[0], *(2 * size for size in shape[1:2]), *shape[2:]]
        else:
            wide = [*(size if size in (1, 3) else 2 * size for size in shape[:2]), *shape[2:]]
        if match := re.fullmatch(r"backbone\.block(\d)\.([01])\.(.*)", name):
            if match[2] == "0":
                depth = mit.SIZES["mit_b5"].depths[int(match[1]) - 1]
                shapes |= {f"backbone.block{match[1]}.{block}.{match[3]}": wide for block in range(depth)}
        else:
            shapes[name] = wide
    return shapes


def test_released_checkpoint_of_b5(call, tmp_path):
    state = {name: formula(name, shape) for name, shape in b5_shapes().items()}
    save_released(state, tmp_path / "best.pth")
    call("import", tmp_path / "best.pth", "--out", tmp_path / "ours.pth")
    (tmp_path / "best.pth").unlink()
    model, content = model_of(tmp_path / "ours.pth")
    (tmp_path / "ours.pth").unlink()
    assert content["architecture"]["model"]["encoder"] == "mit_b5"
    assert content["architecture"]["model"]["decoder_channels"] == 768
    own = model.state_dict()
    assert len(own) == len(state) + 1  # the memory's count of what was written
    assert all(torch.equal(own[rename_released(name)], tensor) for name, tensor in state.items())
    logits = predict(model, image(2, 1, 65, 65), share_keys=False).logits
    assert logits.shape == (1, 21, 65, 65) and logits.isfinite().all() and logits.std() > 0.1


def test_original_segformer(call, tmp_path):
    """The same network as the baseline of the released code, under the names of NVlabs/SegFormer."""
    state = {n.replace("decoder.decoder.", "decode_head."): t for n, t in released("b0_pascal_baseline").items()}
    state["decode_head.conv_seg.weight"] = torch.zeros(21, 128, 1, 1)  # which that code makes and never uses
    torch.save({"state_dict": state}, tmp_path / "segformer.b0.pth")
    said = call("import", tmp_path / "segformer.b0.pth", "--out", tmp_path / "ours.pth")
    assert "SegFormer, original" in said and "conv_seg" in said and " 0 unexpected" in said
    logits = predict(model_of(tmp_path / "ours.pth")[0], image(2, 1, 65, 65), share_keys=False).logits
    close(logits[:, :, ::4, ::4], np.load(GOLDEN / "eval_b0_baseline_1x65x65.npz")["logits_sub"])


def test_published_checkpoint(call, tmp_path):
    state = {n: t for n, t in released("b0_pascal_baseline").items() if n.startswith("backbone.")}
    state["decoder.allspark.embeddings.patch_embeddings.weight"] = torch.zeros(256, 256, 1, 1)
    state["decoder.allspark.encoder.layer.0.attn_norm1.weight"] = torch.zeros(256)
    save_released(state, tmp_path / "published.pth")
    said = call("import", tmp_path / "published.pth", "--out", tmp_path / "ours.pth", code=2)
    assert "different architecture" in said and "https://github.com/xmed-lab/AllSpark/issues/3" in said
    model = build_model(ModelConfig(encoder="mit_b0"), 3, 65)
    load_encoder(model, tmp_path / "published.pth")  # as the message says
    theirs = state["backbone.norm1.weight"]
    assert torch.equal(model.encoder.stages[0].norm.weight, theirs)


# Checkpoints of this code


def test_imas_teacher_encoder(tmp_path):
    """Of a checkpoint with student and teacher, the teacher's encoder is loaded."""
    encoder = build_model(ModelConfig(encoder="resnet50s", decoder="deeplab", decoder_channels=8), 3, 64).encoder
    teacher = {f"module.encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    student = {name: torch.zeros(()).expand_as(tensor) for name, tensor in teacher.items()}
    torch.save({"model_state": student, "teacher_state": teacher}, tmp_path / "imas.pth")
    other = build_model(ModelConfig(encoder="resnet50s_imas", decoder="deeplab", decoder_channels=8), 3, 65)
    load_encoder(other, tmp_path / "imas.pth")
    assert all(torch.equal(t, encoder.state_dict()[n]) for n, t in other.encoder.state_dict().items())


def test_own_checkpoint(finished, call, tmp_path):
    call("import", finished.run / "best.pth", "--out", tmp_path / "once.pth")
    call("import", tmp_path / "once.pth", "--out", tmp_path / "twice.pth")
    trained = load_for_inference(finished.run / "best.pth", CPU)
    x = image(0, 1, 65, 80)
    for path in (tmp_path / "once.pth", tmp_path / "twice.pth"):
        model, content = model_of(path)
        assert content["architecture"]["num_classes"] == 3 and content["architecture"]["crop_size"] == 65
        assert content["architecture"]["model"]["bottleneck"]["name"] == "allspark"
        with torch.no_grad():
            assert torch.equal(model(x).logits, trained.model(x).logits)


def test_own_checkpoint_with_heads(finished, call, tmp_path):
    """PseudoSeg's heads, which only training uses, are not imported."""
    content = torch.load(finished.run / "best.pth", weights_only=True)
    content["recipe"] = {**content["recipe"], "method": {"name": "pseudoseg"}}
    recipe = complete(build_recipe(content["recipe"], None, "test"))
    spec = spec_for(recipe.data)
    model, method = build_model(recipe.model, spec.num_classes, 65), build_method(recipe, spec)
    method.attach(model)
    assert any(name.startswith("heads.") for name in model.state_dict())
    content |= {"model": model.state_dict(), "method": method.state_dict()}
    torch.save(content, tmp_path / "best.pth")
    call("import", tmp_path / "best.pth", "--out", tmp_path / "ours.pth")
    imported = load_for_inference(tmp_path / "ours.pth", CPU).model
    assert imported.state_dict().keys() <= model.state_dict().keys()


def test_own_checkpoint_with_teacher(finished, call, tmp_path):
    content = torch.load(finished.run / "best.pth", weights_only=True)
    content["recipe"]["method"]["teacher"] = "ema"
    recipe = build_recipe(content["recipe"], None, "test")
    spec = spec_for(recipe.data)
    model, method = build_model(recipe.model, spec.num_classes, 65), build_method(recipe, spec)
    method.attach(model)  # a teacher with weights of its own
    content["method"] = method.state_dict()
    torch.save(content, tmp_path / "best.pth")
    call("import", tmp_path / "best.pth", "--out", tmp_path / "ours.pth")
    x = image(0, 1, 65, 80)
    with torch.no_grad():
        assert torch.equal(model_of(tmp_path / "ours.pth")[0](x).logits, method.teacher.model(x).logits)


def test_own_state_dict(finished, call, tmp_path):
    state = torch.load(finished.run / "best.pth", weights_only=True)["model"]
    torch.save(state, tmp_path / "state.pth")
    call("import", tmp_path / "state.pth", "--out", tmp_path / "ours.pth")
    content = model_of(tmp_path / "ours.pth")[1]
    assert content["architecture"]["crop_size"] == 65 and content["architecture"]["model"]["decoder_channels"] == 32
    assert all(torch.equal(content["model"][name], tensor) for name, tensor in state.items())


# Encoders


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_encoder_file(suffix, source, original, call, tmp_path):
    out = tmp_path / f"ours{suffix}"
    said = call("import", source, "--out", out)
    assert "mit_b0" in said and f"{len(original) - 2} matched, 0 missing, 0 unexpected" in said
    assert "head.weight, head.bias" in said and f"model.pretrained={out}" in said
    state = torch.load(out, weights_only=True) if suffix == ".pth" else load_file(out)
    assert all(torch.equal(state[rename_released(name)], original[name]) for name in original if "head." not in name)
    model = build_model(ModelConfig(encoder="mit_b0"), 3, 65)
    assert f"{len(state)} tensors" in load_encoder(model, out)
    assert all(torch.equal(model.encoder.state_dict()[name], tensor) for name, tensor in state.items())


def test_bin_and_safetensors(original, call, tmp_path):
    torch.save(original, tmp_path / "pytorch_model.bin")
    save_file(original, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        call("import", tmp_path / name, "--out", tmp_path / "ours.pth", "--force")


def test_half_precision(original, call, tmp_path):
    torch.save({name: tensor.half() for name, tensor in original.items()}, tmp_path / "half.pth")
    call("import", tmp_path / "half.pth", "--out", tmp_path / "ours.pth")
    assert all(t.dtype == torch.float32 for t in torch.load(tmp_path / "ours.pth", weights_only=True).values())


def test_fine_tuning_from_foreign_model(tmp_path):
    """init_from reads what import reads; the memory of the new model stays as fresh as it is."""
    save_released(released("b0_pascal_crop65"), tmp_path / "best.pth")
    cfg = ModelConfig(encoder="mit_b0", bottleneck=build_bottleneck("allspark"))
    model = build_model(cfg, 4, 97)
    queue = model.bottleneck.memory.queue.clone()
    assert "newly initialized: bottleneck.memory, decoder.classifier" in init_from(model, tmp_path / "best.pth")
    theirs = released("b0_pascal_crop65")
    assert torch.equal(model.decoder.fuse.conv.weight, theirs["decoder.decoder.linear_fuse.conv.weight"])
    assert torch.equal(model.bottleneck.cross_branch.q.weight, theirs["decoder.allspark.attn.q_l2u.weight"])
    assert torch.equal(model.bottleneck.memory.queue, queue) and not model.bottleneck.memory.filled.any()


def build_bottleneck(name):
    return type(ModelConfig().bottleneck)(name=name)


# Refusals


def without(name):
    return lambda state: state.pop(name)


def with_value(name, value):
    return lambda state: state[name].view(-1)[3:4].fill_(value)


def replaced(name, *shape, dtype=None):
    return lambda state: state.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without("block1.0.attn.q.weight"), ("1 tensors", "missing", "encoder", "stages.0.blocks.0.attn.q.weight")),
        (with_value("block2.1.mlp.fc1.bias", float("nan")), ("block2.1.mlp.fc1.bias", "NaN", "stages.1.blocks.1.ffn")),
        (with_value("norm4.weight", float("inf")), ("norm4.weight", "infinite")),
        (replaced("block3.0.attn.kv.weight", 640, 320), ("stages.2.blocks.0.attn.kv.weight", "(320, 160)")),
        (replaced("norm1.weight", 32, dtype=torch.int8), ("stages.0.norm.weight", "torch.int8")),
        (replaced("patch_embed3.proj.weight", 320, 64, 3, 3), ("32/64/320/256", "mit_b0 32/64/160/256")),
        (replaced("block2.2.norm1.weight", 64), ("2/3/2/2 blocks", "of one model")),
    ],
    ids=["missing", "nan", "inf", "shape", "type", "width", "depth"],
)
def test_damaged_encoder(damage, told, original, call, tmp_path):
    state = {name: tensor.clone() for name, tensor in original.items()}
    damage(state)
    torch.save(state, tmp_path / "mit_b0.pth")
    said = call("import", tmp_path / "mit_b0.pth", "--out", tmp_path / "ours.pth", code=2)
    assert str(tmp_path / "mit_b0.pth") in said
    for words in told:
        assert words in said
    assert not (tmp_path / "ours.pth").exists()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without("decoder.decoder.linear_pred.weight"), ("decoder.classifier.weight is missing",)),
        (without("decoder.decoder.linear_fuse.bn.running_mean"), ("missing", "decoder.fuse.bn.running_mean")),
        (without("decoder.allspark.map_in.0.bias"), ("missing", "bottleneck.map_in.bias")),
        (replaced("decoder.allspark.attn.kv_queue", 21, 256, 10), ("10 cells", "not a square number")),
        (replaced("decoder.allspark.attn.k_u.weight", 256, 256), ("bottleneck.self_branch.k.weight", "(512, 256)")),
    ],
    ids=["classifier", "statistics", "bottleneck", "memory", "heads"],
)
def test_damaged_model(damage, told, call, tmp_path):
    state = released("b0_pascal_crop65")
    damage(state)
    save_released(state, tmp_path / "best.pth")
    said = call("import", tmp_path / "best.pth", "--out", tmp_path / "ours.pth", code=2)
    for words in told:
        assert words in said
    assert not (tmp_path / "ours.pth").exists()


def test_unmatched_tensors_are_listed(original, call, tmp_path):
    torch.save({**original, "block1.0.attn.gate.weight": torch.zeros(1)}, tmp_path / "mit_b0.pth")
    said = call("import", tmp_path / "mit_b0.pth", "--out", tmp_path / "ours.pth")
    assert "1 unexpected" in said and "left out: block1.0.attn.gate.weight" in said


def test_invalid_sources(source, original, call, tmp_path):
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    (tmp_path / "pytorch_model-00001-of-00003.bin").write_bytes(source.read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    (tmp_path / "half.pth").write_bytes(source.read_bytes()[:100_000])
    torch.save({"model": original, "args": argparse.Namespace(lr=1)}, tmp_path / "code.pth")
    for name, told in (
        ("resnet.pth", ("no MiT, ResNet or DINOv2 encoder", "layer1.0.conv1.weight", "mmsegmentation")),
        ("pytorch_model-00001-of-00003.bin", ("one of several files", "max_shard_size")),
        ("model.safetensors.index.json", ("one of several files",)),
        ("half.pth", ("not a readable weight file",)),
        ("code.pth", ("it contains argparse.Namespace", "save only its state_dict")),
        ("absent.pth", ("no such weight file",)),
        ("resnet50s_imas.pth", ("no such weight file", "weights fetch NAME")),
        ("dinov2_small.pth", ("no such weight file", "weights fetch dinov2_small")),
        (".", ("is a folder", "model.safetensors")),
    ):
        said = call("import", tmp_path / name, "--out", tmp_path / "ours.pth", code=2)
        assert str(tmp_path / name) in said
        for words in told:
            assert words in said


def test_invalid_targets(source, call, tmp_path):
    there = tmp_path / "there.pth"
    there.write_bytes(b"earlier work")
    assert "--force" in call("import", source, "--out", there, code=2)
    assert there.read_bytes() == b"earlier work"
    assert ".safetensors" in call("import", source, "--out", tmp_path / "ours.onnx", code=2)
    assert "is the source file" in call("import", source, "--out", source, "--force", code=2)
    save_released(released("b0_pascal_baseline"), tmp_path / "best.pth")
    said = call("import", tmp_path / "best.pth", "--out", tmp_path / "ours.safetensors", code=2)
    assert "complete model" in said and ".pth" in said
    call("import", source, "--out", there, "--force")
    assert len(torch.load(there, weights_only=True)) > 100


@pytest.mark.parametrize("kind", ["encoder.pth", "encoder.safetensors", "model.pth"])
def test_full_disk(kind, source, call, tmp_path):
    if kind == "model.pth":
        source = tmp_path / "best.pth"
        save_released(released("b0_pascal_baseline"), source)
    out = tmp_path / "out" / kind
    out.parent.mkdir()
    out.write_bytes(b"earlier work")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        said = call("import", source, "--out", out, "--force", code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(out) in said and "cannot be written" in said
    assert [path.name for path in out.parent.iterdir()] == [kind] and out.read_bytes() == b"earlier work"


# inspect


def test_inspect(source, call, tmp_path):
    said = call("inspect", source)
    assert hashlib.sha256(source.read_bytes()).hexdigest() in said
    assert "mit_b0" in said and "2 unexpected" not in said and "head.weight" in said and "research" in said
    state = released("b0_pascal_crop65")
    state["decoder.\x1b[2J"] = state.pop("decoder.allspark.map_in.0.bias")
    save_released(state, tmp_path / "best.pth")
    said = call("inspect", tmp_path / "best.pth")
    assert "\x1b" not in said and r"decoder.\x1b[2J" in said
    assert "21 classes, decoder mlp with 256 channels, bottleneck with 2 heads and a memory for crops of 65" in said
    assert "1 missing" in said and "missing: bottleneck.map_in.bias" in said


def test_inspect_own(finished, call, tmp_path):
    said = call("inspect", finished.run / "best.pth")
    assert "checkpoint of this code" in said and "tiny" in said and "3 classes, decoder mlp with 32 channels" in said
    assert "license: yours to choose" in said and "trained from random weights" in said and "NVIDIA" not in said
    assert "(mine.pth); published mit_b0: NVIDIA" in license_of_trained(
        ModelConfig(encoder="mit_b0", pretrained="mine.pth")
    )
    call("import", finished.run / "best.pth", "--out", tmp_path / "ours.pth")
    assert "imported: format AllSpark, this code, file best.pth, sha256" in call("inspect", tmp_path / "ours.pth")
    torch.save({"format": "allspark-1", "model": {"encoder.norm": torch.zeros(1)}}, tmp_path / "stub.pth")
    assert "stub.pth" in call("inspect", tmp_path / "stub.pth", code=2)


def test_real_process(source, fork_process, tmp_path):
    process = fork_process(["-m", "allspark", "weights", "import", source, "--out", tmp_path / "ours.pth"])
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "0 missing" in out and (tmp_path / "ours.pth").is_file()
