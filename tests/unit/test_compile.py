"""compile=true gives the numbers of the eager network, and no graph is compiled twice."""

import pytest
import torch
from torch._dynamo.utils import counters

from allspark.config import BottleneckConfig, ModelConfig
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.losses import CrossEntropy
from allspark.methods import METHODS, Progress
from allspark.models.segmentor import build_model
from allspark.models.student import Student
from allspark.train_step import TrainState

SIDE, CLASSES = 64, 5


def batches(step):
    generator = torch.Generator().manual_seed(step)
    image_x, image_u = torch.randn(2, 2, 3, SIDE, SIDE, generator=generator)
    mask = torch.randint(CLASSES, (2, SIDE, SIDE), generator=generator)
    return LabeledBatch(image_x, mask), UnlabeledBatch(image_u, (), torch.ones_like(mask, dtype=torch.bool), ())


def losses_of(backend):
    """Three steps of AllSpark, an image of another size between them; the losses, and the graphs after each step."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    bottleneck = BottleneckConfig(name="allspark", dropout=0.0)
    cfg = ModelConfig(encoder="tiny", drop_path=0.0, dropout=0.0, bottleneck=bottleneck)
    model = build_model(cfg, CLASSES, SIDE).train()
    if backend:
        model.compile_parts(backend)
    method = METHODS["allspark"](CrossEntropy())
    losses, graphs = [], []
    for step in range(3):
        loss = method.losses(
            Student(model, read_memory=step >= 1), *batches(step), Progress(step, epoch=step, total_steps=3)
        )["loss"]
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # as train.py evaluates
            model.eval()(torch.randn(1, 3, 40 + step, 50))
        model.train()
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs


def test_compiled_model_trains_alike():
    eager, none = losses_of(None)
    compiled, graphs = losses_of("eager")  # graphs are made and looked up as ever, and run as they are
    assert compiled == pytest.approx(eager, abs=1e-5)
    assert not any(none) and graphs[0] > 0 and len(set(graphs)) == 1


def test_compiled_teacher_follows_the_student():
    """Its graphs read the weights that it has now."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build_model(ModelConfig(encoder="tiny"), CLASSES, SIDE)
    method = METHODS["unimatch_v2"](CrossEntropy())
    method.attach(model)
    state = TrainState(None, model, method, stepper=None, total_steps=3, graphs=None)
    assert state.networks == [model, method.teacher.model]
    image, logits = batches(0)[0].image, []
    method.teacher.model.compile_parts("eager")
    counters.clear()
    for stance in ("default", "force_eager", "default"):
        with torch.no_grad(), torch.compiler.set_stance(stance):
            logits.append(method.teacher.predict(image).logits)
        if stance == "force_eager":
            model.decoder.classifier.weight.data.mul_(2)
            method.teacher.update(model, step=0)
    torch.testing.assert_close(logits[0], logits[1])
    with torch.no_grad():
        torch.testing.assert_close(logits[2], model.eval()(image).logits)
    assert not torch.allclose(logits[0], logits[2]) and counters["stats"]["unique_graphs"] > 0


def test_compiled_resnet_blocks():
    """Dynamo refuses what keeps their batch norms from counting a batch twice, so they stay as they are."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build_model(ModelConfig(encoder="resnet50", dropout=0.0, checkpointing=True), CLASSES, SIDE).train()
    image = batches(0)[0].image
    eager = model(image).logits
    model.compile_parts("eager")
    compiled = model(image).logits
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    compiled.sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
