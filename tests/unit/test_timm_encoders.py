"""Encoders from timm: pyramids and plain ViTs, input sizes, the bottleneck, weights, refusals."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train
from allspark.config import BottleneckConfig, ModelConfig, OptimConfig
from allspark.data.batch import normalize
from allspark.engine.optim import build_optimizer
from allspark.models.bottleneck import CrossBatch
from allspark.models.segmentor import build_model
from allspark.models.student import Student
from allspark.models.timm_encoder import TimmEncoder, normalize_name
from allspark.utils.errors import UserError, run_main
from allspark.weights.loading import load_pretrained
from helpers import SHARED
from helpers.networks import CASES, CLASSES, CROP, FIRST, assert_numbers, make_method, random_batches

PYRAMIDS = ("test_convnext", "test_resnet", "test_mambaout")  # maps of 4 levels, of 5 levels, channels last
VITS = ("test_vit", "test_vit3")


def make_model(name, bottleneck="none", **options):
    torch.manual_seed(0)
    bottleneck = BottleneckConfig(name=bottleneck) if isinstance(bottleneck, str) else bottleneck
    config = ModelConfig(encoder=f"timm:{name}", bottleneck=bottleneck, decoder_channels=16)
    return build_model(ModelConfig(**{**vars(config), **options}), CLASSES, CROP)


@pytest.mark.parametrize("bottleneck", ["none", "allspark"])
@pytest.mark.parametrize("name", [*PYRAMIDS, *VITS])
def test_every_parameter_gets_gradient(name, bottleneck):
    """A crop that no stride divides; the memory has the side of the deepest map."""
    model = make_model(name, bottleneck)
    cross = CrossBatch(2, torch.randn(2, CLASSES, CROP, CROP), True) if bottleneck == "allspark" else None
    output = model.train()(torch.randn(4, 3, CROP, CROP), cross=cross)
    assert output.logits.shape == (4, CLASSES, CROP, CROP)
    assert [feature.shape[1] for feature in output.features] == list(model.encoder.channels)
    output.logits.square().mean().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "vit_tiny_patch16_224.augreg_in21k", "eva02_tiny_patch14_224"]
)
@torch.no_grad()
def test_sizes_and_batch_independence(name):
    model = make_model(name, "allspark").eval()
    for size in ((32, 32), (33, 70), (97, 64)):
        images = torch.randn(3, 3, *size)
        logits = model(images).logits
        assert logits.shape == (3, CLASSES, *size)
        torch.testing.assert_close(logits[1:2], model(images[1:2]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
@torch.no_grad()
def test_padding_is_cropped(name):
    """The logits of an image that fills no whole number of cells are those of the image with the mean color around."""
    model = make_model(name).eval()
    assert model.encoder.multiple == 32
    image = torch.zeros(1, 3, 64, 96)
    image[..., :50, :71] = torch.randn(3, 50, 71)
    torch.testing.assert_close(model(image[..., :50, :71]).logits, model(image).logits[..., :50, :71])


@pytest.mark.parametrize(
    ("encoder", "file"),
    [
        ("timm:tf_efficientnet_lite0", "tf_efficientnet_lite0.safetensors"),
        ("dinov2_small", "vit_small_patch14_dinov2_saliency_fp16.safetensors"),
    ],
)
def test_pretrained_files(encoder, file):
    """Every tensor of the body is in the file; the second one stores float16."""
    path = SHARED / "weights" / file
    if not path.is_file():
        pytest.skip(f"no {path} (ALLSPARK_SHARED)")
    model = build_model(ModelConfig(encoder=encoder), CLASSES, 98)
    load_pretrained(model, str(path), "none")
    stored = load_file(path)
    for name, tensor in model.encoder.body.state_dict().items():
        same = [key for key in stored if normalize_name(key) == normalize_name(name)]
        assert torch.equal(stored[same[0]].to(tensor.dtype), tensor), name


@torch.no_grad()
def test_patch_size_14():
    """Maps at strides 3.5, 7, 14 and 28, and position embeddings at sizes other than they were made for."""
    encoder = TimmEncoder("eva02_tiny_patch14_224").eval()
    assert encoder.strides == (3.5, 7, 14, 28) and encoder.channels == (256,) * 4
    assert [tuple(feature.shape[-2:]) for feature in encoder(torch.randn(1, 3, 57, 84))] == [
        (24, 24), (12, 12), (6, 6), (3, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "bottleneck"), CASES)
def test_every_method_trains_a_vit_with_dpt(method, bottleneck):
    model = make_model("test_vit", bottleneck, decoder="dpt", dropout=0.0)
    method = make_method(method)
    method.attach(model)
    losses = method.losses(Student(model.train(), read_memory=True), *random_batches(method), FIRST)
    losses["loss"].backward()
    assert_numbers(losses, model)


@pytest.mark.parametrize(("decoder", "fit"), [("mlp", "pad"), ("mlp", "resize"), ("dpt", "pad")])
def test_bottleneck_on_the_tokens(decoder, fit):
    """Of a crop of 65 in patches of 16: padded to 96 = 6 patches for a pyramid, to 80 for DPT, resized to 64."""
    model = make_model("test_vit", BottleneckConfig(name="allspark", place="tokens"), decoder=decoder, fit=fit)
    cells = {("mlp", "pad"): 6, ("mlp", "resize"): 4, ("dpt", "pad"): 5}[decoder, fit]
    seen = []
    model.bottleneck.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(4, 3, CROP, CROP)
    output = model.train()(images, cross=CrossBatch(2, torch.randn(2, CLASSES, CROP, CROP), True))
    output.logits.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert seen[0].shape == (4, 64, cells, cells) and output.logits.shape == (4, CLASSES, CROP, CROP)
    model.eval()
    with torch.no_grad():  # no image depends on another
        torch.testing.assert_close(model(images).logits[1:2], model(images[1:2]).logits, rtol=1e-4, atol=1e-4)


def test_bottleneck_on_the_tokens_needs_a_vit():
    with pytest.raises(UserError, match="place=tokens with model.encoder=timm:test_resnet: only a plain ViT"):
        make_model("test_resnet", BottleneckConfig(name="allspark", place="tokens"))


@torch.no_grad()
def test_fit_resizes_to_the_nearest_multiple():
    model = make_model("test_vit", fit="resize").eval()
    image = torch.randn(1, 3, 70, 113)
    small = F.interpolate(image, (64, 128), mode="bilinear", align_corners=True)
    expected = F.interpolate(model(small).logits, (70, 113), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(image).logits, expected)


def test_dpt_needs_a_vit():
    with pytest.raises(UserError, match="needs four layers of a plain ViT.*such as model.encoder=dinov2_small"):
        make_model("test_convnext", decoder="dpt")


@torch.no_grad()
def test_input_normalization():
    encoder = TimmEncoder("test_convnext").eval()  # mean and deviation 0.5
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    for ours, theirs in zip(encoder(normalize(image)), encoder.body((image / 255 - 0.5) / 0.5), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def filled(name, **options):
    """timm's own network, a classifier, with values in every tensor that no fresh one has."""
    network = timm.create_model(name, **options)
    generator = torch.Generator().manual_seed(1)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01)
    return network.eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_vit"])
