"""Images with other than three channels: filters, normalization, color operations, encoders."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from allspark.config import CustomDataConfig, ModelConfig
from allspark.data.batch import normalize
from allspark.data.datasets.custom import make_spec
from allspark.data.image_files import BadSample, read_size
from allspark.data.image_io import read_image
from allspark.data.spec import ImageReading
from allspark.data.transforms import CV2, PHOTOMETRIC, PILLOW, draw_geometry, to_tensor
from allspark.models.input_channels import adapt_filters
from allspark.models.segmentor import build_model
from allspark.utils.errors import UserError
from allspark.weights.loading import load_encoder


@pytest.mark.parametrize(
    ("encoder", "channels"),
    [("mit_b0", 1), ("mit_b0", 5), ("resnet50s", 2), ("timm:resnet10t", 5), ("timm:tf_efficientnet_lite0", 1)],
)
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
        if channels < 3:
            got = other(gray.expand(-1, channels, -1, -1)).logits
            if encoder.startswith("timm"):  # its own normalization differs by channel
                assert got.shape == want.shape
            else:
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        else:
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


def write_bands(path, pixels, planar="contig"):
    tifffile = pytest.importorskip("tifffile")
    stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
    photometric = "rgb" if pixels.shape[2] > 2 else "minisblack"
    tifffile.imwrite(path, stored, photometric=photometric, planarconfig=planar)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_bands_are_read_as_stored(tmp_path, channels, planar, bits):
    high = 4096 if bits == 16 else 256
    pixels = np.random.default_rng(3).integers(0, high, (41, 37, channels)).astype(f"uint{bits}")
    write_bands(tmp_path / "a.tif", pixels, planar)
    got = read_image(tmp_path / "a.tif", ImageReading(4095 if bits == 16 else None, channels=channels))
    assert np.array_equal(got, pixels >> 4 if bits == 16 else pixels) and got.dtype == np.uint8
    assert read_size(tmp_path / "a.tif") == (37, 41)


def test_alpha_is_a_channel_when_four_are_asked_for(tmp_path):
    pixels = np.random.default_rng(4).integers(0, 256, (20, 30, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", ImageReading(channels=4)), pixels)
    Image.fromarray(pixels[..., :2], "LA").save(tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "b.png", ImageReading(channels=2)), pixels[..., :2])
    cv2.imwrite(str(tmp_path / "c.png"), (pixels.astype(np.uint16) * 257)[..., [2, 1, 0, 3]])
    assert np.array_equal(read_image(tmp_path / "c.png", ImageReading(channels=4)), pixels)
    Image.fromarray(pixels[..., :3]).save(tmp_path / "d.png")
    with pytest.raises(BadSample, match=r"d\.png: has 3 channels, data\.custom\.channels=4"):
        read_image(tmp_path / "d.png", ImageReading(channels=4))


def test_floating_point_bands_are_refused(tmp_path):
    """Reduced like integers, 0..1 would be black."""
    for pixels in (np.full((20, 30, 4), 0.5, np.float32), np.full((20, 30, 4), np.nan, np.float64)):
        write_bands(tmp_path / "a.tif", pixels)
        with pytest.raises(BadSample, match=r"a\.tif: 4 band.* of \d+-bit floating-point values have no fixed range"):
            read_image(tmp_path / "a.tif", ImageReading(channels=4))


def test_gray_images(tmp_path):
    gray = np.random.default_rng(5).integers(0, 256, (20, 30), np.uint8)
    Image.fromarray(gray).save(tmp_path / "a.png")
    Image.fromarray(np.repeat(gray[..., None], 3, 2)).save(tmp_path / "b.png")
    Image.fromarray(gray.astype(np.uint16) * 16).save(tmp_path / "c.tif")
    for name, reading in {
        "a.png": ImageReading(channels=1),
        "b.png": ImageReading(channels=1),
        "c.tif": ImageReading(4095, channels=1),
    }.items():
        assert np.array_equal(read_image(tmp_path / name, reading), gray[..., None]), name


def test_damaged_bands(tmp_path):
    write_bands(tmp_path / "a.tif", np.zeros((64, 64, 5), np.uint8))
    whole = (tmp_path / "a.tif").read_bytes()
    for end in (8, 60, len(whole) // 2):
        (tmp_path / "a.tif").write_bytes(whole[:end])
        with pytest.raises(BadSample, match=r"a\.tif"):
            read_image(tmp_path / "a.tif", ImageReading(channels=5))


@pytest.mark.parametrize("encoder", ["timm:repvgg_a0", "timm:tresnet_m"])
def test_encoder_with_several_inputs_is_refused(encoder):
    """Its stem reads the image by parallel convolutions, or rearranges its pixels."""
    build_model(ModelConfig(encoder=encoder), 3, 64)
    with pytest.raises(UserError, match=rf"model.encoder={encoder}: cannot be an encoder here: .* of 4 channels"):
        build_model(ModelConfig(encoder=encoder), 3, 64, 4)
