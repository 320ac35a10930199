"""Measuring scripts run from end to end, on sizes whose figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_gpu_script_goes_through_its_stages(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "attention", "data", "step-b16", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert set(rows) == {"attention", "data", "step-b16"}
    assert rows["data"]["batches of 1 and 64 alike"] and rows["step-b16"]["vitrail"]["utilisation"] > 0
