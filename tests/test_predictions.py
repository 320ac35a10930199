"""Where answers go: rows in one file of any kind, figures in a folder, and never over what is there to be read."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.predictions import Answered, answer_files, answers, output_to
from vitrail.predictions.answers import agree
from vitrail.predictions.outputs import LONG_SIDE, figure_names, original
from vitrail.predictions.tables import JournalRows
from vitrail.tasks.values import Prediction


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five files: two of the same name but for the ending, one further down, and one that is no image."""
    root = tmp_path / "in"
    (root / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "a.jpg", "below/a.png", "c.png")):
        Image.new("RGB", (8, 8), (60 * number, 9, 200)).save(root / name)
    (root / "bad.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny"
    vitrail.create("nano/2", classes=["a cat", "=dog", "été"], image_size=8).save(place)
    return place


def predict(model: Path, *args: object, code: int = 0) -> None:
    assert main(["predict", *map(str, args), "--model", str(model), "--device", "cpu"]) == code


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_rows_are_those_of_json_in_every_kind_of_file(
    images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="needs pip install 'vitrail[data]'")
    predict(model, images, "--json", code=2)
    rows = printed(capsys)
    assert len(rows) == 5 and sum("error" in row for row in rows) == 1
    for kind in ("jsonl", "csv", "parquet", "JSONL"):
        predict(model, images, "--out", tmp_path / "out" / f"x.{kind}", code=2)
        said = capsys.readouterr()
        assert said.out == f"{tmp_path / 'out' / f'x.{kind}'}: 5 rows, 1 with an error\n" and "bad.png" in said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.JSONL", "x.csv", "x.jsonl", "x.parquet"]
    assert [json.loads(line) for line in (tmp_path / "out" / "x.jsonl").read_text().splitlines()] == rows
    whole = [{"labels": None, "error": None, **row} for row in rows]
    assert pq.read_table(tmp_path / "out" / "x.parquet").to_pylist() == whole
    with (tmp_path / "out" / "x.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    ranks = range(1, 1 + max(len(row.get("labels", [])) for row in rows))
    assert list(read[0]) == ["image", "task", *(f"{name}_{i}" for i in ranks for name in ("label", "score")), "error"]
    for row, expected in zip(read, rows, strict=True):
        assert (row["image"], row["error"]) == (expected["image"], expected.get("error", ""))
        found = [{"label": row[f"label_{i}"], "score": float(row[f"score_{i}"])} for i in ranks if row[f"label_{i}"]]
        assert found == expected.get("labels", [])


def test_json_is_printed_too_on_request(
    images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(model, images / "c.png", "--json", "--top", 2, "--out", tmp_path / "x.jsonl")
    (row,) = printed(capsys)
    assert json.loads((tmp_path / "x.jsonl").read_text()) == row and len(row["labels"]) == 2
    predict(model, images / "c.png", "--json", "--out", tmp_path / "figures")
    (row,) = printed(capsys)
    assert row["figure"] == str(tmp_path / "figures" / "c.png")


class Odd(Prediction):
    """An answer whose rows differ from image to image."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def row(self) -> dict[str, Any]:
        return self.found

    def text(self) -> str:
        return "odd"


ODD: list[dict[str, Any]] = [
    {"boxes": [], "sure": True},
    {"boxes": [{"box": [1, 2.5], "label": "a"}], "value": 1},
    {"boxes": [{"box": [], "label": "b"}], "value": 0.5, "text": 'a, "b"\nc'},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_may_lack_entries_and_names_need_not_be_text(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="needs pip install 'vitrail[data]'")
    output = output_to(tmp_path / f"x.{kind}", [], [])
    with output.begin(vitrail.create("nano/2", classes=2), []):
        for found in ODD:
            output.add(Answered(Path("caf\udce9.png"), {"image": "caf\udce9.png", "task": "odd", **found}, Odd(found)))
    if kind == "parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
        assert [row["image"] for row in rows] == [r"caf\udce9.png"] * 3
        assert [row["boxes"] for row in rows] == [found["boxes"] for found in ODD]
        assert [row["value"] for row in rows] == [None, 1.0, 0.5]
    elif kind == "csv":
        with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["text"] for row in rows] == ["", "", 'a, "b"\nc'] and rows[0]["sure"] == "true"
        assert rows[0]["image"] == r"caf\udce9.png"
        assert list(rows[0]) == ["image", "task", "box_1_1", "box_1_2", "label_1", "sure", "value", "text", "error"]
        assert [rows[1][name] for name in ("box_1_1", "box_1_2", "label_1")] == ["1", "2.5", "a"]
        assert [rows[2][name] for name in ("box_1_1", "box_1_2", "label_1")] == ["", "", "b"]
    else:
        rows = list(map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines()))
        assert [row["image"] for row in rows] == ["caf\udce9.png"] * 3 and rows[2]["text"] == ODD[2]["text"]


@pytest.mark.parametrize("when", ["answers", "writing"])
def test_a_file_of_rows_appears_whole_or_not_at_all(when: str, tmp_path: Path) -> None:
    output = output_to(tmp_path / "x.csv", [], [])
    if when == "writing":

        def broken(rows: JournalRows, file: Any) -> None:
            file.write(b"half")
            raise KeyboardInterrupt

        output.write = broken  # type: ignore[attr-defined]

    def answer() -> None:
        with output.begin(vitrail.create("nano/2", classes=2), []):
            output.add(Answered(Path("a.png"), {"image": "a.png", "task": "odd"}, Odd({})))
            if when == "answers":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer()
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv.partial"]


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`stopping[0]` images are answered, then the command is interrupted."""
    left = [sys.maxsize]
    one = vitrail.predictions.answer_files

    def some(task: Any, paths: Sequence[Path], *earlier: Any) -> Iterator[Answered]:
        for answered in one(task, paths, *earlier):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield answered

    monkeypatch.setattr(vitrail.predictions, "answer_files", some)
    return left


@pytest.mark.parametrize("out", ["x.csv", "x.jsonl", "figures"])
def test_a_stopped_command_resumes_and_ends_as_if_it_had_not_stopped(
    out: str, stopping: list[int], images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(place: Path, code: int = 2) -> list[str]:
        predict(model, images, "--out", place, code=code)
        return capsys.readouterr().out.replace(str(place), "OUT").splitlines()

    def files(place: Path) -> dict[str, bytes]:
        every = [place] if place.is_file() else [*place.rglob("*")]
        return {str(path.relative_to(place)): path.read_bytes() for path in every if path.is_file()}

    whole = command(tmp_path / "whole" / out)
    place = tmp_path / out
    for count in (2, 1):
        stopping[0] = count
        command(place, code=130)
    assert place.with_name(f"{out}.partial").read_text().count("\n") == 4 and not place.is_file()
    stopping[0] = sys.maxsize
    with place.with_name(f"{out}.partial").open("a") as file:
        file.write('{"row": {"image')  # killed while it wrote
    assert command(place) == whole
    assert files(place) == files(tmp_path / "whole" / out)
    assert not place.with_name(f"{out}.partial").exists()


def test_a_stopped_command_does_not_resume_with_another_model_or_other_images(
    stopping: list[int],
    images: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopping[0] = 2
    predict(model, images, "--out", tmp_path / "x.csv", code=130)
    assert "stopped after 2 of 5 images: the same command resumes there" in caplog.text
    vitrail.create("nano/2", classes=3, image_size=8).save(tmp_path / "other")
    before = (tmp_path / "x.csv.partial").read_bytes()
    for used, given in ((tmp_path / "other", [images]), (model, [images / "c.png"]), (model, [images, "--top", 1])):
        predict(used, *given, "--out", tmp_path / "x.csv", code=2)
        assert "x.csv.partial holds predictions of another model, other options or" in capsys.readouterr().err
    assert (tmp_path / "x.csv.partial").read_bytes() == before and not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("count, resumed", [(1, "fp32 2, bf16 2, bf16 2"), (2, "bf16 2"), (3, "bf16 2")])
def test_a_resumed_command_keeps_batches_and_number_format(
    count: int,
    resumed: str,
    stopping: list[int],
    images: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of one output have one number format, also where another processor resumes that would choose another."""
    (images / "bad.png").unlink()
    monkeypatch.setattr(answers, "BATCH", 2)
    monkeypatch.setattr(answers, "agree", lambda one, other: True)
    monkeypatch.setattr(answers, "native_bf16", lambda device: True)
    calls: list[str] = []
    one = answers._Precision._answers

    def noted(self: Any, samples: list[Any], precision: Any) -> Any:
        calls.append(f"{precision} {len(samples)}")
        return one(self, samples, precision)

    monkeypatch.setattr(answers._Precision, "_answers", noted)
    predict(model, images, "--out", tmp_path / "whole.jsonl")
    assert ", ".join(calls) == "fp32 2, bf16 2, bf16 2"
    stopping[0] = count
    predict(model, images, "--out", tmp_path / "x.jsonl", code=130)
    stopping[0] = sys.maxsize
    monkeypatch.setattr(answers, "native_bf16", lambda device: count == 1)
    calls.clear()
    predict(model, images, "--out", tmp_path / "x.jsonl")
    assert ", ".join(calls) == resumed
    assert (tmp_path / "x.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_answers_are_those_of_predict_in_order_however_many_batches(tmp_path: Path, model: Path) -> None:
    task = vitrail.load(model)
    paths = [tmp_path / f"{i}.png" for i in range(2 * answers.BATCH + 3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8 + i % 3, 8), (3 * i, 255 - 3 * i, i)).save(path)
    paths[40].write_bytes(b"broken")
    found = list(answer_files(task, paths))
    assert [each.path for each in found] == paths and "error" in found[40].row
    for i in (0, 31, 32, 39, 41, 66):
        (expected,) = task.predict([Image.open(paths[i])])
        assert agree(found[i].row["labels"], expected.row()["labels"])


def test_rows_agree_but_for_small_numbers() -> None:
    def row(*scores: tuple[str, float]) -> dict[str, Any]:
        return {"labels": [{"label": label, "score": score} for label, score in scores]}

    one = row(("a", 0.5), ("b", 0.105), ("c", 0.1))
    assert agree(one, one) and agree(one, row(("a", 0.48), ("c", 0.106), ("b", 0.1)))
    assert agree(one, row(("a", 0.5), ("b", 0.105), ("d", 0.1))), "the last of many labels may change"
    assert not agree(one, row(("a", 0.5), ("d", 0.3), ("b", 0.1)))
    assert not agree(one, row(("a", 0.46), ("b", 0.105), ("c", 0.1)))
    small = row(("a", 0.02), ("b", 0.01))
    assert not agree(small, row(("c", 0.02), ("d", 0.01))) and not agree(small, row(("a", 0.02), ("b", 0.012)))
    values = {"values": [{"name": "x", "value": 0.01}, {"name": "y", "value": 1000.0}]}
    assert agree(values, {"values": [{"name": "x", "value": 0.0101}, {"name": "y", "value": 1010.0}]})
    assert not agree(values, {"values": [{"name": "x", "value": 0.02}, {"name": "y", "value": 1000.0}]})
    assert agree({"area": 1000, "caption": "a"}, {"area": 1040, "caption": "a"})
    assert not agree({"area": 1000, "caption": "a"}, {"area": 1060, "caption": "a"})
    assert not agree({"caption": "a"}, {"caption": "b"}) and not agree({"values": [1.0]}, {"values": [1.0, 2.0]})
    assert not agree({"value": None}, {"value": 0.0}) and not agree({"sure": True}, {"sure": False})


@pytest.mark.parametrize("terminal, out, told", [(True, "x.csv", 2), (True, None, 0), (False, None, 2)])
def test_long_work_shows_progress_where_no_answers_are_seen(
    terminal: bool,
    out: str | None,
    told: int,
    images: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (images / "bad.png").unlink()
    monkeypatch.setattr(answers, "BATCH", 2)
    monkeypatch.setattr(answers, "LINE_EVERY", 0.0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    predict(model, images, *(("--out", tmp_path / out) if out else ()))
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 4 images, " in line]
    assert len(lines) == told, lines


def test_figures_keep_their_places_and_never_meet(
    images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    predict(model, images, images / "c.png", "--out", out, code=2)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"{out}: 5 figures" and said.err.count("\n") == 1 and "bad.png" in said.err
    drawn = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert drawn == {"a.png", "a-2.png", "below/a.png", "c.png", "c-2.png"}
    assert all(f"-> {out / name}" in said.out for name in drawn)
    with Image.open(out / "c.png") as figure:
        assert figure.format == "PNG" and figure.width >= 360 and figure.height > figure.width


@pytest.mark.parametrize(
    "given, images, names",
    [
        (["x/a.jpg", "y/a.jpg"], ["x/a.jpg", "y/a.jpg"], ["a.png", "a-2.png"]),
        (["a.jpg", "A.PNG", "a-2.jpg"], ["a.jpg", "A.PNG", "a-2.jpg"], ["a.png", "A-2.png", "a-2-2.png"]),
        (["../../a.jpg"], ["../../a.jpg"], ["a.png"]),
        (["/x/a.b.jpg", "/x/.png"], ["/x/a.b.jpg", "/x/.png"], ["a.b.png", ".png.png"]),
    ],
)
def test_names_of_figures(given: list[str], images: list[str], names: list[str]) -> None:
    assert list(map(str, figure_names(given, list(map(Path, images))))) == names


def test_a_folder_that_was_given_never_leads_out_of_that_of_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    beside = ["a.jpg", "a.mask.jpg", "b.mask.jpg"]  # of which `a` may have a mask of its own
    assert list(map(str, figure_names(beside, list(map(Path, beside))))) == ["a.png", "a.mask-2.png", "b.mask.png"]
    assert figure_names([".", "../a.jpg"], [Path("b/c.jpg"), Path("../a.jpg")]) == [Path("b/c.png"), Path("a.png")]


@pytest.mark.parametrize(
    "out, words",
    [
        ("in", "holds the input images: choose another folder"),
        ("in/../in", "holds the input images: choose another folder"),
        (
            "in/c.png",
            "is a file: choose .jsonl, .csv or .parquet for a table, or a folder without an ending for figures",
        ),
        ("folder.csv", "is a folder, but --out has the ending of a file"),
    ],
)
def test_places_that_are_refused(
    out: str, words: str, images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.csv").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    predict(model, images, "--out", tmp_path / out, code=2)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_figure_takes_the_place_of_an_image(
    images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(images)
    before = (images / "c.png").read_bytes()
    predict(model, images / "c.png", "--out", tmp_path / "link", code=2)
    assert "would overwrite an image: choose another folder for --out" in capsys.readouterr().err
    assert (images / "c.png").read_bytes() == before


def test_parquet_without_pyarrow_names_the_extra(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    predict(model, images, "--out", tmp_path / "x.parquet", code=2)
    assert "pip install 'vitrail[data]', or choose .csv or .jsonl" in capsys.readouterr().err


def test_the_original_is_upright_in_rgb_and_not_too_large(tmp_path: Path) -> None:
    wide = Image.new("RGB", (2000, 1000), "red")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert original(tmp_path / "turned.jpg").size == (LONG_SIDE // 2, LONG_SIDE)
    small = Image.new("L", (3, 2), 7)
    small.save(tmp_path / "grey.png")
    drawn = original(tmp_path / "grey.png")
    assert drawn.size == (3, 2) and drawn.mode == "RGB" and drawn.getpixel((0, 0)) == (7, 7, 7)
    bands = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)
    np.save(tmp_path / "bands.npy", bands)
    assert np.array_equal(np.asarray(original(tmp_path / "bands.npy")), bands[:3].transpose(1, 2, 0))
