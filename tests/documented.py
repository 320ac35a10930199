"""The commands that README, docs and the notebook show, in the order in which a reader meets them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))

PIECES = re.compile(
    r"```(?P<language>\w*)\n(?P<block>.*?)```"
    r"|<!-- table:(?P<table>\S+) -->\n(?P<rows>.*?)<!-- /table -->"
    r"|`(?P<code>[^`]+)`",
    re.DOTALL,
)
SHELLS = ("sh", "bash", "shell", "console")
PROGRAMS = ("vitrail", "python", ".venv/bin/python", "make", "pip")


@dataclass(frozen=True)
class Command:
    """A command as shown."""

    text: str
    whole: bool
    """shown in a block of its own, and not in prose, where `vitrail convert` may only name the command"""

    @property
    def words(self) -> list[str]:
        """Its words, without what sets the stage for them."""
        words = shlex.split(self.text, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        return words[3:] if words[:1] == ["taskset"] else words

    @property
    def program(self) -> str:
        return self.words[0] if self.words else ""


def units() -> dict[str, list[Command]]:
    """What is run in one folder, by name: a page, and apart from it each of its tables.

    Where no row of a table names a place to write to, each row stands alone.
    """
    found: dict[str, list[Command]] = {}
    for path in [*PAGES, *NOTEBOOKS]:
        page = found.setdefault(path.stem, [])
        for piece in PIECES.finditer(_text(path)):
            if piece["language"] in SHELLS:
                page += _lines(piece["block"])
            elif piece["table"]:
                rows = [_inline(row) for row in piece["rows"].splitlines()]
                name = f"{path.stem}: {piece['table']}"
                if any("--out" in command.text for row in rows for command in row):
                    found[name] = [command for row in rows for command in row]
                else:
                    found |= {f"{name}, {row[0].text.removeprefix('vitrail ')}": row for row in rows if row}
            elif piece["code"]:
                page += _inline(f"`{piece['code']}`")
    return {name: commands for name, commands in found.items() if commands}


def _text(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    texts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        shell = "\n".join(line[1:] for line in source.splitlines() if line.startswith("!"))
        texts.append(source if cell["cell_type"] == "markdown" else f"```sh\n{shell}\n```")
    return "\n\n".join(texts)


def _lines(block: str) -> Iterator[Command]:
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield Command(line.strip().removeprefix("$ "), whole=True)


def _inline(text: str) -> list[Command]:
    """The commands in the code of a text, with their continuation lines."""
    spans = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    commands = [Command(span, whole=False) for span in spans if " " in span and span.count("'") % 2 == 0]
    return [command for command in commands if command.program in PROGRAMS]


def variants(command: Command) -> list[list[str]]:
    """Its words without what stands in brackets, and with all of it."""
    if command.whole or "[" not in command.text:
        return [command.words]
    texts = re.sub(r"\s*\[[^\]]*\]", "", command.text), re.sub(r"[\[\]]", "", command.text)
    return [Command(text, command.whole).words for text in texts]
