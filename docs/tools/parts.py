"""Ablate a trained network without training it again: mIoU on val of the same weights with one part disabled.

    python docs/tools/parts.py exp/demo/supervised/best.pth exp/demo/allspark_revised/best.pth
    python docs/tools/parts.py --only memory --json parts.json copies/of/latest_*.pth   # over the steps of a run ...
    python docs/tools/parts.py --draw parts.json                                        # ... drawn as parts.png

- no stride 4 to no stride 32: a feature map of the encoder is replaced by its mean over the image.
- memory: the bottleneck of AllSpark reads the memory, as for labeled images in training. In evaluation, and for
  pseudo-labels, it reads the channels of the image itself (as released). A teacher reads the memory of its student.
- no attention: the output of the bottleneck's attention is 0; its convolutions and norms remain.

Evaluation uses windows of the training crop size, because the memory holds maps of that size only.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from allspark import inference as loading
from allspark.data import splits
from allspark.device import choose_device
from allspark.engine.checkpoint import load_checkpoint
from allspark.evaluation.dataset import SegmentationDataset
from allspark.evaluation.evaluate import evaluate
from allspark.evaluation.sliding_window import inference_for
from allspark.models.bottleneck import CrossBatch
from allspark.models.memory import SemanticMemory
from allspark.models.segmentor import Segmentor, SegOutput, build_model
from allspark.utils.errors import UserError, run_main
from allspark.visualization.pictures import plot_curves


class ReadsMemory(nn.Module):
    """The network with the keys and values of its memory, for every image: (B, 3, crop, crop) -> SegOutput.

    UserError for images of another size: the maps in the memory have the size of a crop's.
    """

    def __init__(self, model: Segmentor, memory: SemanticMemory) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.model.bottleneck.memory = memory

    def forward(self, image: Tensor) -> SegOutput:
        sides, stride = image.shape[-2:], self.model.encoder.strides[-1]
        if tuple(math.ceil(side / stride) for side in sides) != self.model.bottleneck.memory.size:
            raise UserError(f"an image of {sides[1]} x {sides[0]} pixels is smaller than the crop of its memory")
        return self.model(image, cross=CrossBatch(len(image), read_memory=True))


def without_attention(model: Segmentor) -> Segmentor:
    """A copy whose bottleneck adds nothing to its residual."""
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied.bottleneck.cross_branch.out.weight)  # it has no bias
    return copied


def with_flat(model: Segmentor, level: int) -> Segmentor:
    """A copy in which feature map `level` of the encoder is its mean."""
    copied = copy.deepcopy(model)

    def flatten(_: nn.Module, __: tuple, features: Sequence[Tensor]) -> list[Tensor]:
        flat = features[level].mean((2, 3), keepdim=True).expand_as(features[level]).contiguous()
        return [flat if place == level else feature for place, feature in enumerate(features)]

    copied.encoder.register_forward_hook(flatten)
    return copied


def main(argv: Sequence[str]) -> None:
    description, _, more = __doc__.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=more, formatter_class=raw)
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="FILE", help="best.pth or latest.pth of a run")
    parser.add_argument("--only", action="append", metavar="PART", help="only this part, e.g. memory; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw a file of --json as a .png of the same name")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args(argv)
    if args.draw:
        return draw(args.draw)
    if not args.checkpoints:
        parser.error("give checkpoints, or --draw with a file of --json")
    found = {str(path): worth(path, choose_device(args.device), args.only) for path in args.checkpoints}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def draw(path: Path) -> None:
    """The figures in a file of --json -> a picture of the same name."""
    try:
        found = sorted(json.loads(path.read_text(encoding="utf-8")).values(), key=lambda one: one["step"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--draw {path}: not what --json writes ({error})") from None
    names = [name for name in found[0] if name not in ("step", "filled")]
    rows = {name: [[(one["step"], one[name]) for one in found]] for name in names}
    plot_curves(rows, "mIoU of the same weights (%)", path.with_suffix(".png"))


def worth(path: Path, device: torch.device, parts: Sequence[str] | None = None) -> dict[str, float]:
    """mIoU in percent as it is and without each part, or some; the step; of a memory how much of it is written."""
    loaded = loading.load_for_inference(path, device)
    model, recipe = loaded.model, loaded.recipe
    if recipe is None:
        raise UserError(f"{path}: holds no run of train.py; name a checkpoint of one")
    content = load_checkpoint(path)
    networks = {"as it is": model}
    networks |= {f"no stride {stride}": with_flat(model, level) for level, stride in enumerate(model.encoder.strides)}
    facts = {"step": content["step"]}
    if model.bottleneck is not None:
        memory = memory_of(content, loaded, path).to(device)
        networks |= {"memory": ReadsMemory(model, memory), "no attention": without_attention(model)}
        facts["filled"] = 100 * memory.filled.sum().item() / memory.queue.shape[:2].numel()
    if parts and (unknown := set(parts) - networks.keys()):
        raise UserError(f"--only {min(unknown)}: this network has {', '.join(list(networks)[1:])}")
    root = splits.find_data(recipe.data, loaded.spec)
    entries = splits.val_entries(recipe.data, loaded.spec, root)
    splits.check_files(entries)
    val = SegmentationDataset([entry.sample for entry in entries], loaded.spec)
    inference = inference_for(loaded.spec, recipe.data.crop_size, mode="sliding_window")
    found = {
        name: evaluate(network, val, loaded.spec, device, inference, progress=True).miou
        for name, network in networks.items()
        if not parts or name in ("as it is", *parts)
    }
    print(f"{path}: {', '.join(f'{name} {value:.2f}' for name, value in (found | facts).items())}", flush=True)
    return found | facts


def memory_of(content: Mapping[str, Any], loaded: loading.InferenceModel, path: Path) -> SemanticMemory:
    prefix = "bottleneck.memory."
    state = {key.removeprefix(prefix): value for key, value in content["model"].items() if prefix in key}
    if not state:
        raise UserError(f"{path}: holds no memory; name a checkpoint of training, not an imported or exported one")
    network = build_model(loaded.recipe.model, loaded.spec.num_classes, loaded.crop_size, loaded.spec.channels)
    memory = network.bottleneck.memory  # of the crop's shape; the network for inference has none
    memory.load_state_dict(state)
    return memory


if __name__ == "__main__":
    sys.exit(run_main(main))
