"""Write the tables of README.md and docs/*.md, each between `<!-- table:NAME -->` and `<!-- /table -->`.

    python docs/tables.py            write them
    python docs/tables.py --check    change nothing; name the stale ones and end with 1

Their content comes from the code and from `results/*.json` (see `table_data.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # a test loads this file from elsewhere

import caption_tables
import measure_tables
import model_tables
import scale_tables
import table_data
import task_table
from table_data import command_of, plain, rows_of

MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def runs() -> list[list[str]]:
    """Where and when each file under `results/` was made."""
    rows = [["file", "command", "commit", "machine", "date"]]
    for path in sorted((table_data.ROOT / "results").glob("*.json")):
        found = json.loads(path.read_text())
        commit = f"`{found['commit'][:10]}`" + (" with uncommitted changes" if found.get("changed") else "")
        link, command = f"[{path.name}](../results/{path.name})", f"`{command_of(found)}`"
        rows.append([link, command, commit, plain(found["machine"]), found["date"][:10]])
    return rows


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "tasks": task_table.tasks,
    "results": measure_tables.results,
    "goals": measure_tables.goals,
    "bundled": model_tables.bundled,
    "bundled-segment": partial(model_tables.bundled, "segment"),
    "captioner": caption_tables.captioner,
    "choosing": caption_tables.choosing,
    "sure": caption_tables.sure,
    "ideas": partial(caption_tables.trained, "caption-ideas"),
    "tried": caption_tables.tried,
    "runs": runs,
    "recipes": model_tables.recipes,
    "encoders": model_tables.encoders,
    "exports": model_tables.exports,
    "engines": model_tables.engines,
    "formats": model_tables.formats,
    "sizes": model_tables.sizes,
    "parity": model_tables.parity,
    **{f"parity-{name}": partial(model_tables.compared, name) for name in model_tables.PARITY},
    "baselines": model_tables.baselines,
    "ladder": caption_tables.ladder,
    "ladder-commands": caption_tables.ladder_commands,
    "load": model_tables.load,
    "transfer": measure_tables.transfer,
    "first-hour": measure_tables.first_hour,
    "folder": measure_tables.folder,
    "faithfulness": measure_tables.faithfulness,
    "segment": model_tables.segment,
    "scale-tokens": lambda: scale_tables.tokens(rows_of("scale")),
    "scale-devices": lambda: scale_tables.devices(rows_of("scale")),
    "scale-shard": lambda: scale_tables.shard(rows_of("shard-memory")),
    "scale-hosts": lambda: scale_tables.hosts(rows_of("hosts")),
}


def fresh(text: str) -> str:
    """The text with fresh tables."""

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise SystemExit(f"no table {name!r}: choose from {', '.join(TABLES)}")
        header, *rows = TABLES[name]()
        return match[1] + "".join(map(_line, [header, ["---"] * len(header), *rows])) + match[3]

    return MARKED.sub(table, text)


def pages() -> list[Path]:
    root = table_data.ROOT
    cards = sorted((root / "src" / "vitrail" / "zoo" / "weights").glob("*/CARD.md"))
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md")), *cards]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of README.md and docs/*.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 if a table is stale")
    check = parser.parse_args(arguments).check
    stale = 0
    for page in pages():
        old = page.read_text()
        new = fresh(old)
        if new == old:
            continue
        stale += 1
        if not check:
            page.write_text(new)
        print(
            f"{page.relative_to(table_data.ROOT)}: {'stale, run `make tables`' if check else 'written'}",
            file=sys.stderr,
        )
    return int(check and stale > 0)


def _line(cells: list[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |\n"


if __name__ == "__main__":
    sys.exit(main())
