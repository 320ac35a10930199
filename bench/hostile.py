"""Hostile requests to `vitrail serve`: what it answers, and what its memory does.

    python bench/hostile.py

Starts the command with a small classifier and sends image files of ten formats with changed, missing and repeated
bytes, bombs (sizes that are only declared, a thousand frames), heads without end, paths with dots, and slow clients
beside them. Then schemathesis, where it is installed, makes up requests from `/openapi.json`. Every answer must be JSON
with a status below 500, or 503; at the end a plain image gets its answer, and the memory is what it was.
`--tiny` sends a few.
"""

from __future__ import annotations

import http.client
import io
import json
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from harness import Parser, Row, record
from PIL import Image

KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO")
BOUNDARY = b"vitrail-hostile"
SLOW = 16
"""connections that send a byte now and then"""


def parser() -> Parser:
    parser = Parser(__doc__, images=100, examples=1)
    parser.add_argument("--images", type=int, default=10_000, help="mutated image files")
    parser.add_argument("--examples", type=int, default=50, help="made-up requests per endpoint, of schemathesis")
    return parser


@contextmanager
def running(*words: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """`vitrail serve`, and its address."""
    command = [sys.executable, "-m", "vitrail", "serve", *words, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield process, urlsplit(line.split()[-1])
    finally:
        process.terminate()
        process.wait(300)


def peak_mb(process: subprocess.Popen[str], name: str) -> float:
    """Memory of a process in MB, now (`VmRSS`) or at most (`VmHWM`)."""
    with suppress(OSError):
        found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        return round(int(found[1]) / 1024, 1) if found else 0.0
    return 0.0


def mutated(draw: random.Random, number: int) -> bytes:
    """An image file with some bytes changed, cut, repeated or inserted."""
    side = draw.choice((1, 8, 33, 64))
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, KINDS[number % len(KINDS)])
    data = bytearray(file.getvalue())
    for _ in range(draw.choice((1, 2, 8, 64))):
        place = draw.randrange(min(len(data), draw.choice((64, 1_000_000))))
        match draw.randrange(4):
            case 0:
                data[place] = draw.randrange(256)
            case 1:
                data[place : place + 4] = struct.pack(">I", draw.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)))
            case 2:
                data[place:place] = data[place : place + draw.randrange(1, 40)]
            case _:
                del data[place : place + draw.randrange(1, 40)]
        data = data or bytearray(b"\0")
    return bytes(data)


