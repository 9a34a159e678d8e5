"""What the tests of the commands share: a tiny data set of real files, its recipe, a finished run, real processes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from ranks import Ranks

import train

REPO = Path(train.__file__).parent
with contextlib.suppress(ValueError):  # in the background of a script it is ignored, also by what the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
CLASSES = ("ground", "left", "right")
SIZE = (80, 64)  # width, height
COUNTS = {"labeled": 4, "unlabeled": 6, "val": 2}
STEPS_PER_EPOCH = 3  # 6 unlabeled images in batches of 2


@dataclass(frozen=True)
class Place:
    """A copy of the data set that a test may damage, its recipe file, and the folder that a run goes to."""

    root: Path
    config: Path
    run: Path

    def train(self, *words: object) -> list[str]:
        """Arguments of train.py: the recipe of this place into its folder, then `words`."""
        return ["--config", str(self.config), "--save-path", str(self.run), *map(str, words)]

    def lists(self, *words: object) -> list[str]:
        """Arguments of train.py: PASCAL's recipe cut down for these files, named by lists; the method is in `words`."""
        small = ("model.encoder=mit_b0", "model.decoder_channels=32", "model.pretrained=none", "crop_size=65")
        short = ("batch_size=2", "epochs=1", "log.interval=1", "num_workers=0", "device=cpu")
        data = (f"data_root={self.root}", f"data.val_id_path={self.root}/lists/val.txt")
        files = [f"--{kind}-id-path={self.root}/lists/{kind}.txt" for kind in ("labeled", "unlabeled")]
        return ["--dataset", "pascal", *files, *small, *short, *data, *map(str, words)]

    def edit(self, **sections: dict) -> None:
        """Merge values into the recipe file, section by section."""
        recipe = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        for section, values in sections.items():
            recipe[section].update(values)
        self.config.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def write_files(root: Path) -> None:
    """Images whose left and right part are of different colour and class; mask folders for labeled and val only."""
    rng = np.random.default_rng(0)
    width, height = SIZE
    for kind, count in COUNTS.items():
        lines = []
        for index in range(count):
            mask = np.zeros((height, width), np.uint8)
            mask[8:, : 20 + 4 * index], mask[8:, 50:] = 1, 2
            image = np.array([[90, 90, 90], [200, 60, 40], [40, 60, 200]], np.uint8)[mask]
            image = (image + rng.integers(0, 40, image.shape)).astype(np.uint8)
            mask[:, -3:] = 255
            for folder, array in (("images", image), ("masks", mask)):
                if folder == "images" or kind != "unlabeled":
                    path = root / folder / kind / f"{kind}{index}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(path)
            names = [f"{folder}/{kind}/{kind}{index}.png" for folder in ("images", "masks")]
            lines.append(" ".join(names[: 1 if kind == "unlabeled" else 2]) + "\n")
        (root / "lists").mkdir(exist_ok=True)
        (root / "lists" / f"{kind}.txt").write_text("".join(lines), encoding="utf-8")


def write_recipe(path: Path, root: Path) -> Path:
    """The recipe of a data set described in YAML alone: AllSpark, 2 epochs of 3 steps, a log line every 2 steps."""
    custom = {"classes": list(CLASSES), "unlabeled_images": "images/unlabeled"}
    for kind in ("labeled", "val"):
        custom |= {f"{kind}_images": f"images/{kind}", f"{kind}_masks": f"masks/{kind}"}
    recipe = {
        "data": {"dataset": "tiny", "data_root": str(root), "crop_size": 65, "num_workers": 0, "custom": custom},
        "model": {
            "encoder": "mit_b0",
            "decoder_channels": 32,
            "bottleneck": {"name": "allspark", "warmup_epochs": 1},
        },
        "method": {"name": "allspark"},
        "optim": {"name": "adamw", "lr": 1e-3, "lr_multi": 1.0, "weight_decay": 0.01},
        "epochs": 2,
        "batch_size": 2,
        "log": {"interval": 2},
        "device": "cpu",
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(autouse=True, scope="session")
def no_data_roots_from_outside():
    """What the machine's owner has set for own runs must not lead a test to other data."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith("ALLSPARK_DATA_"):
            del os.environ[name]
    yield
    os.environ.update(kept)


@pytest.fixture(scope="session")
def one_thread():
    """Sums are bit-identical between processes only with equal thread counts; real processes get one thread too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pair():
    """Two processes of one group: pair(function, *args) -> what it returned in each."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """The undamaged data set. Read it, copy it, never write to it."""
    root = tmp_path_factory.mktemp("tiny") / "data"
    write_files(root)
    return root


@pytest.fixture
def place(tiny_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tiny_root, root)
    yield Place(root, write_recipe(tmp_path / "recipe.yaml", root), tmp_path / "run")
    for file in tmp_path.rglob("*.pth"):  # pytest keeps three sessions' folders; checkpoints are large
        file.unlink()


@pytest.fixture(scope="session")
def finished(tiny_root, tmp_path_factory, one_thread):
    """A run of 2 epochs, done in this process. Read it, copy it, never write to it."""
    folder = tmp_path_factory.mktemp("finished")
    done = Place(tiny_root, write_recipe(folder / "recipe.yaml", tiny_root), folder / "run")
    train.main(done.train())
    yield done
    for file in folder.rglob("*.pth"):
        file.unlink()


def environment(more: dict[str, object]) -> dict[str, str]:
    """Of the tests' processes: one thread, no GPU."""
    return dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | {key: str(more[key]) for key in more}


@pytest.fixture(scope="session")
def fork_process(tmp_path_factory):
    """(train.py|eval.py|-m allspark, words) -> a real process where its code and messages are the point.

    It is forked from one that has imported everything, which start_process's take four seconds for. What is about the
    start itself, signals, launchers or memory takes start_process.
    """
    folder, started = tmp_path_factory.mktemp("forked"), []
    forks.serve()

    def fork(words: Sequence[object], **more_env: object) -> forks.Command:
        started.append(forks.Command(words, environment(more_env), folder / str(len(started))))
        return started[-1]

    yield fork
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def start_process():
    """(words after python) -> a real process in the repository, one thread, no GPU; ended with the session."""
    started: list[subprocess.Popen] = []

    def start(words: Sequence[object], **more_env: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=REPO,
            env=environment(more_env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a group of its own, so that a launcher's children end with it
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()  # first, so that a launcher ends its workers, which have process groups of their own
    for process in started:
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def read_metrics():
    """metrics.jsonl of a run -> (lines of training steps, lines of evaluations)."""

    def read(run: Path) -> tuple[list[dict], list[dict]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if "loss" in line], [line for line in lines if "miou" in line]

    return read
