"""bench scale: the step with growing parameters, each point in its own process, to separate their memory."""

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
LIMIT_SECONDS, LIMIT_BYTES = 60, 16e9  # per run of the step; per process
START_SECONDS = 60  # for a process to start


@dataclass(frozen=True)
class Point:
    """One value of the varied parameter; all others are those of BASE."""

    vary: str
    value: Any

    def __str__(self) -> str:
        return f"{self.vary} {self.value}"

    def command(self, arguments: Sequence[str], threads: int) -> list[str]:
        """The command of this point. Several processes share the threads and the batch, and only run our side."""
        settings = {key: value for key, value in BASE.items() if key != self.vary}
        processes = self.value if self.vary == "processes" else 1
        if self.vary != "processes":
            settings[self.vary] = self.value
        python = [sys.executable, "-m"]
        if processes > 1:
            launcher = ["torch.distributed.run", "--standalone", "--local-addr=localhost"]
            python += [*launcher, f"--nproc_per_node={processes}", "-m"]
        sides = ["--sides", "ours"] if self.vary == "processes" else ["--sides", "plain", "ours"]
        options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        options += ["--threads", str(max(1, threads // processes))]
        return [*python, "allspark", "bench", "step", *options, *arguments, *sides]


def points(varied: Sequence[str]) -> list[Point]:
    return [Point(vary, value) for vary in varied for value in SWEEPS[vary]]


def bench_scale(
    varied: Sequence[str], precisions: Sequence[str], repeats: int, threads: int, device: str, folder: Path
) -> tuple[list[Row], list[str]]:
    """Measure all points.

    Args:
        varied: keys of SWEEPS.
        precisions: of our side.
        repeats: rounds per point.
        threads: of torch.
        device: cpu or cuda.
        folder: for temporary files.

    Returns:
        Rows of all points, and notes about points that took too much time or memory.
    """
    rows, notes = [], []
    arguments = ["--precision", *precisions, "--repeats", str(repeats), "--device", device]
    runs = (1 + len(precisions)) * (2 * repeats + 1) + 6 * len(precisions)  # two of each round, then parts and work
    with tqdm(points(varied), "scale", unit="point", leave=False, disable=None) as bar:
        for point in bar:
            bar.set_postfix_str(str(point))
            path = folder / "point.json"
            path.unlink(missing_ok=True)
            command = [*point.command(arguments, threads), "--json", str(path)]
            if (reason := run_limited(command, START_SECONDS + LIMIT_SECONDS * runs)) is not None:
                notes.append(f"{point}: left out, {reason}")
                continue
            measured = json.loads(path.read_text(encoding="utf-8"))["rows"]
            rows += [row_of_point(values, point) for values in measured]
    return rows, notes


def row_of_point(values: dict[str, Any], point: Point) -> Row:
    """A row of the table of one point, for the table of all points. Several processes are compared with one."""
    row = Row(**{key: values[key] for key in Row.__dataclass_fields__})
    row.work = Work(**values["work"])
    row.point = {"vary": point.vary, "value": point.value}
    if point.vary == "processes":
        row.side, row.baseline = f"{row.side}, {point}", point.value == 1 and row.precision == "fp32"
    else:
        row.case = f"{point}: {row.case}"
    return row


def run_limited(command: Sequence[str], deadline: float) -> str | None:
    """Run a command within the limits of time and memory.

    Returns:
        None, or why it was stopped.

    Raises:
        UserError: it failed; with the end of its output.
    """
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started = time.monotonic()
    with TemporaryFile("w+") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            while child.poll() is None:
                if time.monotonic() - started > deadline:
                    return f"a step takes more than {LIMIT_SECONDS} s"
                if sum(map(resident, group_members(child.pid))) > LIMIT_BYTES:
                    return f"it takes more than {LIMIT_BYTES / 1e9:.0f} GB"
                time.sleep(0.2)
        finally:
            end(child)
        if child.returncode == -9:  # SIGKILL
            return "the system killed it, usually because of its memory"
        if child.returncode:
            output.seek(0)
            raise UserError(f"{' '.join(command)}: failed: {' '.join(output.read().splitlines()[-3:])}")
    return None


def end(child: subprocess.Popen) -> None:
    """Kill a process and its children; on Windows, which has no process groups, only the process."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()


def group_members(leader: int) -> list[int]:
    """The processes of a group, such as torchrun and those it started; the leader alone where there is no /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int(status.read_text().rpartition(")")[2].split()[2]) == leader:
                found.append(int(status.parent.name))
    return found or [leader]


def resident(process: int) -> int:
    """Bytes of memory of a process; 0 if it has ended or the system does not report it."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
