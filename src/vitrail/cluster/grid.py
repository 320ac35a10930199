"""`vitrail train RECIPE --grid lr=1e-3,3e-3 seed=0,1,2`: one run per combination of values, in subfolders.

Each run is a process of its own, so that a run which the system kills, or which breaks the GPU, leaves the others
alone. Finished runs are passed over, and an unfinished one resumes since it is of the same job (`train/job.py`): so the
same command continues a stopped grid.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail import recipes
from vitrail.errors import Preempted, RunError, Stopped, UserError
from vitrail.files import write_atomic
from vitrail.options import NO_FIELDS, Parser, known_fields, parse_fields
from vitrail.plain import flat_fields
from vitrail.process import PREEMPTING, environment, handled
from vitrail.recipe_file import as_words
from vitrail.report.compare import as_text, by_setting, compare
from vitrail.train.folder import RunFolder
from vitrail.train.job import JOB
from vitrail.train.run import FREE, MEANS, replaced, with_fields

log = logging.getLogger("vitrail")

SHARED = "grid.json"
"""what every run of a grid has in common: a folder holds one grid"""
STOPS = {
    Preempted.exit_code: Preempted.exit_code,
    Stopped.exit_code: Stopped.exit_code,
    -signal.SIGINT: Stopped.exit_code,
    -signal.SIGTERM: Preempted.exit_code,
    -signal.SIGUSR1: Preempted.exit_code,
}
"""exit codes of a run that was stopped from outside, even before it could save, and those of the grid after it"""
Start = Callable[[Sequence[str]], int]
"""runs `vitrail` with these words and returns the exit code"""


@dataclass(frozen=True)
class Combination:
    """One run of a grid."""

    name: str
    """of its folder, such as `lr=0.001,seed=0`"""
    words: list[str]
    """the flags that set its values"""
    values: dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """The runs of a grid, and the words of the command that they share."""

    words: list[str]
    """the recipe and its options, without those of the grid"""
    out: Path
    combinations: list[Combination]
    common: dict[str, Any]
    """what the runs have in common, as plain data"""

    def folder(self, combination: Combination) -> RunFolder:
        return RunFolder(self.out / combination.name)

    @property
    def job(self) -> str:
        """The name of the job of this command: the same for all commands that continue its runs."""
        settled = {name: value for name, value in self.common.items() if name not in FREE}
        return hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()[:16]

    def command(self, combination: Combination) -> list[str]:
        """The words that start a run, and resume it in a process of the same job."""
        return ["train", *self.words, *combination.words, "--out", str(self.folder(combination).path)]

    def begin(self) -> None:
        """Record what the runs share. Raises UserError if the folder holds runs with other settings.

        What no result depends on may change, such as the number of workers after some of them died.
        """
        place = self.out / SHARED
        if not place.exists():
            write_atomic(place, json.dumps(self.common, indent=2) + "\n")
            return
        try:
            before = json.loads(place.read_text())
        except ValueError:
            raise UserError(f"{place} is damaged: choose another --out") from None
        now = json.loads(json.dumps(self.common))
        for name in {**before, **now}:
            if before.get(name) != now.get(name) and name not in MEANS:
                had, has = (_shown(values.get(name)) for values in (before, now))
                raise UserError(
                    f"{self.out} holds a grid with {name} {had}, and this one has {has}: choose another --out"
                )


def _shown(value: Any) -> str:
    return "the recipe's own" if value is None else str(value)


def read_grid(args: Sequence[str]) -> Grid:
    """The grid of a `train` command, with every value checked. UserError for the first that is wrong.

    A command without --grid is one run, whose folder is the grid's own.
    """
    own = Parser("train", read_grid, urls=True)  # the next one refuses those that are no data
    own.add_argument("--grid", nargs="+", default=[])
    own.add_argument("--grid-index")
    own.add_argument("--out", type=Path)
    own.add_argument("--json", action="store_true")
    own.add_argument("--nproc")
    own.add_argument("--shard", action="store_true")
    own.add_argument("--resume")
    options, words = own.parse_known_args(args)
    kept = [f"--{name}={value}" for name in ("device", "nproc") if (value := getattr(options, name)) is not None]
    kept += ["--shard"] * options.shard
    named = Parser("train", read_grid)
    named.add_argument("recipe", nargs="?")
    for name in ("data", "init", "group"):
        named.add_argument(f"--{name}")
    given, fields = named.parse_known_args(words)
    if options.resume is not None:
        raise UserError("a grid or a job resumes by the command that began it: leave --resume out and name the recipe")
    if given.recipe is None:
        raise UserError("name a recipe before its options (vitrail train lists them)")
    if given.recipe.endswith(".json"):
        return read_grid(as_words(given.recipe, args))
    if (lone := next((text for text in options.grid if "=" not in text), None)) is not None:
        raise _no_axis(lone)
    recipe = recipes.find(given.recipe)
    recipes.check_given(recipe, given.data, given.init)
    also = () if given.init is None else recipes.FREE
    fixed = parse_fields(recipe(10_000), fields, also)
    axes = [_axis(recipe, text, fixed, also) for text in options.grid]
    if (twice := _repeated([axis[0][0] for axis in axes])) is not None:
        raise UserError(f"--grid names {twice} twice: write all its values after one {twice}=")
    combinations = [_joined(chosen) for chosen in itertools.product(*axes)]
    for combination in combinations:
        try:
            _check(recipe, {**fixed, **combination.values}, given.init is not None)
        except UserError as error:
            raise UserError(f"--grid {combination.name}: {error}" if axes else str(error)) from None
    data = given.data if given.data is None or not Path(given.data).exists() else str(Path(given.data).resolve())
    common = {"recipe": given.recipe, "data": data, "init": given.init, "group": given.group, **fixed}
    out = options.out or Path("runs") / f"{given.recipe}-grid"
    return Grid([*words, *kept], out, combinations, {k: v for k, v in common.items() if v is not None})


def flags_in(words: Sequence[str]) -> set[str]:
    """The flags among the words of a command, also those that are joined with their value (`--nproc=2`)."""
    return {word.partition("=")[0] for word in words if word.startswith("--")}


Axis = list[tuple[str, str, list[str], Any]]
"""the values of a field: its name, the value as text, the words that set it, and the value"""


def _axis(recipe: recipes.Recipe, text: str, fixed: Mapping[str, Any], also: Sequence[str]) -> Axis:
    """The values of one argument of --grid, such as `lr=1e-3,3e-3`."""
    name, equals, values = text.partition("=")
    name = name.lstrip("-").replace("-", "_")
    if not equals or not name:
        raise _no_axis(text)
    flag = f"--{name.replace('_', '-')}"
    if name in NO_FIELDS:
        raise UserError(f"--grid {text}: {name} is the same for all runs of a grid: use one grid per {name}")
    if name in fixed:
        raise UserError(f"--grid {text}: {flag} sets the same field for all runs: leave one of them out")
    known = known_fields(recipe(10_000), also)
    axis: Axis = []
    for value in values.split(","):
        switch = {"true": flag, "false": flag.replace("--", "--no-", 1)}.get(value.lower())
        is_switch = name in known and known[name].kind is bool
        if is_switch and switch is None:
            raise UserError(f"--grid {text}: {name} must be true or false, got {value!r}")
        words = [switch] if is_switch and switch is not None else [flag, *([value] if value else [])]
        try:
            [parsed] = parse_fields(recipe(10_000), words, also).values()
        except UserError as error:
            raise UserError(f"--grid {text}: {error}") from None
        axis.append((name, _as_text(parsed), words, parsed))
    if (twice := _repeated([text for _, text, _, _ in axis])) is not None:
        raise UserError(f"--grid {text}: the value {twice} is there twice")
    return axis


def _no_axis(text: str) -> UserError:
    return UserError(f"--grid {text}: write FIELD=VALUE,VALUE, such as lr=1e-3,3e-3, and name the recipe before --grid")


def _as_text(value: Any) -> str:
    """A value in the name of a folder: equal values give equal names, however they were written."""
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"[^\w.+-]", "-", text)


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _joined(chosen: Sequence[tuple[str, str, list[str], Any]]) -> Combination:
    name = ",".join(f"{field}={text}" for field, text, _, _ in chosen)
    return Combination(
        name, [word for _, _, words, _ in chosen for word in words], {field: value for field, _, _, value in chosen}
    )


def _check(recipe: recipes.Recipe, changes: Mapping[str, Any], starts_from_weights: bool) -> None:
    """Raise UserError for values that do not fit together, as far as that shows without the data and the weights."""
    run = recipe(10_000)
    if starts_from_weights:  # whose model is not the recipe's
        model = flat_fields(run.model)
        replaced(run, {name: value for name, value in changes.items() if name not in model})
    elif changes.get("method", run.tune.method) != "auto":
        with_fields(run, changes)


# ---- runs


def run_grid(args: Sequence[str], index: int | None, as_json: bool, start: Start | None = None) -> int:
    """Run a grid, or only its run number `index`; returns the exit code. `start` runs a `vitrail` command."""
    grid = read_grid(args)
    count = len(grid.combinations)
    if index is not None and not 0 <= index < count:
        raise UserError(f"--grid-index {index}: the grid has {count} runs, 0 to {count - 1}")
    grid.begin()
    with environment(JOB, grid.job):
        if index is not None:  # for the job array of a scheduler
            return (start or _in_this_process)(grid.command(grid.combinations[index]))
        failed = list(_failing(grid, start or (lambda words: run_command(words, quiet=as_json))))
    _summarise(grid, as_json)
    if failed:
        raise RunError(f"{len(failed)} of {count} runs failed: {' '.join(failed)}; the same command tries them again")
    return 0


def _failing(grid: Grid, start: Start) -> Iterator[str]:
    """Run every combination that is not finished; the names of those that fail."""
    count = len(grid.combinations)
    for number, combination in enumerate(grid.combinations, 1):
        run = f"run {number} of {count}, {combination.name}"
        if grid.folder(combination).scores is not None:
            log.warning(f"{run}: finished already")
            continue
        log.warning(f"{run}: starts")
        code = start(grid.command(combination))
        if code in STOPS:
            stopped = Stopped(f"stopped in {combination.name}: the same command continues the grid")
            stopped.exit_code = STOPS[code]
            raise stopped
        if code:
            yield combination.name
            log.warning(f"{run}: failed, {_reason(code)}")


def _in_this_process(words: Sequence[str]) -> int:
    from vitrail.commands.train import train

    return train(words[1:])


def _reason(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + ", probably because memory ran out" * (-code == signal.SIGKILL)
    return f"exit code {code}"


def _summarise(grid: Grid, as_json: bool) -> None:
    """Print the finished runs, and the mean and spread over seeds of each setting."""
    done = [folder.path for one in grid.combinations if (folder := grid.folder(one)).scores is not None]
    if not done:
        return
    if as_json:
        print("\n".join(map(json.dumps, by_setting(done))))
    else:
        print(as_text(done, compare(done)))


def run_command(words: Sequence[str], quiet: bool = False) -> int:
    """Run `vitrail` in another process, to which signals are passed on; returns its exit code."""
    command = [sys.executable, "-m", "vitrail", *words]
    try:  # descriptor 2 is the null device here (see standard_error.py); sys.stderr has the original
        voice: int | None = sys.stderr.fileno()
    except (OSError, ValueError):  # no file, as in a notebook
        voice = None
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL if quiet else None, stderr=voice)

    def pass_on(number: int) -> None:
        if number != signal.SIGINT:  # a terminal sends Ctrl-C to both
            process.send_signal(number)

    with handled(pass_on, signal.SIGINT, *PREEMPTING):
        return process.wait()
