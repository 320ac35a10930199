"""`vitrail compare`: runs side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from vitrail.errors import UserError
from vitrail.files import refuse_existing
from vitrail.options import Parser, path


def compare(args: Sequence[str]) -> int:
    """Compare runs in a table, and with --out in a plot: `vitrail compare RUN... [--out PLOT]`."""
    parser = Parser("compare", compare)
    parser.add_argument("runs", type=path, nargs="+", help="run folders")
    parser.add_argument("--out", type=path, help="also write a plot to this PNG file")
    parser.add_argument("--json", action="store_true", help="print one object per line for each run")
    options = parser.parse_args(args)
    if options.out is not None:
        if options.out.suffix.lower() != ".png":
            raise UserError(f"the plot is a PNG file: give --out {options.out.with_suffix('.png')}")
        refuse_existing(options.out)
    from vitrail.report.compare import as_text
    from vitrail.report.compare import compare as side_by_side

    rows = side_by_side(options.runs, options.out)
    print("\n".join(map(json.dumps, rows)) if options.json else as_text(options.runs, rows))
    if options.out is not None:
        print(f"vitrail: plot: {options.out}", file=sys.stderr)
    return 0
