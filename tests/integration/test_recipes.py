"""Every recipe of configs/: each method on each data set, with the hyperparameters of its paper."""

import re

import pytest
import yaml

import train
from allspark import recipe_arguments
from allspark.arguments import parse
from allspark.build import build_method, complete
from allspark.config_io import CONFIG_ROOT, load_config, load_recipe, to_plain
from allspark.data.datasets import spec_for
from allspark.methods import METHODS
from allspark.split_lists.manifest import load_manifest
from allspark.utils.errors import run_main

pytestmark = pytest.mark.usefixtures("printing")  # it works beside the tests

DATASETS = ("pascal", "cityscapes", "coco", "camvid", "shapes", "ade20k")
FILES = sorted(path.stem for path in (CONFIG_ROOT / "methods").glob("*.yaml"))

# What all methods of a data set share: published for three of them with AllSpark, for the others ours.
FOOTING = {
    "data.crop_size": (513, 801, 513, 257, 97, 513),
    "data.photometric_probability": (1.0, 1.0, 1.0, 0.0, 0.0, 1.0),
    "epochs": (80, 240, 10, 20, 24, 60),
    "batch_size": (8, 8, 16, 4, 8, 8),
    "burn_in_epochs": (0, 0, 0, 8, 12, 0),
    "epoch_of": ("unlabeled",) * 6,
    "model.encoder": ("mit_b5", "mit_b5", "mit_b5", "mit_b0", "mit_b0", "mit_b5"),
    "model.decoder": ("mlp",) * 6,
    "model.drop_path": (0.1,) * 6,
    "model.dropout": (0.1,) * 6,
    "model.bottleneck.dropout": (0.1,) * 6,
    "model.bottleneck.num_heads": (2,) * 6,
    "model.bottleneck.warmup_epochs": (5, 15, 1, 9, 13, 4),
    "criterion.name": ("ce", "ohem", "ce", "ce", "ce", "ce"),
    "criterion.thresh": (0.7,) * 6,
    "criterion.min_kept": (200_000,) * 6,
    "criterion.min_kept_images": (None, 2, None, None, None, None),
    "criterion.class_weights": (None,) * 6,
    "criterion.dice": (0.0,) * 6,
    "optim.name": ("sgd", "sgd", "sgd", "adamw", "adamw", "adamw"),
    "optim.lr": (0.001, 0.005, 0.001, 6e-4, 1e-3, 6e-5),
    "optim.lr_multi": (10.0, 1.0, 10.0, 1.0, 1.0, 10.0),
    "optim.momentum": (0.9,) * 6,
    "optim.weight_decay": (1e-4, 1e-4, 1e-4, 0.01, 0.01, 0.01),
    "optim.power": (0.9, 0.9, 0.9, 0.9, 0.9, 1.0),
    "optim.lr_one_step_late": (True, True, True, False, False, False),
}
EXCEPTIONS = {  # released: configs/*_baseline_sup.yaml and *_baseline_semi.yaml; ours: allspark_revised
    ("supervised", "pascal"): {"batch_size": 16, "epoch_of": "labeled"},
    ("supervised", "cityscapes"): {"batch_size": 16, "epoch_of": "labeled", "optim.lr": 0.001}
    | {"criterion.min_kept_images": 4},
    ("supervised", "coco"): {"batch_size": 32, "epoch_of": "labeled"},
    ("selftrain", "cityscapes"): {"optim.lr": 0.001},
    **{
        ("allspark_revised", dataset): {"optim.lr_one_step_late": False} for dataset in ("pascal", "cityscapes", "coco")
    },
}
MOMENTUM = (0.996, 0.996, 0.996, 0.99, 0.98, 0.996)
SELFTRAIN = {
    "ignore_padding": False,
    "labeled_view": "strong",
    "unlabeled_view": "weak",
    "cutmix": 0.0,
    "class_thresholds": False,
    "threshold": None,
    "teacher": "none",
    "teacher_momentum": 0.996,
}
ALLSPARK = {**SELFTRAIN, "pseudo_context": "batch"}
REVISED = {
    "pseudo_context": "image",
    "ignore_padding": True,
    "labeled_view": "weak",
    "unlabeled_view": "strong",
    "cutmix": 0.5,
    "threshold": 0.95,
    "class_thresholds": (False, False, False, True, True, False),
    "teacher": "ema",
    "teacher_momentum": MOMENTUM,
}
UNIMATCH = {
    "threshold": (0.95, 0.0, 0.95, 0.95, 0.95, 0.95),
    "cutmix": 0.5,
    "ignore_padding": True,
}
OPTIONS = {  # all of a method, one value for all data sets or one for each
    "supervised": {"labeled_view": ("strong", "strong", "strong", "strong", "strong", "weak")},
    "selftrain": SELFTRAIN,
    "fixmatch": {**UNIMATCH, "labeled_view": "weak", "unlabeled_view": "strong"},
    "unimatch": {**UNIMATCH, "feature_dropout": 0.5},
    "unimatch_v2": {**UNIMATCH, "threshold": 0.95, "feature_dropout": 0.5, "teacher_momentum": MOMENTUM},
    "imas": {
        "threshold": (0.95, 0.7, 0.95, 0.7, 0.95, 0.95),
        "unlabeled_weight": 3.0,
        "labeled_view": "weak",
        "unlabeled_view": "imas",
        "teacher_momentum": MOMENTUM,
        "ignore_padding": False,
    },
    "maskmatch": {
        "threshold": (0.95, 0.7, 0.95, 0.95, 0.95, 0.95),
        "masked": 0.7,
        "patch_size": (32, 64, 32, 32, 32, 32),
        "scales": ((0.5, 1.0, 1.5),) * 6,
        "cutmix": 0.5,
        "teacher_momentum": MOMENTUM,
        "ignore_padding": True,
    },
    "pseudoseg": {
        "gamma": 0.5,
        "temperature": 0.5,
        "unlabeled_weight": 1.0,
        "labeled_view": "weak",
        "unlabeled_view": "pseudoseg",
    },
    "allspark": ALLSPARK,
    "allspark_revised": {**ALLSPARK, **REVISED},
}


