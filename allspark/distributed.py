"""Process group: who am I, and the few collectives that are used. Without a launcher everything is one process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from allspark.utils.errors import INTERRUPTED, STOPPED, Stopped, UserError, int_from_env, reason_of, user_error_message

JOIN = timedelta(minutes=10)  # within which all processes must have started
# Of a collective. Not for processes that end, which launcher and peers see at once, but for one that hangs; until then
# it may be at work of its own: a cache that its node fills, a share of an evaluation, a checkpoint on a slow disk
TIMEOUT = timedelta(minutes=30)
FACTS = 16  # that check_same compares at most


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto' is the best device there is: cuda, mps, cpu. A device asked for by name and absent is an error."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name, False):
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device={name} is not available on this machine; use one of: auto, {usable}")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} visible; start fewer processes"
        )
    return torch.device("cuda", local_rank)


def launched_by() -> tuple[int, int, int]:
    """(rank, world size, local rank) as told by torchrun or srun; (0, 1, 0) for plain python.

    SLURM_NTASKS is also set in a batch script that runs plain python: only srun sets the number of tasks of the step.
    """
    for rank_, world, local_rank in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if world in os.environ and (rank_ in os.environ or world != "WORLD_SIZE"):
            count = int_from_env(world, least=1)
            return int_from_env(rank_, most=count - 1), count, int_from_env(local_rank, 0)
    return 0, 1, 0


def init(device: str = "auto", port: int | None = None) -> tuple[torch.device, dist.Store | None]:
    """The device of this process; joins a process group (NCCL on GPUs, else gloo) if a launcher started several.

    The store is what the processes of a group know in common.
    """
    rank_, world, local_rank = launched_by()
    if world > 1 and not torch.cuda.is_available():
        if device == "mps":
            raise UserError("device=mps takes one process: gloo has no collectives on it; start one, or device=cpu")
        device = "cpu" if device == "auto" else device
    if int_from_env("SLURM_STEP_NUM_NODES", 1) > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("srun over several nodes without MASTER_ADDR; start it with sbatch scripts/slurm_train.sh")
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1 or dist.is_initialized():
        return chosen, None
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port or own_port()))
    int_from_env("MASTER_PORT", least=1, most=65535)
    if os.name == "nt":
        os.environ.setdefault("USE_LIBUV", "0")  # torch for Windows comes without libuv, and asks for it
    nccl = chosen.type == "cuda" and dist.is_nccl_available()  # which Windows does not have
    return chosen, join("nccl" if nccl else "gloo", rank_, world)


def own_port() -> int:
    """Where no launcher sets one: the same for all tasks of an srun, and another for the next srun on the node."""
    number = "".join(filter(str.isdigit, os.environ.get("SLURM_JOB_ID", "") + os.environ.get("SLURM_STEP_ID", "")))
    return 20000 + int(number or 9500) % 20000


def join(backend: str, rank: int, world: int) -> dist.Store:
    """Meet the other processes where MASTER_ADDR and MASTER_PORT say."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world, timeout=JOIN))
        store = dist.PrefixStore(attempt(), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"{place} is in use; give another --port, or MASTER_PORT") from None
        raise UserError(
            f"process {rank} of {world} did not meet the others at {place} ({str(error).splitlines()[0]}); look for "
            f"what they say, and whether that address can be reached from here"
        ) from None
    return store


