"""The command line: one function per command, with heavy imports inside so that help comes at once.

Standard output is for results, standard error for people. Wrong input ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import errno
import inspect
import io
import json
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vitrail.errors import RunError, Stopped, UserError
from vitrail.options import Parser, parse_run
from vitrail.standard_error import own_lines

if TYPE_CHECKING:
    from torch import Tensor

    from vitrail.tasks.task import Task

SOURCE = "a run folder, a checkpoint of any layout, the name of bundled weights, or a Hub id"
VERIFY = "tell what became of each weight, and compare with the source library's own model where it is installed"
DATA = "a built-in name, a folder with one folder per class, or Parquet files"
GROUP = "keep images of one group on one side of the validation split: parent, a regular expression, or a CSV file"
DECODING = (
    "beam",
    "length_penalty",
    "max_length",
    "no_repeat_ngram_size",
    "match",
    "consensus",
    "neighbours",
    "sample",
    "temperature",
    "top_k",
    "top_p",
    "sampling_seed",
)
"""fields of `vitrail.tasks.search.Decoding` that are options"""

log = logging.getLogger("vitrail")


def demo(args: Sequence[str]) -> int:
    """Train on digits, test, draw attention, and classify sample images with the package's weights."""
    parser = Parser("demo", demo)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the run and its images")
    parser.add_fast_dev_run()
    options = parser.parse_args(args)
    from vitrail.train.launcher import refuse_many_processes

    refuse_many_processes()
    from vitrail.demo import run_demo

    run_demo(options.out, options.device, options.fast_dev_run)
    return 0


def train(args: Sequence[str]) -> int:
    """Train a recipe: `vitrail train RECIPE [--data D] [--init SOURCE] [--out DIR] [any field of the recipe]`."""
    parser = Parser("train", train)
    parser.add_argument("recipe", nargs="?", help="name of a recipe; none lists them")
    parser.add_argument("--data", help=f"{DATA}; the recipe's own if left out")
    parser.add_argument("--init", help=f"start from these weights: {SOURCE}")
    parser.add_argument(
        "--out", type=Path, help="the run's folder; runs/RECIPE-SEED, or the next free number, if left out"
    )
    parser.add_argument("--group", help=GROUP)
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder; give no recipe")
    parser.add_argument("--json", action="store_true", help="print the scores as one line of JSON")
    wants_help = any(a in ("-h", "--help") for a in args) and args[0] not in ("-h", "--help")
    options, rest = parser.parse_known_args([a for a in args if not (wants_help and a in ("-h", "--help"))])
    name = options.recipe
    from vitrail.train.launcher import refuse_many_processes

    refuse_many_processes()
    from vitrail.train.start import begin, resume_run

    if options.resume is not None:
        others = (name, options.data, options.init, options.out, options.group)
        if rest or any(option is not None for option in others):
            raise UserError(
                "--resume takes the run as it was begun: give it no recipe and no other option than --device"
            )
        scores = resume_run(options.resume, options.device)
    else:
        from vitrail import recipes

        if name is None:
            if rest or options.data or options.init or options.out:
                raise UserError("name a recipe (vitrail train lists them)")
            width = max(map(len, recipes.RECIPES))
            for each, made in recipes.RECIPES.items():
                print(f"{each:<{width}}  {(inspect.getdoc(made) or '').splitlines()[0]}")
            return 0
        recipe = recipes.find(name)
        if wants_help:
            print(f"{inspect.getdoc(recipe)}\n\n{parser.format_help()}\nFields of the recipe:\n")
            parse_run(recipe(10_000), ["--help"], name)
        scores = begin(
            recipe,
            options.data,
            options.init,
            lambda run: parse_run(run, rest, name),
            options.out,
            options.device,
            options.group,
        )
    if options.json:
        print(json.dumps(scores))
    else:
        first = list(fractions(scores).items())[:2]
        print(
            scores["split"],
            *(f"{name} {value:.4f} " for name, value in first),
            f"in {scores['seconds']:.0f} s" + " (fast dev run)" * ("fast_dev_run" in scores),
        )
    return 0


