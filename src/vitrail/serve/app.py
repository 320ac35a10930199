"""The endpoints."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from vitrail import __version__
from vitrail.errors import UserError
from vitrail.explain.explanation import check_explainable
from vitrail.serve import schema
from vitrail.serve.errors import ApiError, as_api, as_json
from vitrail.serve.explaining import MAX_EXPLANATIONS
from vitrail.serve.guard import Guard, stopping
from vitrail.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from vitrail.serve.models import Served
from vitrail.serve.service import Service
from vitrail.serve.settings import Settings
from vitrail.serve.streams import streamed
from vitrail.serve.uploads import Upload, read_upload, too_many_images
from vitrail.serve.worker import Worker

Stream = Annotated[bool, Query(description="send the answer word by word, as server-sent events")]

HERE = Path(__file__).parent
PAGE, DOCS = HERE / "page", HERE / "docs"
"""static files: the page, built from `web/`, and Swagger UI"""
READ = ["GET", "HEAD"]


def create_app(models: Sequence[Served], settings: Settings, worker: Worker, metrics: Metrics | None = None) -> FastAPI:
    """The application. Its `state.service` is closed by whoever runs it."""
    service = Service(models, settings, worker, metrics or Metrics())
    app = FastAPI(
        title="vitrail",
        version=__version__,
        summary="Vision Transformers over HTTP",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # most clients would send the form no second time
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
        openapi_extra=schema.PREDICT,
        responses={200: {"model": schema.Predictions, "content": {"text/event-stream": {}}}, **schema.ERRORS},
        response_class=Response,
        operation_id="predict",
        summary="Run a model on images",
    )
    async def predict(request: Request, stream: Stream = False) -> Response:
        with ExitStack() as room:
            room.enter_context(service.room_for_bytes(request))
            upload = await read_upload(request, service.settings, Upload())
            model = service.model(upload.model)
            changes = model.changes(upload.top)
            if upload.explain:
                check_explainable(model.task)
            if stream:
                return streamed(service, model, upload, room)
            if upload.explain:
                if len(upload.images) > MAX_EXPLANATIONS:
                    raise too_many_images(MAX_EXPLANATIONS, "a request with explain")
                room.enter_context(service.explainer.room(len(upload.images)))
            room.enter_context(service.room_for_images(len(upload.images)))
            found = await service.rows(
                upload, lambda data, name: service.row(model, data, name, changes, upload.explain)
            )
        return as_json({"model": model.name, "predictions": found})

    @app.post(
        "/v1/explain",
        openapi_extra=schema.EXPLAIN,
        responses={200: {"model": schema.Explained}, **schema.ERRORS},
        response_class=Response,
        operation_id="explain",
        summary="Explain what a model sees in an image",
    )
    async def explain(request: Request) -> Response:
        with service.room_for_bytes(request):
            fields = ("model", "class", "beside")
            upload = await read_upload(request, service.settings, Upload(fields=fields, query=(), max_images=1))
            model = service.model(upload.model)
            check_explainable(model.task, upload.of_class)
            with service.explainer.room(1), service.room_for_images(1):
                return await service.explanation(model, upload, request)

    @app.get(
        "/v1/models",
        responses={200: {"model": schema.Models}, **schema.READING},
        response_class=Response,
        operation_id="models",
        summary="The models that are served",
    )
    async def models() -> Response:
        return as_json({"default": service.default, "models": [model.card() for model in service.models.values()]})


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


def _add_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        return as_api(error).response()

    for kind in (ApiError, UserError, HTTPException, RequestValidationError, ClientDisconnect):  # others: see Guard
        app.add_exception_handler(kind, answer)
