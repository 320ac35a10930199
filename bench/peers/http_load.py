"""Clients of an HTTP server, in a process that uses a fixed share of one core: `bench/serving.py` starts it.

Each client has a connection and sends one request after the other. Nothing but the standard library is imported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

WARM = 0.1
"""of the time of a load, which does not count"""


class Share:
    """Keeps this process at a share of one core: a thread uses what the rest of the process does not."""

    def __init__(self, share: float) -> None:
        self.share, self.began, self.used = share, time.monotonic(), time.process_time()
        threading.Thread(target=self._burn, daemon=True).start()

    def _burn(self) -> None:
        while True:
            left = self.share * (time.monotonic() - self.began) - (time.process_time() - self.used)
            until = time.process_time() + min(max(0.0, left), 0.02)
            while time.process_time() < until:
                pass
            time.sleep(0.005)

    def __float__(self) -> float:
        return (time.process_time() - self.used) / (time.monotonic() - self.began)


def request_of(image: bytes, path: str) -> bytes:
    body = (
        b'--vitrail\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" + image + b"\r\n--vitrail--\r\n"
    )
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: multipart/form-data; boundary=vitrail\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, float]:
    """The status of a request, and after how many seconds to try again."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    fields = dict(line.split(b": ", 1) for line in head[1:] if b": " in line)
    await reader.readexactly(int(fields[b"content-length"]))
    return int(head[0].split()[1]), float(fields.get(b"retry-after", 0))


async def client(
    port: int, requests: list[bytes], first: int, until: float, found: list[tuple[float, float, int]]
) -> None:
    """Sends one request after the other; adds the time of each answer, its latency and its status (0: it failed)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = first
    while (began := time.monotonic()) < until:
        number += 1
        try:
            status, wait = await ask(reader, writer, requests[number % len(requests)])
        except (OSError, ValueError, asyncio.IncompleteReadError):
            found.append((time.monotonic(), 0.0, 0))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        found.append((time.monotonic(), time.monotonic() - began, status))
        if status != 200:
            await asyncio.sleep(min(1.0, wait))
    writer.close()


async def drive(args: argparse.Namespace, requests: list[bytes]) -> dict[str, Any]:
    share, began = Share(args.share), time.monotonic()
    start, until = began + WARM * args.seconds, began + args.seconds
    found: list[tuple[float, float, int]] = []
    await asyncio.gather(*(client(args.port, requests, 7 * i, until, found) for i in range(args.clients)))
    counted = [row for row in found if start <= row[0] < until]
    times = sorted(latency for _, latency, status in counted if status == 200)
    return {
        "clients": args.clients,
        "images_per_second": round(len(times) / (until - start), 2),
        "p50_ms": round(1e3 * times[len(times) // 2]) if times else None,
        "p99_ms": round(1e3 * times[int(0.99 * len(times))]) if times else None,
        "statuses": {str(status): count for status, count in sorted(Counter(row[2] for row in found).items())},
        "failed": sum(row[2] not in (200, 503) for row in found),
        "share_of_a_core": round(float(share), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--share", type=float, required=True)
    args = parser.parse_args()
    images = [path.read_bytes() for path in sorted(args.photos.iterdir())]
    print(json.dumps(asyncio.run(drive(args, [request_of(image, args.path) for image in images]))))


if __name__ == "__main__":
    main()
