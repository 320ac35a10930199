"""Start a run in several processes: by `--nproc N` on this machine, or by torchrun. One of them speaks.

A process that torchrun or `--nproc` started finds its rank in the environment. Other launchers are refused, since each
of their processes would train the whole run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vitrail.errors import Preempted, RunError, Stopped, UserError
from vitrail.process import PREEMPTING, cores, handled

if TYPE_CHECKING:
    from vitrail.train.parallel import World

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""environment variables in which mpirun gives the number of processes"""
STARTER = "VITRAIL_STARTER"
"""environment variable: the process of `--nproc` that started this one"""
FORWARDED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""signals that the process of `--nproc` passes on to each rank, once: a rank has its own session"""
PATIENCE = timedelta(minutes=30)
"""for a message between ranks, such as the first after rank 0 has downloaded the data; a rank that fails ends all at
once, so this is for one that hangs"""
GRACE = 10.0
"""seconds in which the other ranks may end on their own after one has failed"""
BEAT, SILENT = 1.0, 120
"""seconds between signs of life of a rank, and beats without one after which it is lost: a machine without power does
not close its connections"""


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or `--nproc` started this process as one of several."""
    return environment.get("WORLD_SIZE", "1") != "1" and "RANK" in environment and "MASTER_ADDR" in environment


def refuse_many_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if a launcher other than torchrun started this process as one of several."""
    if several(environment):
        return
    sizes = [*SIZES, "WORLD_SIZE"]
    ranks = ["RANK"]
    # A script in a Slurm allocation of several tasks is one process: only processes of srun belong to a step.
    if "SLURM_STEP_NUM_TASKS" in environment:
        sizes.append("SLURM_STEP_NUM_TASKS")
    elif {"SLURM_STEP_ID", "SLURM_STEPID"} & environment.keys():
        sizes.append("SLURM_NTASKS")
        ranks.append("SLURM_PROCID")
    # One task per machine that runs torchrun is how Slurm starts it: then each has the variables of torchrun.
    for name in () if environment.get("WORLD_SIZE") == "1" else (*sizes, *ranks):
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > (name in sizes):
            raise UserError(
                f"{name}={value}: a launcher started several processes, of which each would train the whole run: start "
                f"vitrail with --nproc N or torchrun, or unset {name}"
            )


def refuse_several(command: str) -> None:
    """Raise UserError if this process is one of several, for a command that works in one."""
    refuse_many_processes()
    if several():
        raise UserError(f"`vitrail {command}` works in one process: start it without torchrun")


# ---- the process of --nproc


def start(args: Sequence[str], count: int) -> int:
    """Run `vitrail train ARGS` in `count` processes of this machine; returns the exit code of the first that failed."""
    if count < 1:
        raise UserError(f"--nproc must be at least 1, got {count}")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), STARTER: str(os.getpid())}
    defaults = {"OMP_NUM_THREADS": str(max(1, cores() // count)), "GLOO_SOCKET_IFNAME": loopback()}
    command = [sys.executable, "-m", "vitrail", "train", *args]
    ranks: list[subprocess.Popen[bytes]] = []
    forwarded: list[int] = []

    def forward(number: int) -> None:
        forwarded.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    with handled(forward, *FORWARDED):
        try:
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                variables = {**defaults, **os.environ, **shared, **own}
                # Not this process's descriptor 2, which discards what other packages write.
                ranks.append(subprocess.Popen(command, env=variables, stderr=sys.stderr, start_new_session=True))
            rank, code = wait_for(ranks)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
    if code >= 0:  # 0, or the rank has told why
        return code
    if -code in forwarded:
        raise (Preempted if -code in PREEMPTING else Stopped)("stopped")
    reason = ", often because memory ran out: start fewer processes" if code == -signal.SIGKILL else ""
    raise RunError(
        f"process {rank} of {count} was killed by {signal.Signals(-code).name}{reason}; start the command again, or "
        "resume its run with `vitrail train --resume` if its folder is there"
    )


def wait_for(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """The first rank that failed and its exit code, or (0, 0). The others then have `GRACE` seconds to end."""
    first, deadline = (0, 0), 0.0
    while True:
        codes = [process.poll() for process in ranks]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed and first == (0, 0):
            first, deadline = (
                min(failed, key=lambda one: one[1]),
                time.monotonic() + GRACE,
            )  # a killed one before others
        if None not in codes:
            return first
        if deadline and time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.05)


def free_port() -> int:
    """A free port of this machine, where the ranks meet."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


