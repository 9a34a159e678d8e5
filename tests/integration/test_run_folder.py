"""The folder of a run: what is never replaced, and files of our own that are damaged."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import train
from allspark.cli.check import disk_findings
from allspark.engine.checkpoint import check_position, checkpoint_in, find_runs, save_checkpoint
from allspark.engine.run_lock import RunLock
from allspark.engine.writers import read_metrics
from allspark.inference import load_for_inference
from allspark.run import prepare_folder
from allspark.utils.errors import UserError, run_main
from helpers.runs import load, without_speed

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def assert_refused(words, folder, told, capsys):
    """Exit code 2, one line that contains `told`, and every file of the folder as before."""
    before = contents(folder)
    capsys.readouterr()
    assert run_main(train.main, words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and told in message, message
    assert contents(folder) == before


def test_foreign_files_are_not_replaced(place, capsys):
    recipe = "# by hand\n" + place.config.read_text(encoding="utf-8")
    words = ["--config", str(place.run / "config.yaml"), "--save-path", str(place.run)]
    for name, text, more in (("config.yaml", recipe, words), ("best.pth", "mine", place.train())):
        place.run.mkdir()
        (place.run / name).write_text(text, encoding="utf-8")
        assert_refused(more, place.run, str(place.run), capsys)
        shutil.rmtree(place.run)


@pytest.mark.parametrize(
    ("name", "text"), [("run.json", '{"mine": 1}'), ("metrics.jsonl", '{"step": 1}\n'), ("train.log", "mine")]
)
def test_foreign_text_files_are_not_replaced(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with RunLock(tmp_path) as lock, pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        prepare_folder(lock, fresh=False)
    assert contents(tmp_path) == {name: text.encode()}


def test_run_whose_memory_is_never_read_is_resumed(finished, tmp_path):
    """A new run of this kind is refused; earlier versions began some."""
    run = shutil.copytree(finished.run, tmp_path / "run")
    for name in ("latest.pth", "best.pth"):
        content = load(run / name)
        content["recipe"]["model"]["bottleneck"]["warmup_epochs"] = 5
        save_checkpoint(run / name, {key: value for key, value in content.items() if key != "format"})
    words = ["--config", str(finished.config), "warmup_epochs=5", "--save-path"]
    assert run_main(train.main, [*words, str(run)]) == 0
    assert run_main(train.main, [*words, str(tmp_path / "new")]) == 2


def test_files_beside_a_run_are_mentioned(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with RunLock(tmp_path) as lock:
        (note,) = prepare_folder(lock, fresh=False)
    assert note == f"WARNING: {tmp_path} has other files, too: notes.txt"


def test_check_reports_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    (problem,) = disk_findings(None, tmp_path / "file" / "run").problems
    assert problem.startswith(f"--save-path {tmp_path / 'file' / 'run'}: {tmp_path / 'file'} is not a folder")


@pytest.fixture
def copy(finished, place):
    """(arguments of train.py, folder): a copy of the finished run that a test may damage."""
    shutil.copytree(finished.run, place.run)
    return ["--config", str(finished.config), "--save-path", str(place.run)], place.run


def test_best_checkpoint_without_latest(copy, finished):
    """As people delete the largest files of a finished run."""
    words, run = copy
    best = (run / "best.pth").read_bytes()
    for name in ("latest.pth", "previous.pth"):
        (run / name).unlink()
    assert run_main(train.main, words) == 0
    assert (run / "best.pth").read_bytes() == best and without_speed(run) == without_speed(finished.run)


def test_checkpoint_of_a_run(finished, tmp_path):
    """The folder stands for its last epoch, with best for the best one; a file for itself."""
    steps = {name: load(finished.run / name)["step"] for name in ("latest.pth", "best.pth")}
    for path, best, name in ((finished.run, False, "latest.pth"), (finished.run, True, "best.pth")):
        assert load_for_inference(path, torch.device("cpu"), best=best).meta["step"] == steps[name]
        assert checkpoint_in(finished.run / name) == finished.run / name
    with pytest.raises(UserError, match="--best needs the folder of a run, and .*best.pth is a file"):
        checkpoint_in(finished.run / "best.pth", best=True)
    with pytest.raises(UserError, match=r"latest\.pth: no such checkpoint; give the folder of a run"):
        load_for_inference(tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match=rf"give one of the runs in {finished.run.parent}: {finished.run}"):
        load_for_inference(finished.run.parent, torch.device("cpu"))
    assert str(finished.run) in find_runs(finished.run.parent.parent) and find_runs(Path("/dev/zero")) == []
    assert find_runs(finished.run.parent, most=0) == []


def test_the_checkpoint_that_is_there_is_named(copy, capsys):
    words, run = copy
    for name in ("latest.pth", "previous.pth"):
        (run / name).unlink()
    (run / "best.pth").write_text("mine", encoding="utf-8")
    assert_refused(words, run, f"error: {run / 'best.pth'}: ", capsys)


def test_results_without_checkpoints_stay(copy, capsys):
    words, run = copy
    for path in run.glob("*.pth"):
        path.unlink()
    assert_refused(words, run, "no checkpoint to continue it from", capsys)


def test_fresh_in_the_current_folder(finished, tmp_path, monkeypatch):
    """Which cannot be renamed as "."."""
    shutil.copytree(finished.run, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    with RunLock(Path(".")) as lock, pytest.raises(UserError, match="--fresh cannot rename the current folder"):
        prepare_folder(lock, fresh=True)
    assert (tmp_path / "run" / "latest.pth").is_file()


@pytest.mark.parametrize("wrong", ["model.encoder=nope", "model.pretrained=no.pth", "evaluation.window=16"])
def test_fresh_with_a_wrong_recipe_moves_nothing(copy, tmp_path, wrong, capsys):
    words, run = copy
    assert_refused([*words, "--fresh", wrong], run, "error: ", capsys)
    assert [path.name for path in run.parent.glob(f"{run.name}*")] == [run.name]


def test_impossible_positions(copy, capsys):
    words, run = copy
    content = load(run / "latest.pth")
    for other in (run / "previous.pth", run / "best.pth"):
        other.unlink()
    for change in ({"epoch": 3}, {"epoch": 0}, {"step": 5}):
        torch.save({**content, **change}, run / "latest.pth")
        assert_refused(words, run, str(run / "latest.pth"), capsys)
    check_position(content, run)
    for change in (
        {"step": -1},
        {"step": True},
        {"best": {"miou": float("nan"), "epoch": 0}},
        {"best": {"miou": 5.0, "epoch": 9}},
        {"log": [{"loss": torch.zeros(3)}]},
    ):
        with pytest.raises(UserError, match="position"):
            check_position({**content, **change}, run)


LINES = {
    "a text": '{"step": "one"}',
    "null": '{"step": null}',
    "a list": "[1]",
    "a flipped bit": '{"step": 3, "epobh": 0, "miou": 1.0, "iou": {}}',
    "many digits": '{"step": ' + "9" * 5000 + "}",
    "deep": "[" * 100_000,
    "cut": '{"step": 1',
    "no number": '{"step": 3, "epoch": 0, "miou": NaN, "iou": {}}',
    "no percentage": '{"step": 3, "epoch": 0, "miou": 1e99, "iou": {}}',
}


@pytest.mark.parametrize("name", LINES)
def test_damaged_metrics(name, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{LINES[name]}\n{{"step": 9}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a line that train\.py writes") as error:
        read_metrics(path)
    assert len(str(error.value)) < 500
    path.write_text(f'{{"step": 1}}\n{LINES[name]}')  # where a killed run stopped writing
    assert read_metrics(path) == [{"step": 1}]


def test_damaged_files_of_a_resumed_run(copy, capsys):
    words, run = copy
    content, whole = load(run / "best.pth"), contents(run)
    torch.save(content if content["epoch"] < 2 else load(run / "previous.pth"), run / "latest.pth")
    for name, text, told in (
        ("metrics.jsonl", LINES["a text"] + "\n", "metrics.jsonl, line 1"),
        ("run.json", "[" * 100_000, "run.json"),
        ("run.json", '{"split": ' + "9" * 5000 + "}", "run.json"),
    ):
        (run / name).write_text(text)
        assert_refused(words, run, told, capsys)
        (run / name).write_bytes(whole[name])
