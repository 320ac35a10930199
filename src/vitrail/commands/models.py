"""`vitrail models`: what to start from."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from vitrail import recommended
from vitrail.options import Parser
from vitrail.units import count

WIDTH = 80
"""columns of the text"""


def models(args: Sequence[str]) -> int:
    """List recommended encoders per task, the bundled weights, and what `--init` and `--model` read."""
    parser = Parser("models", models)
    parser.add_argument("task", nargs="?", choices=recommended.tasks(), help="only the encoders for this task")
    parser.add_argument("--json", action="store_true", help="print one object per line for each row")
    options = parser.parse_args(args)
    rows = recommended.rows(options.task)
    print("\n".join(map(json.dumps, rows) if options.json else lines(rows)))
    return 0


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as text for people."""
    for tasks, own in same_encoders([row for row in rows if row["kind"] == "encoder"]):
        yield from (f"{task}: {recommended.choice(task).command}" for task in tasks)
        for row in own:
            yield f"  {row['source'] if row['revision'] is None else shorter(row)}"
            pinned = "" if row["revision"] else ", unpinned"
            size = (
                f"{count(row['parameters'])} parameters, {row['weights_mb']:.0f} MB, trains in {row['train_gb']:.1f} GB"
            )
            yield f"    {size}, {row['licence']}, {row['learned']}{pinned}"
        yield ""
    yield from wrap(
        "MB: the weights in float32, about what prediction needs. GB: to train all of them with 32 images of 224 "
        "pixels; --method lora or linear needs less. SOURCE@COMMIT is pinned: it always means the same weights. "
        "The last word says what they learned from."
    )
    if not (own := [row for row in rows if row["kind"] == "bundled"]):
        return
    yield "\nBundled, without a download:"
    for row in own:
        yield f"  {row['source']:<10} {row['weights_mb']:>4.1f} MB  {row['command']}"
        yield f"    {row['licence']}"
    yield "\nWhat --init, --model and vitrail.load read:"
    for row in rows:
        if row["kind"] == "format":
            text = row["reads"].replace("`", "").replace("[parity.md](parity.md)", "docs/parity.md")
            yield from wrap(f"{row['format'].replace('`', '')}: {text}", "  ", "      ")


def same_encoders(rows: Sequence[dict[str, Any]]) -> list[tuple[list[str], list[dict[str, Any]]]]:
    """Tasks that follow one another with the same encoders, and the rows of these."""
    found: list[tuple[list[str], list[dict[str, Any]]]] = []
    for task, group in itertools.groupby(rows, key=lambda row: row["task"]):
        own = list(group)
        if found and [row["source"] for row in found[-1][1]] == [row["source"] for row in own]:
            found[-1][0].append(task)
        else:
            found.append(([task], own))
    return found


def shorter(row: dict[str, Any]) -> str:
    """The source with seven digits of its commit, which the Hub takes as well."""
    name, _, commit = row["source"].partition("@")
    return f"{name}@{commit[:7]}"


def wrap(text: str, first: str = "", later: str = "") -> list[str]:
    """Lines that fit a terminal."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
