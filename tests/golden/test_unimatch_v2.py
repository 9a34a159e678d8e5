"""Recorded numbers of the released UniMatch V2 (tests/golden/data), reproduced from its published checkpoint format."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval as evaluation
from allspark import __main__ as verbs
from allspark.config import ModelConfig, OptimConfig
from allspark.data.batch import LabeledBatch, UnlabeledBatch, normalize
from allspark.engine.optim import build_optimizer, poly_lr, set_lr
from allspark.inference import load_for_inference
from allspark.losses import CrossEntropy
from allspark.methods import METHODS, Progress
from allspark.methods.unimatch_v2 import ComplementaryDropout
from allspark.models.segmentor import build_model
from allspark.models.student import Student
from allspark.weights.key_maps import KEY_MAPS
from allspark.weights.loading import WeightFile, load_matching, read_weights, to_our_names
from allspark.weights.recognize import recognize
from helpers.released import GOLDEN, close, formula, image, label

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = json.loads((GOLDEN / "unimatch_v2_names.json").read_text())
KEY_MAP = next(each for each in KEY_MAPS if each.title.startswith("UniMatch V2"))
UNUSED = {"backbone.mask_token", *(name for name in NAMES if "refinenet4.resConfUnit1" in name)}
CLASSES = 21


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "unimatch_v2_dpt_small.npz")


@pytest.fixture(scope="module")
def state():
    return {name: formula(name, shape) for name, shape in NAMES.items()}


@pytest.fixture(scope="module")
def imported(state, tmp_path_factory):
    """A published checkpoint with a student of zeros and the formula's teacher, and what is imported from it."""
    folder = tmp_path_factory.mktemp("unimatch_v2")
    teacher = {f"module.{name}": tensor for name, tensor in state.items()}
    student = {name: torch.zeros(1).expand_as(tensor) for name, tensor in teacher.items()}
    torch.save({"model": student, "model_ema": teacher, "epoch": 59, "previous_best": 85.5}, folder / "best.pth")
    verbs.main(["weights", "import", str(folder / "best.pth"), "--out", str(folder / "ours.pth")])
    yield folder / "ours.pth"
    for file in folder.glob("*.pth"):
        file.unlink()


@torch.no_grad()
def test_evaluation(imported, golden):
    model = load_for_inference(imported, torch.device("cpu")).model
    cases = {"eval_2x70x98": (201, 2, 70, 98), "eval_1x518x518": (202, 1, 518, 518), "eval_1x56x154": (203, 1, 56, 154)}
    for case, inputs in cases.items():
        logits = model(image(*inputs)).logits
        close(logits.mean((2, 3)), golden[f"{case}/logits_mean"])
        step = 14 if "518" in case else 4
        close(logits[:, :, ::step, ::step], golden[f"{case}/logits_sub"])


