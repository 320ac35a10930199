"""What a loader's worker processes need around their work: how they end, start again, and fail with one plain line."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from vitrail.errors import RunError

log = logging.getLogger("vitrail")

T = TypeVar("T")
P = TypeVar("P")

STALLED = 300
"""seconds to wait for a batch before the workers are considered stuck"""
RESTARTS = 3
"""how often killed workers are started again, in one pass over some data"""


class Reporting(Dataset[Any]):
    """The work of a worker, whose RunError is its result: PyTorch would add the worker's traceback to the line."""

    def __init__(self, fetch: Any) -> None:
        self.fetch = fetch

    def __getitems__(self, wants: Any) -> Any:
        try:
            return self.fetch.__getitems__(wants)
        except RunError as error:
            return error


def identity(fetched: Any) -> Any:
    return fetched


def ignore_first_sigterm(worker: int) -> None:
    """Make a worker ignore its first SIGTERM, and SIGUSR1.

    Slurm sends these to all processes of a job, so that the run can save. The workers end with the run. One that hangs
    gets a second SIGTERM, from PyTorch or at Python's exit.
    """

    def restore(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, restore)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def start_workers(fetch: Dataset[T], workers: int, plans: Iterator[Any]) -> Iterator[T]:
    """What worker processes, or this one if there are none, fetch for each plan, in order."""
    with warnings.catch_warnings():
        # The best number of workers depends on the disk as much as on the CPU.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[T] = DataLoader(
            Reporting(fetch),
            batch_sampler=plans,
            num_workers=workers,
            collate_fn=identity,
            prefetch_factor=4 if workers else None,
            timeout=STALLED if workers else 0,
            worker_init_fn=ignore_first_sigterm,
            # Forked workers share the set's lists; only Linux can fork safely.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            # Not the default generator, which the model uses: drawing from it would change a resumed run.
            generator=torch.Generator(),
        )
        return iter(loader)


class WorkerDied(RuntimeError):
    """A worker has ended before its work. The message says how, and why probably."""


def fetched_by(start: Callable[[Iterator[P]], Iterator[T]], plans: Iterator[P]) -> Iterator[tuple[T, P]]:
    """What the workers that `start` starts make of each plan, with the plan, in order.

    If the system kills a worker, all are started again, from the first plan that is missing: batches are a function of
    their plans. Raises RunError with one plain line if that is in vain, or if no worker answers.
    """
    for restarts in itertools.count():
        ahead, plans = itertools.tee(plans)  # the workers' sampler is some batches ahead
        try:
            yield from zip(_awaited(start, ahead), plans, strict=False)
            return
        except WorkerDied as error:
            if restarts == RESTARTS:
                raise RunError(f"{error}, {RESTARTS + 1} times: lower --workers or --batch-size") from None
            log.warning(f"{error}: the workers are started again, and no batch is lost")


def _awaited(start: Callable[[Iterator[P]], Iterator[T]], plans: Iterator[P]) -> Iterator[T]:
    """The batches of workers. Raises WorkerDied if one of them is killed, while a batch is awaited."""
    before = multiprocessing.active_children()
    batches = start(plans)
    _replace_handler()
    workers = [child for child in multiprocessing.active_children() if child not in before]
    try:
        while True:
            with _watched(workers):
                batch = next(batches)
            if isinstance(batch, RunError):
                raise batch
            yield batch
    except StopIteration:
        return
    except RunError:
        raise
    except RuntimeError as error:
        text = str(error)
        if "timed out" in text:
            raise RunError(
                f"the workers made no batch in {STALLED} seconds: check the disk, or try --workers 0"
            ) from None
        if isinstance(error, WorkerDied) or "exited unexpectedly" in text or "is killed by signal" in text:
            raise WorkerDied(_death(workers)) from None
        raise


_awaiting: list[BaseProcess] = []
"""the workers of the batch that is awaited"""


@contextmanager
def _watched(workers: list[BaseProcess]) -> Iterator[None]:
    _awaiting[:] = workers
    try:
        _refuse_dead()
        yield
    finally:
        _awaiting.clear()


def _refuse_dead() -> None:
    if any(worker.exitcode for worker in _awaiting):
        raise WorkerDied


def _replace_handler() -> None:
    """Let the end of a worker break off nothing but the wait for its batch.

    PyTorch's handler of SIGCHLD raises wherever the process is: between the optimizers of a step, or in a write.
    """
    number = getattr(signal, "SIGCHLD", None)  # not on Windows
    if number is None or not str(getattr(signal.getsignal(number), "__module__", "")).startswith("torch."):
        return
    with contextlib.suppress(ValueError):  # signals reach only the main thread
        signal.signal(number, lambda number, frame: _refuse_dead())


def _death(workers: list[BaseProcess]) -> str:
    """How a worker ended."""
    code = next((worker.exitcode for worker in workers if worker.exitcode), None)
    if code is None or code > 0:
        return "a worker process ended" + (f" with exit code {code}" if code else "")
    name = signal.Signals(-code).name
    reasons = {"SIGKILL": "memory", "SIGBUS": "/dev/shm"}
    reason = f", probably because {reasons[name]} ran out" if name in reasons else ""
    return f"a worker process was killed by {name}{reason}"
