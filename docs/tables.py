"""Write the tables of README.md and docs/*.md, each between `<!-- table:NAME -->` and `<!-- /table -->`.

    python docs/tables.py            write them
    python docs/tables.py --check    change nothing; name the stale ones and end with 1

Their content comes from the code and from `results/*.json`. A file there holds
`{"command": ..., "commit": ..., "changed": ..., "machine": ..., "date": ..., "rows": {measure: value}}`, as
`bench/record.py` writes it; a value is a number, a text, or a dict or list of them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

MEASURES = {
    "digits": "digits from scratch",
    "classify": "the weights in the package, CIFAR-10",
    "cifar10-quick": "CIFAR-10 on a laptop",
    "training-step": "a training step beside timm",
    "loading": "loading photos beside torchvision",
    "folder": "ants and bees, `folder` as it stands",
    "startup": "the command line",
}
"""the files that the README shows, in order, and what each is about"""

MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def results() -> list[list[str]]:
    """What was measured, one row a measure."""
    rows = [["measure", "reached", "command"]]
    for name, title in MEASURES.items():
        found = _read(name)
        if found is None:
            rows.append([title, "not measured yet", ""])
            continue
        command = f"`{found['command']}`"
        for measure, value in found["rows"].items():
            if isinstance(value, list):
                continue  # single runs stay in the file
            rows.append([f"{title}: {measure}", _plain(value), command])
            command = "the same"
    return rows


def carried() -> list[list[str]]:
    """Scores of the weights in the package."""
    found = _read("classify")
    rows = [["measure", "reached"]]
    return rows + [[measure, _plain(value)] for measure, value in found["rows"].items()] if found else rows


def runs() -> list[list[str]]:
    """Where and when each file under `results/` was made."""
    rows = [["file", "command", "commit", "machine", "date"]]
    for path in sorted((ROOT / "results").glob("*.json")):
        found = json.loads(path.read_text())
        commit = f"`{found['commit'][:10]}`" + (" with changes" if found.get("changed") else "")
        link, command = f"[{path.name}](../results/{path.name})", f"`{found['command']}`"
        rows.append([link, command, commit, _plain(found["machine"]), found["date"][:10]])
    return rows


def recipes() -> list[list[str]]:
    """Command and first paragraph of every recipe."""
    from vitrail.recipes import RECIPES

    rows = [["what it is for", "command"]]
    for recipe in RECIPES.values():
        text = inspect.getdoc(recipe) or ""
        paragraph, _, rest = text.partition("\n\n")
        command = rest.partition("Command: ")[2].partition("\n")[0]
        rows.append([" ".join(paragraph.split()), f"`{command}`"])
    return rows


def sizes() -> list[list[str]]:
    """The named sizes, with the parameters of the encoder and of a head for 1000 classes."""
    import torch

    from vitrail.vit import SIZES, Head, ViT

    rows = [["size", "width", "depth", "heads", "patch", "image", "parameters"]]
    for name, c in SIZES.items():
        with torch.device("meta"):
            parts = [ViT(c), Head(c.width, 1000)]
        count = sum(p.numel() for part in parts for p in part.parameters())
        image = f"{c.image_size[0]} × {c.image_size[1]}"
        numbers = [str(n) for n in (c.width, c.depth, c.heads, c.patch)]
        rows.append([f"`{name}`", *numbers, image, f"{count:,}"])
    return rows


def parity() -> list[list[str]]:
    """Each of timm's architectures: sizes that were compared, and the largest relative differences."""
    rows = [["architecture", "sizes", "logits", "tokens"]]
    found = _read("parity-timm")
    for name, row in found["rows"].items() if found else ():
        sizes = row["sizes"]
        worst = [f"{max(size[kind] for size in sizes.values()):.1e}" for kind in ("logits", "tokens")]
        rows.append([f"`{name}`", ", ".join(sizes), *worst])
    return rows


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "results": results,
    "carried": carried,
    "runs": runs,
    "recipes": recipes,
    "sizes": sizes,
    "parity": parity,
}


def fresh(text: str) -> str:
    """The text with all its tables made again."""

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise SystemExit(f"no table {name!r}: choose from {', '.join(TABLES)}")
        header, *rows = TABLES[name]()
        return match[1] + "".join(map(_line, [header, ["---"] * len(header), *rows])) + match[3]

    return MARKED.sub(table, text)


def pages() -> list[Path]:
    cards = sorted((ROOT / "src" / "vitrail" / "zoo" / "weights").glob("*/CARD.md"))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *cards]


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
        print(f"{page.relative_to(ROOT)}: {'stale, run `make tables`' if check else 'written'}", file=sys.stderr)
    return int(check and stale > 0)


def _read(name: str) -> dict[str, Any] | None:
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _line(cells: list[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |\n"


def _plain(value: Any) -> str:
    """A value as it stands in a cell."""
    if isinstance(value, dict):
        return "; ".join(
            f"{name} ({_plain(part).replace(';', ',')})" if isinstance(part, dict) else f"{name} {_plain(part)}"
            for name, part in value.items()
        )
    if isinstance(value, list):
        return ", ".join(_plain(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
