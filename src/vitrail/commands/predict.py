"""`vitrail predict`: a model's answers for images."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain

from vitrail.commands.source import load_model
from vitrail.commands.task_help import print_help
from vitrail.errors import UserError
from vitrail.options import SOURCE, VERIFY, Parser, parse_options, path, split_options, task_flags


def predict(args: Sequence[str]) -> int:
    """Run a model on images: `vitrail predict IMAGE|FOLDER... [--model SOURCE] [--json] [--out FILE|FOLDER]`."""
    parser = Parser("predict", predict)
    parser.add_argument("images", nargs="+", help="images, or folders of them")
    parser.add_argument("--model", default="classify", help=SOURCE)
    parser.add_revision()
    parser.add_merge()
    parser.add_argument("--verify", action="store_true", help=VERIFY)
    parser.add_argument(
        "--out", type=path, help="write one row per image to a .csv, .jsonl or .parquet file, or figures to a folder"
    )
    parser.add_argument("--json", action="store_true", help="print one object per line for each image")
    if (named := parser.parse_help(args)) is not None:
        return print_help(parser, named.model)
    chosen, others = split_options(args, task_flags())
    options = parser.parse_args(others, lambda given: load_model(given.model, given.device, given.revision))
    from vitrail.data.sources import images_of
    from vitrail.predictions import answer_files, output_to
    from vitrail.predictions.answers import Progress

    paths = images_of(options.images)
    output = output_to(options.out, options.images, paths)
    task = load_model(options.model, options.device, options.revision, options.verify, options.merge)
    task.choose(parse_options(task, chosen, data=False))
    code = 0
    with output.begin(task, paths):
        progress = Progress(len(paths), output.done)
        fresh = answer_files(task, paths, output.done, output.precision)
        answers = chain(output.resumed(), map(output.add, fresh))
        for number, (row, line) in enumerate(answers):
            if "error" in row:
                code = UserError.exit_code
                if not options.json:
                    print(row["error"], file=sys.stderr)
            if options.json:
                print(json.dumps(row))
            elif line is not None:
                print(line)
            if number >= output.done:
                progress.step(printed=options.json or line is not None)
    if (where := output.summary) is not None and not options.json:
        print(where)
    return code
