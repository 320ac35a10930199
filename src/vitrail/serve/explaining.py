"""Explanations over HTTP: they run on the worker's thread, in steps between which predictions are answered.

A model has hooks while a step explains it, so that no other thread may run it. Predictions that come meanwhile wait for
one step: a pass of the model with its gradients, or its attention matrices.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from vitrail.explain.explanation import Explanation
from vitrail.serve.errors import busy
from vitrail.serve.worker import Worker

VALUES = 3_000_000
"""numbers of the attention between patches that an answer holds: 4 MB of base64 (see `explanation`)"""
OUTPUTS_OF_LARGE = 4
"""outputs whose relevance an answer holds for an image of very many patches: others are requested by their class"""
MAX_EXPLANATIONS = 16
"""explanations that may wait at once, and images that one request may have explained"""
POLL_SECONDS = 0.5
"""seconds between two checks whether the client is still connected"""


class Abandoned(Exception):
    """Nobody waits for this explanation any more."""


class Explainer:
    """What is explained, and what waits for it."""

    def __init__(self, worker: Worker, timeout: float) -> None:
        self.worker, self.timeout = worker, timeout
        self.waiting = 0
        """explanations that were taken and not yet answered"""
        self.seconds = 0.0
        """of one explanation, lately; 0 before the first"""

    @contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Places for explanations. Raises ApiError (503) where too many wait, or they would not be ready in time."""
        ahead = self.waiting * self.seconds
        if self.waiting and (self.waiting + count > MAX_EXPLANATIONS or ahead + self.seconds > self.timeout):
            raise busy("too many explanations are in progress", ahead or 1.0)
        self.waiting += count
        try:
            yield
        finally:
            self.waiting -= count

    async def run(
        self, explain: Callable[[Callable[[], None]], Explanation], request: Request | None = None
    ) -> Explanation:
        """The result of a function that explains, which gets what it must call between its steps.

        It ends at the next step if this call is cancelled, or if the client of `request` has gone.
        """
        gone = False

        def pause() -> None:
            if gone:
                raise Abandoned
            self.worker.run_waiting()

        def timed() -> Explanation:
            began = time.monotonic()
            found = explain(pause)
            spent = time.monotonic() - began
            self.seconds = 0.7 * self.seconds + 0.3 * spent if self.seconds else spent
            return found

        future = asyncio.wrap_future(self.worker.call(timed, long=True))
        try:
            while request is not None and not (await asyncio.wait([future], timeout=POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    raise ClientDisconnect
            return await future
        finally:
            gone = True
            future.cancel()


def without_answer(found: Explanation) -> dict[str, Any]:
    """A packed explanation to send beside a prediction, which has the answer itself."""
    return {name: value for name, value in found.packed().items() if name not in ("answer", "text")}
