"""Tensor names of other code bases: a table for each format, and detecting a format by its keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# A row `theirs: ours` names a module or a tensor; the rest of the name (.weight, .bn.running_mean) is copied, and the
# first matching row wins. {s}: stage or decoder level from 0, {S}: from 1, {b}: block.
# Intermediate names: MiT's attn.k and attn.v are joined to attn.kv, its attn.qkv is split into attn.q and attn.kv; the
# attn.q, attn.k and attn.v of a ViT are joined to attn.qkv.
FIELDS = {"{s}": r"(?P<s>[0-3])", "{S}": r"(?P<S>[1-4])", "{b}": r"(?P<b>[0-9]+)"}

# As in timm and torchvision, hence also ours; inside a model: UniMatch, segmentation-models-pytorch ...
RESNET = {name: name for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")}
BLOCK = "stages.{s}.blocks.{b}"
OURS_ENCODER = (
    *("stages.{s}.patch_embed", f"{BLOCK}.norm1", f"{BLOCK}.attn", f"{BLOCK}.norm2", f"{BLOCK}.ffn", "stages.{s}.norm"),
    *("body", "pyramid"),  # of ViTs; below body timm's names
)
OURS_REST = (
    *(f"encoder.{name}" for name in RESNET),
    *("decoder.linears.{s}", "decoder.convs.{s}", "decoder.fuse", "decoder.classifier"),
    *(
        "decoder.aspp.branches",
        "decoder.aspp.pool",
        "decoder.aspp.project",
    ),  # decoder.aspp: other formats have one, too
    *("decoder.low", "decoder.projects", "decoder.resizes", "decoder.levels", "decoder.fusions", "bottleneck"),
)
# github.com/LiheYoung/UniMatch (model/semseg/deeplabv3plus.py), whose backbone is named as in RESNET
UNIMATCH_REST = {
    "head.b4.gap": "decoder.aspp.pool",
    "head.b{s}": "decoder.aspp.branches.{s}",
    "head.project": "decoder.aspp.project",
    "reduce": "decoder.low",
    "fuse.0": "decoder.fuse.0.0",
    "fuse.1": "decoder.fuse.0.1",
    "fuse.3": "decoder.fuse.1.0",
    "fuse.4": "decoder.fuse.1.1",
    "classifier.weight": "decoder.classifier.weight",  # not all of classifier: torchvision's models have one, too
    "classifier.bias": "decoder.classifier.bias",
}
# github.com/ZhenZHAO/iMAS (imas/models/decoder.py); the first branch of its ASPP is the pooled one, see adapt_imas.
# Left out: auxor, the auxiliary head, which only its training uses
IMAS_REST = {
    "decoder.low_conv": "decoder.low",
    "decoder.aspp.conv1": "decoder.aspp.pool",
    "decoder.aspp.conv2": "decoder.aspp.branches.0",
    "decoder.aspp.conv3": "decoder.aspp.branches.1",
    "decoder.aspp.conv4": "decoder.aspp.branches.2",
    "decoder.aspp.conv5": "decoder.aspp.branches.3",
    "decoder.head": "decoder.aspp.project",
    "decoder.classifier.0": "decoder.fuse.0.0",
    "decoder.classifier.1": "decoder.fuse.0.1",
    "decoder.classifier.3": "decoder.fuse.1.0",
    "decoder.classifier.4": "decoder.fuse.1.1",
    "decoder.classifier.6": "decoder.classifier",
}
# github.com/NVlabs/SegFormer, xmed-lab/AllSpark, and segmentation-models-pytorch 0.6 (encoders/mix_transformer.py)
SEGFORMER_MIT = {
    "patch_embed{S}": "stages.{s}.patch_embed",
    "block{S}.{b}.mlp.dwconv.dwconv": "stages.{s}.blocks.{b}.ffn.dwconv",
    "block{S}.{b}.mlp": "stages.{s}.blocks.{b}.ffn",
    "block{S}.{b}": "stages.{s}.blocks.{b}",
    "norm{S}": "stages.{s}.norm",
}
SEGFORMER_HEAD = {
    "decode_head.linear_c{S}.proj": "decoder.linears.{s}",
    "decode_head.linear_fuse": "decoder.fuse",
    "decode_head.linear_pred": "decoder.classifier",
}
RELEASED_REST = {
    "decoder.decoder.linear_c{S}.proj": "decoder.linears.{s}",
    "decoder.decoder.linear_fuse": "decoder.fuse",
    "decoder.decoder.linear_pred": "decoder.classifier",
    "decoder.allspark.map_in.0": "bottleneck.map_in",
    "decoder.allspark.map_out.0": "bottleneck.map_out",
    "decoder.allspark.attn_norm": "bottleneck.norm_in",
    "decoder.allspark.encoder_norm": "bottleneck.norm_out",
    "decoder.allspark.attn.kv_queue": "bottleneck.memory.queue",
    "decoder.allspark.attn.queue_ptr": "bottleneck.memory.pointer",
    "decoder.allspark.attn.q_l2u": "bottleneck.cross_branch.q",
    "decoder.allspark.attn.k_l2u": "bottleneck.cross_branch.k",
    "decoder.allspark.attn.v_l2u": "bottleneck.cross_branch.v",
    "decoder.allspark.attn.out_l2u": "bottleneck.cross_branch.out",
    "decoder.allspark.attn.q_u": "bottleneck.self_branch.q",
    "decoder.allspark.attn.k_u": "bottleneck.self_branch.k",
    "decoder.allspark.attn.v_u": "bottleneck.self_branch.v",
    "decoder.allspark.attn.out_u": "bottleneck.self_branch.out",
}
# Files written by transformers, as on huggingface.co (nvidia/mit-b0, nvidia/segformer-b0-finetuned-...)
TRANSFORMERS_MIT = {
    "patch_embeddings.{s}.proj": "stages.{s}.patch_embed.proj",
    "patch_embeddings.{s}.layer_norm": "stages.{s}.patch_embed.norm",
    "block.{s}.{b}.layer_norm_1": "stages.{s}.blocks.{b}.norm1",
    "block.{s}.{b}.attention.self.query": "stages.{s}.blocks.{b}.attn.q",
    "block.{s}.{b}.attention.self.key": "stages.{s}.blocks.{b}.attn.k",
    "block.{s}.{b}.attention.self.value": "stages.{s}.blocks.{b}.attn.v",
    "block.{s}.{b}.attention.self.sr": "stages.{s}.blocks.{b}.attn.sr",
    "block.{s}.{b}.attention.self.layer_norm": "stages.{s}.blocks.{b}.attn.norm",
    "block.{s}.{b}.attention.output.dense": "stages.{s}.blocks.{b}.attn.proj",
    "block.{s}.{b}.layer_norm_2": "stages.{s}.blocks.{b}.norm2",
    "block.{s}.{b}.mlp.dense1": "stages.{s}.blocks.{b}.ffn.fc1",
    "block.{s}.{b}.mlp.dwconv.dwconv": "stages.{s}.blocks.{b}.ffn.dwconv",
    "block.{s}.{b}.mlp.dense2": "stages.{s}.blocks.{b}.ffn.fc2",
    "layer_norm.{s}": "stages.{s}.norm",
}
TRANSFORMERS_HEAD = {
    "decode_head.linear_c.{s}.proj": "decoder.linears.{s}",
    "decode_head.linear_projections.{s}.proj": "decoder.linears.{s}",
    "decode_head.linear_fuse": "decoder.fuse.conv",
    "decode_head.batch_norm": "decoder.fuse.bn",
    "decode_head.classifier": "decoder.classifier",
}
# Names of transformers 5 in memory, i.e. of a state_dict saved by hand (5.23, models/segformer/modeling_segformer.py)
TRANSFORMERS_5_MIT = {
    "stages.{s}.patch_embeddings.proj": "stages.{s}.patch_embed.proj",
    "stages.{s}.patch_embeddings.layer_norm": "stages.{s}.patch_embed.norm",
    "stages.{s}.blocks.{b}.layernorm_before": "stages.{s}.blocks.{b}.norm1",
    "stages.{s}.blocks.{b}.attention.q_proj": "stages.{s}.blocks.{b}.attn.q",
    "stages.{s}.blocks.{b}.attention.k_proj": "stages.{s}.blocks.{b}.attn.k",
    "stages.{s}.blocks.{b}.attention.v_proj": "stages.{s}.blocks.{b}.attn.v",
    "stages.{s}.blocks.{b}.attention.sequence_reduction.sequence_reduction": "stages.{s}.blocks.{b}.attn.sr",
    "stages.{s}.blocks.{b}.attention.sequence_reduction.layer_norm": "stages.{s}.blocks.{b}.attn.norm",
    "stages.{s}.blocks.{b}.attention.o_proj": "stages.{s}.blocks.{b}.attn.proj",
    "stages.{s}.blocks.{b}.layernorm_after": "stages.{s}.blocks.{b}.norm2",
    "stages.{s}.blocks.{b}.mlp.fc1": "stages.{s}.blocks.{b}.ffn.fc1",
    "stages.{s}.blocks.{b}.mlp.dwconv.dwconv": "stages.{s}.blocks.{b}.ffn.dwconv",
    "stages.{s}.blocks.{b}.mlp.fc2": "stages.{s}.blocks.{b}.ffn.fc2",
    "stages.{s}.layer_norm": "stages.{s}.norm",
}
# github.com/open-mmlab/mmsegmentation (models/backbones/mit.py, models/decode_heads/segformer_head.py)
MMSEGMENTATION_MIT = {
    "layers.{s}.0.projection": "stages.{s}.patch_embed.proj",
    "layers.{s}.0.norm": "stages.{s}.patch_embed.norm",
    "layers.{s}.1.{b}.attn.attn.in_proj_weight": "stages.{s}.blocks.{b}.attn.qkv.weight",
    "layers.{s}.1.{b}.attn.attn.in_proj_bias": "stages.{s}.blocks.{b}.attn.qkv.bias",
    "layers.{s}.1.{b}.attn.attn.out_proj": "stages.{s}.blocks.{b}.attn.proj",
    "layers.{s}.1.{b}.ffn.layers.0": "stages.{s}.blocks.{b}.ffn.fc1",
    "layers.{s}.1.{b}.ffn.layers.1": "stages.{s}.blocks.{b}.ffn.dwconv",
    "layers.{s}.1.{b}.ffn.layers.4": "stages.{s}.blocks.{b}.ffn.fc2",
    "layers.{s}.1.{b}": "stages.{s}.blocks.{b}",
    "layers.{s}.2": "stages.{s}.norm",
}
MMSEGMENTATION_HEAD = {
    "decode_head.convs.{s}": "decoder.convs.{s}",
    "decode_head.fusion_conv": "decoder.fuse",
    "decode_head.conv_seg": "decoder.classifier",
}
# github.com/facebookresearch/dinov2 (dinov2_vit{s,b,l,g}14_pretrain.pth), and timm; in the largest, SwiGLU's w12 and w3
DINOV2 = {
    "blocks.{b}.mlp.w12": "body.model.blocks.{b}.mlp.fc1",
    "blocks.{b}.mlp.w3": "body.model.blocks.{b}.mlp.fc2",
    "blocks.{b}": "body.model.blocks.{b}",
    **{name: f"body.model.{name}" for name in ("cls_token", "pos_embed", "patch_embed", "norm")},
}
# github.com/LiheYoung/UniMatch-V2 (model/semseg/dpt.py)
UNIMATCH_V2_REST = {
    "head.projects": "decoder.projects",
    "head.resize_layers": "decoder.resizes",
    "head.scratch.layer{S}_rn": "decoder.levels.{s}",
    "head.scratch.refinenet{S}.resConfUnit1": "decoder.fusions.{s}.skip",  # never used in the deepest level
    "head.scratch.refinenet{S}.resConfUnit2": "decoder.fusions.{s}.refine",
    "head.scratch.refinenet{S}.out_conv": "decoder.fusions.{s}.out",
    "head.scratch.output_conv.0": "decoder.fuse.0",
    "head.scratch.output_conv.2": "decoder.classifier",
}
# Files written by transformers, as on huggingface.co (facebook/dinov2-small ...)
TRANSFORMERS_DINOV2 = {
    "embeddings.cls_token": "body.model.cls_token",
    "embeddings.position_embeddings": "body.model.pos_embed",
    "embeddings.patch_embeddings.projection": "body.model.patch_embed.proj",
    "encoder.layer.{b}.norm1": "body.model.blocks.{b}.norm1",
    "encoder.layer.{b}.attention.attention.query": "body.model.blocks.{b}.attn.q",
    "encoder.layer.{b}.attention.attention.key": "body.model.blocks.{b}.attn.k",
    "encoder.layer.{b}.attention.attention.value": "body.model.blocks.{b}.attn.v",
    "encoder.layer.{b}.attention.output.dense": "body.model.blocks.{b}.attn.proj",
    "encoder.layer.{b}.layer_scale1.lambda1": "body.model.blocks.{b}.ls1.gamma",
    "encoder.layer.{b}.norm2": "body.model.blocks.{b}.norm2",
    "encoder.layer.{b}.mlp.weights_in": "body.model.blocks.{b}.mlp.fc1",
    "encoder.layer.{b}.mlp.weights_out": "body.model.blocks.{b}.mlp.fc2",
    "encoder.layer.{b}.mlp": "body.model.blocks.{b}.mlp",
    "encoder.layer.{b}.layer_scale2.lambda1": "body.model.blocks.{b}.ls2.gamma",
    "layernorm": "body.model.norm",
}


@dataclass(frozen=True, eq=False)
class KeyMap:
    """The tensor names of one code base.

    Args:
        title: for messages.
        encoder: rows of the encoder, below one of the prefixes.
        rest: rows of everything else.
        prefixes: of the encoder; '' for a file that contains only the encoder.
        adapt: changes renamed tensors where the network, not only its names, is built differently.
    """

    title: str
    encoder: Mapping[str, str]
    rest: Mapping[str, str]
    prefixes: tuple[str, ...]
    adapt: Callable[[dict[str, Tensor]], None] | None = None

    @cached_property
    def rules(self) -> list[tuple[re.Pattern[str], str]]:
        rows = [
            (prefix + theirs, ("encoder." if prefix else "") + ours)
            for prefix in self.prefixes
            for theirs, ours in self.encoder.items()
        ]
        return [(compile_row(theirs), ours) for theirs, ours in (*rows, *self.rest.items())]

    def translate(self, name: str) -> str | None:
        """Our name for their tensor, without `encoder.` if the file contains only an encoder; None if it is unknown."""
        for rule, ours in self.rules:
            if match := rule.fullmatch(name):
                fields = match.groupdict()
                stage = int(fields["S"]) - 1 if fields.get("S") else fields.get("s")
                return ours.format(s=stage, b=fields.get("b")) + fields["tail"]
        return None


def compile_row(template: str) -> re.Pattern[str]:
    """Regular expression for the left side of a row."""
    text = re.escape(template)
    for field, expression in FIELDS.items():
        text = text.replace(re.escape(field), expression)
    return re.compile(text + r"(?P<tail>(\..+)?)")


def adapt_imas(tensors: dict[str, Tensor]) -> None:
    """iMAS projects the pooled branch first, here it is last; a bias before batch norm is a shift of its mean."""
    name = "decoder.aspp.project.0.weight"
    if name in tensors and tensors[name].ndim == 4:
        pooled = tensors[name].shape[1] // 5
        tensors[name] = tensors[name].roll(-pooled, dims=1)
    mean, bias = tensors.get("decoder.low.1.running_mean"), tensors.pop("decoder.low.0.bias", None)
    if mean is not None and bias is not None and mean.shape == bias.shape:
        tensors["decoder.low.1.running_mean"] = mean - bias


OURS = KeyMap(
    "AllSpark, this code", {name: name for name in OURS_ENCODER}, {name: name for name in OURS_REST}, ("encoder.", "")
)
MIT = KeyMap("MiT encoder, original or segmentation-models-pytorch", SEGFORMER_MIT, {}, ("", "encoder.", "backbone."))
IMAS = KeyMap("iMAS, DeepLabV3+", RESNET, IMAS_REST, ("encoder.",), adapt_imas)
RELEASED = KeyMap("AllSpark, released code", SEGFORMER_MIT, RELEASED_REST, ("backbone.", ""))
KEY_MAPS = (  # if several know equally many names of a file, the first wins
    KeyMap("ResNet encoder, timm or torchvision", RESNET, {}, ("", "encoder.", "backbone.")),
    KeyMap("UniMatch, DeepLabV3+", RESNET, UNIMATCH_REST, ("backbone.",)),
    OURS,
    IMAS,
    MIT,
    RELEASED,
    KeyMap("SegFormer, original", SEGFORMER_MIT, SEGFORMER_HEAD, ("backbone.",)),
    KeyMap("transformers", TRANSFORMERS_MIT, TRANSFORMERS_HEAD, ("segformer.encoder.", "encoder.", "")),
    KeyMap("transformers 5, in memory", TRANSFORMERS_5_MIT, TRANSFORMERS_HEAD, ("segformer.", "")),
    KeyMap("mmsegmentation", MMSEGMENTATION_MIT, MMSEGMENTATION_HEAD, ("backbone.", "")),
    KeyMap("DINOv2 encoder, original or timm", DINOV2, {}, ("", "encoder.", "backbone.")),
    KeyMap("UniMatch V2, DPT", DINOV2, UNIMATCH_V2_REST, ("backbone.",)),
    KeyMap("DINOv2 encoder, transformers", TRANSFORMERS_DINOV2, {}, ("", "dinov2.", "backbone.")),
)
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, Lightning
# One that every MiT has, every ResNet, and every plain ViT
FIRST_LAYERS = {"stages.0.patch_embed.proj.weight", "bn1.weight", "body.model.patch_embed.proj.weight"}
PARTS = ("encoder.", "decoder.", "bottleneck.")


def strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes that wrappers added to all names."""
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            return strip_wrappers({name.removeprefix(wrapper): tensor for name, tensor in tensors.items()})
    return dict(tensors)