@torch.no_grad()
def test_timm_weights_give_its_maps(name, suffix, tmp_path):
    network, file = filled(name), tmp_path / f"weights{suffix}"
    save_file(network.state_dict(), file) if suffix == ".safetensors" else torch.save(network.state_dict(), file)
    model = make_model(name).eval()
    (said,) = load_pretrained(model, str(file), "none")
    assert re.search(r"\d+ tensors, unused: \S*(head|fc|norm)", said)
    image = torch.randn(1, 3, 64, 96)
    raw = image * model.encoder.scale + model.encoder.shift
    theirs = network.forward_intermediates(raw, intermediates_only=True)
    for ours, other in zip(model.encoder.body(raw)[-3:], theirs[-3:], strict=True):
        torch.testing.assert_close(ours, other)


def test_position_embeddings_are_resampled(tmp_path):
    """A file of a ViT for another image size, as those of DINOv2 and ours are."""
    torch.save(filled("test_vit", img_size=96).state_dict(), tmp_path / "small.pth")
    model = make_model("test_vit")
    load_pretrained(model, str(tmp_path / "small.pth"), "none")
    embeddings = model.encoder.body.model.pos_embed
    assert embeddings.shape[1] == 1 + 10 * 10 and 0.05 < embeddings.mean() < 0.07  # of its own 160 pixels, and filled


