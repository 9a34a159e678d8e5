"""Every method in two real gloo processes: after 4 steps both hold the same, but for what is each process's own.

That is, on CPUs, the statistics of batch norm until they are shared at the end of an epoch, and of the memory what its
policy says. test_equality.py holds the numbers against those of one process, test_two_ranks.py those of one method
against a simulation, beyond what one process could equal.
"""

import torch

from allspark import distributed
from allspark.config import BottleneckConfig, ModelConfig, OptimConfig
from allspark.engine.optim import build_optimizer
from allspark.methods import METHODS, Progress
from allspark.methods.base import TeacherMethod
from allspark.models.segmentor import build_model
from allspark.models.student import Student
from allspark.run import wrap_ddp
from allspark.train_step import seed_step
from helpers.networks import CASES, learning, make_method, random_batches

CROP, CLASSES = 64, 5
STEPS, START, WARMUP = 4, 1, 2  # in all; supervised ones at the start; from then on the memory is read
OPTIM = OptimConfig(name="adamw", lr=1e-3, lr_multi=1.0)
POLICIES = {"allspark": "gather", "fixmatch": "local"}  # of the memory; the others have the default
RUNS = [(name, bottleneck, POLICIES.get(name, "rank0")) for name, bottleneck in CASES]


def differing(*modules):
    """Names of the parameters and buffers that the two processes do not hold alike."""
    held = [item for module in modules for item in module.state_dict().items()]
    both = distributed.all_gather(torch.cat([value.flatten().double() for _, value in held])[None])
    parts = both.split([value.numel() for _, value in held], dim=1)
    return [name for (name, _), (first, second) in zip(held, parts, strict=True) if not torch.equal(first, second)]


def trained(name, bottleneck, policy):
    """4 steps as train.py makes them -> what differs between the processes after the last one."""
    torch.manual_seed(0)
    rank, device = distributed.rank(), torch.device("cpu")
    config = BottleneckConfig(name=bottleneck, memory_policy=policy)
    model = build_model(ModelConfig(encoder="tiny", bottleneck=config), CLASSES, CROP)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    options = {"teacher": "ema", "teacher_momentum": 0.9}  # the revised recipe has a teacher
    method = make_method(name, **learning(name, **options))
    method.attach(model)
    optimizer, network = build_optimizer(OPTIM, model), wrap_ddp(model, device)
    network.train()
    for step in range(STEPS):
        progress, batch = Progress(step, step // WARMUP, STEPS), 1 if step % 4 else 2
        seed_step(0, step)
        labeled, unlabeled = random_batches(method, batch, batch, (CROP, CROP), CLASSES, seed=2 * step + rank)
        if step < START:
            losses = method.supervised_losses(Student(network), labeled)
        else:
            losses = method.losses(Student(network, read_memory=step // WARMUP >= 1), labeled, unlabeled, progress)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        method.after_step(Student(network), progress)
    result = {"loss": losses["loss"].item(), "teacher": method.predictor(model) is not model}
    result["moved"] = all((a != b).any().item() for a, b in zip(start, model.parameters()))
    result["statistics"] = [n for part in (model, method) for n in part.state_dict() if ".running_" in n]
    result["after"] = differing(model, method)
    for part in (model, method):
        distributed.share_batchnorm_statistics(part)
    result["shared"] = differing(model, method)
    if bottleneck == "allspark":
        model.bottleneck.memory.sync()
    result["synced"] = differing(model, method)
    return result


def train_all():
    return [trained(*run) for run in RUNS]


MEMORY = {f"bottleneck.memory.{buffer}" for buffer in ("queue", "pointer", "filled")}


def test_two_processes_agree(pair):
    for run, first, second in zip(RUNS, *pair(train_all), strict=True):
        name, bottleneck, policy = run
        assert first["moved"] and first["loss"] != second["loss"], run  # each has images of its own
        assert first["teacher"] == issubclass(METHODS[name], TeacherMethod), run
        assert first["statistics"] and set(first["after"]) - MEMORY == set(first["statistics"]), run
        own = set() if bottleneck == "none" or policy == "gather" else MEMORY
        assert set(first["shared"]) <= own and ("bottleneck.memory.queue" in first["shared"]) == bool(own), run
        assert first["synced"] == (first["shared"] if policy == "local" else []), run
