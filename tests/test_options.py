"""Options of tasks: told apart from a command's own before the model is known, then read as its task has them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

import pytest

import vitrail
from vitrail.cli import main
from vitrail.errors import UserError
from vitrail.options import _values, parse_options, split_options, task_flags
from vitrail.plain import flat_fields
from vitrail.tasks import TASKS, task_class
from vitrail.tasks.task import Task


@pytest.fixture
def task() -> Task:
    made: Task = vitrail.create("nano/2", classes=["a", "b", "c"], image_size=8)
    return made


@pytest.mark.parametrize(
    "args, own, others",
    [
        (["a.png", "--top", "3"], ["--top", "3"], ["a.png"]),
        (["--top", "3", "a.png", "b.png"], ["--top", "3"], ["a.png", "b.png"]),
        (["--top=3", "a.png"], ["--top=3"], ["a.png"]),
        (["--sample", "a.png", "--no-sample"], ["--sample", "--no-sample"], ["a.png"]),
        (["--max_length", "9", "--json"], ["--max_length", "9"], ["--json"]),
        (["--match", "-1", "a.png"], ["--match", "-1"], ["a.png"]),
        (["a.png", "--top"], ["--top"], ["a.png"]),
        (["--", "--top", "3"], [], ["--", "--top", "3"]),
        (["--boxes", "1", "2", "--json", "a.png"], ["--boxes", "1", "2"], ["--json", "a.png"]),
    ],
)
def test_the_flags_of_tasks_are_told_apart(args: list[str], own: list[str], others: list[str]) -> None:
    assert split_options(args, {**task_flags(), "--boxes": None}) == (own, others)


def test_every_tasks_options_can_be_flags() -> None:
    """They have defaults, a flag takes as many values in every task, and none is a command's own."""
    from vitrail.options import _flag

    taken: dict[str, Any] = {}
    for name in TASKS:
        for field, entry in flat_fields(task_class(name).options()).items():
            assert taken.setdefault(field, entry.kind) == entry.kind, field
    own = "model revision verify json out device data split probe human shuffle_images fast_dev_run images source help"
    assert not taken.keys() & set(own.split())
    assert {_flag(field) for field in taken} <= task_flags().keys()


def test_what_is_given_is_what_changes(task: Task) -> None:
    assert parse_options(task, []) == {} and parse_options(task, ["--top", "2"]) == {"top": 2}
    task.choose({"top": 2})
    assert parse_options(task, ["--top=1"]) == {"top": 1}


@pytest.mark.parametrize(
    "args, words",
    [
        (["--top", "two"], "two"),
        (["--top"], "--top"),
        (["--beam", "3"], "--beam is an option of the task caption, and this model's task is classify"),
        (["--no-sample"], "--no-sample is an option of the task caption"),
    ],
)
def test_one_line_for_what_is_wrong(task: Task, args: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_options(task, args)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@dataclass(frozen=True)
class Many:
    """Options of other types than today's tasks have."""

    threshold: float = 0.5
    tiles: tuple[int, int] | None = None
    how: str = "fast"
    flip: bool = True


@pytest.mark.parametrize(
    "kind, values",
    [
        (bool, 0),
        (int | None, 1),
        (tuple[int, int], 2),
        (tuple[int, int] | None, 2),
        (tuple[float, ...] | None, None),
        (Literal["a"], 1),
    ],
)
def test_how_many_values_a_flag_takes(kind: Any, values: int | None) -> None:
    assert _values(kind) == values


def test_options_of_any_plain_type(task: Task) -> None:
    task.option = Many()
    task.options = Many  # type: ignore[misc]
    assert parse_options(task, ["--threshold", "0.25", "--no-flip"]) == {"threshold": 0.25, "flip": False}
    assert parse_options(task, ["--tiles", "2", "3"]) == {"tiles": (2, 3)}
    task.choose({"how": "slow"})
    assert task.option == Many(how="slow")


@pytest.mark.parametrize(
    "command, words",
    [
        (["predict", "x.png", "--tops", "3"], "unknown option --tops: did you mean --top?"),
        (["predict", "--tops", "3", "x.png"], "unknown option --tops: did you mean --top?"),
        (["predict", "x.png", "--top", "0"], "vitrail: --top must be at least 1, got 0"),
        (["predict", "--beam", "2", "x.png"], "this model's task is classify: leave it out"),
        (["eval", "classify", "--data", "digits", "--beam", "2"], "this model's task is classify: leave it out"),
        (["eval", "--top", "2", "caption", "--data", "x"], "this model's task is caption: leave it out"),
        (["eval", "caption", "--data", "x", "--human", "--beam", "2"], "--beam applies to a model's predictions"),
    ],
)
def test_commands_refuse_in_one_line(command: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err


@pytest.mark.parametrize(
    "command, there, not_there",
    [
        (["predict", "--help"], "--top", "--beam"),
        (["predict", "-h", "--model", "caption"], "--beam", "--top "),
        (["eval", "caption", "--help"], "--beam", "--top "),
        (["eval", "--help"], "`vitrail eval SOURCE --help` also shows", "--beam"),
    ],
)
def test_help_lists_the_options_of_the_named_models_task(
    command: list[str], there: str, not_there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    said = capsys.readouterr().out
    assert there in said and not_there not in said and "--device" in said


def test_help_is_argparse_s_own_namespace() -> None:
    """Nothing is required in a call for help, and everything again in the next call."""
    from vitrail.options import Parser

    parser = Parser("predict", main)
    parser.add_argument("images", nargs="+")
    assert parser.parse_help(["x"]) is None
    assert isinstance(parser.parse_help(["--help"]), argparse.Namespace)


def test_no_two_tasks_mean_different_things_by_one_flag_and_none_takes_a_commands_own() -> None:
    """Flags of tasks are told from the other arguments by name, before the model is known."""
    own = {
        "device",
        "model",
        "revision",
        "verify",
        "out",
        "json",
        "data",
        "split",
        "probe",
        "human",
        "source",
        "images",
    }
    kinds: dict[str, Any] = {}
    for name in TASKS:
        for option, entry in flat_fields(task_class(name).options()).items():
            assert option not in own, f"--{option} of the task {name} is an option of the commands"
            assert kinds.setdefault(option, entry.kind) == entry.kind, f"--{option} has two types"
