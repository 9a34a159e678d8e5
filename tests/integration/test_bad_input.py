"""User errors end with exit code 2 and one line that names the place and the remedy."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import train
from allspark import __main__ as verbs
from allspark.config_io import load_config
from allspark.data.audit import spread
from allspark.data.splits import resolve
from allspark.utils.errors import run_main

ABSENT_DEVICE = "mps" if torch.cuda.is_available() else "cuda"

pytestmark = pytest.mark.usefixtures("one_thread", "processes")  # which work while the other tests run


@pytest.fixture
def refused(capsys, recwarn):
    """(main, argv, words) -> the message, after checking what holds for every one of them."""

    def check(main, argv, *words):
        capsys.readouterr()
        assert run_main(main, list(map(str, argv))) == 2
        message = capsys.readouterr().err
        assert_one_line(message)
        assert not [w for w in recwarn if w.category is UserWarning], "a warning is a second message on stderr"
        for word in map(str, words):
            assert word in message, f"'{word}' is not in: {message}"
        return message

    return check


def assert_one_line(message):
    assert message.startswith("error: ") and message.count("\n") == 1 and message.endswith("\n"), message
    assert "Traceback" not in message


# Configuration: the words go behind --config and --save-path; what the message must hold


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("epoch=3",), ("epoch: unknown key", "did you mean epochs")),
        (("optim.learning_rate=3",), ("optim.learning_rate: unknown key", "lr")),
        (("model.bottleneck.head=3",), ("model.bottleneck.head: unknown key", "num_heads")),
        (("epochs=many",), ("epochs='many'", "must be int")),
        (("epochs=2.5",), ("epochs=2.5", "must be int")),
        (("data.custom.classes=road",), ("data.custom.classes='road'", "must be [str, ...]")),
        (("data.custom.classes=[no, yes]",), ("data.custom.classes=False", "must be str", "in quotes")),
        (("data.custom.value_map=255",), ("data.custom.value_map=255", "must be {int: int}")),
        (("batch_size=true",), ("batch_size=True", "must be int")),
        (("optim.lr=fast",), ("optim.lr='fast'", "must be float")),
        (("data=5",), ("data=5", "section")),
        (("data.scale_range=[1]",), ("data.scale_range=[1]",)),
        (
            ("data.custom.value_map={a: 0}",),
            ("data.custom.value_map='a'", "must be int (stored mask value -> class index"),
        ),
        (("optim.name=adam",), ("optim.name='adam'", "sgd or adamw")),
        (("model.bottleneck=spark",), ("model.bottleneck.name='spark'", "none or allspark")),
        (("device=tpu",), ("device='tpu'", "cpu")),
        ((f"device={ABSENT_DEVICE}",), (f"device={ABSENT_DEVICE}", "not available", "cpu")),
        (("crop_size=10",), ("data.crop_size=10", "at least 64")),
        (("epochs=0",), ("epochs=0", "at least 1")),
        (("batch_size=0",), ("batch_size=0", "at least 1")),
        (("batch_size=7",), ("one batch of 7", "6 unlabeled images", "smaller batch_size")),
        (("optim.lr=-1",), ("optim.lr=-1.0", "above 0")),
        (("optim.lr=.nan",), ("optim.lr=nan",)),
        (("optim.lr=[1",), ("optim.lr=[1", "YAML")),
        (("epochs",), ("'epochs'", "key.path=value")),
        (("method.name=nonsense",), ("method.name=nonsense", "one of", "fixmatch")),
        (("method.warmup=3",), ("method.warmup: unknown option", "pseudo_context")),
        (("warmup_epochs=soon",), ("model.bottleneck.warmup_epochs='soon'", "must be int")),
        (("method.labeled_view=blurred",), ("'blurred'", "strong")),
        (("model.encoder=mit_b9",), ("model.encoder=mit_b9", "mit_b5")),
        (("data.dataset=pascal",), ("pascal", "data.custom")),
        (("data.custom=null",), ("data.dataset", "'tiny'", "pascal")),
        (("data.custom.classes=[ground, left]",), ("masks/labeled/labeled0.png", "illegal mask values 2 (")),
        (("data.custom.classes=[a, a, b]",), ("data.custom.classes", "repeated a")),
        (("data_root=/no/where",), ("data.data_root: /no/where", "ALLSPARK_DATA_TINY")),
        (("data.custom.labeled_images=imgs",), ("data/imgs", "no such folder", "data.custom")),
        (("--split", "1_3"), ("tiny/1_3/labeled.txt", "python -m allspark splits make")),
        (("--labeled-id-path", "/no/list.txt"), ("/no/list.txt", "data.labeled_id_path")),
        (("model.pretrained=/no/mit_b0.pth",), ("/no/mit_b0.pth", "no such weight file")),
        (("model.init_from=/no/best.pth",), ("/no/best.pth", "no such weight file")),
    ],
    ids=lambda value: value[-1] if isinstance(value[0], str) and len(value) == 1 else None,
)
def test_recipe(words, told, place, refused):
    refused(train.main, place.train(*words), *told)
    assert not (place.run / "latest.pth").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--dataset", "pascl", "--method", "allspark"), ("--dataset pascl", "does not exist", "pascal")),
        (("--dataset", "pascal", "--method", "alspark"), ("--method alspark", "does not exist", "allspark")),
        (("--dataset", "pascal"), ("--dataset and --method", "--config")),
        ((), ("--dataset and --method", "--config")),
        (("--config", "/no/recipe.yaml"), ("/no/recipe.yaml", "cannot be read")),
    ],
)
def test_recipe_selection(words, told, refused):
    refused(train.main, words, *told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {dataset: tiny\n", "not valid YAML"),
        ("epochs: [1, 2\nbatch_size: 3\n", "not valid YAML"),
        ("- epochs\n- 3\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("epochs: 3\n", "data is missing"),
    ],
    ids=["open-brace", "open-bracket", "list", "empty", "incomplete"],
)
def test_recipe_file(text, told, place, refused):
    place.config.write_text(text, encoding="utf-8")
    refused(train.main, place.train(), place.config, told)


def test_recipe_file_bytes(place, refused):
    place.config.write_bytes(b"\xff\xfe\x00epochs")
    refused(train.main, place.train(), place.config, "not valid YAML")


def test_save_path_is_file(place, refused):
    place.run.write_text("mine")
    refused(train.main, place.train(), place.run)
    assert place.run.read_text() == "mine"


# Data: each case damages the place and says what the message must hold; the last words are its remedy


@dataclass(frozen=True)
class Damage:
    name: str
    do: Callable[[Path], None]  # to the data root
    told: tuple[str, ...]
    lists: bool = False  # name the files by lists instead of folders


def save(path, array, **options):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def add_line(line):
    def do(root):
        with open(root / "lists" / "labeled.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    return do


def no_class_in(kind):
    def do(root):
        for path in (root / "masks" / kind).glob("*.png"):
            save(path, np.full((64, 80), 255))

    return do


def set_pixel(path, value):
    mask = np.array(Image.open(path))
    mask[0, 0] = value
    save(path, mask)


MASK, IMAGE = "masks/labeled/labeled1.png", "images/labeled/labeled1.png"
DAMAGES = [
    Damage("mask value", lambda root: set_pixel(root / MASK, 77), (MASK, "77 (1 pixel)", "0..2", "data.custom")),
    Damage(
        "val mask value",
        lambda root: set_pixel(root / "masks/val/val1.png", 3),
        ("masks/val/val1.png", "3 (1 pixel)", "Correct the mask"),
    ),
    Damage("RGB labels", lambda root: save(root / MASK, np.zeros((64, 80, 3))), (MASK, "found RGB", "8-bit")),
    Damage(
        "16-bit labels", lambda root: Image.new("I;16", (80, 64), 300).save(root / MASK), (MASK, "300", "value_map")
    ),
    Damage("no class in any mask", no_class_in("labeled"), ("no pixel of the labeled masks", "255")),
    Damage("no class in any mask of val", no_class_in("val"), ("no pixel of the val masks", "255")),
    Damage("truncated image", lambda root: half(root / IMAGE), (IMAGE, "truncated", "copy it again")),
    Damage(
        "truncated val image",
        lambda root: half(root / "images/val/val0.png"),
        ("images/val/val0.png", "truncated", "copy it again"),
    ),
    Damage(
        "truncated unlabeled image",
        lambda root: half(root / "images/unlabeled/unlabeled5.png"),
        ("images/unlabeled/unlabeled5.png", "truncated", "copy it again"),
    ),
    Damage("truncated mask", lambda root: half(root / MASK), (MASK, "truncated", "copy it again")),
    Damage("empty image", lambda root: (root / IMAGE).write_bytes(b""), (IMAGE, "not an image")),
    Damage("text for an image", lambda root: (root / IMAGE).write_text("hello"), (IMAGE, "not an image")),
    Damage(
        "mask of another size",
        lambda root: save(root / MASK, np.zeros((64, 79))),
        (IMAGE, MASK, "80 x 64", "79 x 64", "nearest"),
    ),
    Damage("folder without the mask", lambda root: (root / MASK).unlink(), (MASK, "does not exist", "data_root")),
    Damage("missing mask", lambda root: (root / MASK).unlink(), ("labeled.txt line 2", MASK, "correct the list"), True),
    Damage("missing image", lambda root: (root / IMAGE).unlink(), ("labeled.txt line 2", IMAGE, "correct"), True),
    Damage("line without a mask", add_line(IMAGE), ("labeled.txt line 5", "has no mask"), True),
    Damage("line of three words", add_line("a b c"), ("labeled.txt line 5", "3 columns", "tab"), True),
    Damage(
        "empty list", lambda root: (root / "lists/labeled.txt").write_text("\n"), ("labeled", "no labeled images"), True
    ),
    Damage("empty val list", lambda root: (root / "lists/val.txt").write_text(""), ("val list is empty",), True),
    Damage("binary list", lambda root: shutil.copy(root / IMAGE, root / "lists/labeled.txt"), ("labeled.txt",), True),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_data_damage(damage, place, refused):
    damage.do(place.root)
    words = place.lists("--method", "selftrain", "--save-path", place.run) if damage.lists else place.train()
    refused(train.main, words, *damage.told)
    assert not place.run.exists()


FOUND_BY_CHECK = ("mask value", "no class in any mask of val", "empty val list", "binary list")


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d.name in FOUND_BY_CHECK], ids=lambda damage: damage.name)
def test_check_finds_damage(damage, place, refused):
    damage.do(place.root)
    words = place.lists("--method", "selftrain") if damage.lists else ["--config", place.config]
    refused(verbs.main, ["check", "--data-only", *words], *damage.told)


def test_damage_not_opened_at_startup(place, refused):
    """Of many unlabeled images the start opens twenty; the others are found in a worker of the loader."""
    for index in range(6, 24):
        folder = place.root / "images" / "unlabeled"
        shutil.copy(folder / "unlabeled0.png", folder / f"unlabeled{index}.png")
    lists = resolve(load_config(place.config).data)
    opened = spread(lists.unlabeled, 20)
    unopened = [sample.image for sample in lists.unlabeled if sample not in opened]
    for image in unopened:
        half(image)
    refused(train.main, place.train("num_workers=1"), "images/unlabeled/unlabeled", "truncated", "copy it again")
    assert (place.run / "train.log").exists() and unopened, "it was found before the run, not in it"


def test_bad_samples_are_skipped_and_counted(place, refused):
    """By choice: a truncated and an illegal labeled sample, a text for an unlabeled image, and a run to its end."""
    half(place.root / IMAGE)
    set_pixel(place.root / "masks/labeled/labeled2.png", 77)
    (place.root / "images/unlabeled/unlabeled5.png").write_text("hello")
    refused(train.main, place.train(), IMAGE, "and 2 more")
    assert run_main(train.main, place.train("data.on_bad_sample=skip")) == 0
    log = (place.run / "train.log").read_text(encoding="utf-8")
    for name in ("labeled1.png: truncated", "labeled2.png: illegal mask values 77", "unlabeled5.png: truncated"):
        assert len(re.findall(f"WARNING: .*{name}", log)) == 2, "once before the run, once in it"
    assert "2 of 4 labeled samples cannot be used" in log
    counts = [int(count) for count in re.findall(r"(\d+) samples replaced so far, because 3 files", log)]
    assert len(counts) == 2 and 0 < counts[0] < counts[1]


def test_val_samples_are_not_skipped(place, refused):
    """The mean IoU over other images is another number."""
    half(place.root / "images/val/val0.png")
    refused(train.main, place.train("data.on_bad_sample=skip"), "images/val/val0.png", "truncated")


def test_skipping_with_nothing_readable(place, refused):
    for path in (place.root / "images" / "unlabeled").iterdir():
        path.write_text("hello")
    told = ("images/unlabeled/unlabeled", "and 5 more files")
    refused(train.main, place.train("data.on_bad_sample=skip"), *told)


# Checkpoints and weight files


class Code:
    """What a hostile pickle does: calls a function when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def with_code(path, kind, folder):
    if kind == "torch":
        torch.save({"format": "allspark-1", "model": {"x": Code(folder)}}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Code(folder)}))


