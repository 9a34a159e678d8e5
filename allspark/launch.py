"""Joining the process group that torchrun or srun started, and leaving it with the right exit code."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from allspark.device import choose_device
from allspark.distributed import all_gather, all_reduce_max, is_main, rank, world_size
from allspark.utils.errors import INTERRUPTED, STOPPED, Stopped, UserError, int_from_env, reason_of, user_error_message

JOIN_TIMEOUT = timedelta(minutes=10)  # all processes must have started by then
JOIN_NOTICE = 3.0  # seconds after which a process says whom it waits for
# Limit for a hanging collective. Crashed processes are noticed immediately. A process may legitimately be busy alone
# until then: filling a cache, evaluating a larger share, writing a checkpoint to a slow disk.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
MAX_FACTS = 16  # of check_ranks_agree; fixed, so that ranks with different code exchange tensors of one shape


def launcher_variables() -> tuple[str, str, str] | None:
    """The environment variables in which torchrun or srun passed rank, world size and local rank, if one did.

    SLURM_NTASKS is not used: it is also set in a batch script that runs plain python.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return "RANK", "WORLD_SIZE", "LOCAL_RANK"
    return ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID") if "SLURM_STEP_NUM_TASKS" in os.environ else None


def launcher_ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) as set by torchrun or srun; (0, 1, 0) for plain python."""
    if (names := launcher_variables()) is None:
        return 0, 1, 0
    world = int_from_env(names[1], least=1)
    return int_from_env(names[0], most=world - 1), world, int_from_env(names[2], 0)


def init(device: str = "auto", port: int | None = None) -> tuple[torch.device, dist.Store | None]:
    """Choose the device and join the process group if there is one: NCCL on GPUs, else gloo.

    Args:
        device: auto, cuda, mps or cpu.
        port: of the process group, unless the launcher sets MASTER_PORT.

    Returns:
        The device of this process, and the store that the processes share (None for a single process).
    """
    rank_, world, local_rank = launcher_ranks()
    if world > 1 and not torch.cuda.is_available() and device == "mps":
        raise UserError("device=mps supports one process (gloo has no collectives there); start one or set device=cpu")
    if int_from_env("SLURM_STEP_NUM_NODES", 1) > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("srun over several nodes without MASTER_ADDR; start it with sbatch scripts/slurm_train.sh")
    chosen = choose_device(device, local_rank)
    if world > 1 and chosen.type == "mps":
        chosen = torch.device("cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1 or dist.is_initialized():
        return chosen, None
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port or default_port()))
    int_from_env("MASTER_PORT", least=1, most=65535)
    if os.name == "nt":
        os.environ.setdefault("USE_LIBUV", "0")  # torch for Windows is built without libuv, but asks for it
    return chosen, join_process_group(chosen, rank_, world)


def default_port() -> int:
    """A port if no launcher sets one: the same for all tasks of an srun, different for the next srun on the node."""
    number = "".join(filter(str.isdigit, os.environ.get("SLURM_JOB_ID", "") + os.environ.get("SLURM_STEP_ID", "")))
    return 20000 + int(number or 9500) % 20000


def join_process_group(device: torch.device, rank: int, world: int) -> dist.Store:
    """Join the process group at MASTER_ADDR:MASTER_PORT."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = dist.PrefixStore(store_prefix(), connect(rank, world, place))
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            check_gpus(store, rank, world, f"{properties.name} {properties.uuid}")
        nccl = device.type == "cuda" and dist.is_nccl_available()  # not on Windows
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if nccl else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"{place} is in use; choose another --port or MASTER_PORT") from None
        raise UserError(
            f"rank {rank} of {world} could not connect to {place} ({str(error).splitlines()[0]}); check the messages "
            f"of the other processes, and whether that address can be reached from this node; {how_to_run_alone()}"
        ) from None
    return store


def connect(rank: int, world: int, place: str) -> dist.Store:
    """The store at `place`, once all processes have started; a process that waits says so, and signals end it.

    torch waits without looking at signals, therefore in a thread.
    """
    found: concurrent.futures.Future[dist.Store] = concurrent.futures.Future()

    def work() -> None:
        try:
            found.set_result(next(dist.rendezvous("env://", rank, world, timeout=JOIN_TIMEOUT))[0])
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        if concurrent.futures.wait([found], JOIN_NOTICE).not_done:
            missing = f"{world - 1} other process(es)" if rank == 0 else f"rank 0 at {place}"
            print(f"rank {rank} of {world} waits for {missing}; {how_to_run_alone()}", file=sys.stderr, flush=True)
        return found.result()
    except BaseException as error:
        if not found.done():
            exit_process(error, None)  # an orderly exit could crash: the thread still runs
        raise


def how_to_run_alone() -> str:
    variable = launcher_variables()[1]
    return (
        f"{variable}={os.environ[variable]} sets the number of processes. To run a single one, unset it: "
        f"env -u {variable} python ..."
    )


