"""torchrun that ends with the message and the exit code of the process that failed first, without a traceback."""

from __future__ import annotations

import logging
import os
import signal
import sys

if __name__ == "__main__":
    from allspark.utils.environment import check_environment

    check_environment()

from torch.distributed import DistNetworkError, DistStoreError, run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from allspark.utils.errors import STOPPED, reason_of


def main() -> int:
    logging.disable(logging.ERROR)  # of this process: torchrun tells of each process in several lines
    if hasattr(signal, "SIGUSR1"):  # torchrun passes on SIGTERM alone; the processes treat both alike
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message  # of a process that was killed torchrun says so itself, else it is in the error file
        print(
            f"rank {rank} failed first: {message['message'] if isinstance(message, dict) else message}", file=sys.stderr
        )
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:  # passed on to the processes, which have saved, unless that took them too long
        return STOPPED
    except (RendezvousError, DistNetworkError, DistStoreError) as error:  # of the launcher itself
        print(
            f"error: the launchers cannot meet ({reason_of(error)}): is the port in use, or was a node not started or "
            "lost? Choose another --master_port, or compare --nnodes, --rdzv_endpoint and --rdzv_id of the nodes",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
