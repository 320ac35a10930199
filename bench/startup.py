"""The time of `vitrail --help`, and whether importing the package imports torch: python bench/startup.py."""

from __future__ import annotations

import statistics
import subprocess
import sys

from harness import Parser, in_turns, record


def parser() -> Parser:
    parser = Parser(__doc__, rounds=2)
    parser.set_defaults(rounds=11)
    return parser


def main() -> None:
    args = parser().parse_args()
    help_command = [sys.executable, "-m", "vitrail", "--help"]
    steps = {"help": lambda: subprocess.run(help_command, check=True, capture_output=True)}
    times = in_turns(steps, args.rounds, warm_up=0)["help"]
    code = "import sys, vitrail; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    rows = {
        "vitrail --help, median seconds": round(statistics.median(times), 3),
        "vitrail --help, slowest seconds": round(max(times), 3),
        "import vitrail imports torch": {"True": True, "False": False}[printed.strip()],
    }
    print(rows)
    record("startup", rows, args.results)


if __name__ == "__main__":
    main()
