"""Feed generated hostile inputs to the commands: each ends with exit code 2 and one message, or does what is right.

    python tests/stress/hostile_inputs.py                        # 3,000 inputs, about a quarter of an hour
    python tests/stress/hostile_inputs.py --quick                # one in twenty
    python tests/stress/hostile_inputs.py --only images --seed 7

An input is generated from (seed, kind, number) and given to the command in a forked process, which may use 2 GiB more
memory than it has and 30 seconds. Wrong are: another exit code, a traceback, not exactly one message, an input that had
to be refused and was not, more memory or time, and terminal escapes in the output.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import socket
import struct
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import numpy as np
import torch
import yaml
from PIL import Image

import eval as eval_script
import train
from allspark import __main__ as commands
from allspark import launch
from allspark.config_keys import config_fields
from allspark.utils.download import fetch
from allspark.utils.errors import run_main
from helpers import archives, tiny_dataset

SECONDS = 30.0  # per input
MEMORY = 2 << 30  # bytes more than the process has
PEAK = 1 << 30  # bytes of growth that count as wrong
COUNTS = {
    "configs": 700,
    "lists": 300,
    "images": 500,
    "masks": 400,
    "checkpoints": 400,
    "archives": 200,
    "http": 100,
    "own files": 200,
    "environment": 100,
    "reports": 100,
}
NUMBERS = [0, -1, 1, 7, 2**31, 2**63, -(10**30), 10**4000, 0.5, 1e308, float("nan"), float("inf"), True]
ODD = [*NUMBERS, None, "", "x", "\0", "\x1b[2J", "x" * 5000, "../..", [], [1, [2]], {}, {"a": {"b": 1}}, "\ud800"]
RUN = ["--save-path", "run", "epochs=1", "warmup_epochs=0", "device=cpu", "num_workers=0"]


@dataclass
class Case:
    """A command whose input is hostile, and the exit codes that are right."""

    main: Callable[[Sequence[str]], None]
    argv: Sequence[str]
    codes: tuple[int, ...] = (0, 2)


def mutate(dice: random.Random, content: bytes, near: int = 400) -> bytes:
    """Some bytes changed, cut out, doubled or moved, mostly near the beginning."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        at = dice.randrange(max(1, len(data) if dice.random() < 0.4 else min(len(data), near)))
        new = dice.choice([bytes([dice.randrange(256)]), b"", b"\xff" * 4, bytes(8), bytes(data[:9])])
        data[at : at + dice.choice([0, 1, 1, 1, 20])] = new
    return bytes(data[: dice.randrange(len(data) + 1)] if dice.random() < 0.1 else data)


def odd_file(dice: random.Random, path: Path) -> bool:
    """Sometimes, what is no file in a file's place."""
    make = dice.choice([None] * 12 + [path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")])
    if make is not None:
        path.unlink()
        make()
    return make is not None


# Kinds: each changes the prepared folder, which is the current one


def configs(dice: random.Random) -> Case:
    path = Path("recipe.yaml")
    how = dice.choice(["mutated", "override", "override", "bomb", "text"])
    words = ["--config", "recipe.yaml", "--print-config"]
    if how == "mutated":
        path.write_bytes(mutate(dice, path.read_bytes(), 10**6))
    elif how == "override":
        value = dice.choice(ODD)
        text = "9" * 5000 if value == 10**4000 else str(value) if isinstance(value, float) else json.dumps(value)
        words.append(f"{dice.choice(list(config_fields()))}={text}")
    elif how == "bomb":
        size = dice.randint(9, 30)
        lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * size) if i else 'x'}]" for i in range(dice.randint(8, 20))]
        path.write_text(dice.choice(["\n".join(lines), "[" * 10 ** dice.randint(3, 5), "a: " * 10**5]))
        return Case(train.main, words, (2,))
    else:
        path.write_bytes(dice.choice([b"\xff\xfe", b"\0", b"- a", b"!!python/name:os.system", b"a: !!float x", b""]))
        return Case(train.main, words, (2,))
    return Case(train.main, words)


