"""The quality of pseudo-labels against literal loops; hidden labels are used for nothing else."""

import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing import start_processes

import train
from allspark import launch
from allspark.build import build_method, complete
from allspark.config import CustomDataConfig, DataConfig, MethodConfig, ModelConfig, Recipe
from allspark.data.audit import AuditReport, select_hidden
from allspark.data.batch import normalize
from allspark.data.datasets import spec_for
from allspark.data.image_io import read_image
from allspark.data.mask_io import read_mask
from allspark.data.spec import Sample
from allspark.data.splits import Lists, resolve
from allspark.engine.log import RunLog
from allspark.evaluation.dataset import SegmentationDataset
from allspark.evaluation.pseudo_label_quality import PseudoLabelQuality, measure_pseudo_labels
from allspark.methods import METHODS
from allspark.models.segmentor import build_model
from allspark.models.student import Student
from allspark.utils.errors import run_main
from allspark.visualization.tensorboard_images import HEAD, Snapshots

SIZES = [(40, 33), (33, 40), (40, 33), (64, 48), (40, 33), (90, 70)]  # height, width; the crops have three sizes
CROP = 36
DATA = DataConfig(
    dataset="mine", data_root=".", crop_size=64, num_workers=0, custom=CustomDataConfig(classes=("a", "b", "c"))
)
SPEC = spec_for(DATA)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


OPENED: list[str] = []  # every mask that this process opens, by any means


def note_opened(event, args):
    if event == "open" and "mask" in str(args[0]):
        OPENED.append(str(args[0]))


sys.addaudithook(note_opened)


def labeler(image, valid):
    """By the pixels alone: the brightest channel, and a confidence that is between 0 and 1 nearly everywhere."""
    assert image.dtype == torch.float32 and valid.dtype == torch.bool
    assert valid.all() and valid.shape == image[:, 0].shape
    best, label = image.max(1)
    return label, (best + 0.5) / 2


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    """Images of noise; masks that are the brightest channel in half of the pixels, 255 in a tenth."""
    rng, samples = np.random.default_rng(0), []
    for index, (height, width) in enumerate(SIZES):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        right = normalize(torch.from_numpy(image.copy()).permute(2, 0, 1)).argmax(0).numpy().astype(np.uint8)
        mask = np.where(rng.random((height, width)) < 0.5, right, rng.integers(0, 3, (height, width), np.uint8))
        mask[rng.random((height, width)) < 0.1] = 255
        sample = Sample(tmp_path / f"{index}.png", tmp_path / f"{index}_mask.png")
        Image.fromarray(image).save(sample.image)
        Image.fromarray(mask).save(sample.mask)
        samples.append(sample)
    return samples