def flat(plain, prefix=""):
    for key, value in plain.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def of(table, dataset):
    """The row of a data set, of a table whose values are one for all or a tuple for each."""
    place = DATASETS.index(dataset)
    return {key: value[place] if isinstance(value, tuple) else value for key, value in table.items()}


@pytest.mark.parametrize("method", FILES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_recipes_round_trip(dataset, method, tmp_path, capsys):
    """What --print-config shows is a whole recipe, and the same one."""
    assert run_main(train.main, ["--dataset", dataset, "--method", method, "--split", "1_8", "--print-config"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "recipe.yaml"
    file.write_text(printed, encoding="utf-8")
    recipe = complete(load_config(file))
    assert recipe == complete(load_recipe(dataset, method, {"data.split": "1_8"}))
    assert (recipe.data.dataset, recipe.data.split) == (dataset, "1_8")
    assert build_method(recipe, spec_for(recipe.data)).views.unlabeled == (recipe.method.name != "supervised")
    assert run_main(train.main, ["--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.fixture(scope="module")
def printing(fork_process):
    """A real process that prints a recipe, started with the module's first test: (its words, the process)."""
    words = ["--dataset", "cityscapes", "--method", "imas", "--print-config", "optim.lr=6e-4"]
    return words, fork_process(["train.py", *words])


def test_print_config_process(printing, capsys):
    words, process = printing
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    train.main(words)
    assert out == capsys.readouterr().out
    printed = yaml.safe_load(out)
    assert (printed["method"]["threshold"], printed["optim"]["lr"]) == (0.7, 6e-4)


def test_every_dataset_and_method_has_a_recipe():
    assert sorted(DATASETS) == sorted(path.stem for path in (CONFIG_ROOT / "datasets").glob("*.yaml"))
    assert set(METHODS) <= set(FILES)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_hyper_parameters(dataset, method):
    """The methods differ in their own options, and in nothing else that could explain a difference in the table."""
    recipe = complete(load_recipe(dataset, method))
    found, expected = dict(flat(to_plain(recipe))), {**of(FOOTING, dataset), **EXCEPTIONS.get((method, dataset), {})}
    assert {key: found[key] for key in expected} == expected
    assert recipe.method.options == of(OPTIONS[method], dataset)
    assert recipe.model.bottleneck.name == ("allspark" if method.startswith("allspark") else "none")


DINOV2 = {  # UniMatch V2 (configs/*.yaml and main() of its scripts)
    "data.crop_size": (518, 798, 518, 252, 98, 518),
    "epochs": (60, 180, 20, 20, 24, 60),
    "batch_size": (16, 8, 16, 4, 8, 8),
    "model.decoder": "dpt",
    "model.fit": "resize",
    "model.drop_path": 0.0,
    "model.dropout": 0.0,
    "criterion.name": ("ce", "ohem", "ce", "ce", "ce", "ce"),
    "optim.name": "adamw",
    "optim.lr": 5e-6,
    "optim.lr_multi": 40.0,
    "optim.weight_decay": 0.01,
    "optim.power": 0.9,
    "optim.lr_one_step_late": True,
    "optim.freeze": "none",
    "method.threshold": 0.95,
}
# Epochs and steps of each of the supervised script, and the list that has as many unlabeled images
SUPERVISED = {
    "pascal": (60, 3000 // 32, "183"),
    "cityscapes": (180, 3000 // 16, "1_8"),
    "coco": (20, 30000 // 32, "1_128"),
    "ade20k": (60, 6000 // 16, "1_8"),
}


@pytest.mark.parametrize("method", [name for name in FILES if "_dinov2_" in name])
@pytest.mark.parametrize("dataset", DATASETS)
def test_unimatch_v2_as_published(dataset, method):
    recipe = complete(load_recipe(dataset, method))
    found, expected = dict(flat(to_plain(recipe))), of(DINOV2, dataset)
    if recipe.method.name == "supervised":  # twice the batch, and as many steps
        usual = [expected.pop(key) for key in ("batch_size", "epochs", "method.threshold")]
        if dataset in SUPERVISED:
            epochs, steps, split = SUPERVISED[dataset]
            _, _, facts = load_manifest().find(f"{dataset}/{split}/{recipe.epoch_of}")
            assert recipe.batch_size == 2 * usual[0]
            assert abs(recipe.epochs * (facts.count // recipe.batch_size) / (epochs * steps) - 1) < 0.03
        assert recipe.method.options["labeled_view"] == "weak"
    assert {key: found[key] for key in expected} == expected
    size = {"s": "small", "b": "base"}[method[-1]]
    assert recipe.model.encoder == f"dinov2_{size}" and recipe.model.pretrained.endswith(f"/dinov2_{size}.pth")


PUBLISHED = {(method, "cityscapes") for method in ("selftrain", "fixmatch", "unimatch", "imas")}


@pytest.mark.parametrize("method", [name for name in METHODS if name in OPTIONS and name != "supervised"])
def test_own_numbers_are_marked(method):
    """Those that are from no paper and no released code."""
    lines = (CONFIG_ROOT / "methods" / f"{method}.yaml").read_text(encoding="utf-8").splitlines()
    rows = {match[1]: line for line in lines if (match := re.match(r"  (\w+): \{(method|optim): ", line))}
    for dataset, line in rows.items():
        assert ("# default, ours" in line) != ((method, dataset) in PUBLISHED), line
    own = [line for line in lines if re.match(r"  (patch_size|scales|threshold|cutmix|teacher_momentum): ", line)]
    assert len(own) == (5 if method == "maskmatch" else 0)  # its abstract has a number for `masked` alone
    assert all("# default, ours" in line for line in own)


@pytest.mark.parametrize("dataset", DATASETS)
def test_warmup_source_is_named(dataset):
    text = (CONFIG_ROOT / "datasets" / f"{dataset}.yaml").read_text(encoding="utf-8")
    (comment,) = re.findall(r"warmup_epochs: \d+\} # (.*)", text)
    assert ("default, ours" in comment) != (dataset in ("pascal", "cityscapes")), comment


def test_changes_are_shown(tmp_path):
    """From configs/, and from a file whose keys another method replaces."""

    def shown(*words):
        args = parse("train", words)
        return recipe_arguments.changes(args, recipe_arguments.recipe_of(args))

    shapes = ("--dataset", "shapes", "--method", "fixmatch", "--split", "1_30")
    assert shown(*shapes) == ["the recipe is that of configs/"]
    assert [line.split() for line in shown(*shapes, "lr=1")[1:]] == [["optim.lr", "0.001", "1.0"]]
    assert [line.split() for line in shown(*shapes, "micro_batch=1")[1:]] == [["micro_batch", "None", "1"]]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(to_plain(load_recipe("shapes", "fixmatch"))), encoding="utf-8")
    assert shown("--config", str(file), "--split", "1_30") == [f"the recipe is that of {file}"]
    head, *rows = shown("--config", str(file), "--split", "1_30", "--method", "unimatch_v2_dinov2_s")
    assert head.split() == ["differs", "from", str(file), "there", "here"]
    assert {"model.encoder", "model.decoder", "optim.lr", "method.name"} <= {row.split()[0] for row in rows}
    # complete only with the arguments
    file.write_text("method: fixmatch\nmodel: {encoder: mit_b0}\nepochs: 2\n", encoding="utf-8")
    words = ("data.dataset=shapes", "data.data_root=data/shapes", "data.crop_size=97")
    assert shown("--config", str(file), "--split", "1_30", *words) == [f"{file} is complete only with these arguments"]
    scaled = {**to_plain(load_recipe("shapes", "fixmatch")), "method": "nowhere:Method"}
    scaled["optim"] = {**scaled["optim"], "lr_scaling": "linear", "lr_batch": 16}
    file.write_text(yaml.safe_dump(scaled), encoding="utf-8")  # its method cannot be imported, and is replaced
    words = ("--config", str(file), "--split", "1_30", "--method", "fixmatch")
    assert shown(*words) == [f"the recipe is that of {file}"]
