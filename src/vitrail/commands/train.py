"""`vitrail train`: train a recipe, or list the recipes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitrail.commands.recipes import ALL, print_list, print_recipe
from vitrail.errors import UserError
from vitrail.options import DATA, GROUP, HELP, SOURCE, Parser, parse_fields, path

if TYPE_CHECKING:
    from vitrail.start import Trained
    from vitrail.train.parallel import World


def train(args: Sequence[str]) -> int:
    """Train a recipe, or list the recipes: `vitrail train RECIPE [--data D] [--init SOURCE] [--FIELD VALUE]`."""
    parser = _parser(args)
    wants_help = any(arg in (*HELP, ALL) for arg in args) and args[0] not in HELP
    options, rest = parser.parse_known_args([arg for arg in args if not (wants_help and arg in (*HELP, ALL))])
    name = options.recipe
    if name is not None and name.endswith(".json"):
        from vitrail.recipe_file import as_words

        return train(as_words(name, args))
    if not wants_help and (code := _train_grid(options, args)) is not None:
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
        trained = _run_training(options, rest, world, parser.flags)
    _print_end(trained, options.json)
    return 0


def _parser(args: Sequence[str]) -> Parser:
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
    parser.add_argument(
        "--grid",
        nargs="+",
        metavar="FIELD=VALUE,VALUE",
        help="train every combination of these values, in subfolders of --out",
    )
    parser.add_argument("--grid-index", type=int, metavar="K", help="only run K of the grid, from 0: for job arrays")
    parser.add_argument("--nproc", type=int, metavar="N", help="train in N processes of this machine: one per GPU")
    parser.add_argument("--shard", action="store_true", help="with several processes: share the weights out (FSDP2)")
    parser.add_argument("--json", action="store_true", help="print the scores as one line of JSON")
    return parser


def _train_grid(options: Namespace, args: Sequence[str]) -> int | None:
    """Run the grid of a `train` command; returns the exit code, or None if the command has no grid."""
    if options.grid is None:
        if options.grid_index is not None:
            raise UserError("--grid-index chooses a run of a grid: name its values with --grid")
        return None
    from vitrail.cluster.grid import run_grid
    from vitrail.train.launcher import several

    if several() and options.grid_index is None:
        raise UserError("--grid starts the processes of each run itself: leave torchrun out, and add --nproc N")
    return run_grid(args, options.grid_index, options.json)


def _run_training(options: Namespace, rest: Sequence[str], world: World, flags: Sequence[str]) -> Trained:
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


def _print_end(trained: Trained, as_json: bool) -> None:
    """The score, where the run's files are, and what to do next."""
    from vitrail.announce import end

    scores, rule = trained.scores, trained.task.score
    if as_json:
        print(json.dumps(scores))
    else:
        value = f" {rule.name} {rule.text(scores[rule.name]) or 'none'}" if rule is not None else ""
        fast = " (fast dev run)" * ("fast_dev_run" in scores)
        print(f"{scores['split']}{value} in {scores['seconds']:.0f} s{fast}")
        print(f"best weights: {trained.folder.best}, report: {trained.folder.report}", flush=True)
    end(trained.task, trained.folder, named=not as_json)
