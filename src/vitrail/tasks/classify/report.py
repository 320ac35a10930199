"""The sections of a classifier's report: accuracy per class, confusion matrix, calibration, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vitrail.html import bar, card, evenly_spaced, example, note, worst
from vitrail.tasks.classify.charts import DRAWN, calibration, confusion_matrix
from vitrail.tasks.values import Section
from vitrail.units import number, percent

NAMED, FEW = 100, 8
"""maximum number of classes whose accuracies are listed, and of those in one table"""


def sections(run: Any) -> list[Section]:
    """The sections of a `vitrail.report.RunRecord`; empty if their entries are missing."""
    top5 = percent(run.final.get("top5")) if len(run.classes) > 5 else ""
    cards = [
        card(f"{run.split} top 5", top5, "among the first five guesses"),
        card("calibration error", percent(run.final.get("calibration_error")), "confidence against accuracy"),
    ]
    return [
        Section("", "".join(cards)),
        Section("Scores of each class", _per_class(run)),
        Section("Confusion matrix", _confusion(run)),
        Section("Calibration", calibration(run.final.get("calibration"))),
        Section("Worst mistakes", _worst(run)),
        Section("Example predictions", "".join(map(_example, evenly_spaced(run.examples)))),
    ]


def _worst(run: Any) -> str:
    shown = "".join(map(_example, worst(run.examples)))
    intro = f"The wrong answers of which the model is the most sure, of all {run.split} images."
    return note(f"{intro} Wrong labels are often among them.") + shown if shown else ""


def _example(row: Mapping[str, Any]) -> str:
    labels = row.get("labels")
    guesses = [g for g in (labels if isinstance(labels, list) else []) if isinstance(g, dict) and "label" in g][:3]
    if not guesses:
        return ""
    truth = row.get("truth")
    label = str(truth.get("label", "")) if isinstance(truth, dict) else ""
    right = str(guesses[0]["label"]) == label
    rows = "".join(bar(str(g["label"]), number(g.get("score")) or 0.0, str(g["label"]) == label) for g in guesses)
    mark = '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>, it is'
    look = "good" if right else "bad"
    return example(row.get("image"), f"{mark} {escape(label)}", f"<table>{rows}</table>", look)


def _per_class(run: Any) -> str:
    """Recall, precision and number of images of each class, the lowest recall first."""
    scores, matrix = run.final.get("per_class") or [], run.final.get("confusion")
    rows = [
        (_name(run, place), value, place) for place, score in enumerate(scores) if (value := number(score)) is not None
    ]
    if not rows:
        return ""
    rows.sort(key=lambda row: row[1])
    intro = (
        f"Recall (the bar) is the share of a class's {run.split} images that are predicted as it; precision is the "
        "share of its predictions that are right. Lowest recall first."
    )
    if len(rows) > NAMED:
        intro += f" The {NAMED} lowest of {len(rows)}."
        rows = rows[:NAMED]
    head = "<tr><th class=name>class</th><th class=bar></th>" + "".join(
        f"<th class=value>{name}</th>" for name in ("recall", "precision", "images")
    )
    lines = [bar(name, score, False, *_beside(matrix, place)) for name, score, place in rows]
    # Each of the tables side by side has the header.
    size = -(-len(lines) // 2) if len(lines) > FEW else len(lines)
    halves = [lines[start : start + size] for start in range(0, len(lines), size)]
    tables = "".join(f"<table>{head}</tr>{''.join(half)}</table>" for half in halves)
    return f'{note(intro)}<div class="classes">{tables}</div>'


def _beside(matrix: Any, place: int) -> tuple[str, str]:
    """Precision and number of images of a class, as texts; empty without a confusion matrix."""
    if not _square(matrix) or place >= len(matrix):
        return "", ""
    predicted = sum(row[place] for row in matrix)
    precision = f"{100 * matrix[place][place] / predicted:.1f}" if predicted else "–"
    return precision, f"{sum(matrix[place]):,}"


def _name(run: Any, place: int) -> str:
    return run.classes[place] if place < len(run.classes) else f"class {place}"


def _confusion(run: Any) -> str:
    matrix: Any = run.final.get("confusion")
    if not _square(matrix):
        return ""
    intro = drawn = ""
    if len(matrix) <= DRAWN:
        intro = note(
            "Rows are true classes, columns are predictions; the colour is the share of the row. Blue is right."
        )
        drawn = confusion_matrix(matrix, [_name(run, place) for place in range(len(matrix))])
    return f'{intro}<div class="pair">{drawn}<div>{_mistakes(run, matrix)}</div></div>'


def _square(matrix: Any) -> bool:
    return bool(matrix) and all(
        isinstance(row, list) and len(row) == len(matrix) and all(number(n) is not None for n in row) for row in matrix
    )


def _mistakes(run: Any, matrix: Sequence[Sequence[int]], most: int = 10) -> str:
    pairs = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j]
    if not pairs:
        return note("No mistakes.")
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = "".join(
        f"<tr><td>{escape(_name(run, i))}</td><td>{escape(_name(run, j))}</td>"
        f'<td class="value">{n} of {sum(matrix[i])}</td></tr>'
        for n, i, j in pairs[:most]
    )
    head = "<tr><th>true class</th><th>predicted</th><th>images</th></tr>"
    return f'<h3>Most frequent mistakes</h3><table class="plain">{head}{rows}</table>'