def test_encoder_of_trained_model(tmp_path):
    """With the pyramid, which is fresh otherwise."""
    trained = make_model("test_vit")
    torch.save(trained.state_dict(), tmp_path / "whole.pth")
    torch.manual_seed(9)
    model = build_model(ModelConfig(encoder="timm:test_vit", decoder_channels=8), 5, CROP)
    load_pretrained(model, str(tmp_path / "whole.pth"), "none")
    own = model.encoder.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in trained.encoder.state_dict().items())


def test_new_layers_use_decoder_rate():
    model = make_model("test_vit")
    slow, fast = build_optimizer(OptimConfig(), model).param_groups
    assert {id(p) for p in slow["params"]} == {id(p) for p in model.encoder.body.parameters()}
    assert {id(p) for p in model.encoder.pyramid.parameters()} < {id(p) for p in fast["params"]}


def test_refused_weights(tmp_path):
    model = make_model("test_convnext")
    torch.save(filled("test_vit").state_dict(), tmp_path / "other.pth")
    state = filled("test_convnext").state_dict()
    torch.save(
        {key: value for key, value in state.items() if key != "stages.1.downsample.0.bias"}, tmp_path / "less.pth"
    )
    for file, words in (
        ("other.pth", "timm cannot convert it to weights of test_convnext"),
        ("less.pth", "1 of .*stages_1.downsample.0.bias"),
    ):
        with pytest.raises(UserError, match=words):
            load_pretrained(model, str(tmp_path / file), "none")
    with pytest.raises(UserError, match=r"nowhere.pth: no such .*hf download timm/test_convnext\.r160_in1k"):
        load_pretrained(model, str(tmp_path / "nowhere.pth"), "none")


def test_class_maps_cover_padding():
    """The bottleneck's class maps of a padded image are padded, too: to where its cells lie."""
    model = make_model("test_convnext", "allspark")
    grouped = []
    model.bottleneck.write_memory = lambda tokens, maps, size: grouped.append(maps)
    logits = torch.randn(1, 5, 70, 90)
    model(torch.rand(2, 3, 70, 90), cross=CrossBatch(1, logits))
    (maps,) = grouped
    assert maps.shape == (1, 5, 96, 96) and torch.equal(maps[..., :70, :90], logits)
    assert torch.equal(maps[..., 70:, :90], logits[..., -1:, :].expand(-1, -1, 26, -1))
    assert torch.equal(maps[..., 90:], maps[..., 89:90].expand(-1, -1, -1, 6))


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_gradient_checkpointing(name):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(name, checkpointing=checkpointing, drop_path=0.0, dropout=0.0)
        model(
            torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64).repeat(2, 1, 1, 1)
        ).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("timm:convnxt_tiny",), "did you mean timm:convnext_tiny"),
        (("timm:hf-hub:somebody/model",), "no such model"),  # nothing is looked for outside
        (("timm:test_coatnet",), "does not take images of any size"),
        (("timm:levit_128",), "strides 16/32/64, and 4 levels are needed"),
        (("timm:convnext_atto.nobody",), "Invalid pretrained tag"),
        (("timm:test_convnext", "model.decoder=deeplab"), "4/8/16/32. Set model.decoder=mlp"),
        (("timm:test_resnet", "model.checkpointing=true"), "batch norm would count each batch twice"),
        (("convnext_tiny",), "timm:NAME"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_refusals(words, told, place, capsys):
    assert run_main(train.main, place.train(f"model.encoder={words[0]}", *words[1:])) == 2
    error = capsys.readouterr().err
    assert told in error and f"{words[0]}" in error
