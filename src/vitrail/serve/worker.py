"""One thread that runs all models, in batches of what waits.

A single thread: models that ran beside each other would share the same device or cores, and be slower. It takes the
next batch at once when one is done, without asking the event loop, which may be busy with uploads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Answerer = Callable[[list[Any]], Sequence[Any]]
"""items of a batch to one result each"""


@dataclass(eq=False)
class Job:
    """An item that waits for its turn."""

    key: Hashable
    """items of one key are answered together; None: alone"""
    run: Answerer
    item: Any
    long: bool = False
    """takes seconds, and calls `Worker.run_waiting` between its steps"""
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Worker:
    """Runs jobs in the order of their arrival, with later ones of the same key in the same batch."""

    def __init__(
        self, max_batch: int, max_wait: float, done: Callable[[int, float], None] = lambda images, seconds: None
    ) -> None:
        """`done` is told of each batch: its size and how long it took."""
        self.max_batch, self.max_wait, self.done = max_batch, max_wait, done
        self.jobs: list[Job] = []
        self.changed = threading.Condition()
        self.closing = False
        self.rate = 0.0
        """images per second, lately; 0 before the first batch"""
        self.thread = threading.Thread(target=self._loop, name="vitrail-worker", daemon=True)
        self.thread.start()

    def submit(self, run: Answerer, item: Any, key: Hashable = None, long: bool = False) -> Future[Any]:
        """The future result of an item. Cancelling it takes the item out of the queue."""
        job = Job(key, run, item, long)
        with self.changed:
            if self.closing:
                raise RuntimeError("the worker is closed")
            self.jobs.append(job)
            self.changed.notify()
        return job.future

    def call(self, function: Callable[[], T], long: bool = False) -> Future[T]:
        """Run a function alone."""
        return self.submit(lambda items: [function()], None, long=long)

    def run_waiting(self) -> None:
        """Run the jobs that wait now, but for long ones: a long job calls it, on the worker's thread, between steps.

        So other jobs wait for one step and not for the whole of a long one, which ends however many come.
        """
        now = time.monotonic()
        while True:
            with self.changed:
                waiting = [job for job in self.jobs if not job.long and job.arrived <= now]
                if not waiting:
                    return
                batch = self._take(waiting[0])
            self._run(batch)

    def close(self) -> None:
        """Finish what waits, and stop."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def _loop(self) -> None:
        while batch := self._next():
            self._run(batch)

    def _next(self) -> list[Job]:
        """The next batch; empty at the end."""
        with self.changed:
            while True:
                self.jobs = [job for job in self.jobs if not job.future.cancelled()]
                if not self.jobs and self.closing:
                    return []
                if not self.jobs:
                    self.changed.wait()
                    continue
                first = self.jobs[0]
                same = sum(job.key == first.key for job in self.jobs)
                left = first.arrived + self.max_wait - time.monotonic()
                if first.key is None or same >= self.max_batch or left <= 0 or self.closing:
                    return self._take(first)
                self.changed.wait(left)

    def _take(self, first: Job) -> list[Job]:
        """Take a job and those of its key out of the queue, at most a batch."""
        same = [job for job in self.jobs if job.key == first.key][: self.max_batch]
        batch = [first] if first.key is None else same
        taken = set(map(id, batch))
        self.jobs = [job for job in self.jobs if id(job) not in taken]
        return batch

    def _run(self, batch: list[Job]) -> None:
        batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
        if not batch:
            return
        began = time.monotonic()
        try:
            found = batch[0].run([job.item for job in batch])
            if len(found) != len(batch):
                raise ValueError(f"{len(found)} results for {len(batch)} items")
        except BaseException as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:  # the item at fault must not spoil the others
                for job in batch:
                    self._run_alone(job)
        else:
            for job, result in zip(batch, found, strict=True):
                job.future.set_result(result)
        seconds = time.monotonic() - began
        if batch[0].key is not None:
            now = len(batch) / max(seconds, 1e-6)
            self.rate = 0.8 * self.rate + 0.2 * now if self.rate else now
            self.done(len(batch), seconds)

    @staticmethod
    def _run_alone(job: Job) -> None:
        try:
            job.future.set_result(job.run([job.item])[0])
        except BaseException as error:
            job.future.set_exception(error)
