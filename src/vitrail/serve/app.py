"""The endpoints."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from vitrail import __version__
from vitrail.data.prepare import Sample
from vitrail.errors import UserError
from vitrail.process import cores
from vitrail.serve import schema
from vitrail.serve.decoding import open_image, prepare
from vitrail.serve.errors import ApiError, as_json, busy
from vitrail.serve.explaining import explanation
from vitrail.serve.guard import Guard, stopping
from vitrail.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from vitrail.serve.models import Changes, Served
from vitrail.serve.settings import Settings
from vitrail.serve.uploads import Upload, read_upload
from vitrail.serve.worker import Worker

log = logging.getLogger("vitrail")
T = TypeVar("T")
Stream = Annotated[bool, Query(description="send the answer word by word, as server-sent events")]

HERE = Path(__file__).parent
PAGE, DOCS = HERE / "page", HERE / "docs"
"""static files: the page, built from `web/`, and Swagger UI"""
READ = ["GET", "HEAD"]
DECODERS = 8
"""the most threads that decode: each holds an image"""
HEARTBEAT = 10.0
"""seconds between comments in a stream that waits for its turn, so that proxies keep it open"""


class Service:
    """What the endpoints share: models, the worker, threads that decode, and how much of all is taken."""

    def __init__(self, models: Sequence[Served], settings: Settings, worker: Worker, metrics: Metrics) -> None:
        self.models = {model.name: model for model in models}
        self.default = models[0].name
        self.settings, self.worker, self.metrics = settings, worker, metrics
        self.decoders = ThreadPoolExecutor(min(DECODERS, cores()), "vitrail-decode")
        self.large = ThreadPoolExecutor(1, "vitrail-large")
        self.images, self.bytes = 0, 0
        """taken and not yet answered"""
        self.stopping = False

    def close(self) -> None:
        self.decoders.shutdown()
        self.large.shutdown()
        self.worker.close()

    def model(self, name: str | None) -> Served:
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
            raise busy("too many uploads are in work", self._seconds())
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

    async def prepared(self, model: Served, data: bytes, name: str, then: Callable[[Sample], T]) -> T:
        """What a function makes of an image as the model's input, in a thread. Raises ApiError."""
        loop = asyncio.get_running_loop()

        def decoded(opened: Any) -> T:
            return then(prepare(model.task, opened))

        def decode() -> tuple[Any, T | None]:
            opened = open_image(data, name, self.settings.max_pixels)
            return (opened, None) if opened.large else (None, decoded(opened))

        opened, found = await loop.run_in_executor(self.decoders, decode)
        if opened is not None:
            return await loop.run_in_executor(self.large, decoded, opened)
        return found  # type: ignore[return-value]

    async def row(self, model: Served, data: bytes, name: str, changes: Changes, explain: bool) -> dict[str, Any]:
        """The answer for an image, as `predict --json` prints it but for the path. Raises ApiError."""

        def submit(sample: Sample) -> tuple[Future[Any], Sample | None]:
            run = partial(model.answer, changes=changes)
            return self.worker.submit(run, sample, (model.name, changes)), sample if explain else None

        future, sample = await self.prepared(model, data, name, submit)
        answer = await asyncio.wrap_future(future)
        # A mask of many pixels takes a while to encode.
        row = await asyncio.get_running_loop().run_in_executor(self.decoders, answer.row)
        found = {"task": model.task.name, **row}
        if sample is not None:
            found["explanation"] = await self.explained(model, sample)
        self.metrics.images.labels(model.name).inc()
        return found

    async def explained(self, model: Served, sample: Sample) -> dict[str, Any]:
        return await asyncio.wrap_future(self.worker.call(lambda: explanation(model.task, sample)))

    async def rows(self, upload: Upload, one: Callable[[bytes, str], Any]) -> list[dict[str, Any]]:
        """The answers for all images of a request, in their order.

        An image that cannot be read has an `error`, as `predict --json` prints it; the request is an error only if none
        can be read.
        """
        names = [f"image {number}" for number in range(1, len(upload.images) + 1)]
        waiting = [asyncio.ensure_future(one(*each)) for each in zip(upload.images, names, strict=True)]
        try:
            async with asyncio.timeout(self.settings.timeout):
                found = await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            raise busy("the answer was not ready in time", self._seconds(), "timeout") from None
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


def create_app(models: Sequence[Served], settings: Settings, worker: Worker, metrics: Metrics | None = None) -> FastAPI:
    """The application. Its `state.service` is closed by whoever runs it."""
    service = Service(models, settings, worker, metrics or Metrics())
    app = FastAPI(
        title="vitrail",
        version=__version__,
        summary="Vision Transformers over HTTP",
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    _add_errors(app)
    _add_models(app, service)
    _add_state(app, service)
    _add_files(app)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    if settings.origins:  # outermost, so that a page elsewhere can read errors too
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/predict",
        openapi_extra=schema.body(top=True),
        responses={200: {"model": schema.Predictions, "content": {"text/event-stream": {}}}, **schema.ERRORS},
        response_class=Response,
        operation_id="predict",
        summary="Run a model on images",
    )
    async def predict(request: Request, stream: Stream = False) -> Response:
        with service.room_for_bytes(request):
            upload = await read_upload(request, service.settings)
            model = service.model(upload.model)
            changes = model.changes(upload.top)
            if stream:
                return _streamed(service, model, upload)
            with service.room_for_images(len(upload.images)):
                found = await service.rows(
                    upload, lambda data, name: service.row(model, data, name, changes, upload.explain)
                )
        return as_json({"model": model.name, "predictions": found})

    @app.post(
        "/v1/explain",
        openapi_extra=schema.body(top=False),
        responses={200: {"model": schema.Explanations}, **schema.ERRORS},
        response_class=Response,
        operation_id="explain",
        summary="Explain what a model sees in images",
    )
    async def explain(request: Request) -> Response:
        with service.room_for_bytes(request):
            upload = await read_upload(request, service.settings, ("model",))
            model = service.model(upload.model)

            async def one(data: bytes, name: str) -> dict[str, Any]:
                row = await service.row(model, data, name, (), True)
                return {**row.pop("explanation"), "prediction": row}

            with service.room_for_images(len(upload.images)):
                found = await service.rows(upload, one)
        return as_json({"model": model.name, "explanations": found})

    @app.get(
        "/v1/models",
        responses={200: {"model": schema.Models}, **schema.READING},
        response_class=Response,
        operation_id="models",
        summary="The models that are served",
    )
    async def models() -> Response:
        return as_json({"default": service.default, "models": [model.card() for model in service.models.values()]})


