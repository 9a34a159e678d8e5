"""train.py from the command line to its output files: every method, recipes, fine-tuning."""

import json
import math
import re
import time

import pytest
import torch
import torch.nn.functional as F
import yaml

import train
from allspark import __main__ as verbs
from allspark.config_io import load_recipe
from allspark.engine.log import RunLog
from allspark.engine.writers import read_metrics
from allspark.inference import load_for_inference
from allspark.utils.errors import run_main
from helpers.networks import CASES, learning
from helpers.released import NAMES, rename_released
from helpers.runs import FILES, assert_finite_losses, assert_same_tensors, load

NO_STEP = "optim.lr=1e-30"  # a run whose weights stay where they were to the last bit

pytestmark = pytest.mark.usefixtures("one_thread")


# A run


def test_output_files(finished):
    names = {path.name for path in finished.run.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert names - events == FILES
    assert len(events) == 1


def test_metrics_lines(finished, read_metrics):
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


def test_log_contents(finished):
    log = (finished.run / "train.log").read_text(encoding="utf-8")
    for words in ("tiny", "4 labeled, 6 unlabeled, 2 val images", "mit_b0", "6 steps", "epoch 1: mIoU"):
        assert words in log


def test_a_run_says_where_it_is_and_how_to_go_on(finished):
    log = (finished.run / "train.log").read_text(encoding="utf-8")
    assert log.splitlines()[0].endswith(f"run folder: {finished.run}")
    assert re.search(r"step 2/6, epoch 1, loss [\d.]+, loss_u [\d.]+, lr \S+e-\d+, [\d.]+ images/s, \S+ left\n", log)
    assert log.count("images/s") == 1  # the next one only after a minute
    end = log[log.index("class ") :]
    assert all(re.search(rf"^{name} +[\d.]+", end, re.MULTILINE) for name in ("ground", "left", "right"))
    for command in (f"eval --checkpoint {finished.run}\n", f"predict --checkpoint {finished.run}", "report"):
        assert f"allspark {command}" in end


def test_progress_line_every_minute(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with RunLog(tmp_path, active=True, interval=1, start_step=10, total_steps=100) as log:
        for step in range(11, 31):
            now[0] += 10
            log.add({"loss": torch.tensor(0.5)}, step=step, epoch=1, lr=0.1, images=4)
            if step == 15:
                log.evaluation(step=15, epoch=1, miou=42.0, iou={})
    lines = [line.partition("  ")[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert [line.split(",")[0] for line in lines] == ["step 11/100", "step 17/100", "step 23/100", "step 29/100"]
    assert lines[1] == "step 17/100, epoch 2, loss 0.500, lr 1.00e-01, mIoU 42.00, 0.4 images/s, 13:50 left"


def test_waiting_for_the_first_batch_is_no_training(tmp_path, monkeypatch):
    """While workers start or a cache is filled; later waits count."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def batches():
        for wait in (1000, 1, 1, 9):
            now[0] += wait
            yield wait

    with RunLog(tmp_path, active=True, interval=2, start_step=0, total_steps=4) as log:
        for step, _ in enumerate(log.exclude_startup(batches()), 1):
            now[0] += 1
            log.add({"loss": torch.tensor(0.5)}, step=step, epoch=0, lr=0.1, images=3)
    speeds = [line["images_per_s"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert speeds == [2.0, 0.5]  # 6 images in 3 s, and in 12 s


def test_checkpoints_hold_plain_values(finished):
    for name in ("latest.pth", "best.pth"):
        content = load(finished.run / name)
        assert content["recipe"] == yaml.safe_load((finished.run / "config.yaml").read_text(encoding="utf-8"))
    content = load(finished.run / "latest.pth")
    assert (content["epoch"], content["step"]) == (2, 6)
    assert content["model"]["bottleneck.memory.queue"].abs().sum() > 0


def test_best_checkpoint_is_of_best_evaluation(finished, read_metrics):
    evaluations = read_metrics(finished.run)[1]
    best = max(evaluations, key=lambda line: line["miou"])
    assert load(finished.run / "best.pth")["step"] == best["step"]
    assert math.isclose(load(finished.run / "latest.pth")["best"]["miou"], best["miou"], abs_tol=1e-4)


def test_tensorboard_scalars(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(finished.run)).Reload()
    assert {"train/loss", "train/lr", "eval/miou", "eval_iou/left"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/miou")] == [3, 6]


def test_tensorboard_images_and_memory(finished, read_metrics):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(finished.run)).Reload()
    names = events.Tags()["images"]
    assert len([name for name in names if name.startswith("val/")]) == 2
    shown = events.Images(next(name for name in names if name.startswith("val/")))
    assert [one.step for one in shown] == [3, 6] and shown[0].width > 3 * shown[0].height  # image, truth, prediction
    fill = read_metrics(finished.run)[1][-1]["memory"]
    assert list(fill) == ["ground", "left", "right"] and 0 < max(fill.values()) <= 100
    assert events.Scalars("memory/left")[-1].value == pytest.approx(fill["left"])


def test_picture_budget():
    def shown(epochs, interval):
        recipe = load_recipe("camvid", "supervised", {"epochs": epochs, "evaluation.interval": interval})
        evaluated = [epoch for epoch in range(epochs) if epoch + 1 == epochs or (epoch + 1) % interval == 0]
        return [epoch for epoch in evaluated if train.pictures_after(epoch, recipe)]

    assert shown(3, 1) == [0, 1, 2] and shown(7, 3) == [2, 5, 6]
    assert len(shown(240, 1)) == 20 and shown(240, 1)[-1] == 239 and 20 <= len(shown(90, 2)) <= 24


# The batch


def test_gradient_accumulation(place, read_metrics):
    train.main(place.train("micro_batch=1", "epochs=1", "warmup_epochs=0"))
    assert_finite_losses(read_metrics(place.run)[0])
    log = (place.run / "train.log").read_text(encoding="utf-8")
    assert "3 steps of 2 labeled images (2 micro-batches x 1 images)" in log and "one micro-batch at a time" in log
    assert "CutMix has no other image" not in log  # AllSpark has none
    assert [line["step"] for line in read_metrics(place.run)[1]] == [3]


@pytest.mark.parametrize("name", ["fixmatch", "imas"])
def test_cutmix_without_partner_warns(name, place):
    words = ["model.encoder=tiny", "micro_batch=1"]
    train.main(place.lists("--method", name, "--save-path", place.run, *words))
    log = (place.run / "train.log").read_text(encoding="utf-8")
    assert "micro-batches of one image: CutMix has no other image to paste from and is off" in log


def test_recipe_difference_table(place, capsys):
    words = ("optim.lr=0.01", "lr_scaling=linear", "seed=3")
    train.main(place.lists("--method", "supervised", "--save-path", place.run, *words))
    lines = (place.run / "train.log").read_text(encoding="utf-8").splitlines()
    rows = {line.split()[2]: line.split()[3:] for line in lines if len(line.split()) > 4}
    assert rows["differs"][-2:] == ["there", "here"]
    assert rows["batch_size"] == ["16", "2"] and rows["optim.lr"] == ["0.001", "0.01"] and rows["seed"] == ["0", "3"]
    assert rows["learning"] == ["rate", "0.01", "(batch", "16)", "0.00125", "(batch", "2)"]
    assert yaml.safe_load((place.run / "config.yaml").read_text(encoding="utf-8"))["optim"]["lr_batch"] == 16
    first = json.loads((place.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["lr"] == pytest.approx(0.00125)


@pytest.mark.parametrize(("name", "bottleneck"), CASES)
def test_every_method_trains(name, bottleneck, place, read_metrics):
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


def test_crops_that_are_not_square(place, read_metrics, tmp_path, capsys):
    """Training, sliding windows, memory, checkpoint and imported weights with crops of height 65 and width 97."""
    words = ("epochs=1", "warmup_epochs=0", "crop_size=[65, 97]", "vertical_flip=true", "rotate_90=true")
    train.main(place.train(*words, "evaluation.mode=sliding_window"))
    steps, evaluations = read_metrics(place.run)
    assert_finite_losses(steps)
    assert len(evaluations) == 1
    loaded = load_for_inference(place.run / "latest.pth", torch.device("cpu"))
    assert (loaded.crop_size, loaded.inference("sliding_window").window) == ((65, 97), (65, 97))
    assert loaded.model.bottleneck.memory.size == (3, 4)
    assert run_main(verbs.main, ["weights", "inspect", str(place.run / "latest.pth")]) == 0, capsys.readouterr().err
    words = ["weights", "import", str(place.run / "latest.pth"), "--out", str(tmp_path / "imported.pth")]
    assert run_main(verbs.main, words) == 0
    assert load_for_inference(tmp_path / "imported.pth", torch.device("cpu")).crop_size == (65, 97)
    assert run_main(train.main, place.train("epochs=1", "warmup_epochs=0", "crop_size=[65]")) == 2


def test_burn_in_logs_labeled_loss(place, read_metrics):
    words = ("burn_in_epochs=1", "epochs=2", "log.interval=3")
    assert run_main(train.main, place.lists("--method", "selftrain", "--save-path", place.run, *words)) == 0
    start, rest = read_metrics(place.run)[0]
    assert "loss_u" not in start and "loss_u" in rest


def test_default_save_path_and_data_root(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place.edit(data={"data_root": "/nowhere"})
    monkeypatch.setenv("ALLSPARK_DATA_TINY", str(place.root))
    assert run_main(train.main, ["--config", str(place.config), "epochs=1", "warmup_epochs=0"]) == 0
    assert (tmp_path / "exp" / "tiny" / "allspark" / "own" / "latest.pth").is_file()


# Recipes


def test_overrides_by_full_and_last_key(capsys):
    words = ["optim.lr=6e-4", "--dataset", "pascal", "lr_multi=3", "--method", "fixmatch", "method.threshold=0.5"]
    assert run_main(train.main, [*words, "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["optim"]["lr"], printed["optim"]["lr_multi"], printed["method"]["threshold"]) == (6e-4, 3.0, 0.5)


@pytest.mark.parametrize("words", [["--local-rank=0"], ["--local_rank", "0"], ["--local_rank=1"], ["--port", "29511"]])
def test_launcher_arguments_are_accepted(words, capsys):
    plain = ["--dataset", "shapes", "--method", "allspark", "--print-config"]
    assert run_main(train.main, plain) == 0
    expected = capsys.readouterr().out
    assert run_main(train.main, [*words, *plain]) == 0
    assert capsys.readouterr().out == expected


def test_unknown_method_option(capsys):
    words = ["--dataset", "pascal", "--method", "fixmatch", "method.treshold=0.5", "data_root=/nowhere"]
    assert run_main(train.main, [*words, "--print-config"]) == 2
    message = capsys.readouterr().err
    assert "method.treshold" in message and "threshold" in message.replace("treshold", "")


def test_supervised_with_bottleneck_is_refused(place, capsys):
    words = ("--method", "supervised", "--save-path", place.run, "model.bottleneck=allspark")
    assert run_main(train.main, place.lists(*words)) == 2
    message = capsys.readouterr().err
    assert "model.bottleneck=allspark" in message and "gradient" in message and "model.bottleneck=none" in message


# Weights


def test_fine_tuning_to_other_classes_and_crop(finished, place, capsys):
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
    assert said.count(f"init_from {source}: loaded {len(taken | statistics)} tensors") == 2
    assert "decoder.classifier" in said and "bottleneck.memory" in said


def test_new_layers_of_fine_tuning_start_elsewhere(place):
    """With the seed of the first run they would start where its layers of the same size did, close to their ends."""
    words = ("--method", "supervised", "batch_size=4", NO_STEP)
    assert run_main(train.main, place.lists(*words, "--save-path", place.run)) == 0
    start = load(place.run / "latest.pth")["model"]["decoder.classifier.weight"]
    other = {**load(place.run / "latest.pth"), "format": "allspark-1"}
    other["model"] = {name: value for name, value in other["model"].items() if "classifier" not in name}
    torch.save(other["model"], place.root / "others.pth")
    again = (*words, f"model.init_from={place.root / 'others.pth'}", "--save-path", place.run.with_name("fine"))
    assert run_main(train.main, place.lists(*again)) == 0
    fresh = load(place.run.with_name("fine") / "latest.pth")["model"]["decoder.classifier.weight"]
    assert F.cosine_similarity(start.flatten(1), fresh.flatten(1)).abs().max() < 0.9


def test_pretrained_encoder_names(place):
    names = NAMES["b0_pascal_crop65"]
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
    expected = {f"encoder.{rename_released(name)}": tensor for name, tensor in original.items() if name in encoder}
    assert_same_tensors(expected, {name: tensor for name, tensor in state.items() if name.startswith("encoder.")})
    log = (place.run / "train.log").read_text(encoding="utf-8")
    assert f"mit_b0.pth: {len(encoder)} tensors, unused: head.weight" in log
