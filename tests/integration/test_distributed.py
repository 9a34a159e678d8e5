"""Two real gloo processes: what each memory policy leaves in the memory, and who owns the batch norm statistics."""

import errno
import os
import socket
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from numpy.testing import assert_array_equal
from torch import nn

from allspark import distributed, launch
from allspark.checkpointer import Checkpointer
from allspark.engine.log import RunLog
from allspark.engine.position import Position
from allspark.engine.stepper import Stepper
from allspark.engine.stop import Stop
from allspark.models.bottleneck import AllSparkBottleneck, CrossBatch
from allspark.models.memory import SemanticMemory
from allspark.train_step import TrainState
from allspark.utils.errors import UserError, user_error_message
from helpers import REPO

POLICIES = ("rank0", "gather", "local")


def features_of(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(2, 6, 4, generator=generator), torch.randint(0, 3, (2, 6), generator=generator)


def fresh(policy, rank):
    torch.manual_seed(rank)  # the ranks start with different noise
    return SemanticMemory(3, 6, 2, policy)


def collectives():
    """What this process has after two writes to a memory of each policy, and the statistics and sums it was given."""
    rank, result = distributed.rank(), {}
    for policy in POLICIES:
        memory = fresh(policy, rank)
        for _ in range(2):
            memory.sync()
            memory.enqueue(*features_of(rank))
        result[policy] = {name: value.numpy() for name, value in memory.state_dict().items()}
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank + 1.0)
    distributed.share_batchnorm_statistics(norm)
    result["mean"] = norm.running_mean.tolist()
    result["sum"] = distributed.all_reduce_sum(torch.tensor([rank + 1])).item()
    return result


def read_by_each():
    """Labeled images that attend to a memory which differs between the processes."""
    torch.manual_seed(0)
    bottleneck = AllSparkBottleneck(6, SemanticMemory(3, 6, 2), dropout=0.0, context="labeled")
    feature, logits = torch.randn(4, 6, 2, 2), torch.randn(2, 3, 8, 8)
    bottleneck.memory.queue.add_(distributed.rank())
    return bottleneck(feature, CrossBatch(2, logits, read_memory=True)).tolist()


def test_all_read_memory_of_process_0(pair):
    """Which is the one that is saved: a resumed run continues as if undisturbed."""
    first, second = pair(read_by_each)
    assert first == second


def test_collectives(pair):
    first, second = pair(collectives)

    # rank0: process 0 is as if alone; process 1 starts each write from its memory and adds its own channels on top
    alone = fresh("local", 0)
    alone.enqueue(*features_of(0))
    other = fresh("local", 0)
    other.load_state_dict(alone.state_dict())
    other.enqueue(*features_of(1))
    alone.enqueue(*features_of(0))
    assert_array_equal(first["rank0"]["queue"], alone.queue)
    assert_array_equal(second["rank0"]["queue"], other.queue)

    # local: each as if alone
    for rank, state in enumerate((first, second)):
        memory = fresh("local", rank)
        for _ in range(2):
            memory.enqueue(*features_of(rank))
        assert_array_equal(state["local"]["queue"], memory.queue)

    # gather: the channels of all in rank order, so queue and pointer agree wherever they were written
    gathered = fresh("local", 0)
    for _ in range(2):
        for rank in range(2):
            gathered.enqueue(*features_of(rank))
    assert_array_equal(first["gather"]["queue"], gathered.queue)
    assert_array_equal(first["gather"]["pointer"], second["gather"]["pointer"])

    assert first["mean"] == second["mean"] == [1, 1]
    assert first["sum"] == second["sum"] == 3


def test_single_process_without_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a batch script that runs plain python
    assert launch.launcher_ranks() == (0, 1, 0)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    x = torch.ones(2)
    assert distributed.all_reduce_sum(x) is x and distributed.all_gather(x) is x


def test_srun_launch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch.launcher_ranks() == (5, 8, 1)
    ports = set()
    for job, step in (("1234567", "0"), ("1234567", "1"), ("12345678", "0"), ("1234568", "0")):  # all on one node
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_STEP_ID", step)
        ports.add(launch.default_port())
    assert len(ports) == 4 and min(ports) >= 20000 and max(ports) < 40000


def refused(facts):
    try:
        launch.check_ranks_agree(**facts[distributed.rank()])
    except UserError as error:
        return str(error)


def test_ranks_that_differ_are_reported(pair):
    same = {"code": launch.code_version(), "recipe": "a", "lists": "b"}
    assert pair(refused, [same, same]) == [None, None]
    first, second = pair(refused, [same, same | {"recipe": "another"}])
    assert (
        first == second and "recipe: differs between rank 1 and rank 0" in first and "lists" not in first.split(";")[0]
    )


