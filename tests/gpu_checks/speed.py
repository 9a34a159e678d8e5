"""Speed and memory of steps, of evaluation and of single parts."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from allspark.bench.machine import copy_rate, matrix_rate
from allspark.bench.step import StepBatch, StepCase, our_side, plain_side
from allspark.build import build_method
from allspark.engine.stepper import autocast, set_precision
from allspark.evaluation.evaluate import predict
from allspark.evaluation.sliding_window import inference_for
from allspark.losses import OHEM
from allspark.memory_estimate import allocator_peak, predict_step
from allspark.models import attention
from allspark.models.memory import SemanticMemory, group_channels
from allspark.models.segmentor import build_model
from gpu_checks.common import (
    GPU,
    NO_DROPOUT,
    NULL,
    Trainer,
    digest,
    free_memory,
    moments,
    profile,
    require,
    timed,
)


def c1_step(out: Path, found: dict[str, Any]) -> None:
    """AllSpark reading the memory, crop 513, 21 classes, against the plain formulation in float32."""
    found["rates"] = {precision: matrix_rate(GPU, precision) for precision in ("fp32", "tf32", "bf16")}
    found["rates"]["copy"] = copy_rate(GPU)
    for encoder, images in (("mit_b5", 2), ("mit_b5", 8), ("mit_b2", 2), ("mit_b2", 8)):
        case = StepCase(encoder=encoder, crop=513, batch=images)
        torch.manual_seed(0)
        with GPU:  # weights are drawn there, which is faster
            model = build_model(case.model, case.classes, case.crop)
        batch, rows = StepBatch.of(case, GPU), ["plain", "fp32 eager", "fp32", "tf32", "bf16 eager", "bf16"]
        for name in rows:
            precision, _, eager = name.partition(" ")
            set_precision("fp32" if name == "plain" else precision, GPU)
            with GPU:
                if name == "plain":
                    side = plain_side(case, model, batch)
                else:
                    side = our_side(case, model, precision, batch, cuda_graph=not eager and not NULL)
            row: dict[str, Any] = {"ms": timed(side.run, 5, 3 if name in rows[:2] else 8)}
            torch.cuda.synchronize()
            start, cpu = time.perf_counter(), time.process_time()
            side.run()
            row |= {"host_ms": (time.perf_counter() - start) * 1e3, "host_cpu_ms": (time.process_time() - cpu) * 1e3}
            row |= {"images_per_s": 2e3 * images / row["ms"], "peak_gb": allocator_peak(side.run, GPU) / 1e9}
            row["reserved_gb"] = torch.cuda.memory_reserved() / 1e9
            case_name = f"{encoder} {images}+{images}"
            found[f"{case_name} {name}"] = row
            row["ratio"] = found[f"{case_name} plain"]["ms"] / row["ms"]
            del side
            free_memory()
        del model, batch
        free_memory()


def c2_profile(out: Path, found: dict[str, Any]) -> None:
    """Kernels of one eager step of B5 in bf16, with 2 and with 8 labeled images."""
    for images in (2, 8):
        case = StepCase(encoder="mit_b5", crop=513, batch=images)
        with GPU:
            model = build_model(case.model, case.classes, case.crop)
        batch = StepBatch.of(case, GPU)
        with GPU:
            side = our_side(case, model, "bf16", batch, cuda_graph=False)
        for _ in range(3):
            side.run()
        found[f"{images}+{images}"] = profile(side.run, out / f"profile_mit_b5_{images}_bf16.txt")
        del model, batch, side
        free_memory()


def c3_bottleneck(out: Path, found: dict[str, Any]) -> None:
    """Attention to the memory, forward and backward: ours against torch's fused kernels."""
    set_precision("fp32", GPU)
    for classes, images, dtype in itertools.product((21, 150), (2, 8), (torch.float32, torch.bfloat16)):
        rows, keys, cells = images * 1024, classes * 1024, 296
        q = torch.randn(rows, cells, device=GPU, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(keys, cells, device=GPU, dtype=dtype, requires_grad=True) for _ in range(2))
        grad, row = torch.randn_like(q), {}
        for name, attend in (("ours", attention.attend), ("fused", fused_attention)):

            def run(attend: Callable = attend, given: tuple = (q, k, v), grad: Tensor = grad) -> None:
                attend(*given, 0.1).backward(grad)

            row[f"{name}_ms"] = timed(run, 2, 4)
            row[f"{name}_gb"] = allocator_peak(run, GPU) / 1e9
        found[f"K={classes} {images} {str(dtype)[6:]}"] = row
        free_memory()


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    heads = (x[None, None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, dropout_p=dropout, scale=1.0)[0, 0]


def c4_depthwise(out: Path, found: dict[str, Any]) -> None:
    for channels, side, dtype in itertools.product(
        (256, 512, 1280, 2048), (129, 65, 33, 17), (torch.float32, torch.bfloat16)
    ):
        if channels * side * side not in (256 * 129**2, 512 * 65**2, 1280 * 33**2, 2048 * 17**2):
            continue
        for name, layout in (("channels_last", torch.channels_last), ("nchw", torch.contiguous_format)):
            conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, device=GPU, dtype=dtype)
            x = torch.randn(4, channels, side, side, device=GPU, dtype=dtype).contiguous(memory_format=layout)
            x.requires_grad_()
            conv = conv.to(memory_format=layout)

            def run(conv: nn.Module = conv, x: Tensor = x) -> None:
                conv(x).sum().backward()

            found[f"{channels}x{side} {str(dtype)[6:]} {name}"] = timed(run, 2, 5)


