"""Hostile requests to `vitrail serve`: what it answers, and what its memory does.

    pip install schemathesis
    python bench/hostile.py

Starts the command with a small classifier, anew for each stage: image files of ten formats with changed, missing and
repeated bytes; bombs (sizes that are only declared, a thousand frames); heads without end and paths with dots; requests
that schemathesis makes up from `/openapi.json`. Slow clients send a byte now and then beside all of it. Every answer
must be JSON with a status below 500, or 503. At the end of each stage a plain image gets the answer of its beginning,
and the memory has stayed below `MEMORY_MB` more than before.

Results are written after each stage, and `--resume` continues after the last one that passed. The whole takes at most
ten minutes. `--tiny` sends a few.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from harness import Parser, Row, record, recorded
from PIL import Image

KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO")
BOUNDARY = b"vitrail-hostile"
SLOW = 16
"""connections that send a byte now and then"""
MEMORY_MB = 1_500
"""more than before: uploads of half a gigabyte, images of 50 megapixels one at a time, and what allocators keep"""
SCHEMA_SECONDS = 240
"""after which schemathesis is stopped, which is then said"""


def parser() -> Parser:
    parser = Parser(__doc__, images=100, examples=1)
    parser.add_argument("--images", type=int, default=10_000, help="mutated image files")
    parser.add_argument("--examples", type=int, default=50, help="made-up requests per endpoint, of schemathesis")
    parser.add_argument("--resume", action="store_true", help="keep the stages of an earlier run that passed")
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


class Slow:
    """Connections whose requests never end."""

    def __init__(self, address: Any) -> None:
        self.connections = [socket.create_connection((address.hostname, address.port), 100) for _ in range(SLOW)]
        self.sent = 0
        for connection in self.connections:
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9"
            )

    def send(self) -> None:
        """One byte more of the head of one of them, which the server may have closed."""
        with suppress(OSError):
            self.connections[self.sent % SLOW].sendall(b"0" if self.sent < 5 * SLOW else b"\r\nX: y")
        self.sent += 1

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


# ---- the stages


def mutations(client: Client, slow: Slow, args: argparse.Namespace) -> Row:
    draw = random.Random(0)
    for start in range(0, args.images, 10):
        # Alone and with others: one image of a request decides its status only if it is alone.
        several = [mutated(draw, start + i) for i in range(min(10, args.images - start))]
        for images in (several[:1], several[1:]):
            if images:
                client.post(images, f"mutated {start}")
        slow.send()
    return {"files": args.images}


def all_bombs(client: Client, slow: Slow, args: argparse.Namespace) -> Row:
    rows: Row = {}
    for name, data in bombs().items():
        found = client.post([data], name)
        rows[name] = found["error"]["code"] if found and "error" in found else "answered"
        slow.send()
    return rows


def heads_and_paths(client: Client, slow: Slow, args: argparse.Namespace) -> Row:
    heads = {
        "a head of 1 MB": b"GET / HTTP/1.1\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        "100,000 headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        "not HTTP": bytes(range(256)) * 40 + b"\r\n\r\n",
        "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        "a chunk of 16 EB": b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"ffffffffffffffffff\r\n",
    }
    rows: Row = {}
    for name, data in heads.items():
        found = raw(client.address, data)[:12].decode("latin-1")
        rows[name] = found or "closed"
        if found and not found.startswith("HTTP/1.1 4"):
            client.wrong.append(f"{name}: {found}")
        slow.send()
    client.connection.close()  # it was idle meanwhile, and the server closes such connections
    paths = ("/../../etc/passwd", "/docs/%2e%2e/app.py", "/docs/..%5capp.py", "//etc/passwd", "/v1/%00", "/%ff")
    for path in paths:
        found = client.ask("GET", path, path)
        rows[path] = found["error"]["code"] if found and "error" in found else "answered"
        if rows[path] == "answered":
            client.wrong.append(f"{path}: it was answered")
    return rows


def schema_tests(client: Client, slow: Slow, args: argparse.Namespace) -> Row:
    """What schemathesis finds. A refusal of a made-up image is as right as an answer, so only failures count."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("schemathesis", path=folders)
    if program is None:
        return {"left out": "schemathesis is not installed: pip install schemathesis"}
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [program, "run", f"{client.address.geturl()}/openapi.json", "--checks", checks, "--no-color"]
    command += ["--max-examples", str(args.examples), "--seed", "0"]
    with (
        tempfile.TemporaryDirectory() as place,  # it leaves files where it runs
        subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            text, _ = process.communicate(timeout=SCHEMA_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            client.wrong.append(f"schemathesis took more than {SCHEMA_SECONDS} seconds: lower --examples")
            return {"stopped": True}
    if process.returncode:
        client.wrong.append(f"schemathesis: {text[-3_000:]}")
    lines = [line.strip() for line in text.splitlines()]
    return {
        "examples": args.examples,
        "exit_code": process.returncode,
        "summary": [line for line in lines if re.search(r"generated|passed|failed", line)][-3:],
    }


STAGES = {"mutated": mutations, "bombs": all_bombs, "heads and paths": heads_and_paths, "schemathesis": schema_tests}


def staged(stage: Callable[[Client, Slow, argparse.Namespace], Row], args: argparse.Namespace) -> Row:
    """One stage against a server of its own."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 40, 40)).save(file, "JPEG")
    plain = file.getvalue()
    began = time.monotonic()
    with running("classify", "--measure", "0") as (process, address):
        client, slow = Client(address), Slow(address)
        expected = client.post([plain], "plain")
        before = peak_mb(process, "VmRSS")
        client.statuses.clear()
        row = stage(client, slow, args)
        row |= {"statuses": dict(client.statuses)} if client.statuses else {}
        slow.close()
        client.connection.close()  # it may have been idle meanwhile, and the server closes such connections
        if client.post([plain], "plain again") != expected or expected is None:
            client.wrong.append("a plain image got another answer than before")
        if process.poll() is not None:
            client.wrong.append("the server has ended")
        peak = peak_mb(process, "VmHWM")
        if peak - before > MEMORY_MB:
            client.wrong.append(f"the memory grew by {peak - before:.0f} MB")
        row["memory_mb"] = {"before": before, "after": peak_mb(process, "VmRSS"), "at_most": peak}
    return {**row, "seconds": round(time.monotonic() - began, 1), "wrong": client.wrong}


def main() -> None:
    args = parser().parse_args()
    rows: Row = {"settings": {"images": args.images, "examples": args.examples}}
    before = recorded("hostile", args.results) if args.resume else {}
    if before.get("settings") != rows["settings"]:
        before = {}
    for name, stage in STAGES.items():
        kept = before.get(name)
        rows[name] = kept if kept and not kept["wrong"] else staged(stage, args)
        print(json.dumps({name: rows[name]}, indent=1), flush=True)
        record("hostile", rows, args.results)
    rows["seconds"] = round(sum(rows[name]["seconds"] for name in STAGES), 1)
    print(record("hostile", rows, args.results))
    if any(rows[name]["wrong"] for name in STAGES):
        sys.exit("some request was not answered as it must be")


if __name__ == "__main__":
    main()
