"""Latency and throughput of an export, in turns with the model and on request with every other engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from vitrail.errors import UserError, first_line
from vitrail.export.proof import normalised_noise
from vitrail.tasks.task import Task
from vitrail.train.device import ready_to_compile

BATCHES = (1, 8)
"""images at once"""
EAGER, COMPILED = "PyTorch", "PyTorch compiled"
WARM_UP = 2
"""calls before the first that counts: engines choose their kernels in them"""
SECONDS = 1.0
"""for each program, batch and engine, unless `MIN_CALLS` calls take longer"""
MIN_CALLS, MAX_CALLS = 3, 50
"""calls that count"""
Engines = Mapping[str, Mapping[str, Callable[..., Any]]]
"""by the engine's name, what runs each program"""


class Timed(NamedTuple):
    """The speed of one engine."""

    program: str
    batch: int
    engine: str
    milliseconds: float
    """per call: the median"""
    images_per_second: float


class Speed(NamedTuple):
    """What `measure` found."""

    rows: list[Timed]
    left_out: list[str]
    """engines that could not run, with the reason"""
    threads: int

    def text(self) -> str:
        """One line per program and batch: the model itself first, then how many times as fast each engine is."""
        return "\n".join([*self._lines(), *self.left_out])

    def _lines(self) -> Iterator[str]:
        for place in dict.fromkeys((row.program, row.batch) for row in self.rows):
            own = [row for row in self.rows if (row.program, row.batch) == place]
            eager = next(row for row in own if row.engine == EAGER).milliseconds
            each = [f"{row.engine} {_amounts(row)}" + _times(eager / row.milliseconds, row) for row in own]
            name = "" if place[0] == "model" else f"{place[0]}, "
            yield f"{name}batch {place[1]}: {'; '.join(each)}"

    def table(self) -> str:
        """The rows in Markdown."""
        head = "| program | batch | engine | ms | images/s |\n| --- | --- | --- | --- | --- |"
        rows = [
            f"| {row.program} | {row.batch} | {row.engine} | {row.milliseconds:.3g} | {row.images_per_second:.3g} |"
            for row in self.rows
        ]
        return "\n".join([head, *rows])

    def as_rows(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [row._asdict() for row in self.rows]


def _amounts(row: Timed) -> str:
    return f"{row.milliseconds:.3g} ms, {row.images_per_second:.3g} images/s"


def _times(ratio: float, row: Timed) -> str:
    return "" if row.engine == EAGER else f" ({ratio:.2g} times as fast)"


@torch.inference_mode()
def measure(task: Task, engines: Engines, size: tuple[int, int], compiled: bool) -> Speed:
    """Time the programs of a task on noise, with PyTorch and the engines in turns, at each batch of `BATCHES`."""
    rows: list[Timed] = []
    left_out: dict[str, str] = {}
    for batch in BATCHES:
        programs = task.programs({"image": normalised_noise(task, batch, size)})
        for name, program in programs.items():
            inputs = tuple(program.inputs.values())
            steps: dict[str, Callable[[], object]] = {EAGER: partial(program.module, *inputs)}
            if compiled and COMPILED not in left_out and can_compile(left_out):
                steps[COMPILED] = partial(torch.compile(program.module, dynamic=False), *inputs)
            steps |= {engine: partial(run[name], *inputs) for engine, run in engines.items() if engine not in left_out}
            for engine, seconds in in_turns(steps, left_out).items():
                rows.append(Timed(name, batch, engine, 1000 * seconds, batch / seconds))
    reasons = [f"{engine} is left out of the comparison: {reason}" for engine, reason in left_out.items()]
    return Speed(rows, reasons, torch.get_num_threads())


def can_compile(left_out: dict[str, str]) -> bool:
    """Whether there is a compiler; the reason goes to `left_out`."""
    try:
        ready_to_compile(torch.device("cpu"))
    except UserError as error:
        left_out[COMPILED] = str(error)
    return COMPILED not in left_out


def in_turns(steps: Mapping[str, Callable[[], object]], left_out: dict[str, str]) -> dict[str, float]:
    """Median seconds per call. The steps alternate, so that other load on the machine affects all equally."""
    running = {}
    for name, step in steps.items():
        try:
            for _ in range(WARM_UP):
                step()
            running[name] = seconds(step)
        except Exception as error:  # compilers and engines raise anything
            left_out[name] = first_line(error)[:200]
    if not running:
        return {}
    rounds = min(MAX_CALLS, max(MIN_CALLS, round(SECONDS / statistics.mean(running.values()))))
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name in running:
            times[name].append(seconds(steps[name]))
    return {name: statistics.median(each) for name, each in times.items()}


def seconds(step: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    step()
    return max(time.perf_counter() - began, 1e-9)


def card(title: str, facts: Mapping[str, str], speed: Speed, notes: Sequence[str]) -> str:
    """`CARD.md` of an export."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    threads = f"{speed.threads} thread" + "s" * (speed.threads != 1)
    said = "".join(f"\n{note}\n" for note in [*notes, *speed.left_out])
    return (
        f"# {title}\n\n| | |\n| --- | --- |\n{rows}\n{said}\n## Speed\n\nMedians of calls in turns in one run, on this "
        f"machine's CPU with {threads}: ratios hold better elsewhere than times.\n\n{speed.table()}\n"
    )
