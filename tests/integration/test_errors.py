"""Exit codes, closed pipes, and errors of other libraries in one line."""

import argparse
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from allspark.utils.errors import UserError, reason_of, run_main, user_error_message
from helpers import REPO

RUN = (
    "import sys; from allspark.utils.errors import UserError, run_main\n"
    "def main(argv):\n    {}\nsys.exit(run_main(main))"
)
PROGRAMS = {
    "more than a buffer": [["-c", RUN.format("[print(number) for number in range(100_000)]")], 141],
    "less": [["-c", RUN.format("print(1)")], 141],
    "unbuffered": [["-u", "-c", RUN.format("print(1)")], 141],
    "a message of the user's": [["-c", RUN.format("print(1); raise UserError('mend it')")], 141],
    "only that": [["-c", RUN.format("raise UserError('mend it')")], 2],
    "help": [["-m", "allspark", "splits", "--help"], 141],
    "a verb": [["-m", "allspark", "splits", "list", "--dataset", "shapes"], 141],
}


@pytest.mark.parametrize(("words", "code"), PROGRAMS.values(), ids=PROGRAMS)
def test_closed_pipe_ends_quietly(words, code):
    """As `| head` does, whenever it closes its end: what is printed now, or when the interpreter ends."""
    read, write = os.pipe()
    os.close(read)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, *words], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, env=env, cwd=REPO
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (code, "error: mend it\n" if "mend it" in words[-1] else "")


def test_other_broken_pipe_is_a_bug(capsys):
    def main(argv):
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run_main(main, [])


def test_exit_codes(capsys):
    def main(argv):
        if argv:
            raise UserError("mend it")

    assert (run_main(main, []), run_main(main, ["x"])) == (0, 2)
    assert capsys.readouterr().err == "error: mend it\n"


class Calls:
    def __reduce__(self):
        return (print, ("this must never be seen",))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"# A text\n\nNo weights.", "Weights only load failed"),
        ({"model": {}, "args": argparse.Namespace(lr=1)}, "it contains argparse.Namespace, but only tensors"),
        ({"model": Calls()}, r"it contains print, but only tensors"),
        (b"", "EOFError"),
    ],
)
def test_torch_error_summary(content, told, tmp_path):
    """Not its advice to load the file with weights_only=False."""
    path = tmp_path / "file.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(Exception) as caught:
        torch.load(path, weights_only=True)
    short = reason_of(caught.value)
    assert re.match(told, short) and "weights_only" not in short and len(short) <= 160


def test_out_of_memory_message():
    code = "import torch; torch.empty(2**60)"
    result = subprocess.run([sys.executable, "-c", RUN.format(code)], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.match(
        "error: out of memory .*training, use micro_batch=1, .*predict, use --mode sliding_window",
        result.stderr,
    )
    assert user_error_message(RuntimeError("shapes do not match")) is None
    for error in (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), MemoryError("Unable to allocate")):
        assert user_error_message(error).startswith("error: out of memory")
    code = "raise MemoryError"
    assert subprocess.run([sys.executable, "-c", RUN.format(code)], cwd=REPO, capture_output=True).returncode == 2


def test_no_deterministic_implementation_message():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
    message = user_error_message(caught.value)
    assert message.startswith("error: deterministic=true: put_ has no deterministic implementation on this device; set")


OLD_DRIVER = "int cuDriverGetVersion(int *version) { *version = 12020; return 0; }"


@pytest.mark.skipif(not torch.version.cuda or torch.cuda.is_available(), reason="for a torch with CUDA, without a GPU")
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs gcc and LD_LIBRARY_PATH")
def test_gpu_job_without_usable_gpu_ends(start_process, fork_process, tmp_path):
    """Without a driver, and with one that is older than torch; never a run on the CPU."""
    words = ["--dataset", "shapes", "--method", "supervised", "--split", "1_30", "--save-path", tmp_path / "run"]
    gcc = ["gcc", "-shared", "-x", "c", "-", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run(gcc, input=OLD_DRIVER, text=True, check=True)
    old = start_process(["train.py", *words, "device=cuda"], LD_LIBRARY_PATH=tmp_path)
    none = fork_process(["train.py", *words, "device=auto"], SLURM_GPUS_ON_NODE=4)
    for process, says in (
        (none, "error: SLURM_GPUS_ON_NODE=4 gives this process a GPU, but CUDA cannot be used: no NVIDIA driver was"),
        (old, "error: device=cuda is not available on this machine: driver .* supports CUDA 12.2, .*/whl/cu126, or u"),
    ):
        errors = process.communicate(timeout=60)[1].splitlines()
        assert process.returncode == 2 and re.match(says, errors[-1])
        assert [line[:6] for line in errors].count("error:") == 1
    assert not (tmp_path / "run").exists()
