"""The choice of the device: no silent training on the CPU, and the command that helps."""

import re

import pytest
import torch
import torch.distributed as dist

from allspark.config import ModelConfig
from allspark.device import check_architecture, choose_device, gpus_allocated, reinstall, why_no_cuda
from allspark.launch import check_gpus
from allspark.models.segmentor import build_model
from allspark.utils.errors import UserError

TODAY = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    "built_for, supported, says",
    [
        (None, (12, 2), "built without CUDA; .*whl/cu126"),
        ("13.0", None, "no NVIDIA driver was found"),
        ("13.0", (12, 2), "supports CUDA 12.2, torch .* needs CUDA 13.0; .*--index-url https://.*/cu126, or update"),
        ("12.6", (11, 4), "whl/cu118"),
        ("12.6", (12, 2), "the driver reports no GPU"),  # versions with the same major number are compatible
    ],
)
def test_why_cuda_is_unavailable(built_for, supported, says):
    assert re.search(says, why_no_cuda(built_for, supported))


def test_default_wheel_on_new_driver():
    assert "index-url" not in reinstall((13, 1)) and "index-url" not in reinstall(None)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 1)])
def test_gpus_with_kernels(capability):
    check_architecture("a GPU", capability, TODAY)


def test_gpus_without_kernels():
    with pytest.raises(UserError, match=r"V100 has compute capability 7.0, .* sm_75, .*whl/cu126"):
        check_architecture("V100", (7, 0), TODAY)
    with pytest.raises(UserError, match="has compute capability 13.0, .* --force-reinstall torch torchvision, or use"):
        check_architecture("a newer GPU", (13, 0), TODAY, (13, 1))
    old = ["sm_50", "sm_90"]
    with pytest.raises(UserError, match=r"RTX 5090 has .* --force-reinstall .*/whl/cu128, or use"):
        check_architecture("RTX 5090", (12, 0), old, (12, 8))
    with pytest.raises(UserError, match=r"update the driver, whose CUDA 12.4 .* torchvision, or use"):
        check_architecture("RTX 5090", (12, 0), old, (12, 4))
    check_architecture("a later GPU", (11, 0), [*TODAY, "compute_90"])  # compiled when it is first used


@pytest.mark.parametrize("compiled", [[], ["gfx90a", "gfx1100"]])
def test_rocm_and_unknown_architectures_are_not_checked(compiled):
    check_architecture("a GPU", (9, 0), compiled)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "name, value", [("CUDA_VISIBLE_DEVICES", "0"), ("SLURM_JOB_GPUS", "2,3"), ("SLURM_GPUS_ON_NODE", "4")]
)
def test_no_cpu_fallback_in_gpu_job(monkeypatch, name, value):
    for other in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(other, raising=False)
    assert gpus_allocated() is None
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value} gives this process a GPU.*or use the CPU: device=cpu"):
        choose_device("auto")
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setenv(name, "" if name != "SLURM_GPUS_ON_NODE" else "0")
    assert gpus_allocated() is None and choose_device("auto").type in ("cpu", "mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_by_name(monkeypatch):
    with pytest.raises(UserError, match="device=cuda is not available on this machine: .*; choose one of auto, "):
        choose_device("cuda")


def test_two_ranks_on_one_gpu():
    store = dist.HashStore()
    store.set("gpu 0", "H100 GPU-1 on elsewhere")
    check_gpus(store, 1, 2, "H100 GPU-1")  # on another host
    store.set("gpu 2", store.get("gpu 1"))
    with pytest.raises(UserError, match=r"ranks 1 and 2 share one GPU \(H100 GPU-1 on .*\); start at most as many"):
        check_gpus(store, 1, 3, "H100 GPU-1")


def test_compile_needs_a_compiler(monkeypatch):
    model = build_model(ModelConfig(encoder="mit_b0"), 3, 65)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"compile=true needs a C\+\+ compiler; install g\+\+"):
        model.compile_parts()