def c5_attention(out: Path, found: dict[str, Any]) -> None:
    """The encoder's own attention by each backend; what a new image size costs."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    backends["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    for name, backend in backends.items():
        try:
            with sdpa_kernel([backend]):
                shape = (4, 5, 1089, 64)
                q, k, v = (torch.randn(shape, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
                found[name] = timed(
                    lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v).sum().backward(), 2, 5
                )
                new = []
                for extra in range(10):
                    q, k, v = (
                        torch.randn(1, 5, 1100 + 7 * extra, 64, device=GPU, dtype=torch.bfloat16) for _ in range(3)
                    )
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    F.scaled_dot_product_attention(q, k, v)
                    torch.cuda.synchronize()
                    new.append((time.perf_counter() - start) * 1e3)
                found[f"{name} new shape"] = statistics.median(new)
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:120]


def c6_evaluation(out: Path, found: dict[str, Any]) -> None:
    """Whole images of forty sizes, bf16, the first time and again."""
    trainer = Trainer("supervised", crop=513, precision="bf16", **{"model.encoder": "mit_b2"})
    generator = torch.Generator().manual_seed(0)
    sizes = [(int(a), int(b)) for a, b in torch.randint(330, 501, (40, 2), generator=generator)]
    images = [torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    inference, rates = inference_for(trainer.spec, 513, mode="whole"), {}
    predictor = trainer.method.predictor(trainer.model).eval()
    for name in ("cold", "warm"):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad(), autocast("bf16", GPU):
            for image in images:
                predict(predictor, image, trainer.spec, GPU, inference, ["image"])
        torch.cuda.synchronize()
        rates[name] = len(images) / (time.perf_counter() - start)
    require(rates["cold"] >= 0.3 * rates["warm"], str(rates))
    found |= rates


def c7_compile(out: Path, found: dict[str, Any]) -> None:
    """compile=true on MiT-B0: the losses of eager mode, what it costs and gains."""
    losses = []
    for compiled in (False, True):
        words = {"compile": compiled, **NO_DROPOUT}
        trainer = Trainer("fixmatch", "allspark", precision="bf16", crop=257, images=4, **words)
        start = time.perf_counter()
        losses.append(trainer.steps(6))
        found[f"first_steps_s {compiled}"] = time.perf_counter() - start
        batch = trainer.batch()
        found[f"ms {compiled}"] = timed(lambda trainer=trainer, batch=batch: trainer.step(batch), 2, 10)
        found[f"profile {compiled}"] = profile(lambda trainer=trainer, batch=batch: trainer.step(batch))
    apart = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(*losses, strict=True))
    require(apart < 2e-2, f"losses {losses}")
    found["losses_apart"] = apart


def c8_graph(out: Path, found: dict[str, Any]) -> None:
    """Steps replayed as CUDA graphs: the losses of eager steps, with dropout, teachers, skipped steps and fp16."""
    problems = []
    methods = ["fixmatch", "unimatch", "unimatch_v2", "maskmatch", "pseudoseg", "allspark", "allspark_revised"]
    cases = [(method, "allspark", "bf16") for method in methods]
    cases += [("supervised", "none", "fp32"), ("fixmatch_r50", "none", "fp16"), ("allspark", "allspark", "fp32")]
    cases += [("fixmatch", "none", "fp32 adamw")]
    for method, bottleneck, precision in cases:
        precision, _, optimizer = precision.partition(" ")
        name, losses, times = f"{method} {bottleneck} {precision}", [], []
        for cuda_graph in (False, True):
            options = {"cuda_graph": cuda_graph and not NULL, "optim.name": optimizer or "sgd"}
            trainer = Trainer(method, bottleneck, precision=precision, **options)
            values = trainer.steps(7)
            labeled, unlabeled = trainer.batch(7)
            labeled.image[0, 0, 0, 0] = math.inf
            before = digest(trainer.model.state_dict(), moments(trainer))
            trainer.step((labeled, unlabeled), 7)  # skipped
            if digest(trainer.model.state_dict(), moments(trainer)) != before:
                problems.append(f"{name}: a poisoned step changed the network, cuda_graph={cuda_graph}")
            losses.append(values + trainer.steps(3, first=8))
            if cuda_graph and not NULL and trainer.state.graphs.graph is None:
                problems.append(f"{name}: not captured")
            batch = trainer.batch()
            times.append(timed(lambda trainer=trainer, batch=batch: trainer.step(batch), 1, 5))
        apart = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(*losses, strict=True))
        found[name] = {"apart": apart, "eager_ms": times[0], "graph_ms": times[1]}
        if not apart < (1e-5 if precision == "fp32" else 2e-2):  # atomic additions in half precision
            problems.append(f"{name}: {losses}")
    require(not problems, "; ".join(problems))


def c10_resnet(out: Path, found: dict[str, Any]) -> None:
    for method in ("fixmatch_r101", "unimatch_r101"):
        trainer = Trainer(method, precision="bf16", crop=321, images=8)
        batch = trainer.batch()
        run = lambda trainer=trainer, batch=batch: trainer.step(batch)  # noqa: E731
        found[method] = {"ms": timed(run, 3, 8), **profile(run, out / f"profile_{method}.txt")}
        del trainer, run
        free_memory()


def c11_parts(out: Path, found: dict[str, Any]) -> None:
    logits = torch.randn(2, 19, 801, 801, device=GPU, requires_grad=True)
    mask = torch.randint(19, (2, 801, 801), device=GPU)
    ohem = OHEM()
    memory = SemanticMemory(21, 512, 17).to(GPU)
    features, maps = torch.randn(2, 512, 17, 17, device=GPU), torch.randn(2, 21, 513, 513, device=GPU)
    classes = group_channels(features, maps)
    small = torch.randn(2, 19, 201, 201, device=GPU, requires_grad=True)
    found |= {
        "ohem": timed(lambda: ohem(logits, mask).backward()),
        "cross_entropy": timed(lambda: F.cross_entropy(logits, mask).backward()),
        "upsample": timed(lambda: F.interpolate(small, (801, 801), mode="bilinear").sum().backward()),
        "group_channels": timed(lambda: group_channels(features, maps)),
        "enqueue": timed(lambda: memory.enqueue(features.flatten(2), classes)),
    }


def c12_memory(out: Path, found: dict[str, Any]) -> None:
    """The predicted memory of a step against the allocator's."""
    problems = []
    for method, bottleneck, precision, encoder in (
        ("allspark", "allspark", "fp32", "mit_b5"),
        ("allspark", "allspark", "bf16", "mit_b5"),
        ("unimatch_r101", "none", "bf16", "resnet101"),
    ):
        options = {"model.encoder": encoder}
        trainer = Trainer(method, bottleneck, precision=precision, crop=321, images=2, **options)
        batch = trainer.batch()
        trainer.step(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trainer.step(batch)
        real = torch.cuda.max_memory_allocated() / 1e9
        recipe, spec = trainer.recipe, trainer.spec
        del trainer, batch
        free_memory()
        predicted = predict_step(recipe, spec, build_method(recipe, spec), "cuda").peak / 1e9
        found[f"{method} {precision}"] = {"real_gb": real, "predicted_gb": predicted, "ratio": real / predicted}
        if real > 1.1 * predicted:
            problems.append(f"{method} {precision}: {real:.2f} GB, predicted {predicted:.2f}")
    require(not problems, "; ".join(problems))
