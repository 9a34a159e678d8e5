"""What the attention of AllSpark's bottleneck is worth on val: with the memory, as in training, without it, and none.

    python scripts/memory_gap.py exp/demo/allspark/best.pth

Training rebuilds labeled channels from the memory; evaluation, and the pass that makes pseudo-labels, rebuild an
image's channels from its own (as released). The same weights are evaluated both ways, and with what attention gives
replaced by 0, which leaves the bottleneck's convolutions and norms; all in windows of the training crop (the memory
holds maps of that size alone). A teacher reads its student's memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from allspark.cli import loading  # noqa: E402
from allspark.data import splits  # noqa: E402
from allspark.data.base import SegmentationDataset  # noqa: E402
from allspark.distributed import choose_device  # noqa: E402
from allspark.engine.checkpoint import load_checkpoint  # noqa: E402
from allspark.errors import UserError, run_main  # noqa: E402
from allspark.evaluation.evaluate import evaluate  # noqa: E402
from allspark.models.bottleneck import CrossBatch  # noqa: E402
from allspark.models.memory import SemanticMemory  # noqa: E402
from allspark.models.segmentor import Segmentor, SegOutput  # noqa: E402


class ReadsMemory(nn.Module):
    """The network with the keys and values of its memory, for every image: (B, 3, crop, crop) -> SegOutput."""

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> SegOutput:
        return self.model(image, cross=CrossBatch(len(image), read_memory=True))


def without_attention(model: Segmentor) -> Segmentor:
    """A copy whose bottleneck adds nothing to its residual."""
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied.bottleneck.cross_branch.out.weight)  # it has no bias
    return copied


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="FILE", help="best.pth or latest.pth of a run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args(argv)
    found = {str(path): gap(path, choose_device(args.device)) for path in args.checkpoints}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def gap(path: Path, device: torch.device) -> dict[str, float]:
    """mIoU of the own channels, of the memory and without attention, and how much of the memory is written; percent."""
    loaded = loading.load_for_inference(path, device)
    model, recipe = loaded.model, loaded.recipe
    if recipe is None or model.bottleneck is None:
        raise UserError(f"{path}: holds no run with model.bottleneck=allspark; name a checkpoint of one")
    memory = memory_of(path).to(device)
    model.bottleneck.memory = memory
    root = splits.find_data(recipe.data, loaded.spec)
    entries = splits.val_entries(recipe.data, loaded.spec, root)
    splits.check_files(entries)
    val = SegmentationDataset([entry.sample for entry in entries], loaded.spec)
    inference = loaded.inference("sliding_window")
    networks = {"own channels": model, "memory": ReadsMemory(model), "no attention": without_attention(model)}
    found = {
        name: evaluate(network, val, loaded.spec, device, inference, progress=True).miou
        for name, network in networks.items()
    }
    filled = 100 * memory.filled.sum().item() / memory.queue.shape[:2].numel()
    scores = ", ".join(f"{name} {miou:.2f}" for name, miou in found.items())
    print(f"{path}: {scores} mIoU; {filled:.0f} % of the memory is written")
    return {**found, "filled": filled}


def memory_of(path: Path) -> SemanticMemory:
    prefix = "bottleneck.memory."
    state = {key.removeprefix(prefix): value for key, value in load_checkpoint(path)["model"].items() if prefix in key}
    if not state:
        raise UserError(f"{path}: holds no memory; name a checkpoint of training, not an imported or exported one")
    num_classes, channels, positions = state["queue"].shape
    memory = SemanticMemory(num_classes, channels, round(positions**0.5))
    memory.load_state_dict(state)
    return memory


if __name__ == "__main__":
    sys.exit(run_main(main))