def check_gpus(store: dist.Store, rank: int, world: int, gpu: str) -> None:
    """Raise UserError, on every process, if two processes use the same GPU; NCCL would hang or crash later.

    Args:
        store: shared by the processes.
        rank: of this process.
        world: number of processes.
        gpu: name and UUID of this process's GPU.
    """
    store.set(f"gpu {rank}", f"{gpu} on {socket.gethostname()}")
    owners: dict[str, int] = {}
    for other in range(world):
        name = store.get(f"gpu {other}").decode()
        if name in owners:
            raise UserError(
                f"ranks {owners[name]} and {other} share one GPU ({name}); start at most as many processes per node "
                f"as it has GPUs (sh scripts/train.sh <num_gpu> ..., --ntasks-per-node)"
            )
        owners[name] = other


def store_prefix() -> str:
    """A prefix for the store's keys, different after each restart by torchrun.

    torchrun keeps one store over its restarts, with the addresses of processes that have ended. Several nodes count
    their restarts independently, so that they share one prefix.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"attempt {restarts}" if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else "attempts"


def is_restart(device: torch.device) -> bool:
    """Whether Slurm (requeue) or torchrun (max_restarts) started any process again; a collective.

    Of several nodes, torchrun counts a restart only on the one whose process failed.
    """
    own = any(os.environ.get(f"{who}_RESTART_COUNT", "0") != "0" for who in ("SLURM", "TORCHELASTIC"))
    return bool(all_reduce_max(torch.tensor(int(own), device=device)))


@contextmanager
def process_group(device: str = "auto", port: int | None = None) -> Iterator[torch.device]:
    """Join the process group, yield the device, and leave the group.

    If one of several processes fails, it prints its message and exits immediately: destroying the group is a
    collective, which would wait for processes that wait for this one. The launcher then ends the others.
    """
    chosen, store = init(device, port)
    try:
        yield chosen
    except BaseException as error:
        if store is None:
            raise
        exit_process(error, store)
    if store is not None:
        dist.destroy_process_group()


def exit_process(error: BaseException, store: dist.Store | None) -> NoReturn:
    """Exit this process immediately, with the exit code of its error; store: None before all processes have started."""
    code, message, is_first = 1, "", None
    if isinstance(error, Stopped) and not (store and has_ended(store)):  # all processes stop together
        code, message = STOPPED, str(error) if is_main() else ""
    elif isinstance(error, Stopped):  # stopped by the launcher because another process failed: not to be requeued
        pass
    elif isinstance(error, KeyboardInterrupt):
        code = INTERRUPTED
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    else:
        code = 1 if user_error_message(error) is None else 2
        message, is_first = final_message(error, store)
    if message:  # before torchrun is notified, which may then end this process
        print(message, file=sys.stderr, flush=True)
    if is_first is not None:
        report_to_torchrun(message, is_first)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def final_message(error: BaseException, store: dist.Store) -> tuple[str, bool]:
    """Return the message to print and whether this process failed first.

    A process that only lost a peer prints one line.
    """
    cause = user_error_message(error) or "".join(traceback.format_exception(error)).rstrip()
    lost = is_lost_peer(error)
    if lost:  # killed or hanging: a process that raised an error would have reported it
        reason = reason_of(error).rpartition("] ")[2]
        cause = f"error: rank {rank()} lost another process, which was killed or hangs ({reason})"
    try:
        first, _, first_cause = store.compare_set("ended", "", f"{rank()} {cause}").decode().partition(" ")
    except RuntimeError:  # rank 0, which hosts the store, has ended
        first, first_cause = "0" if lost else str(rank()), ""
    if first == str(rank()):
        return cause, not lost
    if user_error_message(error) is not None:
        return "" if first_cause == cause else cause, False
    return f"rank {rank()}: another process failed first; see its message", False


def report_to_torchrun(message: str, is_first: bool) -> None:
    """Write torchrun's error file.

    torchrun takes the failure with the earliest timestamp (whole seconds) as root cause, and dates a killed process
    when it notices it; secondary failures therefore report a later time.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            last_line = message.splitlines()[-1] if message else "the same as another process"
            summary = {"message": last_line, "extraInfo": {"timestamp": int(time.time()) + (-1 if is_first else 30)}}
            temporary = Path(f"{file}.tmp")  # torchrun may end this process at any time, and must not read half a file
            temporary.write_text(json.dumps({"message": summary}), encoding="utf-8")
            temporary.replace(file)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone. NCCL and gloo have no error classes for it."""
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Timed out")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in gone)


def has_ended(store: dist.Store) -> bool:
    """Whether a process of this group has ended with an error."""
    try:
        return store.check(["ended"])
    except RuntimeError:  # the process that hosts the store
        return True


def check_ranks_agree(**facts: str) -> None:
    """Raise UserError on all ranks if a fact differs from rank 0's; otherwise a later collective would deadlock."""
    if world_size() == 1:
        return
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    digests = [int.from_bytes(hashlib.sha256(fact.encode()).digest()[:7], "big") for fact in facts.values()]
    gathered = all_gather(torch.tensor([digests + [0] * (MAX_FACTS - len(facts))], device=device)).tolist()
    for name, first, *others in zip(facts, *gathered, strict=False):
        if different := [str(other) for other, digest in enumerate(others, start=1) if digest != first]:
            raise UserError(
                f"{name}: differs between rank {', '.join(different)} and rank 0; all nodes need the same code, "
                "config, lists, --save-path and command line"
            )


def code_version() -> str:
    """Hash of this package's files, and the version of torch."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return f"{hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()} torch {torch.__version__}"
