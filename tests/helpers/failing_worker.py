"""Started by test_distributed.py under torchrun: two processes, of which rank 1 fails."""

import os
import signal
import sys
import time

import torch

from allspark import distributed, launch
from allspark.utils.errors import UserError

with launch.process_group("cpu"):
    for step in range(2000):
        distributed.all_reduce_sum(torch.ones(1))
        time.sleep(0.01)
        if step == 20 and distributed.rank() == 1:
            if sys.argv[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("the disk of process 1 is full")
