"""What holds for every request, whatever answers it: keys, rates, times, and a response that reaches its client."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrail.serve.errors import ApiError, as_api, busy
from vitrail.serve.metrics import Metrics
from vitrail.serve.settings import Settings
from vitrail.serve.uploads import too_large

PROTECTED = ("/v1/", "/metrics")
"""paths that need a key, where there are keys"""
ENDPOINTS = (
    "/v1/predict",
    "/v1/explain",
    "/v1/models",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/",
)
"""paths that are counted by name; a client can make up any number of others"""
MAX_DRAINED = 64_000_000
"""bytes of a refused upload that are read to its end: a client that is still sending would not see the answer"""
DRAIN_SECONDS = 10.0
MAX_CLIENTS = 10_000
"""clients whose rate is remembered"""
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; style-src 'self' 'unsafe-inline'; "
        b"object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
    ),
]


class Rates:
    """Requests of each client: a bucket that fills with the allowed rate and holds a minute of it."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.clients: dict[str, tuple[float, float]] = {}

    def take(self, client: str) -> float:
        """Count a request. Returns the seconds until the next one is allowed; 0 if this one is."""
        now = time.monotonic()
        left, last = self.clients.pop(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - last) * self.per_minute / 60)
        allowed = left >= 1
        self.clients[client] = (left - allowed, now)
        if len(self.clients) > MAX_CLIENTS:  # the first is the one that was seen longest ago
            del self.clients[next(iter(self.clients))]
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute


class Guard:
    """ASGI middleware around the endpoints."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.keys = [key.encode() for key in settings.keys]
        self.rates = Rates(settings.rate_limit) if settings.rate_limit else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, receive, send, self.settings.timeout)
        began = time.monotonic()
        try:
            self._check(scope)
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:  # here, so that a fault is counted too
            if exchange.status:  # an answer is under way
                raise
            await as_api(error).response()(scope, exchange.receive, exchange.send)
        finally:
            endpoint = scope["path"] if scope["path"] in ENDPOINTS else "other"
            self.metrics.requests.labels(endpoint, str(exchange.status)).inc()
            self.metrics.seconds.labels(endpoint).observe(time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError for a request that goes no further."""
        if not scope["path"].startswith(PROTECTED):
            return
        key = _key(scope["headers"])
        # Every key is compared, in constant time, so that the time tells nothing.
        if self.keys and sum(hmac.compare_digest(key, each) for each in self.keys) != 1:
            raise ApiError(
                401,
                "unauthorized",
                "the request carries no valid API key",
                "send the header `Authorization: Bearer KEY`",
                {"WWW-Authenticate": "Bearer"},
            )
        if self.rates is not None and scope["method"] == "POST":
            address = scope["client"][0] if scope.get("client") else ""
            if seconds := self.rates.take(key.decode("latin-1") if self.keys else address):
                after = str(max(1, round(seconds + 0.5)))
                raise ApiError(
                    429,
                    "rate_limited",
                    f"more than {self.rates.per_minute} requests per minute",
                    f"try again after {after} seconds",
                    {"Retry-After": after},
                )
        length = _header(scope["headers"], b"content-length")
        if length.isdigit() and int(length[:20]) > self.settings.max_upload:
            raise too_large(self.settings.max_upload)


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")


def _key(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    scheme, _, key = _header(headers, b"authorization").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


class _Exchange:
    """The two directions of a request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, timeout: float) -> None:
        self._receive, self._send, self.timeout = receive, send, timeout
        self.status = 0
        self.complete = scope["method"] in ("GET", "HEAD")
        """whether the body was read to its end"""
        # Such a client sends its body only when that is read.
        self.holds = bool(_header(scope["headers"], b"expect"))

    async def receive(self) -> Message:
        message = await self._receive()
        self.holds = False
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.complete = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *HEADERS]
            if not self.complete and not self.holds:
                await self._drain()
        try:
            async with asyncio.timeout(self.timeout):  # a client that does not read its answer
                await self._send(message)
        except TimeoutError:
            raise OSError("the client does not read its answer") from None

    async def _drain(self) -> None:
        size = 0
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self.complete and size < MAX_DRAINED:
                    size += len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass


def stopping() -> ApiError:
    """503 for a request that comes after the signal to stop."""
    return busy("the server is stopping", 5, "stopping")