def lists(dice: random.Random) -> Case:
    path = Path("lists") / f"{dice.choice(['labeled', 'unlabeled', 'val'])}.txt"
    lines = path.read_bytes().splitlines()
    bad = [
        b"/etc/passwd",
        b"../" * 40,
        b"a\0b",
        b"x" * 5000,
        b"caf\xe9.png",
        b"",
        b"\x1b[2J",
        b"a b c d",
        b".",
        b"/dev/zero",
    ]
    for _ in range(dice.randint(1, 3)):
        lines.insert(dice.randrange(len(lines) + 1), dice.choice(bad))
    content = dice.choice([b"\n", b"\r\n", b"\r"]).join(lines)
    path.write_bytes(mutate(dice, content) if dice.random() < 0.4 else content)
    odd_file(dice, path)
    files = [f"--{kind}-id-path=lists/{kind}.txt" for kind in ("labeled", "unlabeled")]
    words = ["check", "--data-only", "--config", "recipe.yaml", *files, "data.val_id_path=lists/val.txt"]
    return Case(commands.main, words)


def encode(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    with contextlib.suppress(OSError, ValueError):
        image.save(file, form)
    return file.getvalue()


def picture(dice: random.Random, is_mask: bool) -> bytes:
    """Of any mode, size and format, perhaps damaged."""
    rng = np.random.default_rng(dice.randrange(2**32))
    size = dice.choice([(64, 80)] * 4 + [(1, 1), (80, 64), (3, 5000)])
    mode = dice.choice(["L", "RGB", "P", "1", "LA", "RGBA", "CMYK", "F", "I;16", "I", "YCbCr"])
    high = dice.choice([3, 3, 256]) if is_mask else 256
    if mode in ("F", "I;16", "I"):
        dtype = {"F": np.float32, "I;16": np.uint16, "I": np.int32}[mode]
        image = Image.fromarray((rng.random(size) * high).astype(dtype))
    else:
        image = Image.fromarray(rng.integers(0, high, size, np.uint8)).convert(mode)
    content = encode(image, dice.choice(["PNG", "PNG", "TIFF", "JPEG", "GIF", "BMP", "WEBP", "PPM", "ICO", "TGA"]))
    how = dice.random()
    if how < 0.1 and content.startswith(b"\x89PNG"):  # any size in its header
        header = b"IHDR" + struct.pack(">II", dice.randrange(2**31), dice.randrange(2**31)) + content[24:29]
        content = content[:12] + header + struct.pack(">I", zipfile.crc32(header)) + content[33:]
    return mutate(dice, content) if 0.1 < how < 0.7 and content else content


def images(dice: random.Random) -> Case:
    path = Path("images") / dice.choice(["labeled/labeled1.png", "unlabeled/unlabeled1.png", "val/val1.png"])
    if not odd_file(dice, path):
        path.write_bytes(picture(dice, False))
    if dice.random() < 0.3:
        return Case(
            commands.main, ["predict", "--checkpoint", "run/best.pth", "--device", "cpu", "--out", "o", str(path)]
        )
    return Case(commands.main, ["check", "--data-only", "--config", "recipe.yaml"])


def masks(dice: random.Random) -> Case:
    path = Path("masks") / dice.choice(["labeled/labeled1.png", "val/val1.png"])
    if not odd_file(dice, path):
        path.write_bytes(picture(dice, True))
    return Case(commands.main, ["check", "--data-only", "--config", "recipe.yaml"])


def opcodes(dice: random.Random) -> bytes:
    """A pickle of random instructions, many of which call functions that torch allows with numbers without bound."""
    names = ["builtins bytearray", "torch UntypedStorage", "torch Tensor", "torch Size", "collections OrderedDict"]
    names += ["numpy.core.multiarray scalar", "numpy dtype", "_codecs encode", "collections Counter", "os system"]
    names += ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_meta_tensor_no_storage", "torch FloatTensor"]
    number = b"\x8a\x05" + struct.pack("<Q", dice.choice([5_600_000_000, 2**38, 3]))[:5]
    small = [number, b"K\1", b"N", b")", b"]", b"}", b"X\3\0\0\0hex", b"X\6\0\0\0latin1", b"X\1\0\0\0x", b"h\0", b"("]
    parts = [b"\x80\2}q\0X\1\0\0\0w"]
    for _ in range(dice.randint(1, 12)):
        parts.append(b"c" + dice.choice(names).replace(" ", "\n").encode() + b"\n" if dice.random() < 0.4 else b"")
        parts += [
            dice.choice(small),
            dice.choice([b"\x85R", b"\x86R", b"\x87R", b"tR", b"\x81", b"b", b"Q", b"", b"q\1"]),
        ]
    return b"".join((*parts, b"s."))


def checkpoints(dice: random.Random) -> Case:
    path = Path("run/best.pth")
    content: dict[str, Any] = torch.load(path, weights_only=True)
    how = dice.choice(["mutated", "pickle", "part", "recipe", "tensor", "directory"])
    codes: tuple[int, ...] = (2,)
    if how == "mutated":
        data = path.read_bytes()
        path.write_bytes(mutate(dice, data[:3000]) + data[3000:])
        codes = (0, 2)
    elif how == "pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", opcodes(dice))
            archive.writestr("x/version", b"3\n")
    elif how == "part":
        content[dice.choice(["model", "method", "recipe", "split", "format"])] = dice.choice([3, "x", [1], {"a": 1}])
        torch.save(content, path)
    elif how == "recipe":
        section, key, value = dice.choice(
            [
                ("data", "crop_size", 2 ** dice.randint(10, 14)),
                ("data", "num_workers", 1024),
                ("data", "data_root", "elsewhere"),
                ("model", "decoder_channels", 2 ** dice.randint(10, 14)),
                ("model", "encoder", dice.choice(["mit_b5", "timm:vit_giant_patch14_dinov2", "timm:\x1b[2J", "../x"])),
                ("method", "name", dice.choice(["os:system", "subprocess:Popen", "x.y:Z", "\0"])),
                ("data", dice.choice(list(content["recipe"]["data"])), dice.choice(ODD)),
            ]
        )
        content["recipe"][section][key] = value
        codes = (0, 2)
        with contextlib.suppress(UnicodeEncodeError, OverflowError):
            torch.save(content, path)
    elif how == "tensor":
        name = dice.choice([name for name, tensor in content["model"].items() if tensor.is_floating_point()])
        weight = content["model"][name]
        types = [torch.complex64, torch.float8_e4m3fn, torch.int64]
        values = [weight * float("nan"), weight.double() + 1e300, weight + 1e38, weight[:0], weight[None]]
        content["model"][name] = dice.choice([*(weight.to(kind) for kind in types), *values, weight.to_sparse()])
        torch.save(content, path)
    else:
        data, where = path.read_bytes(), path.read_bytes().rindex(b"PK\6\6")
        path.write_bytes(data[:where] + data[where - dice.randrange(1, 4000) :])
    names = ["images/val/val0.png", "--checkpoint", "run/best.pth", "--device", "cpu", "--out", "out"]
    words = dice.choice([["predict", *names], ["weights", "inspect", "run/best.pth"], ["eval", *names[1:5]]])
    if words[0] == "weights":  # says what there is, without building the network of the recipe
        codes = (0, 2)
    return Case(eval_script.main, words[1:], codes) if words[0] == "eval" else Case(commands.main, words, codes)


