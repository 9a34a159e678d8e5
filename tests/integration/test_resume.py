"""Runs that are killed, stopped, damaged or started twice: resuming and refusals."""

import re
import shutil
import signal
import time

import pytest
import torch

import train
from allspark import checkpointer, train_step
from allspark.config_io import build_recipe
from allspark.engine.position import Position, is_finished
from allspark.engine.run_lock import RunLock
from allspark.utils.errors import run_main
from helpers.runs import At, assert_same_run, assert_same_tensors, load, sending, without_speed

MINIMAL = {"data": {"dataset": "x", "data_root": "x", "crop_size": 65}, "model": {}, "method": "supervised"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def resumed(finished, start_process, tmp_path_factory):
    """The recipe of `finished`, killed in its second epoch by SIGKILL in a real process, then started again here."""
    run = tmp_path_factory.mktemp("resumed") / "run"
    words = ["--config", finished.config, "--save-path", run]
    process = start_process(["train.py", *words])
    deadline = time.monotonic() + 120
    while not (run / "latest.pth").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()  # SIGKILL: nothing in the process can tidy up
    process.communicate()
    assert load(run / "latest.pth")["step"] == 3, "it was killed too late to prove anything"
    assert run_main(train.main, list(map(str, words))) == 0
    yield run
    for file in run.glob("*.pth"):
        file.unlink()


def test_killed_run_resumes_bit_identical(resumed, finished):
    straight, again = (load(run / "latest.pth") for run in (finished.run, resumed))
    assert_same_tensors(straight["model"], again["model"])
    assert (straight["epoch"], straight["step"], straight["best"]) == (again["epoch"], again["step"], again["best"])
    log = (resumed / "train.log").read_text(encoding="utf-8")
    assert "resumed in epoch 1 (step 3)" in log or "resumed after epoch 1 (step 3)" in log


def test_kill_between_checkpoints_keeps_best(resumed, finished):
    """It was killed when latest.pth stood there, around the first evaluation."""
    straight, again = (load(run / "best.pth") for run in (finished.run, resumed))
    assert_same_tensors(straight["model"], again["model"])


def test_killed_run_logs_the_same(resumed, finished):
    assert without_speed(resumed) == without_speed(finished.run)


def test_teacher_resumes_bit_identical(place, tmp_path, monkeypatch):
    """The teacher labels, is evaluated, and is in the checkpoint."""
    straight = place.train("method.teacher=ema", "method.teacher_momentum=0.5", "checkpoint_interval=2")
    train.main(straight)
    whole = load(place.run / "latest.pth")
    save = checkpointer.save_checkpoint

    def save_and_stop(path, content, **options):
        save(path, content, **options)
        if content["step"] == 4:
            raise KeyboardInterrupt

    broken = [str(tmp_path / "broken") if word == str(place.run) else word for word in straight]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpointer, "save_checkpoint", save_and_stop)
        train.main(broken)
    assert load(tmp_path / "broken" / "latest.pth")["step"] == 4  # in the middle of an epoch
    train.main(broken)
    resumed = load(tmp_path / "broken" / "latest.pth")
    assert any(name.startswith("teacher.model.encoder") for name in resumed["method"])
    assert_same_tensors(resumed["method"], whole["method"])
    assert_same_tensors(resumed["model"], whole["model"])


@pytest.mark.parametrize(("function", "call", "step"), [("seed_step", 5, 5), ("seed_step", 3, 3), ("validate", 1, 3)])
def test_signal_stops_after_step(function, call, step, finished, place, monkeypatch, capsys):
    """In the middle of an epoch, in its last step, and in the evaluation."""
    words = ["--config", str(finished.config), "--save-path", str(place.run)]
    with monkeypatch.context() as patch:
        module = train_step if function == "seed_step" else train
        patch.setattr(module, function, At(getattr(module, function), call, sending(signal.SIGTERM)))
        assert run_main(train.main, words) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert load(place.run / "latest.pth")["step"] == step
    assert "stopped by SIGTERM" in (place.run / "train.log").read_text(encoding="utf-8").splitlines()[-1]
    assert run_main(train.main, words) == 0
    assert_same_run(place.run, finished.run)


