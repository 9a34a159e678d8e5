"""Images with other than three channels: filters, normalization, color operations, encoders."""

import numpy as np
import pytest
import torch

from allspark.config import CustomDataConfig, ModelConfig
from allspark.data.batch import normalize
from allspark.data.datasets.custom import make_spec
from allspark.data.transforms import CV2, PHOTOMETRIC, PILLOW, draw_geometry, to_tensor
from allspark.models.input_channels import adapt_filters
from allspark.models.segmentor import build_model
from allspark.utils.errors import UserError
from allspark.weights.loading import load_encoder


@pytest.mark.parametrize("encoder", ["mit_b0", "resnet50s", "timm:resnet10t", "timm:tf_efficientnet_lite0"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_encoders_take_any_number_of_channels(encoder, channels):
    """Equal channels of a gray image, and black channels beyond RGB, give the features of the RGB network."""
    torch.manual_seed(0)
    cfg = ModelConfig(encoder=encoder, drop_path=0.0)
    rgb, other = build_model(cfg, 3, 64).eval(), build_model(cfg, 3, 64, channels).eval()
    state = rgb.state_dict()
    first = next(name for name, tensor in state.items() if tensor.ndim == 4)
    assert state[first].shape[1] == 3
    other.load_state_dict({**state, first: adapt_filters(state[first], channels)})
    gray = torch.rand(2, 1, 64, 96)
    with torch.no_grad():
        want = rgb(gray.expand(-1, 3, -1, -1)).logits
        if channels < 3 and not encoder.startswith("timm"):  # timm's own normalization differs by channel
            torch.testing.assert_close(other(gray.expand(-1, channels, -1, -1)).logits, want, atol=1e-4, rtol=1e-4)
        if channels > 3:
            changed = {
                **state,
                first: adapt_filters(state[first], channels) * torch.tensor([1, 1, 1, 0, 0]).view(-1, 1, 1),
            }
            other.load_state_dict(changed)
            image = torch.cat([gray.expand(-1, 3, -1, -1), torch.randn(2, channels - 3, 64, 96)], 1)
            torch.testing.assert_close(other(image).logits, want, atol=1e-5, rtol=1e-5)


def test_pretrained_filters_are_adapted(tmp_path):
    rgb, nir = (build_model(ModelConfig(encoder="mit_b0"), 3, 64, channels) for channels in (3, 4))
    torch.save(rgb.encoder.state_dict(), tmp_path / "mit_b0.pth")
    load_encoder(nir, tmp_path / "mit_b0.pth")
    want, got = (model.encoder.stages[0].patch_embed.proj.weight for model in (rgb, nir))
    assert torch.equal(got[:, :3], want)
    torch.testing.assert_close(got[:, 3], want.mean(1))


def test_normalization():
    def spec(**custom):
        return make_spec("mine", CustomDataConfig(classes=("a", "b"), **custom))

    image = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 6), np.uint8)
    given = spec(channels=4, mean=(0.1, 0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7, 0.8))
    want = (image / 255 - np.reshape([0.1, 0.2, 0.3, 0.4], (4, 1, 1))) / np.reshape([0.5, 0.6, 0.7, 0.8], (4, 1, 1))
    assert np.allclose(normalize(torch.from_numpy(image), given.statistics), want, atol=1e-5)
    assert spec(channels=1).statistics == ((0.449,), (0.226,))
    assert spec(channels=4).statistics.mean == (0.485, 0.456, 0.406, 0.449)
    with pytest.raises(UserError, match="data.custom.std: 3 values for 4 channels"):
        spec(channels=4, std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("operations", [CV2, PILLOW])
@pytest.mark.parametrize("policy", ["strong", "imas", "pseudoseg"])
def test_views_of_other_channels(policy, operations):
    """RGB changes as it does alone, each further channel as a gray image does."""
    image = np.random.default_rng(1).integers(0, 256, (48, 40, 5), np.uint8)
    for seed in range(12):
        view = PHOTOMETRIC[policy](image, np.random.default_rng(seed), operations)
        parts = [image[..., :3].copy(), *(np.repeat(image[..., [c]], 3, 2) for c in (3, 4))]
        alone = [PHOTOMETRIC[policy](part, np.random.default_rng(seed), operations) for part in parts]
        assert np.array_equal(view, np.concatenate([alone[0], alone[1][..., :1], alone[2][..., :1]], 2))


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_crops_of_other_channels(channels):
    image = np.random.default_rng(2).integers(0, 256, (50, 70, channels), np.uint8)
    for seed in range(10):
        geometry = draw_geometry(np.random.default_rng(seed), 70, 50, (64, 48), (0.5, 2), True, True, True)
        crop = geometry.image(image)
        each = [geometry.image(np.repeat(image[..., [c]], 3, 2))[..., 0] for c in range(channels)]
        assert np.abs(crop.astype(int) - np.stack(each, 2)).max() <= 1
        assert np.array_equal(to_tensor(crop).permute(1, 2, 0), crop)
