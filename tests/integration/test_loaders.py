"""Training batches: their contents; the draws of a sample depend on (seed, epoch, position) only."""

import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from allspark.config import CustomDataConfig, DataConfig
from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views, normalize
from allspark.data.datasets import spec_for
from allspark.data.loaders import REPLACEMENTS, StepSampler, TrainLoader
from allspark.data.spec import Sample
from allspark.data.splits import Lists
from allspark.data.worker_pool import make_loader, worker_count
from allspark.utils.errors import UserError

VIEWS = Views(labeled="strong", strong=("strong", "strong"), cutmix=0.5)
DATA = DataConfig(
    dataset="mine", data_root=".", crop_size=64, num_workers=0, custom=CustomDataConfig(classes=("a", "b", "c"))
)
SPEC = spec_for(DATA)
CPU = torch.device("cpu")


@pytest.fixture
def lists(tmp_path) -> Lists:
    """5 labeled and 11 unlabeled images of 48 x 40, none of their pixels black."""
    rng, samples = np.random.default_rng(0), []
    for index in range(16):
        image = rng.integers(60, 256, (40, 48, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        Image.fromarray(rng.integers(0, 3, (40, 48), np.uint8)).save(tmp_path / f"{index}_mask.png")
        samples.append(Sample(tmp_path / f"{index}.png", tmp_path / f"{index}_mask.png"))
    unlabeled = tuple(Sample(sample.image) for sample in samples[5:])
    return Lists(tuple(samples[:5]), unlabeled, tuple(samples[:1]), hash="", name="tiny", hidden=tuple(samples[5:]))


FLIPS = {
    "horizontal_flip": lambda image: image[:, ::-1],
    "vertical_flip": lambda image: image[::-1],
    "rotate_90": lambda image: np.rot90(image),
}
CHANGEABLE = ("num_workers", "photometric", "photometric_probability", "cache", "on_bad_sample", "color_strength")
CHANGEABLE += ("crop_size", "scale_range", *FLIPS)


def loader(lists: Lists, views: Views = VIEWS, batch_size: int = 4, seed: int = 3, **options) -> TrainLoader:
    changed = {key: options.pop(key) for key in CHANGEABLE if key in options}
    return TrainLoader(lists, SPEC, replace(DATA, **changed), views, batch_size, seed, **options)


def epoch_of(train: TrainLoader, epoch: int = 0, start_step: int = 0) -> list[list[torch.Tensor]]:
    train.set_epoch(epoch, start_step)
    return [tensors(*step) for step in train.on(CPU)]


def tensors(labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> list[torch.Tensor]:
    found = [labeled.image, labeled.mask]
    if unlabeled is not None:
        found += [unlabeled.weak, unlabeled.valid, *unlabeled.strong, *unlabeled.cutmix]
    return found


def equal(first: list[list[torch.Tensor]], second: list[list[torch.Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


def indices(train: TrainLoader, epoch: int) -> list[tuple[int, int]]:
    train.set_epoch(epoch)
    return [(key[2], key[3]) for step in train.sampler for key in step]


def test_shapes_and_types(lists):
    train = loader(lists)
    assert train.steps_per_epoch == 2
    (labeled, unlabeled), _ = list(train.on("cpu"))
    assert labeled.image.shape == unlabeled.weak.shape == (4, 3, 64, 64)
    assert labeled.image.dtype == torch.float32 and labeled.image.min() < -1.5  # normalized
    assert labeled.mask.shape == (4, 64, 64) and labeled.mask.dtype == torch.int64
    assert set(labeled.mask.unique().tolist()) <= {0, 1, 2, 255}
    assert len(unlabeled.strong) == len(unlabeled.cutmix) == 2
    assert all(view.shape == unlabeled.weak.shape for view in unlabeled.strong)
    assert all(box.shape == (4, 64, 64) and box.dtype == torch.bool for box in (unlabeled.valid, *unlabeled.cutmix))


def test_worker_count_is_irrelevant(lists):
    alone, helped = loader(lists), loader(lists, num_workers=2)
    assert len(pickle.dumps(helped.pairs)) > 0  # where workers are not forked they get it so
    for epoch in (0, 1):  # the second epoch finds the workers of the first
        assert equal(epoch_of(alone, epoch), epoch_of(helped, epoch))


class CountsThreads(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return max(cv2.getNumThreads(), torch.get_num_threads())


def test_workers_have_one_thread():
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(2), torch.set_num_threads(2)
    try:
        assert [int(batch) for batch in make_loader(CountsThreads(), 1, batch_size=1)] == [1, 1]
    finally:
        cv2.setNumThreads(threads[0]), torch.set_num_threads(threads[1])


def test_default_workers_per_core(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert worker_count(0) == 0 and worker_count(20) == 20
    cores = os.sched_getaffinity(0)
    assert worker_count(None) == min(8, len(cores))
    try:
        os.sched_setaffinity(0, {min(cores)})  # as a batch system gives a process its cores
        assert worker_count(None) == 1
    finally:
        os.sched_setaffinity(0, cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(max(1, len(cores) // 2)))  # torchrun's processes share the machine
    assert worker_count(None) == min(8, len(cores) // max(1, len(cores) // 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert worker_count(None) == 1


def test_photometric_backends_share_draws(lists):
    """Nearly the same pixels; what is not photometric is the same."""
    fast, exact = (epoch_of(loader(lists, photometric=name), 1) for name in ("cv2", "pil"))
    for one, two in zip(fast, exact, strict=True):
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            photometric = index in (0, 4, 5)  # the labeled images and the strong views
            assert torch.equal(a, b) != photometric
            assert not photometric or (a - b).abs().mean() < 0.05  # in standard deviations; a gray level is 0.017


def test_photometric_probability_per_view(lists):
    """0: each is the weak crop; between: some are it, some what they are at 1, and geometry and masks never change."""

    def views(probability):
        train = loader(lists, Views("strong", ("strong", "imas"), 0.5), photometric_probability=probability)
        return [step for epoch in range(12) for step in epoch_of(train, epoch)]

    none, half, full = map(views, (0.0, 0.5, 1.0))
    weak = epoch_of(loader(lists, Views("weak", ("weak", "weak"), 0.5)))
    assert all(torch.equal(a, b) for i in (0, 1, 2, 3, 4, 5) for a, b in zip(none[0][i], weak[0][i], strict=True))
    for index in (0, 4, 5):
        one, two, three = (torch.cat([step[index] for step in steps]) for steps in (none, half, full))
        same = [(a == b).all((1, 2, 3)).float().mean().item() for a, b in ((one, two), (one, three))]
        assert 0.35 < same[0] < 0.75 and same[1] < 0.25, (index, same)
    assert all(torch.equal(a[i], b[i]) for a, b in zip(none, full, strict=True) for i in (1, 2, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_is_irrelevant(lists, tmp_path, workers):
    plain = [epoch_of(loader(lists), epoch) for epoch in (0, 1)]
    cached = loader(lists, num_workers=workers, cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists(), "it is made when batches are asked for, not before"
    assert all(equal(batches, epoch_of(cached, epoch)) for epoch, batches in enumerate(plain))
    for sample in (*lists.labeled, *lists.unlabeled):
        sample.image.unlink()  # nobody opens it any more
    assert all(equal(batches, epoch_of(cached, epoch)) for epoch, batches in enumerate(plain))


def test_cache_contents(lists, tmp_path):
    """No label of an unlabeled image; no unlabeled image where none is read."""
    for sample in lists.hidden:
        sample.mask.write_bytes(b"not a mask")
    epoch_of(loader(lists, cache=str(tmp_path / "cache")))
    epoch_of(loader(lists, Views(unlabeled=False), cache=str(tmp_path / "alone")))
    sizes = {
        root: sorted(p.stat().st_size // (40 * 48) for p in (tmp_path / root).glob("*/pixels"))
        for root in ("cache", "alone")
    }
    assert sizes == {"cache": [5, 16 * 3], "alone": [5, 5 * 3]}


def test_one_process_is_union_of_two(lists):
    whole = epoch_of(loader(lists), 1)
    parts = [epoch_of(loader(lists, rank=rank, world_size=2), 1) for rank in (0, 1)]
    joined = [[torch.cat(pair) for pair in zip(*steps, strict=True)] for steps in zip(*parts, strict=True)]
    assert equal(whole, joined)


def test_start_at_any_step(lists):
    train = loader(lists, num_workers=2)
    whole = epoch_of(train, 4)
    train.set_epoch(2)
    next(iter(train.on(CPU)))  # an epoch that was left in the middle
    assert equal(whole[1:], epoch_of(train, 4, start_step=1))
    assert equal(whole[1:], epoch_of(loader(lists), 4, start_step=1))


def test_seed_and_epoch_change_draws(lists):
    base = epoch_of(loader(lists), 0)
    assert not equal(base, epoch_of(loader(lists), 1))
    assert not equal(base, epoch_of(loader(lists, seed=4), 0))


def test_global_generators_are_untouched(lists):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        epoch_of(loader(lists, num_workers=workers))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_views_and_masks_are_aligned(lists):
    """With views that change no color every tensor of a sample must show the same crop."""
    train = loader(lists, Views(labeled="weak", strong=("weak",)))
    for labeled, unlabeled in train.on(CPU):
        assert torch.equal(unlabeled.weak, unlabeled.strong[0])
        black = normalize(torch.zeros(3, 1, 1, dtype=torch.uint8))
        assert torch.equal(unlabeled.valid, (unlabeled.weak != black).any(1))  # no image pixel is black
        padding = (labeled.image == black).all(1)
        assert torch.equal(padding, labeled.mask == 255) and padding.any()


def test_added_view_changes_no_other(lists):
    """A view draws from a stream of its own."""
    few = epoch_of(loader(lists, Views(labeled="weak", strong=("strong",), cutmix=1.0)))
    many = epoch_of(loader(lists, Views(labeled="weak", strong=("strong", "strong"), cutmix=1.0)))
    for one, two in zip(few, many, strict=True):
        image, mask, weak, valid, strong, cutmix = one
        assert all(torch.equal(a, b) for a, b in zip((image, mask, weak, valid), two, strict=False))
        assert torch.equal(strong, two[4]) and torch.equal(cutmix, two[6])
        assert not torch.equal(two[4], two[5]) and not torch.equal(two[6], two[7])


def test_padding_is_invalid(lists):
    scales = replace(DATA, scale_range=(1.0, 1.0))
    train = TrainLoader(lists, SPEC, scales, VIEWS, 4, 0)
    for _, unlabeled in train.on(CPU):
        assert (unlabeled.valid.sum((1, 2)) == 48 * 40).all()


def test_primary_list_is_seen_once(lists):
    train = loader(lists, batch_size=4)
    drawn = [indices(train, epoch) for epoch in range(5)]
    for pairs in drawn:
        assert len(pairs) == len({unlabeled for _, unlabeled in pairs}) == 8
    assert drawn[0] != drawn[1]
    labeled = [index for pairs in drawn for index, _ in pairs]
    for start in range(0, 40, 5):  # permutations one after the other, over the ends of epochs
        assert sorted(labeled[start : start + 5]) == [0, 1, 2, 3, 4]


def test_epoch_of_labeled(lists):
    train = loader(lists, batch_size=2, epoch_of="labeled")
    assert train.steps_per_epoch == 2
    drawn = [indices(train, epoch) for epoch in range(11)]
    assert all(len({labeled for labeled, _ in pairs}) == 4 for pairs in drawn)
    counts = np.bincount([unlabeled for pairs in drawn for _, unlabeled in pairs], minlength=11)
    assert (counts == 4).all()


def test_rank_positions():
    whole = list(StepSampler((5, 11), 1, 4, seed=0, rank=0, world_size=1))
    parts = [list(StepSampler((5, 11), 1, 4, seed=0, rank=rank, world_size=4)) for rank in range(4)]
    assert [[key for part in step for key in part] for step in zip(*parts, strict=True)] == whole
    assert [key[1] for step in whole for key in step] == list(range(8))


def test_supervised_reads_no_unlabeled(lists):
    for sample in lists.unlabeled:
        Path(sample.image).unlink()
    train = loader(lists, Views(labeled="weak", unlabeled=False))
    steps = list(train.on(CPU))
    assert len(steps) == train.steps_per_epoch == 2  # as long as the others': the epoch is still the unlabeled list's
    assert all(unlabeled is None for _, unlabeled in steps)
    alone = replace(lists, unlabeled=())
    assert len(list(loader(alone, Views(unlabeled=False), batch_size=5, epoch_of="labeled").on(CPU))) == 1


def test_unlabeled_masks_are_never_opened(lists):
    before = epoch_of(loader(lists))
    for sample in lists.hidden:
        sample.mask.write_bytes(b"not a mask")
    assert equal(before, epoch_of(loader(lists)))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_message(lists, workers):
    lists.labeled[2].image.write_bytes(b"\x89PNG")
    with pytest.raises(UserError) as caught:
        epoch_of(loader(lists, num_workers=workers))
    assert str(caught.value).startswith(f"{lists.labeled[2].image}: truncated") and "\n" not in str(caught.value)


def damaged(lists: Lists) -> Lists:
    """A truncated labeled image, an illegal mask, a mask of another size, two unlabeled images that are none."""
    first, second, third, *_ = lists.labeled
    first.image.write_bytes(first.image.read_bytes()[:100])
    Image.fromarray(np.full((40, 48), 9, np.uint8)).save(second.mask)
    Image.fromarray(np.zeros((40, 47), np.uint8)).save(third.mask)
    for sample in lists.unlabeled[2:4]:
        sample.image.write_bytes(b"GIF89a, says this text")
    return lists


def test_bad_samples_are_replaced(lists):
    train, told = loader(damaged(lists), on_bad_sample="skip"), []
    for epoch in range(5):
        train.set_epoch(epoch)
        for labeled, unlabeled in train.on(CPU, told.append):
            assert labeled.mask.max() <= 255 and len(unlabeled.weak) == 4
    warnings = [note for note in told if note.startswith("WARNING")]
    paths = [sample.image for sample in lists.labeled[:3]] + [sample.image for sample in lists.unlabeled[2:4]]
    assert len(warnings) == len(paths) == len(train.bad)
    for path in paths:
        assert len([note for note in warnings if re.search(rf"{path.with_suffix('')}(_mask)?\.png", note)]) == 1
    summaries = [note for note in told if note not in warnings]
    assert len(summaries) == 5 and f"{sum(train.bad.values())} samples replaced" in summaries[-1]
    # 40 places of labeled samples, 3 of 5 of them bad, and what stands in may be bad again
    assert sum(train.bad.values()) > 24


def test_replacement_depends_on_position(lists, tmp_path):
    """Not of workers, ranks, the cache, where an epoch is entered, or what was read before."""
    whole = [epoch_of(loader(damaged(lists), on_bad_sample="skip"), epoch) for epoch in (0, 1)]
    cached = loader(lists, on_bad_sample="skip", num_workers=2, cache=str(tmp_path / "cache"))
    again = loader(lists, on_bad_sample="skip", cache=str(tmp_path / "cache"))  # as the first one left it
    for epoch, batches in enumerate(whole):
        assert equal(batches, epoch_of(cached, epoch)) and equal(batches, epoch_of(again, epoch))
    assert equal(whole[1][1:], epoch_of(loader(lists, on_bad_sample="skip"), 1, start_step=1))
    parts = [epoch_of(loader(lists, on_bad_sample="skip", rank=rank, world_size=2), 1) for rank in (0, 1)]
    joined = [[torch.cat(pair) for pair in zip(*steps, strict=True)] for steps in zip(*parts, strict=True)]
    assert equal(whole[1], joined)


def test_other_samples_are_unchanged(lists):
    """Without a bad sample skip changes nothing, and with one nothing but its place."""
    before = epoch_of(loader(lists))
    assert equal(before, epoch_of(loader(lists, on_bad_sample="skip")))
    order = [unlabeled for _, unlabeled in indices(loader(lists), 0)]
    lists.unlabeled[order[1]].image.write_bytes(b"")
    after = epoch_of(loader(lists, on_bad_sample="skip"))
    same = [[torch.equal(a[i], b[i]) for i in range(4)] for a, b in zip(before[0][2:3], after[0][2:3], strict=True)]
    assert same == [[True, False, True, True]]
    assert torch.equal(before[0][0], after[0][0])


def test_only_bad_samples_end_the_run(lists):
    for sample in lists.unlabeled:
        sample.image.write_bytes(b"")
    with pytest.raises(UserError, match=rf"\.png: .*{REPLACEMENTS + 1} samples in a row cannot be read"):
        epoch_of(loader(lists, on_bad_sample="skip"))
    for sample in lists.labeled[1:]:
        sample.image.unlink()
    with pytest.raises(UserError, match="samples in a row cannot be read"):
        epoch_of(loader(lists, on_bad_sample="skip"))


def test_other_errors_are_not_skipped(lists, monkeypatch):
    """Else a machine short of memory would train on other images."""

    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    with pytest.raises(UserError, match="the machine is out of resources"):
        epoch_of(loader(lists, on_bad_sample="skip"))


def test_error_is_the_default(lists):
    with pytest.raises(UserError, match=r"truncated.*data\.on_bad_sample=skip"):
        epoch_of(loader(damaged(lists)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3, "world_size": 2}, "batch_size: 3 .*2 processes"),
        ({"batch_size": 12}, "11 unlabeled images are fewer than one batch of 12.*epoch_of=labeled"),
        ({"batch_size": 6, "epoch_of": "labeled"}, "5 labeled images are fewer than one batch of 6"),
        ({"views": Views(strong=("loud",))}, "'loud'; choose one of weak, strong"),
    ],
)
def test_impossible_settings(lists, options, message):
    with pytest.raises(UserError, match=message):
        loader(lists, **options)


def test_missing_lists(lists):
    with pytest.raises(UserError, match=r"split tiny: no unlabeled images.*unlabeled_id_path"):
        loader(replace(lists, unlabeled=()))
    with pytest.raises(UserError, match=r"split tiny: no unlabeled images, .*; set epoch_of=labeled"):
        loader(replace(lists, unlabeled=()), views=Views(unlabeled=False))
    with pytest.raises(UserError, match=r"split tiny: no labeled images.*labeled_id_path"):
        loader(replace(lists, labeled=()))


@pytest.mark.parametrize("flip", [None, *FLIPS])
def test_flips_are_those_of_the_recipe(lists, tmp_path, flip):
    """With crops as large as the images, each view is the image or one that the option allows; both occur."""
    if flip == "rotate_90":
        for path in tmp_path.glob("*.png"):
            image = np.array(Image.open(path))
            Image.fromarray(image[:40, :40]).save(path)
    options = {**dict.fromkeys(FLIPS, False), **({flip: True} if flip else {})}
    crop = 40 if flip == "rotate_90" else (40, 48)
    train = loader(lists, Views(), crop_size=crop, scale_range=(1.0, 1.0), **options)
    originals = {sample.image: np.array(Image.open(sample.image)) for sample in lists.labeled}
    turn, seen = FLIPS.get(flip), set()
    for epoch in range(6):
        for key in keys_of(train, epoch):
            labeled = train.pairs[key][0]
            image, original = labeled.image.permute(1, 2, 0).numpy(), originals[lists.labeled[key[2]].image]
            allowed = [original]
            for _ in range(0 if turn is None else 3 if flip == "rotate_90" else 1):
                allowed.append(turn(allowed[-1]))
            seen |= {number for number, each in enumerate(allowed) if np.array_equal(image, each)}
            assert any(np.array_equal(image, each) for each in allowed)
    assert seen == set(range(len(allowed)))


def keys_of(train, epoch):
    train.set_epoch(epoch)
    return [key for step in train.sampler for key in step]


def test_color_strength(lists):
    """0 leaves the colors as they are; the rest of this policy is color jitter."""
    views = Views(labeled="pseudoseg")
    for strength, same in ((0.0, True), (1.0, False)):
        found = []
        for each in (views, Views()):
            train = loader(lists, each, photometric="pil", color_strength=strength)
            found.append(torch.stack([train.pairs[key][0].image for key in keys_of(train, 0)]).int())
        assert ((found[0] - found[1]).abs().max() <= 8) == same  # the hue is rounded


def test_labeled_and_unlabeled_draws_are_independent(lists):
    """The same image at the same position, once labeled and once not, has other crops; also at other positions."""
    same = replace(lists, labeled=lists.labeled[:1] * 8, unlabeled=(Sample(lists.labeled[0].image),) * 8)
    train = loader(same, Views(), crop_size=64, batch_size=8)
    pairs = [train.pairs[key][:2] for key in keys_of(train, 0)]
    assert sum(torch.equal(labeled.image, unlabeled.weak) for labeled, unlabeled in pairs) <= 1
    assert len({labeled.image.numpy().tobytes() for labeled, _ in pairs}) > 6
