"""The cache of decoded files: same pixels, built once, rebuilt when a file changes, never incomplete."""

import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allspark.config import CustomDataConfig
from allspark.data.cache import check_space, lock, open_reader
from allspark.data.datasets.custom import make_spec
from allspark.data.image_io import read_image
from allspark.data.mask_io import read_pair
from allspark.data.spec import Sample
from allspark.utils.errors import UserError

SPEC = make_spec("mine", CustomDataConfig(classes=("a", "b", "c"), value_map={0: 0, 7: 1, 9: 2, 255: 255}))
fork = multiprocessing.get_context("fork")


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    """Files of all kinds and sizes: gray, palette, alpha, 16 bits, JPEG turned by its EXIF; each with a mask."""
    rng, samples = np.random.default_rng(0), []
    pictures = {
        "rgb.png": Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)),
        "gray.png": Image.fromarray(rng.integers(0, 256, (11, 13), np.uint8)),
        "palette.png": Image.fromarray(rng.integers(0, 256, (9, 40, 3), np.uint8)).quantize(16),
        "alpha.png": Image.fromarray(rng.choice(np.array([0, 255], np.uint8), (17, 5, 4))),
        "deep.png": Image.fromarray(rng.integers(0, 2**16, (8, 8), np.uint16)),
        "turned.jpg": Image.fromarray(rng.integers(0, 256, (24, 36, 3), np.uint8)),
    }
    for name, picture in pictures.items():
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "turned.jpg" else 1
        picture.save(tmp_path / name, exif=exif)
        mask = rng.choice(np.array([0, 7, 9, 255], np.uint8), read_image(tmp_path / name).shape[:2])
        Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
        samples.append(Sample(tmp_path / name, tmp_path / f"{name}_mask.png"))
    return samples


def opened(samples: list[Sample], root: Path, spec=SPEC):
    return open_reader(str(root), spec, [s.image for s in samples], [s.mask for s in samples])


def equal(files, samples: list[Sample], spec=SPEC) -> bool:
    pairs = zip((files.pair(sample) for sample in samples), (read_pair(sample, spec) for sample in samples))
    return all(np.array_equal(a, b) and a.dtype == b.dtype for one, two in pairs for a, b in zip(one, two, strict=True))


