"""The installed package: contents of the wheel, use outside a checkout, and other systems than Linux."""

import ast
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

import eval as eval_script
import train
from allspark import __main__ as command
from allspark import memory_estimate as memory
from allspark.arguments import COMMANDS
from allspark.bench import scale
from allspark.config_io import CONFIG_ROOT, load_config
from allspark.data.batch import Views
from allspark.data.cache import open_reader
from allspark.data.datasets import DATASETS, spec_for
from allspark.data.image_io import read_image
from allspark.data.loaders import TrainPairs, collate
from allspark.data.splits import resolve
from allspark.data.worker_pool import init_worker
from allspark.evaluation.dataset import SegmentationDataset, Shard
from allspark.prepare import PLANS
from allspark.split_lists.manifest import SHIPPED_SPLITS, SPLITS_ROOT, split_roots
from allspark.utils.errors import UserError, run_main
from helpers import REPO

TOP = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "requirements.txt", "train.py", "eval.py")
POSIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog"}
ELSEWHERE = """
import sys
from pathlib import Path
from allspark.__main__ import main
from allspark.config_io import load_recipe
from allspark.data.datasets import spec_for
from allspark.data.splits import find_split, val_entries
from allspark.split_lists.manifest import SPLITS_ROOT

assert Path.cwd() == Path(sys.argv[1]) and "site" in sys.modules["allspark"].__file__
main(["train", "--dataset", "camvid", "--method", "fixmatch", "--split", "1_8", "lr=0.5", "--print-config"])
data = load_recipe("camvid", "fixmatch", {"data.split": "mine"}).data
print(find_split(data, spec_for(data), SPLITS_ROOT))  # the folder's own
print(len(val_entries(data, spec_for(data), Path("data"))), "val")  # the package's
main(["splits", "list", "--dataset", "camvid"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without network from a copy, in which somebody has fetched lists."""
    there = next((found.version for found in distributions(name="setuptools")), "0")
    if int(there.partition(".")[0]) < 77:
        pytest.skip(f"setuptools is absent or too old to build the wheel ({there}); 77 is needed")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    for name in ("allspark", "configs", "splits/camvid", "splits/shapes"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("manifest.yaml", "README.md"):
        shutil.copy(REPO / "splits" / name, copy / "splits")
    for name in TOP:
        shutil.copy(REPO / name, copy)
    (copy / "splits/pascal/1_8").mkdir(parents=True)
    (copy / "splits/pascal/1_8/labeled.txt").write_text("JPEGImages/a.jpg SegmentationClass/a.png\n")
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    copy = wheel.parent / "copy"
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    lists = {f"allspark/{name}" for name in files if name.startswith(("configs/", "splits/"))}
    fetched = {"allspark/splits/pascal/1_8/labeled.txt"}
    code = {name for name in files if name.startswith("allspark/")}
    assert len(lists) > 40 and fetched <= lists and "allspark/cli/report.js" in code
    assert names == code | lists - fetched | {"allspark/train.py", "allspark/eval.py"}
    assert "allspark = allspark.__main__:run" in info["entry_points.txt"]
    needs = [line for line in info["METADATA"].splitlines() if line.startswith("Requires-Dist: ")]
    assert any(line.startswith("Requires-Dist: torch>=") for line in needs)
    assert all("extra ==" in line for line in needs if "pytest" in line or "onnx" in line or "pycocotools" in line)
    assert {line.partition("; ")[2] for line in needs} == {
        "",
        *(f'extra == "{e}"' for e in ("bands", "coco", "export", "hub", "dev")),
    }


def test_runs_from_another_folder(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "here"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    own = here / "splits/camvid/mine/labeled.txt"
    own.parent.mkdir(parents=True)
    own.write_text("images/train/0001TP_006690.jpg labels/train/0001TP_006690.png\n")
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, here], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lr: 0.5" in done.stdout and "threshold: 0.95" in done.stdout
    assert str(Path("splits/camvid/mine")) in done.stdout.splitlines() and "101 val" in done.stdout
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("camvid/")]
    assert {"camvid/val", "camvid/1_8/labeled", "camvid/mine/labeled"} <= set(listed)
    assert len(listed) == len(set(listed))