def archive_files(dice: random.Random) -> Case:
    name = dice.choice(["camvid.zip", "camvid.tar", "camvid.tgz"])
    path, codes = Path(name), (0, 2)
    files = archives.tutorial_files({"train": ["0001TP_006690"], "val": ["0016E5_07959"]})
    how = dice.choice(["mutated", "mutated", "names", "headers", "zeros"])
    if how == "names":
        files = {dice.choice(["../x", "/x", "C:/x", "a/../../x", "\x1b[2J", "x" * 3000]): b"x", **files}
    (archives.write_zip if name.endswith("zip") else archives.write_tar)(path, files)
    if how == "mutated":
        path.write_bytes(mutate(dice, path.read_bytes(), 2000))
    elif how in ("headers", "zeros") and not name.endswith("zip"):
        info = tarfile.TarInfo("x")
        info.type = dice.choice([tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE])
        info.size = dice.choice([0, 600, 1 << 20, 4 << 30])
        body = info.tobuf() * dice.choice([1, 5000]) if how == "headers" else bytes(dice.choice([1 << 20, 200 << 20]))
        path.write_bytes(gzip.compress(body, 1) if name.endswith("tgz") else body)
    odd_file(dice, path)
    words = ["prepare", "camvid", "--from", name, "--out", "out", "--workers", "1", "--allow-partial"]
    return Case(commands.main, words, codes)


