"""Processes of one gloo group, started once per session, which call functions of the tests."""

import os
import socket

import torch

from allspark import launch
from helpers import forks


def serve(rank, world, port, pipe):
    """Call the functions received from the pipe inside the process group, until None is received."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    with launch.process_group("cpu"):
        while (task := pipe.recv()) is not None:
            function, args = task
            pipe.send(function(*args))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """ranks(function, *args) calls the function in each process and returns the results in rank order."""

    def __init__(self, world):
        port = free_port()
        forks.serve()
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = forks.context.Pipe()
            process = forks.context.Process(target=serve, args=(rank, world, port, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is seen
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, function, *args):
        """Start the call in all processes; `wait` returns the results."""
        for pipe in self.pipes:
            pipe.send((function, args))

    def wait(self):
        return [pipe.recv() for pipe in self.pipes]

    def __call__(self, function, *args):
        self.start(function, *args)
        return self.wait()

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