def test_user_error_is_one_message():
    """exit_process: exit code 2 and a line, in place of a traceback."""
    place = NotADirectoryError(errno.ENOTDIR, "Not a directory", "/etc/passwd/shapes")
    assert user_error_message(place) == "error: /etc/passwd/shapes: Not a directory; fix it or choose another path"
    assert (
        user_error_message(UserError("lower it")) == "error: lower it"
        and user_error_message(RuntimeError("closed by peer")) is None
    )
    store = dist.HashStore()
    assert launch.final_message(place, store) == (user_error_message(place), True)


def saves_last(folder):
    """When this process is through with its last save; process 0 takes a second for it."""
    model = nn.Linear(1, 1)

    class Slow(Checkpointer):
        def content(self, position):
            time.sleep(distributed.is_main())
            return model.state_dict()

    log = RunLog(folder, active=distributed.is_main(), interval=1, start_step=0, total_steps=1)
    with log, Stop() as stop:
        never = SimpleNamespace(checkpoint_interval=0, checkpoint_minutes=0, optim=SimpleNamespace(max_skipped=9))
        stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
        state = TrainState(never, model, None, stepper, total_steps=1, graphs=None)
        checkpointer = Slow(folder, state, None, log, stop)
        checkpointer.after_epoch(Position(epoch=1, step=1), last=True)
    return time.time()


def restarted(count):
    """On the second of two nodes, torchrun counts a restart of the first one's process."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(distributed.rank() * count)
    return launch.is_restart(torch.device("cpu"))


def test_restart_is_one_of_any_process(pair):
    """Else --fresh would move the run aside on the node that counts none."""
    assert pair(restarted, 1) == [True, True] and pair(restarted, 0) == [False, False]


def test_last_checkpoint_before_exit(pair, tmp_path):
    """srun --wait would kill process 0 in the middle of it."""
    first, second = pair(saves_last, tmp_path)
    assert abs(first - second) < 0.5 and (tmp_path / "latest.pth").is_file()


@pytest.fixture(scope="module")
def ended(start_process):
    """How process 1 of two under torchrun ends -> the launcher, its errors, and the seconds from start to end."""
    launcher = [
        "-m",
        "allspark.torchrun",
        "--standalone",
        "--local-addr=localhost",  # the name of a machine need not resolve
        "--nproc_per_node=2",
        "--monitor-interval=4",  # else torchrun may end process 0 before that one has seen and told what happened
        REPO / "tests" / "helpers" / "failing_worker.py",
    ]
    started = time.monotonic()
    launched = {how: start_process([*launcher, how], PYTHONPATH=".") for how in ("error", "killed")}
    ends = {}
    for how, process in launched.items():
        lines = process.communicate(timeout=60)[1].splitlines(keepends=True)
        errors = "".join(line for line in lines if not line.startswith("[W"))  # torch's own
        ends[how] = process.returncode, errors, time.monotonic() - started
    return ends


def test_failing_rank_ends_the_others(ended):
    """Its message comes first and last, and its exit code is the launcher's; process 0 has a line in between."""
    code, errors, seconds = ended["error"]
    first, other, last = errors.splitlines()
    assert code == 2 and seconds < 45  # two launchers start at once, and share the cores with other tests
    assert first == "error: the disk of process 1 is full" and last == f"rank 1 failed first: {first}"
    assert other.startswith("rank 0: another process failed first")


def test_killed_rank_ends_the_others(ended):
    code, errors, seconds = ended["killed"]
    assert code == 1 and seconds < 45
    assert errors.startswith("error: rank 0 lost another process, which was killed or hangs (")
    last = errors.splitlines()[-1]
    assert last.startswith("rank 1 failed first: ") and "SIGKILL" in last and "RuntimeError" not in errors


def test_restart_ignores_earlier_attempt(monkeypatch):
    """torchrun's store outlives its processes, and with it what they said and where they could be reached."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    for restart in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        store = launch.join_process_group(torch.device("cpu"), 0, 1)
        try:
            assert not launch.has_ended(store)
            store.set("ended", "0 error: of this start")
            assert launch.has_ended(store)
        finally:
            dist.destroy_process_group()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # nodes that count for themselves must agree
    names = {launch.store_prefix()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert names == {launch.store_prefix()}


def test_launcher_that_cannot_start(start_process, tmp_path):
    (tmp_path / "nothing.py").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = ["--master_addr=127.0.0.1", f"--master_port={taken.getsockname()[1]}"]
        process = start_process(["-m", "allspark.torchrun", *where, tmp_path / "nothing.py"], PYTHONPATH=".")
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "error: the launchers cannot meet (" in errors
    assert "Traceback" not in errors and "Choose another --master_port" in errors


def test_taken_port(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"127.0.0.1:{port} is in use; choose another --port"):
            launch.init("cpu")
