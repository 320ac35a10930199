"""torchrun for schedulers: it passes SIGUSR1 on to the processes and their exit code 75 to its caller.

    python -m vitrail.cluster.torchrun --nnodes 2 --nproc-per-node 8 ... -m vitrail train RECIPE ...

torchrun itself dies of SIGUSR1, and ends with 1 whatever the exit codes of its processes are. A job that was told to
stop would then not be told apart from one that failed, and would not be queued again. It also lets the machine of rank
0 return: see `OWN_STORE`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from vitrail.errors import Preempted

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""environment variable: rank 0 opens the port where the ranks meet, anew in each start. By default its torchrun does so
once: if that machine fails and returns, the others wait for ever at the old port (seen in PyTorch 2.15)"""
SAVED = Preempted.exit_code
"""of a process that a signal stopped, with the run saved"""


def main(args: Sequence[str]) -> int:
    """Run torchrun with these arguments; returns the exit code: 75 if no process failed on its own with another one."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault(OWN_STORE, "1")
    signal.signal(signal.SIGUSR1, pass_on)
    try:
        run(parse_args(list(args)))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        codes = codes - {-signal.SIGTERM} or codes  # torchrun itself ends the processes that outlive a failed one
        if codes == {SAVED}:
            return SAVED
        print(f"vitrail: processes failed with exit code {', '.join(map(str, sorted(codes)))}", file=sys.stderr)
        return max((code for code in codes - {SAVED} if code > 0), default=1)
    except SignalException as error:  # SIGTERM, which torchrun has passed on and waited for
        return SAVED if error.sigval == signal.SIGTERM else 128 + int(error.sigval)
    return 0


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the processes that torchrun has started."""
    for thread in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(OSError):  # a thread or a process that has ended meanwhile
            for child in (thread / "children").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(child), number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
