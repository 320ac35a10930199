"""The sections of a captioner's report: scores, examples, and the fraction of identical captions."""

from __future__ import annotations

from html import escape
from typing import Any

from vitrail.charts import GREY, Line, Panel, chart, points
from vitrail.html import card, example
from vitrail.tasks.values import Score, Section
from vitrail.units import number, percent

OTHERS = ("bleu4", "rouge_l")
"""scores that are shown besides the one that chooses the best checkpoint"""
PEOPLE = 2
"""number of reference captions shown per image"""


def sections(run: Any) -> list[Section]:
    """The sections of a `vitrail.report.RunRecord`; empty if their entries are missing."""
    row, where = (run.final, run.split) if run.final else (run.best, "validation")
    cards = "".join(card(name, Score(name, unit="").text(number(row.get(name))), where) for name in OTHERS)
    panel = Panel(
        "share of the most common caption",
        [Line("", points(run.val, "identical"), GREY)],
        text=percent,
        says="A captioner that gives many images the same caption ignores them: lower is better.",
    )
    return [
        Section("", cards),
        Section("Example predictions", "".join(map(_example, run.examples))),
        Section("Variety", chart([panel])),
    ]


def _example(row: dict[str, Any]) -> str:
    if "caption" not in row:
        return ""
    truth = row.get("truth")
    texts = truth.get("captions") if isinstance(truth, dict) else None
    shown = texts[:PEOPLE] if isinstance(texts, list) else []
    people = "".join(f"<li dir=auto>{escape(str(text))}</li>" for text in shown)
    caption = f"<b dir=auto>{escape(str(row['caption'])) or 'no words'}</b><ul>{people}</ul>"
    return example(row.get("image"), caption)
