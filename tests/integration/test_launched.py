"""train.py and eval.py under a launcher, with two CPU processes."""

import json
import math
import signal
import socket
import time

import pytest

import eval as eval_script
import train
from allspark import distributed, train_step
from allspark.utils.errors import run_main
from helpers.runs import FILES, At, assert_finite_losses, assert_same_run, load, sending

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def two_processes(finished, start_process, tmp_path_factory):
    """train.py under torchrun, its first epoch supervised: (folder of the finished run, what was printed)."""
    run = tmp_path_factory.mktemp("two") / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc_per_node=2"]
    words = ["--config", finished.config, "--save-path", run, "log.interval=1", "burn_in_epochs=1"]
    process = start_process([*launcher, "train.py", *words])
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    yield run, out
    for file in run.glob("*.pth"):
        file.unlink()


def test_torchrun_writes_one_log_and_checkpoint(two_processes, read_metrics):
    run, out = two_processes
    steps, evaluations = read_metrics(run)
    assert_finite_losses(steps)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluations] == [3, 6]
    log = (run / "train.log").read_text(encoding="utf-8")
    assert "2 process(es) on cpu" in log
    for text in (log, out):
        assert text.count("epoch 1: mIoU") == 1
    names = {path.name for path in run.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert names - events == FILES
    assert len(events) == 1
    assert not [name for name in load(run / "latest.pth")["model"] if name.startswith("module.")]


def test_eval_with_one_and_two_processes(two_processes, read_metrics, fork_process, tmp_path):
    run, _ = two_processes
    words = ["--checkpoint", run / "latest.pth", "--device", "cpu", "--json"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # what a launcher sets
    pair = [fork_process(["eval.py", *words, tmp_path / "2.json"], RANK=r, LOCAL_RANK=r, **group) for r in (0, 1)]
    assert run_main(eval_script.main, [*map(str, words), str(tmp_path / "1.json")]) == 0
    printed = []
    for process in pair:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        printed.append(out)
    assert "mean of 3 classes" in printed[0] and not printed[1]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text(encoding="utf-8")) for n in (1, 2))
    assert one == two
    assert one["num_images"] == 2
    assert math.isclose(one["miou"], read_metrics(run)[1][-1]["miou"], abs_tol=1e-3)


def train_in_group(words, function, call, rank, number):
    """train.py in a process of a group; the one of this rank gets a signal. -> exit code."""
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == rank:
            module = train_step if function == "seed_step" else train
            patch.setattr(module, function, At(getattr(module, function), call, sending(number)))
        try:
            return run_main(train.main, words)
        except SystemExit as end:
            return end.code


def test_two_processes_stop_and_resume_bit_identical(pair, two_processes, finished, tmp_path):
    """The signal reaches one of them; statistics of batch norm are each one's own in the middle of an epoch."""
    words = ["--config", str(finished.config), "--save-path", str(tmp_path / "run")]
    words += ["log.interval=1", "burn_in_epochs=1", "data.num_workers=0"]
    assert pair(train_in_group, words, "seed_step", 2, 1, signal.SIGTERM) == [75, 75]
    content = load(tmp_path / "run" / "latest.pth")
    assert content["step"] == 2 and any("running_mean" in name for name in content["ranks"])
    assert pair(train_in_group, words, "seed_step", 0, 1, signal.SIGTERM) == [0, 0]
    assert_same_run(tmp_path / "run", two_processes[0])


def test_signal_to_the_launcher(start_process, finished, tmp_path):
    """It passes on SIGUSR1 as it does SIGTERM; torchrun alone would die of it and leave its processes running."""
    launcher = ["-m", "allspark.torchrun", "--standalone", "--local-addr=localhost", "--nproc_per_node=2"]
    words = ["--config", finished.config, "--save-path", tmp_path / "run", "log.interval=1", "epochs=500"]
    process = start_process([*launcher, "train.py", *words])
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert load(tmp_path / "run" / "latest.pth")["step"] >= 1
