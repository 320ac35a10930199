"""How long `vitrail --help` takes, and whether importing the package imports torch: python bench/startup.py."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from record import record


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    times = [seconds(sys.executable, "-m", "vitrail", "--help") for _ in range(11)]
    code = "import sys, vitrail; print('torch' in sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    rows = {
        "vitrail --help, median seconds": round(statistics.median(times), 3),
        "vitrail --help, slowest seconds": round(max(times), 3),
        "import vitrail imports torch": imported == "True",
    }
    print(rows)
    record("startup", rows)


if __name__ == "__main__":
    main()
