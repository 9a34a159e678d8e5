"""Recipes: composition, overrides, and errors that name the key."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from allspark import config_io, config_keys
from allspark.arguments import parse
from allspark.build import complete
from allspark.config_io import (
    build_recipe,
    differences,
    full_key,
    load_config,
    load_recipe,
    merge,
    parse_overrides,
    to_plain,
)
from allspark.recipe_arguments import recipe_of
from allspark.utils.errors import UserError

MINIMAL = {
    "data": {"dataset": "x", "data_root": "x", "crop_size": 65},
    "model": {},
    "method": "supervised",
    "epochs": 1,
}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "5"], "write epochs=5"),
        (["epochs=1", "--epochs=5"], "write epochs=5"),
        (["--lr", "0.1", "seed=1"], "write optim.lr=0.1"),
        (["--batch-size", "seed=1"], "write batch_size=VALUE"),
        (["--num_workers"], "write data.num_workers=VALUE"),
        (["--lr-mult", "5"], "did you mean optim.lr_multi=5"),
        (["--resume"], "resumes by itself"),
        (["--resume-from", "a.pth"], "resumes by itself"),
        (["--nonsense-of-mine"], "key.path=value"),
        (["--save-path", "a\0b"], "contains a null character"),
    ],
)
def test_unknown_option_is_explained(words, told, capsys):
    with pytest.raises(SystemExit) as done:
        parse("train", words)
    assert done.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]


def test_home_folder():
    """Shells do not expand --save-path=~/x."""
    assert (
        parse("train", ["--dataset", "shapes", "--method", "fixmatch", "--save-path=~/x"]).save_path
        == Path.home() / "x"
    )


def test_precedence():
    """defaults < data set < method < the method's section for the data set < command line."""
    semi = load_recipe("cityscapes", "selftrain")
    assert (semi.optim.lr, semi.optim.lr_multi, semi.batch_size) == (0.001, 1.0, 8)  # method's section, data set
    assert load_recipe("cityscapes", "allspark").optim.lr == 0.005
    assert load_recipe("cityscapes", "selftrain", {"lr": 0.5}).optim.lr == 0.5
    assert load_recipe("pascal", "supervised").batch_size == 16
    assert semi.optim.power == 0.9  # default


def test_released_and_revised_differences():
    """As the AllSpark rows of docs/differences.md say; what a method does not set is its constructor's default."""

    def both(dataset):
        plain = (to_plain(complete(load_recipe(dataset, method))) for method in ("allspark", "allspark_revised"))
        return {f"{key}: {old} -> {new}" for key, old, new in differences(*plain)}

    expected = {
        "model.bottleneck.grouping_input: logits -> probabilities",
        "model.bottleneck.empty_slots: True -> False",
        "model.bottleneck.memory_policy: rank0 -> gather",
        "method.pseudo_context: batch -> image",
        "method.ignore_padding: False -> True",
        "method.labeled_view: strong -> weak",
        "method.unlabeled_view: weak -> strong",
        "method.cutmix: 0.0 -> 0.5",
        "method.threshold: None -> 0.95",
        "method.teacher: none -> ema",
    }
    short = {"method.teacher_momentum: 0.996 -> 0.99", "method.class_thresholds: False -> True"}  # runs, from scratch
    assert both("camvid") == expected | short
    assert both("pascal") == expected | {"optim.lr_one_step_late: True -> False"}


def test_missing_base(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "methods").mkdir()
    (tmp_path / "datasets" / "x.yaml").write_text("epochs: 1")
    (tmp_path / "methods" / "mine.yaml").write_text("base: mien")
    monkeypatch.setattr("allspark.config_io.CONFIG_ROOT", tmp_path)
    with pytest.raises(UserError, match=r"--method mien: .*mien\.yaml does not exist; choose one of mine"):
        load_recipe("x", "mine")
    (tmp_path / "methods" / "mine.yaml").write_text("base: mine")
    with pytest.raises(UserError, match=r"base='mine' leads back to the same file \(mine -> mine\)"):
        load_recipe("x", "mine")
    (tmp_path / "methods" / "mine.yaml").write_text("base: other")
    (tmp_path / "methods" / "other.yaml").write_text("base: mine")
    with pytest.raises(UserError, match=r"other\.yaml: base='mine' leads back .*\(mine -> other -> mine\)"):
        load_recipe("x", "mine")