def _streamed(service: Service, model: Served, upload: Upload) -> Response:
    """Server-sent events: `word` with the answer so far, and at the end `done` with the whole answer, or `error`."""
    if not model.task.streams:
        names = [each.name for each in service.models.values() if each.task.streams]
        hint = f"choose the model {names[0]}" if names else "leave stream out"
        raise ApiError(422, "no_stream", f"the model {model.name} answers at once", hint)
    if len(upload.images) != 1 or upload.explain:
        raise ApiError(422, "no_stream", "a stream is for one image, without explain", "send one request per image")
    room = ExitStack()
    room.enter_context(service.room_for_images(1))  # a queue that is full is an error before the stream begins

    async def events() -> AsyncIterator[bytes]:
        async for name, value in _words(service, model, upload.images[0]):
            yield b": waiting\n\n" if name is None else f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()

    return _Stream(events(), room)


class _Stream(StreamingResponse):
    """Events, and what to leave behind them, also where the client has gone before the first."""

    def __init__(self, events: AsyncIterator[bytes], room: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.room:
            await super().__call__(scope, receive, send)


class _Abandoned(Exception):
    """The client of a stream has gone."""


async def _words(service: Service, model: Served, data: bytes) -> AsyncIterator[tuple[str | None, Any]]:
    loop, drafts, gone = asyncio.get_running_loop(), asyncio.Queue[str | None](), False

    def tell(text: str | None) -> None:
        if gone:
            raise _Abandoned
        loop.call_soon_threadsafe(drafts.put_nowait, text)

    def run(sample: Sample) -> dict[str, Any]:
        try:
            with model.engine.precise():
                return {"task": model.task.name, **model.engine.task.stream(sample, tell).row()}
        finally:
            loop.call_soon_threadsafe(drafts.put_nowait, None)

    try:
        sample = await service.prepared(model, data, "image 1", lambda sample: sample)
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
        service.metrics.images.labels(model.name).inc()
        yield "done", {"model": model.name, "predictions": [row]}
    except (ApiError, UserError) as error:
        yield "error", _as_api(error).body()
    finally:
        gone = True


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_model=schema.Health, summary="Whether the process runs")
    async def healthz() -> Response:
        return as_json({"status": "ok"})

    @app.get(
        "/readyz",
        response_model=schema.Health,
        responses={503: schema.ERRORS[503]},
        summary="Whether requests are taken",
    )
    async def readyz() -> Response:
        return stopping().response() if service.stopping else as_json({"status": "ready"})

    @app.get("/metrics", response_class=Response, responses=schema.READING, summary="Counts for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_files(app: FastAPI) -> None:
    """Swagger UI at `/docs`, and the page at `/`."""

    @app.api_route("/docs", methods=READ, include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(DOCS / "index.html")

    app.mount("/docs", StaticFiles(directory=DOCS), "docs")
    # Not mounted at `/`: that would answer 404 where a path of the interface has another method.
    app.mount("/assets", StaticFiles(directory=PAGE / "assets"), "assets")
    for file in (PAGE, *sorted(PAGE.glob("*.*"))):
        app.add_route("/" if file == PAGE else f"/{file.name}", _sender(file), READ, include_in_schema=False)


def _sender(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a file of the page, or of its folder. Browsers ask whether it has changed: its name stays."""

    async def send(request: Request) -> Response:
        return FileResponse(file / "index.html" if file.is_dir() else file, headers={"Cache-Control": "no-cache"})

    return send


def _as_api(error: Exception) -> ApiError:
    """Any error as one of the interface."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):  # of the task, such as an option that it lacks
        return ApiError(422, "refused", str(error), "change the request, or choose another model (GET /v1/models)")
    if isinstance(error, RequestValidationError):
        where = error.errors()[0]
        name = ".".join(map(str, where.get("loc", ())[1:]))
        return ApiError(422, "bad_query", f"{name}: {where.get('msg', 'not valid')}", "see /docs for the parameters")
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "disconnected", "the client has gone", "send the whole request")
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return ApiError(404, "not_found", "there is nothing at this path", "see /docs for the endpoints")
        hint = "see /docs for the endpoints and their methods"
        code = "method_not_allowed" if error.status_code == 405 else "refused"
        return ApiError(error.status_code, code, str(error.detail), hint, error.headers)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return busy("there is not enough memory for this request now", 10, "out_of_memory")
    log.error(f"internal error: {type(error).__name__}: {error}")
    return ApiError(500, "internal", "the server failed to answer", "report this with the line in the server's log")


def _add_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        return _as_api(error).response()

    for kind in (ApiError, UserError, HTTPException, RequestValidationError, ClientDisconnect, MemoryError, Exception):
        app.add_exception_handler(kind, answer)
