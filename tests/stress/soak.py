"""Train for a long time and check for leaks: memory, file handles, disk, GPU memory.

    python tests/stress/soak.py --minutes 45 --out exp/soak

Trains on the shapes data set with an evaluation and a checkpoint in each short epoch. Every few seconds it records the
memory and open files of the process and its workers, and the size of the run's folder. At the end it fits a line to all
samples except the first fifth. Writes soak.json and soak.png; exit code 1 if something grows or the run fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

OWN = ("Pss_Anon:", "Pss_Shmem:")
TRAINING = (
    "--dataset shapes --split 1_30 --method allspark method.teacher=ema crop_size=64 batch_size=4 num_workers=1 "
    "model.decoder_channels=32 epochs=100000 burn_in_epochs=1 evaluation.interval=1 evaluation.pseudo_labels=8 "
    "checkpoint_minutes=1"
)
# Largest growth that is not reported as a leak: value -> (unit, limit)
LIMITS = {"memory": ("MiB", 32.0), "files": ("", 2.0), "disk": ("MiB", 8.0), "gpu": ("MiB", 16.0)}


def tree(pid: int) -> list[int]:
    """A process and its descendants, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def sample(pid: int, run: Path, gpu: bool) -> dict[str, float]:
    """Current use of the process. Memory: anonymous and shared pages, each counted once, in MiB. Mapped files, such as
    torch's libraries, are not counted: their share grows when another program that maps them ends.
    """
    memory = files = 0.0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            memory += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(OWN)) / 1024
            files += len(os.listdir(f"/proc/{one}/fd"))
    sizes = 0
    for path in run.glob("*"):
        with contextlib.suppress(OSError):
            sizes += path.stat().st_size
    found = {"memory": memory, "files": files, "disk": sizes / 2**20}
    if gpu:
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        rows = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        found["gpu"] = sum(float(row.split(",")[1]) for row in rows if int(row.split(",")[0]) in tree(pid))
    return found


def watch(process: subprocess.Popen, run: Path, minutes: float, every: float) -> list[dict[str, float]]:
    """Samples until the time is up or the process has ended."""
    samples, since = [], None
    gpu = shutil.which("nvidia-smi") is not None
    while process.poll() is None and (since is None or time.monotonic() - since < 60 * minutes):
        time.sleep(every)
        if since is None and (run / "latest.pth").exists():  # training has started and saved a checkpoint
            since = time.monotonic()
        if since is not None and process.poll() is None:
            samples.append({"minutes": (time.monotonic() - since) / 60, **sample(process.pid, run, gpu)})
    return samples


def slopes(samples: Sequence[dict[str, float]]) -> dict[str, dict[str, float | bool]]:
    """Growth of each value per hour, by a line through the medians of 12 windows, which contain evaluations."""
    rest = [one for one in samples if one["minutes"] >= samples[-1]["minutes"] / 5]
    windows = [window for window in np.array_split(np.arange(len(rest)), 12) if len(window)]
    found = {}
    for name in (name for name in LIMITS if name in samples[0]):
        hours = [np.median([rest[i]["minutes"] for i in window]) / 60 for window in windows]
        values = [np.median([rest[i][name] for i in window]) for window in windows]
        slope, start = np.polyfit(hours, values, 1)
        grown = slope * (hours[-1] - hours[0])  # in the time measured
        flat = abs(grown) <= LIMITS[name][1] or slope < 0
        found[name] = {"start": start, "per_hour": slope, "grown": grown, "flat": bool(flat)}
    return found


def draw(samples: Sequence[dict[str, float]], found: dict, path: Path) -> None:
    from allspark.visualization.pictures import new_figure, save_figure, style_axes

    titles = {"memory": "memory of all processes, MiB", "files": "open files", "disk": "folder of the run, MiB"}
    titles["gpu"] = "GPU memory, MiB"
    figure = new_figure(3.6 * len(found), 2.6)
    for axes, name in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        axes.plot([one["minutes"] for one in samples], [one[name] for one in samples], linewidth=0.8)
        axes.set_ylim(0, 1.15 * max(one[name] for one in samples) or 1)
        style_axes(axes, titles[name])
        axes.set_xlabel("minutes", fontsize=9)
    save_figure(figure, path)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--every", type=float, default=5, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path("exp/soak"), help="its folder `run` is emptied first")
    parser.add_argument("words", nargs="*", metavar="key.path=value", help="for the training")
    args = parser.parse_intermixed_args(argv)
    run = args.out.absolute() / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.parent / "output.txt", "w") as output:
        words = [*TRAINING.split(), *args.words, "--save-path", str(run)]
        process = subprocess.Popen([sys.executable, "train.py", *words], cwd=REPO, stdout=output, stderr=output)
        try:
            samples = watch(process, run, args.minutes, args.every)
        finally:
            process.terminate()
            code = process.wait(120)
    if code != 75 or len(samples) < 24:
        print(f"soak: training ended with exit code {code}, {len(samples)} samples; see {run.parent / 'output.txt'}")
        return 1
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    found = slopes(samples)
    print(f"{samples[-1]['minutes']:.0f} minutes, {steps} steps")
    for name, value in found.items():
        unit = LIMITS[name][0]
        words = f"{value['start']:.0f} {unit} at the start, {value['grown']:+.1f} {unit} since"
        print(f"{name}: {'flat' if value['flat'] else 'GROWS'}: {words}".replace("  ", " "))
    (run.parent / "soak.json").write_text(json.dumps({"steps": steps, "slopes": found, "samples": samples}, indent=1))
    draw(samples, found, run.parent / "soak.png")
    return int(not all(value["flat"] for value in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
