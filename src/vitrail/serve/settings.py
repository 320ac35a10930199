"""What an operator chooses, with safe defaults."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from vitrail.errors import UserError, require

KEYS_VARIABLE = "VITRAIL_API_KEYS"
MIN_TIMEOUT = 30
"""seconds: with less, a slow connection or a busy machine would look like an error"""
MIN_KEY_LENGTH = 16
"""characters of an API key"""
MAX_IMAGES = 64
"""images of one request"""


@dataclass(frozen=True)
class Settings:
    """Limits of the server. Sizes are bytes, times seconds."""

    keys: frozenset[str] = frozenset()
    """API keys, one of which every request to a model must carry; empty: none is needed"""
    origins: tuple[str, ...] = ()
    """origins of pages elsewhere that may use the server, such as https://photos.example.org"""
    max_upload: int = 20_000_000
    """bytes of one request"""
    max_pixels: int = 50_000_000
    """pixels that an image may declare"""
    rate_limit: int = 0
    """requests per minute of one client; 0: no limit"""
    queue: int = 256
    """images that may wait: above it a request is answered with 503"""
    max_batch: int = 32
    """images that are answered at once"""
    max_wait: float = 0.005
    """how long the first image of a batch waits for others"""
    timeout: float = 60.0
    """for the upload of a request, and again for its answer"""
    engine: Literal["auto", "eager", "compile", "onnx", "openvino"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    measure: float = 20.0
    """seconds for trying engines at the start, for all models together; 0: none is tried"""

    def __post_init__(self) -> None:
        require(self, 1, math.inf, "max_upload", "max_pixels", "queue", "max_batch")
        require(self, 0, math.inf, "rate_limit", "measure")
        require(self, 0, 10, "max_wait")
        require(self, MIN_TIMEOUT, math.inf, "timeout")
        for name in ("engine", "precision"):
            choices = get_args(get_type_hints(Settings)[name])
            if getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for origin in self.origins:
            check_origin(origin)

    @property
    def memory(self) -> int:
        """Bytes of all uploads that may be held at once."""
        return max(512_000_000, 2 * self.max_upload)


def check_origin(origin: str) -> None:
    """Raise UserError for what no browser sends as the origin of a page: it would never match."""
    if "*" in origin:
        raise UserError(f"{origin!r} has a wildcard, and browsers send none: name each origin")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+", origin) or not origin.isascii():
        raise UserError(f"{origin!r} is not an origin: write scheme and host, such as https://example.org")
    sent = re.sub(r"^(https://.*):443$|^(http://.*):80$", r"\1\2", origin.lower())
    if sent != origin:
        raise UserError(f"{origin!r} is an origin that browsers send as {sent}: write that")


def read_keys(file: Path | None) -> frozenset[str]:
    """The API keys in a file, one per line, and in the environment, separated by commas.

    They are no values of a flag, which every user of a machine can read.
    """
    words: list[str] = []
    if file is not None:
        try:
            words = list(filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as API keys ({error}): write one key per line") from None
        if not words:
            raise UserError(f"{file} holds no API key: write one per line, of at least {MIN_KEY_LENGTH} characters")
    given = map(str.strip, os.environ.get(KEYS_VARIABLE, "").split(","))
    keys = frozenset((*words, *filter(None, given)))
    for key in keys:
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"an API key has at least {MIN_KEY_LENGTH} printable characters and no spaces: choose others"
            )
    return keys
