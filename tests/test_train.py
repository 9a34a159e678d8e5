"""train.py from its command line to the files it leaves: a run, each method, resume, two processes, fine-tuning."""

import json
import math
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_methods import CASES, learning

import eval as eval_script
import train
from allspark import distributed
from allspark.engine import files, keeper
from allspark.errors import run_main
from allspark.models.weights import from_released

NAMES = Path(__file__).parent / "golden" / "names.json"
FILES = {"config.yaml", "latest.pth", "previous.pth", "best.pth", "metrics.jsonl", "train.log", ".lock"}
NO_STEP = "optim.lr=1e-30"  # a run whose weights stay where they were to the last bit

pytestmark = pytest.mark.usefixtures("one_thread", "launched")  # torchrun works beside the tests


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_finite_losses(steps):
    assert steps
    for line in steps:
        losses = {name: value for name, value in line.items() if name.startswith("loss")}
        assert losses and all(map(math.isfinite, losses.values())), line


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, first {different[0]}"


def without_speed(run):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "images_per_s"} for line in lines]


# A run


def test_a_run_leaves_every_file_it_promises(finished):
    names = {path.name for path in finished.run.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert names - events == FILES
    assert len(events) == 1


def test_metrics_have_a_line_per_logged_step_and_per_evaluation(finished, read_metrics):
    steps, evaluations = read_metrics(finished.run)
    assert_finite_losses(steps)
    for line in steps:
        assert line.keys() >= {"step", "epoch", "lr", "loss", "loss_x", "loss_u", "images_per_s"}
    numbers = [line["step"] for line in steps]
    assert numbers == sorted(set(numbers)) and numbers[0] == 2 and numbers[-1] == 6
    assert [line["step"] for line in evaluations] == [3, 6]
    for line in evaluations:
        assert list(line["iou"]) == ["ground", "left", "right"]
        assert math.isclose(line["miou"], sum(line["iou"].values()) / 3, abs_tol=1e-3)


def test_the_log_tells_data_model_and_scores(finished):
    log = (finished.run / "train.log").read_text(encoding="utf-8")
    for words in ("tiny", "4 labeled, 6 unlabeled, 2 val images", "mit_b0", "6 steps", "epoch 1: mIoU"):
        assert words in log


def test_checkpoints_hold_tensors_and_plain_values_only(finished):
    for name in ("latest.pth", "best.pth"):
        content = load(finished.run / name)
        assert content["recipe"] == yaml.safe_load((finished.run / "config.yaml").read_text(encoding="utf-8"))
    content = load(finished.run / "latest.pth")
    assert (content["epoch"], content["step"]) == (2, 6)
    assert content["model"]["bottleneck.memory.queue"].abs().sum() > 0


def test_the_best_checkpoint_is_of_the_best_evaluation(finished, read_metrics):
    evaluations = read_metrics(finished.run)[1]
    best = max(evaluations, key=lambda line: line["miou"])
    assert load(finished.run / "best.pth")["step"] == best["step"]
    assert math.isclose(load(finished.run / "latest.pth")["best"]["miou"], best["miou"], abs_tol=1e-4)


def test_tensorboard_shows_losses_and_scores(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(finished.run)).Reload()
    assert {"train/loss", "train/lr", "eval/miou", "eval_iou/left"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/miou")] == [3, 6]


@pytest.mark.parametrize(("name", "bottleneck"), CASES)
def test_every_method_trains_from_lists(name, bottleneck, place, read_metrics):
    options = [f"method.{key}={value}" for key, value in learning(name).items() if key != "background"]
    words = ["model.encoder=tiny", f"model.bottleneck={bottleneck}", "batch_size=2", *options]
    assert run_main(train.main, place.lists("--method", name, "--save-path", place.run, *words)) == 0
    lines = read_metrics(place.run)[0]
    assert_finite_losses(lines)
    steps = 2 if name == "supervised" else 3  # its epoch is one pass over the 4 labeled images
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert any(key.startswith("loss_u") for key in lines[0]) == (name != "supervised")
    has_memory = "bottleneck.memory.queue" in load(place.run / "latest.pth")["model"]
    assert has_memory == (bottleneck == "allspark")


def test_a_supervised_start_has_the_labeled_loss_alone(place, read_metrics):
    words = ("burn_in_epochs=1", "epochs=2", "log_interval=3")
    assert run_main(train.main, place.lists("--method", "selftrain", "--save-path", place.run, *words)) == 0
    start, rest = read_metrics(place.run)[0]
    assert "loss_u" not in start and "loss_u" in rest


def test_save_path_and_data_root_have_their_defaults(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place.edit(data={"data_root": "/nowhere"})
    monkeypatch.setenv("ALLSPARK_DATA_TINY", str(place.root))
    assert run_main(train.main, ["--config", str(place.config), "epochs=1"]) == 0
    assert (tmp_path / "exp" / "tiny" / "allspark" / "own" / "latest.pth").is_file()


# Resume


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


def test_a_killed_run_goes_on_bit_for_bit(resumed, finished):
    straight, again = (load(run / "latest.pth") for run in (finished.run, resumed))
    assert_same_tensors(straight["model"], again["model"])
    assert (straight["epoch"], straight["step"], straight["best"]) == (again["epoch"], again["step"], again["best"])
    log = (resumed / "train.log").read_text(encoding="utf-8")
    assert "resumed in epoch 0, step 3" in log or "resumed behind epoch 0, step 3" in log


def test_a_kill_between_two_checkpoints_does_not_lose_the_best(resumed, finished):
    """It was killed when latest.pth stood there, around the first evaluation."""
    straight, again = (load(run / "best.pth") for run in (finished.run, resumed))
    assert_same_tensors(straight["model"], again["model"])


def test_a_killed_run_logs_what_the_straight_one_logged(resumed, finished):
    assert without_speed(resumed) == without_speed(finished.run)


def test_a_run_with_a_teacher_goes_on_bit_for_bit(place, tmp_path, monkeypatch):
    """The teacher labels, is evaluated, and is in the checkpoint."""
    straight = place.train("method.teacher=ema", "method.teacher_momentum=0.5", "checkpoint_interval=2")
    train.main(straight)
    whole = load(place.run / "latest.pth")
    save = keeper.save_checkpoint

    def save_and_stop(path, content, **options):
        save(path, content, **options)
        if content["step"] == 4:
            raise KeyboardInterrupt

    broken = [str(tmp_path / "broken") if word == str(place.run) else word for word in straight]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(keeper, "save_checkpoint", save_and_stop)
        train.main(broken)
    assert load(tmp_path / "broken" / "latest.pth")["step"] == 4  # in the middle of an epoch
    train.main(broken)
    resumed = load(tmp_path / "broken" / "latest.pth")
    assert any(name.startswith("teacher.model.encoder") for name in resumed["method"])
    assert_same_tensors(resumed["method"], whole["method"])
    assert_same_tensors(resumed["model"], whole["model"])


class At:
    """Stands for a function of train.py and calls it; before its call number `number` it does something else."""

    def __init__(self, function, number, action):
        self.function, self.left, self.action = function, number, action

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left == 0:
            self.action()
        return self.function(*args, **options)


def sending(number):
    return lambda: os.kill(os.getpid(), number)


def assert_same_run(run, other):
    straight, again = (load(folder / "latest.pth") for folder in (other, run))
    assert_same_tensors(straight["model"], again["model"])
    assert (straight["epoch"], straight["step"], straight["best"]) == (again["epoch"], again["step"], again["best"])
    assert without_speed(run) == without_speed(other)


@pytest.mark.parametrize(("function", "call", "step"), [("seed_step", 5, 5), ("seed_step", 3, 3), ("validate", 1, 3)])
def test_a_signal_stops_behind_the_step_and_nothing_is_lost(function, call, step, finished, place, monkeypatch, capsys):
    """In the middle of an epoch, in its last step, and in the evaluation."""
    words = ["--config", str(finished.config), "--save-path", str(place.run)]
    with monkeypatch.context() as patch:
        patch.setattr(train, function, At(getattr(train, function), call, sending(signal.SIGTERM)))
        assert run_main(train.main, words) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert load(place.run / "latest.pth")["step"] == step
    assert "stopped by SIGTERM" in (place.run / "train.log").read_text(encoding="utf-8").splitlines()[-1]
    assert run_main(train.main, words) == 0
    assert_same_run(place.run, finished.run)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(finished, place, monkeypatch):
    words = ["--config", str(finished.config), "--save-path", str(place.run), "checkpoint_interval=1"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "seed_step", At(train.seed_step, 5, sending(signal.SIGINT)))
        assert run_main(train.main, words) == 75
    (place.run / "latest.pth").write_bytes((place.run / "latest.pth").read_bytes()[:-999])
    assert run_main(train.main, words) == 0
    log = (place.run / "train.log").read_text(encoding="utf-8")
    assert "going on from previous.pth, step 5" in log or "going on from previous.pth, step 4" in log
    assert (place.run / "damaged.pth").is_file()
    assert_same_run(place.run, finished.run)


def test_a_folder_in_use_is_refused(finished, place, capsys, monkeypatch):
    monkeypatch.setattr(files.Hold.__init__, "__kwdefaults__", {"active": True, "patience": 0.2})
    with files.Hold(place.run):
        assert run_main(train.main, ["--config", str(finished.config), "--save-path", str(place.run)]) == 2
    message = capsys.readouterr().err
    assert "in use by another job" in message and str(place.run) in message


def test_minutes_between_checkpoints(finished, place):
    words = ["--config", str(finished.config), "--save-path", str(place.run), "checkpoint_minutes=1e-9", "epochs=1"]
    saved = []
    save = keeper.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper, "save_checkpoint", lambda p, c, **o: (saved.append((p.name, c["step"])), save(p, c, **o)))
        assert run_main(train.main, words) == 0
    assert [step for name, step in saved if name == "latest.pth"] == [1, 2, 3, 3]


def train_in_group(words, function, call, rank, number):
    """train.py in a process of a group; the one of this rank gets a signal. -> exit code."""
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == rank:
            patch.setattr(train, function, At(getattr(train, function), call, sending(number)))
        try:
            return run_main(train.main, words)
        except SystemExit as end:
            return end.code


def test_two_processes_stop_at_one_step_and_go_on_bit_for_bit(pair, two_processes, finished, tmp_path):
    """The signal reaches one of them; statistics of batch norm are each one's own in the middle of an epoch."""
    words = ["--config", str(finished.config), "--save-path", str(tmp_path / "run")]
    words += ["log_interval=1", "burn_in_epochs=1", "data.num_workers=0"]
    assert pair(train_in_group, words, "seed_step", 2, 1, signal.SIGTERM) == [75, 75]
    content = load(tmp_path / "run" / "latest.pth")
    assert content["step"] == 2 and any("running_mean" in name for name in content["ranks"])
    assert pair(train_in_group, words, "seed_step", 0, 1, signal.SIGTERM) == [0, 0]
    assert_same_run(tmp_path / "run", two_processes[0])


def test_a_run_from_before_a_key_existed_goes_on(finished, place, capsys):
    shutil.copytree(finished.run, place.run)
    content = load(place.run / "latest.pth")
    del content["recipe"]["model"]["bottleneck"]["empty_slots"]
    torch.save(content, place.run / "latest.pth")
    train.main(["--config", str(finished.config), "--save-path", str(place.run)])
    assert "is finished" in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is(resumed, finished):
    def results():
        return {path.name: path.read_bytes() for path in resumed.iterdir() if path.suffix in (".pth", ".jsonl")}

    before = results()
    words = ["--config", str(finished.config), "--save-path", str(resumed)]
    assert run_main(train.main, words) == 0
    assert run_main(train.main, [*words, "log_interval=7", "num_workers=1"]) == 0  # these decide no result
    assert results() == before


def test_another_recipe_is_refused_and_touches_nothing(finished, capsys):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in finished.run.iterdir()}
    assert run_main(train.main, finished.train("optim.lr=0.5")) == 2
    message = capsys.readouterr().err
    assert "optim.lr: 0.001 -> 0.5" in message and str(finished.run) in message and "--fresh" in message
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in finished.run.iterdir()} == before


