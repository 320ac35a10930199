"""The report of a run: what it shows, what it leaves out, and that it stands alone."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitrail.errors import UserError
from vitrail.recipes import RECIPES
from vitrail.report import read_run, write_report
from vitrail.units import count, duration, percent

EVIL = "<script>alert('1')</script> & \"$x^$"


class Page(HTMLParser):
    """Text and tags of a page, with a check that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_run(folder: Path, names: list[str], steps: int = 60, ended: bool = True) -> Path:
    folder.mkdir(parents=True)
    classes = len(names)
    score = {"name": "top1", "best": "max", "unit": "%", "label": "accuracy"}
    rows: list[dict[str, Any]] = [{"kind": "start", "score": score, "command": f"vitrail train digits --data {EVIL}"}]
    for step in range(20, steps + 1, 20):
        common = {"step": step, "seconds": step / 10}
        rows.append(
            {"kind": "train", **common, "epoch": 1.0, "loss": 2 / step, "lr": 0.1, "images_per_s": 99.0, "wait": 0.25}
        )
        rows.append({"kind": "val", **common, "cross_entropy": 1 / step, "top1": 0.5 + step / 1000, "top5": 1.0})
    if ended:
        confusion = [[7 if i == j else int(j == (i + 1) % classes) * 3 for j in range(classes)] for i in range(classes)]
        test = {
            "top1": 0.7,
            "top5": 0.99,
            "per_class": [0.7] * classes,
            "confusion": confusion,
            "calibration_error": 0.05,
        }
        rows.append({"kind": "test", **test})
        rows.append({"kind": "done", "step": steps, "seconds": 125.0, "parameters": 1_234_567})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.json").write_text(
        json.dumps({"recipe": "digits", "task": {"kind": "classify"}, "optim": {"lr": 0.1, "note": EVIL}})
    )
    (folder / "classes.json").write_text(json.dumps(names))
    guesses = [{"label": names[0], "score": 0.9}, {"label": names[1], "score": 0.1}]
    examples = [{"image": png(), "truth": {"label": label}, "labels": guesses} for label in names[:2]]
    (folder / "examples.json").write_text(json.dumps(examples))
    return folder


@pytest.mark.parametrize("classes", [2, 10, 60, 101, 300])
def test_everything_is_shown_and_nothing_is_fetched(tmp_path: Path, classes: int) -> None:
    names = [EVIL, *(f"class {i}" for i in range(1, classes))]
    path = write_report(write_run(tmp_path / "run", names))
    assert path == tmp_path / "run" / "report.html"
    html = path.read_text()
    page = Page(html)
    assert page.open == []
    for words in ("70.00 %", "56.00 %", "1.23 M", "2 min 5 s", "25% of the time", "optim.lr", "✓ right", "✗ wrong"):
        assert words in page.text, words
    assert EVIL in page.text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "url(" not in html
    cells = sum(tag == "title" for tag, _ in page.tags) - 1
    assert cells == (2 * classes if classes <= 250 else 0)
    assert "Most frequent mistakes" in page.text


def charts(html: str) -> list[str]:
    """The SVG of each chart, with its title and its explanation."""
    return re.findall(r'<figure class="chart">.*?</figure>', html, re.DOTALL)


def test_curves_have_the_scores_and_tell_what_they_mean(tmp_path: Path) -> None:
    loss, accuracy, rate = charts(write_report(write_run(tmp_path / "run", ["a", "b"])).read_text())[:3]
    assert "loss" in loss and "validation" in loss and "lower is better" in loss
    assert "accuracy" in accuracy and "56.00 %" in accuracy and "at step 60" in accuracy
    assert "learning rate" in rate and "warmup" in rate