def test_a_required_option_is_missing():
    class Required:
        def __init__(self, *, threshold: float, cutmix: float = 0.5) -> None: ...

    assert config_keys.bind_options(Required, {"threshold": 1}, "method") == {"threshold": 1.0, "cutmix": 0.5}
    with pytest.raises(UserError, match=r"method\.threshold is missing"):
        config_keys.bind_options(Required, {}, "method")


def test_short_keys():
    assert full_key("lr") == "optim.lr"
    assert full_key("data_root") == "data.data_root"
    assert full_key("epochs") == "epochs"
    assert full_key("method.anything") == "method.anything"
    with pytest.raises(UserError, match=r"model\.dropout, model\.bottleneck\.dropout"):
        full_key("dropout")


def test_name_keeps_options():
    assert merge({"criterion": {"name": "ohem", "thresh": 0.5}}, {"criterion": "ce"}) == {
        "criterion": {"name": "ce", "thresh": 0.5}
    }
    assert merge({"method": "allspark"}, {"method": {"cutmix": 1}}) == {"method": {"name": "allspark", "cutmix": 1}}
    recipe = build_recipe(MINIMAL, parse_overrides(["model.bottleneck=allspark", "num_heads=1"]), "test")
    assert (recipe.model.bottleneck.name, recipe.model.bottleneck.num_heads) == ("allspark", 1)


def test_mapping_is_replaced_whole(tmp_path):
    """What is left out of one has no class: a value that was in the recipe's is not in it any more."""
    recipe = {
        "data": {"dataset": "mine", "data_root": "", "crop_size": 65},
        "epochs": 1,
        "model": {},
        "method": "fixmatch",
    }
    recipe["data"]["custom"] = {"classes": ["a", "b"], "value_map": {0: 0, 1: 1, 2: 1}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    custom = load_config(tmp_path / "mine.yaml", {"data.custom.value_map": {0: 0, 7: 1}}).data.custom
    assert custom.value_map == {0: 0, 7: 1} and custom.classes == ("a", "b")


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5}])
def test_own_recipe_names_a_recipe(tmp_path, options):
    """As --method of that name, but for what the file says itself."""
    recipe = {
        "data": {"dataset": "mine", "data_root": "", "crop_size": 65},
        "epochs": 7,
        "model": {"encoder": "mit_b1"},
    }
    path, plain = tmp_path / "mine.yaml", tmp_path / "plain.yaml"
    for name in ("allspark_revised", "fixmatch_r50", "allspark", "fixmatch"):
        path.write_text(yaml.safe_dump({**recipe, "method": {"name": name, **options} if options else name}))
        plain.write_text(yaml.safe_dump({**recipe, "method": "supervised"}))
        other = {f"method.{key}": value for key, value in options.items()} | {"model.encoder": "mit_b1"}
        assert complete(load_config(path)) == complete(load_config(plain, other, name))
    path.write_text(yaml.safe_dump({**recipe, "method": "fixmatch", "optim": {"lr": 0.5}}))
    assert load_config(path).optim == replace(build_recipe(MINIMAL, {}, "test").optim, lr=0.5)
    recipe["data"]["dataset"] = "cityscapes"  # a section of its own in fixmatch.yaml
    path.write_text(yaml.safe_dump({**recipe, "method": "fixmatch"}))
    assert load_config(path).method.options["threshold"] == 0.0


