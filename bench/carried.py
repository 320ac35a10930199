"""Score the weights that the package carries: python bench/carried.py --data DIR (a folder with CIFAR-10)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    command = [sys.executable, "-m", "vitrail", "eval", "classify", "--data", options.data, "--json"]
    scores = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rows = {name: scores[name] for name in ("top1", "top5", "cross_entropy", "calibration_error", "count")}
    print(rows)
    record("classify", {"part": scores["split"], **rows})


if __name__ == "__main__":
    main()
