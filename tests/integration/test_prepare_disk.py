"""`prepare` on full, small and read-only disks, mounted for the test."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from allspark.__main__ import main
from allspark.utils.atomic import TEMPORARY
from allspark.utils.errors import run_main
from helpers import REPO
from helpers import archives as mini

PREPARE = [sys.executable, "-m", "allspark", "prepare"]


def prepare(name, *words):
    main(["prepare", name, *map(str, words)])


def ages(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


NAMES = {"train": ["0001TP_006690", "0006R0_f00930", "0016E5_00390"], "val": ["0016E5_07959"]}


def noisy_coco(folder):
    """Masks of noise, which take more on the disk than an ordinary mask by far."""
    rng = np.random.default_rng(0)
    images = [(number, 500, 400) for number in range(1, 21)]
    annotations = [(number, 1, mini.runs(rng.random((400, 500)) < 0.5), 0) for number, *_ in images]
    for name, files in mini.coco_files((images, annotations), ((), ())).items():
        mini.write_zip(folder / name, files)
    small = {f"train2017/{number:012d}.jpg": mini.picture(number, (8, 8)) for number, *_ in images}
    mini.write_zip(folder / "train2017.zip", small)  # the masks are to fill the disk
    return folder


def in_small_disk(mount, kilobytes, command):
    """A command with a real file system of this size mounted at `mount`, in a namespace of its own."""
    script = f'mount -t tmpfs -o size={kilobytes}k none "{mount}" && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *map(str, command)]


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    try:
        subprocess.run(in_small_disk(mount, 64, ["true"]), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small file system can be mounted here (unshare --user --mount)")
    return mount


def test_disk_fills_up(small_disk, tmp_path):
    """A real one of 500 kB; then the same command, after room was made, in the same place."""
    pytest.importorskip("pycocotools")
    words = [*PREPARE, "coco", "--from", noisy_coco(tmp_path / "in"), "--out", small_disk, "--allow-partial"]
    script = (
        '"$@" --workers 2; echo "exit $?"; find . -name "*.writing" | wc -l; ls masks | wc -l; '
        'mount -o remount,size=9000k . ; cd ..; cd small; "$@" --workers 2; echo "exit $?"; ls masks | wc -l'
    )
    command = in_small_disk(small_disk, 500, ["sh", "-c", f'cd "{small_disk}"; {script}', "sh", *words])
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(REPO)))
    told = [line for line in result.stderr.splitlines() if line]
    assert len(told) == 1, told
    assert "cannot be written (the disk is full); free disk space" in told[0]
    lines = [line for line in result.stdout.splitlines() if not line.startswith(("prepare coco:", "next:"))]
    assert lines[:2] == ["exit 2", "0"]
    assert 0 < int(lines[2]) < 20
    assert "train 20 images;" in lines[3]
    assert lines[4:] == ["exit 0", "20"]


def test_small_disk_is_reported_first(small_disk, tmp_path):
    source = mini.write_zip(tmp_path / "camvid.zip", mini.tutorial_files(NAMES, (200, 150)))
    script = '"$@"; echo "exit $?"; ls -A . | wc -l'
    words = [*PREPARE, "camvid", "--from", source, "--out", small_disk / "out", "--allow-partial"]
    command = in_small_disk(small_disk, 200, ["sh", "-c", f'cd "{small_disk}"; {script}', "sh", *words])
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(REPO)))
    assert "GiB will be written, 0.00 GiB are free; free disk space" in result.stderr
    assert result.stdout.split() == ["exit", "2", "0"]


def test_file_size_limit(tmp_path, capsys):
    """The kernel refuses a write in the middle of a file, as on a full disk: no part of it stays."""
    source = mini.write_zip(tmp_path / "camvid.zip", mini.tutorial_files(NAMES, (200, 150)))
    words = [
        "prepare",
        "camvid",
        "--from",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--allow-partial",
        "--workers",
        "1",
    ]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert run_main(main, words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err
    assert "cannot be written (the disk is full)" in told
    assert not list((tmp_path / "out").rglob(f"*{TEMPORARY}"))
    main(words)
    assert len(ages(tmp_path / "out")) == 8


def test_unwritable_place(tmp_path, capsys):
    source = mini.write_zip(tmp_path / "camvid.zip", mini.tutorial_files(NAMES))
    (tmp_path / "out").write_bytes(b"a file")
    assert (
        run_main(main, ["prepare", "camvid", "--from", str(source), "--out", str(tmp_path / "out"), "--allow-partial"])
        == 2
    )
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
