"""Streams whose client leaves or whose model fails: nothing is kept, nothing runs for nobody, and the end is told."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any, cast

import pytest
from serve.serving import PATIENCE, captioner, client_of, photo, served, service_of, texts
from starlette.testclient import TestClient

from vitrail.serve.service import Service


async def leave_while_waiting(client: TestClient, service: Service, body: bytes) -> int:
    """A client that asks for a stream and leaves before its turn. Returns the bytes that were held for it."""
    read, sent = False, asyncio.Queue[Any]()
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal read
        if not read:
            read = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "raw_path": b"/v1/predict", "root_path": ""}
    scope |= {"query_string": b"stream=true", "http_version": "1.1", "scheme": "http", "server": ("here", 1)}
    length = str(len(body)).encode()
    scope |= {"client": ("there", 2), "headers": [(b"content-type", b"application/json"), (b"content-length", length)]}
    answering = asyncio.ensure_future(cast(Any, client.app)(scope, receive, sent.put))
    async with asyncio.timeout(PATIENCE):
        while not service.worker.jobs:
            await asyncio.sleep(0.01)
        held = service.bytes
        left.set()
        await answering
    return held


def test_a_stream_whose_client_leaves_before_its_turn_takes_no_turn_and_keeps_nothing() -> None:
    body = json.dumps(texts(photo())).encode()
    with client_of(served("words", captioner())) as client:
        service, go = service_of(client), threading.Event()
        first = service.worker.call(lambda: go.wait(PATIENCE))
        while not first.running():
            threading.Event().wait(0.01)
        try:
            assert asyncio.run(leave_while_waiting(client, service, body)) == len(body)
            assert all(job.future.cancelled() for job in service.worker.jobs)
            assert service.images == service.bytes == 0
        finally:
            go.set()


def test_a_stream_whose_model_fails_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    task = captioner()

    def fail(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(task, "stream", fail)
    with client_of(served("words", task)) as client:
        answer = client.post("/v1/predict?stream=true", json=texts(photo()))
        name, data = answer.text.strip().split("\n")
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "internal"
        assert service_of(client).images == 0


def test_the_maps_of_a_stream_have_the_time_limit_of_any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.serve.settings.MIN_TIMEOUT", 0)

    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Service, "maps", never)
    with client_of(served("words", captioner()), timeout=0.2) as client:
        answer = client.post("/v1/predict?stream=true", json={**texts(photo()), "explain": True})
        last = answer.text.strip().split("\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
