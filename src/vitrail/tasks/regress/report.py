"""The sections of the report of a model of numbers: the error of each value, and images with their values."""

from __future__ import annotations

from html import escape
from typing import Any

from vitrail.html import card, example
from vitrail.tasks.regress.task import short
from vitrail.tasks.values import Section
from vitrail.units import number, score_text


def sections(run: Any) -> list[Section]:
    """The sections of a `vitrail.report.RunRecord`; empty if their entries are missing."""
    each = run.final.get("per_value") or []
    cards = [card(f"error of {row['name']}", score_text(row["mae"]), "mean absolute error") for row in each]
    return [
        Section("", "".join(cards)),
        Section("Example predictions", "".join(map(_example, run.examples))),
    ]


def _example(row: dict[str, Any]) -> str:
    """An image with its predicted values beside the true ones."""
    predicted, true = _values(row), _values(row.get("truth"))
    if not predicted:
        return ""
    head = "<tr><th></th><th>predicted</th><th>true</th></tr>"
    lines = "".join(
        f'<tr><td class="name" title="{escape(name)}">{escape(name)}</td><td>{short(value)}</td>'
        f"<td>{short(true[name]) if name in true else '–'}</td></tr>"
        for name, value in predicted.items()
    )
    return example(row.get("image"), "", f"<table>{head}{lines}</table>")


def _values(row: Any) -> dict[str, float]:
    """The numbers of a row of `examples.json`, or of its truth, by name."""
    listed = row.get("values") if isinstance(row, dict) else None
    found = [each for each in (listed if isinstance(listed, list) else []) if isinstance(each, dict)]
    return {str(each.get("name")): value for each in found if (value := number(each.get("value"))) is not None}
