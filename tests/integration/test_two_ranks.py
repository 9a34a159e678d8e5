"""A run with two processes, each on half the batch, against a literal simulation of both in one process.

The golden cases fix what one process computes. These tests fix what a second process changes: the average of the
gradients, and the contents of the memory under each policy. Each process has its own batch norm statistics, as on CPUs
(SyncBatchNorm needs GPUs). In float64, so that no pseudo-label or class of a channel depends on rounding.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from allspark import distributed
from allspark.build import complete
from allspark.config import OptimConfig
from allspark.config_io import load_recipe
from allspark.engine.optim import build_optimizer
from allspark.engine.position import Position
from allspark.engine.stepper import Stepper
from allspark.losses import CrossEntropy
from allspark.methods import METHODS, Progress
from allspark.models.memory import group_channels
from allspark.models.student import Student, predict
from allspark.run import wrap_ddp
from allspark.train_step import TrainState, seed_step, train_step
from helpers.networks import WIDTHS, double, freeze_batch_norm, loop_enqueue, make_method, quiet_model, random_batches

CPU = torch.device("cpu")
POLICIES = ("rank0", "gather", "local")
STEPS = 3  # the memory is written in all of them and read from the second on
CFG = OptimConfig(name="sgd", lr=0.001, lr_multi=10.0, weight_decay=1e-4)


def make_model(policy):
    model = quiet_model("allspark", seed=0).train().double()
    model.bottleneck.memory.policy = policy
    return model


def share(step, rank):
    """The batch of one process, 2 labeled and 2 unlabeled images; no two processes or steps have the same."""
    return tuple(map(double, random_batches(method(), seed=100 * step + rank)))


def method():
    return METHODS["allspark"](CrossEntropy())


def losses_and_state(policy):
    """Of this process after the last step, gradients averaged by DDP."""
    model = make_model(policy)
    optimizer, network = build_optimizer(CFG, model), wrap_ddp(model, torch.device("cpu"))
    losses = []
    for step in range(STEPS):
        batches = share(step, distributed.rank())
        parts = method().losses(
            Student(network, read_memory=step >= 1), *batches, Progress(step, epoch=step, total_steps=STEPS)
        )
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append([parts[name].item() for name in ("loss_x", "loss_u")])
    return losses, {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def real(pair):
    """What two real processes end with: (policy, rank) -> losses (steps, 2), state_dict of arrays."""
    return {(policy, rank): end for policy in POLICIES for rank, end in enumerate(pair(losses_and_state, policy))}


def written_by(model, image, pseudo_logits):
    """The channels that a forward over `image` would write, and their classes. BatchNorm comes after the bottleneck."""
    with torch.no_grad():
        bottleneck, deepest = model.bottleneck, model.encoder(image)[-1]
        residual = torch.nn.functional.gelu(bottleneck.map_in(deepest)).flatten(2).transpose(1, 2)
        channels = bottleneck.norm_in(residual).transpose(1, 2)
        return channels, group_channels(channels.unflatten(2, deepest.shape[-2:]), pseudo_logits)


def remember(policy, memories, writes):
    """What the policy leaves in the memories (queue, pointer) of both processes after both have written."""
    before = [(queue.clone(), pointer.clone()) for queue, pointer in memories]
    for rank, (queue, pointer) in enumerate(memories):
        if policy == "rank0":  # the released code: DDP copies process 0's buffers over all others before each forward
            queue.copy_(before[0][0])
            pointer.copy_(before[0][1])
        for source in range(2) if policy == "gather" else [rank]:
            loop_enqueue(queue, pointer, *writes[source])


def simulate(policy):
    """Two models, two halves of the batch, averaged gradients; the memory is kept outside, by loops."""
    models = [make_model("local") for _ in range(2)]
    optimizers = [build_optimizer(CFG, model) for model in models]
    memories = [(m.bottleneck.memory.queue.clone(), m.bottleneck.memory.pointer.clone()) for m in models]
    losses = [[], []]
    for step in range(STEPS):
        halves = [share(step, rank) for rank in range(2)]
        pseudo = [predict(m, u.weak, share_keys=True) for m, (_, u) in zip(models, halves, strict=True)]
        writes = [
            written_by(m, u.weak, p.logits) for m, (_, u), p in zip(copy.deepcopy(models), halves, pseudo, strict=True)
        ]
        remember(policy, memories, writes)
        for rank, model in enumerate(models):
            memory = model.bottleneck.memory
            memory.queue.copy_(memories[rank][0])
            memory.enqueue = lambda features, classes: None
            parts = method().losses(
                Student(model, read_memory=step >= 1), *halves[rank], Progress(step, epoch=step, total_steps=STEPS)
            )
            parts["loss"].backward()
            losses[rank].append([parts[name].item() for name in ("loss_x", "loss_u")])
        for first, second in zip(*(model.parameters() for model in models), strict=True):
            if first.grad is not None:
                mean = (first.grad + second.grad) / 2
                first.grad, second.grad = mean, mean.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return models, memories, losses


@pytest.mark.parametrize("policy", POLICIES)
def test_two_processes_equal_simulation(real, policy, one_thread):
    models, memories, losses = simulate(policy)
    for rank in range(2):
        found, state = real[policy, rank]
        np.testing.assert_allclose(found, losses[rank], atol=1e-5, rtol=0)
        queue, pointer = memories[rank]
        np.testing.assert_array_equal(state["bottleneck.memory.pointer"], pointer)
        np.testing.assert_allclose(state["bottleneck.memory.queue"], queue, atol=1e-4, rtol=1e-4)
        for name, value in models[rank].state_dict().items():
            if "memory" not in name:
                np.testing.assert_allclose(state[name], value, atol=1e-5, rtol=1e-4, err_msg=name)


def test_memory_policies_differ(real):
    """gather: all hold the same. rank0: the second differs by the last step's writes alone. local: by all of them."""

    def differing(policy):
        first, second = (real[policy, rank][1]["bottleneck.memory.queue"] for rank in range(2))
        return int((first != second).any(2).sum())

    last_step = 2 * 2 * WIDTHS[-1]  # of each of two processes, the channels of two images
    assert differing("gather") == 0
    assert 0 < differing("rank0") <= last_step < differing("local")


