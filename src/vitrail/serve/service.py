"""What the endpoints share: models, the worker, threads that decode, and how much of all is taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from vitrail.data.decode import EncodedImage
from vitrail.data.prepare import Sample
from vitrail.explain.explanation import Explanation, explanation, maps_of_answer
from vitrail.explain.image import explained_image, frame_of
from vitrail.process import cores
from vitrail.serve.decoding import decoded, open_image
from vitrail.serve.errors import ApiError, as_compressed_json, busy
from vitrail.serve.explaining import OUTPUTS_OF_LARGE, VALUES, Explainer, without_answer
from vitrail.serve.guard import stopping
from vitrail.serve.metrics import Metrics
from vitrail.serve.models import Changes, Served
from vitrail.serve.settings import Settings
from vitrail.serve.uploads import Upload
from vitrail.serve.worker import Worker

T = TypeVar("T")

MAX_DECODERS = 8
"""threads that decode at most: each holds an image"""


class Service:
    """What the endpoints share: models, the worker, threads that decode, and how much of all is taken."""

    def __init__(self, models: Sequence[Served], settings: Settings, worker: Worker, metrics: Metrics) -> None:
        self.models = {model.name: model for model in models}
        self.default = models[0].name
        self.settings, self.worker, self.metrics = settings, worker, metrics
        self.decoders = ThreadPoolExecutor(min(MAX_DECODERS, cores()), "vitrail-decode")
        self.large = ThreadPoolExecutor(1, "vitrail-large")
        self.explainer = Explainer(worker, settings.timeout)
        self.images, self.bytes = 0, 0
        """taken and not yet answered"""
        self.stopping = False

    def close(self) -> None:
        """Answer what was taken, and end the threads."""
        self.decoders.shutdown()
        self.large.shutdown()
        self.worker.close()

    def model(self, name: str | None) -> Served:
        """The model of this name; None: the default one. Raises ApiError (404)."""
        found = self.models.get(self.default if name is None else name)
        if found is None:
            names = ", ".join(self.models)
            raise ApiError(
                404, "no_such_model", f"no model is called {(name or '')[:100]!r}", f"the models are {names}"
            )
        return found

    @contextmanager
    def room_for_bytes(self, request: Request) -> Iterator[None]:
        """Room for an upload, before it is read. Raises ApiError (503) where there is none."""
        length = request.headers.get("content-length", "")
        size = int(length) if length.isdecimal() else self.settings.max_upload
        if self.bytes + size > self.settings.memory:
            raise busy("too many uploads are in progress", self._seconds())
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size

    @contextmanager
    def room_for_images(self, count: int) -> Iterator[None]:
        """Places in the queue. Raises ApiError (503) where it is full, or too long to be answered in time."""
        if self.stopping:
            raise stopping()
        if self.images and (self.images + count > self.settings.queue or self._seconds() > self.settings.timeout):
            raise busy("the queue is full", self._seconds())
        self.images += count
        self.metrics.waiting.set(self.images)
        try:
            yield
        finally:
            self.images -= count
            self.metrics.waiting.set(self.images)

    def _seconds(self) -> float:
        """How long what waits will take."""
        return self.images / self.worker.rate if self.worker.rate else 1.0

    async def decoded(self, data: bytes, name: str, then: Callable[[EncodedImage], T]) -> T:
        """What a function makes of an image that it decodes, in a thread. Raises ApiError."""
        loop = asyncio.get_running_loop()

        def decode() -> tuple[Any, T | None]:
            opened = open_image(data, name, self.settings.max_pixels)
            return (opened, None) if opened.large else (None, decoded(opened, then))

        opened, found = await loop.run_in_executor(self.decoders, decode)
        if opened is not None:
            return await loop.run_in_executor(self.large, decoded, opened, then)
        return found  # type: ignore[return-value]

    async def row(self, model: Served, data: bytes, name: str, changes: Changes, explain: bool) -> dict[str, Any]:
        """The answer for an image, as `predict --json` prints it but for the path. Raises ApiError."""
        task = model.task

        def submit(image: EncodedImage) -> tuple[Future[Any], tuple[Sample, list[float]] | None]:
            sample, run = task.prepare(image), partial(model.answer, changes=changes)
            future = self.worker.submit(run, sample, (model.name, changes))
            return future, (sample, frame_of(task, image, sample)) if explain else None

        future, to_explain = await self.decoded(data, name, submit)
        answer = await asyncio.wrap_future(future)
        # A mask of many pixels takes a while to encode.
        row = await asyncio.get_running_loop().run_in_executor(self.decoders, answer.row)
        found = {"task": task.name, **row}
        if to_explain is not None:
            found["explanation"] = await self.maps(model, *to_explain)
        self.metrics.images.labels(model.name).inc()
        return found

    async def maps(self, model: Served, sample: Sample, frame: list[float]) -> dict[str, Any]:
        """The packed maps that go beside a prediction."""
        return without_answer(await self.explainer.run(lambda pause: maps_of_answer(model.task, sample, frame, pause)))

    async def explanation(self, model: Served, upload: Upload, request: Request) -> Response:
        """The answer of `POST /v1/explain`. Raises ApiError."""
        loop, accepted = asyncio.get_running_loop(), request.headers.get("accept-encoding", "")

        def to_response(found: Explanation) -> Response:
            return as_compressed_json({"model": model.name, "explanation": found.packed()}, accepted)

        async with self.in_time():
            read = partial(explained_image, model.task)
            image = await self.decoded(upload.images[0], "image 1", read)
            beside = None if upload.beside is None else await self.decoded(upload.beside, "beside", read)
            found = await self.explainer.run(
                lambda pause: explanation(
                    model.task, image, beside, (), VALUES, upload.of_class, OUTPUTS_OF_LARGE, pause
                ),
                request,
            )
            self.metrics.images.labels(model.name).inc()
            return await loop.run_in_executor(self.decoders, to_response, found)

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raises ApiError (503) for what takes longer than the time limit."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                yield
        except TimeoutError:
            raise busy("the answer was not ready in time", self._seconds(), "timeout") from None

    async def rows(self, upload: Upload, one: Callable[[bytes, str], Any]) -> list[dict[str, Any]]:
        """The answers for all images of a request, in their order.

        An image that cannot be read has an `error`, as `predict --json` prints it; the request is an error only if none
        can be read.
        """
        names = [f"image {number}" for number in range(1, len(upload.images) + 1)]
        waiting = [asyncio.ensure_future(one(*each)) for each in zip(upload.images, names, strict=True)]
        try:
            async with self.in_time():
                found = await asyncio.gather(*waiting, return_exceptions=True)
        finally:
            for task in waiting:
                task.cancel()
        errors = [error for error in found if isinstance(error, BaseException)]
        for error in errors:
            if not isinstance(error, ApiError):
                raise error
        if len(errors) == len(found):
            raise errors[0]
        return [{"error": str(row)} if isinstance(row, ApiError) else row for row in found]  # type: ignore[misc]
