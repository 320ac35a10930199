"""The command line: one function per command. Heavy imports are inside the functions, so help is fast.

Standard output is for results, standard error for people. Wrong input gives one line and exit code 2.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.cluster.command import add_grid, cluster, train_grid
from vitrail.commands.doctor import doctor
from vitrail.commands.files import convert, data, export
from vitrail.commands.models import models
from vitrail.commands.recipes import ALL, print_list, print_recipe
from vitrail.commands.serve import serve
from vitrail.commands.task_help import print_help
from vitrail.errors import RunError, Stopped, UserError
from vitrail.faults import CLOSED_PIPE, discard_output, has_no_reader, print_os_error
from vitrail.files import refuse_existing
from vitrail.help import overview
from vitrail.options import (
    DATA,
    GROUP,
    HELP,
    SOURCE,
    VERIFY,
    Parser,
    as_typed,
    parse_fields,
    parse_options,
    path,
    split_options,
    task_flags,
)
from vitrail.standard_error import own_lines
from vitrail.units import score_text

if TYPE_CHECKING:
    from vitrail.start import Trained
    from vitrail.tasks.task import Task
    from vitrail.train.parallel import World

log = logging.getLogger("vitrail")


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


def train(args: Sequence[str]) -> int:
    """Train a recipe, or list the recipes: `vitrail train RECIPE [--data D] [--init SOURCE] [--FIELD VALUE]`."""
    parser = Parser("train", train)
    parser.set_defaults(recipe=None)
    if not any(arg.partition("=")[0] == "--resume" for arg in args):  # with it, the value of a field may be a lone word
        parser.add_argument(
            "recipe", nargs="?", help="name of a recipe, or the recipe.json of a run; without one, list all"
        )
    parser.add_argument("--data", help=f"{DATA}; default: the recipe's")
    parser.add_argument("--init", help=f"start from these weights: {SOURCE}")
    parser.add_argument(
        "--out", type=path, help="the run's folder; default: runs/RECIPE-SEED, with a number added if it exists"
    )
    parser.add_argument("--group", help=GROUP)
    parser.add_argument(
        "--resume",
        type=path,
        metavar="RUN",
        help="resume this run; its data may move (--data), and it may grow (--epochs)",
    )
    add_grid(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="train in N processes of this machine: one per GPU")
    parser.add_argument("--shard", action="store_true", help="with several processes: share the weights out (FSDP2)")
    parser.add_argument("--json", action="store_true", help="print the scores as one line of JSON")
    wants_help = any(arg in (*HELP, ALL) for arg in args) and args[0] not in HELP
    options, rest = parser.parse_known_args([arg for arg in args if not (wants_help and arg in (*HELP, ALL))])
    name = options.recipe
    if name is not None and name.endswith(".json"):
        from vitrail.recipe_file import as_words

        return train(as_words(name, args))
    if not wants_help and (code := train_grid(options, args)) is not None:
        return code
    from vitrail.train import launcher

    if options.resume is None and (name is None or wants_help):
        if name is None and (rest or options.data or options.init or options.out):
            raise UserError("name a recipe (vitrail train lists them)")
        if name is None:
            print_list()
        else:
            print_recipe(parser, options, ALL in args)
        return 0
    if options.nproc not in (None, 1) and not launcher.several():
        launcher.refuse_many_processes()
        return launcher.start(args, options.nproc)
    with launcher.joined(options.device, options.shard, options.nproc) as world:
        trained = run_training(options, rest, world, parser.flags)
    from vitrail.announce import end

    scores, rule = trained.scores, trained.task.score
    if options.json:
        print(json.dumps(scores))
        end(trained.task, trained.folder, named=False)
        return 0
    value = f" {rule.name} {rule.text(scores[rule.name]) or 'none'}" if rule is not None else ""
    fast = " (fast dev run)" * ("fast_dev_run" in scores)
    print(f"{scores['split']}{value} in {scores['seconds']:.0f} s{fast}")
    print(f"best weights: {trained.folder.best}, report: {trained.folder.report}", flush=True)
    end(trained.task, trained.folder, named=True)
    return 0


def run_training(options: Namespace, rest: Sequence[str], world: World, flags: Sequence[str]) -> Trained:
    """Start or resume the run that the options of `train` name; `rest` are the fields of its recipe.

    `flags` are those of the command itself.
    """
    from vitrail import recipes
    from vitrail.resume import begin_or_resume, resume_run

    if options.resume is not None:
        if any(option is not None for option in (options.init, options.out, options.group)):
            raise UserError("--resume continues a run with its own settings: give no recipe, --init, --out or --group")
        return resume_run(options.resume, options.device, options.data, rest, world)
    recipe = recipes.find(options.recipe)
    changes = parse_fields(recipe(10_000), rest, () if options.init is None else recipes.FREE, flags)
    return begin_or_resume(
        recipe, options.data, options.init, changes, options.out, options.device, options.group, world
    )


def evaluate(args: Sequence[str]) -> int:
    """Score a model: `vitrail eval SOURCE --data D [--split S] [--probe] [--json]`."""
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
    if (named := parser.parse_help(args)) is not None:
        return print_help(parser, named.source)
    chosen, others = split_options(args, task_flags())
    options = parser.parse_args(others, lambda given: load_model(given.source, given.device, given.revision))
    names = ("revision", "merge", "probe", "shuffle_images", "max_bad")
    values = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    given = [flag for flag, value in values.items() if value is not None and value is not False]
    given = [*given, *(word.partition("=")[0] for word in chosen)]
    if options.human and given:
        raise UserError(f"{given[0]} applies to a model's predictions, but --human scores people: use only one of them")
    from vitrail.report import NO_SCORES
    from vitrail.start import score, score_people
    from vitrail.train.run import FAST_IMAGES

    images = FAST_IMAGES if options.fast_dev_run else None
    task = load_model(options.source, options.device, options.revision, merge=options.merge)
    if options.human:
        split, scores = score_people(task, options.data, options.split, images)
    else:
        task.choose(parse_options(task, chosen))
        source = at_revision(options.source, options.revision)
        split, scores = score(
            task, source, options.data, options.split, options.probe, options.shuffle_images, images, options.max_bad
        )
    if options.fast_dev_run:
        log.warning(f"fast dev run: at most {images} images of each split; {NO_SCORES}")
        scores["fast_dev_run"] = True
    if options.json:
        source = "human" if options.human else options.source
        print(json.dumps({"source": source, "data": options.data, "split": split, **scores}))
        return 0
    print(f"{split}: {scores['count']} images" + ", each with the target of another" * options.shuffle_images)
    printed = task.printed_scores(scores)
    width = max(map(len, printed), default=0)
    for name, value in printed.items():
        print(f"  {name:<{width}}  {score_text(value)}")
    return 0


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
                progress.step()
    if (where := output.summary) is not None and not options.json:
        print(where)
    return code


def explain(args: Sequence[str]) -> int:
    """Show how a model comes to its answer for an image: `vitrail explain IMAGE [--model SOURCE] --out DIR`."""
    parser = Parser("explain", explain)
    parser.add_argument("image", type=path, nargs="+", help="one image")
    parser.add_argument("--model", default="classify", help=SOURCE)
    parser.add_revision()
    parser.add_merge()
    parser.add_argument("--verify", action="store_true", help=VERIFY)
    parser.add_argument("--beside", type=path, help="another image, whose patches are compared with the first one's")
    parser.add_argument("--near", type=path, help="folder in which the most similar images are found")
    parser.add_argument("--out", type=path, required=True, help="folder for the page, the figures and the arrays")
    options = parser.parse_args(args)
    image = options.image[0]
    if len(options.image) > 1:
        raise UserError(f"explain draws one image, got {len(options.image)}: name one of them")
    for named in (image, options.beside):
        if named is not None and named.is_dir():
            raise UserError(f"{named} is a folder, and explain draws one image: name a file in it")
    if options.near is not None and not options.near.is_dir():
        raise UserError(f"--near {options.near} is not a folder: name one that holds images")
    from vitrail.data.sources import images_of
    from vitrail.explain.command import explain as write
    from vitrail.explain.command import refuse_out

    refuse_out(options.out)  # before the model is loaded
    gallery = [] if options.near is None else images_of([options.near])
    task = load_model(options.model, options.device, options.revision, options.verify, options.merge)
    written = write(task, image, options.out, options.beside, gallery)
    print(f"{image}: {' '.join(written['text'].split())}")
    print(written["files"]["index.html"])
    return 0


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


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "explain": explain,
    "compare": compare,
    "convert": convert,
    "export": export,
    "data": data,
    "cluster": cluster,
    "doctor": doctor,
    "models": models,
    "serve": serve,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0; 2 for wrong input; 1 for a fault of the run; 130 or 75 if stopped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, io.TextIOWrapper(io.BytesIO()))
    with own_lines():
        return _main(args)


def _main(args: Sequence[str] | None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain bytes that cannot be printed
    try:
        return answer(list(sys.argv[1:] if args is None else args))
    except BrokenPipeError as error:
        # A pipe whose reader has closed it (such as `head`) is normal, so nothing is printed. Any other is an error.
        if not any(map(has_no_reader, (sys.stdout, sys.stderr))):
            return print_os_error(error)
        discard_output()
        return CLOSED_PIPE


def answer(args: list[str]) -> int:
    """Run one command and return its exit code. Errors are printed as one line."""
    try:
        code = run(args)
        sys.stdout.flush()  # a full disk fails here, while the error can still be reported
        return code
    except (UserError, RunError, Stopped) as error:
        print(f"vitrail: {as_typed(str(error), args)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        return print_os_error(error)
    except KeyboardInterrupt:
        print("vitrail: stopped", file=sys.stderr)
        return Stopped.exit_code


def run(args: list[str]) -> int:
    """Run one command. Errors are raised."""
    if not args or args[0] in ("-h", "--help"):
        print(overview(COMMANDS))
        return 0 if args else 2
    if args[0] == "--version":
        from vitrail import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        near = get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise UserError(f"no command {args[0]!r}: {hint}")
    return COMMANDS[args[0]](args[1:])


def load_model(
    source: str, device: str | None, revision: str | None, verify: bool = False, merge: Sequence[int] | None = None
) -> Task:
    """The model of a source on the chosen device."""
    from vitrail.train.device import choose_device
    from vitrail.zoo import load

    return load(source, device=choose_device(device), revision=revision, verify=verify, merge=merge)


def at_revision(source: str, revision: str | None) -> str:
    """The source as one word."""
    return source if revision is None else f"{source}@{revision}"
