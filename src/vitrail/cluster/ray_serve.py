"""`vitrail serve --ray`: replicas of the application on the machines of a Ray cluster, behind the proxies of Ray Serve.

Each replica is the application of `vitrail.serve` with models, batches and a queue of its own. Ray Serve passes whole
requests and streams between them and the clients.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from starlette.types import Receive, Scope, Send

from vitrail.cluster.ray_session import library, session, shortened
from vitrail.errors import RunError, UserError
from vitrail.process import handled
from vitrail.serve.app import create_app
from vitrail.serve.metrics import Metrics
from vitrail.serve.models import Source
from vitrail.serve.server import LOCAL, address_of, listening, load_all, warn_if_public
from vitrail.serve.settings import Settings
from vitrail.serve.worker import Worker
from vitrail.zoo import find

NAME = "vitrail"
"""of the application, as `serve status` of Ray shows it"""
RESERVE = 64
"""requests beyond the queue that a replica gets: it answers them itself, with 503"""


def serve(
    sources: Sequence[Source], host: str, port: int, device: str | None, settings: Settings, replicas: int | None
) -> None:
    """Serve the models until SIGTERM or SIGINT. Prints one line with the address when all replicas are ready.

    UserError, before Ray starts, for an address that is in use or a model that is not there.
    """
    if replicas is not None and replicas < 1:
        raise UserError(f"--replicas must be at least 1, got {replicas}")
    for source in sources:
        find(source.source)
    ray = library()
    try:
        ray_serve: Any = import_module("ray.serve")
    except ImportError as error:
        raise UserError(f"Ray Serve is not installed ({error.name}): pip install 'vitrail[cluster]'") from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # which its import has set to INFO
    with listening(host, port) as listener:  # Ray binds it in another process, and would say less
        url, port = address_of(listener), listener.getsockname()[1]
    warn_if_public(host, settings)
    stopped = threading.Event()
    # Ray has a handler of its own, so ours is set after it.
    with session(ray, os.environ.get("RAY_ADDRESS")), handled(lambda number: stopped.set(), *SIGNALS):
        count, needs = plan_replicas(ray, replicas, device)
        if (there := ray_serve.status()).proxies or there.applications:
            raise UserError("Ray Serve runs on this cluster already: end it with `serve shutdown`, or use another one")
        try:
            _start(
                ray_serve,
                [with_absolute_path(source) for source in sources],
                host,
                port,
                device,
                settings,
                count,
                needs,
            )
            print(f"vitrail is ready at {url}", flush=True)
            stopped.wait()
            ray_serve.delete(NAME)  # its replicas answer what they took
        finally:
            ray_serve.shutdown()
    print("vitrail: stopped", file=sys.stderr)


SIGNALS = (signal.SIGTERM, signal.SIGINT)


def with_absolute_path(source: Source) -> Source:
    """The source by its whole path, since replicas have other working folders; a name stays one."""
    return replace(source, source=str(Path(source.source).resolve())) if Path(source.source).exists() else source


def plan_replicas(ray: Any, replicas: int | None, device: str | None) -> tuple[int, dict[str, float]]:
    """How many replicas there are, and what each needs: a GPU, or else its share of a machine's cores.

    By default there is one per GPU, or one per machine in a cluster without.
    """
    there = ray.cluster_resources()
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 0 if device == "cpu" else int(there.get("GPU", 0))
    count = replicas or gpus or len(machines)
    if gpus and count > gpus:
        raise UserError(f"{count} replicas need a GPU each, and the cluster has {gpus}: lower --replicas")
    cores = int(there.get("CPU", 0))
    # Of the shares of cores with which all find a machine, the largest: Ray waits for ever for a place that none has.
    for share in (*range(cores // count, 0, -1), *(1 / several for several in range(2, count + 1))):
        places = [int(machine.get("CPU", 0) / share) for machine in machines]
        if gpus:
            places = [min(each, int(machine.get("GPU", 0))) for each, machine in zip(places, machines, strict=True)]
        if sum(places) >= count:
            return count, {"num_gpus": min(gpus, 1), "num_cpus": share}
    return count, {"num_gpus": min(gpus, 1), "num_cpus": 0}


def _start(
    ray_serve: Any,
    sources: Sequence[Source],
    host: str,
    port: int,
    device: str | None,
    settings: Settings,
    count: int,
    needs: dict[str, float],
) -> None:
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    where = "HeadOnly" if host in LOCAL else "EveryNode"
    ray_serve.start(proxy_location=where, http_options={"host": host, "port": port}, logging_config=quiet)
    deployed = ray_serve.deployment(
        name=NAME,
        num_replicas=count,
        ray_actor_options=needs,
        max_ongoing_requests=settings.queue + RESERVE,
        graceful_shutdown_timeout_s=2 * settings.timeout + 10,
        logging_config=quiet,
    )(ray_serve.ingress(Application())(Replica))
    try:
        ray_serve.run(deployed.bind(sources, device, settings), name=NAME, route_prefix="/")
    except RuntimeError as error:
        told = re.findall(r"(?:UserError|RunError): (.+)", str(error))
        raise RunError(f"the replicas did not start: {told[-1] if told else shortened(error)}") from None


class Replica:
    """What a replica's process holds: the application with its models."""

    running: Any = None
    """the application of this process"""

    def __init__(self, sources: Sequence[Source], device: str | None, settings: Settings) -> None:
        metrics = Metrics()
        worker = Worker(settings.max_batch, settings.max_wait, metrics.batch)
        cleanup = ExitStack()
        models = worker.call(lambda: load_all(sources, device, settings, cleanup)).result()
        Replica.running = create_app(models, settings, worker, metrics)
        Replica.running.state.cleanup = cleanup


class Application:
    """The application of this process, as Ray Serve hands it requests: a thing without models, which can be sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await Replica.running(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if Replica.running is not None:
            Replica.running.state.service.close()
            Replica.running.state.cleanup.close()
        await send({"type": "lifespan.shutdown.complete"})
