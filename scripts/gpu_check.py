"""Check AllSpark on one NVIDIA GPU: correctness against the CPU, training end to end, and speed, within 8 minutes.

    python scripts/gpu_check.py --out DIR [--only a1,c] [--budget 450]

One line per check; DIR/gpu_check.json is rewritten after each of them. The exit code is the number of failed checks.
Wheels in .wheels/ (pip download --no-deps) are used where a package is missing. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".wheels"
if WHEELS.is_dir():
    site = Path(tempfile.gettempdir()) / "allspark_wheels"
    for wheel in WHEELS.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    sys.path.append(str(site))
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (*sys.path[:2], *sys.path[-1:]) if path)

import torch

from gpu_checks import numerics, processes, speed
from gpu_checks.common import NULL, Failed, free_memory

CHECKS: dict[str, tuple[Callable[[Path, dict[str, Any]], None], int]] = {  # name -> check, time limit in seconds
    "a1": (numerics.a1_environment, 20),
    "a2": (numerics.a2_attention, 30),
    "c8": (speed.c8_graph, 60),
    "a10": (processes.a10_determinism, 60),
    "c1": (speed.c1_step, 130),
    "p": (processes.p_processes, 110),
    "c12": (speed.c12_memory, 40),
    "c3": (speed.c3_bottleneck, 20),
    "b3": (processes.b3_sync_batch_norm, 15),
    "b1": (processes.b1_ddp, 50),
    "a3": (numerics.a3_dropout, 10),
    "a7": (numerics.a7_evaluation, 20),
    "c10": (speed.c10_resnet, 30),
    "c2": (speed.c2_profile, 30),
    "c6": (speed.c6_evaluation, 30),
    "c11": (speed.c11_parts, 15),
    "c4": (speed.c4_depthwise, 20),
    "c5": (speed.c5_attention, 20),
    "a4": (numerics.a4_cpu_equals_cuda, 90),
    "a6": (numerics.a6_no_wait, 60),
    "a5": (numerics.a5_precisions, 90),
    "c7": (speed.c7_compile, 90),
}


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def machine() -> dict[str, Any]:
    query = "name,driver_version,clocks.sm,power.limit,memory.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    smi = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else ""
    return {
        "gpu": torch.cuda.get_device_name(0),
        "smi": smi,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if NULL else torch.backends.cudnn.version(),
        "nccl": torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None,
        "cores": os.cpu_count(),
    }


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and profiles")
    parser.add_argument("--only", help="names of checks, or their first letters, with commas between")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no check is started")
    args = parser.parse_args()
    start, out = time.monotonic(), args.out
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    result: dict[str, Any] = {"machine": machine(), "started": time.strftime("%Y-%m-%d %H:%M"), "checks": []}
    print(result["machine"], flush=True)
    processes.draw_shapes()
    failed = 0
    for name, (check, limit) in CHECKS.items():
        if args.only and not re.fullmatch(
            "|".join(f"{only}.*" if only.isalpha() else only for only in args.only.split(",")), name
        ):
            continue
        left = args.budget - (time.monotonic() - start)
        began, verdict = time.monotonic(), "PASS"
        numbers: dict[str, Any] = {}
        if left < 10:
            verdict, numbers["why"] = "SKIP", "no time left"
        else:
            try:
                with time_limit(min(limit, int(left))):
                    check(out if name in ("c2", "c10") else work, numbers)
            except Failed as error:
                verdict, numbers["why"] = "FAIL", str(error)
            except BaseException as error:
                last = "".join(traceback.format_exception(error)).strip().splitlines()
                verdict = "FAIL"
                numbers |= {"why": f"{type(error).__name__}: {error}"[:600], "trace": last[-12:]}
        torch.cuda.set_sync_debug_mode("default")
        free_memory()
        failed += verdict == "FAIL"
        seconds = time.monotonic() - began
        result["checks"].append(
            {"name": name, "verdict": verdict, "seconds": round(seconds, 1), "numbers": rounded(numbers)}
        )
        (out / "gpu_check.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        text = json.dumps(rounded(numbers), default=str)
        print(f"{verdict} {name} {check.__name__} {seconds:.1f} s {text[:700]}", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    print(f"{failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
