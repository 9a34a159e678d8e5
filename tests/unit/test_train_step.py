"""One training step: micro-batches, skipped steps, burn-in, warm-up of the memory, seeding."""

import math

import pytest
import torch

from allspark.build import complete
from allspark.config_io import load_recipe
from allspark.engine.optim import build_optimizer
from allspark.engine.position import Position
from allspark.engine.stepper import Stepper
from allspark.train_step import TrainState, train_step
from helpers.networks import freeze_batch_norm, make_method, make_model, quiet_model, random_batches

LR = 0.1


def make_state(method="fixmatch", model=None, **overrides):
    """A recipe with batches of 4, its method on a small network, and an optimizer."""
    given = {
        "optim.name": "sgd",
        "optim.lr": LR,
        "batch_size": 4,
        "encoder": "tiny",
        "crop_size": 65,
        "burn_in_epochs": 0,
    }
    recipe = complete(load_recipe("shapes", method, {**given, **overrides}))
    model = model or quiet_model(recipe.model.bottleneck.name)
    attached = make_method(method, threshold=0.0)
    attached.attach(model)
    stepper = Stepper(model, build_optimizer(recipe.optim, model))
    return TrainState(recipe, model, attached, stepper, total_steps=10, graphs=None)


def batches(state, seed=1):
    return random_batches(state.method, 4, 4, seed=seed)


def tensors(state):
    return {name: value.clone() for name, value in state.model.state_dict().items()}


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_equal_the_whole_batch(micro_batch):
    ends = []
    for size in (micro_batch, 4):
        state = make_state(model=freeze_batch_norm(quiet_model()), **{"micro_batch": size, "method.cutmix": 0.0})
        labeled, unlabeled = batches(state)
        box = (torch.zeros_like(unlabeled.cutmix[0]),)  # the partner is in the same micro-batch
        unlabeled = type(unlabeled)(unlabeled.weak, unlabeled.strong, torch.ones_like(unlabeled.valid), box)
        before = tensors(state)
        losses = train_step(state, labeled, unlabeled, Position(), LR)
        assert any(not torch.equal(before[name], value) for name, value in tensors(state).items())
        ends.append((losses, tensors(state)))
    torch.testing.assert_close(ends[0], ends[1])


def test_nonfinite_step_changes_nothing():
    """Neither a weight nor a buffer, the memory among them; the step is counted, and the next one trains."""
    state = make_state("allspark")
    before = tensors(state)
    labeled, unlabeled = batches(state)
    labeled.image[0, 0, 0, 0] = math.nan
    losses = train_step(state, labeled, unlabeled, Position(), LR)
    assert losses["loss"].isnan() and int(state.stepper.skipped) == 1
    assert all(torch.equal(before[name], value) for name, value in tensors(state).items())
    train_step(state, *batches(state, seed=2), Position(step=1), LR)
    after = tensors(state)
    assert int(state.stepper.skipped) == 1 and int(state.stepper.consecutive_skipped) == 0
    assert int(after["bottleneck.memory.filled"].sum()) > 0
    assert not torch.equal(before["decoder.classifier.weight"], after["decoder.classifier.weight"])


def test_burn_in_uses_labeled_images_only():
    """In the first epochs unlabeled images have no influence; afterwards they have a loss."""
    ends = []
    for seed in (1, 2):
        state = make_state(burn_in_epochs=1)
        labeled, _ = batches(state)
        _, unlabeled = batches(state, seed)
        losses = train_step(state, labeled, unlabeled, Position(epoch=0), LR)
        assert not [name for name in losses if name.startswith("loss_u")]
        ends.append(tensors(state))
        later = train_step(state, labeled, unlabeled, Position(epoch=1, step=1), LR)
        assert later["loss_u"] > 0
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_memory_is_read_after_its_warmup():
    assert memory_reads(2) == {2, 3}
    assert memory_reads(None) == set()


def memory_reads(warmup):
    """The epochs of four whose step reads the memory."""
    reads = []
    state = make_state("allspark", **{"model.bottleneck.warmup_epochs": warmup})
    read = state.model.bottleneck.memory.read
    state.model.bottleneck.memory.read = lambda *args, **options: (
        reads.append(position.epoch),
        read(*args, **options),
    )[1]
    for epoch in range(4):
        position = Position(epoch=epoch, step=epoch)
        train_step(state, *batches(state), position, LR)
    return set(reads)


def test_learning_rate_is_that_of_the_call():
    """0 leaves the weights as they are."""
    state = make_state()
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    train_step(state, *batches(state), Position(), 0.0)
    assert all(map(torch.equal, before, state.model.parameters()))


def test_dropout_depends_on_seed_and_step():
    """Not on the state of the global generator, which is why no generator is saved."""
    found = {}
    for name, step, seed in (("first", 3, 0), ("again", 3, 0), ("other step", 4, 0), ("other seed", 3, 1)):
        state = make_state(model=make_model("none"), seed=seed)
        torch.manual_seed(len(found))
        found[name] = train_step(state, *batches(state), Position(step=step), LR)["loss"].item()
    assert found.pop("again") == found["first"]
    assert len(set(found.values())) == 3
