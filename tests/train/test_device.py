"""Memory that a training no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest

from vitrail.train.device import release_memory

glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not glibc, reason="needs glibc")
def test_gaps_between_what_is_in_use_are_given_back() -> None:
    blocks = [(bytearray(100_000), bytearray(1_000)) for _ in range(1_000)]
    kept = [small for _, small in blocks]
    before = resident()
    del blocks
    release_memory()
    assert before - resident() > 80_000_000 and len(kept) == 1_000
