"""The process: a socket, the models, uvicorn, and an end that finishes what was taken."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from vitrail.errors import UserError
from vitrail.process import handled
from vitrail.serve import engines
from vitrail.serve.app import create_app
from vitrail.serve.errors import ApiError
from vitrail.serve.metrics import Metrics
from vitrail.serve.models import Served, Source, about
from vitrail.serve.settings import KEYS_VARIABLE, Settings
from vitrail.serve.worker import Worker
from vitrail.train.device import choose_device
from vitrail.zoo import find, load

log = logging.getLogger("vitrail")

MAX_HEAD = 32_768
"""bytes of the head of a request"""
IDLE = 60.0
"""seconds after which a connection that sends no request is closed"""
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(sources: Sequence[Source], host: str, port: int, device: str | None, settings: Settings) -> None:
    """Serve the models until SIGTERM or SIGINT. Prints one line with the address when it is ready.

    UserError, before anything is loaded, for an address that is in use or a model that is not there.
    """
    for source in sources:
        find(source.source)
    with listening(host, port) as listener, ExitStack() as cleanup:
        metrics = Metrics()
        worker = Worker(settings.max_batch, settings.max_wait, metrics.batch)
        # Where it will run: the threads of PyTorch's products belong to the thread that calls it.
        models = worker.call(lambda: load_all(sources, device, settings, cleanup)).result()
        app = create_app(models, settings, worker, metrics)
        warn_if_public(host, settings)
        try:
            run(app, listener, settings)
        finally:
            app.state.service.close()


def warn_if_public(host: str, settings: Settings) -> None:
    """Warn where anyone on the network can use the models."""
    if host not in LOCAL and not settings.keys:
        log.warning(
            f"{host} is open to other machines, and no API key is set: anyone there can use the models; set "
            f"{KEYS_VARIABLE}, or --api-keys FILE"
        )


def load_all(sources: Sequence[Source], device: str | None, settings: Settings, cleanup: ExitStack) -> list[Served]:
    """Load the models and choose their engines; logs one line for each."""
    chosen, deadline, found = choose_device(device), time.monotonic() + settings.measure, []
    for source in sources:
        task = load(source.source, device=chosen)
        engine = engines.choose(source.source, task, settings, deadline, cleanup)
        found.append(Served(source.name, task, engine, about(find(source.source))))
        log.warning(f"{source.name}: {engine.line()}")
    return found


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket: connections that come while models are loaded wait. UserError where there is none."""
    if not 0 <= port < 65536:  # getaddrinfo would take the remainder
        raise UserError(f"--port must be from 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError):
        raise UserError(f"{host!r} is not an address: give --host 127.0.0.1, or 0.0.0.0 for all") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            raise UserError(_no_address(error, host, port)) from None
        yield listener


def _no_address(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use: choose another --port, or 0 for a free one"
    if error.errno == errno.EACCES:
        return f"port {port} needs the rights of an administrator: choose a --port of at least 1024"
    return f"{host} is not an address of this machine ({error.strerror}): give --host 127.0.0.1, or 0.0.0.0 for all"


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, listener: socket.socket, settings: Settings) -> None:
    """Answer requests until a signal; then finish those that were taken. A second signal ends at once."""
    server = server_for(app, settings)

    def stop(number: int) -> None:
        server.force_exit = server.should_exit
        server.should_exit = app.state.service.stopping = True

    with handled(stop, signal.SIGTERM, signal.SIGINT):
        print(f"vitrail is ready at {address_of(listener)}", flush=True)
        asyncio.run(server.serve(sockets=[listener]))
    print("vitrail: stopped", file=sys.stderr)


def server_for(app: FastAPI, settings: Settings) -> Server:
    """uvicorn, with the limits of this server."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_keep_alive=int(IDLE),
        timeout_graceful_shutdown=int(2 * settings.timeout) + 10,
    )
    return Server(config)


class Server(uvicorn.Server):
    """uvicorn's, without its own signals: it would raise them again when all is done, and end as if killed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Protocol(H11Protocol):
    """uvicorn's, which closes connections that send no whole request, and answers what is not HTTP in JSON."""

    last_cycle: object = None
    """the request at the last check"""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(IDLE, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self.last_cycle:
            self.transport.close()
            return
        self.last_cycle = self.cycle if idle else self.last_cycle
        self.loop.call_later(IDLE, self._close_if_idle)

    def send_400_response(self, msg: str) -> None:
        error = ApiError(400, "bad_request", "this is not an HTTP/1.1 request, or its head is too long", "see /docs")
        body = json.dumps(error.body()).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        if self.cycle is None or self.cycle.response_complete:  # or an answer is under way
            self.transport.write(head.encode() + body)
        self.transport.close()