@pytest.fixture
def readers(place):
    """Everything that reads a checkpoint or weight file: (its main, its arguments, the word of its remedy)."""

    def arguments(who, file):
        if who == "resume":
            place.run.mkdir()
            shutil.copy(file, place.run / "latest.pth")
            return train.main, place.train(), place.run / "latest.pth"
        if who == "eval":
            return eval_script.main, ["--checkpoint", file, "--device", "cpu"], file
        if who == "predict":
            image, out = place.root / "images" / "val" / "val0.png", place.root.parent / "out"
            return verbs.main, ["predict", "--checkpoint", file, "--device", "cpu", "--out", out, image], file
        return train.main, place.train(f"model.{who}={file}"), file

    return arguments


WHO = ["resume", "eval", "predict", "init_from", "pretrained"]
REMEDIES = {"eval": "another one", "predict": "another one", "resume": "--fresh"}


@pytest.mark.parametrize("who", WHO)
def test_truncated_checkpoint(who, finished, readers, refused, tmp_path):
    file = tmp_path / "half.pth"
    shutil.copy(finished.run / "latest.pth", file)
    half(file)
    main, words, named = readers(who, file)
    refused(main, words, named, "not a readable", REMEDIES.get(who, "copy it again"))


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("who", WHO)
def test_foreign_pickle_code_does_not_run(who, kind, readers, refused, tmp_path):
    file, folder = tmp_path / "foreign.pth", tmp_path / "made_by_the_pickle"
    with_code(file, kind, folder)
    main, words, named = readers(who, file)
    refused(main, words, named, "not a readable")
    assert not folder.exists()
    if kind == "torch":  # it would have run in the hands of another reader
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert folder.exists()


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("content", [{"anything": 1}, [1, 2], {"format": "allspark-1"}], ids=["dict", "list", "empty"])
def test_foreign_file(content, who, readers, refused, tmp_path):
    file = tmp_path / "other.pth"
    torch.save(content, file)
    main, words, named = readers(who, file)
    refused(main, words, named)