def test_fresh_starts_over_and_keeps_the_old_run(finished, place):
    shutil.copytree(finished.run, place.run)
    old = {path.name: path.read_bytes() for path in place.run.iterdir()}
    assert run_main(train.main, place.train("--fresh", "epochs=1", "optim.lr=0.5")) == 0
    assert load(place.run / "latest.pth")["step"] == 3
    (aside,) = place.run.parent.glob("run.*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == old


def test_a_diverged_run_saves_nothing_and_says_what_to_lower(place, capsys):
    assert run_main(train.main, place.train("optim.max_skipped=2", "optim=sgd", "optim.lr=1e9")) == 2
    message = capsys.readouterr().err
    assert "optim.lr" in message and "step 3: the last 2 steps had no finite gradient" in message
    assert "images/labeled/labeled" in message and "images/unlabeled/unlabeled" in message
    assert not (place.run / "latest.pth").exists()
    content = load(place.run / "stopped.pth")
    assert content["step"] == 3 and len(content["images"]) == 4


# Two processes


@pytest.fixture(scope="module")
def launched(finished, start_process, tmp_path_factory):
    """train.py under torchrun on two CPU processes, its first epoch supervised: (folder of the run, the launcher).

    Started with the module's first test and waited for by the last that needs it.
    """
    run = tmp_path_factory.mktemp("two") / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["--config", finished.config, "--save-path", run, "log_interval=1", "burn_in_epochs=1"]
    yield run, start_process([*launcher, "train.py", *words])
    for file in run.glob("*.pth"):
        file.unlink()


@pytest.fixture(scope="module")
def two_processes(launched):
    """(folder of the finished run, what was printed)."""
    run, process = launched
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return run, out


def test_torchrun_gives_one_log_and_one_checkpoint(two_processes, read_metrics):
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


def test_one_process_and_two_give_the_same_scores(two_processes, read_metrics, start_process, tmp_path):
    run, _ = two_processes
    words = ["--checkpoint", run / "latest.pth", "--device", "cpu", "--json"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # what a launcher sets
    pair = [start_process(["eval.py", *words, tmp_path / "2.json"], RANK=r, LOCAL_RANK=r, **group) for r in (0, 1)]
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


# Recipes


def test_an_override_reaches_the_printed_recipe_by_its_full_or_last_key(capsys):
    words = ["optim.lr=6e-4", "--dataset", "pascal", "lr_multi=3", "--method", "fixmatch", "method.threshold=0.5"]
    assert run_main(train.main, [*words, "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["optim"]["lr"], printed["optim"]["lr_multi"], printed["method"]["threshold"]) == (6e-4, 3.0, 0.5)


@pytest.mark.parametrize("words", [["--local-rank=0"], ["--local_rank", "0"], ["--local_rank=1"], ["--port", "29511"]])
def test_words_of_launchers_are_accepted_and_change_nothing(words, capsys):
    plain = ["--dataset", "shapes", "--method", "allspark", "--print-config"]
    assert run_main(train.main, plain) == 0
    expected = capsys.readouterr().out
    assert run_main(train.main, [*words, *plain]) == 0
    assert capsys.readouterr().out == expected


def test_an_unknown_option_of_the_method_is_named_before_data_is_touched(capsys):
    words = ["--dataset", "pascal", "--method", "fixmatch", "method.treshold=0.5", "data_root=/nowhere"]
    assert run_main(train.main, [*words, "--print-config"]) == 2
    message = capsys.readouterr().err
    assert "method.treshold" in message and "threshold" in message.replace("treshold", "")


def test_supervised_with_the_bottleneck_is_refused_with_the_reason(place, capsys):
    words = ("--method", "supervised", "--save-path", place.run, "model.bottleneck=allspark")
    assert run_main(train.main, place.lists(*words)) == 2
    message = capsys.readouterr().err
    assert "model.bottleneck=allspark" in message and "gradient" in message and "model.bottleneck=none" in message


# Weights


def test_a_checkpoint_is_fine_tuned_to_other_classes_and_another_crop(finished, place, capsys):
    source = finished.run / "latest.pth"
    words = (f"model.init_from={source}", "crop_size=97", "batch_size=4", NO_STEP)
    assert run_main(train.main, place.lists("--method", "allspark", "--save-path", place.run, *words)) == 0
    old, new = load(source)["model"], load(place.run / "latest.pth")["model"]
    fresh = {name for name in new if name.startswith(("decoder.classifier.", "bottleneck.memory."))}
    statistics = {name for name in new if ".bn.running_" in name or name.endswith("num_batches_tracked")}
    taken = new.keys() - fresh - statistics
    assert_same_tensors({name: old[name] for name in taken}, {name: new[name] for name in taken})
    assert len(new["decoder.classifier.weight"]) == 21 and len(old["decoder.classifier.weight"]) == 3
    assert new["bottleneck.memory.queue"].shape != old["bottleneck.memory.queue"].shape
    said = capsys.readouterr().out + (place.run / "train.log").read_text(encoding="utf-8")
    assert said.count(f"init_from {source}: took {len(taken | statistics)} tensors") == 2
    assert "decoder.classifier" in said and "bottleneck.memory" in said


def test_encoder_weights_are_taken_under_the_names_of_the_original_files(place):
    names = json.loads(NAMES.read_text(encoding="utf-8"))["b0_pascal_crop65"]
    encoder = {name.removeprefix("backbone."): shape for name, shape in names.items() if name.startswith("backbone.")}
    torch.manual_seed(0)
    original = {name: 0.02 * torch.randn(shape) for name, shape in encoder.items()}
    original["head.weight"] = torch.zeros(1000, 256)  # of the ImageNet classifier
    torch.save(original, place.root / "mit_b0.pth")
    words = (f"model.pretrained={place.root}/mit_b0.pth", "batch_size=4", NO_STEP)
    assert run_main(train.main, place.lists("--method", "selftrain", "--save-path", place.run, *words)) == 0
    state = load(place.run / "latest.pth")["model"]
    for theirs, ours in (
        ("patch_embed1.proj.weight", "encoder.stages.0.patch_embed.proj.weight"),
        ("block3.1.attn.kv.weight", "encoder.stages.2.blocks.1.attn.kv.weight"),
        ("block1.0.mlp.dwconv.dwconv.bias", "encoder.stages.0.blocks.0.ffn.dwconv.bias"),
        ("norm4.weight", "encoder.stages.3.norm.weight"),
    ):
        assert torch.equal(original[theirs], state[ours]), ours
    expected = {f"encoder.{from_released(name)}": tensor for name, tensor in original.items() if name in encoder}
    assert_same_tensors(expected, {name: tensor for name, tensor in state.items() if name.startswith("encoder.")})
    log = (place.run / "train.log").read_text(encoding="utf-8")
    assert f"mit_b0.pth: {len(encoder)} tensors, left out: head.weight" in log