@torch.no_grad()
def test_published_evaluation(imported, tmp_path):
    """predict and eval.py resize to the nearest multiples of 14 and back, with corners aligned, as released."""
    pixels = np.random.default_rng(0).integers(0, 256, (75, 100, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    model = load_for_inference(imported, torch.device("cpu")).model
    x = normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    logits = model(F.interpolate(x, (70, 98), mode="bilinear", align_corners=True)).logits
    expected = F.interpolate(logits, (75, 100), mode="bilinear", align_corners=True).argmax(1)[0].numpy()
    common = ["--checkpoint", str(imported), "--dataset", "pascal", "--device", "cpu"]
    verbs.main(["predict", *common, "--out", str(tmp_path / "out"), str(tmp_path / "photo.png")])
    found = np.array(Image.open(tmp_path / "out" / "photo.png"))
    assert (found == expected).mean() > 0.999  # two logits may be equal up to rounding
    (tmp_path / "list.txt").write_text("photo.png out/photo.png")
    scores = tmp_path / "scores.json"
    words = ["--data-root", str(tmp_path), "--list", str(tmp_path / "list.txt"), "--json", str(scores)]
    evaluation.main([*common, *words])
    assert json.loads(scores.read_text())["miou"] == 100


def test_student(imported):
    """The same file holds a student of zeros."""
    path = imported.with_name("best.pth")
    assert not any(tensor.any() for tensor in read_weights(path, student=True).tensors.values())
    assert read_weights(path).teacher and not read_weights(path, student=True).teacher


def test_base_size():
    """The names of the base model are those of the small one, with twice the width; nothing is missing."""
    double = {64: 128, 48: 96, 96: 192, 192: 384, 384: 768, 1152: 2304, 1536: 3072}
    shapes = {name: [double.get(size, size) for size in shape] for name, shape in NAMES.items()}
    tensors = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    found = recognize(WeightFile("base.pth", tensors, {}))
    model = found.architecture.model
    assert (model.encoder, model.decoder, model.decoder_channels) == ("dinov2_base", "dpt", 128)
    assert not found.result.bad and {*found.result.unexpected} == UNUSED


class RecordedMask(ComplementaryDropout):
    """The channel mask of a recorded step for two images of two views; image 0 keeps its channels."""

    def __init__(self, seed):
        super().__init__()
        object.__setattr__(self, "seed", seed)

    def draw_mask(self, feature, perturbed, num_labeled):
        mask = torch.from_numpy(2.0 * np.random.RandomState(self.seed).randint(0, 2, (2, 384))).to(feature)
        mask[0] = 1
        return torch.cat((mask, 2 - mask))[..., None, None]


def step_batches(step):
    seed = 1000 + 100 * step
    weak, *strong = (image(seed + offset, 2, 70, 70) for offset in (20, 30, 40))
    valid = torch.ones(2, 70, 70, dtype=torch.bool)
    valid[0, 50:], valid[1, :, 60:] = False, False
    boxes = torch.zeros(2, 2, 70, 70, dtype=torch.bool)  # view, image
    boxes[0, 0, 10:40, 5:45] = boxes[0, 1, 20:60, 30:70] = boxes[1, 1, :35, :35] = True
    labeled = LabeledBatch(image(seed, 2, 70, 70), label(seed + 10, 2, 70, 70, CLASSES))
    return labeled, UnlabeledBatch(weak, tuple(strong), valid, tuple(boxes))


def test_trajectory(state, golden):
    """Six steps of the loop's own parts: teacher, CutMix, complementary dropout, AdamW, schedule."""
    cfg = ModelConfig(encoder="dinov2_small", decoder="dpt", drop_path=0.0, dropout=0.0)
    model = build_model(cfg, CLASSES, 70).train()
    load_matching(model, to_our_names(WeightFile("small.pth", state, {}))[1])
    method = METHODS["unimatch_v2"](CrossEntropy(), threshold=0.3)
    method.attach(model)
    optim = OptimConfig(name="adamw", lr=5e-6, lr_multi=40, weight_decay=0.01, lr_one_step_late=True)
    optimizer = build_optimizer(optim, model)
    ours = {name: KEY_MAP.translate(name) for name in map(str, golden["step/grad_names"]) if name not in UNUSED}
    assert {*ours.values()} == {name for name, _ in model.named_parameters()}

    def check_norms(tensors, recorded, tolerance):
        for name, norm in zip(map(str, golden["step/grad_names"]), golden[recorded], strict=True):
            if name in ours:
                found = tensors[ours[name]].norm().item()
                assert abs(found - norm) <= max(tolerance * norm, 1e-6), (recorded, name)

    for step in range(6):
        set_lr(optimizer, poly_lr(optim, step, 10))
        labeled, unlabeled = step_batches(step)
        pseudo = method.teacher.predict(unlabeled.weak)
        confident = (pseudo.confidence >= 0.3)[unlabeled.valid].float().mean()
        assert abs(confident.item() - golden["step/mask_ratio"][step]) < 1e-3
        method.perturb = RecordedMask(300 + step)
        progress = Progress(step, epoch=0, total_steps=10)
        losses = method.losses(Student(model), labeled, unlabeled, progress)
        optimizer.zero_grad()
        losses["loss"].backward()
        if step == 0:
            assert abs(pseudo.confidence.mean().item() - golden["step/conf_mean"]) < 1e-5
            close(model(labeled.image).logits.detach()[:, :, ::4, ::4], golden["step/pred_x_sub"])
            check_norms({name: p.grad for name, p in model.named_parameters()}, "step/grad_norms", 0.01)
        optimizer.step()
        method.after_step(Student(model), progress)
        actual = [losses[name].item() for name in ("loss_x", "loss_u_s1", "loss_u_s2", "loss")]
        np.testing.assert_allclose(actual, golden["step/losses"][step], atol=5e-4 if step else 1e-5, rtol=0)
    check_norms(dict(model.named_parameters()), "step/param_norms", 1e-3)
    check_norms(dict(method.teacher.model.named_parameters()), "step/ema_norms", 1e-3)
