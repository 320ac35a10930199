"""A recipe file, such as the `recipe.json` of a run, in the place of a recipe's name: its values as flags.

`vitrail train run/recipe.json --epochs 20` is `vitrail train NAME --data D --lr ... --epochs 20`: the flags of the
command come last, and win.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from vitrail import recipes
from vitrail.errors import UserError
from vitrail.options import NO_FIELDS, parse_fields
from vitrail.plain import flat_fields
from vitrail.train.folder import RunFolder
from vitrail.variants import VariantConfig

OUTSIDE = ("data", "init", "group")
"""entries that are arguments of `train`"""


def as_words(name: str, args: Sequence[str]) -> list[str]:
    """The arguments of `train`, with the file `name` among them replaced by its recipe and the flags of its values.

    With weights to start from, a file's model has no flags but those that such weights leave free. A file may hold some
    of the values only: the others are the recipe's. Raises UserError for a file that is missing or no recipe, and for
    entries that are no fields or have a wrong value.
    """
    file = Path(name)
    values = _read(file)
    recipe = recipes.find(str(values["recipe"]))
    run = recipe(10_000)
    if (kind := _section(values, "task").get("kind", run.task.name)) != run.task.name:
        raise UserError(f"{file}: the recipe {run.recipe} trains the task {run.task.name}, not {kind}")
    init = values.get("init")
    tuned = init is not None or any(arg.partition("=")[0] == "--init" for arg in args)
    for section in (entry.name for entry in fields(run) if is_dataclass(getattr(run, entry.name))):
        _section(values, section)
    model = _section(values, "model")
    if model.get("kind") == "vit":  # which leaves out the fields of variants
        model = {**asdict(VariantConfig()), **model}
    if tuned:
        model = {key: value for key, value in model.items() if key in recipes.FREE}
    known = flat_fields(run)
    words = [word for key, value in _flat({**values, "model": model}) for word in _flag(key, value, known)]
    try:
        parse_fields(run, words, recipes.FREE if tuned else ())
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    data = None if values.get("data") is None else RunFolder(file.parent).data(str(values["data"]))
    given = {**values, "data": data}
    outside = [f"--{key}={given[key]}" for key in OUTSIDE if given.get(key) is not None]
    rest = list(args)
    rest.remove(name)
    return [run.recipe, *outside, *words, *rest]


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except UserError as error:
        raise UserError(f"{file} {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(values, dict) or not isinstance(values.get("recipe"), str):
        raise UserError(f"{file} names no recipe: give the recipe.json of a run's folder, or a recipe's name")
    return values


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the file, of whose two values of one name JSON would silently take the second."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"names {next(name for name in names if names.count(name) > 1)} twice: remove one of the two")
    return values


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{name} is not a section of fields but {section!r:.40}")
    return section


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields in a file and in its sections, but for what is no flag of its own."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value)
        elif name not in (*NO_FIELDS, "kind"):
            yield name, value


def _flag(name: str, value: Any, known: Mapping[str, Any]) -> list[str]:
    """The words that give a field its value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool) and (name not in known or known[name].kind is bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