def accumulated(ranks):
    """The network after a step of train_step in micro-batches of one image, on this process's share of four images."""
    model = freeze_batch_norm(quiet_model())
    values = {"optim.name": "sgd", "optim.lr": 0.1, "batch_size": 4, "encoder": "tiny", "crop_size": 65}
    recipe = complete(load_recipe("shapes", "selftrain", {**values, "burn_in_epochs": 0, "micro_batch": 4 // ranks**2}))
    selftrain = make_method("selftrain")
    stepper = Stepper(model, build_optimizer(recipe.optim, model))
    state = TrainState(recipe, model, selftrain, stepper, total_steps=10, graphs=None)
    state = replace(state, network=wrap_ddp(model, CPU))
    labeled, unlabeled = random_batches(selftrain, 4, 4)
    count = 4 // ranks
    part = slice(count * distributed.rank(), count * (distributed.rank() + 1))
    train_step(state, labeled[part], unlabeled[part], Position(), 0.1)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def test_micro_batches_of_two_processes(pair, one_thread):
    """Gradients are averaged over the processes once, with those of the last micro-batch."""
    first, second = pair(accumulated, 2)
    alone = accumulated(1)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
        np.testing.assert_allclose(value, alone[name], atol=1e-6, err_msg=name)


def draws():
    seed_step(3, 5)
    return torch.rand(4).tolist()


def test_processes_draw_different_random_numbers(pair):
    """Dropout, drop path and CutMix depend on (seed, step, rank)."""
    first, second = pair(draws)
    assert first == draws() != second
