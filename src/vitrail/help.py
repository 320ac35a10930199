"""Help for the fields of recipes and the options of tasks: the flag, its value, its meaning, in 80 columns."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from vitrail.plain import Field, flat_fields, rule

WIDTH, LEFT = 80, 30
"""columns of a terminal, and those of the flags with their values"""


def meanings(kind: type[Any]) -> dict[str, str]:
    """The text below each field of a dataclass and of those inside it, or the comment beside it."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            found |= _texts(base)
    for entry in fields(kind):
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if is_dataclass(default):
            found |= meanings(default if isinstance(default, type) else type(default))
    return found


def _texts(kind: type[Any]) -> dict[str, str]:
    """The texts of a class's own fields."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines, tree = source.splitlines(), ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        _, mark, comment = lines[(node.end_lineno or 0) - 1][node.end_col_offset or 0 :].partition("#")
        text = comment if mark and not comment.startswith(" type:") else ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = str(after.value.value)
        if text:
            found[node.target.id] = " ".join(text.split())
    return found


def value_text(value: Any) -> str:
    """A value as its flag takes it."""
    if isinstance(value, tuple):
        return " ".join(map(value_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def field_lines(
    known: Mapping[str, Field], texts: Mapping[str, str], notes: Mapping[str, str] | None = None, short: bool = False
) -> Iterator[str]:
    """The help of fields: two columns. `notes` stand in place of values; `short`: only the first sentence of a text."""
    for name, entry in known.items():
        flag = f"--{name.replace('_', '-')}"
        text = (_short if short else _whole)(texts.get(name, ""), entry)
        if notes and name in notes:
            text = f"{notes[name]}: {text}" if text else notes[name]
        elif entry.kind is bool:
            state = f"on ({flag.replace('--', '--no-')} turns it off)" if entry.value else "off"
            text = f"{state}: {text}" if text else state
        else:
            flag = f"{flag} {value_text(entry.value)}"
        yield from two_columns(flag, text)


def _whole(text: str, entry: Field) -> str:
    """The text of a field with its choices, or with what it may be."""
    if entry.words and not all(word in text for word in entry.words if word != "None"):
        return f"{text}{'. ' * bool(text)}One of {', '.join(entry.words)}"
    return text or ("" if entry.kind is bool else rule(entry.kind))


def _short(text: str, entry: Field) -> str:
    """The first sentence of a text, or the choices where it begins with what they mean."""
    for end in (". ", "; "):
        text = text.partition(end)[0]
    words = ", ".join(word for word in entry.words if word != "None")
    if any(text.startswith(f"{word}: ") for word in entry.words):
        return f"one of {words}"
    return text.removesuffix(".") + f": {words}" * bool(words)


def two_columns(left: str, text: str, width: int = LEFT) -> Iterator[str]:
    """A flag or a command, in a column of this width, and its meaning."""
    lines = textwrap.wrap(text, WIDTH - width, break_on_hyphens=False) or [""]
    if len(left) > width - 3:
        yield f"  {left}"
    else:
        yield f"  {left:<{width - 2}}{lines.pop(0)}".rstrip()
    for line in lines:
        yield f"{'':<{width}}{line}".rstrip()


def chosen(known: Mapping[str, Field], names: Iterable[str]) -> dict[str, Field]:
    """The named fields that there are, in the order of the names."""
    return {name: known[name] for name in names if name in known}


def options_help(kind: type[Any]) -> list[str]:
    """The help of a task's options."""
    return list(field_lines(flat_fields(kind()), meanings(kind)))


FIRST = """first steps, with one folder of images per class in the folder pets:
  vitrail train folder --data pets --out runs/pets
  vitrail predict photo.jpg --model runs/pets
  vitrail explain photo.jpg --model runs/pets --out looks"""


def overview(commands: Mapping[str, Any]) -> str:
    """The commands, one line each, and the first steps."""
    lines = ["vitrail: the Vision Transformer, from the paper's equations to production.\n"]
    for name, command in commands.items():
        what = (inspect.getdoc(command) or "").partition("\n")[0].partition(": `")[0].removesuffix(".")
        lines += two_columns(f"vitrail {name}", what, 19)
    return "\n".join([*lines, "", FIRST, "\n`vitrail COMMAND --help` lists a command's options."])
