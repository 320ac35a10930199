"""Predictions for many files: prepared in threads, answered in batches, in constant memory."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitrail.data.decode import EncodedImage
from vitrail.data.pixels import Doubts, Source
from vitrail.data.prepare import Sample
from vitrail.data.threads import in_order
from vitrail.errors import UserError
from vitrail.process import cores
from vitrail.tasks.exported import Exported
from vitrail.tasks.task import Task
from vitrail.tasks.values import Prediction
from vitrail.train.device import autocast, native_bf16
from vitrail.units import time_left

log = logging.getLogger("vitrail")

BATCH = 32
"""batch size"""
MAX_THREADS = 8
"""the most threads: each holds a decoded image, which may be large"""
PREFETCHED = 2
"""batches that are prepared while one is answered"""
TOLERANCE = 0.05
"""by how much a number of an answer in bf16 may differ from that in float32, relative to it"""
LINE_EVERY = 30.0
"""seconds between lines of progress"""
Row = dict[str, Any]
Precision = Literal["bf16", "fp32"]
"""of the answers"""


class Answered(NamedTuple):
    """A file and the model's prediction."""

    path: Path
    row: Row
    """`image`, `task`, and what `Prediction.row` gives, or `error`"""
    answer: Prediction | None
    """None for an unreadable file"""
    precision: Precision | None = None
    """the number format chosen for the images after the first batch; None while there is no choice"""


class Prepared(NamedTuple):
    """An image as the model's input."""

    name: str
    sample: Sample | str
    """or why it cannot be read"""
    source: Source | None


def answer_files(
    task: Task, paths: Sequence[Path], done: int = 0, precision: Precision | None = None
) -> Iterator[Answered]:
    """The prediction for each file after the first `done`, in order; warns of doubtful values at the end.

    Holds a few batches of images. Of more than one batch, the first is answered in bf16 too where the processor has it,
    and the rest in bf16 only if both agree. Batches are the same wherever a stopped command resumes, with the
    `precision` that it had chosen.
    """
    doubts, numbers = Doubts(), _Precision(task, len(paths) > BATCH)
    start = done - done % BATCH
    if start and precision is not None:
        numbers.chosen, numbers.decided = precision, True
    for batch in _batches(task, paths[start:]):
        for row, answer in _rows(task, batch, numbers, doubts):
            if start >= done:
                yield Answered(paths[start], row, answer, numbers.chosen if numbers.decided else None)
            start += 1
    if (doubtful := doubts.text()) is not None:
        log.warning(doubtful)


def answer_items(
    task: Task, items: Sequence[tuple[str, Path | bytes]], doubts: Doubts
) -> list[tuple[Row, Prediction | None]]:
    """The row and the prediction for each image of a batch: a name, and a file or its content.

    An image that cannot be read has a row with its error and None. `doubts` gets how the others were stored.
    """
    return list(_rows(task, [_prepared(task, *item) for item in items], _Precision(task, many=False), doubts))


def _rows(
    task: Task, batch: list[Prepared], precision: _Precision, doubts: Doubts
) -> Iterator[tuple[Row, Prediction | None]]:
    answers = iter(precision.answers([each.sample for each in batch if not isinstance(each.sample, str)]))
    for name, sample, source in batch:
        if source is not None:
            doubts.add(source)
        answer = None if isinstance(sample, str) else next(answers)
        fields = {"error": sample} if answer is None else answer.row()
        yield {"image": name, "task": task.name, **fields}, answer


def _batches(task: Task, paths: Sequence[Path]) -> Iterator[list[Prepared]]:
    """The files in batches, of which the next ones are prepared in threads meanwhile."""
    threads = min(MAX_THREADS, cores())
    prepared = in_order(lambda path: _prepared(task, str(path), path), paths, threads, (1 + PREFETCHED) * BATCH)
    with closing(prepared):
        while batch := list(islice(prepared, BATCH)):
            yield batch


def _prepared(task: Task, name: str, item: Path | bytes) -> Prepared:
    try:
        opened = EncodedImage(item, name)
        return Prepared(name, task.prepare(opened), opened.source)
    except UserError as error:
        return Prepared(name, str(error), None)  # the error object would keep the image in memory


class _Precision:
    """The number format of the answers, chosen on the first batch."""

    def __init__(self, task: Task, many: bool) -> None:
        self.task, self.device = task, next(task.parameters()).device
        self.chosen: Precision = "fp32"
        # The programs of an export have a number format of their own.
        self.decided = not many or isinstance(task, Exported) or not native_bf16(self.device)

    def answers(self, samples: list[Sample]) -> list[Prediction]:
        """The answers for a batch. The first batch also decides the number format of the later ones."""
        found = self._answers(samples, self.chosen)
        if samples and not self.decided:
            self.decided = True
            also = self._answers(samples, "bf16")
            if all(agree(one.row(), other.row()) for one, other in zip(found, also, strict=True)):
                self.chosen = "bf16"
                log.warning("the rest is answered in bf16, which agrees with float32 on the first images")
        return found

    def _answers(self, samples: list[Sample], precision: Precision) -> list[Prediction]:
        with autocast(self.device, precision):
            return self.task.answers(samples)


def agree(one: Any, other: Any) -> bool:
    """Whether two rows say the same, but for numbers that differ by at most `TOLERANCE`.

    In a ranking, such as labels with scores, the tolerance is relative to the first, neighbours may change places, and
    the last ones be replaced.
    """
    if isinstance(one, bool) or not isinstance(one, int | float | list | dict):
        return bool(one == other)
    if isinstance(one, int | float):
        return isinstance(other, int | float) and abs(one - other) <= TOLERANCE * max(abs(one), abs(other))
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(agree(one[name], other[name]) for name in one)
    if (both := (_ranked(one), _ranked(other)))[0] and both[1]:
        least, names = [min(each.values()) for each in both], both[0].keys() | both[1].keys()
        most = TOLERANCE * max(both[0].values())
        return all(abs(both[0].get(n, least[0]) - both[1].get(n, least[1])) <= most for n in names)
    return all(agree(a, b) for a, b in zip(one, other, strict=True))


def _ranked(records: list[Any]) -> dict[str, float]:
    """The probability of each name, for records of one name and one probability each, the largest first; else {}."""
    found: dict[str, float] = {}
    for record in records:
        names = [value for value in record.values() if isinstance(value, str)] if isinstance(record, dict) else []
        numbers = [value for value in record.values() if isinstance(value, float)] if names else []
        if len(names) != 1 or len(numbers) != 1 or len(record) != 2:
            return {}
        found[names[0]] = numbers[0]
    falling = sorted(found.values(), reverse=True)
    return found if falling == [*found.values()] and all(0 <= number <= 1 for number in falling) else {}


class Progress:
    """Lines on standard error about work that takes longer than half a minute, unless a terminal shows the answers."""

    def __init__(self, count: int, done: int = 0) -> None:
        self.count, self.done, self.first = count, done, done
        self.began = self.last = time.monotonic()

    def step(self, printed: bool) -> None:
        """Count an image, whose answer is `printed` or only kept; prints a line if the last one was long ago."""
        self.done += 1
        now = time.monotonic()
        # Answers arrive in batches: in the midst of one the rate would be wrong.
        if now - self.last < LINE_EVERY or self.done % BATCH or (printed and sys.stdout.isatty()):
            return
        self.last = now
        rate = (self.done - self.first) / (now - self.began)
        left = time_left((self.count - self.done) / rate)
        print(
            f"vitrail: {self.done:,} of {self.count:,} images, {rate:.3g} per second, {left}",
            file=sys.stderr,
            flush=True,
        )