def test_damaged_checkpoint_resumes_from_previous(finished, place, monkeypatch):
    words = ["--config", str(finished.config), "--save-path", str(place.run), "checkpoint_interval=1"]
    with monkeypatch.context() as patch:
        patch.setattr(train_step, "seed_step", At(train_step.seed_step, 5, sending(signal.SIGINT)))
        assert run_main(train.main, words) == 75
    (place.run / "latest.pth").write_bytes((place.run / "latest.pth").read_bytes()[:-999])
    assert run_main(train.main, words) == 0
    log = (place.run / "train.log").read_text(encoding="utf-8")
    assert "resuming from previous.pth (step 5)" in log or "resuming from previous.pth (step 4)" in log
    assert (place.run / "damaged.pth").is_file()
    assert_same_run(place.run, finished.run)


def test_folder_in_use(finished, place, capsys, monkeypatch):
    monkeypatch.setattr(RunLock.__init__, "__kwdefaults__", {"active": True, "timeout": 0.2})
    with RunLock(place.run):
        assert run_main(train.main, ["--config", str(finished.config), "--save-path", str(place.run)]) == 2
    message = capsys.readouterr().err
    assert "in use by another job" in message and str(place.run) in message


def test_checkpoint_minutes(finished, place):
    words = [
        "--config",
        str(finished.config),
        "--save-path",
        str(place.run),
        "checkpoint_minutes=1e-9",
        "epochs=1",
        "warmup_epochs=0",
    ]
    saved, save = [], checkpointer.save_checkpoint

    def record(path, content, **options):
        saved.append((path.name, content["step"]))
        save(path, content, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointer, "save_checkpoint", record)
        assert run_main(train.main, words) == 0
    assert [step for name, step in saved if name == "latest.pth"] == [1, 2, 3, 3]


def test_resume_before_key_existed(finished, place, capsys):
    shutil.copytree(finished.run, place.run)
    content = load(place.run / "latest.pth")
    del content["recipe"]["model"]["bottleneck"]["empty_slots"]
    torch.save(content, place.run / "latest.pth")
    train.main(["--config", str(finished.config), "--save-path", str(place.run)])
    assert "is finished" in capsys.readouterr().out


def test_changed_settings_are_logged(finished, place, monkeypatch):
    """Those that a resumed run may change; the log shows what they were."""
    words = ["--config", str(finished.config), "--save-path", str(place.run)]
    with monkeypatch.context() as patch:
        patch.setattr(train_step, "seed_step", At(train_step.seed_step, 3, sending(signal.SIGTERM)))
        assert run_main(train.main, words) == 75
    assert run_main(train.main, [*words, "micro_batch=1", "log.interval=7"]) == 0
    text = (place.run / "train.log").read_text()
    assert re.search(r"changed since the last start: log.interval: \d+ -> 7; micro_batch: None -> 1\n", text)


def test_finished_run_is_untouched(resumed, finished):
    def results():
        files = [path for path in resumed.iterdir() if path.suffix in (".pth", ".jsonl")]
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = results()
    words = ["--config", str(finished.config), "--save-path", str(resumed)]
    assert run_main(train.main, words) == 0
    assert run_main(train.main, [*words, "log_interval=7", "num_workers=1"]) == 0  # these decide no result
    assert results() == before


def test_changed_recipe_is_refused(finished, capsys):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in finished.run.iterdir()}
    assert run_main(train.main, finished.train("optim.lr=0.5")) == 2
    message = capsys.readouterr().err
    assert "optim.lr: 0.001 -> 0.5" in message and str(finished.run) in message and "--fresh" in message
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in finished.run.iterdir()} == before


