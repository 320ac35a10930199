"""`vitrail serve`. Heavy imports are inside the functions."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vitrail.errors import UserError
from vitrail.options import SOURCE, Parser, path

if TYPE_CHECKING:
    from vitrail.serve.settings import Settings

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def serve(args: Sequence[str]) -> int:
    """Serve models over HTTP: `vitrail serve [SOURCE...] [--host H] [--port P] [--ray]`."""
    parser = _parser()
    if parser.parse_help(args) is not None:
        print(parser.format_help())
        return 0
    options = parser.parse_args(args)
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"serving needs the package {missing[0].replace('_', '-')}: pip install 'vitrail[serve]'")
    from vitrail.serve.models import read_sources
    from vitrail.serve.server import serve as run

    settings, sources = _settings(options), read_sources(options.sources)
    if options.ray:
        from vitrail.cluster.ray_serve import serve as run_replicas

        run_replicas(sources, options.host, options.port, options.device, settings, options.replicas)
        return 0
    if options.replicas is not None:
        raise UserError("--replicas is for a Ray cluster: add --ray")
    run(sources, options.host, options.port, options.device, settings)
    return 0


def _parser() -> Parser:
    """The options of the command."""
    parser = Parser("serve", serve, urls=True)
    parser.add_argument(
        "sources", nargs="*", metavar="SOURCE", help=f"{SOURCE}; NAME=SOURCE names it; default: classify"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine's")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one, which is printed; default: 8000")
    parser.add_argument("--api-keys", type=path, metavar="FILE", help="API keys, one per line; or VITRAIL_API_KEYS")
    parser.add_argument(
        "--allow-origin", nargs="+", default=(), metavar="ORIGIN", help="pages of other servers that may use this one"
    )
    parser.add_argument("--max-upload-mb", type=float, default=20, help="largest request in MB; default: 20")
    parser.add_argument("--max-megapixels", type=float, default=50, help="largest image in megapixels; default: 50")
    parser.add_argument("--rate-limit", type=int, default=0, metavar="N", help="requests per minute of one client")
    parser.add_argument("--queue", type=int, default=256, help="images that may wait; default: 256")
    parser.add_argument("--max-batch", type=int, default=32, help="images that are answered at once; default: 32")
    parser.add_argument("--max-wait-ms", type=float, default=5, help="how long a batch waits for more; default: 5")
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds for an upload, and for an answer; default: 60"
    )
    parser.add_argument("--engine", default="auto", help="auto (the fastest), eager, compile, onnx or openvino")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16; default: fp32")
    parser.add_argument(
        "--measure", type=float, default=20, metavar="SECONDS", help="time for trying engines at the start; default: 20"
    )
    parser.add_argument("--ray", action="store_true", help="replicas on a Ray cluster, or on this machine without one")
    parser.add_argument(
        "--replicas", type=int, metavar="N", help="with --ray; default: one per GPU, or per machine without"
    )
    return parser


def _settings(options: Namespace) -> Settings:
    """The limits that the options set. UserError for one that is out of range."""
    from vitrail.serve.settings import Settings, read_keys

    if not 0 <= options.max_wait_ms < 10_000:
        raise UserError(f"--max-wait-ms must be at least 0 and below 10,000, got {options.max_wait_ms:g}")
    return Settings(
        keys=read_keys(options.api_keys),
        origins=tuple(options.allow_origin),
        max_upload=_millions("--max-upload-mb", options.max_upload_mb),
        max_pixels=_millions("--max-megapixels", options.max_megapixels),
        rate_limit=options.rate_limit,
        queue=options.queue,
        max_batch=options.max_batch,
        max_wait=options.max_wait_ms / 1e3,
        timeout=options.timeout,
        engine=options.engine,
        precision=options.precision,
        measure=options.measure,
    )


def _millions(flag: str, value: float) -> int:
    """The bytes or pixels of a limit in MB or megapixels. UserError if it is not finite or allows nothing."""
    if not math.isfinite(value) or value * 1e6 < 1:
        raise UserError(f"{flag} must be a number above 0, got {value:g}")
    return int(value * 1e6)
