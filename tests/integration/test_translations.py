"""Old names in command lines, config.yaml files and checkpoints."""

import shutil

import pytest
import torch
import yaml

import train
from allspark.build import complete
from allspark.config_io import load_config, load_recipe, parse_overrides
from allspark.inference import load_for_inference
from allspark.runs import read_archive
from helpers import REPO
from helpers.runs import load

# The sections of a config.yaml that have changed since, as a run of 483fa05 wrote them
OLD = """
data: {dataset: shapes, data_root: data/shapes, crop_size: 97, split: "1_30"}
model:
  encoder: mit_b0
  bottleneck: {name: NAME, num_heads: 2, dropout: 0.1, grouping_input: logits, memory_policy: rank0}
method: {name: allspark, warmup_epochs: 13, pseudo_context: batch, ignore_padding: false, teacher: none}
epochs: 24
batch_size: 8
"""


def old_config(folder, bottleneck):
    file = folder / "config.yaml"
    file.write_text(OLD.replace("NAME", bottleneck))
    return file


def test_old_warmup(tmp_path):
    recipe = complete(load_config(old_config(tmp_path, "allspark")))
    assert recipe.notes == ("method.warmup_epochs is now model.bottleneck.warmup_epochs",)
    assert (recipe.method.name, recipe.model.bottleneck.warmup_epochs) == ("allspark", 13)
    assert "warmup_epochs" not in recipe.method.options and recipe.method.options["pseudo_context"] == "batch"
    assert (
        load_config(tmp_path / "config.yaml", {"model.bottleneck.warmup_epochs": 2}).model.bottleneck.warmup_epochs == 2
    )


def test_old_self_training(tmp_path):
    recipe = complete(load_config(old_config(tmp_path, "none")))
    assert recipe.notes[1:] == ("method=allspark without a bottleneck is now method=selftrain",)
    assert recipe.method.name == "selftrain" and "pseudo_context" not in recipe.method.options


def test_old_option_on_command_line():
    overrides = parse_overrides(["method.warmup_epochs=3"])
    assert load_recipe("cityscapes", "fixmatch", overrides).model.bottleneck.warmup_epochs == 3
    assert load_recipe("cityscapes", "fixmatch").model.bottleneck.warmup_epochs == 15


def test_other_method_keeps_dataset_warmup(tmp_path):
    recipe = load_config(old_config(tmp_path, "allspark"), {"model.bottleneck": "allspark"}, "fixmatch")
    assert (recipe.method.name, recipe.model.bottleneck.warmup_epochs) == ("fixmatch", 13)


def as_before(content):
    """A recipe as 483fa05 wrote it into config.yaml and checkpoints."""
    warmup = content["model"]["bottleneck"].pop("warmup_epochs")
    content["method"] = {"pseudo_context": "batch", **content["method"], "name": "allspark", "warmup_epochs": warmup}
    return content


@pytest.mark.parametrize("method", ["allspark", "selftrain"])
def test_old_run_resumes_and_predicts(place, method):
    bottleneck = "none" if method == "selftrain" else "allspark"
    place.edit(model={"bottleneck": {"name": bottleneck, "warmup_epochs": 1}}, method={"name": method})
    train.main(place.train("epochs=1", "warmup_epochs=0"))
    content = load(place.run / "latest.pth")
    assert content["recipe"]["method"]["name"] == method
    as_before(content["recipe"])
    torch.save(content, place.run / "latest.pth")
    assert load_for_inference(place.run / "latest.pth", torch.device("cpu")).recipe.method.name == method
    shutil.copy(place.run / "latest.pth", place.run / "previous.pth")
    content["epoch"], content["step"] = 0, 2  # as if the last step was not done yet
    torch.save(content, place.run / "latest.pth")
    config = as_before(yaml.safe_load((place.run / "config.yaml").read_text()))
    (place.run / "config.yaml").write_text(yaml.safe_dump(config))
    train.main(["--config", str(place.run / "config.yaml"), "--save-path", str(place.run)])
    assert load(place.run / "latest.pth")["step"] == 3
    assert "resumed in epoch 1 (step 2)" in (place.run / "train.log").read_text()


def test_recorded_runs_load():
    """The configs of docs/runs, most of which are older than a key."""
    runs = [run for path in REPO.glob("docs/runs/*/*.jsonl.gz") for _, run in read_archive(path)]
    assert len(runs) > 200 and any(run.recipe.notes for run in runs)
    for run in runs:
        assert run.recipe.method.name != "allspark" or run.recipe.model.bottleneck.name == "allspark", run.folder