def test_fresh_moves_old_run(finished, place):
    shutil.copytree(finished.run, place.run)
    old = {path.name: path.read_bytes() for path in place.run.iterdir()}
    assert run_main(train.main, place.train("--fresh", "epochs=1", "warmup_epochs=0", "optim.lr=0.5")) == 0
    assert load(place.run / "latest.pth")["step"] == 3
    (aside,) = place.run.parent.glob("run.*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == old


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_fresh_is_ignored_after_restart(finished, place, monkeypatch, capsys, name):
    """A launcher gives the same words again: what the job has begun is no old run."""
    shutil.copytree(finished.run, place.run)
    monkeypatch.setenv(name, "1")
    assert run_main(train.main, place.train("--fresh")) == 0
    assert "this run is finished" in capsys.readouterr().out and not list(place.run.parent.glob("run.*"))
    shutil.rmtree(place.run)  # nothing was begun: it says what becomes of the word
    assert run_main(train.main, place.train("--fresh", "epochs=1", "warmup_epochs=0")) == 0
    assert "--fresh ignored: the job was restarted" in (place.run / "train.log").read_text(encoding="utf-8")


def test_skipped_steps_without_log_lines(place, capsys):
    """The first step leaves weights that give no finite loss; the second one is skipped, and one is too many."""
    assert (
        run_main(train.main, place.train("optim.max_skipped=1", "optim=sgd", "optim.lr=1e9", "log_interval=100")) == 2
    )
    assert "step 2: the last 1 steps had non-finite gradients" in capsys.readouterr().err
    assert load(place.run / "diverged.pth")["step"] == 2


def test_early_stopping(place, capsys, monkeypatch):
    """Weights that hardly change soon have no better score; an interrupted run ends where the other does."""
    words = ["method=supervised", "bottleneck=none", "optim.lr=1e-30", "epochs=9", "evaluation.patience=1"]
    words += ["model.encoder=tiny", "log.writers=[]"]
    assert run_main(train.main, place.train(*words)) == 0
    content = load(place.run / "latest.pth")
    assert content["epoch"] == content["best"]["epoch"] + 2 < 9
    assert f"({content['epoch']} of 9, by early stopping)" in capsys.readouterr().out
    assert run_main(train.main, place.train(*words)) == 0
    assert "this run is finished" in capsys.readouterr().out
    other = [*words, "--save-path", str(place.run.with_name("other"))]
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", At(train.validate, 2, sending(signal.SIGTERM)))
        assert run_main(train.main, place.train(*other)) == 75
    assert run_main(train.main, place.train(*other)) == 0
    assert_same_run(place.run.with_name("other"), place.run)


@pytest.mark.parametrize(
    ("epoch", "best", "patience", "finished"),
    [(0, -1, 1, False), (2, 1, 1, False), (3, 1, 1, True), (3, 1, 2, False), (8, 7, None, False), (9, 8, None, True)],
)
def test_end_of_a_run(epoch, best, patience, finished):
    """A function of the position alone, so that a resumed run ends where the other does."""
    recipe = build_recipe({**MINIMAL, "epochs": 9, "evaluation": {"patience": patience}}, None, "test")
    assert is_finished(recipe, Position(epoch=epoch, best={"miou": 1.0, "epoch": best})) == finished


def test_run_without_steps_is_no_result(place, capsys):
    """Too short for optim.max_skipped: it would end with the score of the first step's weights."""
    assert run_main(train.main, place.train("optim.lr=2e9", "optim=sgd")) == 2
    assert "step 6: 5 of 6 steps had non-finite gradients" in capsys.readouterr().err
    assert load(place.run / "latest.pth")["epoch"] == 1 and load(place.run / "diverged.pth")["step"] == 6


def test_diverged_run_is_aborted(place, capsys):
    assert run_main(train.main, place.train("optim.max_skipped=2", "optim=sgd", "optim.lr=1e9")) == 2
    message = capsys.readouterr().err
    assert "optim.lr" in message and "step 3: the last 2 steps had non-finite gradients" in message
    assert "images/labeled/labeled" in message and "images/unlabeled/unlabeled" in message
    assert not (place.run / "latest.pth").exists()
    content = load(place.run / "diverged.pth")
    assert content["step"] == 3 and len(content["images"]) == 4
