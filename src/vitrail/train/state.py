"""The run folder, and the state that lets a stopped run go on, on the processor (CPU) to the same bits.

recipe.json     every value of the run            best/, last/    checkpoints that `vitrail.load` reads
metrics.jsonl   one line a log, val or test row   state/          weights, optimizer and average in training
classes.json    names of the classes              data.json       names, labels and counts, to know the data again by
scores.json     what the command printed          lock            there while a process trains in the folder
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrail.data.sets import difference
from vitrail.errors import UserError
from vitrail.files import write_whole
from vitrail.tasks.task import Score
from vitrail.train.optim import Average, Optimizers
from vitrail.train.run import Run

log = logging.getLogger("vitrail")


class Taken(UserError):
    """The folder holds a run, or another process trains in it."""


class RunFolder:
    """Reads and writes a run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best, self.last = path / "best", path / "last"
        self.metrics = path / "metrics.jsonl"
        self._state = path / "state" / "state.pt"
        self._data = path / "data.json"
        self._scores = path / "scores.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from training in the folder, which is made where there is none.

        Raises Taken where another one does. The lock is the system's, so that a process that is killed leaves none.
        """
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        place = self.path / "lock"
        handle = self._lock(place)
        try:
            yield
        finally:
            place.unlink(missing_ok=True)  # before another can have it
            os.close(handle)
            for path in made:  # what is still empty: a run that could not begin leaves nothing
                with contextlib.suppress(OSError):
                    path.rmdir()

    def _lock(self, place: Path) -> int:
        """The handle of a file that this process alone has locked."""
        import fcntl  # which Windows lacks

        while True:
            try:
                handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # another process, which could not begin, has removed the folder
                place.parent.mkdir(parents=True, exist_ok=True)
                continue
            try:
                # Not flock, whose lock the workers of a killed process would hold on to.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    os.close(handle)
                    raise Taken(
                        f"another process is training in {self.path}: wait until it has ended, or train elsewhere"
                    ) from None
                # The file system has no locks.
                log.warning(f"{self.path} cannot be locked ({error.strerror}): start no second training there")
            # Whoever had it before may have removed the file after it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), place.stat()):
                    return handle
            os.close(handle)

    @contextmanager
    def new(self) -> Iterator[None]:
        """`alone`, in a folder for a new run. Raises Taken where it holds one, or is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise Taken(f"{self.path} is a file: choose another --out")
        if not (taken := (self.path / "recipe.json").exists()):
            with self.alone():
                if not (taken := (self.path / "recipe.json").exists()):  # which another may have written by now
                    yield
        if taken:
            raise Taken(
                f"{self.path} already holds a run: continue it with `vitrail train --resume {self.path}`, "
                "or choose another --out"
            )

    def begin(self, run: Run, classes: Sequence[str], data: dict[str, Any] | None = None) -> None:
        """Write what a new run begins with. `data` are the marks of its data, which `check_data` compares."""
        write_whole(self.path / "classes.json", json.dumps(list(classes)))
        if data is not None:
            write_whole(self._data, json.dumps(data))
        write_whole(self.path / "recipe.json", json.dumps(run.as_dict(), indent=2) + "\n")

    def run(self) -> Run:
        """The run that the folder was begun with."""
        try:
            return Run.from_dict(json.loads((self.path / "recipe.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} holds no run to go on with: give the folder that --out named") from error

    def check_data(self, now: dict[str, Any], name: str) -> None:
        """Raise UserError where the data, whose marks are `now`, is not what the run began with."""
        try:
            changed = difference(json.loads(self._data.read_text()), now)
        except FileNotFoundError:
            return  # a run of an earlier version
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self._data} is damaged: remove it to go on with the data as it is") from None
        if changed is not None:
            raise UserError(f"{name} is not what the run began with: {changed}; put it back, or begin a new run")

    @property
    def scores(self) -> dict[str, Any] | None:
        """What the command that ended the run printed; None where it has not ended."""
        # The report is the last that a run writes.
        there = self._scores.is_file() and (self.path / "report.html").is_file()
        if not there or all(row["kind"] != "done" for row in self.rows()):
            return None
        try:
            scores = json.loads(self._scores.read_text())
        except ValueError:
            raise UserError(f"{self._scores} is damaged: remove it, and the run is scored again") from None
        return scores

    def end(self, scores: dict[str, Any]) -> None:
        """Keep what the command prints."""
        write_whole(self._scores, json.dumps(scores))

    def log_start(self, score: Score | None, step: int, command: str) -> None:
        """The first row of a run, or of one that is resumed: which score chooses the best checkpoint, and how."""
        chosen = {} if score is None else {"score": asdict(score)}
        self.log(kind="start", step=step, **chosen, command=command)

    def log(self, **row: Any) -> None:
        """Add a line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The rows so far; a last line that a kill cut off does not count."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError:
            raise UserError(f"{self.metrics} is damaged: remove the lines that are no JSON") from None

    def drop(self) -> None:
        """Give the folder up, if nothing was saved in it that one could go on from."""
        if self.best.exists() or self.last.exists() or self._state.exists():
            return
        for path in (self.path / "classes.json", self._data, self.path / "recipe.json", self.metrics):
            path.unlink(missing_ok=True)

    def save_state(
        self,
        step: int,
        best: float | None,
        module: nn.Module,
        optimizers: Optimizers,
        average: Average | None,
        sums: dict[str, float],
    ) -> None:
        """Write what `load_state` brings back; `sums` are those of the row of the log that is not yet full."""
        buffer = io.BytesIO()
        state = {
            "step": step,
            "best": best,
            "module": module.state_dict(),
            "optimizers": optimizers.state_dict(),
            "average": average.values if average else None,
            "sums": sums,
        }
        torch.save(state, buffer)
        write_whole(self._state, buffer.getvalue())

    def load_state(
        self, module: nn.Module, optimizers: Optimizers, average: Average | None
    ) -> tuple[int, float | None, dict[str, float]]:
        """Bring a run back to its last saved step; returns the steps done, the best score and the sums of `save_state`.

        (0, None, {}) at the start.
        """
        if not self._state.exists():
            self.metrics.unlink(missing_ok=True)
            return 0, None, {}
        device = next(module.parameters()).device
        try:
            state = torch.load(self._state, map_location=device, weights_only=True)
            module.load_state_dict(state["module"])
            optimizers.load_state_dict(state["optimizers"])
        except Exception as error:  # what unpickles broken bytes raises nearly anything
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{self._state} cannot be read ({reason}): remove it, and the run begins again from its start"
            ) from None
        if average is not None:
            average.values = state["average"]
        # Rows from after the saved step will be written again, as will those of the end.
        rows = [row for row in self.rows() if row["step"] <= state["step"] and row["kind"] not in ("test", "done")]
        write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return state["step"], state["best"], state.get("sums", {})  # which runs of earlier versions did not save
