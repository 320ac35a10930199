"""`vitrail demo`: what the package does, in one command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitrail.options import Parser, path


def demo(args: Sequence[str]) -> int:
    """Train on digits, test, draw attention, and classify sample images with bundled weights."""
    parser = Parser("demo", demo)
    parser.add_argument("--out", type=path, default=Path("runs/demo"), help="folder for the run and its images")
    parser.add_fast_dev_run()
    options = parser.parse_args(args)
    from vitrail.train.launcher import refuse_several

    refuse_several("demo")
    from vitrail.demo import run_demo

    run_demo(options.out, options.device, options.fast_dev_run)
    return 0
