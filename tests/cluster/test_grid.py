"""Grids: every value is checked first, finished runs are passed over, and a failed run leaves the others alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vitrail.cli import main
from vitrail.cluster.grid import Grid, read_grid, run_grid
from vitrail.errors import RunError, Stopped, UserError
from vitrail.train.job import JOB

TINY = ["--width", "16", "--depth", "1", "--heads", "2"]
GRID = ["digits", *TINY, "--grid", "lr=1e-3,3e-3", "seed=0,1,2"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_run(words: Sequence[str], score: float = 0.5) -> Path:
    """The folder of a run that has ended, as far as a grid and a comparison read it."""
    folder = Path(words[words.index("--out") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: float(words[words.index(f"--{name}") + 1]) for name in ("lr", "seed")}
    recipe = {"recipe": words[1], "seed": int(values["seed"]), "optim": {"lr": values["lr"]}}
    common = {"step": 3, "seconds": 1.0}
    rows: list[dict[str, Any]] = [{"kind": "start", "score": {"name": "top1", "best": "max", "unit": "%", "label": ""}}]
    rows += [{"kind": "val", **common, "top1": score}, {"kind": "test", **common, "top1": score - 0.1}]
    rows += [{"kind": "done", **common}]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.json").write_text(json.dumps({"top1": score}))
    (folder / "report.html").write_text("")
    return folder


class Runs:
    """Stands in for the processes of the runs: each writes its folder, or ends with the code that `codes` names."""

    def __init__(self, codes: dict[int, int] | None = None) -> None:
        self.codes, self.started = codes or {}, list[list[str]]()
        self.jobs: set[str | None] = set()

    def __call__(self, words: Sequence[str]) -> int:
        number = len(self.started)
        self.jobs.add(os.environ.get(JOB))
        self.started.append(list(words))
        if code := self.codes.get(number):
            return code
        write_run(words, 0.5 + 0.01 * number)
        return 0


def test_every_combination_gets_a_folder_that_says_what_it_is() -> None:
    grid = read_grid([*GRID, "--out", "out", "--device", "cpu"])
    names = [one.name for one in grid.combinations]
    assert names[:4] == ["lr=0.001,seed=0", "lr=0.001,seed=1", "lr=0.001,seed=2", "lr=0.003,seed=0"] and len(names) == 6
    words = grid.command(grid.combinations[3])
    assert words == [
        *("train", "digits", *TINY, "--device=cpu", "--lr", "3e-3", "--seed", "0"),
        *("--out", "out/lr=0.003,seed=0"),
    ]


def test_the_processes_of_a_run_are_those_of_the_grid() -> None:
    grid = read_grid([*GRID, "--out", "out", "--nproc", "2", "--shard"])
    assert grid.command(grid.combinations[0])[-8:-6] == ["--nproc=2", "--shard"]


def test_a_job_is_one_command_but_for_what_a_resumed_run_may_change() -> None:
    job = read_grid([*GRID, "--out", "out"]).job
    for same in (["--workers", "3"], ["--epochs", "9"], ["--device", "cpu"], ["--nproc", "2"]):
        assert read_grid([*GRID, "--out", "other", *same]).job == job, "its folder tells runs apart"
    for other in (["--batch-size", "32"], ["--data", "digits"], ["--init", "classify"]):
        assert read_grid([*GRID, "--out", "out", *other]).job != job


def test_sets_of_the_hub() -> None:
    grid = read_grid(["folder", "--data", "hf://datasets/a/b", "--grid", "seed=0", "--out", "out"])
    assert grid.command(grid.combinations[0])[:4] == ["train", "folder", "--data", "hf://datasets/a/b"]
    with pytest.raises(UserError, match="https://x is a URL"):
        read_grid(["folder", "--data", "https://x", "--grid", "seed=0"])


def test_equal_values_written_otherwise_are_the_same_run() -> None:
    names = [
        [one.name for one in read_grid(["digits", "--grid", f"lr={text}"]).combinations] for text in ("1e-3", "0.001")
    ]
    assert names[0] == names[1] == ["lr=0.001"]


def test_switches_and_sizes() -> None:
    grid = read_grid(["digits", "--grid", "compile=true,false", "image_size=8,16"])
    assert [(one.name, one.words) for one in grid.combinations][::3] == [
        ("compile=True,image_size=8x8", ["--compile", "--image-size", "8"]),
        ("compile=False,image_size=16x16", ["--no-compile", "--image-size", "16"]),
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (["learning=1"], "unknown option --learning"),
        (["lr=abc,1e-3"], "--grid lr=abc,1e-3: --lr must be a number, got 'abc'"),
        (["seed=0.5"], "--seed must be a whole number, got '0.5'"),
        (["seed=0,"], "--seed needs a value"),
        (["seed="], "--seed needs a value"),
        (["seed"], "write FIELD=VALUE,VALUE"),
        (["lr=1e-3,0.001"], "the value 0.001 is there twice"),
        (["seed=0", "seed=1"], "--grid names seed twice"),
        (["seed=0", "--seed", "1"], "--seed sets the same field for all runs"),
        (["compile=yes"], "compile must be true or false, got 'yes'"),
        (["data=a,b"], "data is the same for all runs of a grid"),
        (["batch_size=64,0"], "--grid batch_size=0: batch_size must be at least 1, got 0"),
        (["seed=0", "--resume", "x"], "leave --resume out"),
        (["seed=0", "--epochs", "two"], "--epochs must be a number, got 'two'"),
        (
            ["seed=0,1", "digits", "--epochs", "2"],
            "--grid digits: write FIELD=VALUE,VALUE, such as lr=1e-3,3e-3, and name",
        ),
        (["seed=0", "--grid-index", "1"], "--grid-index 1: the grid has 1 runs, 0 to 0"),
    ],
)
def test_wrong_values_are_refused_before_anything_starts(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "digits", "--grid", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not any(Path().iterdir())


def test_a_grid_trains_what_is_missing_and_ends_with_a_comparison(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = [*GRID, "--out", "out"]
    first = Runs({1: -signal.SIGKILL, 4: 2})
    with pytest.raises(RunError, match="2 of 6 runs failed: lr=0.001,seed=1 lr=0.003,seed=1; the same command"):
        run_grid(words, None, False, first)
    assert len(first.started) == 6, "the others run"
    assert "lr=0.001,seed=1: failed, killed by SIGKILL, probably because memory ran out" in caplog.text
    assert "lr=0.003,seed=1: failed, exit code 2" in caplog.text
    assert "lr=0.001  0,2 " in (said := capsys.readouterr().out) and "lr=0.001,seed=1" not in said
    second = Runs({1: 1})
    with pytest.raises(RunError, match="1 of 6"):
        run_grid(words, None, False, second)
    assert [one[-1] for one in second.started] == ["out/lr=0.001,seed=1", "out/lr=0.003,seed=1"]
    assert first.jobs == second.jobs == {read_grid(words).job}, "so a run that was killed in the middle resumes"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:2] == ["lr=0.001", "0,1,2"]
    assert lines[-2].endswith("50.67 % (50.00 % to 52.00 %)  40.67 % (40.00 % to 42.00 %)")


def test_json_has_one_line_per_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_grid([*GRID, "--out", "out"], None, True, Runs()) == 0
    low, high = map(json.loads, capsys.readouterr().out.splitlines())
    assert low["setting"] == {"lr": "0.001"} and high["setting"] == {"lr": "0.003"} and low["seeds"] == [0, 1, 2]
    assert low["best_val"]["mean"] == pytest.approx(0.51) and low["best_val"]["std"] == pytest.approx(0.01)
    assert (high["test"]["min"], high["test"]["max"]) == (pytest.approx(0.43), pytest.approx(0.45))


@pytest.mark.parametrize("code, ends", [(75, 75), (130, 130), (-signal.SIGUSR1, 75), (-signal.SIGINT, 130)])
def test_a_stopped_run_stops_the_grid(code: int, ends: int) -> None:
    runs = Runs({2: code})
    with pytest.raises(Stopped, match="stopped in lr=0.001,seed=2: the same command continues the grid") as stopped:
        run_grid([*GRID, "--out", "out"], None, False, runs)
    assert stopped.value.exit_code == ends and len(runs.started) == 3


def test_a_folder_holds_one_grid() -> None:
    assert run_grid([*GRID, "--out", "out"], None, True, Runs()) == 0
    with pytest.raises(UserError, match=r"out holds a grid with width 16, and this one has 32: choose another --out"):
        run_grid(["digits", "--width", "32", *TINY[2:], *GRID[-3:], "--out", "out"], None, True, Runs())
    with pytest.raises(UserError, match="with epochs the recipe's own, and this one has 2.0"):
        run_grid([*GRID[:-3], "--epochs", "2", *GRID[-3:], "--out", "out"], None, True, Runs())
    more = Runs()
    fewer = [*GRID[:-3], "--workers", "0", "--max-bad", "0.1"]  # what a run that failed asks for
    assert run_grid([*fewer, *GRID[-3:-1], "seed=0,1,2,3", "--out", "out"], None, True, more) == 0
    assert [one[-1] for one in more.started] == ["out/lr=0.001,seed=3", "out/lr=0.003,seed=3"], "further values join it"


def test_one_run_of_a_grid() -> None:
    words = [*GRID, "--out", "out"]
    runs = Runs({1: 3})
    assert run_grid(words, 4, False, runs) == 0
    assert run_grid(words, 4, False, runs) == 3, "the run's own exit code"
    assert [one[-1] for one in runs.started] == 2 * ["out/lr=0.003,seed=1"] and len(runs.jobs) == 1


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--grid", "seed=0", "--help-all"]) == 0
    assert "--grid FIELD=VALUE,VALUE" in capsys.readouterr().out


@pytest.mark.slow
def test_real_runs_in_processes_of_their_own(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["train", "digits", *TINY, "--device", "cpu", "--fast-dev-run", "--grid", "seed=0"]
    assert main([*words, "--out", "none", "--init", "missing"]) == 1
    assert "run 1 of 1, seed=0: failed, exit code 2" in caplog.text and "missing" in capfd.readouterr().err
    assert main([*words, "--out", "real", "--json"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["seeds"] for row in rows] == [[0]] and Path("real/seed=0/report.html").is_file()


def test_a_grid_is_a_grid_of_one_without_values() -> None:
    grid: Grid = read_grid(["digits", "--out", "runs/x"])
    [only] = grid.combinations
    assert grid.folder(only).path == Path("runs/x") and grid.command(only)[-2:] == ["--out", "runs/x"]
