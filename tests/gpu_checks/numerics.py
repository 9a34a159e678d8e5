"""Values on a GPU: equal to the CPU, to float64, and without waits for the device."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allspark.device import choose_device
from allspark.evaluation.evaluate import predict, predict_tiled
from allspark.evaluation.sliding_window import inference_for
from allspark.models import attention
from gpu_checks.common import (
    CASES,
    CPU,
    GPU,
    NO_DROPOUT,
    WAITS,
    DrawnOnCPU,
    Trainer,
    digest,
    moments,
    relative,
    require,
)


def a1_environment(out: Path, found: dict[str, Any]) -> None:
    major, minor = torch.cuda.get_device_capability(0)
    found |= {
        "device": str(choose_device("auto")),
        "gpu": torch.cuda.get_device_name(0),
        "architecture": f"sm_{major}{minor}",
        "architectures": torch.cuda.get_arch_list(),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "nccl": torch.distributed.is_nccl_available(),
        "compiler": shutil.which("gcc") or shutil.which("cc"),
    }
    require(found["device"] == "cuda:0" and found["bf16"] and found["nccl"], str(found))
    require(f"sm_{major}{minor}" in found["architectures"], "the wheel has no code for this card")


def reference_attention(q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Tensor:
    """Normalized similarities, softmax, weighted values, in the order in which the paper writes them; float64."""
    scores = q.transpose(1, 2) @ k.t()  # (B, Cq, M)
    seen = scores if present is None else scores[..., present.cpu().nonzero()[:, 0].to(scores.device)]
    scores = (scores - seen.mean((1, 2), keepdim=True)) / (seen.var((1, 2), False, keepdim=True) + attention.EPS).sqrt()
    if present is not None:
        scores = scores.masked_fill(~present, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def a2_attention(out: Path, found: dict[str, Any]) -> None:
    """The attention to the memory against float64 on the same device, for all dtypes; gradients, too."""
    errors: dict[str, float] = {}
    for classes, cells, kind, dtype in itertools.product(
        (21, 81), (9, 289), ("all", "half", "one"), (torch.float32, torch.bfloat16, torch.float16)
    ):
        generator, channels = torch.Generator().manual_seed(classes + cells), 512
        q = torch.randn(1, cells, 128, generator=generator).to(GPU)
        k, v = (torch.randn(classes * channels, cells, generator=generator).to(GPU) for _ in range(2))
        grad = torch.randn(q.shape, generator=generator).to(GPU)
        present = None
        if kind != "all":
            chosen = torch.arange(classes) % 2 == 0 if kind == "half" else torch.arange(classes) == classes // 2
            present = chosen.repeat_interleave(channels).to(GPU)
            k, v = k * present[:, None], v * present[:, None]
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        wanted = [x.detach().double().requires_grad_() for x in given]
        attended = attention.shared_channel_attention(*given, 0.0, present)
        truth = reference_attention(*wanted, present)
        attended.backward(grad.to(dtype))
        truth.backward(grad.to(dtype).double())
        pairs = [(attended, truth), *((a.grad, b.grad) for a, b in zip(given, wanted, strict=True))]
        error = max(relative(a, b) for a, b in pairs)
        errors[f"K={classes} N={cells} {kind} {str(dtype)[6:]}"] = error
        require(error <= (1e-4 if dtype == torch.float32 else 2e-2), f"{list(errors)[-1]}: {error:.1e}")
        if present is not None and (~present).any():
            require(given[2].grad[~present].abs().max().item() == 0, "absent values get a gradient")
    found |= {"largest": max(errors.values()), "errors": errors}


def a3_dropout(out: Path, found: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 9, 64, device=GPU), torch.randn(512, 9, device=GPU), torch.randn(512, 9, device=GPU)
    full = attention.shared_channel_attention(q, k, v, 0.0)
    draws = [attention.shared_channel_attention(q, k, v, 0.1) for _ in range(512)]
    error = relative(torch.stack(draws).mean(0), full)
    spread = torch.stack(draws).std(0).mean().item()
    require(error < 0.05 and spread > 0, f"mean of the draws is {error:.3f} off, spread {spread}")
    found |= {"error_of_mean": error, "spread": spread}


def a4_cpu_equals_cuda(out: Path, found: dict[str, Any]) -> None:
    """One step with the same weights, images and random numbers on both devices."""
    worst: dict[str, Any] = {}
    problems = []
    for method, bottleneck in CASES:
        pair: list[tuple[Trainer, dict[str, float]]] = []
        start: dict[str, Any] = {}
        for device in (CPU, GPU):
            trainer = Trainer(method, bottleneck, device, **NO_DROPOUT)
            if pair:
                trainer.load(start)
            start = start or copy.deepcopy(trainer.content())
            with DrawnOnCPU():
                torch.manual_seed(1)
                losses = trainer.step(trainer.batch())
            pair.append((trainer, {name: value.item() for name, value in losses.items()}))
        (on_cpu, losses), (on_gpu, theirs) = pair
        loss = max(abs(theirs[name] - value) / max(abs(value), 1e-3) for name, value in losses.items())
        norm = relative(on_gpu.stepper.norm, on_cpu.stepper.norm)
        name = f"{method} {bottleneck}"
        worst[name] = {"loss": loss, "norm": norm}
        if loss > 1e-4 or norm > 1e-3:
            problems.append(f"{name}: losses {loss:.1e}, gradient norm {norm:.1e}")
        for key, value in on_cpu.model.state_dict().items():
            other = on_gpu.model.state_dict()[key].cpu()
            if key.endswith("memory.queue"):
                equal = (value - other).abs().amax(-1).lt(1e-3).float().mean().item()
                worst[name]["equal_slots"] = equal
                if equal < 0.995:
                    problems.append(f"{name}: {equal:.4f} of the slots are equal")
            elif value.is_floating_point() and relative(other, value) > 1e-3 and (other - value).abs().max() > 1e-5:
                problems.append(f"{name}: {key} differs by {relative(other, value):.1e} after the step")
                break
    found |= {"cases": len(worst), "loss": max(w["loss"] for w in worst.values()), "all": worst}
    require(not problems, "; ".join(problems))


def a5_precisions(out: Path, found: dict[str, Any]) -> None:
    """tf32, bf16 and fp16 train like fp32; a batch with an infinity changes nothing."""
    problems, worst = [], 0.0
    for method, bottleneck in CASES:
        reference = None
        for precision in ("fp32", "tf32", "bf16", "fp16"):
            trainer = Trainer(method, bottleneck, precision=precision)
            losses = trainer.steps(2)
            reference = reference or losses
            apart = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(losses, reference, strict=True))
            worst = max(worst, apart)
            if not apart < (0.1 if method in ("imas", "unimatch_v2", "maskmatch") else 0.05):
                problems.append(f"{method} {bottleneck} {precision}: {losses} {reference}")
            labeled, unlabeled = trainer.batch(7)
            labeled.image[0, 0, 0, 0] = math.inf
            before, skipped = digest(trainer.model.state_dict(), moments(trainer)), int(trainer.stepper.skipped)
            trainer.step((labeled, unlabeled), 2)
            if int(trainer.stepper.skipped) != skipped + 1:
                problems.append(f"{method} {bottleneck} {precision}: a poisoned step was not counted")
            if digest(trainer.model.state_dict(), moments(trainer)) != before:
                problems.append(f"{method} {bottleneck} {precision}: a poisoned step changed the network")
    found["largest_difference"] = worst
    require(not problems, "; ".join(problems))


def a6_no_wait(out: Path, found: dict[str, Any]) -> None:
    """The host never waits for the device inside a step."""
    waits = {}
    for (method, bottleneck), precision in itertools.product(CASES, ("fp32", "bf16")):
        trainer = Trainer(method, bottleneck, precision=precision)
        trainer.step(trainer.batch())
        batch = trainer.batch(1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(batch, 1)
        except RuntimeError as error:
            waits[f"{method} {bottleneck} {precision}"] = str(error).splitlines()[0][:100] + " " + place(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    unexpected = [name for name in waits if name.split()[0] not in WAITS]
    require(not unexpected, f"{unexpected}: {waits}")
    found["waits"] = waits


def place(error: BaseException) -> str:
    """Where in this project an error was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "allspark" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def a7_evaluation(out: Path, found: dict[str, Any]) -> None:
    """Predictions of both devices by every way of evaluating."""
    trainers = [Trainer("fixmatch", "allspark", device, crop=129) for device in (CPU, GPU)]
    for trainer in trainers:
        trainer.model.load_state_dict(trainers[0].model.state_dict())
    spec, agreed, total, shares = trainers[0].spec, 0, 0, {}
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (4, 3, 17, 22), generator=generator).float()
    images = F.interpolate(coarse, (200, 260), mode="bilinear").byte()
    ways = [(mode, {}) for mode in ("whole", "sliding_window", "center_crop")]
    ways.append(("whole", {"scales": (0.75, 1.25), "flip": True}))
    for mode, options in [*ways, ("strips", {})]:
        both = []
        inference = inference_for(spec, 129, mode="sliding_window" if mode == "strips" else mode, **options)
        for trainer, device in zip(trainers, (CPU, GPU), strict=True):
            predictor = trainer.method.predictor(trainer.model).eval()
            with torch.no_grad():
                if mode == "strips":
                    labels = predict_tiled(predictor, images[:1], spec, device, inference, ["image"])[0]
                else:
                    labels = predict(predictor, images, spec, device, inference, ["image"])
            both.append(labels.cpu())
        same = (both[0] == both[1]).sum().item()
        shares[f"{mode} {options or ''}".strip()] = same / both[0].numel()
        agreed, total = agreed + same, total + both[0].numel()
    require(agreed / total >= 0.999, str(shares))
    found |= {"equal_pixels": agreed / total, **shares}
