"""The files under `results/`, and how their values are written in tables.

A file holds `{"command": ..., "commit": ..., "changed": ..., "machine": ..., "date": ..., "rows": {measure: value}}`,
as `record` in `bench/harness.py` writes it; a value is a number, a text, or a dict or list of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Rows = dict[str, Any]
"""what a file under `results/` holds by measure"""


def read(name: str) -> dict[str, Any] | None:
    """The content of `results/NAME.json`; None if it was not measured."""
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def command_of(found: dict[str, Any]) -> str:
    """The command that made a file of results; data lies in `data`, wherever it lay then."""
    return str(found["command"]).replace("../shared/data", "data")


def rows_of(name: str) -> Rows | None:
    """The rows of `results/NAME.json`; None if it was not measured."""
    found = read(name)
    return None if found is None else found["rows"]


def seeds(rows: Rows) -> str:
    """Mean, range and time of a series of `bench/seeds.py`."""
    scores = [run["top1"] for run in rows["runs"]]
    minutes: dict[int, list[float]] = {}
    for run in sorted(rows["runs"], key=lambda run: -int(run["cores"])):
        minutes.setdefault(run["cores"], []).append(run["wall_seconds"] / 60)
    spans = (
        " to ".join(dict.fromkeys([f"{min(each):.1f}", f"{max(each):.1f}"]))
        + f" minutes on {'one core' if cores == 1 else f'{cores} cores'}"
        for cores, each in minutes.items()
    )
    spread = f" ({min(scores):.2%} to {max(scores):.2%})" if len(scores) > 1 else ""
    seeds = f"{len(scores)} seeds" if len(scores) > 1 else "one seed"
    told = ", by an earlier version of the recipe" * changed(rows)
    return f"{rows['mean_top1']:.2%}{spread}, {seeds}, {', '.join(spans)}{told}"


def changed(rows: Rows) -> bool:
    """Whether the recipe of a series of `bench/seeds.py` has changed since; older series do not tell."""
    from vitrail.recipes import RECIPES

    return "recipe" in rows and rows["recipe"] != RECIPES[rows["train"].split()[2]](50_000).fingerprint


def plain(value: Any) -> str:
    """A value as a cell shows it."""
    if isinstance(value, dict):
        return "; ".join(
            f"{name} ({plain(each).replace(';', ',')})" if isinstance(each, dict) else f"{name} {plain(each)}"
            for name, each in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
