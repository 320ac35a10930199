"""The options of commands: argparse and tyro, whose errors become one plain line each."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin

from vitrail.errors import UserError
from vitrail.plain import Field, flat_fields
from vitrail.tasks import TASKS, task_class

if TYPE_CHECKING:
    from vitrail.tasks.task import Task
    from vitrail.train.run import Run

HELP = ("-h", "--help")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line. Every command takes --device."""

    def __init__(self, name: str, command: Callable[..., int]) -> None:
        super().__init__(f"vitrail {name}", description=inspect.getdoc(command), allow_abbrev=False)
        self.add_argument("--device", help="cpu, cuda, cuda:1 or mps; default: the best available")

    def add_fast_dev_run(self) -> None:
        """For commands that may take long. For `train` it is a field of the run."""
        self.add_argument("--fast-dev-run", action="store_true", help="test the pipeline in seconds, on a few images")

    def add_revision(self) -> None:
        """For commands that load a model."""
        self.add_argument("--revision", help="branch, tag or commit on the Hub; the same as SOURCE@REVISION")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the options)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """Like argparse, but a URL is a UserError: Path would silently drop a slash of it."""
        from vitrail.files import refuse_url

        for arg in args:
            refuse_url(arg.partition("=")[2] if arg.startswith("-") else arg)
        return super().parse_known_args(args)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str], task: Callable[[argparse.Namespace], Task] | None = None
    ) -> argparse.Namespace:
        """Like argparse, but the error for an unknown option suggests the closest name.

        `task` loads the command's model, whose task's options are also candidates for the suggestion.
        """
        options, rest = self.parse_known_args(args)
        if rest:
            known = [name for action in self._actions for name in action.option_strings]
            known += [] if task is None else map(_flag, flat_fields(task(options).option))
            raise UserError(_unknown(rest[0], known))
        return options

    def parse_help(self, args: Sequence[str]) -> argparse.Namespace | None:
        """Parse a call with --help, in which no argument is required; None for any other call."""
        if not any(arg in HELP for arg in args):
            return None
        for action in self._actions:
            action.required = False
        return self.parse_known_args([arg for arg in args if arg not in HELP])[0]


def parse_fields(run: Run, args: Sequence[str], also: Sequence[str] = ()) -> dict[str, Any]:
    """The run fields that the arguments set, as plain values.

    The fields of a variant are flags of every recipe that trains a Vision Transformer, and those of `also` of every
    recipe: the model of the weights that it starts from may have them.
    """
    from vitrail.variants import VariantConfig

    known = flat_fields(_spelled_out(run))
    known |= {name: entry for name, entry in flat_fields(VariantConfig()).items() if name in also and name not in known}
    return _parsed(known, squared(args))


def print_fields(run: Run, name: str) -> None:
    """The help of a recipe's fields."""
    _print_help(_spelled_out(run), f"vitrail train {name}")


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
                flags[f"--no-{flag[2:]}"] = 0
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


def parse_options(task: Task, args: Sequence[str]) -> dict[str, Any]:
    """The options of a task that the arguments set, as plain values for `Task.choose`."""
    known = flat_fields(task.option)
    for name in filter(None, (_named(arg, _all_options()) for arg in args)):
        if name not in known:
            owners = [other for other in TASKS if name in flat_fields(task_class(other).options())]
            raise UserError(
                f"{_flag(name)} is an option of the task{'s' * (len(owners) > 1)} {' and '.join(owners)}, and this "
                f"model's task is {task.name}: leave it out"
            )
    return _parsed(known, args)


def print_options(task: Task, command: str) -> None:
    """The help of the options of a model's task."""
    if flat_fields(task.option):
        print(f"\nOptions of this model's task, {task.name}; default: the model's own values:")
        _print_help(task.option, command)
    else:
        print(f"\nThis model's task, {task.name}, has no options of its own.")


def _all_options() -> set[str]:
    return {field for name in TASKS for field in flat_fields(task_class(name).options())}


def _parsed(known: Mapping[str, Field], args: Sequence[str]) -> dict[str, Any]:
    """The values of the fields that the arguments set. tyro's boxed errors become one line.

    Values are checked by type only; the dataclass checks whether they fit together.
    """
    flags = [_flag(name) for name in known]
    flags += [f"--no-{_flag(name)[2:]}" for name, entry in known.items() if entry.kind is bool]
    for arg in args:
        option = _normal(arg.partition("=")[0])
        if option.startswith("--") and option not in flags:
            raise UserError(_unknown(option, flags))
    _check_choices(args, {name: entry.words for name, entry in known.items() if entry.words})
    if not args:
        return {}
    import tyro

    given = [name for name in known if any(_named(arg, known) == name for arg in args)]
    options_class = make_dataclass(
        "Options", [(name, known[name].kind, field(default=known[name].value)) for name in given]
    )
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            values: Any = tyro.cli(
                options_class, args=args, config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
            )
    except SystemExit:
        raise UserError(_one_line(printed.getvalue())) from None
    return {name: getattr(values, name) for name in given}


def _print_help(value: Any, prog: str) -> None:
    import tyro

    with contextlib.suppress(SystemExit):
        config = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
        tyro.cli(type(value), prog=prog, args=["--help"], default=value, config=config)


def _flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _normal(flag: str) -> str:
    """A flag in its listed form: `--top_k` is `--top-k`."""
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _named(arg: str, known: Iterable[str]) -> str | None:
    """The field that an argument names; None for a value."""
    option = arg.partition("=")[0]
    if not option.startswith("--"):
        return None
    name = option[2:].replace("-", "_")
    return name if name in known else name.removeprefix("no_")


def squared(args: Sequence[str]) -> list[str]:
    """The arguments, with the single number of `--image-size 64` repeated for a square."""
    given: list[str] = []
    for arg in args:
        given += arg.split("=", 1) if re.match("--image[-_]size=", arg) else [arg]
    for place, arg in enumerate(given):
        sizes = list(itertools.takewhile(lambda word: not word.startswith("-"), given[place + 1 :]))
        if re.fullmatch("--image[-_]size", arg) and len(sizes) == 1:
            return [*given[: place + 1], *sizes, *given[place + 1 :]]
    return given


def _one_line(box: str) -> str:
    """The text of tyro's boxed error, without frame, title and usage."""
    text = " ".join(re.sub(r"[\u2500-\u257f]+|-{3,}", " ", box).split())
    text = re.sub(r"^(Parsing error|Value error|Missing argument|Unrecognized options) ", "", text)
    text = re.sub(r"^Error parsing (\w+: )?", "", text)
    return re.split(r" For full helptext| Argument helptext", text)[0]


def _check_choices(args: Sequence[str], choices: dict[str, list[str]]) -> None:
    """Refuse a value outside its field's choices and suggest the closest; tyro's wording varies by release."""
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in choices:
            continue
        if not equals:
            value = args[place + 1] if place + 1 < len(args) else "--"
        if value in choices[name] or value.startswith("--"):  # tyro reports an option without a value
            continue
        near = get_close_matches(value, choices[name], n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices[name])}"
        raise UserError(f"{option} cannot be {value!r}: {hint}")


def _unknown(option: str, known: Sequence[str]) -> str:
    near = get_close_matches(option, known, n=1)
    return f"unknown option {option}" + (f": did you mean {near[0]}?" if near else ": --help lists the options")
