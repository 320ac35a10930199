"""What holds for every test: no network but this machine's own, and no deadline that a slow machine would miss."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Tests share what lies beside them, and pytest's importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

HERE = (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname())

settings.register_profile("vitrail", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vitrail")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A name or an address elsewhere fails at once; a network that drops packets would hold a test for minutes."""
    find, connect = socket.getaddrinfo, socket.socket.connect

    def find_here(host: Any, *args: Any, **named: Any) -> Any:
        if (host.decode() if isinstance(host, bytes) else host) not in HERE:
            raise socket.gaierror(socket.EAI_NONAME, f"tests use no network: {host}")
        return find(host, *args, **named)

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in HERE:
            raise OSError(f"tests use no network: {address[0]}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", find_here)
        patch.setattr(socket.socket, "connect", connect_here)
        yield
