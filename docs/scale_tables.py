"""Tables of `results/scale.json`: what an image costs over tokens, and images per second over devices."""

from __future__ import annotations

from typing import Any

Rows = dict[str, Any]


def tokens(rows: Rows | None) -> list[list[str]]:
    """The measured cost of an image by its number of tokens."""
    table = [["tokens", "ms per image", "compared with the first", "operations, compared with the first"]]
    if rows is None:
        return [*table, ["not measured", "", "", ""]]
    first = rows["measured"][0]
    for row in rows["measured"]:
        seconds, work = row["seconds per image"], row["operations per image"]
        ratios = seconds / first["seconds per image"], work / first["operations per image"]
        table.append([f"{row['tokens']:,}", f"{1000 * seconds:.1f}", *(f"{ratio:.3g}" for ratio in ratios)])
    return table


def devices(rows: Rows | None) -> list[list[str]]:
    """The simulated images per second, by model and number of devices."""
    found = [] if rows is None else rows["simulated"]
    counts = list(dict.fromkeys(row["devices"] for row in found))
    table = [["model", *(f"{count} device{'s' * (count > 1)}" for count in counts)]]
    if rows is None:
        return [["model"], ["not measured"]]
    for model in dict.fromkeys(row["model"] for row in found):
        own = {row["devices"]: row for row in found if row["model"] == model}
        cells = [f"{own[n]['images per second']:,} ({own[n]['share of perfect scaling']:.0%})" for n in counts]
        table.append([f"`{model}`", *cells])
    return table