def loopback() -> str:
    """The name of the network interface that does not leave this machine."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0] if names else "lo")


# ---- one of the processes


@contextlib.contextmanager
def joined(device: str | None, shard: bool = False, count: int | None = None) -> Iterator[World]:
    """The world of this process: alone, or one of several that a launcher started.

    Only rank 0 speaks. An error is told to the other ranks, which end too; one that rank 0 does not share is printed by
    its own rank. `count` is that of `--nproc`.
    """
    refuse_many_processes()
    from vitrail.train.parallel import ALONE, World

    if not several():
        if shard:
            raise UserError("--shard shares the weights among several processes: add --nproc N, or start with torchrun")
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    voice = sys.stderr
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process
        logging.getLogger("vitrail").setLevel(logging.CRITICAL + 1)
    if count is not None and count != size:
        raise UserError(f"--nproc {count} in a process that torchrun started as one of {size}: leave --nproc out")
    import torch.distributed as dist

    world = World(rank, size, own_device(device), shard)
    on_gpu = world.device != "cpu"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the {size} processes could not connect: {' '.join(str(error).split())[:200]}") from None
    run = world.broadcast(lambda: os.urandom(8).hex().encode()).decode()
    bulletin = Bulletin(rank, size, voice, run)
    bulletin.watch()
    try:
        yield world
        dist.barrier()
        bulletin.ended = True
    except BaseException as error:
        bulletin.tell(error)
        if bulletin.is_echo(error):
            raise RunError(bulletin.lost) from None
        raise
    dist.destroy_process_group()


def own_device(name: str | None) -> str:
    """The name of this rank's device: one GPU per process, or the processor."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is one device, and each process has its own: say --device cuda or cpu")
    if name == "cpu":
        return name
    count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if local > count:
        raise UserError(
            f"{local} processes need as many GPUs, and this machine has {count}: start fewer, or say --device cpu"
        )
    if not (number := os.environ.get("LOCAL_RANK", "")).isdecimal():
        raise UserError("LOCAL_RANK, the GPU of each process, is not set: start with --nproc N or torchrun")
    torch.cuda.set_device(int(number))
    return f"cuda:{number}"


class Bulletin:
    """Where ranks tell that they failed: the others are then stuck in a message that never comes."""

    def __init__(self, rank: int, size: int, voice: Any, run: str) -> None:
        """`run` is a name that no earlier start of these ranks had: torchrun may start them several times."""
        from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed hides them from mypy

        self.rank, self.size, self.voice = rank, size, voice
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        # A connection of its own: the one of PyTorch waits for long. Rank 0 or torchrun holds the other end.
        self.store = PrefixStore(f"vitrail/{run}", TCPStore(*place, is_master=False, timeout=timedelta(seconds=30)))
        self.ended = False
        self._heard, self._silent = -1, 0
        self.lost = (
            f"process {rank} of {size} lost another one, which was killed or whose machine failed: resume the run"
        )

    def any_failed(self) -> bool:
        """Whether any rank failed, or whether that cannot be known any more."""
        try:
            return bool(self.store.check(["failed"]))
        except Exception:  # the process that holds the store has ended
            return True

    def failed(self) -> list[int]:
        """The ranks whose own error it was; all of the others, if that cannot be known any more."""
        try:
            return [rank for rank in range(self.size) if self.store.check([f"failed/{rank}"])]
        except Exception:  # the process that holds the store has ended
            return [rank for rank in range(self.size) if rank != self.rank]

    def tell(self, error: BaseException) -> None:
        """Tell the other ranks of an error, and print it if no lower rank has the same or another one of its own."""
        self.ended = True
        if self.is_echo(error):
            self._wait(lambda: bool(self.failed()))
            if self.failed() or STARTER in os.environ:  # who failed, or who started this, has the better line
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # the process ends
            elif self.rank:
                self._tell_loss()
            return
        with contextlib.suppress(Exception):
            self.store.set(f"failed/{self.rank}", "1")
            self.store.set("failed", "1")
        if self.rank == 0:  # which may hold the store: the others read it first
            self._wait(lambda: len(self.failed()) == self.size)
            return
        if not self._wait(lambda: min(self.failed()) < self.rank):
            known = isinstance(error, UserError | RunError | Stopped | OSError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            print(f"vitrail: process {self.rank} of {self.size}: {text}", file=self.voice, flush=True)

    def _tell_loss(self) -> None:
        """Print that another rank is lost, once per machine: rank 0 may be the one."""
        if os.environ.get("LOCAL_RANK") == "0":
            print(f"vitrail: {self.lost}", file=self.voice, flush=True)

    def beat(self) -> None:
        """Give a sign of life, and listen for that of the next rank: each rank has one that listens."""
        self.store.add(f"beat/{self.rank}", 1)
        heard = self.store.add(f"beat/{(self.rank + 1) % self.size}", 0)
        if heard != self._heard:
            self._heard, self._silent = heard, 0

    def _wait(self, done: Any, seconds: float = 2.0) -> bool:
        """Wait until it is done, for some seconds."""
        end = time.monotonic() + seconds
        while not (found := done()) and time.monotonic() < end:
            time.sleep(0.1)
        return bool(found)

    @staticmethod
    def is_echo(error: BaseException) -> bool:
        """Whether an error only tells that another process has ended."""
        import torch.distributed as dist

        if isinstance(error, dist.DistError):
            return True
        text = str(error)
        return type(error) is RuntimeError and any(word in text for word in ("gloo", "NCCL", "Connection closed"))

    def watch(self) -> None:
        """End this process if another one has failed or is lost while this one hangs, or if its starter is gone.

        One thread listens. Another one ends the process if the first hears nothing, be it that its store is lost.
        """
        starter = int(os.environ.get(STARTER, 0))

        def follow() -> None:
            while not self.ended:
                if starter and os.getppid() != starter:
                    os.kill(os.getpid(), signal.SIGTERM)  # saves and stops, as all ranks do
                    time.sleep(60)
                    os._exit(1)
                if self.any_failed() and not self.ended:
                    time.sleep(GRACE)
                    if not self.ended:
                        os._exit(1)
                with contextlib.suppress(RuntimeError):  # the process that holds the store has ended
                    self.beat()
                time.sleep(BEAT)

        def count() -> None:
            while not self.ended:
                self._silent += 1  # beats of one's own, not seconds: a scheduler may suspend all ranks for a while
                if self._silent > SILENT:
                    self._tell_loss()
                    os._exit(1)
                time.sleep(BEAT)

        for work in (follow, count):
            threading.Thread(target=work, daemon=True).start()
