"""Whole runs of train.py, and several processes."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allspark.engine.stepper import set_deterministic
from allspark.models.sync_batch_norm import SyncBatchNorm
from gpu_checks.common import (
    CASES,
    DEVICE,
    GPU,
    NO_DROPOUT,
    NULL,
    ROOT,
    Trainer,
    digest,
    relative,
    require,
)


def train(out: Path, name: str, *argv: str, check: int | None = 0, **options: Any) -> subprocess.CompletedProcess:
    """train.py on shapes with 16 labeled images, in a process of its own."""
    words = ["--dataset", "shapes", "--split", "1_30", "--save-path", str(out / name), f"data.data_root={shapes()}"]
    command = [sys.executable, "train.py", *words, f"device={DEVICE}", *argv]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, **options)
    if check is not None:
        require(result.returncode == check, f"{name}: exit code {result.returncode}: {result.stderr[-600:]}")
    return result


def shapes() -> Path:
    """The shapes data set, which a process begins to draw when this script starts."""
    folder = Path(tempfile.gettempdir()) / "allspark_shapes"
    while drawing is not None and drawing.poll() is None:
        time.sleep(0.2)
    return folder


drawing: subprocess.Popen | None = None


def draw_shapes() -> None:
    global drawing
    code = "from pathlib import Path; from allspark.data.datasets.shapes import generate; import sys"
    code += "; generate(Path(sys.argv[1]))"
    folder = Path(tempfile.gettempdir()) / "allspark_shapes"
    drawing = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


SHORT = ("epoch_of=labeled", "epochs=3", "burn_in_epochs=1", "evaluation.interval=3", "log_interval=1")


def a8_train(out: Path, found: dict[str, Any]) -> None:
    """train.py with workers, fixmatch with the bottleneck, fp32 and bf16; memory against the prediction."""
    for precision in ("fp32", "bf16"):
        words = ("--method", "fixmatch", "model.bottleneck=allspark", f"precision={precision}", "data.num_workers=4")
        train(out, f"train_{precision}", *words, *SHORT, "warmup_epochs=1")
        scores = [line["miou"] for line in metrics(out / f"train_{precision}") if "miou" in line]
        require(bool(scores) and scores[-1] > 0, f"{precision}: mIoU {scores}")
        found[precision] = scores


def a9_resume(out: Path, found: dict[str, Any]) -> None:
    """Stopped by SIGTERM and started again; from CUDA to the CPU and back."""
    words = ("--method", "selftrain", "model.bottleneck=allspark", *SHORT, "checkpoint_interval=2", "epochs=40")
    command = [sys.executable, "train.py", "--dataset", "shapes", "--split", "1_30", f"data.data_root={shapes()}"]
    command += ["--save-path", str(out / "resume"), f"device={DEVICE}", "evaluation.interval=40", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "resume" / "latest.pth").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, errors = process.wait(60), process.stderr.read()
    require(code == 75, f"SIGTERM gave exit code {code}: {errors[-400:]}")
    first = torch.load(out / "resume" / "latest.pth", weights_only=True)["step"]
    steps = [first]
    for device in ("cpu", DEVICE):
        process = subprocess.Popen(
            [*command, f"device={device}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline, step = time.monotonic() + 60, steps[-1]
        while step < steps[-1] + 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(Exception):
                step = torch.load(out / "resume" / "latest.pth", weights_only=True)["step"]
        process.send_signal(signal.SIGTERM)
        code, errors = process.wait(60), process.stderr.read()
        require(code == 75, f"on {device}: exit code {code}: {errors[-400:]}")
        steps.append(torch.load(out / "resume" / "latest.pth", weights_only=True)["step"])
    require(steps == sorted(set(steps)), f"steps {steps}")
    found["steps"] = steps


def a10_determinism(out: Path, found: dict[str, Any]) -> None:
    """deterministic=true: the same bits twice, and again when resumed in the middle, at first without a graph."""
    problems = []
    for (method, bottleneck), precision in itertools.product(
        (("fixmatch", "allspark"), ("fixmatch_r50", "none")), ("fp32", "bf16")
    ):
        name, digests = f"{method} {bottleneck} {precision}", []
        for _ in range(2):
            trainer = Trainer(method, bottleneck, precision=precision, deterministic=True, cuda_graph=not NULL)
            trainer.steps(8)
            digests.append(digest(trainer.content()))
        trainer = Trainer(method, bottleneck, precision=precision, deterministic=True, cuda_graph=not NULL)
        trainer.steps(4)
        state = trainer.content()
        resumed = Trainer(method, bottleneck, precision=precision, deterministic=True, cuda_graph=not NULL)
        resumed.load(state)
        resumed.steps(4, first=4)
        digests.append(digest(resumed.content()))
        found[name] = [each[:8] for each in digests]
        if len(set(digests)) > 1:
            problems.append(f"{name}: {found[name]}")
    set_deterministic(False)
    require(not problems, "; ".join(problems))


def b1_ddp(out: Path, found: dict[str, Any]) -> None:
    """DistributedDataParallel and SyncBatchNorm over NCCL with a world of one, against a step without them."""
    store = dist.FileStore(str(out / "store"), 1)
    problems = []
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=GPU)
    try:
        for method, bottleneck in CASES:
            losses = []
            for wrapped in (False, True):
                trainer = Trainer(method, bottleneck, **NO_DROPOUT)
                if wrapped:
                    model = SyncBatchNorm.convert(trainer.model)
                    network = DistributedDataParallel(model, device_ids=[0], broadcast_buffers=False)
                    trainer.state = replace(trainer.state, network=network)
                losses.append(trainer.steps(2))
            apart = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(*losses, strict=True))
            if not apart < 1e-3:
                problems.append(f"{method} {bottleneck}: {losses}")
    finally:
        dist.destroy_process_group()
    found["cases"] = len(CASES)
    require(not problems, "; ".join(problems))


def b3_sync_batch_norm(out: Path, found: dict[str, Any]) -> None:
    """Our SyncBatchNorm against BatchNorm2d in a world of one, values, gradients and buffers, without a host sync."""
    store = dist.FileStore(str(out / "store_b3"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=GPU)
    try:
        torch.manual_seed(0)
        plain = nn.BatchNorm2d(16).to(GPU)
        nn.init.normal_(plain.weight)
        synced = SyncBatchNorm.convert(nn.Sequential(copy.deepcopy(plain)))[0]
        x = 3 * torch.randn(4, 16, 33, 33, device=GPU) + 1
        results = []
        for norm in (plain, synced):
            given = x.clone().requires_grad_()
            norm(given)  # NCCL connects at its first call
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            value = norm(given)
            (value**2 * 0.5).sum().backward()
            torch.cuda.set_sync_debug_mode("default")
            results.append([value, given.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
        found["errors"] = [relative(b, a) for a, b in zip(*results, strict=True)]
        require(max(found["errors"]) < 1e-4, str(found["errors"]))
    finally:
        dist.destroy_process_group()


def b2_too_many_processes(out: Path, found: dict[str, Any]) -> None:
    words = ["--dataset", "shapes", "--method", "supervised", "--split", "1_30", f"data.data_root={shapes()}"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611", "train.py"]
    command = [*run, *words, "--save-path", str(out / "two"), f"device={DEVICE}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    ours = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    require(result.returncode != 0 and len(set(ours)) == 1 and "GPU" in ours[0], f"{result.returncode}: {ours}")
    found |= {"exit": result.returncode, "message": ours}


def b4_out_of_memory(out: Path, found: dict[str, Any]) -> None:
    words = ("--method", "supervised", "data.crop_size=2049", "model.encoder=mit_b5", "batch_size=16", *SHORT)
    result = train(out, "memory", *words, "data.num_workers=8", check=None)
    tail = result.stderr.strip().splitlines()[-1:] or [""]
    require(result.returncode == 2 and "Traceback" not in result.stderr, f"exit {result.returncode}: {tail}")
    require("memory" in tail[0], tail[0])
    found["message"] = tail[0]


def b5_signal(out: Path, found: dict[str, Any]) -> None:
    """USR1, as slurm sends it before the time is up."""
    command = [sys.executable, "train.py", "--dataset", "shapes", "--split", "1_30", "--method", "fixmatch"]
    command += [
        f"data.data_root={shapes()}",
        "--save-path",
        str(out / "signal"),
        f"device={DEVICE}",
        *SHORT,
        "epochs=100",
    ]
    process = subprocess.Popen(
        [*command, "evaluation.interval=100"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        log = out / "signal" / "metrics.jsonl"
        if log.exists() and '"step": 6' in log.read_text():
            break
    sent = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    code, errors = process.wait(60), process.stderr.read()
    require(code == 75 and (out / "signal" / "latest.pth").exists(), f"exit code {code}: {errors[-400:]}")
    found["seconds"] = time.monotonic() - sent


def p_processes(out: Path, found: dict[str, Any]) -> None:
    """The checks that start processes of their own, at the same time."""
    checks = (a8_train, a9_resume, b2_too_many_processes, b4_out_of_memory, b5_signal)
    problems = []

    def run(check: Callable[[Path, dict[str, Any]], None]) -> None:
        name, numbers = check.__name__, {}
        try:
            check(out, numbers)
        except BaseException as error:
            problems.append(f"{name}: {type(error).__name__} {error}")
        found[name] = numbers

    shapes()
    threads = [threading.Thread(target=run, args=(check,)) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require(not problems, "; ".join(problems))
