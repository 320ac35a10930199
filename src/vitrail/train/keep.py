"""What a run saves while it trains: its states, and the best and the last weights, written beside the training."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from vitrail.errors import RunError, warn_once
from vitrail.files import copy_folder, retrying
from vitrail.tasks.task import Task
from vitrail.train.device import release_memory
from vitrail.train.finite import LOWER_RATE, non_finite_weights, not_finite
from vitrail.train.folder import RunFolder
from vitrail.train.lora import merged
from vitrail.train.optim import Average, Optimizers
from vitrail.train.parallel import ALONE, World
from vitrail.train.run import Run
from vitrail.train.snapshot import Snapshot
from vitrail.train.states import State, unreadable

SAVE_EVERY = 300.0
"""seconds between saved states; an evaluation saves one too, and so do `save_every` steps of a run"""


class Writer:
    """Writes beside the training, in a thread of its own, one write at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._give_up = threading.Event()

    def start(self, write: Callable[[], None]) -> None:
        """Wait for the last write, then start this one. Raises the error of the last write."""
        self.wait()

        def work() -> None:
            try:
                retrying(write, self._give_up.wait)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="vitrail writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the last write. Raises its error: RunError if the file system refused it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, OSError):
            raise RunError(f"cannot write {error.filename or 'a file'}: {error.strerror or error}") from None
        if error is not None:
            raise error

    def abandon(self) -> None:
        """Wait for the last write, without further attempts and without its error: another one ends the run."""
        self._give_up.set()
        if self._thread is not None:
            self._thread.join()


class Keeper:
    """Saves a run and restores it. As a context manager it waits at the end until everything is written."""

    def __init__(
        self,
        run: Run,
        task: Task,
        folder: RunFolder,
        optimizers: Optimizers,
        average: Average | None,
        world: World = ALONE,
    ) -> None:
        """Rank 0 of `world` writes; the others join in what the ranks gather."""
        self.world = world
        self.run, self.task, self.folder = run, task, folder
        self.optimizers, self.average = optimizers, average
        self.best: float | None = None
        """the best score so far"""
        self.waited = 0
        """evaluations since a score that was better than all before"""
        self.step = 0
        """steps of the last state"""
        self.pending: dict[str, Any] | None = None
        """if the last state is still to be evaluated: what the row of its evaluation holds beside the scores"""
        self.sums: dict[str, float] = {}
        """of the unfinished row of the log, at the last state"""
        self._best: Path | None = None
        """folder of the best weights in state/"""
        self._writer, self._snapshot = Writer(), Snapshot()
        self._saved = time.monotonic()

    def load(self) -> None:
        """Restore the run to its newest state that is whole, or begin again if none was saved."""
        folder, is_main = self.folder, self.world.is_main
        if is_main:
            folder.remove_leftovers()
        state = self._newest()
        if state is None:
            folder.metrics.unlink(missing_ok=True)
            return
        values = state.values
        try:
            self.task.load_state_dict(values["module"])
            self.optimizers.load_state_dict(values["optimizers"])
            if self.average is not None:
                self.average.values = values["average"]
            self.best, self.waited = values["best"], values["waited"]
            self.pending, self.sums = values["pending"], values["sums"]
        except Exception as error:  # of another version of vitrail
            raise unreadable(folder.states.path, error) from None
        self.step, self._best = state.step, state.best
        if is_main and state.best is not None:  # `best` may be that of a later step, or lost
            copy_folder(state.best, folder.best)
        if is_main:
            folder.cut(state.step, evaluated=self.pending is None, logged=not self.sums)

    def _newest(self) -> State | None:
        """The newest state that is whole. Rank 0 finds it; the others read the same file."""
        states, device = self.folder.states, next(self.task.parameters()).device
        if self.world.size == 1:
            return states.newest(device)
        found: list[State] = []

        def find() -> bytes:
            found.extend(state for state in [states.newest(device)] if state is not None)
            return json.dumps([state.step for state in found]).encode()

        steps: list[int] = json.loads(self.world.broadcast(find))
        return next(iter(found or [states.read(step, device) for step in steps]), None)

    def due(self, step: int) -> bool:
        """Whether the run saves a state after this step."""
        return self.run.save_every is not None and step % self.run.save_every == 0

    @property
    def late(self) -> bool:
        """Whether the last state is too old."""
        return time.monotonic() - self._saved > SAVE_EVERY

    def save(self, step: int, sums: dict[str, float], pending: dict[str, Any] | None = None) -> None:
        """Start to save the state after a step, unless that is done. `pending` is that of the class.

        Raises RunError for weights that are not finite, and the error of the last write.
        """
        if step != self.step:
            self.refuse_infinite(step)
            self._save(step, sums, pending)

    def score(self, step: int, score: float | None, sums: dict[str, float]) -> None:
        """Start to save the weights after a step that was evaluated, as the best ones if they are, and its state."""
        rule = self.task.score
        assert rule is not None
        if score is None:
            warn_once(f"the validation split has no {rule.name}: the newest checkpoint counts as the best")
        is_best = score is None or rule.better(score, self.best)
        # A score that is only as good is kept, but it is no reason to train on.
        self.waited = 0 if is_best and score != self.best else self.waited + 1
        if is_best:
            self.best = self.best if score is None else score
            self._best = self.folder.states.best(step)
        self._save(step, sums, None, merged(self.average.values if self.average else self.task.state_dict()), is_best)

    def refuse_infinite(self, step: int) -> None:
        """Raise RunError if a weight is no longer a finite number."""
        if (name := not_finite(self.task)) is not None:
            raise RunError(f"{non_finite_weights(name)} after step {step}: {LOWER_RATE}")

    def _save(
        self,
        step: int,
        sums: dict[str, float],
        pending: dict[str, Any] | None,
        weights: dict[str, Any] | None = None,
        is_best: bool = False,
    ) -> None:
        self._writer.wait()  # the memory of the snapshot is in use until then
        values: dict[str, Any] | None = None
        if step != self.step:  # else the run has resumed before an evaluation: no state is written over another
            values = {
                "module": self.task.state_dict(),
                "optimizers": self.optimizers.state_dict(),
                "average": self.average.values if self.average else None,
            }
            values |= {"best": self.best, "waited": self.waited, "pending": pending, "sums": dict(sums)}
        if self.world.is_main:
            values, weights = self._snapshot.take([values, weights])
            self._writer.start(partial(self._write, step, values, weights, is_best, self._best))
        self.step, self.pending, self._saved = step, pending, time.monotonic()
        release_memory()

    def _write(
        self, step: int, values: dict[str, Any] | None, weights: dict[str, Any] | None, is_best: bool, best: Path | None
    ) -> None:
        """All files of a save, the state last: it needs the others."""
        self._snapshot.wait()
        folder = self.folder
        if weights is not None and is_best and best is not None:
            self.task.save(best, weights)
            copy_folder(best, folder.best)
            copy_folder(best, folder.last)
        elif weights is not None:
            self.task.save(folder.last, weights)
        if values is not None:
            folder.flush()
            folder.states.write(step, values, best, self.run.keep)

    def wait(self) -> None:
        """Until everything is written. Raises the error of the last write."""
        self._writer.wait()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        else:
            self._writer.abandon()
