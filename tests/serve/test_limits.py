"""Bad, hostile and too many requests: each gets an error that says what to do, and the next one its answer."""

from __future__ import annotations

import asyncio
import io
import json
import random
import socket
import struct
import threading
import zlib
from typing import Any, cast

import pytest
import torch
from images import encoded, smooth
from PIL import Image
from serve.serving import (
    PATIENCE,
    Held,
    answer_on,
    classifier,
    client_of,
    error_of,
    exchange,
    form,
    live,
    photo,
    request_of,
    served,
    service_of,
    texts,
)

from vitrail.errors import UserError
from vitrail.serve.decoding import MAX_FRAMES, gif_frames
from vitrail.serve.settings import MAX_IMAGES, Settings, read_keys

KEY = "a-key-of-many-characters"


def animation(frames: int, kind: str, size: int = 8) -> bytes:
    images = [Image.new("RGB", (size, size), (i % 256, i // 256, 7 * i % 256)) for i in range(frames)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:], duration=20)


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def iptc_of(image: bytes) -> bytes:
    """An IPTC file that declares 16 x 16 pixels and holds any other image file."""

    def field(tag: tuple[int, int], data: bytes) -> bytes:
        return bytes([0x1C, *tag]) + struct.pack(">H", len(data)) + data

    head = field((3, 60), b"\1\0") + field((3, 20), b"\x10") + field((3, 30), b"\x10") + field((3, 120), b"\5")
    return head + bytes([0x1C, 8, 10, 0, 132]) + struct.pack(">I", len(image)) + image


@pytest.mark.parametrize(
    "image, status, code",
    [
        (b"", 422, "empty_image"),
        (iptc_of(photo()), 415, "not_an_image"),
        (iptc_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"), 415, "not_an_image"),
        (encoded(smooth(16, 16), "ICO"), 415, "not_an_image"),
        (b"plain text", 415, "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not_an_image"),
        (photo(kind="JPEG")[:300], 422, "bad_image"),
        (photo()[:-40], 422, "bad_image"),
        (png_of(60_000, 60_000), 413, "too_many_pixels"),
        (png_of(9_000, 9_000), 413, "too_many_pixels"),
        (animation(1_000, "GIF"), 422, "too_many_frames"),
        (animation(1_000, "PNG"), 422, "too_many_frames"),
        (animation(MAX_FRAMES + 1, "TIFF"), 422, "too_many_frames"),
    ],
)
def test_an_upload_that_is_no_good_image(image: bytes, status: int, code: str) -> None:
    with client_of() as client:
        error_of(client.post("/v1/predict", files=form(image)), status, code)
        error_of(client.post("/v1/predict", json=texts(image)), status, code)
        assert client.post("/v1/predict", files=form(photo())).status_code == 200


def test_short_animations_are_answered_by_their_first_frame() -> None:
    with client_of() as client:
        still = client.post("/v1/predict", files=form(encoded(Image.new("RGB", (8, 8)), "GIF"))).json()
        assert client.post("/v1/predict", files=form(animation(20, "GIF"))).json() == still


def test_frames_are_counted_as_pillow_counts_them() -> None:
    for frames in (1, 2, 9, MAX_FRAMES):
        data = animation(frames, "GIF")
        assert gif_frames(data) == Image.open(io.BytesIO(data)).n_frames  # type: ignore[attr-defined]
    assert gif_frames(animation(1_000, "GIF")) == MAX_FRAMES + 1
    for cut in range(13, 200):
        gif_frames(animation(3, "GIF")[:cut])


def test_mutated_image_files() -> None:
    draw = random.Random(0)
    kinds = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA")
    images = []
    for number in range(320):
        data = bytearray(encoded(smooth(12, 16, seed=number), kinds[number % len(kinds)]))
        for _ in range(draw.choice((1, 3, 30))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        images.append(bytes(data[: draw.choice((len(data), draw.randrange(1, len(data))))]))
    with client_of() as client:
        for start in range(0, len(images), 32):
            answer = client.post("/v1/predict", files=form(*images[start : start + 32]))
            assert answer.status_code == 200, answer.text
            assert all("error" in row or "labels" in row for row in answer.json()["predictions"])


@pytest.mark.parametrize(
    "how, status, code",
    [
        ({"content": b"x", "headers": {"content-type": "image/jpeg"}}, 415, "unsupported_media_type"),
        ({"content": b""}, 415, "unsupported_media_type"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "bad_json"),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "bad_json"),
        ({"content": b"\xff\xfe", "headers": {"content-type": "application/json"}}, 400, "bad_json"),
        ({"json": []}, 422, "bad_json"),
        ({"json": {}}, 422, "no_images"),
        ({"json": {"images": None}}, 422, "no_images"),
        ({"json": {"images": "abc"}}, 422, "bad_field"),
        ({"json": {**texts(photo()), "url": None}}, 422, "unknown_field"),
        ({"files": form(photo()), "params": {"model": "other"}}, 422, "bad_query"),
        ({"files": form(photo()), "params": {"top": 2, "stream": "false"}}, 422, "bad_query"),
        ({"json": {"images": []}}, 422, "no_images"),
        ({"json": {"images": [1]}}, 422, "bad_field"),
        ({"json": {"images": ["http://127.0.0.1/a.png"]}}, 422, "bad_base64"),
        ({"json": {"images": ["../../etc/passwd"]}}, 422, "bad_base64"),
        (
            {
                "content": json.dumps({**texts(photo()), "model": "\ud800"}).encode(),
                "headers": {"content-type": "application/json"},
            },
            404,
            "no_such_model",
        ),
        ({"json": {**texts(photo()), "url": "http://127.0.0.1/"}}, 422, "unknown_field"),
        ({"files": [("image", photo())]}, 422, "unknown_field"),
        ({"files": form(photo()), "data": {"model": "x" * 2_000}}, 422, "bad_field"),
        ({"files": form(*[photo()] * (MAX_IMAGES + 1))}, 413, "too_many_images"),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}, 400, "bad_form"),
        ({"content": b"hello", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "bad_form"),
        (
            {
                "content": b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\nabc',
                "headers": {"content-type": "multipart/form-data; boundary=x"},
            },
            400,
            "bad_form",
        ),
        (
            {
                "content": b"--x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\nabc\r\n--x--\r\n",
                "headers": {"content-type": "multipart/form-data; boundary=x"},
            },
            400,
            "bad_form",
        ),
    ],
)
def test_a_body_that_cannot_be_read(how: dict[str, Any], status: int, code: str) -> None:
    with client_of() as client:
        error_of(client.post("/v1/predict", **how), status, code)


def test_names_of_files_are_not_used() -> None:
    with client_of() as client:
        for name in ("../../etc/passwd", "a\0b", "C:\\x", "x" * 2_000):
            answer = client.post("/v1/predict", files=[("images", (name, photo()))])
            assert answer.status_code == 200 and "passwd" not in answer.text
        for path in ("/docs/../app.py", "/docs/%2e%2e/app.py", "/docs/..%2fapp.py", "//etc/passwd", "/v1/%00"):
            error_of(client.get(path), 404, "not_found")
        error_of(client.get("/v1/predict"), 405, "method_not_allowed")
        # Not a redirect, after which most clients send a request without the images, or none.
        error_of(client.post("/v1/predict/", files=form(photo())), 404, "not_found")


def test_too_many_bytes_are_refused_with_and_without_a_length() -> None:
    body = photo() * 100
    with client_of(max_upload=10_000) as client:
        error_of(client.post("/v1/predict", files=form(body)), 413, "too_large")
        chunks = (body[start : start + 1_000] for start in range(0, len(body), 1_000))
        headers = {"content-type": "application/json"}
        error_of(client.post("/v1/predict", content=chunks, headers=headers), 413, "too_large")
        assert service_of(client).bytes == 0


def test_a_client_that_does_not_finish_its_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.serve.settings.MIN_TIMEOUT", 0)
    monkeypatch.setattr("vitrail.serve.guard.DRAIN_SECONDS", 0.05)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "raw_path": b"/v1/predict", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"}
    scope |= {"server": ("here", 1), "client": ("there", 2), "root_path": ""}
    with client_of(timeout=0.1) as client:
        asyncio.run(cast(Any, client.app)(scope, receive, send))
        assert sent[0]["status"] == 400 and b"upload_too_slow" in sent[1]["body"]
        assert service_of(client).bytes == 0


def test_a_full_queue_answers_503_and_loses_nothing_that_it_took() -> None:
    held, found = Held(), []
    with client_of(held, queue=2, max_batch=1) as client:
        service = service_of(client)

        def ask() -> None:
            found.append(client.post("/v1/predict", files=form(photo())))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for count, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda count=count: service.images == count)
        answer = client.post("/v1/predict", files=form(photo()))
        error_of(answer, 503, "busy")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        error_of(client.post("/v1/predict?stream=false", files=form(photo(), photo(), photo())), 503, "busy")
        held.go.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert [each.status_code for each in found] == [200, 200] and service.images == 0
        assert client.post("/v1/predict", files=form(photo())).status_code == 200


def test_an_answer_that_is_not_ready_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.serve.settings.MIN_TIMEOUT", 0)
    held = Held()
    with client_of(held, timeout=0.05) as client:
        answer = client.post("/v1/predict", files=form(photo()))
        held.go.set()
        error_of(answer, 503, "timeout")
        assert "retry-after" in answer.headers


def test_api_keys() -> None:
    with client_of(keys=frozenset([KEY, "another-key-of-a-client"])) as client:
        for headers in ({}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer "}):
            answer = client.post("/v1/predict", files=form(photo()), headers=headers)
            error_of(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
            error_of(client.get("/v1/models", headers=headers), 401, "unauthorized")
            error_of(client.get("/metrics", headers=headers), 401, "unauthorized")
        good = {"Authorization": f"Bearer {KEY}"}
        assert client.post("/v1/predict", files=form(photo()), headers=good).status_code == 200
        assert client.get("/healthz").status_code == client.get("/docs").status_code == 200


def test_keys_are_read_from_a_file_and_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_API_KEYS", f"{KEY}, second-key-of-the-two")
    (tmp_path / "keys").write_text("third-key-of-the-three\n\n")
    assert read_keys(tmp_path / "keys") == {KEY, "second-key-of-the-two", "third-key-of-the-three"}
    for text, words in (("", "holds no API key"), ("short\n", "at least 16")):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(UserError, match=words):
            read_keys(tmp_path / "keys")
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_rates_are_of_each_client() -> None:
    keys = frozenset([KEY, "another-key-of-a-client"])
    with client_of(keys=keys, rate_limit=2) as client:

        def status(key: str) -> Any:
            return client.post("/v1/predict", files=form(photo()), headers={"Authorization": f"Bearer {key}"})

        assert [status(KEY).status_code for _ in range(2)] == [200, 200]
        answer = status(KEY)
        error_of(answer, 429, "rate_limited")
        assert 1 <= int(answer.headers["retry-after"]) <= 31
        assert status("another-key-of-a-client").status_code == 200


@pytest.mark.parametrize(
    "fault, status, code",
    [(RuntimeError("boom"), 500, "internal"), (MemoryError(), 503, "out_of_memory"),
     (torch.OutOfMemoryError("CUDA out of memory"), 503, "out_of_memory")],
)  # fmt: skip
def test_a_fault_is_counted_and_answered_as_any_error(
    fault: Exception, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(Held, "answer", fail)
    with client_of(Held(), origins=("https://photos.example.org",)) as client:
        headers = {"Origin": "https://photos.example.org"}
        answer = client.post("/v1/predict", files=form(photo()), headers=headers)
        error_of(answer, status, code)
        assert answer.headers["access-control-allow-origin"] == headers["Origin"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert f'endpoint="/v1/predict",status="{status}"}} 1.0' in client.get("/metrics").text


def test_pages_elsewhere_read_answers_only_if_they_are_allowed() -> None:
    origin = "https://photos.example.org"
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    with client_of(origins=(origin,), keys=frozenset([KEY])) as client:
        assert client.options("/v1/predict", headers=preflight).headers["access-control-allow-origin"] == origin
        refused = client.get("/v1/models", headers={"Origin": origin})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin
        other = client.get("/healthz", headers={"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers
    with client_of() as client:
        assert "access-control-allow-origin" not in client.get("/healthz", headers={"Origin": origin}).headers


@pytest.mark.parametrize(
    "changes",
    [{"timeout": 5}, {"queue": 0}, {"max_batch": 0}, {"max_pixels": 0}, {"engine": "tensorrt"}, {"precision": "int8"},
     {"origins": ("example.org",)}, {"origins": ("https://example.org/page",)}, {"rate_limit": -1}],
)  # fmt: skip
def test_settings_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Settings(**changes)


def test_requests_that_are_not_http_and_heads_without_end() -> None:
    with live(served("small", classifier())) as (port, _, _):
        for request in (
            b"\x16\x03\x01\x02\x00\r\n\r\n",
            b"GET /" + b"a" * 100_000,
            b"GET / HTTP/1.1\r\nNo colon\r\n\r\n",
        ):
            status, body = exchange(port, request)
            assert status == 400 and body["error"]["code"] == "bad_request"
        many = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1_000) for i in range(200))
        assert exchange(port, b"GET /healthz HTTP/1.1\r\nHost: here\r\n" + many)[0] == 400
        assert exchange(port, request_of(photo()))[0] == 200


def test_a_stop_finishes_what_was_taken() -> None:
    held = Held()
    with live(held) as (port, server, service), socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        connection.sendall(request_of(photo()))
        assert held.running.wait(PATIENCE)
        server.should_exit = service.stopping = True
        held.go.set()
        status, body = answer_on(connection)
        assert status == 200 and len(body["predictions"]) == 1


def test_a_refusal_reaches_a_client_that_is_still_sending() -> None:
    with live(served("small", classifier()), max_upload=1_000) as (port, _, _):
        status, body = exchange(port, request_of(photo() * 2_000))
        assert status == 413 and body["error"]["code"] == "too_large"


def wait_until(condition: Any) -> None:
    for _ in range(100 * PATIENCE):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("nothing happened")