def write_losses(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    rows = [{"kind": "val", "step": 10 * i, "loss": loss} for i, loss in enumerate(losses, 1)]
    rows += [{"kind": "train", "step": 10 * i, "loss": 0.1} for i in range(1, len(losses) + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_validation_loss_that_rises_again_is_called_overfitting(tmp_path: Path) -> None:
    overfit = write_report(write_losses(tmp_path / "over", [1.0, 0.5, 0.8, 1.2])).read_text()
    assert "lowest at step 20 and has risen since, which is overfitting" in overfit
    assert "has risen" not in write_report(write_losses(tmp_path / "good", [1.0, 0.5, 0.4, 0.401])).read_text()


def test_the_page_tells_when_the_scores_are_those_that_chose_the_checkpoint(tmp_path: Path) -> None:
    chosen = "on which the checkpoint was chosen"
    folder = write_run(tmp_path / "run", ["a", "b"], ended=False)
    (folder / "scores.json").write_text(json.dumps({"split": "val", "top1": 0.5, "per_class": [0.5, 0.5]}))
    text = Page(write_report(folder).read_text()).text
    assert chosen in text and "validation accuracy" in text and "a class's validation images" in text
    assert "best validation accuracy" not in text, "it is the same score"
    (folder / "scores.json").write_text(json.dumps({"split": "test", "top1": 0.5, "per_class": [0.5, 0.5]}))
    text = Page(write_report(folder).read_text()).text
    assert chosen not in text and "a class's test images" in text and "best validation accuracy" in text


def test_calibration_and_worst_mistakes_are_shown_and_odd_ones_do_no_harm(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"])
    bins: list[Any] = [{"count": 30, "confidence": 0.9, "accuracy": 0.6}, {"count": None}, 3]
    (folder / "scores.json").write_text(json.dumps({"split": "test", "top1": 0.6, "calibration": bins}))
    rows = json.loads((folder / "examples.json").read_text())
    (folder / "examples.json").write_text(json.dumps([*rows, {**rows[1], "mistake": True}]))
    page = Page(write_report(folder).read_text())
    assert "On average it is too sure: its mean confidence is 90.0%, and 60.0% of its answers are right" in page.text
    assert "Worst mistakes" in page.text and page.text.count("✗ wrong") == 2 and page.open == []


def test_precision_counts_the_predictions_of_a_class_and_recall_its_images(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["cat", "dog"])
    scores = {"split": "test", "per_class": [0.75, 0.5], "confusion": [[3, 1], [1, 1]]}
    (folder / "scores.json").write_text(json.dumps(scores))
    rows = re.findall(r'title="(\w+)">\w+</td>.*?</tr>', html := write_report(folder).read_text())
    assert rows[:2] == ["dog", "cat"], "the lowest recall first"
    assert re.search(r"cat</td>.*?75\.0</td><td class=value>75\.0</td><td class=value>4</td>", html)
    assert re.search(r"dog</td>.*?50\.0</td><td class=value>50\.0</td><td class=value>2</td>", html)


@pytest.mark.parametrize("classes, tables", [(2, 1), (8, 1), (9, 2), (40, 2)])
def test_each_table_of_class_scores_has_the_header(classes: int, tables: int, tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run", [f"class {i}" for i in range(classes)])).read_text()
    (shown,) = re.findall(r'<div class="classes">(.*?)</div>', html)
    own = re.findall(r"<table>(.*?)</table>", shown)
    assert len(own) == tables and all("<th class=value>recall</th>" in table for table in own)
    assert sum(table.count('<td class="name"') for table in own) == classes


def test_the_images_of_each_split_are_those_that_were_used(tmp_path: Path) -> None:
    """What was held back for validation is not counted as training images."""
    folder = write_run(tmp_path / "run", ["a", "b"])
    (folder / "data.json").write_text(json.dumps({"splits": {"train": {"images": 100}, "test": {"images": 30}}}))
    start = {"kind": "start", "step": 0, "images": {"train": 1090, "val": 10, "test": 30}}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    assert "1,090 training, 10 validation, 30 test images" in Page(write_report(folder).read_text()).text


def test_only_fields_that_differ_from_the_recipe_stand_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"])
    own = json.loads(json.dumps(RECIPES["digits"](1437).as_dict()))
    (folder / "data.json").write_text(json.dumps({"splits": {"train": {"images": 1437, "hash": ""}}}))
    (folder / "recipe.json").write_text(json.dumps(own))
    assert "Every field is as the recipe has it." in write_report(folder).read_text()
    own["optim"]["lr"] = 0.125
    (folder / "recipe.json").write_text(json.dumps(own))
    assert read_run(folder).changed == [("optim.lr", "0.125", str(RECIPES["digits"](1437).optim.lr))]
    shown = write_report(folder).read_text().partition("<summary>")[0]
    assert "<td>optim.lr</td><td><code>0.125</code></td>" in shown and "batch_size" not in shown


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"])
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


@pytest.mark.parametrize("missing", ["recipe.json", "metrics.jsonl", "classes.json", "examples.json"])
def test_what_missing_files_hold_is_left_out(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"])
    (folder / missing).unlink()
    page = Page(write_report(folder).read_text())
    assert page.open == []
    assert ("Recipe" in page.text) == (missing != "recipe.json")
    assert ("Learning curves" in page.text) == (missing != "metrics.jsonl")
    # The task's own sections need its name, which is in the recipe.
    assert ("Confusion" in page.text) == (missing not in ("recipe.json", "metrics.jsonl"))
    assert ("Example" in page.text) == (missing not in ("recipe.json", "examples.json"))


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"], ended=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 80, "lo')
    text = Page(write_report(folder).read_text()).text
    assert "is not finished" in text
    assert "Learning curves" in text
    assert "Confusion" not in text


def test_odd_rows_do_no_harm(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"], ended=False)
    odd = [
        "3",
        '{"kind": "val", "step": 80, "top1": NaN, "cross_entropy": Infinity}',
        '{"kind": "other"}',
        '{"kind": "train"}',
        '{"kind": "start", "score": {"other": 1}, "command": "vitrail"}',
        '{"kind": "test", "top1": 0.5, "per_class": [null, 0.5], "confusion": [[0, 0], [1, 1]]}',
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join(odd))
    (folder / "examples.json").write_text(
        json.dumps(
            [1, {"image": '"><b>', "truth": {"label": "a"}, "labels": [{"label": "a"}]}, {"image": png(), "labels": 3}]
        )
    )
    page = Page(write_report(folder).read_text())
    assert page.open == []
    assert "Example" not in page.text
    assert read_run(folder).best["step"] == 60


def test_rows_after_a_resume_replace_those_before(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"], ended=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "val", "step": 40, "top1": 0.9}\n')
    run = read_run(folder)
    assert [row["step"] for row in run.val] == [20, 40, 60]
    assert run.best["top1"] == 0.9


def test_a_long_curve_is_thinned(tmp_path: Path) -> None:
    short = write_report(write_run(tmp_path / "short", ["a", "b"], steps=20 * 500))
    long = write_report(write_run(tmp_path / "long", ["a", "b"], steps=20 * 5000))
    assert long.stat().st_size < 2 * short.stat().st_size


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_numbers_for_people() -> None:
    assert [count(n) for n in (None, 0.5, 999, 1234, 85_798_656)] == ["", "0.5", "999", "1.23 k", "85.8 M"]
    assert [duration(n) for n in (None, 4.21, 59.99, 125, 7500)] == ["", "4.21 s", "60 s", "2 min 5 s", "2 h 5 min"]
    assert [percent(n) for n in (None, float("nan"), 0.97654)] == ["", "", "97.65 %"]


def test_a_captioners_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {
            "kind": "start",
            "score": {"name": "cider", "best": "max", "unit": "", "label": ""},
            "command": "vitrail train",
        }
    ]
    for step in (20, 40, 60):
        rows.append({"kind": "train", "step": step, "loss": 5 - step / 20, "lr": 0.1})
        scores = {"cider": 0.2 + step / 1000, "bleu4": 0.11, "rouge_l": 0.4, "identical": 0.3}
        rows.append({"kind": "val", "step": step, **scores})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hebrew = "כלב שחור"
    examples = [
        {"image": png(), "caption": f"a dog {EVIL}", "truth": {"captions": ["a black dog", hebrew, "a third"]}},
        {"image": png(), "caption": "", "truth": {"captions": []}},
        {"image": '"><b>', "caption": "never shown", "truth": {"captions": []}},
    ]
    (folder / "examples.json").write_text(json.dumps(examples))
    (folder / "recipe.json").write_text(json.dumps({"recipe": "caption-vit", "task": {"kind": "caption"}}))
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == [] and not {tag for tag, _ in page.tags} & {"script", "link"}
    for words in ("0.260", "0.110", "0.400", f"a dog {EVIL}", "a black dog", hebrew, "no words"):
        assert words in page.text, words
    assert "never shown" not in page.text and "a third" not in page.text
    assert "cider" in charts(html)[1] and "share of the most common caption" in charts(html)[-1]


@pytest.mark.parametrize(
    "score, values, best, shown",
    [
        ({"name": "fid", "best": "min", "unit": ""}, [40.0, 12.0, 15.0], 40, "12.000"),
        (
            {"name": "miou", "best": "max", "unit": "%"},
            [0.3, 0.5, 0.5],
            60,
            "50.00 %",
        ),  # of equal ones the last is saved
        (
            {"name": "log_likelihood", "best": "max", "unit": "", "label": "likelihood"},
            [-9.0, -2.5, -3.0],
            40,
            "-2.500",
        ),
    ],
)
def test_a_score_of_any_task_is_read_as_it_says(
    tmp_path: Path, score: dict[str, str], values: list[float], best: int, shown: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    rows: list[dict[str, Any]] = [{"kind": "start", "score": score, "command": "vitrail train"}]
    rows += [{"kind": "val", "step": 20 * i, score["name"]: value} for i, value in enumerate(values, 1)]
    rows.append({"kind": "test", score["name"]: values[-1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_report(folder).read_text()
    page = Page(html)
    assert read_run(folder).best["step"] == best
    assert shown in page.text and f"best validation {score.get('label') or score['name']}" in page.text
    assert (" %" in page.text) == (score["unit"] == "%")
    assert any(shown in drawn for drawn in charts(html))