def http(dice: random.Random) -> Case:
    """A server that answers with a damaged, endless or slow response, and the client in the place of a command."""
    first = b"HTTP/1.1 " + dice.choice(
        [b"200 OK", b"206 x", b"302 Found", b"100 Continue", b"404 \x1b[2J", b"x", b"200"]
    )
    fields = [
        b"Content-Length: 9",
        b"Content-Length: -1",
        b"Content-Length: " + b"9" * 30,
        b"Location: http://[",
        b"X: y",
    ]
    fields += [
        b"Transfer-Encoding: chunked",
        b"Location: file:///etc/passwd",
        b"ETag: \x1b",
        b"Content-Range: bytes 5-9/x",
    ]
    head = b"\r\n".join([first, *dice.sample(fields, dice.randint(0, 4))])
    body = dice.choice([b"", b"x" * 9, b"1\r\nx\r\n0\r\n\r\n", b"ffffffffff\r\nx", b"-1\r\n"])
    answer = head + b"\r\n\r\n" + body
    answer = mutate(dice, answer) if dice.random() < 0.4 else answer
    endless = dice.choice([b"", b"", b"x", b"X: y\r\n", first + b"\r\n\r\n", b"1\r\nx\r\n"])
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for _ in range(20):
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)
                    until = time.monotonic() + 5
                    while endless and time.monotonic() < until:
                        connection.sendall(endless * 500)

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
    digest = dice.choice([None, "sha256:" + "0" * 64])
    return Case(lambda argv: fetch(argv, Path("x"), digest=digest, size_limit=1 << 20, timeout=0.3, wait=0.01), [url])


def odd_line(dice: random.Random, line: dict[str, Any]) -> str:
    changed = {**line, dice.choice([*line, "step", "miou", "iou"]): dice.choice(ODD)}
    if 10**4000 in changed.values():
        return '{"step": ' + "9" * 5000 + "}"
    return dice.choice([json.dumps(changed), "[" * 10**5, "{", "null", "\0", "3", json.dumps(line)[:-3]])


def damage_log(dice: random.Random) -> None:
    path = Path("run/metrics.jsonl")
    lines = path.read_text().splitlines()
    for at in dice.sample(range(len(lines)), dice.randint(1, 2)):
        lines[at] = odd_line(dice, json.loads(lines[at]))
    path.write_text("\n".join(lines) + "\n", errors="replace")


def own_files(dice: random.Random) -> Case:
    name = dice.choice(["metrics.jsonl", "config.yaml", "run.json", "latest.pth", "previous.pth", "train.log", "lines"])
    path = Path("run") / name
    if name == "lines":
        damage_log(dice)
    elif not odd_file(dice, path):
        whole = path.read_bytes()
        path.write_bytes(dice.choice([mutate(dice, whole, 10**6), b"", b"null", b"[" * 10**5, b"\xff\xfe", whole[:-7]]))
    resume = Case(train.main, ["--config", "recipe.yaml", *RUN])
    report = Case(commands.main, ["report", "run", "--out", "report.html", "--no-images"])
    return dice.choice([resume, report])


def environment(dice: random.Random) -> Case:
    names = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_STEP_NUM_TASKS",
    ]
    names += [
        "SLURM_PROCID",
        "SLURM_STEP_NUM_NODES",
        "SLURM_JOB_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "ALLSPARK_DATA_TINY",
    ]
    names += ["ALLSPARK_MAX_MEGAPIXELS", "SLURM_GPUS_ON_NODE", "COLUMNS", "LANG", "TMPDIR"]
    values = ["", "0", "1", "2", "-1", "4.5", "x", "9" * 30, "٣", "\x1b[2J", "nowhere", "127.0.0.1", "\udce9"]
    os.environ.update({dice.choice(names): dice.choice(values) for _ in range(dice.randint(1, 5))})
    resume = Case(train.main, ["--config", "recipe.yaml", *RUN])
    return dice.choice([resume, Case(commands.main, ["check", "--data-only", "--config", "recipe.yaml"])])


def reports(dice: random.Random) -> Case:
    damage_log(dice)
    words = dice.choice([["report", "run", "--out", "report.html", "--no-images"], ["compare", "run"]])
    return Case(commands.main, words)


KINDS = {
    "configs": configs,
    "lists": lists,
    "images": images,
    "masks": masks,
    "checkpoints": checkpoints,
    "archives": archive_files,
    "http": http,
    "own files": own_files,
    "environment": environment,
    "reports": reports,
}


# Processes