def evaluate(args: Sequence[str]) -> int:
    """Score a model: `vitrail eval SOURCE --data D [--split S] [--probe] [--json]`."""
    parser = Parser("eval", evaluate)
    parser.add_argument("source", help=SOURCE)
    parser.add_revision()
    parser.add_argument("--data", required=True, help=f"{DATA}; for captioners a captioned set")
    parser.add_argument("--split", choices=("train", "val", "test"), help="test, or the nearest to it, if left out")
    parser.add_argument("--probe", action="store_true", help="score the features too, by k-NN and a linear probe")
    parser.add_argument(
        "--human", action="store_true", help="score people instead: each image's captions against its others"
    )
    parser.add_argument("--shuffle-images", action="store_true", help="the control: captions of the wrong images")
    parser.add_decoding()
    parser.add_fast_dev_run()
    parser.add_argument("--json", action="store_true", help="print every score as one line of JSON")
    options = parser.parse_args(args)
    of_models = ("revision", "probe", "shuffle_images", *DECODING)
    given = [name for name in of_models if (value := getattr(options, name)) is not None and value is not False]
    if options.human and given:
        raise UserError(
            f"--{given[0].replace('_', '-')} is for a model's answers, and --human scores people: leave one out"
        )
    from vitrail.train.report import NO_SCORES
    from vitrail.train.run import FAST_IMAGES
    from vitrail.train.start import score, score_people

    images = FAST_IMAGES if options.fast_dev_run else None
    if options.human:
        part, scores = score_people(options.source, options.data, options.split, images)
    else:
        part, scores = score(
            at_revision(options.source, options.revision),
            options.data,
            options.split,
            options.device,
            options.probe,
            options.shuffle_images,
            chosen_options(options),
            images,
        )
    if options.fast_dev_run:
        log.warning(f"fast dev run: at most {images} images of each split; {NO_SCORES}")
        scores["fast_dev_run"] = True
    if options.json:
        print(
            json.dumps(
                {"source": "human" if options.human else options.source, "data": options.data, "split": part, **scores}
            )
        )
        return 0
    print(f"{part}: {scores['count']} images" + ", each with the captions of another" * options.shuffle_images)
    for name, value in fractions(scores).items():
        print(f"  {name:<18} {value:.4f}")
    return 0


def chosen_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the task that were given."""
    return {name: value for name in DECODING if (value := getattr(options, name)) is not None}


def fractions(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that are one number and tell people something, in the task's order."""
    # Of five classes, one of the first five guesses is always right.
    classes = len(scores.get("per_class", ()))
    hidden = {"seconds", "top5"} if classes < 6 else {"seconds"}
    return {name: value for name, value in scores.items() if isinstance(value, float) and name not in hidden}


def predict(args: Sequence[str]) -> int:
    """Answer for images: `vitrail predict IMAGE|FOLDER... [--model SOURCE] [--json]`."""
    parser = Parser("predict", predict)
    parser.add_argument("images", nargs="+", help="images, or folders of them")
    parser.add_argument("--model", default="classify", help=SOURCE)
    parser.add_revision()
    parser.add_argument("--verify", action="store_true", help=VERIFY)
    parser.add_decoding()
    parser.add_argument("--json", action="store_true", help="print one object a line for each image")
    options = parser.parse_args(args)
    from vitrail.data.sources import images_of

    paths = images_of(options.images)
    task = load_model(options.model, options.device, options.revision, options.verify)
    task.choose(chosen_options(options))
    from vitrail.data.decode import EncodedImage
    from vitrail.data.pixels import Source, doubt

    code = 0
    sources: list[Source] = []
    for start in range(0, len(paths), 32):
        rows: list[dict[str, Any]] = []
        texts: dict[str, str] = {}
        prepared: list[tuple[dict[str, Any], Tensor]] = []
        for path in paths[start : start + 32]:
            row: dict[str, Any] = {"image": str(path), "task": task.name}
            rows.append(row)
            try:
                opened = EncodedImage(path)
                prepared.append((row, task.prepare(opened)))
                sources.append(opened.source)
            except UserError as error:
                row["error"], code = str(error), UserError.exit_code
        for (row, _), answer in zip(prepared, task.answers([image for _, image in prepared]), strict=True):
            row.update(answer.row())
            texts[row["image"]] = answer.text()
        for row in rows:
            print(json.dumps(row) if options.json else f"{row['image']}: {texts.get(row['image'], 'no answer')}")
            if "error" in row and not options.json:
                print(row["error"], file=sys.stderr)
    if (found := doubt(sources)) is not None:
        log.warning(found)
    return code


def explain(args: Sequence[str]) -> int:
    """Draw what a model looks at: `vitrail explain IMAGE [--model SOURCE] --out DIR`."""
    parser = Parser("explain", explain)
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", default="classify", help=SOURCE)
    parser.add_revision()
    parser.add_argument("--verify", action="store_true", help=VERIFY)
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    options = parser.parse_args(args)
    task = load_model(options.model, options.device, options.revision, options.verify)
    from vitrail.explain import explain as draw

    draw(task, options.image, options.out)
    print(options.out)
    return 0