def detect_key_map(names: Iterable[str]) -> KeyMap | None:
    """The key map that knows most of the names; None if it does not find an encoder's first layer."""
    names = list(names)
    known = {each: [ours for name in names if (ours := each.translate(name))] for each in KEY_MAPS}
    best = max(KEY_MAPS, key=lambda each: len(known[each]))
    return None if FIRST_LAYERS.isdisjoint(name.removeprefix("encoder.") for name in known[best]) else best


@dataclass(frozen=True)
class RenamedWeights:
    """Tensors under our names.

    Args:
        tensors: by our name: encoder.*, decoder.*, bottleneck.*.
        sources: our name -> name in the file.
        unknown: names in the file without one of ours.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, str]
    unknown: list[str]


def rename_weights(tensors: Mapping[str, Tensor], key_map: KeyMap) -> RenamedWeights:
    """Rename tensors, split a fused qkv, and join separate k and v."""
    result = RenamedWeights({}, {}, [])

    def put(name: str, tensor: Tensor, source: str) -> None:
        result.tensors[name], result.sources[name] = tensor, source

    for theirs, tensor in tensors.items():
        ours = key_map.translate(theirs) or ""
        ours = f"encoder.{ours}" if ours and not ours.startswith(PARTS) else ours
        if not ours or ours in result.tensors:  # two tensors for one name: keep the first
            result.unknown.append(theirs)
        elif ".attn.qkv." in ours and "stages." in ours and tensor.ndim:
            third = len(tensor) // 3
            put(ours.replace(".qkv.", ".q."), tensor[:third], theirs)
            put(ours.replace(".qkv.", ".kv."), tensor[third:], theirs)
        else:
            put(ours, tensor, theirs)
    for key in [name for name in result.tensors if name.startswith("encoder.") and ".attn.k." in name]:
        joined = "qkv" if key.startswith("encoder.body.") else "kv"
        names = [key.replace(".attn.k.", f".attn.{part}.") for part in joined]
        parts = [result.tensors.get(name) for name in names]
        if all(part is not None and part.ndim and part.shape == parts[0].shape for part in parts):
            put(key.replace(".attn.k.", f".attn.{joined}."), torch.cat(parts), result.sources[key])
            for name in names:
                del result.tensors[name]
    if key_map.adapt:
        key_map.adapt(result.tensors)
    return result