def attempt() -> str:
    """Which start of the processes this is: torchrun keeps one store over its restarts, and in it the addresses of
    processes that are gone, which the new ones would call for ever. (Its nodes count restarts each for itself.)
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"attempt {restarts}" if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else "attempts"


def is_restart() -> bool:
    """Whether slurm or torchrun starts the same line again by itself: its job was requeued, or a process died."""
    return any(os.environ.get(f"{who}_RESTART_COUNT", "0") != "0" for who in ("SLURM", "TORCHELASTIC"))


@contextmanager
def process_group(device: str = "auto", port: int | None = None) -> Iterator[torch.device]:
    """init, and its end. One process of several that fails leaves at once, with its message.

    To leave a group in order is collective, too: it would wait for processes that wait for this one. The launcher
    then ends them.
    """
    chosen, store = init(device, port)
    try:
        yield chosen
    except BaseException as error:
        if store is None:
            raise
        leave(error, store)
    if store is not None:
        dist.destroy_process_group()


def leave(error: BaseException, store: dist.Store) -> NoReturn:
    """End this process at once, with the exit code of its error."""
    code, words, first = 1, "", None
    if isinstance(error, Stopped) and not has_ended(store):  # all of them, in order
        code, words = STOPPED, str(error) if is_main() else ""
    elif isinstance(error, Stopped):  # this one, by the launcher after another's end: nothing to be put into a queue
        pass
    elif isinstance(error, KeyboardInterrupt):
        code = INTERRUPTED
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    else:
        code = 1 if user_error_message(error) is None else 2
        words, first = last_words(error, store)
    if words:  # before torchrun knows: it may end this process as soon as it does
        print(words, file=sys.stderr, flush=True)
    if first is not None:
        tell_torchrun(words, first)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def last_words(error: BaseException, store: dist.Store) -> tuple[str, bool]:
    """What ended this process, and whether it is the first to end: the others fail for want of it, which is a line."""
    cause = user_error_message(error) or "".join(traceback.format_exception(error)).rstrip()
    lost = is_lost_peer(error)
    if lost:  # that one was killed, or it hangs: else it would have told before
        reason = reason_of(error).rpartition("] ")[2]
        cause = f"error: process {rank()} lost another one, which was killed or hangs ({reason})"
    try:
        who, _, told = store.compare_set("ended", "", f"{rank()} {cause}").decode().partition(" ")
    except RuntimeError:  # process 0, which kept the store, has ended
        who, told = "0" if lost else str(rank()), ""
    if who == str(rank()):
        return cause, not lost
    if user_error_message(error) is not None:
        return "" if told == cause else cause, False
    return f"process {rank()}: another process ended first; see its message", False


def tell_torchrun(words: str, first: bool) -> None:
    """Its summary names the process with the earliest time, in seconds, as the root cause. For a killed one that is
    when it looks, so that one which is lost for want of it comes well behind.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            message = words.splitlines()[-1] if words else "the same as another process"
            summary = {"message": message, "extraInfo": {"timestamp": int(time.time()) + (-1 if first else 30)}}
            beside = Path(f"{file}.tmp")  # torchrun may end this process between two lines, and cannot read half a file
            beside.write_text(json.dumps({"message": summary}), encoding="utf-8")
            beside.replace(file)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed for want of another process, which NCCL and gloo say in words alone."""
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Timed out")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in gone)


def has_ended(store: dist.Store) -> bool:
    """Whether a process of this group has ended by an error."""
    try:
        return store.check(["ended"])
    except RuntimeError:  # the one that kept the store
        return True


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The greatest over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Every process gets the tensor of `source`, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, source)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """Tensors (B, ...) of equal shape on all processes -> (P * B, ...) in rank order, without gradient."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def share_batchnorm_statistics(model: nn.Module) -> None:
    """Running statistics of process 0 for all: without SyncBatchNorm (CPUs) each has seen its own images only."""
    if world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter is a number on every process; the same answer on all of them."""
    bad = torch.stack([~parameter.isfinite().all() for parameter in model.parameters()]).sum()
    return all_reduce_sum(bad).item() == 0


def check_same(**facts: str) -> None:
    """UserError, on every process, where one began with something else than process 0: else they would hang later."""
    if world_size() == 1:
        return
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    digests = [int.from_bytes(hashlib.sha256(fact.encode()).digest()[:7], "big") for fact in facts.values()]
    found = all_gather(torch.tensor([digests + [0] * (FACTS - len(facts))], device=device)).tolist()
    for name, first, *others in zip(facts, *found, strict=False):
        if apart := [str(process) for process, other in enumerate(others, start=1) if other != first]:
            raise UserError(
                f"{name}: not the same in process {', '.join(apart)} as in process 0; all nodes need the same code, "
                "recipe, lists and --save-path, and the same words after train.py"
            )


def code_version() -> str:
    """Of this package and of torch."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return f"{hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()} torch {torch.__version__}"