def damage_unseen(path: Path) -> None:
    """Other bytes, the same size and time: whoever opens the file falls over it."""
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_cached_equals_decoded(samples, tmp_path, capsys):
    files = opened([*samples, samples[0]], tmp_path / "cache")
    assert equal(files, samples) and files.image(samples[1].image).shape == (11, 13, 3)
    assert equal(open_reader("none", SPEC, [], []), samples)
    announced = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", capsys.readouterr().out)]
    sizes = [path.stat().st_size for path in sorted((tmp_path / "cache").glob("*/pixels"))]
    areas = sum(read_image(sample.image).size for sample in samples)
    assert announced == sizes == [areas, areas // 3]
    with pytest.raises(ValueError, match="read-only"):
        files.image(samples[0].image)[0] = 0


def test_cache_is_built_once(samples, tmp_path, capsys):
    opened(samples, tmp_path / "cache")
    expected = [read_pair(sample, SPEC) for sample in samples]
    for sample in samples:
        damage_unseen(sample.image), damage_unseen(sample.mask)
    capsys.readouterr()
    files = opened(list(reversed(samples)), tmp_path / "cache")  # in whatever order the lists are
    found = [files.pair(sample) for sample in samples]
    assert all(np.array_equal(a, b) for one, two in zip(found, expected) for a, b in zip(one, two, strict=True))
    assert capsys.readouterr().out == ""


def test_changed_file_is_decoded_again(samples, tmp_path):
    opened(samples, tmp_path / "cache")
    before = folders(tmp_path / "cache")
    Image.fromarray(np.full((4, 6, 3), 9, np.uint8)).save(samples[0].image)
    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(samples[0].mask)
    files = opened(samples, tmp_path / "cache")
    assert equal(files, samples) and files.pair(samples[0])[1].tolist() == [[1] * 6] * 4
    assert set(before) < set(folders(tmp_path / "cache"))  # who has the old one open goes on with it


def test_open_cache_survives_rebuild(samples, tmp_path):
    """Another run that finds a file changed replaces the cache under the feet of nobody."""
    files, expected = opened(samples, tmp_path / "cache"), read_image(samples[0].image)
    Image.fromarray(np.full((4, 6, 3), 9, np.uint8)).save(samples[0].image)
    opened(samples, tmp_path / "cache")
    assert np.array_equal(files.image(samples[0].image), expected)


def test_masks_depend_on_spec(samples, tmp_path):
    """The same files, described otherwise."""
    opened(samples, tmp_path / "cache")
    other = make_spec("mine", CustomDataConfig(classes=("a", "b"), value_map={0: 1, 7: 0, 9: 255, 255: 255}))
    assert equal(opened(samples, tmp_path / "cache", other), samples, other)


@pytest.mark.parametrize("harm", ["no index", "not json", "short", "not ours"])
def test_damaged_cache_is_rebuilt(samples, tmp_path, harm):
    opened(samples, tmp_path / "cache")
    for folder in (tmp_path / "cache").glob("*/"):
        index, pixels = folder / "index.json", folder / "pixels"
        {
            "no index": index.unlink,
            "not json": lambda index=index: index.write_text("{"),
            "short": lambda pixels=pixels: pixels.write_bytes(pixels.read_bytes()[:-1]),
            "not ours": lambda index=index: index.write_text("[1, 2]"),
        }[harm]()
    assert equal(opened(samples, tmp_path / "cache"), samples)


def test_damaged_values_are_not_used(samples, tmp_path, capsys):
    """The file itself is read in place of values without their checksum, and the folder named once."""
    opened(samples, tmp_path / "cache")
    for number, path in enumerate(sorted((tmp_path / "cache").glob("*/pixels"))):
        data = bytearray(path.read_bytes())
        data[20 + number : 300] = bytes(280 - number)
        path.write_bytes(data)
    capsys.readouterr()
    files = opened(samples, tmp_path / "cache")
    assert equal(files, samples) and equal(files, samples)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(set(warnings)) >= 2 and all("delete the folder" in line for line in warnings)


def test_spawned_workers_find_cache(samples, tmp_path):
    files = opened(samples, tmp_path / "cache")
    Image.fromarray(np.zeros((500, 500, 3), np.uint8)).save(tmp_path / "large.png")
    large = open_reader(str(tmp_path / "cache"), SPEC, [tmp_path / "large.png"], [samples[0].mask])
    sent = pickle.dumps(large)
    assert len(sent) < 10_000 and equal(pickle.loads(pickle.dumps(files)), samples)
    assert pickle.loads(sent).image(tmp_path / "large.png").shape == (500, 500, 3)


def open_and_tell(samples, root, start, answers) -> None:
    start.wait()
    files = opened(samples, root)
    answers.put([files.image(sample.image).tobytes() for sample in samples])


def test_concurrent_processes_build_one_cache(samples, tmp_path, capfd):
    start, answers = fork.Event(), fork.Queue()
    processes = [fork.Process(target=open_and_tell, args=(samples, tmp_path / "cache", start, answers)) for _ in "1234"]
    for process in processes:
        process.start()
    start.set()
    found = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
    assert found == [[read_image(sample.image).tobytes() for sample in samples]] * 4
    assert capfd.readouterr().out.count("decoding") == 2  # of the images and of the masks


def test_complete_cache_needs_no_lock(samples, tmp_path):
    """It may lie where this user may only read; to make one, every user of the folder can take the lock."""
    root = tmp_path / "cache"
    opened(samples, root)
    locks = sorted(root.glob("*.lock"))
    assert [path.stat().st_mode & 0o777 for path in locks] == [0o666, 0o666]
    start, answers = fork.Event(), fork.Queue()
    start.set()
    process = fork.Process(target=open_and_tell, args=(samples, root, start, answers), daemon=True)
    with lock(locks[0]), lock(locks[1]):
        process.start()
        assert answers.get(timeout=30) == [read_image(sample.image).tobytes() for sample in samples]
    process.join(30)


def hold(path: Path, pipe: int) -> None:
    with lock(path):
        os.write(pipe, b"!")
        signal.pause()


def test_killed_process_releases_lock(samples, tmp_path):
    """It leaves a lock file and a half cache; neither has to be removed by hand."""
    root = tmp_path / "cache"
    opened(samples, root)
    for name in folders(root):
        (root / name).rename(root / f"{name}.partial")
        reader, writer = os.pipe()
        process = fork.Process(target=hold, args=(root / f"{name}.lock", writer))
        process.start()
        assert os.read(reader, 1) == b"!"
        process.kill()
        process.join(30)
    assert equal(opened(samples, root), samples) and not [name for name in folders(root) if "partial" in name]


def test_unreadable_file_leaves_no_cache(samples, tmp_path):
    whole = samples[3].image.read_bytes()
    samples[3].image.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=rf"^{samples[3].image}: truncated"):
        opened(samples, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []
    samples[3].image.write_bytes(whole)
    Image.fromarray(np.array([[3]], np.uint8)).save(samples[2].mask)
    with pytest.raises(UserError, match=rf"^{samples[2].mask}: illegal mask values 3"):
        opened(samples, tmp_path / "cache")
    assert [name.split("-")[1] for name in folders(tmp_path / "cache")] == ["images"]
    samples[1].image.unlink()
    with pytest.raises(UserError, match=rf"^{samples[1].image}: no such file"):
        opened(samples, tmp_path / "cache")


def test_pair_size_mismatch(samples, tmp_path):
    mixed = [replace(samples[0], mask=samples[1].mask)]
    with pytest.raises(UserError, match=r"differ in width x height: .*rgb.png is 30 x 20, .*gray.png_mask.png is 13 x"):
        opened(mixed, tmp_path / "cache").pair(mixed[0])


def test_failed_write_leaves_no_cache(samples, tmp_path):
    """As on a full disk: the system takes no byte beyond the first 2000 of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"data.cache={tmp_path}/cache: cannot be used .*data.cache=none"):
            opened(samples, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert folders(tmp_path / "cache") == []
    assert equal(opened(samples, tmp_path / "cache"), samples)


def test_small_disk_is_reported_first(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path, 7, free // 2)
    with pytest.raises(UserError, match=r"7 decoded files take [\d,]+ bytes, [\d,]+ are free.*data.cache=none"):
        check_space(tmp_path, 7, 2 * free)


def test_uncreatable_folder(samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"data.cache={tmp_path}/file/cache: cannot be used"):
        opened(samples, tmp_path / "file" / "cache")
