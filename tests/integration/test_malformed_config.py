"""Wrong configs, overrides, lists and environments: exit code 2 and one line that names the place."""

import dataclasses
import random

import pytest
import yaml

import train
from allspark.config import Recipe
from allspark.config_keys import type_hints
from allspark.utils.errors import run_main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def refused(capfd, place):
    """(words of train.py) -> the message of its refusal, one line without a traceback, before a run began."""

    def check(*words, told=()):
        capfd.readouterr()
        assert run_main(train.main, place.train("device=cpu", *words)) == 2
        message = capfd.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1 and len(message) < 1500, message
        assert "Traceback" not in message and not place.run.exists()
        for word in (told,) if isinstance(told, str) else told:
            assert word in message, f"{word} is not in: {message}"
        return message

    return check


def key_paths(kind=Recipe, prefix=""):
    """(path, whether it is a section) of every key of a recipe, but the options of a method, which are its own."""
    for name, hint in type_hints(kind).items():
        sections = [part for part in (hint, *getattr(hint, "__args__", ())) if dataclasses.is_dataclass(part)]
        yield prefix + name, bool(sections)
        if sections and name != "method":
            yield from key_paths(sections[0], f"{prefix}{name}.")


@pytest.mark.parametrize(("path", "section"), list(key_paths()))
def test_wrong_type_of_every_key(path, section, refused):
    value = "[1, two, null]" if section else "{a: {b: 1}}"
    refused(f"{path}={value}", told=path.split(".")[-1])


NUMBERS = [
    "epochs",
    "seed",
    "batch_size",
    "data.crop_size",
    "optim.lr",
    "optim.momentum",
    "data.timeout",
    "log.interval",
]


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("value", [".nan", "-.inf", "1e999", "0x" + "f" * 6000, "-" + "9" * 30, "null"])
def test_wrong_number_of_every_key(path, value, refused):
    refused(f"{path}={value}", told=path)


