"""The options of commands: argparse for a command's own, and the fields of dataclasses. Errors are one plain line."""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from vitrail.errors import UserError
from vitrail.plain import Field, flat_fields, read, rule
from vitrail.synonyms import meant
from vitrail.tasks import TASKS, task_class

if TYPE_CHECKING:
    from vitrail.tasks.task import Task
    from vitrail.train.run import Run

HELP = ("-h", "--help")
SOURCE = "a run folder, a checkpoint of any layout, an export, the name of bundled weights, or a Hub id"
VERIFY = "list how each weight was used, and compare outputs with the source library's own model if it is installed"
DATA = (
    "a built-in name, a folder with one folder per class, a CSV of labels, Parquet files, shards, images with captions "
    "or masks, or a set on the Hub (hf://datasets/ORG/NAME)"
)
GROUP = "keep all images of a group in the same split: parent, a regular expression, or a CSV file"


def path(text: str) -> Path:
    """A path on the command line. UserError for an empty one: it would mean the current folder."""
    from vitrail.data.sources import refuse_empty

    refuse_empty(text)
    return Path(text)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line. Every command takes --device."""

    def __init__(self, name: str, command: Callable[..., Any], urls: bool = False) -> None:
        """`urls`: the command takes URLs."""
        self.urls = urls
        self.words: list[str] = []
        super().__init__(f"vitrail {name}", description=inspect.getdoc(command), allow_abbrev=False)
        self.add_argument("--device", help="cpu, cuda, cuda:1 or mps; default: the best available")

    def add_fast_dev_run(self) -> None:
        """For commands that may take long. For `train` it is a field of the run."""
        self.add_argument("--fast-dev-run", action="store_true", help="test the pipeline in seconds, on a few images")

    def add_revision(self) -> None:
        """For commands that load a model."""
        self.add_argument("--revision", help="branch, tag or commit on the Hub; the same as SOURCE@REVISION")

    def add_merge(self) -> None:
        """For commands that run a model."""
        text = (
            "merge so many patch tokens in each block, one number or one per block: faster, and less accurate; 0: none"
        )
        self.add_argument("--merge", type=int, nargs="+", metavar="TOKENS", help=f"{text}; default: the model's own")

    @property
    def opens_data(self) -> bool:
        return any(action.dest in ("data", "subject") for action in self._actions)

    @property
    def flags(self) -> list[str]:
        """The command's own flags."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        for word in self.words if "required" in message else ():  # what is missing may stand after a wrong flag
            if word.startswith("--") and _normal(word.partition("=")[0]) not in self.flags and meant(word, self.flags):
                raise UserError(_unknown(word.partition("=")[0], self.flags, {}))
        raise UserError(f"{message} ({self.prog} --help lists the options)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """Like argparse, but a URL is a UserError: Path would silently drop a slash of it.

        Commands that open a data set take its place on the Hub.
        """
        from vitrail.files import refuse_url

        self.words = list(args)
        for arg in () if self.urls else args:
            value = arg.partition("=")[2] if arg.startswith("-") else arg
            if not (value.startswith("hf://datasets/") and self.opens_data):
                refuse_url(value)
        return super().parse_known_args(args)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str], task: Callable[[argparse.Namespace], Task] | None = None
    ) -> argparse.Namespace:
        """Like argparse, but the error for an unknown option suggests the closest name.

        `task` loads the command's model, whose task's options are also candidates for the suggestion.
        """
        options, rest = self.parse_known_args(args)
        if rest:
            known = self.flags
            known += [] if task is None else map(_flag, flat_fields(task(options).option))
            raise UserError(_unknown(rest[0], known, _of_other_commands()))
        return options

    def parse_help(self, args: Sequence[str]) -> argparse.Namespace | None:
        """Parse a call with --help, in which no argument is required; None for any other call."""
        if not any(arg in HELP for arg in args):
            return None
        for action in self._actions:
            action.required = False
        return self.parse_known_args([arg for arg in args if arg not in HELP])[0]


def parse_fields(
    run: Run, args: Sequence[str], also: Sequence[str] = (), options: Sequence[str] = ()
) -> dict[str, Any]:
    """The run fields that the arguments set, as plain values; `also` as in `known_fields`.

    `options` are flags of the command itself, which the error for an unknown one may suggest.
    """
    return _parsed(known_fields(run, also), args, partial(_foreign_fields, run), options)


def known_fields(run: Run, also: Sequence[str] = ()) -> dict[str, Field]:
    """The fields that are flags of a recipe.

    The fields of a variant are flags of every recipe that trains a Vision Transformer, and those of `also` of every
    recipe: the model of the weights that it starts from may have them.
    """
    from vitrail.variants import VariantConfig

    known = {name: entry for name, entry in flat_fields(_spelled_out(run)).items() if name not in NO_FIELDS}
    return known | {
        name: entry for name, entry in flat_fields(VariantConfig()).items() if name in also and name not in known
    }


NO_FIELDS = ("recipe", "data", "init", "group")
"""fields of a run that are no flags of their own: `train` has arguments for them"""


def _spelled_out(run: Run) -> Run:
    """The run with every field of a variant."""
    from vitrail.variants import as_variant
    from vitrail.vit import ViTConfig

    return replace(run, model=as_variant(run.model)) if isinstance(run.model, ViTConfig) else run


def task_flags() -> dict[str, int | None]:
    """The flags of the options of all tasks, and how many values each takes; None for any number."""
    flags: dict[str, int | None] = {}
    for name in TASKS:
        for field_name, entry in flat_fields(task_class(name).options()).items():
            flag = _flag(field_name)
            flags[flag] = _values(entry.kind)
            if entry.kind is bool:
                flags[_no(field_name)] = 0
    return flags


def _values(kind: Any) -> int | None:
    """How many values a flag of this type takes; None for any number."""
    if kind is bool:
        return 0
    for member in (kind, *get_args(kind)):  # of a union
        if get_origin(member) is tuple:
            return None if Ellipsis in get_args(member) else len(get_args(member))
    return 1


def split_options(args: Sequence[str], flags: Mapping[str, int | None]) -> tuple[list[str], list[str]]:
    """The arguments that are flags of tasks with their values, and the others.

    They are separated before the model is loaded, because the remaining arguments name the model.
    """
    given: list[str] = []
    others: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        flag, equals, _ = word.partition("=")
        if word == "--":
            return given, [*others, word, *words]
        if (flag := _normal(flag)) not in flags:
            others.append(word)
            continue
        count = 0 if equals else flags[flag]
        if count is None:
            count = len(list(itertools.takewhile(lambda other: not other.startswith("-"), words)))
        given += [word, *words[:count]]
        del words[:count]
    return given, others


def parse_options(task: Task, args: Sequence[str], data: bool = True) -> dict[str, Any]:
    """The options of a task that the arguments set, as plain values for `Task.choose`.

    Without `data`, for a command that opens no data set, those that say how one is read are refused.
    """

    def foreign() -> dict[str, str]:
        owners = {name: _tasks(name, "options") for name in _all_options()}
        return {
            name: f"is an option of the {_listed(names)}, and this model's task is {task.name}"
            for name, names in owners.items()
        }

    values = _parsed(flat_fields(task.option), args, foreign)
    if not data and (idle := [name for name in values if name in task.data_options()]):
        noun = task.target.noun
        raise UserError(f"{_flag(idle[0])} is for the {noun} of a data set, and this command reads none: leave it out")
    return values


def _all_options() -> set[str]:
    return {field for name in TASKS for field in flat_fields(task_class(name).options())}


def _tasks(name: str, kind: Literal["options", "settings"]) -> list[str]:
    """The tasks whose options or settings have a field of this name."""
    return [task for task in TASKS if name in flat_fields(getattr(task_class(task), kind)())]


def _of_tasks() -> dict[str, str]:
    """What the options and the settings of all tasks are, by name."""
    found = {}
    for name in _all_options() | {name for task in TASKS for name in flat_fields(task_class(task).settings())}:
        options, settings = _tasks(name, "options"), _tasks(name, "settings")
        users = [*(["`predict`", "`eval`"] if options else []), *(["recipes"] if settings else [])]
        where = " and ".join(filter(None, (", ".join(users[:-1]), users[-1])))
        found[name] = f"is an option of {where} for the {_listed(list(dict.fromkeys(options + settings)))}"
    return found


def _listed(tasks: Sequence[str]) -> str:
    return f"task{'s' * (len(tasks) > 1)} {' and '.join(tasks)}"


def _of_other_commands() -> dict[str, str]:
    """What the flags that not every command has are, by name."""
    from vitrail.train.run import Run

    return dict.fromkeys(flat_fields(Run("", "")), "is an option of `train`") | _of_tasks()


def _foreign_fields(run: Run) -> dict[str, str]:
    """What the flags are that are no fields of this run, by name: of other tasks, or of other models."""
    from vitrail.tasks.encoder import KINDS

    trained = f", and the recipe {run.recipe} trains the task {run.task.name}"
    found = {
        name: f"does not apply to the recipe's model ({run.network})"
        for kind in KINDS.values()
        for name in flat_fields(kind())
    }
    found |= {
        name: text + trained * (run.task.name not in _tasks(name, "options")) for name, text in _of_tasks().items()
    }
    found |= {"recipe": "is the first argument of `train`"}
    return {
        name: text for name, text in found.items() if name not in flat_fields(_spelled_out(run)) or name in NO_FIELDS
    }


def _parsed(
    known: Mapping[str, Field],
    args: Sequence[str],
    foreign: Callable[[], Mapping[str, str]],
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """The values of the fields that the arguments set. `foreign` says what each flag is that does not belong here.

    Values are checked by type only; the dataclass checks whether they fit together.
    """
    values: dict[str, Any] = {}
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    while words:
        option = words.pop(0)
        name, negated = _named(option, known)
        if name is None:
            flags = [*options, *map(_flag, known), *(_no(name) for name in known if known[name].kind is bool)]
            raise UserError(_unknown(option, flags, foreign()))
        given = list(itertools.takewhile(lambda word: not _is_flag(word), words))
        del words[: len(given)]
        kind = known[name].kind
        if kind is bool:
            if given:
                raise UserError(
                    f"{option} takes no value, got {shlex.join(given)!r}: write {_flag(name)} or {_no(name)}"
                )
            values[name] = not negated
            continue
        if name == "image_size" and len(given) == 1:
            given *= 2  # the side of a square
        try:
            values[name] = read(kind, given)
        except ValueError:
            raise UserError(_refused(option, given, known[name])) from None
    return values


def _is_flag(word: str) -> bool:
    """Whether a word is a flag and no value: a negative number is a value."""
    return bool(re.match(r"--?[^\W\d]", word)) and word.lower() not in ("-inf", "-nan")


def _refused(option: str, given: Sequence[str], entry: Field) -> str:
    """The error for a value that is not of the field's type, with the closest choice if there are choices."""
    value = shlex.join(given) if len(given) > 1 else "".join(given)
    if not given:
        return f"{option} needs a value: {rule(entry.kind)}"
    if not entry.words:
        return f"{option} must be {rule(entry.kind)}, got {value!r}"
    near = get_close_matches(value, entry.words, n=1)
    hint = f"did you mean {near[0]}? The choices are" if near else "choose from"
    return f"{option} cannot be {value!r}: {hint} {', '.join(entry.words)}"


def as_typed(message: str, args: Sequence[str]) -> str:
    """The refusal of a field's value, with the flag that set it in place of the field's name."""
    name, _, text = message.partition(" ")
    flags = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    found = next((flag for flag in flags if flag[2:].replace("-", "_") == name), None)
    return f"{found} {text}" if found and text.startswith("must ") else message


def _flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _no(name: str) -> str:
    """The flag that sets a field to False."""
    return _flag(f"no_{name}")


def _normal(flag: str) -> str:
    """A flag in its listed form: `--top_k` is `--top-k`."""
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _named(option: str, known: Mapping[str, Field]) -> tuple[str | None, bool]:
    """The field that a flag names, or None, and whether the flag begins with `--no-`."""
    name = option[2:].replace("-", "_") if option.startswith("--") else ""
    if name in known:
        return name, False
    bare = name.removeprefix("no_")
    return (bare, True) if bare != name and bare in known and known[bare].kind is bool else (None, False)


def _unknown(option: str, flags: Sequence[str], foreign: Mapping[str, str]) -> str:
    """The error for an argument that is none of the `flags`; `foreign` says, by name, what flags of others are."""
    if not option.startswith("-"):
        return f"unknown argument {option!r}: {_for_word(option, flags)}"
    name = option[2:].replace("-", "_").removeprefix("no_")
    if text := foreign.get(name):
        return f"{option} {text}: leave it out"
    if text := meant(option, flags):
        return f"unknown option {option}: {f'did you mean {text}?' if text.startswith('--') else text}"
    near = next(iter(get_close_matches(option, [*flags, *map(_flag, foreign)], n=1)), None)
    if near is None:
        return f"unknown option {option}: --help lists the options"
    elsewhere = "" if near in flags else f" It {foreign[near[2:].replace('-', '_')]}"
    return f"unknown option {option}: did you mean {near}?{elsewhere}"


def _for_word(word: str, flags: Sequence[str]) -> str:
    """What to do about a word that belongs to no flag."""
    flag, equals, value = word.partition("=")
    if equals and _flag(flag) in flags:
        return f"did you mean {_flag(flag)} {value}?"
    if "--data" in flags and Path(word).exists():
        return f"did you mean --data {word}?"
    return "--help lists the options"