def test_missing_checkpoint(refused):
    refused(eval_script.main, ["--checkpoint", "/no/best.pth"], "/no/best.pth", "no such checkpoint", "best.pth")


def test_checkpoint_class_count(finished, refused, tmp_path):
    content = torch.load(finished.run / "best.pth", weights_only=True)
    content["recipe"]["data"]["custom"]["classes"].append("fourth")
    torch.save(content, tmp_path / "four.pth")
    told = ("four.pth", "(3, ", "(4, ", "other classes")
    refused(eval_script.main, ["--checkpoint", tmp_path / "four.pth", "--device", "cpu"], *told)


def test_run_class_count(finished, refused):
    argv = finished.train("data.custom.classes=[ground, left, right, fourth]")
    refused(train.main, argv, finished.run, "data.custom.classes", "fourth", "--fresh")


def test_checkpoint_dataset(finished, refused):
    argv = ["--checkpoint", finished.run / "best.pth", "--dataset", "pascal", "--device", "cpu"]
    refused(eval_script.main, argv, "--dataset pascal", "tiny")


def test_weights_of_other_encoder(finished, place, refused):
    for key in ("pretrained", "init_from"):
        argv = place.train("model.encoder=mit_b1", f"model.{key}={finished.run / 'best.pth'}")
        refused(train.main, argv, finished.run / "best.pth", "does not fit", "stages.0", "model.encoder")


