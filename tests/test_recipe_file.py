"""A recipe file as the first argument of `train`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vitrail.cli import main
from vitrail.recipe_file import as_words
from vitrail.recipes import RECIPES
from vitrail.train.folder import RunFolder
from vitrail.train.run import Run, with_fields

SMALL = ["--width", "16", "--depth", "1", "--heads", "1", "--stem", "4", "--device", "cpu", "--workers", "0"]


def test_a_runs_recipe_trains_it_anew_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    how = ["--max-steps", "12", "--lr", "0.002", "--crop", "none", "--seed", "3", "--no-qk-norm", "--fast-dev-run"]
    assert main(["train", "digits", *SMALL, *how, "--out", str(first)]) == 0
    assert main(["train", str(first / "recipe.json"), "--out", str(again), "--device", "cpu", "--mixup", "0.5"]) == 0
    before, after = (json.loads((place / "recipe.json").read_text()) for place in (first, again))
    assert after.pop("augment") == {**before.pop("augment"), "mixup": 0.5}
    assert after == before
    same = tmp_path / "same"
    assert main(["train", "--out", str(same), str(first / "recipe.json"), "--device", "cpu"]) == 0
    rows = [[row for row in RunFolder(place).rows() if row["kind"] == "val"] for place in (first, same)]
    assert [row["cross_entropy"] for row in rows[0]] == [row["cross_entropy"] for row in rows[1]]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_the_way_through_its_file(name: str, tmp_path: Path) -> None:
    from vitrail.options import parse_fields

    run = RECIPES[name](5_000)
    changed = with_fields(run, {"batch_size": 6, "lr": 0.123})
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(changed.as_dict()))
    found, *words = as_words(str(file), [str(file)])
    assert found == name
    fields = [word for word in words if not word.startswith(("--data=", "--init="))]
    again = with_fields(run, parse_fields(run, fields))
    assert replace(again, model=changed.model) == changed
    assert again == changed or run.init is not None  # whose weights fix the model
    assert Run.from_dict(json.loads(file.read_text())) == changed


@pytest.mark.parametrize(
    "values, message",
    [
        ({"recipe": "digits", "epochs": "ten"}, "--epochs must be a number, got 'ten'"),
        ({"recipe": "digits", "epoch": 3}, "unknown option --epoch: did you mean --epochs"),
        ({"recipe": "digits", "optim": {"lr": None}}, "--lr must be a number, got 'None'"),
        ({"recipe": "digits", "optim": []}, "optim is not a section"),
        ({"recipe": "digits", "task": {"kind": "caption"}}, "trains the task classify, not caption"),
        ({"recipe": "digit"}, "no recipe 'digit': did you mean digits"),
        ({"epochs": 3}, "names no recipe"),
        ([1], "names no recipe"),
        ("", "is not JSON"),
        ('{"recipe": "digits", "optim": {"lr": 1, "lr": 2}}', "recipe.json names lr twice: remove one of the two"),
        (None, "No such file"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    values: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.json"
    if values is not None:
        file.write_text(values if isinstance(values, str) else json.dumps(values))
    assert main(["train", str(file), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_file_may_hold_some_values(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"recipe": "digits", "epochs": 3, "optim": {"lr": 0.1}}))
    assert as_words(str(file), ["--seed", "1", str(file)]) == ["digits", "--epochs", "3", "--lr", "0.1", "--seed", "1"]
