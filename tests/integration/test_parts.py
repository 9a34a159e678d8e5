"""docs/tools/parts.py measures the network with one part removed, and nothing else."""

import copy
import json
import sys

import pytest
import torch
from PIL import Image

import train
from allspark.config import BottleneckConfig, ModelConfig
from allspark.models.bottleneck import CrossBatch
from allspark.models.segmentor import build_model
from allspark.utils.errors import run_main

sys.path.insert(0, "docs/tools")
import parts

IMAGE = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(1))


def network(attention="both"):
    torch.manual_seed(0)
    bottleneck = BottleneckConfig(name="allspark", attention=attention)
    return build_model(ModelConfig(encoder="mit_b0", bottleneck=bottleneck), 3, 65).eval()


@torch.no_grad()
def test_without_attention_equals_ablation():
    model = network()
    logits = parts.without_attention(model)(IMAGE).logits
    torch.testing.assert_close(logits, network("none")(IMAGE).logits)
    assert not torch.allclose(logits, model(IMAGE).logits, atol=1e-4)


@torch.no_grad()
def test_memory_is_read_as_in_training():
    """By each image for itself; and it is the memory of the file, which a teacher has not."""
    model, memory = network(), copy.deepcopy(network().bottleneck.memory)
    memory.queue.mul_(3)
    reads = parts.ReadsMemory(model.inference_copy(), memory)
    logits = reads(IMAGE).logits
    model.bottleneck.memory = memory
    torch.testing.assert_close(logits, model(IMAGE, cross=CrossBatch(2, read_memory=True)).logits)
    torch.testing.assert_close(logits[:1], reads(IMAGE[:1]).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, model(IMAGE).logits, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("level", range(4))
def test_flat_map_is_its_mean(level):
    model = network()
    features, flat = model.encoder(IMAGE), parts.with_flat(model, level).encoder(IMAGE)
    for place, (one, other) in enumerate(zip(features, flat, strict=True)):
        expected = one.mean((2, 3), keepdim=True).expand_as(one) if place == level else one
        torch.testing.assert_close(other, expected)


def test_run_is_measured(finished, place, capsys):
    assert run_main(train.main, place.train("crop_size=64", "epochs=1", "warmup_epochs=0")) == 0
    out, file = place.root / "parts.json", str(place.run / "latest.pth")
    assert run_main(parts.main, [file, "--only", "memory", "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text()).values()
    assert found.keys() == {"as it is", "memory", "step", "filled"} and (found["step"], found["filled"]) == (3, 100)
    assert f"memory {found['memory']:.2f}" in capsys.readouterr().out
    assert run_main(parts.main, ["--draw", str(out)]) == 0
    assert Image.open(out.with_suffix(".png")).size[0] > 500
    for other in (place.root / "no.json", place.run / "config.yaml", place.run / "run.json"):
        assert run_main(parts.main, ["--draw", str(other)]) == 2
        assert f"--draw {other}: not what --json writes" in capsys.readouterr().err
    assert run_main(parts.main, [file, "--only", "memories"]) == 2
    assert "--only memories: this network has no stride 4, " in capsys.readouterr().err
    assert run_main(parts.main, [str(finished.run / "latest.pth")]) == 2
    assert "of 65 x 64 pixels is smaller than the crop" in capsys.readouterr().err
