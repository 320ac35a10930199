"""Progress of a run on standard error: a bar on a terminal, otherwise occasional lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from vitrail.data.loader import Loader
from vitrail.tasks.values import Score
from vitrail.units import time_left

LINE_EVERY, LINES = 30.0, 20
"""seconds between lines if standard error is not a terminal, and how many a long run prints while its time doubles"""
WAITING = 0.1
"""fraction of the time from which waiting for data is shown"""
LEAST_BAR = 6
"""columns of a terminal that the bar needs"""


class Progress:
    """Counts steps, images and waiting time."""

    def __init__(self, steps: int, start: int, loader: Loader, sums: dict[str, float] | None = None) -> None:
        self.steps, self.done, self.loader = steps, start, loader
        self.sums = sums or {}
        """sums over the steps since the last row, their number under `steps`, and the number of those that moved
        nothing, under `skipped` and `overflows`"""
        self.console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            console=self.console,
            expand=True,
            disable=not sys.stderr.isatty() or self.console.is_dumb_terminal,
        )
        self.line = self.bar.add_task("train", total=steps, completed=start, text="vitrail:")
        self.score = ""
        self.first = self.last_line = time.monotonic()
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
        if not self.bar.disable:
            self.bar.update(self.line, completed=self.done, text=self._fitted(self.console.width - LEAST_BAR - 1))
            return
        now = time.monotonic()
        if now - self.last_line > max(LINE_EVERY, (now - self.first) / LINES):
            self.last_line = now
            print(f"vitrail: {self.place()}: {', '.join(self._facts().values())}", file=sys.stderr, flush=True)

    def place(self) -> str:
        """Where the run is: `epoch 3.2 of 10, step 320 of 1000`."""
        done, steps = self._epochs
        return f"epoch {done} of {steps}, step {self.done:,} of {self.steps:,}"

    @property
    def _epochs(self) -> tuple[str, str]:
        """The epochs so far, and those of the run, rounded alike."""
        done, steps = (number / self.loader.steps_per_epoch for number in (self.done, self.steps))
        return (f"{done:.1f}", f"{round(steps, 1):g}") if steps > 1 else (f"{done:.2g}", f"{steps:.2g}")

    def _rates(self) -> tuple[float, float]:
        seconds = max(time.monotonic() - self.began, 1e-9)
        return self.images / seconds, (self.loader.wait - self.waited) / seconds

    def _facts(self) -> dict[str, str]:
        """What is known of the run, in the order in which it is shown. The current speed gives the time left."""
        speed, wait = self._rates()
        left = (time.monotonic() - self.began) / self.timed * (self.steps - self.done)
        facts = {
            "loss": f"loss {self.sums['loss'] / self.sums['steps']:.3f}" if "steps" in self.sums else "no loss",
            "score": self.score,
            "speed": f"{speed:.3g} images/s" if speed < 100 else f"{speed:,.0f} images/s",
            "wait": f"{wait:.0%} waiting for data" if wait >= WAITING else "",
            "left": time_left(left),
        }
        return {name: text for name, text in facts.items() if text}

    def _fitted(self, width: int) -> str:
        """One line for a terminal of this width: what matters least is left out."""
        facts = {"epoch": f"vitrail: epoch {'/'.join(self._epochs)}", **self._facts()}
        for name in ("speed", "wait", "score", "loss"):
            if len("  ".join(facts.values())) <= width:
                break
            facts.pop(name, None)
        return "  ".join(facts.values())

    def row(self) -> dict[str, float]:
        """Means of the steps since the last row, for the log, and the number of those that moved nothing.

        Those whose gradient overflowed in fp16 are counted apart, as `overflows`. There is no speed if all these steps
        were before a resume.
        """
        timed, (speed, wait) = self.timed, self._rates()
        steps, skipped = self.sums.pop("steps", 0), int(self.sums.pop("skipped", 0))
        overflows = {"overflows": int(count)} if (count := self.sums.pop("overflows", 0)) else {}
        row = {name: value / steps for name, value in self.sums.items()}
        self.sums = {}
        self._restart()
        rates = {"images_per_s": speed, "wait": wait} if timed else {}
        return {**row, "skipped": skipped, **overflows, **rates}

    def evaluated(self, scores: dict[str, Any], rule: Score, seconds: float) -> None:
        """Show the score of an evaluation, and exclude its `seconds` from the speed."""
        self.score = f"val {rule.name} {rule.text(scores[rule.name]) or 'none'}"
        print(f"vitrail: {self.place()}: {self.score}", file=sys.stderr, flush=True)
        self.began += seconds
