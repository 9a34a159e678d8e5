"""Two real gloo processes: what each memory policy leaves in the memory, and who owns the batch norm statistics."""

import os
import time

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from allspark import distributed
from allspark.errors import UserError
from allspark.models.memory import SemanticMemory

POLICIES = ("rank0", "gather", "local")


def features_of(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(2, 6, 4, generator=generator), torch.randint(0, 3, (2, 6), generator=generator)


def fresh(policy, rank):
    torch.manual_seed(rank)  # the ranks start with different noise
    return SemanticMemory(3, 6, 2, policy)


def worker(rank, world, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    with distributed.process_group("cpu") as device:
        assert device == torch.device("cpu")
        result = {}
        for policy in POLICIES:
            memory = fresh(policy, rank)
            for _ in range(2):
                memory.sync()
                memory.enqueue(*features_of(rank))
            result[policy] = memory.state_dict()
        norm = nn.BatchNorm2d(2)
        norm.running_mean.fill_(rank + 1.0)
        distributed.share_batchnorm_statistics(norm)
        result["mean"] = norm.running_mean
        result["sum"] = distributed.all_reduce_sum(torch.tensor([rank + 1]))
        torch.save(result, f"{folder}/{rank}.pt")


def test_two_processes(tmp_path):
    port = 20000 + os.getpid() % 20000
    mp.spawn(worker, (2, port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

    # rank0: process 0 is as if alone; process 1 starts each write from its memory and adds its own channels on top
    alone = fresh("local", 0)
    alone.enqueue(*features_of(0))
    other = fresh("local", 0)
    other.load_state_dict(alone.state_dict())
    other.enqueue(*features_of(1))
    alone.enqueue(*features_of(0))
    assert torch.equal(first["rank0"]["queue"], alone.queue)
    assert torch.equal(second["rank0"]["queue"], other.queue)

    # local: each as if alone
    for rank, state in enumerate((first, second)):
        memory = fresh("local", rank)
        for _ in range(2):
            memory.enqueue(*features_of(rank))
        assert torch.equal(state["local"]["queue"], memory.queue)

    # gather: the channels of all in rank order, so queue and pointer agree wherever they were written
    gathered = fresh("local", 0)
    for _ in range(2):
        for rank in range(2):
            gathered.enqueue(*features_of(rank))
    assert torch.equal(first["gather"]["queue"], gathered.queue)
    assert torch.equal(first["gather"]["pointer"], second["gather"]["pointer"])

    assert first["mean"].eq(1).all() and second["mean"].eq(1).all()
    assert first["sum"].item() == second["sum"].item() == 3


def test_without_a_launcher_everything_is_one_process(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a batch script that runs plain python
    assert distributed.launched_by() == (0, 1, 0)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    x = torch.ones(2)
    assert distributed.all_reduce_sum(x) is x and distributed.all_gather(x) is x


def test_srun_is_a_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.launched_by() == (5, 8, 1)


def fails_alone(rank, world, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with distributed.process_group("cpu"):
        if rank == 1:
            raise UserError("the disk of process 1 is full")
        distributed.barrier()


def test_a_process_that_fails_alone_leaves_at_once():
    """With its exit code, and without waiting for the others, which wait for it."""
    started = time.monotonic()
    with pytest.raises(mp.ProcessExitedException) as stopped:
        mp.spawn(fails_alone, (2, 20000 + (os.getpid() + 7) % 20000), nprocs=2)
    assert (stopped.value.error_index, stopped.value.exit_code) == (1, 2)
    assert time.monotonic() - started < 60