def work(kind: str, numbers: Sequence[int], seed: int, base: Path, verdicts: Connection) -> None:
    """In a forked process: give the inputs to the commands, and send the verdicts to the parent."""
    os.setsid()
    output = tempfile.TemporaryFile()  # noqa: SIM115
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    launch.JOIN_TIMEOUT, launch.JOIN_NOTICE = timedelta(seconds=1), 0.5
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    variables = dict(os.environ)
    for number in numbers:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output.seek(0)
        output.truncate()
        with tempfile.TemporaryDirectory(dir=base.parent) as folder:
            shutil.copytree(base, folder, dirs_exist_ok=True)
            os.chdir(folder)
            case = KINDS[kind](random.Random(f"{seed} {kind} {number}"))
            try:
                code: Any = run_main(case.main, list(case.argv))
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
                code = 1
            os.chdir(base)
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ.clear()
        os.environ.update(variables)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        output.seek(0)
        text = output.read().decode(errors="replace")
        verdicts.send((code, find_problem(case, code, text, grown), " ".join(case.argv)[:300]))


def find_problem(case: Case, code: Any, text: str, grown: int) -> str:
    messages = sum(line.startswith(("error: ", "usage: ")) for line in text.splitlines())
    if "Traceback" in text:
        return "traceback: " + text[text.index("Traceback") :][-1500:]
    if code not in case.codes:
        return f"exit code {code}: {text[-300:]}"
    if code == 2 and messages != 1:
        return f"{messages} messages: {text[-500:]}"
    if "\x1b" in text:
        return f"a terminal escape: {text[-300:]!r}"
    if grown > PEAK or any(words in text for words in ("MemoryError", "out of memory", "allocate")):
        return f"memory: {grown >> 20} MiB more; {text[-300:]}"
    return ""


def judge(kind: str, numbers: Sequence[int], seed: int, base: Path) -> Iterator[tuple[Any, str, str]]:
    """Exit code, problem and command of each input; a process that dies or hangs is replaced."""
    done = 0
    while done < len(numbers):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        if (child := os.fork()) == 0:
            try:
                work(kind, numbers[done:], seed, base, theirs)
            except BaseException:
                theirs.send((None, "the generator failed: " + traceback.format_exc()[-800:], ""))
            os._exit(0)
        theirs.close()
        try:
            while done < len(numbers):
                hangs = not ours.poll(SECONDS)
                verdict = (None, f"no answer within {SECONDS:g} s", "") if hangs else ours.recv()
                done += 1
                yield verdict
                if hangs:
                    break
        except EOFError:
            done += 1
            yield None, "the process died", ""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
        os.waitpid(child, 0)


def prepare(base: Path) -> None:
    """A small data set, its recipe, and a finished run."""
    tiny_dataset.write_files(base)
    os.chdir(base)
    recipe = yaml.safe_load(tiny_dataset.write_recipe(base / "recipe.yaml", Path(".")).read_text())
    (base / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "log": {"interval": 1, "writers": []}}))
    for name in ("check", "predict", "prepare", "report", "compare", "weights"):  # imported once, not by each process
        importlib.import_module(f"allspark.cli.{name}")
    if run_main(train.main, ["--config", "recipe.yaml", *RUN]):
        raise SystemExit("the run that is to be damaged failed")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one input in twenty")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, help="inputs per kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to repeat one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="write the table, as markdown")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = ["| inputs | count | refused | right | wrong | longest |", "|---|---|---|---|---|---|"]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        prepare(base)
        gc.collect()
        gc.freeze()  # or each child would copy all pages of this process
        for kind in args.only:
            count = args.count or COUNTS[kind] // (20 if args.quick else 1)
            codes: Counter[Any] = Counter()
            wrong, longest = 0, 0.0
            numbers, since = range(args.first, args.first + count), time.monotonic()
            for number, (code, problem, command) in zip(numbers, judge(kind, numbers, args.seed, base), strict=True):
                longest = max(longest, time.monotonic() - since)
                since = time.monotonic()
                codes[code] += not problem
                if problem:
                    wrong += 1
                    print(f"WRONG: {kind} {number} ({command}): {problem}\n", flush=True)
            failures += wrong
            lines.append(f"| {kind} | {count} | {codes[2]} | {codes[0]} | {wrong} | {longest:.1f} s |")
            print(lines[-1], flush=True)
        os.chdir(REPO)
    print("\n".join(lines))
    if args.table:
        args.table.write_text("\n".join(lines) + "\n")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
