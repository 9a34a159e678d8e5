"""Weight files: reading tensors only, names of other code bases, and loud reports of what did not fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from allspark.errors import UserError
from allspark.models.segmentor import Segmentor

# Released AllSpark (and original MiT) parameter name -> ours, first match wins. The encoder stages count from 1 there.
RELEASED_NAMES = (
    (r"module\.(.*)", r"\1"),
    (r"backbone\.(.*)", r"encoder.\1"),
    (r"(encoder\.|^)patch_embed(\d)\.(.*)", r"\1stages.<\2>.patch_embed.\3"),
    (r"(encoder\.|^)block(\d)\.(.*)", r"\1stages.<\2>.blocks.\3"),
    (r"(encoder\.|^)norm(\d)\.(.*)", r"\1stages.<\2>.norm.\3"),
    (r"(.*blocks.*)\.mlp\.dwconv\.dwconv\.(.*)", r"\1.ffn.dwconv.\2"),
    (r"(.*blocks.*)\.mlp\.(.*)", r"\1.ffn.\2"),
    (r"decoder\.decoder\.linear_c(\d)\.proj\.(.*)", r"decoder.linears.<\1>.\2"),
    (r"decoder\.decoder\.linear_fuse\.(.*)", r"decoder.fuse.\1"),
    (r"decoder\.decoder\.linear_pred\.(.*)", r"decoder.classifier.\1"),
    (r"decoder\.allspark\.(map_in|map_out)\.0\.(.*)", r"bottleneck.\1.\2"),
    (r"decoder\.allspark\.attn_norm\.(.*)", r"bottleneck.norm_in.\1"),
    (r"decoder\.allspark\.encoder_norm\.(.*)", r"bottleneck.norm_out.\1"),
    (r"decoder\.allspark\.attn\.kv_queue", r"bottleneck.memory.queue"),
    (r"decoder\.allspark\.attn\.queue_ptr", r"bottleneck.memory.pointer"),
    (r"decoder\.allspark\.attn\.([qkv]|out)_l2u\.(.*)", r"bottleneck.cross_branch.\1.\2"),
    (r"decoder\.allspark\.attn\.([qkv]|out)_u\.(.*)", r"bottleneck.self_branch.\1.\2"),
)


def from_released(name: str) -> str:
    """Our name of a parameter or buffer of the released code, or of the original mit_b*.pth; unknown names stay."""
    for pattern, ours in RELEASED_NAMES:
        name = re.sub(f"^{pattern}$", ours, name)
    return re.sub(r"<(\d)>", lambda match: str(int(match[1]) - 1), name)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth (weights_only: no code can run) or .safetensors file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; give its path, or 'none' to start without one")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated zip, a pickle with code, a foreign file: torch raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable weight file ({reason[:200]}); fetch or copy it again") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: holds no named tensors; a weight file is a state_dict")
    return tensors


def load_encoder(model: Segmentor, path: str | Path) -> str:
    """Encoder weights (`model.pretrained`) under our names or those of the original mit_b*.pth -> a report line."""
    tensors = {from_released(name): tensor for name, tensor in read_tensors(path).items()}
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    own = model.encoder.state_dict()
    fits = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    missing = [name for name in own if name not in fits]
    if missing:
        raise UserError(
            f"{path}: does not fit this encoder; {len(missing)} of {len(own)} tensors are missing or of another size, "
            f"first {missing[0]} {tuple(own[missing[0]].shape)}; is it the file of another variant than model.encoder?"
        )
    model.encoder.load_state_dict(fits)
    unused = [name for name in tensors if name not in own]
    return f"encoder weights {path}: {len(fits)} tensors" + (f", left out: {', '.join(unused)}" if unused else "")


def init_from(model: Segmentor, path: str | Path) -> str:
    """Fine-tune a trained checkpoint (`model.init_from`) to other classes or another crop; returns a report line.

    Classifier and memory are dropped: they belong to the old classes and crop. All else must fit.
    """
    tensors = read_tensors(path)
    own = model.state_dict()
    dropped = ("decoder.classifier.", "bottleneck.memory.")
    wanted = [name for name in own if not name.startswith(dropped)]
    if model.bottleneck is not None and not any(name.startswith("bottleneck.") for name in tensors):
        wanted = [name for name in wanted if not name.startswith("bottleneck.")]  # from a run without it: fresh
    bad = [name for name in wanted if name not in tensors or tensors[name].shape != own[name].shape]
    if bad:
        raise UserError(
            f"{path}: does not fit this model; {len(bad)} of {len(wanted)} tensors are missing or of another size, "
            f"first {bad[0]} {tuple(own[bad[0]].shape)}; use the model.encoder and decoder_channels it was trained with"
        )
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
    fresh = sorted({name.rsplit(".", 1)[0] for name in own if name not in wanted})
    return f"init_from {path}: took {len(wanted)} tensors; fresh: {', '.join(fresh)}"


def load_pretrained(model: nn.Module, pretrained: str, init: str) -> list[str]:
    """What model.pretrained and model.init_from ask for; 'none': nothing. A missing file is an error."""
    reports = []
    if pretrained != "none":
        reports.append(load_encoder(model, pretrained))
    if init != "none":
        reports.append(init_from(model, init))
    return reports
