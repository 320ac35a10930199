"""What `vitrail train` tells of recipes: their list, the fields of one that matter, and all of them."""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from vitrail.help import WIDTH, chosen, field_lines, meanings, two_columns, value_text
from vitrail.options import Parser, known_fields

ALL = "--help-all"
MAIN = (
    *("epochs", "max_steps", "patience", "batch_size", "lr", "muon_lr", "weight_decay", "method", "image_size"),
    *("crop", "flip", "policy", "mixup", "drop_path"),
)
"""fields of the short help, before those of the task"""
LAST = ("eval_every", "seed", "workers", "precision", "compile", "fast_dev_run")
"""and after them"""
HIDDEN = ("--help", "--grid", "--grid-index", "--shard", "--nproc", "--group", "--json")
"""options of `train` that the short help leaves out"""
SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 1_000_000)
"""numbers of training images that show whether a recipe depends on them"""


def print_list() -> None:
    """The recipes, one line each; cut to the width of a terminal, and whole for a program."""
    from vitrail.recipes import RECIPES

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    column = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        line = f"{name:<{column}}  {(inspect.getdoc(recipe) or '').splitlines()[0]}"
        print(line if width is None or len(line) <= width else f"{line[: width - 3]}...")
    sys.stdout.flush()
    print(
        "vitrail: `vitrail train RECIPE --help` shows a recipe; `vitrail train folder --data FOLDER` trains on your "
        "images, one folder per class",
        file=sys.stderr,
    )


def print_recipe(parser: Parser, options: argparse.Namespace, every: bool) -> None:
    """The help of the recipe that the options name, for their data if they name any."""
    print("\n".join(_all(parser, options) if every else _short(parser, options)))


def _short(parser: Parser, options: argparse.Namespace) -> Iterator[str]:
    from vitrail import recipes

    name, recipe = options.recipe, recipes.find(options.recipe)
    text = (inspect.getdoc(recipe) or "").partition("\n\n")
    yield f"usage: vitrail train {name} [--data D] [--FIELD VALUE ...]\n"
    yield from textwrap.wrap(text[0], WIDTH)
    yield from (line for line in text[2].splitlines() if line.startswith("Command: "))
    yield "\noptions:"
    for action in sorted(parser._actions, key=lambda action: action.dest == "device"):  # which matters least
        if action.option_strings and action.option_strings[-1] not in HIDDEN:
            yield from _option(action)
    run, notes, whose = _values(options)
    known = known_fields(run)
    shown = chosen(known, (*MAIN, *run.task.main, *LAST))
    if run.optim.optimizer != "muon":
        shown.pop("muon_lr", None)
    if run.init is None and options.init is None:
        shown.pop("method", None)
    yield f"\nfields, {whose}:"
    yield from field_lines(shown, _meanings(run), notes, short=True)
    yield f"\n--help-all shows all {len(known)} fields and further options."


def _all(parser: Parser, options: argparse.Namespace) -> Iterator[str]:
    from vitrail import recipes

    yield f"{inspect.getdoc(recipes.find(options.recipe))}\n\n{parser.format_help()}"
    run, notes, whose = _values(options)
    yield f"fields, {whose}:"
    yield from field_lines(known_fields(run), _meanings(run), notes)


def _meanings(run: Any) -> dict[str, str]:
    """The texts of the fields of a run, of its own model and its own task."""
    from vitrail.variants import as_variant
    from vitrail.vit import ViTConfig

    model = as_variant(run.model) if isinstance(run.model, ViTConfig) else run.model
    return meanings(type(run)) | meanings(type(model)) | meanings(type(run.task))


def _option(action: argparse.Action) -> Iterator[str]:
    """The help of an option of the command."""
    flag = action.option_strings[-1]
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    yield from two_columns(f"{flag}{value}", (action.help or "").replace("%%", "%"))


def _values(options: argparse.Namespace) -> tuple[Any, dict[str, str], str]:
    """The run that the options start, notes on fields whose values depend on more, and whose values the others are."""
    from vitrail import recipes
    from vitrail.start import plan

    recipe = recipes.find(options.recipe)
    if options.data is not None:
        found = plan(recipe, options.data, options.init, {}, options.group)
        return found.run, {}, f"with their values for {options.data} ({len(found.splits.train):,} training images)"
    if options.init is not None:
        recipe = recipes.TUNED.get(recipe, recipe)
    runs = [recipe(images) for images in SIZES]
    each = [known_fields(run) for run in runs]
    notes = {}
    for name in each[0]:
        texts = list(dict.fromkeys(value_text(known[name].value) for known in each))
        if len(texts) > 1:
            notes[name] = f"{texts[0]} for few images, {texts[-1]} for many"
    if runs[0].tune.method == "auto":
        notes |= dict.fromkeys(("lr", "muon_lr", "layer_decay", "optimizer"), "chosen by the data")
    if runs[0].init is not None or options.init is not None:
        names = ("image_size", "width", "depth", "heads", "patch", "channels")
        notes |= dict.fromkeys(names, "of the weights to start from")
    return runs[0], notes, "with their values" + " (add --data D for those of your data)" * bool(notes)
