"""bench scale: the step as its parts grow, each point in a process of its own, so that none sees another's memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tqdm import tqdm

from allspark.bench.measure import Row, Work
from allspark.utils.errors import UserError

BASE = {"encoder": "mit_b0", "crop": 257, "batch": 2, "classes": 21}
SWEEPS: dict[str, tuple] = {
    "classes": (21, 81, 171),
    "crop": (257, 385, 513, 769, 1025),
    "batch": (1, 2, 4, 8),
    "encoder": ("mit_b0", "mit_b1", "mit_b2", "mit_b3", "mit_b4", "mit_b5"),
    "processes": (1, 2),
}
LIMIT_SECONDS, LIMIT_BYTES = 60, 16e9  # of a run of the step; of a process
START_SECONDS = 60  # that a process gets to start


@dataclass(frozen=True)
class Point:
    """One value of what is varied, all else as in BASE."""

    vary: str
    value: Any

    def __str__(self) -> str:
        return f"{self.vary} {self.value}"

    def command(self, words: Sequence[str], threads: int) -> list[str]:
        """Processes share the threads; several of them are ours alone, on the same batch."""
        settings = {key: value for key, value in BASE.items() if key != self.vary}
        processes = self.value if self.vary == "processes" else 1
        if self.vary != "processes":
            settings[self.vary] = self.value
        python = [sys.executable, "-m"]
        if processes > 1:
            launcher = ["torch.distributed.run", "--standalone", "--local-addr=localhost"]
            python += [*launcher, f"--nproc_per_node={processes}", "-m"]
        words = [*words, *(["--sides", "ours"] if self.vary == "processes" else ["--sides", "plain", "ours"])]
        options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        return [*python, "allspark", "bench", "step", *options, "--threads", str(max(1, threads // processes)), *words]


def points(varied: Sequence[str]) -> list[Point]:
    return [Point(vary, value) for vary in varied for value in SWEEPS[vary]]


def bench_scale(
    varied: Sequence[str], precisions: Sequence[str], repeats: int, threads: int, device: str, folder: Path
) -> tuple[list[Row], list[str]]:
    """Rows of all points, and notes that name those which took too long or too much. folder: for what they write."""
    rows, notes = [], []
    words = ["--precision", *precisions, "--repeats", str(repeats), "--device", device]
    runs = (1 + len(precisions)) * (repeats + 3)
    with tqdm(points(varied), "scale", unit="point", leave=False, disable=None) as bar:
        for point in bar:
            bar.set_postfix_str(str(point))
            path = folder / "point.json"
            path.unlink(missing_ok=True)
            command = [*point.command(words, threads), "--json", str(path)]
            if (reason := watched(command, START_SECONDS + LIMIT_SECONDS * runs)) is not None:
                notes.append(f"{point}: left out, {reason}")
                continue
            measured = json.loads(path.read_text(encoding="utf-8"))["rows"]
            rows += [as_row(values, point) for values in measured]
    return rows, notes


def as_row(values: dict[str, Any], point: Point) -> Row:
    """The row of a point's own table in that of all points. Several processes are compared with one."""
    row = Row(**{key: values[key] for key in Row.__dataclass_fields__})
    row.work = Work(**values["work"])
    row.point = {"vary": point.vary, "value": point.value}
    if point.vary == "processes":
        row.side, row.baseline = f"{row.side}, {point}", point.value == 1 and row.precision == "fp32"
    else:
        row.case = f"{point}: {row.case}"
    return row


def watched(command: Sequence[str], deadline: float) -> str | None:
    """Run it; None when it is done, or why it was stopped. UserError with its last words where it fails."""
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started = time.monotonic()
    with TemporaryFile("w+") as words:
        child = subprocess.Popen(command, env=environment, stdout=words, stderr=words, start_new_session=True)
        try:
            while child.poll() is None:
                if time.monotonic() - started > deadline:
                    return f"a step takes more than {LIMIT_SECONDS} s"
                if resident(child.pid) > LIMIT_BYTES:
                    return f"it takes more than {LIMIT_BYTES / 1e9:.0f} GB"
                time.sleep(0.2)
        finally:
            end(child)
        if child.returncode == -9:  # SIGKILL
            return "the system ended it, as a rule for its memory"
        if child.returncode:
            words.seek(0)
            raise UserError(f"{' '.join(command)}: failed: {' '.join(words.read().splitlines()[-3:])}")
    return None


def end(child: subprocess.Popen) -> None:
    """With all that it started; on Windows, which has no process groups, the child alone."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()


def resident(process: int) -> int:
    """Bytes of memory that a process holds; 0 where it is over, or the system does not tell."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
