"""The sections of a segmenter's report: examples with their truth, IoU of each class, and what is confused."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from vitrail.html import bar, note
from vitrail.tasks.values import Section
from vitrail.units import number


def sections(run: Any, examples: Sequence[Section]) -> list[Section]:
    """The sections of a `vitrail.report.RunRecord`; `examples` is the default section of examples."""
    return [
        *examples,
        Section("IoU of each class", _per_class(run)),
        Section("Most frequent confusions", _confused(run)),
    ]


def _per_class(run: Any) -> str:
    rows = [(name, value) for name, score in _named(run) if (value := number(score)) is not None]
    if not rows:
        return ""
    bars = "".join(bar(name, score, False) for name, score in sorted(rows, key=lambda row: row[1]))
    told = note("Intersection over union of each class over all pixels of the split, lowest first.")
    return f'{told}<div class="columns"><table>{bars}</table></div>'


def _named(run: Any) -> list[tuple[str, Any]]:
    names, scores = run.test.get("classes"), run.test.get("iou")
    if not isinstance(names, list) or not isinstance(scores, list) or len(names) != len(scores):
        return []
    return [(str(name), score) for name, score in zip(names, scores, strict=True)]


def _confused(run: Any, most: int = 12) -> str:
    """The largest entries beside the diagonal, as shares of their true class."""
    names, matrix = [name for name, _ in _named(run)], run.test.get("confusion")
    if not names or not isinstance(matrix, list) or len(matrix) != len(names):
        return ""
    found = []
    for i, row in enumerate(matrix):
        total = sum(row)
        found += [(count / total, names[i], names[j]) for j, count in enumerate(row) if total and i != j and count]
    rows = "".join(
        f"<tr><td>{escape(true)}</td><td>{escape(predicted)}</td><td class=value>{share:.1%}</td></tr>"
        for share, true, predicted in sorted(found, reverse=True)[:most]
    )
    head = "<tr><th>true class</th><th>predicted as</th><th>share of its pixels</th></tr>"
    return f'<table class="plain">{head}{rows}</table>' if rows else ""
