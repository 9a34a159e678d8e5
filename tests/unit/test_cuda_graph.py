"""What replays steps as CUDA graphs, with a stand-in for the graph: the same update on static tensors."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from allspark.build import build_method, complete
from allspark.config_io import load_recipe
from allspark.cuda_graph import WARMUP, Graph, GraphedUpdate, clone, tensors_of, why_eager
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.data.datasets import spec_for
from allspark.methods import METHODS
from allspark.utils.errors import UserError


class StaticTensors(Graph):
    """Runs the captured update on its static inputs instead of replaying kernels."""

    def __init__(self, update, labeled, unlabeled):
        self.batches, self.update = (clone(labeled), clone(unlabeled)), update
        self.graph, self.losses = SimpleNamespace(replay=self.run), {}

    def run(self):
        self.losses = self.update(*self.batches)


def batch(seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    image, weak, strong = torch.randn(3, 2, 3, size, size, generator=generator)
    mask = torch.randint(5, (2, size, size), generator=generator)
    return LabeledBatch(image, mask), UnlabeledBatch(weak, (strong, strong), mask > 1, (mask > 2, mask > 3))


def make_update(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def update(labeled, unlabeled):
        inside = unlabeled.cutmix[1].unsqueeze(1) | unlabeled.valid.unsqueeze(1)
        loss = (
            model(labeled.image) - model(unlabeled.strong[0] * inside)
        ).square().mean() + labeled.mask.float().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.detach()}

    return update


def test_replayed_steps_equal_eager_ones():
    torch.manual_seed(0)
    eager = nn.Conv2d(3, 2, 1)
    graphed, losses = copy.deepcopy(eager), ([], [])
    updates = make_update(eager), make_update(graphed)
    runner = GraphedUpdate(StaticTensors)
    for step in range(2 * WARMUP + 1):
        losses[0].append(updates[0](*batch(step))["loss"])
        losses[1].append(runner("kind", updates[1], *batch(step))["loss"])
    assert isinstance(runner.graph, StaticTensors)
    assert torch.equal(*map(torch.stack, losses)) and len({loss.item() for loss in losses[1]}) == len(losses[1])
    assert torch.equal(eager.weight, graphed.weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_failed_capture_is_an_error_with_a_remedy():
    with pytest.raises(UserError, match=r"cannot be captured in a CUDA graph \(.*\); set cuda_graph=false and run the"):
        Graph(make_update(nn.Conv2d(3, 2, 1)), *batch(0))


def test_another_kind_or_shape_is_captured_anew():
    runner, calls = GraphedUpdate(StaticTensors), []
    update = make_update(nn.Conv2d(3, 2, 1))
    for kind, size in (("burn-in", 4), ("memory", 4), ("memory", 5)):
        for _ in range(WARMUP):
            runner(kind, update, *batch(0, size))
            assert runner.graph is None
        runner(kind, update, *batch(0, size))
        calls.append(runner.graph)
    assert len({id(graph) for graph in calls}) == 3


def test_graph_makes_room_for_an_evaluation(monkeypatch):
    """A graph is dropped if little memory is free, and captured again later."""
    runner, update = GraphedUpdate(StaticTensors), make_update(nn.Conv2d(3, 2, 1))
    for free, kept in ((50, True), (10, False)):
        for _ in range(WARMUP + 1):
            runner("kind", update, *batch(0))
        assert runner.graph is not None
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 100))
        runner.make_room()
        assert (runner.graph is not None) == kept
    runner("kind", update, *batch(0))
    assert runner.graph is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"cuda_graph": False}, "cuda_graph=false"),
        ({"compile": True}, "compile=true"),
        ({"model.checkpointing": True}, "model.checkpointing=true"),
        ({"model.encoder": "timm:convnext_tiny"}, "an encoder of timm"),
        ({"model.bottleneck.own_channels": True}, "model.bottleneck.own_channels=true"),
    ],
)
def test_why_steps_are_eager(changes, reason):
    recipe = complete(load_recipe("shapes", "allspark", changes))
    method = build_method(recipe, spec_for(recipe.data))
    found = why_eager(recipe, method, torch.device("cuda"))
    assert found is None if reason is None else found.startswith(reason)
    assert why_eager(recipe, method, torch.device("cpu")) == "the device is not a CUDA GPU"


def test_each_method_states_for_itself_whether_it_can_be_captured():
    eager = {name for name, kind in METHODS.items() if not vars(kind).get("capturable", False)}
    assert eager == {"imas"}
    recipe = complete(load_recipe("shapes", "fixmatch"))
    mine = type("Mine", (METHODS["fixmatch"],), {})(nn.CrossEntropyLoss())
    assert why_eager(recipe, mine, torch.device("cuda")) == "method fixmatch is not marked as capturable"


def test_all_tensors_of_a_batch_are_inputs():
    labeled, unlabeled = batch(0)
    assert len(tensors_of(labeled, unlabeled)) == 8 and len(tensors_of(labeled, None)) == 2
    copied = clone(unlabeled)
    assert all(a is not b and torch.equal(a, b) for a, b in zip(unlabeled.strong, copied.strong, strict=True))
    assert clone(None) is None


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_learning_rate_may_be_a_tensor(name):
    """As a CUDA graph needs it: the same weights, and the same checkpoint."""
    from allspark.config import OptimConfig
    from allspark.engine.optim import build_optimizer, set_lr
    from allspark.engine.stepper import Stepper

    weights, states = [], []
    for tensor in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
        stepper = Stepper(model, build_optimizer(OptimConfig(name=name, lr=0.1), model))
        for group in stepper.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"])) if tensor else group["lr"]
        for step in range(3):
            set_lr(stepper.optimizer, 0.1 / (step + 1))
            stepper.backward(model(torch.ones(1, 3, 2, 2)).square().sum())
            stepper.step()
        states.append(stepper.state_dict())
        stepper.load_state_dict(states[0])
        assert isinstance(stepper.optimizer.param_groups[0]["lr"], torch.Tensor) == tensor
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights)
    assert all(type(group["lr"]) is float for state in states for group in state["optimizer"]["param_groups"])
