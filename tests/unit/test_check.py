"""The predicted and the measured memory of a training step, and what `check` reports."""

import pytest
import torch

from allspark import memory_estimate as memory
from allspark.__main__ import main
from allspark.build import build_method, complete
from allspark.config_io import load_recipe
from allspark.data.datasets import DATASETS
from allspark.run import ohem_without_effect
from allspark.utils.errors import run_main

SPEC = DATASETS["shapes"]


def recipe_of(method, **options):
    small = {"encoder": "tiny", "crop_size": 64, "batch_size": 2}
    return complete(load_recipe("shapes", method, {**small, **options}))


def predicted(recipe, *where):
    return memory.predict_step(recipe, SPEC, build_method(recipe, SPEC), *where)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("allspark_revised", {"model.checkpointing": True, "criterion": "ohem"}),
        ("pseudoseg", {"model.bottleneck": "none", "optim.name": "sgd"}),
    ],
    ids=["teacher and memory", "neither"],
)
def test_prediction_matches_measurement(method, options):
    recipe = recipe_of(method, **options)
    found = predicted(recipe)
    real = memory.measure_step(recipe, SPEC, build_method(recipe, SPEC), torch.device("cpu"))
    assert abs(found.peak / real.peak - 1) < 0.15
    assert found.persistent == {**real.persistent, "DDP's buckets": 0}
    assert sum(found.persistent.values()) < found.peak
    assert (found.persistent["teacher"] > 0) == (method == "allspark_revised")


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({}, True),
        ({"criterion.min_kept": 8000}, False),
        ({"criterion.min_kept_images": 100}, False),
        ({"criterion.min_kept_images": 1}, True),
        ({"micro_batch": 1}, True),
        ({"criterion": "ce"}, False),
    ],
)
def test_ohem_that_keeps_every_pixel(options, warned):
    given = {"criterion": "ohem", "criterion.min_kept": 8192, **options}
    warning = ohem_without_effect(recipe_of("supervised", **given), 1)
    assert (warning is not None) == warned
    if warned:  # what it suggests has an effect
        given["criterion.min_kept"] = int(warning.rpartition("=")[2])
        assert ohem_without_effect(recipe_of("supervised", **given), 1) is None


def test_prediction_for_ranks_and_gpu():
    """A share of the batch and DDP's copy of the gradients; half of the bytes in bf16, but for weights and norms."""
    recipe = recipe_of("supervised", batch_size=16)
    alone, shared = predicted(recipe), predicted(recipe, "cpu", 4)
    activations = [each.peak - sum(each.persistent.values()) for each in (alone, shared)]
    assert shared.persistent["DDP's buckets"] == alone.persistent["weights"]
    assert activations[1] < 0.3 * activations[0]
    assert predicted(recipe_of("supervised", batch_size=16, precision="bf16"), "cuda").peak < 0.9 * alone.peak


def test_check_reports_memory(place, capsys, monkeypatch):
    place.edit(model={"bottleneck": "none", "encoder": "tiny"})
    monkeypatch.setattr("allspark.cli.check.free_memory", lambda kind: 1_000_000)
    assert run_main(main, ["check", "--config", str(place.config), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 labeled, 6 unlabeled, 2 val images" in out and "no problems found" in out
    assert (
        "memory of a training step on cpu, 2 labeled images per forward pass, one of 1 process(es): predicted 0." in out
    )
    assert "WARNING: a training step needs more than the 0.00 GB that are free on this cpu; micro_batch" in out
    assert "measured in two steps: 0." in out and "peak resident memory" in out
    told = [line.split(" GB at its peak")[0].split()[-1] for line in out.splitlines() if "at its peak" in line]
    assert len(set(told)) == 1
    assert run_main(main, ["check", "--config", str(place.config), "--processes", "3"]) == 2
    assert "--processes 3: give a number that divides batch_size=2" in capsys.readouterr().err


def test_free_memory_in_a_container(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    paths = [tmp_path / name for name in ("none", "limit", "missing")]
    monkeypatch.setattr(memory, "cgroup_limits", lambda: paths)
    assert memory.free_memory("cpu") == 1_000_000


def test_machine_memory():
    assert memory.main_memory() > memory.resident_peak() > 10_000_000
    assert 0 < memory.free_memory("cpu") < memory.main_memory()
    assert (memory.free_memory("cuda") is None) == (not torch.cuda.is_available())
