"""An answer word by word, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import ExitStack, aclosing
from functools import partial
from typing import Any

from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from vitrail.data.decode import EncodedImage
from vitrail.data.prepare import Sample
from vitrail.explain.image import frame_of
from vitrail.serve.errors import ApiError, as_api, busy
from vitrail.serve.models import Served
from vitrail.serve.service import Service
from vitrail.serve.uploads import Upload

HEARTBEAT = 10.0
"""seconds between comments in a stream that waits for its turn, so that proxies keep it open"""


def streamed(service: Service, model: Served, upload: Upload, room: ExitStack) -> Response:
    """Server-sent events: `word` with the answer so far, and at the end `done` with the whole answer, or `error`.

    The stream takes over what `room` holds for the request, such as the bytes of its upload, and leaves it at its end.
    """
    if not model.task.streams:
        names = [each.name for each in service.models.values() if each.task.streams]
        hint = f"choose the model {names[0]}" if names else "leave stream out"
        raise ApiError(422, "no_stream", f"the model {model.name} answers at once", hint)
    if len(upload.images) != 1:
        raise ApiError(422, "no_stream", "a stream is for one image", "send one request per image")
    room.enter_context(service.room_for_images(1))  # a queue that is full is an error before the stream begins
    if upload.explain:
        room.enter_context(service.explainer.room(1))

    async def events() -> AsyncGenerator[bytes, None]:
        async with aclosing(_words(service, model, upload.images[0], upload.explain)) as words:
            async for name, value in words:
                yield b": waiting\n\n" if name is None else f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()

    return _Stream(events(), room.pop_all())


class _Stream(StreamingResponse):
    """Events, and what to leave behind them, also where the client has gone before the first."""

    def __init__(self, events: AsyncGenerator[bytes, None], room: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.events, self.room = events, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.room:
            async with aclosing(self.events):  # which a client that leaves while it is sent to does not end
                await super().__call__(scope, receive, send)


class _Abandoned(Exception):
    """The client of a stream has gone."""


async def _words(
    service: Service, model: Served, data: bytes, explain: bool
) -> AsyncGenerator[tuple[str | None, Any], None]:
    loop, drafts, gone = asyncio.get_running_loop(), asyncio.Queue[str | None](), False
    future: Future[dict[str, Any]] = Future()

    def tell(text: str | None) -> None:
        if gone:
            raise _Abandoned
        loop.call_soon_threadsafe(drafts.put_nowait, text)

    def run(sample: Sample) -> dict[str, Any]:
        try:
            with model.engine.autocast():
                return {"task": model.task.name, **model.engine.task.stream(sample, tell).row()}
        finally:
            loop.call_soon_threadsafe(drafts.put_nowait, None)

    def prepare(image: EncodedImage) -> tuple[Sample, list[float]]:
        sample = model.task.prepare(image)
        return sample, frame_of(model.task, image, sample)

    try:
        sample, frame = await service.decoded(data, "image 1", prepare)
        future = service.worker.call(partial(run, sample))
        last, until = "", loop.time() + service.settings.timeout
        while True:
            try:
                text = await asyncio.wait_for(drafts.get(), HEARTBEAT)
            except TimeoutError:
                if loop.time() > until and future.cancel():
                    raise busy("the answer was not ready in time", 10, "timeout") from None
                yield None, None
                continue
            if text is None:
                break
            if text != last:
                last = text
                yield "word", {"text": text}
        row = await asyncio.wrap_future(future)
        if explain:
            async with service.in_time():
                row["explanation"] = await service.maps(model, sample, frame)
        service.metrics.images.labels(model.name).inc()
        yield "done", {"model": model.name, "predictions": [row]}
    except Exception as error:  # the status has been sent: only an event can tell
        yield "error", as_api(error).body()
    finally:
        gone = True
        future.cancel()  # if its turn has not come
