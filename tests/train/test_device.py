"""Memory that a training no longer needs goes back to the system, and compiling warns of nothing without need."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the warning is for machines without a GPU")
def test_compiling_on_a_cpu_says_nothing_of_cuda(tmp_path: Path) -> None:
    """Where CUDA's compiler is installed; other warnings of the same module are shown."""
    code = (
        "import torch; from vitrail.train.device import ready_to_compile; ready_to_compile(torch.device('cpu'))\n"
        "from torch.utils import cpp_extension; assert cpp_extension.CUDA_HOME, 'it was looked for'\n"
        "import logging; logging.getLogger('torch.utils.cpp_extension').warning('another')"
    )
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "CUDA" not in done.stderr and "another" in done.stderr, done.stderr
