"""Batches: what waits is answered together, each item gets its own result, and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from vitrail.serve.worker import Worker

PATIENCE = 60


@pytest.fixture
def gate() -> threading.Event:
    """What holds the worker until the queue is filled."""
    return threading.Event()


@pytest.fixture
def worker(gate: threading.Event) -> Iterator[Worker]:
    worker = Worker(max_batch=4, max_wait=0.0)
    worker.call(lambda: gate.wait(PATIENCE))
    yield worker
    gate.set()
    worker.close()


def results(futures: list[Future[Any]]) -> list[Any]:
    return [future.result(PATIENCE) for future in futures]


def test_items_of_one_key_are_answered_together_in_their_order(worker: Worker, gate: threading.Event) -> None:
    batches: list[list[int]] = []

    def double(items: list[int]) -> list[int]:
        batches.append(items)
        return [2 * item for item in items]

    futures = [worker.submit(double, i, key="odd" if i % 2 else "even") for i in range(12)]
    gate.set()
    assert results(futures) == [2 * i for i in range(12)]
    assert batches == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10], [9, 11]]


def test_items_without_a_key_are_answered_alone(worker: Worker, gate: threading.Event) -> None:
    futures = [worker.submit(lambda items: [len(items)], i) for i in range(3)]
    gate.set()
    assert results(futures) == [1, 1, 1]


def test_an_item_that_fails_does_not_spoil_its_batch(worker: Worker, gate: threading.Event) -> None:
    def invert(items: list[int]) -> list[float]:
        return [1 / item for item in items]

    futures = [worker.submit(invert, i, key="all") for i in (1, 0, 2)]
    gate.set()
    assert futures[0].result(PATIENCE) == 1 and futures[2].result(PATIENCE) == 0.5
    with pytest.raises(ZeroDivisionError):
        futures[1].result(PATIENCE)


def test_an_item_that_is_cancelled_is_not_answered(worker: Worker, gate: threading.Event) -> None:
    seen: list[int] = []

    def note(items: list[int]) -> list[int]:
        seen.extend(items)
        return items

    futures = [worker.submit(note, i, key="all") for i in range(3)]
    assert futures[1].cancel()
    gate.set()
    assert (futures[0].result(PATIENCE), futures[2].result(PATIENCE)) == (0, 2) and seen == [0, 2]


def test_closing_finishes_what_waits(gate: threading.Event) -> None:
    worker = Worker(max_batch=2, max_wait=10.0)
    worker.call(lambda: gate.wait(PATIENCE))
    futures = [worker.submit(lambda items: items, i, key="all") for i in range(5)]
    threading.Timer(0.05, gate.set).start()
    worker.close()
    assert [future.result(0) for future in futures] == list(range(5))
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(lambda items: items, 1)


def test_a_batch_that_is_full_does_not_wait(gate: threading.Event) -> None:
    worker = Worker(max_batch=2, max_wait=10 * PATIENCE)
    futures = [worker.submit(lambda items: [len(items)] * 2, i, key="all") for i in range(2)]
    assert results(futures) == [2, 2]
    worker.close()
