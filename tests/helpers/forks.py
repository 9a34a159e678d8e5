"""Processes that are forked from a server which has imported torch and the package, so that each starts quickly."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing import forkserver

import torch

from helpers import REPO

VERBS = [f"allspark.cli.{path.stem}" for path in sorted((REPO / "allspark" / "cli").glob("*.py"))]
context = multiprocessing.get_context("forkserver")


def serve():
    """Start the fork server unless it is running; it imports the package while the tests continue."""
    context.set_forkserver_preload(["train", "eval", "pytest", *VERBS])
    forkserver.ensure_running()


class Command(context.Process):
    """`python train.py|eval.py|-m allspark words` in the repository, used like subprocess.Popen."""

    def __init__(self, words, env, stem):
        super().__init__()
        self.words, self.env = list(map(str, words)), env
        self.files = [stem.with_suffix(suffix) for suffix in (".out", ".err")]
        for file in self.files:
            file.touch()
        self.start()

    def run(self):
        os.setsid()
        os.chdir(REPO)
        os.environ.clear()
        os.environ.update(self.env)
        torch.set_num_threads(1)  # OMP_NUM_THREADS was read when torch was imported
        for number, file in enumerate(self.files, start=1):
            os.dup2(os.open(file, os.O_WRONLY), number)
        module = self.words[0] == "-m"
        sys.argv = self.words[module:]
        try:
            if module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            atexit._run_exitfuncs()  # which multiprocessing leaves out

    def communicate(self, timeout=None):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        return tuple(file.read_text(encoding="utf-8") for file in self.files)

    @property
    def returncode(self):
        return self.exitcode
