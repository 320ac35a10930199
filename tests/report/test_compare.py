"""Several runs in one table and one plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitrail.errors import UserError
from vitrail.report.compare import as_table, as_text, by_setting, compare

TOP1 = {"name": "top1", "best": "max", "unit": "%", "label": "accuracy"}


def write_run(folder: Path, scores: list[float], test: float | None = None, **recipe: Any) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"kind": "start", "score": TOP1}]
    for place, score in enumerate(scores):
        common = {"step": 10 * (place + 1), "seconds": 100.0 * (place + 1)}
        rows.append({"kind": "train", **common, "loss": 1.0, "images_per_s": 1000.0 + place, "wait": 0.0})
        rows.append({"kind": "val", **common, "top1": score})
    if test is not None:
        rows.append({"kind": "test", "top1": test})
        rows.append({"kind": "done", "step": 10 * len(scores), "seconds": 350.0, "parameters": 2_000_000})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.json").write_text(json.dumps({"recipe": "digits", "seed": 0, **recipe}))
    return folder


def test_rows_in_the_order_given(tmp_path: Path) -> None:
    done = write_run(tmp_path / "b", [0.2, 0.8, 0.7], test=0.75, seed=3)
    going = write_run(tmp_path / "a", [0.4])
    rows = compare([done, going])
    assert rows[0] == {
        "name": "b",
        "recipe": "digits",
        "seed": 3,
        "parameters": 2_000_000,
        "steps": 30,
        "seconds": 350.0,
        "images_per_s": 1001.0,
        "score": "top1",
        "unit": "%",
        "best_val": 0.8,
        "best_val_step": 20,
        "test": 0.75,
    }
    assert rows[1]["name"] == "a"
    assert rows[1]["test"] is None and rows[1]["unfinished"]
    assert (rows[1]["steps"], rows[1]["seconds"]) == (10, 100.0)
    lines = as_table(rows).splitlines()
    assert lines[0].split() == [
        "run",
        "recipe",
        "seed",
        "parameters",
        "steps",
        "time",
        "images/s",
        "score",
        "best",
        "val",
        "test",
    ]
    assert "75.00 %" in lines[1]
    assert "5 min 50 s" in lines[1]
    assert lines[2].startswith("a (not finished) ") and lines[2].endswith("-")
    assert len({len(line) for line in lines}) == 1


def test_columns_that_nobody_fills_are_left_out(tmp_path: Path) -> None:
    text = as_table(compare([write_run(tmp_path / "a", [0.4])]))
    assert "test" not in text
    assert "parameters" not in text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / seed / "run", [0.5]) for seed in ("0", "1")]
    assert [row["name"] for row in compare(folders)] == ["0/run", "1/run"]
    assert [row["name"] for row in compare([folders[0], folders[0]])] == ["run", "run"]


@pytest.mark.parametrize("count", [1, 12])
def test_the_plot(tmp_path: Path, count: int) -> None:
    names = [f"_{i} $x^ 猫" for i in range(count)]
    folders = [write_run(tmp_path / name, [0.1 * i for i in range(5)]) for name in names]
    folders.append(write_run(tmp_path / "empty", []))
    out = tmp_path / "plots" / "plot.png"
    compare(folders, out)
    with Image.open(out) as plot:
        assert plot.format == "PNG"
        assert plot.width > 1000
        assert len(plot.convert("RGB").getcolors(1 << 24)) > 20  # type: ignore[arg-type]


def test_no_run_folder_draws_nothing(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", [0.5])
    for bad in (tmp_path / "missing", tmp_path, good / "metrics.jsonl"):
        with pytest.raises(UserError, match=str(bad.name)):
            compare([good, bad], tmp_path / "plot.png")
    with pytest.raises(UserError, match="nothing to compare"):
        compare([])
    assert not (tmp_path / "plot.png").exists()


def captions(folder: Path, scores: list[float]) -> Path:
    """A captioner's run."""
    write_run(folder, [])
    rows: list[dict[str, Any]] = [{"kind": "start", "score": {"name": "cider", "best": "max", "unit": "", "label": ""}}]
    rows += [{"kind": "val", "step": 10 * i, "seconds": 5.0 * i, "cider": s} for i, s in enumerate(scores, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_captioners_and_both_kinds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = captions(tmp_path / "one", [0.1, 0.32]), captions(tmp_path / "two", [0.4125])
    rows = compare([one, two], tmp_path / "captions.png")
    assert [(row["score"], row["best_val"]) for row in rows] == [("cider", 0.32), ("cider", 0.4125)]
    assert "0.412" in as_table(rows) and "%" not in as_table(rows) and not caplog.records
    mixed = compare([one, write_run(tmp_path / "three", [0.5])], tmp_path / "mixed.png")
    assert "32.00 %" not in as_table(mixed) and "50.00 %" in as_table(mixed)
    assert "different scores (cider and top1), which cannot be compared" in caplog.text
    with Image.open(tmp_path / "captions.png") as plot, Image.open(tmp_path / "mixed.png") as taller:
        assert taller.height > 1.5 * plot.height


def test_runs_that_differ_in_their_seed_alone_are_one_setting(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{lr}-{seed}", [0.2, score], test=score / 2, seed=seed, optim={"lr": lr, "clip": 1.0})
        for lr, seed, score in ((0.1, 0, 0.5), (0.1, 1, 0.7), (0.2, 0, 0.6))
    ]
    low, high = by_setting([runs[0], runs[2], runs[1]])
    assert low["setting"] == {"lr": "0.1"} and low["seeds"] == [0, 1] and low["runs"] == [str(runs[0]), str(runs[1])]
    assert low["best_val"] == {"mean": 0.6, "min": 0.5, "max": 0.7, "std": pytest.approx(0.02**0.5)}
    assert low["test"]["mean"] == pytest.approx(0.3)
    assert high["best_val"]["std"] is None, "one run has no spread"
    lines = as_text(runs, compare(runs)).splitlines()
    assert lines[-2] == "lr=0.1   0,1    60.00 % (50.00 % to 70.00 %)  30.00 % (25.00 % to 35.00 %)"
    assert lines[-1].endswith("60.00 %                       30.00 %")
    assert "setting" not in as_text(runs[1:], compare(runs[1:])), "no setting has two seeds"


def test_a_run_of_a_recipe_file_has_the_setting_of_its_recipe(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(seed), [0.5], seed=seed, epochs=epochs, augment={"scale": scale})
        for seed, epochs, scale in ((0, 60, [0.5, 1]), (1, 60.0, [0.5, 1.0]), (2, 60.5, [0.5, 1]))
    ]
    same, other = by_setting(runs)
    assert same["seeds"] == [0, 1] and same["setting"] == {"epochs": "60"}
    assert other["setting"] == {"epochs": "60.5"}


def test_settings_that_differ_in_many_fields_fit_a_terminal(tmp_path: Path) -> None:
    runs = []
    for name, lr, seed in (("a", 0.1, 0), ("a", 0.1, 1), ("a", 0.2, 0), ("b", 0.1, 0)):
        fields = {f"field_{i}": f"{name}{i}" for i in range(30)}
        own = {**fields, "init": f"/a/long/path/to/some/weights/of/{name}", "optim": {"lr": lr}}
        runs.append(write_run(tmp_path / f"{name}-{lr}-{seed}", [0.5], test=0.4, seed=seed, **own))
    lines = as_text(runs, compare(runs)).partition("\n\n")[2].splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:4] == [
        "setting",
        "  seeds  best val                      test",
        "field_0=a0, lr=0.1, 30 more differ",
        "  0,1    50.00 % (50.00 % to 50.00 %)  40.00 % (40.00 % to 40.00 %)",
    ]
    assert lines[4::2] == ["field_0=a0, lr=0.2, 30 more differ", "field_0=b0, lr=0.1, 30 more differ"]


def test_long_values_of_a_setting_are_cut(tmp_path: Path) -> None:
    long = "/home/of/somebody/with/a/very/long/path/to/a/folder/for/the/weights/of/the/run/of/number/"
    runs = [write_run(tmp_path / f"{i}{j}", [0.5], seed=j, init=f"{long}{i}") for i in (1, 2) for j in (0, 1)]
    lines = as_text(runs, compare(runs)).splitlines()
    assert lines[-1] == "init=…the/run/of/number/2  0,1"


def test_a_run_that_was_stopped_is_not_in_the_mean(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), [0.5], test=0.4, seed=seed) for seed in (0, 1)]
    runs.append(write_run(tmp_path / "2", [0.1], seed=2))
    [row] = by_setting(runs)
    assert row["best_val"]["min"] == 0.5 and row["seeds"] == [0, 1, 2]


def test_a_setting_whose_runs_have_no_score_yet(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), [], seed=seed) for seed in (0, 1)]
    [row] = by_setting(runs)
    assert row["best_val"] is None and row["test"] is None and row["setting"] == {}
    assert as_text(runs, compare(runs)).splitlines()[-1].split() == ["digits", "0,1"]