def pixels(sample):
    """(pseudo-label, confidence, truth) of each pixel of the center crop."""
    image, mask = read_image(sample.image), read_mask(sample.mask, SPEC)
    channels = normalize(torch.from_numpy(image.copy()).permute(2, 0, 1)).tolist()
    height, width = mask.shape
    top, left = max(0, (height - CROP) // 2), max(0, (width - CROP) // 2)
    found = []
    for y in range(top, min(top + CROP, height)):
        for x in range(left, min(left + CROP, width)):
            pixel = [channel[y][x] for channel in channels]
            found.append((pixel.index(max(pixel)), (max(pixel) + 0.5) / 2, int(mask[y, x])))
    return found


def by_loops(samples, threshold):
    known = confident = right = 0
    hit, seen = [0] * 3, [0] * 3  # per class: intersection, union
    for guess, confidence, truth in (pixel for sample in samples for pixel in pixels(sample)):
        if truth == 255:
            continue
        known += 1
        if confidence < (threshold[guess] if isinstance(threshold, tuple) else threshold):
            continue
        confident += 1
        right += guess == truth
        for k in range(3):
            hit[k] += guess == k and truth == k
            seen[k] += guess == k or truth == k
    miou = 100 * sum(h / s for h, s in zip(hit, seen, strict=True)) / 3
    return PseudoLabelQuality(100 * right / confident, 100 * confident / known, miou)


def quality(samples, threshold=None, **options):
    threshold = torch.tensor(threshold) if isinstance(threshold, tuple) else threshold
    return measure_pseudo_labels(labeler, SegmentationDataset(samples, SPEC, CROP), CPU, threshold=threshold, **options)


def approx(expected):
    return pytest.approx(list(vars(expected).values()))


# The measure


@pytest.mark.parametrize("threshold", [0.6, 0.9, None, (0.5, 0.95, 0.8)])
def test_accuracy_and_coverage_equal_loops(samples, threshold):
    expected = by_loops(samples, -10 if threshold is None else threshold)
    assert expected.coverage == 100 if threshold is None else 10 < expected.coverage < 90
    assert 40 < expected.accuracy < 80
    for options in ({}, {"batch_size": 2}, {"batch_size": 6}, {"batch_size": 4, "num_workers": 1}):
        assert list(vars(quality(samples, threshold, **options)).values()) == approx(expected), options


def test_nan_is_not_confident(samples):
    """As in the loss."""

    def diverged(image, valid):
        return torch.zeros_like(valid, dtype=torch.long), torch.full(valid.shape, float("nan"))

    crops = SegmentationDataset(samples, SPEC, CROP)
    assert measure_pseudo_labels(diverged, crops, CPU, threshold=0.5).coverage == 0


def test_nothing_confident(samples):
    found = quality(samples, 1e9)
    assert found == PseudoLabelQuality(None, 0.0, None)
    assert json.loads(json.dumps(found.metrics())) == {
        "pseudo_accuracy": None,
        "pseudo_coverage": 0,
        "pseudo_miou": None,
    }
    assert str(found) == "no pixel is confident enough for a pseudo-label"


def test_no_known_pixel(samples):
    assert quality([]) is None
    Image.fromarray(np.full((40, 33), 255, np.uint8)).save(samples[0].mask)
    assert quality(samples[:1]) is None


def test_training_generator_is_untouched(samples):
    before = torch.get_rng_state()
    quality(samples, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def one_process(rank, world, port, samples, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with launch.process_group("cpu"):
        OPENED.clear()
        found = [quality(samples, 0.6, batch_size=2)]
        share = sorted(path for path in OPENED if path.endswith("_mask.png"))
        found += [quality(samples[:1], 0.6), quality([])]
        values = [None if one is None else vars(one) for one in found]
        (folder / f"rank{rank}.json").write_text(json.dumps([values, share]))


def test_two_processes_equal_one(samples, tmp_path):
    """Also where one of them has no image at all: it must not leave the other waiting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(one_process, (2, port, samples[:5], tmp_path), nprocs=2, start_method="fork")  # quick to start
    expected = [vars(quality(samples[:5], 0.6)), vars(quality(samples[:1], 0.6)), None]
    for rank in range(2):
        found, share = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found == expected
        assert share == [str(sample.mask) for sample in samples[rank:5:2]]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_measured_by_its_labels(name, samples):
    model_config = ModelConfig(encoder="mit_b0", decoder_channels=32)
    recipe = complete(Recipe(data=DATA, model=model_config, method=MethodConfig(name=name), epochs=1, batch_size=2))
    torch.manual_seed(0)
    model, method = build_model(model_config, 3, 64), build_method(recipe, SPEC)
    method.attach(model)
    if method.threshold is not None:
        method.threshold = 0.4  # of 3 classes, untrained
    model.train()
    crops = SegmentationDataset(samples, SPEC, 64)
    before = {key: value.clone() for key, value in (model.state_dict() | method.state_dict()).items()}
    random = torch.get_rng_state()
    shown = Snapshots(SPEC.palette, 2)
    run = SimpleNamespace(recipe=recipe, method=method, model=model, crops=crops, device=CPU)
    found = train.pseudo_label_quality(run, shown)
    assert [name.partition("/")[0] for name in shown.strips] == ["unlabeled"] * 2
    assert all(strip.dtype == np.uint8 and strip.shape[1] > 2 * strip.shape[0] for strip in shown.strips.values())
    assert all((strip[:HEAD] < 128).any() for strip in shown.strips.values())  # the titles

    threshold = method.threshold
    known = confident = right = 0
    for image, mask, _ in crops:
        pseudo = method.pseudo_labels(
            Student(model), normalize(image)[None], torch.ones(1, *mask.shape, dtype=torch.bool)
        )
        assert not pseudo.confidence.requires_grad
        kept = (mask != 255) & (torch.ones_like(mask).bool() if threshold is None else pseudo.confidence[0] >= 0.4)
        known, confident = known + (mask != 255).sum().item(), confident + kept.sum().item()
        right += (kept & (pseudo.label[0] == mask)).sum().item()
    assert found.coverage == pytest.approx(100 * confident / known, abs=0.1)  # a pixel may lie on the threshold
    assert found.accuracy is None or found.accuracy == pytest.approx(100 * right / confident, abs=0.1)
    assert (found.coverage == 100) == (threshold is None)

    after = model.state_dict() | method.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


# Whose labels


def test_hidden_label_lookup(tmp_path, samples):
    lines = [f"{index}.png {index}_mask.png" for index in range(6)]
    (tmp_path / "splits" / "mine" / "few").mkdir(parents=True)
    lists = {"few/labeled": lines[:1], "few/unlabeled": [*lines[:2], "2.png", *lines[3:5]], "val": lines[5:]}
    for name, text in lists.items():
        (tmp_path / "splits" / "mine" / f"{name}.txt").write_text("\n".join(text))
    samples[3].mask.unlink()
    data = replace(DATA, data_root=str(tmp_path), split="few")
    found = resolve(data, tmp_path / "splits")
    assert found.hidden == (samples[1], samples[4])  # 0 is labeled, too; 2 names none; that of 3 is gone
    assert [sample.image for sample in found.unlabeled] == [samples[index].image for index in range(5)]
    assert all(sample.mask is None for sample in found.unlabeled)

    images_alone = "\n".join(line.split()[0] for line in lists["few/unlabeled"])
    (tmp_path / "splits" / "mine" / "few" / "unlabeled.txt").write_text(images_alone)
    again = resolve(data, tmp_path / "splits")
    assert again.hidden == () and again.hash == found.hash and again.unlabeled == found.unlabeled
    assert select_hidden(again, SPEC, 64) == ([], AuditReport())


def test_sample_is_evenly_spaced(samples):
    lists = Lists((), (), (), hash="", name="tiny", hidden=tuple(samples))
    assert select_hidden(lists, SPEC, 3)[0] == samples[::2]
    good, found = select_hidden(lists, SPEC, 64)
    (note,) = found.lines
    assert good == samples and "6 unlabeled images" in note
    assert select_hidden(lists, SPEC, 0) == ([], AuditReport())


def damage_bytes(sample):
    sample.mask.write_bytes(sample.mask.read_bytes()[:60])


def damage_values(sample):
    Image.fromarray(np.full((33, 40), 7, np.uint8)).save(sample.mask)


def damage_size(sample):
    Image.fromarray(np.zeros((33, 41), np.uint8)).save(sample.mask)


def damage_image(sample):
    sample.image.write_bytes(b"\x89PNG")


def make_tiny(sample):
    for path, shape in ((sample.image, (20, 20, 3)), (sample.mask, (20, 20))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(path)


def make_folder(sample):
    sample.mask.unlink()
    sample.mask.mkdir()


@pytest.mark.parametrize("damage", [damage_bytes, damage_values, damage_size, damage_image, make_tiny, make_folder])
def test_unreadable_labels_are_skipped(samples, damage):
    whole = quality([samples[0], *samples[2:]], 0.6)
    damage(samples[1])
    good, found = select_hidden(Lists((), (), (), hash="", name="tiny", hidden=tuple(samples)), SPEC, 64)
    assert good == [samples[0], *samples[2:]]
    (warning,) = found.warnings
    assert str(samples[1].image if damage in (damage_image, make_tiny) else samples[1].mask) in warning
    assert quality(samples, 0.6) == whole  # broken since the start of the run


def test_many_broken_labels_warn_once(samples):
    for sample in samples:
        sample.mask.write_bytes(b"no mask")
    lists = Lists((), (), (), hash="", name="tiny", hidden=tuple(samples))
    good, found = select_hidden(lists, SPEC, 64)
    (warning,) = found.warnings
    assert good == [] and str(samples[0].mask) in warning and "and 5 more of 6" in warning and "\n" not in warning


# A run


def write_hidden_labels(root: Path) -> list[Path]:
    """The masks of the unlabeled images, as in helpers/tiny_dataset.py, and their list with a mask column."""
    lines, masks = [], []
    for index in range(6):
        mask = np.zeros((64, 80), np.uint8)
        mask[8:, : 20 + 4 * index], mask[8:, 50:], mask[:, -3:] = 1, 2, 255
        masks.append(root / "masks" / "unlabeled" / f"unlabeled{index}.png")
        masks[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(mask).save(masks[-1])
        lines.append(f"images/unlabeled/unlabeled{index}.png masks/unlabeled/unlabeled{index}.png\n")
    (root / "lists" / "unlabeled.txt").write_text("".join(lines), encoding="utf-8")
    return masks


def opened_masks(root, kind):
    """How often masks of a kind were opened since OPENED was cleared."""
    return sum(path.startswith(str(root / "masks" / kind)) for path in OPENED)


@pytest.fixture(scope="module")
def known(finished, tmp_path_factory):
    """The data of `finished`, its list of unlabeled images names their masks, one of which is broken: words, root."""
    root = tmp_path_factory.mktemp("known") / "data"
    shutil.copytree(finished.root, root)
    write_hidden_labels(root)[2].write_bytes(b"no mask")
    list_path = root / "lists" / "unlabeled.txt"
    return ["--config", str(finished.config), f"data_root={root}", f"data.unlabeled_id_path={list_path}"], root


@pytest.fixture(scope="module")
def measured(known, tmp_path_factory):
    """The recipe of `finished` with pseudo-labels measured: folder of the run, openings of hidden masks."""
    (words, root), run = known, tmp_path_factory.mktemp("measured") / "run"
    OPENED.clear()
    assert run_main(train.main, [*words, "--save-path", str(run)]) == 0
    yield run, opened_masks(root, "unlabeled")
    for file in run.glob("*.pth"):
        file.unlink()


def state(run):
    content = torch.load(run / "latest.pth", weights_only=True)
    tensors = [value for group in content["optimizer"]["state"].values() for value in group.values()]
    return [*content["model"].values(), *tensors]


def test_measuring_does_not_change_run(measured, finished, read_metrics):
    """Bit for bit: losses and scores, weights, memory and optimizer."""
    pseudo = {"pseudo_accuracy", "pseudo_coverage", "pseudo_miou"}
    (plain, plain_scores), (steps, scores) = read_metrics(finished.run), read_metrics(measured[0])
    for line in (*plain, *steps):
        line.pop("images_per_s")
    assert len(steps) == 4 and plain == steps
    assert len(scores) == 2 and all(pseudo <= set(line) for line in scores)
    assert plain_scores == [{key: value for key, value in line.items() if key not in pseudo} for line in scores]
    first, second = state(finished.run), state(measured[0])
    assert len(first) == len(second) > 100
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_training_opens_no_unlabeled_mask(measured, known, tmp_path):
    # All at the start, the broken one twice; at each of two evaluations those that can be read
    assert measured[1] == 7 + 2 * 5
    (words, root), run = known, tmp_path / "run"
    OPENED.clear()
    supervised = ("method=supervised", "bottleneck=none", "epochs=1")  # which makes no pseudo-labels to measure
    assert run_main(train.main, [*words, "--save-path", str(run), *supervised]) == 0
    assert opened_masks(root, "labeled") > 0 and opened_masks(root, "val") > 0
    assert opened_masks(root, "unlabeled") == 0
    assert "pseudo" not in (run / "metrics.jsonl").read_text(encoding="utf-8")
    for file in run.glob("*.pth"):
        file.unlink()


def test_run_logs_quality_despite_broken_label(measured, known, read_metrics):
    run, scores = measured[0], read_metrics(measured[0])[1]
    assert [line["pseudo_coverage"] for line in scores] == [100, 100]  # without a threshold
    assert all(0 < line["pseudo_accuracy"] < 100 for line in scores)
    log = (run / "train.log").read_text(encoding="utf-8")
    (warning,) = (line for line in log.splitlines() if "WARNING" in line)
    assert f"{known[1]}/masks/unlabeled/unlabeled2.png" in warning and "measured on 5 unlabeled images" in log
    for epoch, line in enumerate(scores):
        told = f"pseudo-labels {line['pseudo_accuracy']:.1f} % correct on 100.0 % of the pixels"
        assert any(f"epoch {epoch + 1}: mIoU {line['miou']:.2f}" in text and told in text for text in log.splitlines())
    events = EventAccumulator(str(run)).Reload()
    logged = [event.value for event in events.Scalars("eval/pseudo_accuracy")]
    assert logged == pytest.approx([line["pseudo_accuracy"] for line in scores])


def test_summary_names_last_and_best_epoch(finished, read_metrics):
    scores = [line["miou"] for line in read_metrics(finished.run)[1]]
    best = f"best {max(scores):.2f} in epoch {scores.index(max(scores)) + 1} (selected on val)"
    log = (finished.run / "train.log").read_text(encoding="utf-8")
    assert f"last epoch (2) {scores[-1]:.2f}, {best}\n" in log


def test_silent_without_known_labels(finished):
    for name in ("metrics.jsonl", "train.log"):
        assert "pseudo" not in (finished.run / name).read_text(encoding="utf-8")


def test_image_count_may_change_on_resume(finished, capsys):
    assert run_main(train.main, finished.train("evaluation.pseudo_labels=3")) == 0
    assert "is finished" in capsys.readouterr().out
    assert run_main(train.main, finished.train("evaluation.pseudo_labels=-1")) == 2
    assert "evaluation.pseudo_labels=-1 must be at least 0" in capsys.readouterr().err


def test_missing_score_is_null(tmp_path):
    log = RunLog(tmp_path, active=True, interval=1, start_step=0, total_steps=1)
    log.evaluation(step=1, epoch=0, miou=50.0, iou={"a": 50.0}, pseudo_accuracy=None, pseudo_coverage=0.0)
    log.close()
    (line,) = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["pseudo_accuracy"] is None and line["pseudo_coverage"] == 0
