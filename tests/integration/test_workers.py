"""Loader workers that are killed, stopped or starved: one message within seconds, and no process left."""

import faulthandler
import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from allspark.data.worker_pool import WorkerDied, iterate, make_loader
from allspark.utils.errors import UserError


class Obeys(Dataset):
    """Item i does what `acts` has for i, in the worker."""

    def __init__(self, **acts) -> None:
        self.acts = acts

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        self.acts.get(f"at{index}", int)()
        return torch.tensor([os.getpid(), os.getpgid(0), index])


def die(number: int):
    def act() -> None:
        faulthandler.disable()  # pytest's: it would print a traceback of what dies here on purpose
        os.kill(os.getpid(), number)

    return act


def run(dataset, workers=2, **options) -> list[torch.Tensor]:
    return list(iterate(make_loader(dataset, workers, batch_size=None, **options)))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("number", "remedy"),
    [("SIGKILL", "out of memory"), ("SIGSEGV", "num_workers=0 shows"), ("SIGBUS", "/dev/shm"), ("SIGABRT", "start")],
)
@pytest.mark.parametrize("persistent", [False, True])
def test_killed_worker_is_named(number, remedy, persistent):
    begin = time.monotonic()
    with pytest.raises(WorkerDied, match=rf"worker \d+ was killed by {number}; .*{remedy}"):
        run(Obeys(at4=die(getattr(signal, number))), persistent_workers=persistent)
    assert time.monotonic() - begin < 4


def test_exited_worker_is_named():
    with pytest.raises(WorkerDied, match="exited with code 7; use data.num_workers=0"):
        run(Obeys(at4=lambda: os._exit(7)))


def test_worker_dies_between_epochs():
    loader = make_loader(Obeys(), 2, batch_size=None, persistent_workers=True)
    pids = {int(item[0]) for item in iterate(loader)}
    victim, other = sorted(pids)
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.1)  # nobody waits for it now
    with pytest.raises(WorkerDied, match=f"worker {victim} was killed by SIGKILL"):
        list(iterate(loader))
    time.sleep(0.1)
    del loader
    assert gone(other)


@pytest.mark.parametrize("act", [lambda: time.sleep(60), die(signal.SIGSTOP)], ids=["sleeps", "stopped"])
def test_hanging_worker_times_out(act):
    begin = time.monotonic()
    with pytest.raises(WorkerDied, match="no batch within 0.5 s from 1 workers; is the storage.*data.timeout"):
        run(Obeys(at4=act), workers=1, timeout=0.5)
    assert time.monotonic() - begin < 5


def test_workers_ignore_stop_signals():
    """A Ctrl-C reaches the foreground's process group, a batch system every process: none may cost the workers."""

    def all_of_them():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            os.kill(os.getpid(), getattr(signal, name))

    items = run(Obeys(at1=all_of_them, at5=all_of_them))
    assert [int(item[2]) for item in items] == list(range(8))
    assert all(int(pid) == int(group) != os.getpgid(0) for pid, group, _ in items)


def test_sigchld_handler_is_unchanged():
    seen = []
    before = signal.signal(signal.SIGCHLD, lambda *_: seen.append(1))
    try:
        mine = signal.getsignal(signal.SIGCHLD)
        for _ in iterate(make_loader(Obeys(), 2, batch_size=None)):
            assert signal.getsignal(signal.SIGCHLD) is mine  # not torch's, which raises in the middle of a step
    finally:
        signal.signal(signal.SIGCHLD, before)


def fails():
    raise KeyError("mine")


def no_shared_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_worker_bug_keeps_traceback():
    with pytest.raises(KeyError, match="(?s)Caught KeyError in DataLoader worker.*in fails") as caught:
        run(Obeys(at4=fails))
    assert not isinstance(caught.value, UserError)


def test_shared_memory_exhausted():
    with pytest.raises(WorkerDied, match="out of shared memory: enlarge /dev/shm"):
        run(Obeys(at4=no_shared_memory))


def test_no_workers_no_watchdog():
    items = run(Obeys(), workers=0)
    assert len(items) == 8 and int(items[0][0]) == os.getpid()
    with pytest.raises(RuntimeError, match="unable to allocate"):
        run(Obeys(at4=no_shared_memory), workers=0)


ENDS = """
import signal, sys, time
sys.path[:0] = ["tests", "tests/integration"]
from test_workers import Obeys, die, make_loader
stop = lambda: (time.sleep(0.5), die(signal.SIGSTOP)())  # with nothing half sent
items = iter(make_loader(Obeys(at3=stop), 2, batch_size=None, persistent_workers=True))
print(int(next(items)[0]), int(next(items)[0]), flush=True)
time.sleep(1)
sys.exit(3)
"""


def test_no_worker_outlives_parent(start_process):
    """Which does not wait at its end for one that is stopped, either; also where nobody watched them by `batches`."""
    process = start_process(["-c", ENDS])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and not err
    assert all(gone(int(pid)) for pid in out.split())
