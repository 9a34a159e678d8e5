"""Disturb training runs on purpose and compare their results with an undisturbed run.

    python tests/stress/faults.py --kills 100 --terms 20 --full 10 --flips 10 --workers 6 --ranks 4

Processes train on the shapes data set. At random moments they are killed or stopped, their disk is filled, a loader
worker or another rank is killed, or a checkpoint is damaged; then they are restarted until they finish. At the end all
tensors and numbers of latest.pth and best.pth and all lines of metrics.jsonl (except images_per_s) must equal those of
the undisturbed run. Two runs at a time; the processes are forked from a server that has already imported torch.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
os.environ["OMP_NUM_THREADS"] = "1"  # results are bit-identical only with equal thread counts
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(REPO))

import torch

START = 240.0  # seconds for a run to start, on a busy machine
PATIENCE = 600.0  # seconds for it to end
SIZES = {"labeled": 8, "unlabeled": 24, "val": 4}
METHODS = {
    "allspark": ["--method", "allspark", "method.teacher=ema", "method.teacher_momentum=0.9", "warmup_epochs=1"],
    "fixmatch": ["--method", "fixmatch", "method.threshold=0.3"],
}
SMALL = (  # noqa: SIM905
    "model.encoder=mit_b0 model.decoder_channels=32 crop_size=64 batch_size=4 epochs=3 burn_in_epochs=1 log.interval=4 "
    "num_workers=1 device=cpu evaluation.interval=2 evaluation.pseudo_labels=4 checkpoint_interval=2 data.cache=none"
).split()
WHAT = {
    "kill": "SIGKILL at a random moment",
    "write": "SIGKILL while a checkpoint is written",
    "term": "SIGTERM, SIGINT or SIGUSR1",
    "full": "full disk",
    "limit": "file size limit (EFBIG)",
    "flip": "latest.pth with a bit flipped",
    "cut": "latest.pth truncated",
    "worker": "SIGKILL of a loader worker",
    "rank": "SIGKILL of one rank of two",
}


@dataclass
class Fault:
    """One fault and its outcome."""

    kind: str
    method: str = ""
    run: str = ""
    exit: int | None = None
    seconds: float = 0.0  # from the fault to the end of the process
    said: str = ""  # the last line on stderr
    problem: str = ""


@dataclass
class Campaign:
    """Runs of one recipe and the faults to inject; they are compared with one undisturbed run."""

    name: str
    words: list[str]
    out: Path
    faults: list[Fault]
    dice: random.Random
    ranks: int = 1
    runs: list[dict] = field(default_factory=list)


# Processes


def train_here(words: list[str], log: str) -> None:
    """`python train.py words` in a forked process, with its output in a file."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, the default on Linux
    import train
    from allspark.utils.errors import run_main

    torch.set_num_threads(1)
    code = run_main(train.main, words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Forked:
    """A training process."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.process = self.context.Process(target=train_here, args=(list(words), str(log)))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds: float) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


class Launched:
    """torchrun with two training processes; a killed one is started again with its peer, up to three times."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        launcher = "-m torch.distributed.run --standalone --local-addr=localhost --nproc_per_node=2 --max-restarts=3"
        command = [sys.executable, *launcher.split(), "train.py", *words]
        with open(log, "a") as file:
            self.process = subprocess.Popen(command, cwd=REPO, stdout=file, stderr=file)
        self.pid = self.process.pid

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None


def children(pid: int) -> list[int]:
    """Of a process, by /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return sorted(found)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# Faults


def hurt(fault: Fault, process: Forked | Launched, run: Path, dice: random.Random, span: float) -> Callable | None:
    """Do it to the running process at a random moment of the next `span` seconds -> what undoes it; None: too late."""
    if fault.kind == "write":
        wait_for_write(process, run, dice)
    else:
        process.wait(dice.uniform(0, span))
    victims = children(process.pid)
    if process.wait(0) is not None or (fault.kind in ("worker", "rank") and not victims):
        return None
    if fault.kind in ("kill", "write", "flip", "cut"):
        send(process.pid, signal.SIGKILL)
    elif fault.kind == "term":
        send(process.pid, dice.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
    elif fault.kind in ("worker", "rank"):
        send(dice.choice(victims), signal.SIGKILL)
    elif fault.kind == "limit":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            size = dice.choice([0, dice.randrange(1 << 10), dice.randrange(1 << 24)])
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    elif fault.kind == "full":
        return fill_disk(run, dice)
    return lambda: None


def wait_for_write(process: Forked | Launched, run: Path, dice: random.Random) -> None:
    """Until a moment in the middle of the writing of some checkpoint."""
    for _ in range(dice.randrange(3)):  # not always the first one
        while not list(run.glob("*.tmp")) and process.wait(0.001) is None:
            pass
        while list(run.glob("*.tmp")) and process.wait(0.001) is None:
            pass
    while not list(run.glob("*.tmp")) and process.wait(0.001) is None:
        pass
    time.sleep(dice.uniform(0, 0.15))


def fill_disk(run: Path, dice: random.Random) -> Callable[[], None]:
    """Take all but a little of what is free on the small file system of the run."""
    filler, left = run.parent / "filler", dice.choice([0, dice.randrange(1 << 20), dice.randrange(1 << 24)])
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        while shutil.disk_usage(run.parent).free > left:
            file.write(bytes(min(1 << 20, max(4096, shutil.disk_usage(run.parent).free - left))))
            file.flush()
    return lambda: filler.unlink(missing_ok=True)


def damage(kind: str, path: Path, dice: random.Random) -> None:
    """A byte changed, or the end cut off."""
    if path.exists():
        size = path.stat().st_size
        with open(path, "r+b") as file:
            if kind == "cut":
                file.truncate(dice.randrange(size))
            else:
                file.seek(place := dice.randrange(size))
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << dice.randrange(8)]))


EXPECTED = {  # exit codes; 0: the run had come to its end before
    **dict.fromkeys(("kill", "write", "flip", "cut"), -signal.SIGKILL),
    **dict.fromkeys(("full", "limit", "worker"), 2),
    "term": 75,
    "rank": 0,
}


def judge(fault: Fault, log: Path) -> None:
    """Did the process end as it should? A traceback is never right, but from workers whose run was killed."""
    text = log.read_text(errors="replace")
    fault.said, fault.problem = next((line for line in reversed(text.splitlines()) if line.strip()), "")[:300], ""
    if fault.exit not in (EXPECTED[fault.kind], 0):
        fault.problem = f"exit {fault.exit}: {fault.said}"
    if fault.kind in ("term", "full", "limit", "worker") and "Traceback" in text:
        fault.problem = "a traceback: " + text[text.index("Traceback") :][:3000]
    log.unlink()


# Runs


def started(run: Path) -> int:
    """How often training has begun in this folder, by its log."""
    log = run / "train.log"
    return log.read_text(errors="replace").count(" steps of ") if log.exists() else 0


def begin(campaign: Campaign, run: Path, log: Path) -> Forked | Launched:
    """A training process that is past its start, or has ended."""
    before, kind = started(run), Launched if campaign.ranks > 1 else Forked
    process, deadline = kind([*campaign.words, "--save-path", str(run)], log), time.monotonic() + START
    while started(run) == before and process.wait(0.02) is None and time.monotonic() < deadline:
        pass
    return process


def train_through(campaign: Campaign, run: Path, span: float) -> dict:
    """One run, disturbed until it has come to its end or the faults have."""
    done, log = [], run.with_suffix(".out")
    while True:
        process = begin(campaign, run, log)
        fault = campaign.faults.pop() if campaign.faults and len(done) < 12 else None
        undo = None
        if fault is not None:
            undo = hurt(fault, process, run, campaign.dice, span / 4)
        since = time.monotonic()
        code = process.wait(PATIENCE)
        if undo is not None:
            undo()
        if code is None:
            send(process.pid, signal.SIGKILL)
        if fault is not None and (undo is None or (code == 0 and fault.kind != "rank")):
            campaign.faults.append(fault)  # it had come to its end before
            fault = None
        if fault is None:
            said = log.read_text(errors="replace")[-2000:] if code else ""
            return {"run": run.name, "faults": len(done), "exit": code, "said": said}
        fault.method, fault.run, fault.exit = campaign.name, run.name, code
        fault.seconds = round(time.monotonic() - since, 2)
        judge(fault, log)
        if fault.kind in ("flip", "cut"):
            if not (
                run / "previous.pth"
            ).exists():  # a run that has saved once has nothing to fall back to, and says so
                campaign.faults.insert(0, fault)
                continue
            damage(fault.kind, run / "latest.pth", campaign.dice)
        done.append(fault)


def read_lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []


def differences(run: Path, other: Path) -> list[str]:
    """What the two runs do not agree in."""
    found = []
    for name in ("latest.pth", "best.pth"):
        contents = [torch.load(folder / name, weights_only=True) for folder in (run, other)]
        found += [f"{name}: {key}" for key in unequal(*contents)]
    first, second = ([without_speed(line) for line in read_lines(folder)] for folder in (run, other))
    if first != second:
        found.append(f"metrics.jsonl: {len(first)} and {len(second)} lines")
    return found


def without_speed(line: str) -> dict:
    return {key: value for key, value in json.loads(line).items() if key != "images_per_s"}


def unequal(one: object, other: object, path: str = "") -> Iterator[str]:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(one, other):
            yield path
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in {*one, *other}:
            yield from unequal(one.get(key), other.get(key), f"{path}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from unequal(*pair, f"{path}.{index}")
    elif one != other:
        yield path


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of its own, where this user may mount one: root in most containers and machines."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"]
    mounted = shutil.which("mount") and not subprocess.run(["mount", *options, folder], capture_output=True).returncode
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)  # workers of a killed run may still be there


def work(campaign: Campaign) -> None:
    """All faults of a campaign, over as many runs as that takes."""
    base = campaign.out / f"{campaign.name}-undisturbed"
    log = base.with_suffix(".out")
    process, since = begin(campaign, base, log), time.monotonic()
    if process.wait(PATIENCE) != 0:
        raise RuntimeError(f"the undisturbed run {base} failed: {log.read_text(errors='replace')[-1000:]}")
    span, size = time.monotonic() - since, sum(file.stat().st_size for file in base.iterdir()) >> 20
    disk = small_disk(campaign.out / f"{campaign.name}-disk", 2 * size + 64)
    full = any(fault.kind == "full" for fault in campaign.faults)
    with disk if full else contextlib.nullcontext(False) as mounted:
        for fault in campaign.faults:
            fault.kind = "limit" if fault.kind == "full" and not mounted else fault.kind
        for number in itertools.count():
            if not campaign.faults:
                break
            run = (campaign.out / f"{campaign.name}-disk" if mounted else campaign.out) / f"{campaign.name}-{number}"
            result = train_through(campaign, run, span)
            result["different"] = differences(run, base) if result["exit"] == 0 else ["it did not finish"]
            outcome = "; ".join(result["different"]) or "identical"
            print(f"{run.name}: {result['faults']} faults, {outcome} {result['said']}", flush=True)
            campaign.runs.append(result)
            if not result["different"]:
                shutil.rmtree(run)


# What is told


def table(faults: Sequence[Fault], runs: Sequence[dict]) -> str:
    """Markdown."""
    wrong = {run["run"] for run in runs if run["different"]}
    lines = [
        "| fault | times | exit codes | longest end | ended wrongly | resumed and identical |",
        "|---|---|---|---|---|---|",
    ]
    for kind, words in WHAT.items():
        mine = [fault for fault in faults if fault.kind == kind]
        if mine:
            codes = ", ".join(
                f"{code} ({sum(f.exit == code for f in mine)})" for code in sorted({f.exit for f in mine})
            )
            good = sum(fault.run not in wrong for fault in mine)
            bad, longest = sum(bool(fault.problem) for fault in mine), max(fault.seconds for fault in mine)
            lines.append(f"| {words} | {len(mine)} | {codes} | {longest:.1f} s | {bad} | {good} of {len(mine)} |")
    lines.append(f"\n{len(runs)} disturbed runs, {len(runs) - len(wrong)} identical to the undisturbed one.")
    return "\n".join(lines)


def write_lists(out: Path) -> list[str]:
    """Short lists of the shapes data set, and the words that name them."""
    words = ["--dataset", "shapes", f"data.val_id_path={out / 'val.txt'}"]
    for name, count in SIZES.items():
        source = REPO / "splits" / "shapes" / ("val.txt" if name == "val" else f"1_30/{name}.txt")
        (out / f"{name}.txt").write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
        if name != "val":
            words.append(f"--{name}-id-path={out / f'{name}.txt'}")
    return words


def plan(args: argparse.Namespace, out: Path) -> list[Campaign]:
    """The faults, shuffled and dealt to the methods; those of ranks apart."""
    dice, words = random.Random(args.seed), write_lists(out)
    kinds = ["kill"] * (args.kills - args.kills // 3) + ["write"] * (args.kills // 3)
    kinds += ["term"] * args.terms + ["full"] * args.full + ["worker"] * args.workers
    kinds += ["flip"] * (args.flips - args.flips // 2) + ["cut"] * (args.flips // 2)
    dice.shuffle(kinds)
    campaigns = []
    for number, name in enumerate(args.methods):
        faults = [Fault(kind) for kind in kinds[number :: len(args.methods)]]
        campaigns.append(
            Campaign(name, [*words, *METHODS[name], *SMALL, *args.words], out, faults, random.Random(dice.random()))
        )
    if args.ranks:
        faults = [Fault("rank") for _ in range(args.ranks)]
        both = [*words, *METHODS["allspark"], *SMALL, *args.words]
        campaigns.append(Campaign("two-ranks", both, out, faults, random.Random(dice.random()), ranks=2))
    return [campaign for campaign in campaigns if campaign.faults]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("kills", "terms", "full", "flips", "workers", "ranks"):
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="campaigns at a time")
    parser.add_argument("--out", type=Path, default=Path("exp/faults"), help="folder of the runs; emptied first")
    parser.add_argument("--json", type=Path, help="every fault and run")
    parser.add_argument("--table", type=Path, help="the table, as markdown")
    parser.add_argument("words", nargs="*", metavar="key.path=value", help="for every training")
    args = parser.parse_intermixed_args(argv)
    out = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    Forked.context.set_forkserver_preload(["train", "allspark.recipe_arguments"])
    campaigns, since = plan(args, out), time.monotonic()
    everything = [fault for campaign in campaigns for fault in campaign.faults]
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        list(pool.map(work, campaigns))
    runs = [run for campaign in campaigns for run in campaign.runs]
    text = table(everything, runs)
    print(text, f"\n{(time.monotonic() - since) / 60:.1f} minutes")
    for fault in everything:
        if fault.problem:
            print(f"WRONG: {fault.kind} of {fault.run}: {fault.problem}")
    if args.json:
        args.json.write_text(json.dumps({"faults": [asdict(f) for f in everything], "runs": runs}, indent=1))
    if args.table:
        args.table.write_text(text + "\n")
    undone = [fault for fault in everything if not fault.run]
    return int(bool(undone or any(fault.problem for fault in everything) or any(run["different"] for run in runs)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