def compare(args: Sequence[str]) -> int:
    """Put runs side by side in a table, and with --out in a plot: `vitrail compare RUN... [--out PLOT]`."""
    parser = Parser("compare", compare)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, help="draw a plot into this PNG file too")
    parser.add_argument("--json", action="store_true", help="print one object a line for each run")
    options = parser.parse_args(args)
    from vitrail.train.compare import as_table
    from vitrail.train.compare import compare as side_by_side

    rows = side_by_side(options.runs, options.out)
    print("\n".join(map(json.dumps, rows)) if options.json else as_table(rows))
    if options.out is not None:
        print(f"vitrail: plot: {options.out}", file=sys.stderr)
    return 0


def convert(args: Sequence[str]) -> int:
    """Write a model in another layout, and prove it: `vitrail convert SOURCE OUT --to vitrail|timm|hf|google`."""
    parser = Parser("convert", convert)
    parser.add_argument("source", help=SOURCE)
    parser.add_argument("out", type=Path, help="the folder to write; for google a file that ends in .npz")
    parser.add_argument("--to", choices=("vitrail", "timm", "hf", "google"), default="vitrail")
    parser.add_revision()
    parser.add_argument("--verify", action="store_true", help=VERIFY)
    parser.add_argument("--json", action="store_true", help="print the certificate with every weight, as one line")
    options = parser.parse_args(args)
    from vitrail.zoo import convert as write

    certificate = write(options.source, options.out, options.to, options.revision, options.verify)
    row = {**certificate.as_row(), "out": str(options.out), "to": options.to}
    print(json.dumps(row) if options.json else f"{certificate.as_text()}\nwritten to {options.out} ({options.to})")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "explain": explain,
    "compare": compare,
    "convert": convert,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for wrong input, 1 for a fault of the run."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it is closed, as by `>&-`
            setattr(sys, name, io.TextIOWrapper(io.BytesIO()))
    with own_lines():
        return _main(args)


def _main(args: Sequence[str] | None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text that can be printed
    try:
        return answer(list(sys.argv[1:] if args is None else args))
    except BrokenPipeError as error:
        # Of a pipe whose reader has gone, as `head` does, nothing is said. Another broken one is a fault.
        if not any(map(nobody_reads, (sys.stdout, sys.stderr))):
            return say_os_error(error)
        forget_output()
        return CLOSED_PIPE


def answer(args: list[str]) -> int:
    """Run one command; what goes wrong is printed in one line. Returns the exit code."""
    try:
        code = run(args)
        sys.stdout.flush()  # a disk that is full shows here, and not once nobody can say so
        return code
    except (UserError, RunError, Stopped) as error:
        print(f"vitrail: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        return say_os_error(error)
    except KeyboardInterrupt:
        print("vitrail: stopped", file=sys.stderr)
        return Stopped.exit_code


CLOSED_PIPE = 141
"""exit code where nobody reads the output any more: what a shell gives for `cat`"""


NO_PLACE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG)
"""errors of a place where nothing can be written"""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPIPE)
"""errors of writing"""
NO_ACCESS = (errno.EPERM, errno.EIO)
"""errors of reading as much as of writing"""


def say_os_error(error: OSError) -> int:
    """Print what the system refused in one line and return the exit code; an error that tells nothing is raised."""
    if error.errno in NO_PLACE and error.filename is not None:
        print(f"vitrail: cannot write {error.filename}: {error.strerror}; choose another --out", file=sys.stderr)
        return UserError.exit_code
    if error.errno not in (*NO_ROOM, *NO_ACCESS):
        raise error
    what = "read or write" if error.errno in NO_ACCESS else "write"
    print(f"vitrail: cannot {what} {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
    forget_output()
    return RunError.exit_code


def run(args: list[str]) -> int:
    """Run one command; what goes wrong is raised."""
    if not args or args[0] in ("-h", "--help"):
        print("vitrail: the Vision Transformer, from the paper's equations to a model that is in use.\n")
        for name, command in COMMANDS.items():
            print(f"  vitrail {name:<8} {inspect.getdoc(command)}")
        print("\n`vitrail COMMAND --help` lists a command's options.")
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


def nobody_reads(stream: TextIO) -> bool:
    """Whether what is printed goes to a pipe that has no reader any more."""
    try:
        place = stream.fileno()
    except (OSError, ValueError):  # closed, or no file
        return False
    poll = select.poll()
    poll.register(place, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def forget_output() -> None:
    """Drop what cannot be printed: Python would try once more as it ends, and fail with lines of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()  # it is another file that could not be written
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def load_model(source: str, device: str | None, revision: str | None, verify: bool) -> Task:
    """The model of a source on the chosen device."""
    from vitrail.train.device import choose_device
    from vitrail.zoo import load

    return load(source, device=choose_device(device), revision=revision, verify=verify)


def at_revision(source: str, revision: str | None) -> str:
    """The source as one word."""
    return source if revision is None else f"{source}@{revision}"
