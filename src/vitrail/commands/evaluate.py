"""`vitrail eval`: the scores of a model on a data set."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitrail.commands.source import load_model
from vitrail.commands.task_help import print_help
from vitrail.errors import UserError
from vitrail.options import DATA, SOURCE, Parser, parse_options, split_options, task_flags
from vitrail.units import score_text

if TYPE_CHECKING:
    from vitrail.tasks.task import Task

log = logging.getLogger("vitrail")


def evaluate(args: Sequence[str]) -> int:
    """Score a model: `vitrail eval SOURCE --data D [--split S] [--probe] [--json]`."""
    parser = _parser()
    if (named := parser.parse_help(args)) is not None:
        return print_help(parser, named.source)
    chosen, others = split_options(args, task_flags())
    options = parser.parse_args(others, lambda given: load_model(given.source, given.device, given.revision))
    _refuse_beside_human(options, chosen)
    from vitrail.report import NO_SCORES
    from vitrail.start import score, score_people
    from vitrail.train.run import FAST_IMAGES

    images = FAST_IMAGES if options.fast_dev_run else None
    task = load_model(options.source, options.device, options.revision, merge=options.merge)
    if options.human:
        split, scores = score_people(task, options.data, options.split, images)
    else:
        task.choose(parse_options(task, chosen))
        source = options.source if options.revision is None else f"{options.source}@{options.revision}"
        split, scores = score(
            task, source, options.data, options.split, options.probe, options.shuffle_images, images, options.max_bad
        )
    if options.fast_dev_run:
        log.warning(f"fast dev run: at most {images} images of each split; {NO_SCORES}")
        scores["fast_dev_run"] = True
    _print_scores(options, task, split, scores)
    return 0


def _parser() -> Parser:
    parser = Parser("eval", evaluate)
    parser.add_argument("source", help=SOURCE)
    parser.add_revision()
    parser.add_merge()
    parser.add_argument("--data", required=True, help=f"{DATA}; with the targets of the model's task")
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: test, else val, else train")
    parser.add_argument("--probe", action="store_true", help="also score the features, by k-NN and a linear probe")
    parser.add_argument(
        "--human", action="store_true", help="score people instead: each reference against the image's others"
    )
    parser.add_argument(
        "--shuffle-images", action="store_true", help="control: pair each image with the targets of another"
    )
    parser.add_argument(
        "--max-bad", type=float, help="largest fraction of unreadable images; default: that of the run, else 0.01"
    )
    parser.add_fast_dev_run()
    parser.add_argument("--json", action="store_true", help="print every score as one line of JSON")
    return parser


def _refuse_beside_human(options: Namespace, chosen: Sequence[str]) -> None:
    """Raise UserError for options of a model's predictions, among them the task's own, beside --human."""
    names = ("revision", "merge", "probe", "shuffle_images", "max_bad")
    values = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    given = [flag for flag, value in values.items() if value is not None and value is not False]
    given = [*given, *(word.partition("=")[0] for word in chosen)]
    if options.human and given:
        raise UserError(f"{given[0]} applies to a model's predictions, but --human scores people: use only one of them")


def _print_scores(options: Namespace, task: Task, split: str, scores: dict[str, Any]) -> None:
    if options.json:
        source = "human" if options.human else options.source
        print(json.dumps({"source": source, "data": options.data, "split": split, **scores}))
        return
    print(f"{split}: {scores['count']} images" + ", each with the target of another" * options.shuffle_images)
    printed = task.printed_scores(scores)
    width = max(map(len, printed), default=0)
    for name, value in printed.items():
        print(f"  {name:<{width}}  {score_text(value)}")
