"""Tables of `results/scale.json`: what an image costs over tokens, and images per second over devices.

And those of `results/shard-memory.json` and `results/hosts.json`: what --shard saves, and hosts that fail.
"""

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


def shard(rows: Rows | None) -> list[list[str]]:
    """The bytes per weight that a process holds between two steps, by optimizer and number of processes."""
    if rows is None:
        return [["optimizer"], ["not measured"]]
    counts = list(next(iter(rows.values())))
    heads = [f"{count} processes, `--shard`" if count != "1" else "1 process" for count in counts]
    return [["optimizer", *heads], *([name, *(f"{row[n]:.1f}" for n in counts)] for name, row in rows.items())]


def hosts(rows: Rows | None) -> list[list[str]]:
    """Runs of which one of two hosts failed: where they started again, and how they ended."""
    table = [["the host of rank 0", "started after the steps", "in processes", "weights", "validation loss"]]
    if rows is None:
        return [*table, ["not measured", "", "", "", ""]]
    losses = list(rows["undisturbed"]["validation loss of each seed"].values())
    table.append(["never fails; three seeds", "0", "2", "", ", ".join(f"{loss:.3f}" for loss in losses)])
    for name, row in rows.items():
        if name not in ("hosts", "undisturbed"):
            starts, processes = (", ".join(map(str, row[key])) for key in ("started from the steps", "processes"))
            same = "the same bits" if row["identical"] else "other roundings"
            table.append([name, starts, processes, same, f"{row['validation loss']:.3f}"])
    return table
