"""The sections of the report of a model of several labels: examples, and the average precision of each label."""

from __future__ import annotations

from html import escape
from typing import Any

from vitrail.html import bar, card, example, note
from vitrail.tasks.values import Section
from vitrail.units import count, number, percent

MAX_BARS = 100
"""labels that are listed"""


def sections(run: Any) -> list[Section]:
    """The sections of a `vitrail.report.RunRecord`; empty if their entries are missing."""
    cards = [
        card("F1", percent(run.final.get("f1")), "mean over the labels, at the threshold"),
        card("images without a label", count(run.final.get("without_label")), f"of {count(run.final.get('count'))}"),
    ]
    return [
        Section("", "".join(cards)),
        Section("Example predictions", "".join(map(_example, run.examples))),
        Section("Average precision of each label", _per_label(run)),
    ]


def _example(row: dict[str, Any]) -> str:
    """An image with its labels: those predicted, of which the right ones are in bold, and those missed."""
    listed, truth = row.get("labels"), row.get("truth")
    found = [each for each in (listed if isinstance(listed, list) else []) if isinstance(each, dict)]
    own = truth.get("labels") if isinstance(truth, dict) else None
    if not isinstance(own, list):
        return ""
    names = [str(each.get("label")) for each in found]
    missed = [str(name) for name in own if name not in names]
    right = not missed and all(name in own for name in names)
    rows = "".join(
        bar(name, number(each.get("score")) or 0.0, name in own) for name, each in zip(names, found, strict=True)
    )
    mark = '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ not all right</span>'
    lacking = f"missed: {escape(', '.join(missed))}" if missed else "it has no label" * (not own)
    return example(row.get("image"), f"{mark} {lacking}", f"<table>{rows}</table>", "good" if right else "bad")


def _per_label(run: Any) -> str:
    pairs = zip(run.classes, run.final.get("per_class") or [], strict=False)
    rows = sorted(((value, name) for name, score in pairs if (value := number(score)) is not None))
    if not rows:
        return ""
    text = f"On the {run.final.get('split', 'scored')} split, lowest first."
    if len(rows) > MAX_BARS:
        text += f" The {MAX_BARS} lowest of {len(rows):,}."
    bars = "".join(bar(name, value, False) for value, name in rows[:MAX_BARS])
    return f'{note(text)}<div class="columns"><table>{bars}</table></div>'
