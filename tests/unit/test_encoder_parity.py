"""The MiT encoders and DINOv2 against those of transformers and segmentation-models-pytorch, with imported weights.

Epsilon of the layer norms. Original and segmentation-models-pytorch: 1e-5 in patch embeddings and after `sr`, 1e-6 in
all others, as here. transformers: 1e-5 in all (its layer_norm_eps is not used); mmsegmentation: 1e-6 in all. With
features of variance 1 that moves the maps by about 5e-6 of their scale, thrice the rounding of float32: left alone.
"""

from pathlib import Path

import pytest
import torch

from allspark.config import ModelConfig
from allspark.models import mit
from allspark.models.segmentor import build_model
from allspark.models.timm_encoder import embed_positions
from allspark.utils.errors import UserError
from allspark.weights.loading import WeightFile, load_encoder, read_weights
from allspark.weights.recognize import recognize
from helpers.parity import filled, same_maps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def transformers_config(size, **more):
    config = pytest.importorskip("transformers", reason="transformers is not installed (requirements.txt)")
    depths, widths = list(size.depths), list(size.channels)
    return config.SegformerConfig(depths=depths, hidden_sizes=widths, decoder_hidden_size=size.decoder_channels, **more)


def imported(source, variant):
    found = recognize(WeightFile(Path("state"), source, {}) if isinstance(source, dict) else read_weights(source))
    found.state()
    assert found.architecture.model.encoder == variant
    assert not found.result.unexpected
    return found.module.eval()


@pytest.mark.parametrize("variant", mit.SIZES)
@torch.no_grad()
def test_transformers(variant, image, tmp_path):
    config = transformers_config(mit.SIZES[variant])
    from transformers import SegformerModel

    model = filled(SegformerModel(config))
    theirs = model(image, output_hidden_states=True).hidden_states
    model.save_pretrained(tmp_path)
    ours = imported(tmp_path / "model.safetensors", variant)(image)
    same_maps(ours, theirs)
    (tmp_path / "model.safetensors").unlink()
    if variant == "mit_b0":  # the names it has in memory, which since transformers 5 are others than those in its files
        same_maps(imported(model.state_dict(), variant)(image), theirs)


@torch.no_grad()
def test_dinov2(tmp_path):
    """The file of transformers, and at 518 its tokens. At other sizes, where it resizes the position embedding without
    DINOv2's offset of 0.1 cells, it is given ours; the offset is tested in golden/test_unimatch_v2.py."""
    pytest.importorskip("transformers", reason="transformers is not installed (requirements.txt)")
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518)
    model = filled(Dinov2Model(config))
    model.save_pretrained(tmp_path)
    found = recognize(read_weights(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    assert found.architecture.model.encoder == "dinov2_small"
    assert found.state() and found.result.unexpected == ["embeddings.mask_token"]
    encoder = found.module.eval()
    for side in (518, 70, 98):
        image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
        if side != 518:
            vit = encoder.body.model
            positions = embed_positions(vit, torch.zeros(1, side // 14, side // 14, 384))
            positions[:, 0] -= vit.cls_token[:, 0]
            model.embeddings.position_embeddings = torch.nn.Parameter(positions)
        tokens = model(image).last_hidden_state[:, 1:]
        same_maps([encoder(image)[-1].flatten(2).transpose(1, 2)], [tokens])


def test_dinov2_with_registers(tmp_path):
    """The network would run without the tokens that it was trained with."""
    model = build_model(ModelConfig(encoder="dinov2_small", decoder="dpt"), 3, 70)
    state = {name.removeprefix("body.model."): value for name, value in model.encoder.state_dict().items()}
    torch.save(state, tmp_path / "plain.pth")
    torch.save(state | {"register_tokens": torch.zeros(1, 4, 384)}, tmp_path / "reg4.pth")
    assert "encoder weights" in load_encoder(model, tmp_path / "plain.pth")
    with pytest.raises(
        UserError, match="reg4.pth: a DINOv2 with registers; use model.encoder=timm:vit_small_patch14_reg4"
    ):
        load_encoder(model, tmp_path / "reg4.pth")


@pytest.mark.parametrize("variant", mit.SIZES)
@torch.no_grad()
def test_segmentation_models_pytorch(variant, image):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    model = filled(smp.encoders.get_encoder(variant, weights=None))
    ours = imported(model.state_dict(), variant)(image)
    same_maps(ours, model(image)[2:])  # it gives the image and an empty map of stride 2, too


@torch.no_grad()
def test_segmentation_models_pytorch_whole_model(image, tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    model = filled(smp.Unet("mit_b0", encoder_weights=None))
    torch.save({"state_dict": {f"model.{name}": t for name, t in model.state_dict().items()}}, tmp_path / "unet.ckpt")
    found = recognize(read_weights(tmp_path / "unet.ckpt"))
    assert found.architecture.num_classes is None
    assert all(name.startswith(("decoder.", "segmentation_head.")) for name in found.result.unexpected)
    found.state()
    same_maps(found.module.eval()(image), model.encoder(image)[2:])


@torch.no_grad()
def test_transformers_logits(image, tmp_path):
    config = transformers_config(mit.SIZES["mit_b0"], num_labels=7)
    from transformers import SegformerForSemanticSegmentation

    model = filled(SegformerForSemanticSegmentation(config))
    model.save_pretrained(tmp_path)
    ours = imported(tmp_path / "model.safetensors", "mit_b0")
    same_maps([ours.decoder(ours.encoder(image))], [model(image).logits])