def bombs() -> dict[str, bytes]:
    """Small files that declare much."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(side: int, rows: int) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        data = zlib.compress(bytes(3 * side + 1) * rows, 9)
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    def saved(images: list[Image.Image], kind: str) -> bytes:
        file = io.BytesIO()
        several = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
        images[0].save(file, kind, **several)
        return file.getvalue()

    frames = [Image.new("RGB", (16, 16), (i % 256, i // 256 % 256, 0)) for i in range(1_000)]
    large = Image.new("RGB", (6_900, 6_900))
    return {
        "a PNG that declares 3.6 gigapixels": png(60_000, 1),
        "a PNG of 49 megapixels of zeros": png(7_000, 7_000),
        "a JPEG of 48 megapixels of zeros": saved([large], "JPEG"),
        "a GIF of 1,000 frames": saved(frames, "GIF"),
        "a WebP of 1,000 frames": saved(frames, "WEBP"),
        "a PNG of 1,000 frames": saved(frames, "PNG"),
        "a TIFF of 1,000 pages": saved(frames, "TIFF"),
        "an array that declares 10^12 numbers": b"\x93NUMPY\x01\0v\0"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117)
        + b"\n",
    }


def form_of(images: list[bytes]) -> bytes:
    entry = b'--%s\r\nContent-Disposition: form-data; name="images"; filename="../../x"\r\n\r\n%s\r\n'
    return b"".join(entry % (BOUNDARY, image) for image in images) + b"--%s--\r\n" % BOUNDARY


class Client:
    """Requests over one connection, which is made again where the server closes it."""

    def __init__(self, address: Any) -> None:
        self.address, self.statuses, self.wrong = address, Counter[str](), list[str]()
        self.connection = http.client.HTTPConnection(address.hostname, address.port, timeout=300)

    def post(self, images: list[bytes], name: str) -> Any:
        kind = f"multipart/form-data; boundary={BOUNDARY.decode()}"
        return self.ask("POST", "/v1/predict", name, form_of(images), {"Content-Type": kind})

    def ask(self, method: str, path: str, name: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Any:
        try:
            self.connection.request(method, path, body, headers or {})
            response = self.connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")
            return None
        self.statuses[str(status)] += 1
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if (status >= 500 and status != 503) or (status >= 400 and not (found and found["error"]["hint"])):
            self.wrong.append(f"{name}: {status} {text[:200]!r}")
        return found


def raw(address: Any, data: bytes) -> bytes:
    """What the server sends for some bytes before it closes the connection."""
    found = b""
    with suppress(OSError), socket.create_connection((address.hostname, address.port), 100) as connection:
        connection.sendall(data)
        while more := connection.recv(65_536):
            found += more
    return found


def schema_tests(address: Any, examples: int) -> Row | str:
    """What schemathesis finds. A refusal of a made-up image is as right as an answer, so only failures count."""
    program = Path(sys.executable).with_name("schemathesis")
    if not program.exists():
        return "schemathesis is not installed"
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [str(program), "run", f"{address.geturl()}/openapi.json"]
    done = subprocess.run(
        [*command, "--checks", checks, "--max-examples", str(examples), "--seed", "0", "--no-color"],
        capture_output=True,
        text=True,
    )
    summary = [line.strip() for line in done.stdout.splitlines() if re.search(r"generated|passed|failed", line)]
    return {
        "exit_code": done.returncode,
        "summary": summary[-3:],
        "failures": done.stdout[-3_000:] * bool(done.returncode),
    }


def main() -> None:
    args = parser().parse_args()
    draw = random.Random(0)
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 40, 40)).save(file, "JPEG")
    plain = file.getvalue()
    with tempfile.TemporaryDirectory(), running("classify", "--measure", "0") as (process, address):
        client = Client(address)
        expected = client.post([plain], "plain")
        slow = [socket.create_connection((address.hostname, address.port), 100) for _ in range(SLOW)]
        for connection in slow:
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9"
            )
        before, began = peak_mb(process, "VmRSS"), time.monotonic()
        for start in range(0, args.images, 10):
            # Alone and with others: one image of a request decides its status only if it is alone.
            several = [mutated(draw, start + i) for i in range(min(10, args.images - start))]
            for images in (several[:1], several[1:]):
                if images:
                    client.post(images, f"mutated {start}")
            with suppress(OSError):
                slow[start // 10 % SLOW].sendall(b"0" if start < 9_000 else b"\r\nX: y")
        rows: Row = {"mutated": {"files": args.images, "statuses": dict(client.statuses)}}
        rows["mutated"]["seconds"] = round(time.monotonic() - began, 1)
        rows["bombs"] = {}
        for name, data in bombs().items():
            found = client.post([data], name)
            rows["bombs"][name] = found["error"]["code"] if found and "error" in found else "answered"
        heads = {
            "a head of 1 MB": b"GET / HTTP/1.1\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
            "100,000 headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
            "not HTTP": bytes(range(256)) * 40 + b"\r\n\r\n",
            "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
            "a chunk of 16 EB": b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"ffffffffffffffffff\r\n",
        }
        rows["heads"] = {name: raw(address, data)[:12].decode("latin-1") for name, data in heads.items()}
        paths = ("/../../etc/passwd", "/docs/%2e%2e/app.py", "/docs/..%5capp.py", "//etc/passwd", "/v1/%00", "/%ff")
        rows["paths"] = {}
        client.connection.close()  # it was idle meanwhile, and the server closes such connections
        for path in paths:
            found = client.ask("GET", path, path)
            rows["paths"][path] = found["error"]["code"] if found and "error" in found else "answered"
        rows["schemathesis"] = schema_tests(address, args.examples)
        for connection in slow:
            connection.close()
        again = client.post([plain], "plain again")
        rows["same_answer_at_the_end"] = again == expected and expected is not None
        rows["wrong"] = client.wrong
        rows["process_lives"] = process.poll() is None
        rows["memory_mb"] = {
            "before": before,
            "after": peak_mb(process, "VmRSS"),
            "at_most": peak_mb(process, "VmHWM"),
        }
    print(json.dumps(rows, indent=1))
    print(record("hostile", rows, args.results))
    if client.wrong or not rows["process_lives"] or not rows["same_answer_at_the_end"]:
        sys.exit("some request was not answered as it must be")


if __name__ == "__main__":
    main()
