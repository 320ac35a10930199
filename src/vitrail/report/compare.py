"""Compare several runs: one table, one plot."""

from __future__ import annotations

import io
import logging
import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from vitrail.charts import bare
from vitrail.errors import UserError
from vitrail.files import printable, write_atomic
from vitrail.html import NO_SCORES
from vitrail.report.run import RunRecord, flat, read_run
from vitrail.tasks.values import Score
from vitrail.units import count, duration, number

log = logging.getLogger("vitrail")

COLUMNS = {
    "name": "run",
    "recipe": "recipe",
    "seed": "seed",
    "parameters": "parameters",
    "steps": "steps",
    "seconds": "time",
    "images_per_s": "images/s",
    "score": "score",
    "best_val": "best val",
    "test": "test",
}
SHOWN = {
    "parameters": count,
    "seconds": duration,
    "images_per_s": count,
}
MARKS = {"unfinished": "not finished", "fast_dev_run": "fast dev run"}
WIDTH, LONG = 80, 20
"""columns of a terminal, and of a value of a setting in a line that would be longer than that"""
UNITS = [("hours", 3600), ("minutes", 60), ("seconds", 1)]


def compare(folders: Sequence[str | Path], out: str | Path | None = None) -> list[dict[str, Any]]:
    """One row per run folder, in the given order; scores and times that a run does not have yet are None.

    A run without its last row, since it still trains or was stopped, has `unfinished`.

    With `out`, the validation scores against steps and against seconds are plotted to that PNG file. Runs with
    different scores, such as classifiers and captioners, have separate plots, with a warning. A folder without a run is
    a UserError, and then nothing is drawn.
    """
    if not folders:
        raise UserError("nothing to compare: give one or more run folders")
    runs = [read_run(folder) for folder in folders]
    names = _names([run.folder for run in runs])
    if len(scores := _scores(runs)) > 1:
        names_of = " and ".join(score.name for score in scores)
        log.warning(f"these runs have different scores ({names_of}), which cannot be compared")
    if fast := [name for name, run in zip(names, runs, strict=True) if run.fast_dev_run]:
        log.warning(f"{', '.join(fast)}: a fast dev run, {NO_SCORES}")
    if out is not None:
        write_atomic(out, _plot(runs, names))
    return [_row(run, name) for run, name in zip(runs, names, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest path suffixes, all of one length, that distinguish the folders."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _scores(runs: Sequence[RunRecord]) -> list[Score]:
    """The distinct scores of the runs."""
    return sorted({run.score for run in runs}, key=lambda score: score.name)


def _row(run: RunRecord, name: str) -> dict[str, Any]:
    last = run.done or (run.train or run.val or [{}])[-1]
    return {
        "name": name,
        "recipe": run.recipe.get("recipe"),
        "seed": run.recipe.get("seed"),
        "parameters": run.done.get("parameters"),
        "steps": last.get("step"),
        "seconds": last.get("seconds"),
        "images_per_s": run.images_per_s,
        "score": run.score.name,
        "unit": run.score.unit,
        "best_val": run.best.get(run.score.name),
        "best_val_step": run.best.get("step"),
        "test": run.test.get(run.score.name),
        **({} if run.done else {"unfinished": True}),
        **({"fast_dev_run": True} if run.fast_dev_run else {}),
    }


def as_text(folders: Sequence[str | Path], rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `compare` as a table, and a second one if some of the runs differ in nothing but their seed."""
    settings = by_setting(folders)
    repeated = any(len(row["runs"]) > 1 for row in settings)
    return as_table(rows) + (f"\n\n{as_settings(settings)}" if repeated else "")


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `compare` as aligned text, without empty columns."""
    columns = []
    for name, title in COLUMNS.items():
        values = [row[name] for row in rows]
        if any(value is not None for value in values):
            cells = [title, *("-" if row[name] is None else _cell(name, row) for row in rows)]
            width = max(map(len, cells))
            columns.append([cell.ljust(width) if name in ("name", "recipe") else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _cell(name: str, row: dict[str, Any]) -> str:
    if name in ("best_val", "test"):
        return Score(row["score"], unit=row["unit"]).text(row[name])
    if name == "name" and (marks := [MARKS[key] for key in MARKS if row.get(key)]):
        return f"{row['name']} ({', '.join(marks)})"
    return SHOWN.get(name, str)(row[name])


def by_setting(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """One row per setting: the runs that differ in nothing but their seed.

    `setting` holds the fields by which the settings differ; `best_val` and `test` have the `mean`, `min`, `max` and
    standard deviation (`std`, None for one run) of the finished runs that have this score, or are None if none has.
    """
    groups: dict[tuple[tuple[str, str], ...], list[RunRecord]] = {}
    for run in map(read_run, folders):
        shared = sorted(pair for pair in flat(run.recipe) if pair[0] != "seed")
        groups.setdefault(tuple(shared), []).append(run)
    fields = [{name: value for name, value in flat(runs[0].recipe) if name != "seed"} for runs in groups.values()]
    names = [name for name in dict.fromkeys(name for own in fields for name in own) if _differs(name, fields)]
    return [
        {
            "setting": {name.rpartition(".")[2]: own[name] for name in names if name in own},
            "recipe": runs[0].recipe.get("recipe"),
            "runs": [str(run.folder) for run in runs],
            "seeds": [run.recipe.get("seed") for run in runs],
            "score": runs[0].score.name,
            "unit": runs[0].score.unit,
            "best_val": _spread(run.best.get(run.score.name) for run in runs if run.done),
            "test": _spread(run.test.get(run.score.name) for run in runs if run.done),
        }
        for own, runs in zip(fields, groups.values(), strict=True)
    ]


def _differs(name: str, settings: Sequence[dict[str, str]]) -> bool:
    return len({own.get(name) for own in settings}) > 1


def _spread(values: Iterable[Any]) -> dict[str, Any] | None:
    numbers = [found for value in values if (found := number(value)) is not None]
    if not numbers:
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "min": min(numbers), "max": max(numbers), "std": std}


def as_settings(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `by_setting` as aligned text: the mean over the seeds, then the smallest and the largest.

    A setting has a line of its own where that does not fit a terminal.
    """
    lines = [["seeds", "best val", "test"]]
    for row in rows:
        seeds = ",".join(map(str, row["seeds"]))
        lines.append([seeds, *(_spread_text(row[name], row) for name in ("best_val", "test"))])
    columns = [column for column in zip(*lines, strict=True) if any(cell != "-" for cell in column[1:])]
    texts = _setting_texts(rows)
    width = max(map(len, texts))
    together = width + sum(2 + max(map(len, column)) for column in columns) <= WIDTH
    columns.insert(0, tuple(text.ljust(width) if together else f"{text}\n" for text in texts))
    widths = [max(map(len, column)) for column in columns[1:]]
    lines = [[line[0], *map(str.ljust, line[1:], widths)] for line in zip(*columns, strict=True)]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _setting_texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A header, then each setting in words: all its fields, or where that fits no line those that tell it apart."""
    settings = [row["setting"] for row in rows]
    texts = [", ".join(f"{name}={value}" for name, value in own.items()) for own in settings]
    if max(map(len, texts)) > WIDTH:
        names = _distinguishing(settings)
        more = len({name for own in settings for name in own}) - len(names)
        texts = [", ".join(f"{name}={_end_of(own[name])}" for name in names if name in own) for own in settings]
        texts = [text + f", {more} more differ" * bool(more) for text in texts]
    return ["setting", *(text or str(row["recipe"]) for text, row in zip(texts, rows, strict=True))]


def _distinguishing(settings: Sequence[dict[str, str]]) -> list[str]:
    """Few fields by which no two settings are equal: always the one that tells most of them apart."""
    left, chosen = list(dict.fromkeys(name for own in settings for name in own)), list[str]()

    def kinds(name: str) -> int:
        return len({tuple(own.get(each) for each in (*chosen, name)) for own in settings})

    while left and (not chosen or kinds(chosen[-1]) < len(settings)):
        chosen.append(max(left, key=kinds))
        left.remove(chosen[-1])
    return chosen


def _end_of(value: str) -> str:
    """A short value, or the end of a long one, which tells paths apart."""
    return value if len(value) <= LONG else f"…{value[1 - LONG :]}"


def _spread_text(spread: dict[str, Any] | None, row: dict[str, Any]) -> str:
    if spread is None:
        return "-"
    text = Score(row["score"], unit=row["unit"]).text
    between = f" ({text(spread['min'])} to {text(spread['max'])})" if spread["std"] is not None else ""
    return f"{text(spread['mean'])}{between}"


def _plot(runs: Sequence[RunRecord], names: Sequence[str]) -> bytes:
    columns = 1 if max(map(len, names)) > 40 else 3
    scores = _scores(runs)
    figure = Figure(figsize=(11, 4.2 * len(scores) + 0.22 * math.ceil(len(runs) / columns)), layout="constrained")
    axes = dict(zip(scores, figure.subplots(len(scores), 2, sharey="row", squeeze=False), strict=True))
    max_length = max((row.get("seconds", 0) for run in runs for row in run.val), default=0)
    unit, seconds = next(u for u in UNITS if max_length >= u[1] * 3 or u[1] == 1)
    colours = matplotlib.colormaps["tab10" if len(runs) <= 10 else "turbo"]
    lines = []
    for place, run in enumerate(runs):
        by_step, by_time = axes[run.score]
        colour = colours(place if len(runs) <= 10 else place / (len(runs) - 1))
        name = run.score.name
        scored = [row for row in run.val if row.get(name) is not None]
        timed = [row for row in scored if row.get("seconds") is not None]
        lines.append(_line(by_step, [(row["step"], row[name]) for row in scored], colour))
        _line(by_time, [(row["seconds"] / seconds, row[name]) for row in timed], colour)
    for score, (by_step, by_time) in axes.items():
        what = score.label or score.name
        bare(by_step, f"validation {what} against steps")
        bare(by_time, f"validation {what} against time", unit)
        if score.unit == "%":
            by_step.yaxis.set_major_formatter(PercentFormatter(1.0))
    buffer = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        # With a leading space, since matplotlib ignores labels that start with an underscore.
        labels = [f" {printable(name)}" for name in names]
        figure.legend(lines, labels, loc="outside lower left", ncols=columns, fontsize=9, frameon=False)
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _line(axes: Axes, points: Sequence[tuple[float, float]], colour: Any) -> Line2D:
    marker = "o" if len(points) < 30 else ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return axes.plot(xs, ys, color=colour, linewidth=1.6, marker=marker, markersize=3.5)[0]
