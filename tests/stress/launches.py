"""Count the kernel launches, copies and waits of a training step, for all methods, without a GPU.

    python tests/stress/launches.py --stub DIR [--only allspark,imas] [--precision fp32 bf16 fp16] [--processes 2]
                                    [--deterministic]

DIR has the sources of a library that stands for NVIDIA's: kernels are counted and do nothing, everything on the host is
torch's own, so the counts are those of a GPU, and values mean nothing. In bf16 the stub lacks cuDNN's convolutions:
fp16 has a GPU's count. With several processes: DistributedDataParallel, SyncBatchNorm and two micro-batches per step.
Prints a table in Markdown; then builds a model as the second process of a node on which each process sees one GPU; then
runs that must end with exit code 2 and one message: out of memory, and two processes on one GPU. The exit code is 1 if
a step fails or waits for the device, or a run ends otherwise. Skipped, with exit code 0, without gcc, the stub, or a
torch with CUDA.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
STUB = Path(os.environ.get("ALLSPARK_SHARED", REPO.parent / "shared")) / "tools/null_cuda"
sys.path[:0] = [str(REPO), str(REPO / "tests")]
LAUNCHES, WAITS = (0, 1, 2), 3  # counters of the stub: kernels of torch, cuBLAS and cuDNN; waits for the device
MORE = [  # the step of docs/benchmarks.md, and other encoders and decoders
    ("allspark", "allspark", {"model.encoder": "mit_b5", "crop": 513}),
    ("unimatch_v2", "none", {"model.encoder": "dinov2_small", "model.decoder": "dpt", "crop": 98}),
    ("fixmatch", "allspark", {"model.encoder": "dinov2_small", "crop": 98}),
    ("fixmatch", "allspark", {"model.encoder": "timm:tf_efficientnet_lite0"}),
    ("fixmatch", "allspark", {"model.encoder": "timm:convnext_atto", "model.decoder": "mlp_bn"}),
    ("imas_r101", "none", {"model.encoder": "resnet101s_imas_os8", "model.decoder": "deeplab"}),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stub", type=Path, default=STUB, help="folder with build.sh")
    parser.add_argument("--only", default="", help="methods, separated by commas; default: all")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "fp16"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--deterministic", action="store_true", help="with deterministic=true")
    args = parser.parse_args()
    if "NULL_CUDA" in os.environ:
        return count_all(args)
    if reason := why_not(args.stub):
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        env = build_stub(args.stub, folder)
        gpus = {"NULLCUDA_DEVICES": str(args.processes)}
        failed = subprocess.run([*python(args.processes), *sys.argv], env={**env, **gpus}, check=False).returncode
        build = "from allspark.config import ModelConfig; from allspark.models.segmentor import build_model; "
        build += "build_model(ModelConfig(encoder='mit_b0'), 3, 65)"
        second = {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "0"}
        built = subprocess.run([*python(), "-c", build], cwd=REPO, env={**env, **second}, check=False).returncode == 0
        print(f"one visible GPU per process: {'a model is built' if built else 'no model is built'}")
        failed += not built
        train = ["train.py", "--dataset", "shapes", "--method", "fixmatch", "--split", "1_30", "device=cuda"]
        train += [f"data_root={folder}/shapes", "num_workers=0", "--save-path", f"{folder}/run"]
        little = {"PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.0004"}
        failed += not ends_with("error: out of memory", [*python(), *train], {**env, **little})
        failed += not ends_with("error: ranks 0 and 1 share one GPU", [*python(2), *train], env)
    return int(failed > 0)


def build_stub(stub: Path, folder: str | Path) -> dict[str, str]:
    """Compile the stub into a folder; returns the environment of processes that are to use it."""
    subprocess.run(["sh", str(stub / "build.sh"), str(folder), sys.executable], check=True, capture_output=True)
    library = f"{folder}/libcuda.so.1"
    stubbed = {"NULL_CUDA": library, "LD_PRELOAD": library, "TORCH_CUDNN_V8_API_DISABLED": "1"}
    stubbed["PYTHONOPTIMIZE"] = "1"  # values mean nothing, so that an assertion about one may fail
    return {**os.environ, **stubbed}


def python(processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    return [sys.executable, *(launcher + [f"--nproc_per_node={processes}"]) * (processes > 1)]


def ends_with(message: str, command: list[str], env: dict[str, str]) -> bool:
    """Whether the processes of a command end with exit code 2 and a line that starts with this message."""
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
    # torchrun's own exit code is 1; it reports those of its processes
    right = done.returncode == 2 or (done.returncode == 1 and "exitcode  : 2" in done.stderr)
    right &= any(line.startswith(message) for line in done.stderr.splitlines())
    print(f"{message}: {'exit code 2' if right else f'exit code {done.returncode}, {done.stderr[-2000:]}'}")
    return right


def why_not(stub: Path) -> str | None:
    import torch

    reasons = {
        "gcc is not installed": not shutil.which("gcc"),
        f"no {stub / 'build.sh'}": not (stub / "build.sh").is_file(),
        "this torch has no CUDA": torch.version.cuda is None,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def count_all(args: argparse.Namespace) -> int:
    import torch.distributed as dist

    from allspark import distributed
    from gpu_checks.common import CASES
    from gpu_checks.common import WAITS as MAY_WAIT

    if args.processes > 1:
        dist.init_process_group("nccl")
    show = print if distributed.is_main() else lambda *_, **__: None
    failed = 0
    show("| method | bottleneck | precision | launches | copies and casts | waits |\n|---|---|---|---|---|---|")
    for method, bottleneck, overrides in [*((*case, {}) for case in CASES), *MORE]:
        for precision in args.precision if not args.only or method in args.only.split(",") else ():
            name = " ".join((method, *map(str, overrides.values())))
            try:
                launches, copies, waits = count(
                    method, bottleneck, precision, deterministic=args.deterministic, **overrides
                )
            except Exception as error:
                launches, copies, waits = f"{type(error).__name__}: {str(error)[:200]}", "", 0
                failed += 1
            failed += waits > (method.partition("_r")[0] in MAY_WAIT)
            show(f"| {name} | {bottleneck} | {precision} | {launches} | {copies} | {waits} |", flush=True)
    return int(failed > 0)


def count(method: str, bottleneck: str, precision: str, **overrides: object) -> tuple[int, int, int]:
    """Launches, launches of copies and casts, and waits of one eager step, after two that created all state."""
    from allspark.engine.stepper import Stepper
    from allspark.run import wrap_ddp
    from gpu_checks.common import Trainer

    library = ctypes.CDLL(os.environ["NULL_CUDA"])
    library.nc_get.restype = ctypes.c_long
    trainer = Trainer(method, bottleneck, precision=precision, **overrides)
    stepper = Stepper(trainer.model, trainer.stepper.optimizer, precision, trainer.recipe.optim.clip_norm)
    trainer.state = replace(trainer.state, stepper=stepper, network=wrap_ddp(trainer.model, trainer.device))
    batch = trainer.batch()
    for number in range(2):
        trainer.step(batch, number)
    library.nc_reset()
    trainer.step(batch, 2)
    launches, waits = sum(map(library.nc_get, LAUNCHES)), library.nc_get(WAITS)
    with tempfile.NamedTemporaryFile(mode="r") as kernels:
        library.nc_dump(kernels.name.encode())
        lines = (line.split("\t") for line in Path(kernels.name).read_text(encoding="utf-8").splitlines())
        copies = sum(
            int(number) for number, kernel in lines if "copy_kernel" in kernel and "multi_tensor" not in kernel
        )
    return launches, copies, waits


if __name__ == "__main__":
    sys.exit(main())
