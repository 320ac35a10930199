"""Programs that find mistakes in files other than Python: of the extra `dev`, or of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def linter(program: str) -> str | None:
    """The path of a program: beside the Python that runs the tests, or in PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(program, path=os.pathsep.join([beside, os.environ["PATH"]]))


def lint(program: str, *words: str) -> None:
    """Run a program, which must find no mistake; skip the test where it is not installed."""
    path = linter(program)
    if path is None:
        pytest.skip(f"needs {program}")
    done = subprocess.run([path, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