def test_eval_without_data(finished, refused, tmp_path):
    argv = ["--checkpoint", finished.run / "best.pth", "--device", "cpu", "--data-root"]
    refused(eval_script.main, [*argv, "/no/where"], "/no/where", "ALLSPARK_DATA_TINY")
    refused(eval_script.main, [*argv, tmp_path], tmp_path / "images" / "val", "data_root")


def test_save_path_of_other_recipe(finished, refused):
    refused(train.main, finished.train("seed=1"), finished.run, "seed: 0 -> 1", "--save-path", "--fresh")


# Real processes: the exit code that a shell sees


@pytest.fixture(scope="module")
def processes(tiny_root, finished, start_process, fork_process, tmp_path_factory):
    """One of each kind, started with the module's first test: name -> (process, what its message holds)."""
    root = tmp_path_factory.mktemp("damaged") / "data"
    roots = {}
    for name, damage in (("image", DAMAGES[5]), ("mask", DAMAGES[0])):
        shutil.copytree(tiny_root, root / name)
        damage.do(root / name)
        roots[name] = (f"data_root={root / name}", damage.told)
    run = ["train.py", "--config", finished.config, "--save-path", root / "run"]
    half_written = root / "half.pth"
    half_written.write_bytes((finished.run / "best.pth").read_bytes()[:100_000])
    (root / "half.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    prepare = ["-m", "allspark", "prepare", "camvid", "--from", root / "half.zip", "--out", root / "out"]
    check = ["-m", "allspark", "check", "--data-only", "--config", finished.config]
    commands = {
        "config": ([*run, "optim.learning_rate=3"], ("optim.learning_rate: unknown key",)),
        "split": ([*check, "--split", "1_3"], ("tiny/1_3/labeled.txt", "splits make")),
        "image": ([*run, roots["image"][0]], roots["image"][1]),
        "mask": ([*check, roots["mask"][0]], roots["mask"][1]),
        "weights": ([*run, f"model.pretrained={half_written}"], ("half.pth", "not a readable weight file")),
        "archive": (prepare, ("half.zip", "truncated, damaged or not readable")),
    }
    started = {name: (fork_process(words), told) for name, (words, told) in commands.items()}
    started["environment"] = fork_process(run, WORLD_SIZE="two", RANK=0), ("WORLD_SIZE='two'",)
    evaluation = ["eval.py", "--checkpoint", half_written]  # by a Python that has imported nothing: by no other test
    return started | {"checkpoint": (start_process(evaluation), ("half.pth", "not a readable checkpoint"))}


@pytest.mark.parametrize(
    "kind", ["config", "split", "image", "mask", "checkpoint", "weights", "archive", "environment"]
)
def test_real_process(kind, processes):
    process, told = processes[kind]
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert_one_line(err)
    assert "Traceback" not in out
    for words in told:
        assert words in err
