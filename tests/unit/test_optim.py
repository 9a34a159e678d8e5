"""optim.freeze and optim.layer_decay: which parameters are trained, and at which rate."""

import pytest
import torch

from allspark.config import ModelConfig, OptimConfig
from allspark.engine.optim import build_optimizer, set_lr
from allspark.models.segmentor import build_model
from allspark.utils.errors import UserError
from helpers.networks import make_model

VIT, CNN = "timm:test_vit", "timm:test_resnet"  # six blocks; no list of blocks


def build(encoder, decoder="mlp"):
    return build_model(ModelConfig(encoder=encoder, decoder=decoder, decoder_channels=8, dropout=0.0), 3, 64)


def rates(model, optimizer):
    """The learning rate of each trained parameter, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_layer_decay_of_a_vit():
    model = build("timm:vit_tiny_patch16_224", "dpt")
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1.0, lr_multi=3.0, layer_decay=0.5), model)
    set_lr(optimizer, 2.0)
    found = rates(model, optimizer)
    assert found.keys() == dict(model.named_parameters()).keys()
    vit = "encoder.body.model."
    for name, rate in found.items():
        if not name.startswith("encoder."):
            assert rate == 6.0
        elif name.startswith(f"{vit}blocks."):
            assert rate == 2.0 * 0.5 ** (12 - int(name.removeprefix(f"{vit}blocks.").split(".")[0]))
        else:
            assert rate == (2.0 if name.startswith(f"{vit}norm.") else 2.0 * 0.5**13), name


def test_layer_decay_of_mit():
    """Stages of one block: a patch embedding has the rate of the block before it."""
    model = make_model("none")
    optimizer = build_optimizer(OptimConfig(layer_decay=0.1), model)
    set_lr(optimizer, 1.0)
    found = rates(model, optimizer)
    expected = {"stages.0.patch_embed": 5, "stages.0.blocks": 4, "stages.1.patch_embed": 4, "stages.3.norm": 0}
    for part, distance in expected.items():
        assert {f"{rate:.0e}" for name, rate in found.items() if f"encoder.{part}." in name} == {f"{0.1**distance:.0e}"}


@pytest.mark.parametrize(
    ("encoder", "freeze", "trained"),
    [(CNN, "encoder", ()), (VIT, "encoder", ("encoder.pyramid.",)), (VIT, 5, ("blocks.5.", "encoder.pyramid."))],
)
def test_frozen_parts_do_not_change(encoder, freeze, trained):
    """Neither weights nor statistics, over two steps; everything else does."""
    torch.manual_seed(0)
    model = build(encoder).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=0.1, freeze=freeze), model)
    for _ in range(2):
        model.train()(torch.randn(4, 3, 64, 64)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        fixed = name.startswith("encoder.") and not any(part in name for part in trained)
        assert torch.equal(tensor, before[name]) == fixed, name
    assert model.decoder.training and model.training


@pytest.mark.parametrize(
    ("encoder", "options", "words"),
    [
        (VIT, {"freeze": 7}, "optim.freeze=7.*it has 6 blocks; use optim.freeze=none, encoder or 1 to 6$"),
        (VIT, {"freeze": 0}, "optim.freeze=0.*it has 6 blocks"),
        (CNN, {"layer_decay": 0.75}, "optim.layer_decay=0.75.*has none; leave out optim.layer_decay$"),
    ],
)
def test_unsuitable_values(encoder, options, words):
    with pytest.raises(UserError, match=words):
        build_optimizer(OptimConfig(**options), build(encoder))
