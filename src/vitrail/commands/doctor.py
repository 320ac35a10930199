"""`vitrail doctor`: what is wrong with data or a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from vitrail.errors import UserError
from vitrail.files import refuse_existing, write_atomic
from vitrail.options import Parser, path


def doctor(args: Sequence[str]) -> int:
    """Find what is wrong with data or a run: `vitrail doctor DATA|RUN [--json] [--out FILE]`."""
    parser = Parser("doctor", doctor)
    parser.add_argument(
        "subject", metavar="DATA|RUN", help="a data set of any kind that vitrail reads, or a run folder"
    )
    parser.add_argument("--json", action="store_true", help="print one object per line for each finding")
    parser.add_argument("--out", type=path, help="also write the findings, baselines and notes to this .json file")
    parser.add_argument(
        "--images", type=int, metavar="N", help="judge the labels of at most N images; 0: of none; default: 2000"
    )
    options = parser.parse_args(args)
    if options.images is not None and options.images < 0:
        raise UserError(f"--images must be a number of at least 0, got {options.images}")
    if options.out is not None:
        if options.out.suffix.lower() != ".json":
            raise UserError(f"the report is a JSON file: give --out {options.out.with_suffix('.json')}")
        refuse_existing(options.out)
    from vitrail.doctor import examine

    found = examine(options.subject, options.images)
    if options.out is not None:
        write_atomic(options.out, json.dumps(found.row(), indent=2) + "\n")
    for note in found.notes:
        print(f"vitrail: {note}", file=sys.stderr)
    if options.json:
        for finding in found.findings:
            print(json.dumps(finding.row()))
    else:
        print(found.text())
    return 0
