"""Small models behind the application, in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from images import encoded, smooth
from starlette.testclient import TestClient
from task_examples import EXAMPLES

import vitrail
from vitrail.serve.app import create_app
from vitrail.serve.engines import Engine
from vitrail.serve.models import Changes, Served
from vitrail.serve.server import listening, server_for
from vitrail.serve.service import Service
from vitrail.serve.settings import Settings
from vitrail.serve.worker import Worker
from vitrail.tasks.task import Task
from vitrail.tasks.values import Prediction

PATIENCE = 60
"""seconds after which a test that waits has failed"""


@torch.no_grad()
def stirred(task: Task, seed: int = 0) -> Task:
    """The task with random weights everywhere: new heads are zero, and answer the same for every image."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in task.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return task.eval()


def classifier(seed: int = 0, classes: int = 7) -> Task:
    return stirred(vitrail.create("nano/2", classes=classes), seed)


def captioner(decoder: str = "recurrent") -> Task:
    torch.manual_seed(0)  # a draw of other weights may answer with one word alone
    return stirred(EXAMPLES["caption"][decoder]())


def served(name: str, task: Task) -> Served:
    return Served(name, task, Engine("eager", task), {"licence": "MIT", "training_data": None})


class Held(Served):
    """A model that answers once it is let go."""

    def __init__(self, name: str = "held") -> None:
        super().__init__(name, task := classifier(), Engine("eager", task), {})
        self.go, self.running = threading.Event(), threading.Event()

    def answer(self, samples: Sequence[Any], changes: Changes = ()) -> list[Prediction]:
        self.running.set()
        assert self.go.wait(PATIENCE)
        return super().answer(samples, changes)


@contextmanager
def client_of(*models: Served, max_batch: int = 8, **changes: Any) -> Iterator[TestClient]:
    """A client of an application with these models."""
    settings = Settings(max_batch=max_batch, **changes)
    app = create_app(models or [served("small", classifier())], settings, Worker(max_batch, settings.max_wait))
    try:
        yield TestClient(app, raise_server_exceptions=False)
    finally:
        app.state.service.close()


def service_of(client: TestClient) -> Service:
    """What the endpoints of the application share."""
    return cast(Service, cast(Any, client.app).state.service)


def photo(seed: int = 0, kind: str = "PNG", **options: Any) -> bytes:
    return encoded(smooth(seed=seed), kind, **options)


def form(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """The files of a form."""
    return [("images", ("photo", image)) for image in images]


def texts(*images: bytes) -> dict[str, Any]:
    """The same as JSON."""
    return {"images": [base64.b64encode(image).decode() for image in images]}


def error_of(response: Any, status: int, code: str) -> dict[str, str]:
    """The error of a response, which has this status and this code."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"code", "message", "hint"} and all(error.values())
    assert error["code"] == code, error
    return dict(error)


def near(found: Any, expected: Any) -> bool:
    """Whether plain data are equal, with numbers within 1e-4: in another batch they round differently."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[name], value) for name, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(near, found, expected))
    return bool(found == (pytest.approx(expected, rel=1e-4, abs=1e-4) if isinstance(expected, float) else expected))


@contextmanager
def live(*models: Served, **changes: Any) -> Iterator[tuple[int, Any, Any]]:
    """The server on a free port: the port, uvicorn's server and the service."""
    settings = Settings(**changes)
    app = create_app(models, settings, Worker(settings.max_batch, settings.max_wait))
    server = server_for(app, settings)
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield port, server, app.state.service
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            app.state.service.close()
    assert not thread.is_alive()


def exchange(port: int, request: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the JSON that a server sends for some bytes, over a connection of their own."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        connection.sendall(request)
        return answer_on(connection)


def answer_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """A response of JSON, which is read to its end."""
    reader = connection.makefile("rb")
    status = int(reader.readline().split()[1])
    length = 0
    while line := reader.readline().strip():
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return status, json.loads(reader.read(length))


def request_of(image: bytes) -> bytes:
    """A whole request of `POST /v1/predict`."""
    body = json.dumps(texts(image)).encode()
    head = f"POST /v1/predict HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body