def test_checkout_uses_its_own_files(monkeypatch, capsys):
    assert REPO / "configs" == CONFIG_ROOT and REPO / "splits" == SPLITS_ROOT == SHIPPED_SPLITS
    assert split_roots(SPLITS_ROOT) == (SPLITS_ROOT,) and split_roots(Path("elsewhere")) == (Path("elsewhere"),)
    assert command.load_script("train") is train and command.load_script("eval") is eval_script
    words = ["--dataset", "shapes", "--method", "supervised", "--split", "1_8", "--print-config"]
    assert run_main(command.main, ["train", *words]) == 0
    printed = capsys.readouterr().out
    train.main(words)
    assert printed == capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)


def test_opencv_without_libgl(tmp_path, monkeypatch, capsys):
    """A cv2 that says what the loader of shared objects says; what other modules lack is a bug."""
    for name, code in (
        ("cv2", "raise ImportError('libGL.so.1: cannot open shared object file', name='cv2')"),
        ("verb", "import cv2"),
        ("bug", "import not_there"),
    ):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2")
    with pytest.raises(UserError, match=r"libGL.so.1: cannot.*--no-deps opencv-python-headless"):
        command.load_module("verb")
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        command.load_module("bug")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_setup_in_zsh(tmp_path):
    """Where a sourced file is $0: the shell keeps its options and its folder."""
    (tmp_path / "scripts").mkdir()
    text = (REPO / "scripts" / "setup.sh").read_text().partition("\n# By default glibc")[0]
    (tmp_path / "scripts" / "setup.sh").write_text(text)
    command = 'cd /; . "$1"; false; echo "$PWD $-"'
    done = subprocess.run(["zsh", "-fc", command, "zsh", tmp_path / "scripts/setup.sh"], capture_output=True, text=True)
    assert done.stdout.startswith("/ ") and not {"e", "u"} & set(done.stdout.split()[1])


@pytest.mark.parametrize("words", [["--dataset", "camvid", "--method", "imas"], ["--config", "my.yaml"], []])
def test_train_script_leaves_the_folder_to_train(tmp_path, words):
    """Else options after the defaults would train into the folder of the defaults."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPO / "scripts" / "train.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup.sh").write_text(f"PATH={tmp_path}:$PATH\n")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    start = ["sh", tmp_path / "scripts/train.sh", "1", "29500", *words]
    called = subprocess.run(start, capture_output=True, text=True).stdout.split()
    recipe = [] if "--config" in words else ["--dataset", "pascal", "--method", "fixmatch", "--split", "1_8"]
    assert called == ["train.py", *recipe, "device=cuda", *words]


def test_no_posix_only_imports():
    for path in (*(REPO / "allspark").rglob("*.py"), REPO / "train.py", REPO / "eval.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_ONLY & set(named), path


def test_works_without_windows_missing_modules(tiny_root, tmp_path, monkeypatch):
    for name in ("pwrite", "killpg", "sysconf", "getloadavg", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    images = sorted((tiny_root / "images/labeled").iterdir())
    masks = sorted((tiny_root / "masks/labeled").iterdir())
    files = open_reader(str(tmp_path / "cache"), DATASETS["camvid"], images, masks)
    assert images and all(np.array_equal(files.image(path), read_image(path)) for path in images)
    assert (memory.resident_peak(), memory.free_memory("cpu"), memory.main_memory()) == (None, None, 0)
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    scale.end(child)
    child.stdin.close()
    assert child.returncode == -9


def test_loader_without_fork(place):
    """As on Windows and macOS: all that goes to a worker is pickled, and it begins with nothing but the imports."""
    recipe = load_config(place.config)
    spec, lists = spec_for(recipe.data), resolve(recipe.data)
    pairs = TrainPairs(lists, spec, recipe.data, Views(labeled="weak", strong=("strong",)), seed=0)
    shard = Shard(SegmentationDataset(lists.val, spec), 0, 1)
    sent = pickle.loads(pickle.dumps((pairs, collate, init_worker, shard, list(DATASETS.values()))))
    assert sent[0].spec.decode_mask(np.zeros((1, 1), np.uint8)) == 0
    assert all(pickle.loads(pickle.dumps(plan)).samples for plan in PLANS.values())
    loader = DataLoader(
        pairs,
        batch_sampler=[[(0, 0, 0, 0), (0, 1, 1, 1)]],
        num_workers=1,
        collate_fn=collate,
        worker_init_fn=init_worker,
        multiprocessing_context="spawn",
    )
    (batch,) = loader
    assert batch.labeled.image.equal(collate([pairs[0, 0, 0, 0], pairs[0, 1, 1, 1]]).labeled.image)
