"""Encoders of timm from train.py to prediction."""

import json

import pytest
import torch

import train
from allspark import __main__ as verbs
from allspark.inference import load_for_inference


def test_check_names_weight_source(place, capsys):
    verbs.main(["check", *place.train("model.encoder=timm:test_convnext", "model.pretrained=none")])
    assert "from random initialization (get it by `hf download timm/test_convnext.r160_in1k " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_train_eval_predict(name, place, capsys):
    """AllSpark with its memory, evaluated, saved, read again."""
    train.main(place.train(f"model.encoder=timm:{name}"))
    lines = [json.loads(line) for line in (place.run / "metrics.jsonl").read_text().splitlines()]
    assert sum("miou" in line for line in lines) == 2
    loaded = load_for_inference(place.run / "latest.pth", torch.device("cpu"))
    assert loaded.model.encoder.name == name
    verbs.main(["weights", "inspect", str(place.run / "latest.pth")])
    assert f"encoder timm:{name}, with timm's tensor names" in capsys.readouterr().out
