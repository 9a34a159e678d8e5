"""Fixtures: a tiny data set of real files, its recipe, a finished run, and processes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import train
from allspark.engine.checkpoint import save_checkpoint
from helpers import REPO, forks, networks  # noqa: F401, networks registers the encoder "tiny"
from helpers.ranks import Ranks
from helpers.tiny_dataset import Place, write_files, write_recipe

with contextlib.suppress(ValueError):  # ignored in background jobs of a script, also by child processes
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = ("test_notebook_runs", "test_disturbed_run_equals_undisturbed", "test_type_hints")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first; at the end of a session, one process would wait for the other's."""
    items.sort(key=lambda item: item.name not in LONG)


@pytest.fixture(autouse=True, scope="session")
def no_data_roots_from_outside():
    """Unset ALLSPARK_DATA_*, so that no test finds other data."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith("ALLSPARK_DATA_"):
            del os.environ[name]
    yield
    os.environ.update(kept)


@pytest.fixture(scope="session")
def one_thread():
    """One thread, as in child processes: sums are bit-identical only with equal thread counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pair():
    """Two processes of one group: pair(function, *args) -> the results of both."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """The data set, read-only."""
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
    """A finished run of 2 epochs, read-only."""
    folder = tmp_path_factory.mktemp("finished")
    done = Place(tiny_root, write_recipe(folder / "recipe.yaml", tiny_root), folder / "run")
    train.main(done.train())
    yield done
    for file in folder.rglob("*.pth"):
        file.unlink()


@pytest.fixture
def saved(tmp_path):
    """latest.pth of step 2, previous.pth of step 1, best.pth of step 0; and how they read."""
    path, best = {"world_size": 1, "best": {"miou": 1.0, "epoch": 0}}, tmp_path / "best.pth"
    rest = {"model": {"w": torch.arange(5000.0)}, "method": {}, "recipe": {}, "optimizer": {}, "epoch": 0}
    rest["split"] = {"name": "1_8", "sha256": "0"}
    save_checkpoint(best, {**path, **rest, "step": 0})
    for step in (1, 2):
        save_checkpoint(tmp_path / "latest.pth", {**path, **rest, "step": step}, previous=tmp_path / "previous.pth")
    return tmp_path


def environment(more: dict[str, object]) -> dict[str, str]:
    """Environment of child processes: one thread, no GPU."""
    return dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | {key: str(more[key]) for key in more}


@pytest.fixture(scope="session")
def fork_process(tmp_path_factory):
    """(train.py|eval.py|-m allspark, words) -> a process, for tests of exit codes and messages.

    Forked from a server that has imported everything, which takes four seconds with start_process. Tests of the start
    itself, of signals, launchers or memory use start_process.
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
    """(arguments of python) -> a process in the repository with one thread and no GPU; ended with the session."""
    started: list[subprocess.Popen] = []

    def start(words: Sequence[object], **more_env: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=REPO,
            env=environment(more_env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a new process group, so that a launcher's children end with it
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
