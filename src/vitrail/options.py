"""The options of commands: argparse and tyro, whose errors become one plain line each."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, NoReturn

from vitrail.errors import UserError

if TYPE_CHECKING:
    from vitrail.train.run import Run


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line; every command takes --device."""

    def __init__(self, name: str, command: Callable[..., int]) -> None:
        super().__init__(f"vitrail {name}", description=inspect.getdoc(command), allow_abbrev=False)
        self.add_argument("--device", help="cpu, cuda, cuda:1, mps; the best there is if left out")

    def add_fast_dev_run(self) -> None:
        """For commands that may take long; of `train` it is a field of the run."""
        self.add_argument("--fast-dev-run", action="store_true", help="try everything within seconds, on a few images")

    def add_revision(self) -> None:
        """For commands that load a model."""
        self.add_argument("--revision", help="branch, tag or commit of a Hub id; SOURCE@REVISION says the same")

    def add_decoding(self) -> None:
        """For commands that may write captions; what is left out stays as the captioner's checkpoint says."""
        group = self.add_argument_group("how captions are written", "as the captioner's checkpoint says if left out")
        group.add_argument("--beam", type=int, help="captions kept at each word, and given; 1 is greedy")
        group.add_argument(
            "--length-penalty", "--length-penalty", type=float, help="0 favours short captions, 1 compares means a word"
        )
        group.add_argument("--max-length", type=int, help="words of a caption at most, its end included")
        group.add_argument("--no-repeat-ngram-size", type=int, help="no row of so many words comes twice; 0 allows it")
        group.add_argument(
            "--match", type=float, help="how much a caption's match with the image counts; 0: not at all"
        )
        group.add_argument("--consensus", type=float, help="how much its CIDEr with like images' captions counts")
        group.add_argument("--neighbours", type=int, help="how many like images that are")
        group.add_argument(
            "--sample", action=argparse.BooleanOptionalAction, help="draw --beam captions in place of a search"
        )
        group.add_argument("--temperature", type=float, help="below 1 likely words become likelier to be drawn")
        group.add_argument("--top-k", type=int, help="draw among so many likeliest words; 0 for all")
        group.add_argument("--top-p", type=float, help="draw among the likeliest words with this share of the odds")
        group.add_argument("--seed", type=int, dest="sampling_seed", help="of the draws")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the options)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does; UserError for a URL, of which a Path would drop a slash."""
        from vitrail.files import refuse_url

        for arg in args:
            refuse_url(arg.partition("=")[2] if arg.startswith("-") else arg)
        return super().parse_known_args(args)

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """As argparse does, with the nearest option's name for one that is unknown."""
        options, rest = self.parse_known_args(args)
        if rest:
            known = [name for action in self._actions for name in action.option_strings]
            raise UserError(_unknown(rest[0], known))
        return options


def parse_run(run: Run, args: Sequence[str], name: str) -> Run:
    """A recipe's run with the fields that the arguments change. tyro prints boxes; a person gets one line.

    The fields of a variant are flags of every recipe that trains a Vision Transformer.
    """
    import tyro

    from vitrail.train.run import choices, field_names
    from vitrail.variants import as_variant, simplest
    from vitrail.vit import ViTConfig

    if isinstance(run.model, ViTConfig):
        run = replace(run, model=as_variant(run.model))
    known = [f"--{field.replace('_', '-')}" for field in field_names(run)]
    known += [f"--no-{option[2:]}" for option in known]
    for option in args:
        option = option.split("=")[0].replace("_", "-")
        if option.startswith("--") and option != "--help" and option not in known:
            raise UserError(_unknown(option, known))
    _check_choices(args, choices(run))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(sys.stdout if "--help" in args else said):
            changed = tyro.cli(
                type(run),
                prog=f"vitrail train {name}",
                args=squared(args),
                default=run,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as end:
        if end.code == 0:
            raise
        raise UserError(_one_line(said.getvalue())) from None
    return replace(changed, model=simplest(changed.model)) if isinstance(changed.model, ViTConfig) else changed


def squared(args: Sequence[str]) -> list[str]:
    """The arguments with the one number of `--image-size 64` twice, for a square."""
    given: list[str] = []
    for arg in args:
        given += arg.split("=", 1) if re.match("--image[-_]size=", arg) else [arg]
    for place, arg in enumerate(given):
        sizes = list(itertools.takewhile(lambda word: not word.startswith("-"), given[place + 1 :]))
        if re.fullmatch("--image[-_]size", arg) and len(sizes) == 1:
            return [*given[: place + 1], *sizes, *given[place + 1 :]]
    return given


def _one_line(box: str) -> str:
    """What tyro's box says: its frame and title go, as does the usage below."""
    text = " ".join(re.sub(r"[\u2500-\u257f]+|-{3,}", " ", box).split())
    text = re.sub(r"^(Parsing error|Value error|Missing argument|Unrecognized options) ", "", text)
    text = re.sub(r"^Error parsing (\w+: )?", "", text)
    return re.split(r" For full helptext| Argument helptext", text)[0]


def _check_choices(args: Sequence[str], choices: dict[str, list[str]]) -> None:
    """Refuse a value that is none of its field's, with the nearest one: tyro's releases word this differently."""
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in choices:
            continue
        if not equals:
            value = args[place + 1] if place + 1 < len(args) else "--"
        if value in choices[name] or value.startswith("--"):  # an option without a value is for tyro to refuse
            continue
        near = get_close_matches(value, choices[name], n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices[name])}"
        raise UserError(f"{option} cannot be {value!r}: {hint}")


def _unknown(option: str, known: Sequence[str]) -> str:
    near = get_close_matches(option, known, n=1)
    return f"unknown option {option}" + (f": did you mean {near[0]}?" if near else ": --help lists the options")
