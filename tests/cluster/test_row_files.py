"""The Parquet files of predictions: one row per image whatever happens, and never rows of two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from vitrail.cluster import row_files
from vitrail.cluster.row_files import RowFiles
from vitrail.errors import RunError, UserError

SHARED = {"weights": "abc", "options": {"top": 3}, "data": "x"}


def row(name: str, error: str | None = None) -> dict[str, Any]:
    answer = {"labels": [{"label": "cat", "score": 0.5}]} if error is None else {"error": error}
    return {"image": name, "task": "classify", **answer}


def read_back(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ds.dataset(folder).to_table().to_pylist()
    return rows


def test_rows_go_to_files_of_a_limited_size_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "ROWS", 2)
    with RowFiles(tmp_path / "out", SHARED) as written:
        for i in range(5):
            written.add([row(f"{i}.png", "bad" if i == 3 else None)])
        assert len([*(tmp_path / "out").glob("rows-*")]) == 2, "a killed command keeps these"
    assert written.text() == f"{tmp_path / 'out'}: 5 rows in 3 Parquet files, 1 with an error"
    rows = read_back(tmp_path / "out")
    assert [one["image"] for one in rows] == [f"{i}.png" for i in range(5)]
    assert rows[0]["labels"] == [{"label": "cat", "score": 0.5}] and rows[3]["labels"] is None
    assert [one["error"] for one in rows] == [None, None, None, "bad", None]


def test_an_image_has_one_row_also_if_it_was_answered_twice(tmp_path: Path) -> None:
    with RowFiles(tmp_path / "out", SHARED) as first:
        assert first.add([row("a"), row("b")]) == 2 and first.add([row("b"), row("c")]) == 1
    with RowFiles(tmp_path / "out", SHARED) as second:
        assert second.done == {"a", "b", "c"}
        assert second.add([row("c"), row("d")]) == 1
    assert [one["image"] for one in read_back(tmp_path / "out")] == ["a", "b", "c", "d"]


def test_rows_before_an_error_are_kept(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RowFiles(tmp_path / "out", SHARED) as written:
            written.add([row("a")])
            raise RunError("the cluster is gone")

    with pytest.raises(RunError):
        interrupted()
    assert [one["image"] for one in read_back(tmp_path / "out")] == ["a"]


def test_errors_alone_do_not_decide_the_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "ROWS", 1)
    with RowFiles(tmp_path / "out", SHARED) as written:
        written.add([row("a", "bad")])
        written.add([row("b", "bad")])
        written.add([row("c")])
        written.add([row("d", "bad")])
    assert [one["labels"] is None for one in read_back(tmp_path / "out")] == [True, True, False, True]
    with RowFiles(tmp_path / "none", SHARED) as none:
        none.add([row("a", "bad")])
    assert [one["error"] for one in read_back(tmp_path / "none")] == ["bad"]


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("weights", "other", "holds predictions with another model: choose another --out"),
        ("options", {"top": 5}, "holds predictions with other options"),
        ("data", "y", "holds predictions with other data"),
    ],
)
def test_rows_of_two_models_do_not_mix(tmp_path: Path, name: str, value: Any, said: str) -> None:
    RowFiles(tmp_path / "out", SHARED)
    with pytest.raises(UserError, match=said):
        RowFiles(tmp_path / "out", {**SHARED, name: value})


def test_folders_of_others_and_damage(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        RowFiles(tmp_path / "other", SHARED)
    with pytest.raises(UserError, match="give --out a folder"):
        RowFiles(tmp_path / "out.parquet", SHARED)
    with RowFiles(tmp_path / "out", SHARED) as written:
        written.add([row("a")])
    (tmp_path / "out/rows-000000.parquet").write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"rows-000000.parquet cannot be read .*remove it, and its images are done again"
    ):
        RowFiles(tmp_path / "out", SHARED)
    (tmp_path / "out" / row_files.SHARED).write_text("{")
    with pytest.raises(UserError, match=r"_predictions.json is damaged"):
        RowFiles(tmp_path / "out", SHARED)


def test_two_commands_at_the_same_time(tmp_path: Path) -> None:
    one, two = (RowFiles(tmp_path / "out", json.loads(json.dumps(SHARED))) for _ in range(2))
    one.add([row("a")])
    one.write()
    two.add([row("a")])
    with pytest.raises(RunError, match="was written by another process: let one command at a time"):
        two.write()


def test_a_file_of_others_among_the_rows_is_refused(tmp_path: Path) -> None:
    with RowFiles(tmp_path / "out", SHARED) as written:
        written.add([row("a.png")])
    (tmp_path / "out" / "rows-old.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="rows-old.parquet is not a file of this command: move it out of"):
        RowFiles(tmp_path / "out", SHARED)
