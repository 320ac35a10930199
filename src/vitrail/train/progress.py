"""Progress of a run on standard error: a bar on a terminal, otherwise occasional lines."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from vitrail.data.loader import Loader
from vitrail.tasks.values import Score

LINE_EVERY = 30.0
"""seconds between lines if standard error is not a terminal"""


class Progress:
    """Counts steps, images and waiting time."""

    def __init__(self, steps: int, start: int, loader: Loader, sums: dict[str, float] | None = None) -> None:
        self.steps, self.done, self.loader = steps, start, loader
        self.sums = sums or {}
        """sums over the steps since the last row, their number under `steps`, and the number of those that moved
        nothing, under `skipped` and `overflows`"""
        self.console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not sys.stderr.isatty(),
        )
        self.line = self.bar.add_task("train", total=steps, completed=start, text="")
        self.score = ""
        self.last_line = time.monotonic()
        self._restart()

    def __enter__(self) -> Progress:
        if not self.bar.disable:  # rich 13 prints an empty line for a bar that was never drawn
            self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.bar.disable:
            self.bar.__exit__(kind, error, trace)

    def _restart(self) -> None:
        """Restart the timing of images and steps."""
        self.began, self.waited = time.monotonic(), self.loader.wait
        self.images = self.timed = 0

    def step(self, row: dict[str, float], images: int) -> None:
        """Add a step's values and its number of images."""
        for name, value in {**row, "steps": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self._count(images)

    def skip(self, images: int, kind: str = "skipped") -> None:
        """Add a step that moved nothing, whose values are no numbers."""
        self.sums[kind] = self.sums.get(kind, 0.0) + 1
        self._count(images)

    def _count(self, images: int) -> None:
        self.done += 1
        self.images += images
        self.timed += 1
        text = self._text()
        self.bar.update(self.line, completed=self.done, text=text)
        if self.bar.disable and time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            print(f"vitrail: step {self.done}/{self.steps}  {text}  {self._left()}", file=sys.stderr, flush=True)

    def _rates(self) -> tuple[float, float]:
        seconds = max(time.monotonic() - self.began, 1e-9)
        return self.images / seconds, (self.loader.wait - self.waited) / seconds

    def _text(self) -> str:
        speed, wait = self._rates()
        loss = f"{self.sums['loss'] / self.sums['steps']:.3f}" if "steps" in self.sums else "none"
        return f"loss {loss}  {speed:.0f} images/s  {wait:.0%} waiting for data{self.score}"

    def _left(self) -> str:
        """Estimated time left, at the speed since the last evaluation."""
        seconds = (time.monotonic() - self.began) / self.timed * (self.steps - self.done)
        return f"{timedelta(seconds=round(seconds))} left"

    def row(self) -> dict[str, float]:
        """Means of the steps since the last row, for the log, and the number of those that moved nothing.

        Those whose gradient overflowed in fp16 are counted apart, as `overflows`.
        """
        speed, wait = self._rates()
        steps, skipped = self.sums.pop("steps", 0), int(self.sums.pop("skipped", 0))
        overflows = {"overflows": int(count)} if (count := self.sums.pop("overflows", 0)) else {}
        row = {name: value / steps for name, value in self.sums.items()}
        self.sums = {}
        self._restart()
        return {**row, "skipped": skipped, **overflows, "images_per_s": speed, "wait": wait}

    def evaluated(self, scores: dict[str, Any], rule: Score) -> None:
        """Show the score of an evaluation, and exclude its time from the speed."""
        self.score = f"  val {rule.name} {rule.text(scores[rule.name]) or 'none'}"
        self.console.print(f"vitrail: step {self.done}/{self.steps}:{self.score}", highlight=False)
        self._restart()