def test_complete_recipe_is_taken_as_it_is(tmp_path):
    """That of a run, although today's recipe of its method may say something else."""
    content = to_plain(load_recipe("cityscapes", "fixmatch"))
    del content["method"]["threshold"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert "threshold" not in load_config(tmp_path / "config.yaml").method.options


def test_split_takes_precedence_over_lists_of_a_file(tmp_path):
    lists = {"data.labeled_id_path": "a.txt", "data.unlabeled_id_path": "b.txt"}
    content = to_plain(load_recipe("shapes", "fixmatch", lists))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    words = ["--config", str(tmp_path / "mine.yaml"), "--split", "1_30"]
    for more, lists in (([], (None, None)), (["--labeled-id-path", "c.txt"], ("c.txt", None))):
        data = recipe_of(parse("train", [*words, *more])).data
        assert (data.split, data.labeled_id_path, data.unlabeled_id_path) == ("1_30", *lists)


def test_own_recipe_with_other_method(tmp_path):
    """Its data, encoder and schedule; method, bottleneck and what else belongs to the method are those of configs/."""
    recipe = {"data": {"dataset": "mine", "data_root": "", "crop_size": 65}, "epochs": 7}
    recipe["model"] = {"encoder": "mit_b1", "bottleneck": {"name": "allspark", "num_heads": 4}}
    recipe["method"] = {"name": "fixmatch", "threshold": 0.5}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("unimatch", "allspark_revised", "supervised"):
        mine = load_config(tmp_path / "mine.yaml", {"seed": 3}, name)
        there = load_recipe("ade20k", name)  # a data set of which these say next to nothing
        assert (mine.data.dataset, mine.epochs, mine.model.encoder, mine.seed) == ("mine", 7, "mit_b1", 3)
        assert (
            replace(mine.model.bottleneck, warmup_epochs=4) == there.model.bottleneck
            and mine.optim.lr_one_step_late == there.optim.lr_one_step_late
        )
        assert (mine.method.name, mine.method.options) == (there.method.name, there.method.options)
    with pytest.raises(UserError, match="nothing"):
        load_config(tmp_path / "mine.yaml", None, "nothing")


def test_old_keys_are_translated(tmp_path, monkeypatch):
    """In a file, in the recipe of a checkpoint, as override and in a section of a method's file."""
    old = {**MINIMAL, "log_interval": 3, "optim": {"late": True, "lr": 0.5}}
    expected = ("log_interval is now log.interval", "optim.late is now optim.lr_one_step_late")
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    for recipe in (build_recipe(old, None, "checkpoint"), load_config(tmp_path / "old.yaml")):
        assert (recipe.log.interval, recipe.optim.lr_one_step_late, recipe.optim.lr) == (3, True, 0.5)
        assert recipe.notes == expected
        assert "notes" not in to_plain(recipe) and recipe == build_recipe(to_plain(recipe), None, "new")
    recipe = build_recipe(MINIMAL, parse_overrides(["log_interval=7", "late=true"]), "test")
    assert (recipe.log.interval, recipe.optim.lr_one_step_late, recipe.notes) == (7, True, expected)
    recipe = load_config(tmp_path / "old.yaml", {"log.interval": 9})  # an override of the new key replaces it
    assert (recipe.log.interval, recipe.notes) == (9, expected)
    with pytest.raises(UserError, match=r"test: has both log_interval and log\.interval, its new name; remove log_int"):
        build_recipe({**old, "log": {"interval": 2}}, None, "test")


def test_translation_may_be_a_function(monkeypatch):
    def halve(content, value):
        return merge(content, {"epochs": value // 2}), "half_epochs is now epochs, and half of it"

    monkeypatch.setitem(config_io.RENAMED, "half_epochs", halve)
    recipe = build_recipe({**MINIMAL, "half_epochs": 8}, None, "test")
    assert (recipe.epochs, recipe.notes) == (4, ("half_epochs is now epochs, and half of it",))


def test_every_key_is_documented():
    for path, key in config_keys.config_fields().items():
        help_text = key.metadata["help"]
        assert help_text and not help_text.endswith(".") and len(help_text) < 160, path


def test_keys_are_described(capsys):
    for words, code in (["--keys"], 0), (["--keys", "optim.lr"], 0), (["--keys", "lrr"], 2):
        with pytest.raises(SystemExit) as end:
            parse("train", words)
        assert end.value.code == code
    every, error = capsys.readouterr()
    every, _, some = every.rpartition("Keys are set")
    assert all(f"\n{path}" in every for path in config_keys.config_fields())
    assert "evaluation.interval * = 1    (int >= 1)\n" in every and "optim.lr = 0.001    (float > 0)\n" in some
    assert "momentum" not in some and "--keys lrr: no key contains it; did you mean optim.lr?" in error


def test_yaml_floats_without_dot():
    assert build_recipe(MINIMAL, parse_overrides(["lr=6e-4"]), "test").optim.lr == 6e-4


def test_data_root_from_environment(monkeypatch):
    monkeypatch.setenv("ALLSPARK_DATA_X", "/somewhere")
    assert build_recipe(MINIMAL, None, "test").data.data_root == "/somewhere"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean optim.lr?"]),
        ("crop_sise=1", ["crop_sise", "did you mean data.crop_size?"]),
        ("epochs=1.5", ["epochs=1.5", "int"]),
        ("epochs=true", ["epochs=True", "int"]),
        ("epochs=0", ["epochs=0", "at least 1"]),
        ("lr=fast", ["optim.lr='fast'", "float"]),
        ("lr=-1", ["optim.lr=-1", "above 0"]),
        ("optim.name=adam", ["optim.name='adam'", "sgd or adamw"]),
        ("data.scale_range=[1]", ["data.scale_range=[1]", "[float, float]"]),
        ("data.scale_range=[2, 1]", ["data.scale_range", "the smaller factor"]),
        ("crop_size=32", ["data.crop_size=32", "at least 64"]),
        ("model.dropout=1", ["model.dropout=1", "at most 0.99"]),
        ("optim.momentum=.nan", ["optim.momentum=nan"]),
        ("seed=99999999999999999999", ["seed=99999999999999999999"]),
        ("optim=3", ["optim=3", "section"]),
        ("method={labeled_view: strong}", None),
    ],
)
def test_errors_name_key_and_remedy(override, words):
    if words is None:  # options may come without the name, which the recipe has already
        assert build_recipe(MINIMAL, parse_overrides([override]), "test").method.name == "supervised"
        return
    with pytest.raises(UserError) as error:
        build_recipe(MINIMAL, parse_overrides([override]), "test")
    for word in words:
        assert word in str(error.value)


def test_missing_key():
    with pytest.raises(UserError, match=r"mine: data\.crop_size is missing"):
        build_recipe({**MINIMAL, "data": {"dataset": "x", "data_root": "x"}}, None, "mine")


def test_yaml_runs_no_code(tmp_path):
    (tmp_path / "evil.yaml").write_text("epochs: !!python/object/apply:os.mkdir [/tmp/never]")
    with pytest.raises(UserError, match=r"evil\.yaml: not valid YAML"):
        load_config(tmp_path / "evil.yaml")


def test_huge_yaml_is_not_read(tmp_path):
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(UserError, match=r"huge\.yaml: larger than 4 MiB"):
        load_config(tmp_path / "huge.yaml")


def test_differences_ignore_irrelevant_keys():
    old = to_plain(build_recipe(MINIMAL, None, "test"))
    new = to_plain(build_recipe(MINIMAL, parse_overrides(["device=cpu", "num_workers=0", "lr=0.5"]), "test"))
    assert differences(old, new) == [("optim.lr", 0.001, 0.5)]
    value_maps = ({"data": {"custom": {"value_map": found}}} for found in ({0: 0, 255: 1}, {0: 0, 254: 1}))
    told = [("data.custom.value_map.254", None, 1), ("data.custom.value_map.255", 1, None)]
    assert differences(*value_maps) == told  # keys that are numbers