@pytest.mark.parametrize(
    "value",
    [
        *("[1", "{a: 1", "'x", '"\\q"', "@x", "`x", "%YAML 3", "? [", "&", "*a", "&a [*a]", "!x 3", "--- a\n--- b"),
        *("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!float abc", "!!int abc"),
        *("!!bool abc", "!!timestamp x", "!!binary x", "2001-02-30", "2001-99-99", "9" * 5000, "{[1]: 2}", "\ud800"),
        *("[" * 1200, "{a: " * 1200 + "1" + "}" * 1200, '"\\ud800"', "x" * (2 << 20)),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_invalid_yaml_value(value, refused):
    refused(f"model.pretrained={value}", told="model.pretrained")


BILLION = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else '1'}]\n" for i in range(12))
MERGED = "b0: &b0 {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BILLION, "aliases expand to more"),
        (MERGED, "aliases expand to more"),
        ("a: &a {b: *a}", "aliases expand to more"),
        ("# " + "x" * (2 << 20), "characters are too many"),
        ("[" * 1200, "not valid YAML"),
        ("epochs: 3\nepochs:\n  - 1\n", "epochs"),
        ("? {a: b}\n: 1", "not valid YAML"),
        ("1: 2\nnull: 3", "unknown key"),
        ("data: {1: 2}\nmodel: {}\nmethod: x\nepochs: 1", "data.1: unknown key"),
        ("data: null", "data"),
        ("method: 3", "method"),
        ("data: {dataset: x, data_root: x, crop_size: 65}\nmodel: {}\nmethod: {name: [a]}\nepochs: 1", "method.name"),
        (
            "data: {dataset: x, data_root: x, crop_size: 65}\nmodel: {}\nmethod: {name: allspark, 1: 2}\nepochs: 1",
            "method.options=1",
        ),
        ("data: {}\nmodel: {bottleneck: [none]}\nmethod: x\nepochs: 1", "data.dataset is missing"),
        ("\t- x", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_recipe_file(text, told, place, refused):
    place.config.write_text(text, encoding="utf-8")
    assert str(place.config) in refused(told=told)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_recipes(seed, place, capfd):
    """Bytes changed, cut out, doubled: whatever comes of it is a recipe, or one line."""
    rng, good, refusals = random.Random(seed), place.config.read_bytes(), 0
    for _ in range(60):
        text = bytearray(good)
        for _ in range(rng.randint(1, 5)):
            at = rng.randrange(len(text))
            change = rng.choice([bytes([rng.randrange(256)]), b"", text[: rng.randint(1, 40)], b"[", b"&a *a", b": "])
            text[at : at + rng.randint(0, 8)] = change
        place.config.write_bytes(text)
        capfd.readouterr()
        code = run_main(train.main, place.train("--print-config"))
        message = capfd.readouterr().err
        assert code in (0, 2) and message.count("\n") == code // 2, message
        refusals += code == 2
    assert refusals > 20


CUSTOM = [
    ("classes=[]", "0 classes"),
    (f"classes=[{', '.join(f'c{i}' for i in range(256))}]", "256 classes"),
    ("background=7", "not a class index"),
    ("palette=[[0, 0, 0]]", "1 colors for 3"),
    ("palette=[[0, 0, 0], [1, 1, 1], [0, 0, 256]]", "is not a color"),
    ("ignore_index=65536", "0..65535"),
    ("ignore_index=1", "also the index of class"),
    ("value_map={70000: 0}", "stored value 70000"),
    ("value_map={0: 9}", "neither a class index"),
    ("labeled_images=../../nowhere", "no such folder"),
    ("labeled_masks=nowhere", "does not exist"),
    ("val_images=masks", "listed as an image and as a mask"),
    ("unlabeled_images=lists", "contains no images"),
    ('labeled_images="a\\0b"', "plain text"),
    ('classes=["a", "\\e[2J", "c"]', "plain text"),
    ("labeled_images=null", "no labeled images"),
    ("labeled_masks=null", "has no mask"),
]


@pytest.mark.parametrize(("word", "told"), CUSTOM, ids=[word[:30] for word, _ in CUSTOM])
def test_custom_dataset(word, told, refused):
    refused(f"data.custom.{word}", told=told)


LISTS = {
    "latin": ("image\xe9.png m.png".encode("latin-1"), "not UTF-8 text"),
    "utf16": ("images/a.png masks/a.png\n".encode("utf-16"), "not UTF-8 text"),
    "nul": (b"images/labeled/labeled0.png\0 masks/labeled/labeled0.png\n", "does not exist"),
    "long name": (b"x" * 400 + b" y\n", "does not exist"),
    "folder": (b"images masks\n", "cannot be read|not a regular file"),
    "one mask missing": (b"images/labeled/labeled0.png\n" * 3, "has no mask"),
    "outside": (b"/etc/passwd /etc/hosts\n", "not an image"),
    "swapped": (b"masks/labeled/labeled0.png images/labeled/labeled0.png\n" * 4, "different colors"),
    "commas": (b"images/labeled/labeled0.png,masks/labeled/labeled0.png\n", "has no mask|does not exist"),
    "json": (b'["a", "b", "c"]', "3 columns"),
    "blank": (b" \n\t\n", "no labeled images"),
    "device": (b"/dev/zero /dev/null\n", "not a regular file"),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(name, place, refused):
    content, told = LISTS[name]
    path = place.root / "bad.txt"
    path.write_bytes(content)
    message = refused("--labeled-id-path", str(path))
    assert any(word in message for word in told.split("|")), message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--labeled-id-path", "/dev/zero"], "does not exist"),
        (["--labeled-id-path", "/"], "is a folder"),
        (["--labeled-id-path", "a\0b"], "plain text"),
        (["--split", "../../etc"], "does not exist"),
        (["--split", "x" * 300], "data.split"),
        (["data_root=/dev/null"], "is not a folder"),
        (["data_root=~nobody_of_this_name/x"], "data.data_root"),
        (["data.cache=/dev/null/x"], "data.cache"),
        (["data.cache=/proc/nowhere"], "data.cache"),
        (["evaluation.mode=center_crop", "evaluation.window=31"], "evaluation.window"),
        (["model.pretrained=/dev/zero"], "no such weight file"),
        (["model.init_from=/"], "is a folder"),
        (["model.pretrained="], "model.pretrained"),
    ],
    ids=lambda value: value[-1][:30] if isinstance(value, list) else None,
)
def test_paths(words, told, refused, place, capfd):
    if "cache" in words[0]:  # made when the first batch is asked for
        assert run_main(train.main, place.train("device=cpu", *words)) == 2
        assert told in capfd.readouterr().err
    else:
        refused(*words, told=told)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK='2'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"WORLD_SIZE": "9" * 50, "RANK": "0"}, "WORLD_SIZE="),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=''"),
        ({"SLURM_STEP_NUM_TASKS": "2(x2)", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS"),
        ({"SLURM_STEP_NUM_NODES": "many"}, "SLURM_STEP_NUM_NODES"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0'"),
        ({"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE='all'"),
        ({"ALLSPARK_MAX_MEGAPIXELS": "huge"}, "ALLSPARK_MAX_MEGAPIXELS='huge'"),
        ({"ALLSPARK_MAX_MEGAPIXELS": "-1"}, "ALLSPARK_MAX_MEGAPIXELS='-1'"),
        ({"ALLSPARK_DATA_TINY": "/no/where"}, "/no/where"),
        ({"ALLSPARK_DATA_TINY": "/dev/null"}, "/dev/null"),
    ],
    ids=lambda value: " ".join(f"{k}={v[:8]}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_environment(variables, told, refused, monkeypatch, place):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place.edit(data={"num_workers": None})
    refused(told=told)


def test_smallest_recipe(place):
    """What the cases above are refused for is what is wrong with them, not what they have in common."""
    content = yaml.safe_load(place.config.read_text(encoding="utf-8"))
    assert content["data"]["custom"] and run_main(train.main, place.train("--print-config", "device=cpu")) == 0
