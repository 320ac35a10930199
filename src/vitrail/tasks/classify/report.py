"""The sections of a classifier's report: accuracy overall and per class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from vitrail.html import bar, card, example
from vitrail.tasks.values import Section
from vitrail.units import number, percent

BLUE, RED = "#2563a8", "#c2410c"
# Maximum number of classes for numbers in the confusion matrix, for names, and for drawing it at all.
NUMBERED, NAMED, DRAWN = 25, 100, 250


def sections(run: Any) -> list[Section]:
    """The sections of a `vitrail.report.RunRecord`; empty if their entries are missing."""
    cards = [
        card(
            "test top 5", percent(run.test.get("top5")) if len(run.classes) > 5 else "", "among the first five guesses"
        ),
        card("calibration error", percent(run.test.get("calibration_error")), "confidence against accuracy"),
    ]
    return [
        Section("", "".join(cards)),
        Section("Example predictions", "".join(map(_example, run.examples))),
        Section("Accuracy of each class", _per_class(run)),
        Section("Confusion matrix", _confusion(run)),
    ]


def _example(row: dict[str, Any]) -> str:
    labels = row.get("labels")
    guesses = [g for g in (labels if isinstance(labels, list) else []) if isinstance(g, dict) and "label" in g][:3]
    if not guesses:
        return ""
    truth = row.get("truth")
    label = str(truth.get("label", "")) if isinstance(truth, dict) else ""
    right = str(guesses[0]["label"]) == label
    rows = "".join(bar(str(g["label"]), number(g.get("score")) or 0.0, str(g["label"]) == label) for g in guesses)
    mark = '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>'
    look = "good" if right else "bad"
    return example(row.get("image"), f"{mark} {escape(label)}", f"<table>{rows}</table>", look)


def _per_class(run: Any) -> str:
    scores = run.test.get("per_class") or []
    rows = [(_name(run, place), value) for place, score in enumerate(scores) if (value := number(score)) is not None]
    if not rows:
        return ""
    rows.sort(key=lambda row: row[1])
    note = "Percentage of each class's test images that are predicted correctly, lowest first."
    if len(rows) > NAMED:
        note += f" The {NAMED} lowest of {len(rows)}."
        rows = rows[:NAMED]
    bars = "".join(bar(name, score, False) for name, score in rows)
    return f'<p class="note">{note}</p><div class="columns"><table>{bars}</table></div>'


def _name(run: Any, place: int) -> str:
    return run.classes[place] if place < len(run.classes) else f"class {place}"


def _confusion(run: Any) -> str:
    matrix: Any = run.test.get("confusion")
    if not _square(matrix):
        return ""
    body = []
    if len(matrix) <= DRAWN:
        body.append(
            '<p class="note">Rows are true classes, columns are predictions. The colour is the fraction of the row. '
            "Point at a cell to read it.</p>"
        )
        body.append(_matrix(matrix, [_name(run, place) for place in range(len(matrix))]))
    body.append(_mistakes(run, matrix))
    return "".join(body)


def _square(matrix: Any) -> bool:
    return bool(matrix) and all(
        isinstance(row, list) and len(row) == len(matrix) and all(number(n) is not None for n in row) for row in matrix
    )


def _matrix(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The confusion matrix as SVG. Zero cells are not drawn, so the file stays small with 100 classes."""
    size = len(matrix)
    cell = 44 if size <= 10 else 30 if size <= NUMBERED else 14 if size <= 50 else 10
    font = min(13, max(cell - 2, 8)) if size <= NUMBERED else min(10, cell - 1)
    margin = 14 + int(0.62 * font * min(max(map(len, names)), 24)) if size <= NAMED else 6
    side = size * cell
    shapes = [f'<rect x="{margin}" y="{margin}" width="{side}" height="{side}" fill="#fafafa" stroke="#ddd"/>']
    for i, row in enumerate(matrix):
        total = sum(row)
        for j, images in enumerate(row):
            if not images:
                continue
            x, y = margin + j * cell, margin + i * cell
            # One mistake among a thousand must be visible: colours start above white.
            depth = 0.12 + 0.88 * images / total
            fill = _mix(BLUE if i == j else RED, depth)
            what = "right" if i == j else f"predicted as {names[j]}"
            says = escape(f"{names[i]} {what}: {images} of {total}")
            box = f'x="{x}" y="{y}" width="{cell}" height="{cell}"'
            shapes.append(f'<rect {box} fill="{fill}"><title>{says}</title></rect>')
            if size <= NUMBERED:
                ink = "#fff" if depth > 0.55 else "#222"
                high = min(font, int(1.7 * cell / (len(str(images)) + 0.5)))
                at = f'x="{x + cell / 2}" y="{y + cell / 2}" text-anchor="middle"'
                shapes.append(f'<text {at} font-size="{high}" fill="{ink}" pointer-events="none">{images}</text>')
    if size <= NAMED:
        for place, name in enumerate(names):
            middle = margin + place * cell + cell / 2
            short = escape(name if len(name) <= 24 else name[:23] + "…")
            shapes.append(f'<text x="{margin - 5}" y="{middle}" font-size="{font}" text-anchor="end">{short}</text>')
            turned = f"translate({middle} {margin - 5}) rotate(-90)"
            shapes.append(f'<text transform="{turned}" font-size="{font}">{short}</text>')
    whole = margin + side + 6
    return (
        f'<div class="scroll"><svg viewBox="0 0 {whole} {whole}" width="{whole}" height="{whole}" role="img" '
        f'aria-label="confusion matrix" fill="#222" dominant-baseline="central">{"".join(shapes)}</svg></div>'
    )


def _mix(colour: str, depth: float) -> str:
    """A colour with this opacity on white."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (value - 255) * depth):02x}" for value in channels)


def _mistakes(run: Any, matrix: Sequence[Sequence[int]], most: int = 10) -> str:
    pairs = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j]
    if not pairs:
        return '<p class="note">No mistakes.</p>'
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = "".join(
        f"<tr><td>{escape(_name(run, i))}</td><td>{escape(_name(run, j))}</td>"
        f'<td class="value">{n} of {sum(matrix[i])}</td></tr>'
        for n, i, j in pairs[:most]
    )
    head = "<tr><th>true class</th><th>predicted</th><th>images</th></tr>"
    return f'<h3>Most frequent mistakes</h3><table class="plain">{head}{rows}</table>'
