"""The run folder, and the state that lets a stopped run go on, on the processor (CPU) to the same bits.

recipe.json     every value of the run            best/, last/    checkpoints that `vitrail.load` reads
metrics.jsonl   one line a log, val or test row   state/          weights, optimizer and average in training
classes.json    names of the classes              data.json       names, labels and counts, to know the data again by
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrail.data.sets import difference
from vitrail.errors import UserError
from vitrail.files import write_whole
from vitrail.train.optim import Average, Optimizers
from vitrail.train.run import Run


class RunFolder:
    """Reads and writes a run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best, self.last = path / "best", path / "last"
        self.metrics = path / "metrics.jsonl"
        self._state = path / "state" / "state.pt"
        self._data = path / "data.json"

    def refuse_taken(self) -> None:
        """Raise UserError where the folder cannot take a new run."""
        if (self.path / "recipe.json").exists():
            raise UserError(
                f"{self.path} already holds a run: go on with it by `vitrail train --resume {self.path}`, "
                "or choose another --out"
            )
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: choose another --out")

    def begin(self, run: Run, classes: list[str], data: dict[str, Any] | None = None) -> None:
        """Claim the folder for a new run. `data` are the marks of its data, which `check_data` compares."""
        self.refuse_taken()
        write_whole(self.path / "classes.json", json.dumps(classes))
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
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def save_state(
        self,
        step: int,
        best: float,
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
    ) -> tuple[int, float, dict[str, float]]:
        """Bring a run back to its last saved step; returns the steps done, the best score and the sums of `save_state`.

        (0, -1, {}) at the start.
        """
        if not self._state.exists():
            self.metrics.unlink(missing_ok=True)
            return 0, -1.0, {}
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
