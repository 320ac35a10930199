"""The run folder, from which a stopped run resumes: on the CPU, bit for bit.

recipe.json     every value of the run            best/, last/    checkpoints that `vitrail.load` reads
metrics.jsonl   one row per log, val or test      state/          the last states (see `train/states.py`)
classes.json    names of the classes              data.json       names, labels and counts, to recognise the data
scores.json     what the command printed          lock            exists while a process trains in the folder
job.json        what marks the job that trains (see `train/job.py`), where something may start it again
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vitrail.data.sets import difference
from vitrail.errors import UserError
from vitrail.files import append_atomic, retrying, sync, write_atomic
from vitrail.tasks.values import Score
from vitrail.train.run import FREE, Run, changed_fields
from vitrail.train.states import States
from vitrail.train.tensorboard import Events

log = logging.getLogger("vitrail")

LEASE = 150.0
"""seconds for which a network file system may keep the locks of a machine that has failed, and some more"""


class Taken(UserError):
    """The folder already holds a run, or another process trains in it."""


class RunFolder:
    """Reads and writes a run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best, self.last = path / "best", path / "last"
        self.metrics, self.report = path / "metrics.jsonl", path / "report.html"
        self.events: Events | None = None
        """writes the log for TensorBoard too"""
        self.states = States(path / "state")
        self._recipe = path / "recipe.json"
        self._data = path / "data.json"
        self._scores = path / "scores.json"
        self._job = path / "job.json"

    @contextmanager
    def alone(self, patience: float = 0.0) -> Iterator[None]:
        """Keep other processes from training in the folder, which is created if missing.

        Raises Taken if another process still does after `patience` seconds. The operating system holds the lock, so a
        killed process leaves none.
        """
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        place = self.path / "lock"
        handle = self._lock(place, time.monotonic() + patience)
        try:
            yield
        finally:
            place.unlink(missing_ok=True)  # before another process can lock it
            os.close(handle)
            for path in missing:  # if still empty: a run that failed to start leaves nothing
                with contextlib.suppress(OSError):
                    path.rmdir()

    def _lock(self, place: Path, until: float) -> int:
        """The handle of a file that this process alone has locked. Others may hold it until that time."""
        import fcntl  # missing on Windows

        while True:
            try:
                handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # another process failed to start and removed the folder
                place.parent.mkdir(parents=True, exist_ok=True)
                continue
            try:
                # Not flock: the workers of a killed process would keep its lock.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    os.close(handle)
                    if time.monotonic() < until:
                        time.sleep(1)
                        continue
                    raise Taken(
                        f"another process is training in {self.path}: wait until it ends, or start another run with "
                        "another --out"
                    ) from None
                # The file system has no locks.
                log.warning(f"{self.path} cannot be locked ({error.strerror}): do not start a second run in it")
            # The previous owner may have removed the file after it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), place.stat()):
                    return handle
            os.close(handle)

    @contextmanager
    def new(self) -> Iterator[None]:
        """Like `alone`, for a new run. Raises Taken if the folder already holds a run, or is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise Taken(f"{self.path} is a file: choose another --out")
        if not (taken := self._recipe.exists()):
            with self.alone():
                if not (taken := self._recipe.exists()):  # another process may have written it by now
                    yield
        if taken:
            raise Taken(
                f"{self.path} already holds a run: continue it with `vitrail train --resume {self.path}`, "
                "or choose another --out"
            )

    def begin(
        self, run: Run, classes: Sequence[str], data: dict[str, Any] | None = None, job: Sequence[str] = ()
    ) -> None:
        """Write the files of a new run. `data` is the fingerprint of its data, which `check_data` compares.

        `job` is what marks the job that begins it.
        """
        write_atomic(self.path / "classes.json", json.dumps(list(classes)))
        self.record(job)
        if data is not None:
            write_atomic(self._data, json.dumps(data))
        write_atomic(self._recipe, json.dumps(run.as_dict(), indent=2) + "\n")

    def change(self, run: Run, data: dict[str, Any]) -> None:
        """Replace the values of a run that is resumed, and the fingerprint of its data. It is not finished then."""
        for path in (self._scores, self.report):  # the report of a shorter run would stand for that of the longer one
            path.unlink(missing_ok=True)
        write_atomic(self._data, json.dumps(data))
        write_atomic(self._recipe, json.dumps(run.as_dict(), indent=2) + "\n")

    def record(self, job: Sequence[str]) -> None:
        """Write down what marks the job that trains from now on, if anything does."""
        if job:
            write_atomic(self._job, json.dumps(list(job)))

    def begun_by(self, job: Sequence[str]) -> bool:
        """Whether the folder holds a run of the job with one of these marks."""
        if not (job and self._recipe.exists() and self._job.exists()):
            return False
        try:
            return not set(json.loads(self._job.read_text())).isdisjoint(job)
        except (ValueError, TypeError):
            raise UserError(f"{self._job} is damaged: remove it, and resume with --resume {self.path}") from None

    def run(self) -> Run:
        """The run of the folder. Raises UserError if there is none, or if its recipe is damaged."""
        try:
            return Run.from_dict(json.loads(self._recipe.read_text()))
        except OSError as error:
            inner, hint = runs_below(self.path), "give the folder that --out named"
            if inner:
                hint = f"a grid continues by the same command with its --grid, and one run by its folder, as {inner[0]}"
            raise UserError(f"{self.path} holds no run to resume: {hint}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._recipe} is damaged: restore it, or start a new run in another --out") from error

    def data(self, named: str) -> str:
        """The path or name of the run's data: where it was, if nothing is at the path that was `named`."""
        return named if Path(named).exists() else self.place(named)

    def place(self, named: str) -> str:
        """The absolute path of the run's data when the run last started, or `named` if it has no path."""
        try:
            return str(json.loads(self._data.read_text())["path"])
        except (OSError, ValueError, KeyError, TypeError):
            return named

    def learned_from(self, now: dict[str, Any]) -> bool:
        """Whether the run was trained on the data with the fingerprint `now`, wherever it was."""
        try:
            return difference(json.loads(self._data.read_text()), now) is None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def check_data(self, now: dict[str, Any], name: str) -> None:
        """Raise UserError if the data, with the fingerprint `now`, has changed since the run started."""
        try:
            changed = difference(json.loads(self._data.read_text()), now)
        except FileNotFoundError:
            return  # removed, as the next line advises
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self._data} is damaged: remove it to resume with the present data") from None
        if changed is not None:
            raise UserError(f"{name} has changed since the run started: {changed}; restore it, or start a new run")

    def check_held_back(self, now: dict[str, str], name: str) -> None:
        """Raise UserError if other images than at the run's start are held back: it has learned from some of them."""
        before = json.loads(self._data.read_text()) if now and self._data.exists() else now
        if any(before.get(key) != own for key, own in now.items()):
            raise UserError(
                f"{name} has changed since the run started: by their content, other images would be held back for "
                "validation, some of which the run has learned; restore it, or start a new run"
            )

    @property
    def scores(self) -> dict[str, Any] | None:
        """The scores that the finished run printed; None if it is not finished."""
        # The report is the last file that a run writes.
        there = self._scores.is_file() and self.report.is_file()
        if not there or all(row["kind"] != "done" for row in self.rows()):
            return None
        try:
            scores = json.loads(self._scores.read_text())
        except ValueError:
            raise UserError(f"{self._scores} is damaged: remove it to score the run again") from None
        return scores

    def end(self, scores: dict[str, Any]) -> None:
        """Save the scores that the command prints."""
        write_atomic(self._scores, json.dumps(scores))

    def log_start(
        self, run: Run, score: Score | None, step: int, command: str, images: Mapping[str, int], processes: int = 1
    ) -> None:
        """The first row of a new or resumed run: its values, which score chooses the best checkpoint, and how.

        `images` are the numbers of images of the splits, with what is held back for validation apart from the rest.
        """
        chosen = {} if score is None else {"score": asdict(score)}
        more = {"images": dict(images), "processes": processes, "recipe": run.as_dict()}
        self.log(kind="start", step=step, **chosen, command=command, **more)

    def check_recipe(self, run: Run) -> None:
        """Refuse a run whose values were edited in its recipe since its last state: its log would tell of two runs."""
        rows = self.rows() if self.states.steps() else []
        was = next((row["recipe"] for row in reversed(rows) if "recipe" in row), None)
        edited = [
            name for name in (changed_fields(Run.from_dict(was), run) if was else ()) if name not in (*FREE, "data")
        ]
        if edited:
            raise UserError(
                f"{self._recipe} was edited since the run was saved ({', '.join(edited)}), and a resumed run keeps its "
                f"settings: restore them, or start a new run with `vitrail train {self._recipe} --out FOLDER`"
            )

    def log(self, **row: Any) -> None:
        """Add a line to metrics.jsonl."""
        retrying(partial(append_atomic, self.metrics, json.dumps(row) + "\n"))
        if self.events is not None:
            self.events.add(row, self.rows)

    def rows(self) -> list[dict[str, Any]]:
        """The rows so far, without a last line that is incomplete because the process was killed."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError:
            raise UserError(f"{self.metrics} is damaged: remove the lines that are not JSON") from None

    def drop(self) -> None:
        """Delete the folder if nothing in it could be resumed."""
        if self.best.exists() or self.last.exists() or self.states.steps():
            return
        # The first makes it a run.
        for path in (self._recipe, self.path / "classes.json", self._data, self._job, self.metrics):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.states.path, ignore_errors=True)  # the first state could not be written

    def cut(self, step: int, evaluated: bool, logged: bool) -> None:
        """Remove the rows after a step, and those of the end: the run will write them again.

        Also the row of an evaluation after that step, unless the run had `evaluated`, and its row of training, unless
        it was `logged` before the state was saved: a run that stops early writes one for the steps that are left.
        """
        rows = [row for row in self.rows() if row["step"] <= step and row["kind"] not in ("test", "done")]
        again = {kind for kind, there in (("val", evaluated), ("train", logged)) if not there}
        rows = [row for row in rows if row["step"] < step or row["kind"] not in again]
        write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def flush(self) -> None:
        """Flush the log to disk: no row may be missing before a saved state."""
        if self.metrics.exists():
            sync(self.metrics)

    def remove_leftovers(self) -> None:
        """Remove the temporary files and folders of a process that was killed."""
        files = (self.metrics, self.report, self._scores, self._recipe, self._data, self._job)
        for place in (self.best, self.last, *files):
            for path in self.path.glob(f".{place.name}.*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def runs_below(path: Path) -> list[Path]:
    """The runs in the subfolders of a folder, such as those of a grid."""
    return sorted(each.parent for each in path.glob("*/recipe.json"))


class Follower(RunFolder):
    """The run folder for the ranks of a run that write nothing: the one with rank 0 does."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._own = TemporaryDirectory(prefix="vitrail-")
        self.metrics = Path(self._own.name) / "metrics.jsonl"

    @contextmanager
    def alone(self, patience: float = 0.0) -> Iterator[None]:
        yield

    def begin(
        self, run: Run, classes: Sequence[str], data: dict[str, Any] | None = None, job: Sequence[str] = ()
    ) -> None:
        pass

    def record(self, job: Sequence[str]) -> None:
        pass

    def change(self, run: Run, data: dict[str, Any]) -> None:
        pass

    def log(self, **row: Any) -> None:
        pass

    def end(self, scores: dict[str, Any]) -> None:
        pass

    def drop(self) -> None:
        pass
