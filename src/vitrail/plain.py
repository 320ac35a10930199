"""Dataclasses as plain data and back, for `config.json` and `recipe.json`, and their fields, for options."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class Field(NamedTuple):
    """A field of a dataclass, or of one inside it."""

    kind: Any
    """its type"""
    value: Any

    @property
    def words(self) -> list[str]:
        """Its choices, if they are few words; empty otherwise, and for a flag without a value."""
        return [] if self.kind is bool else _words(self.kind)


def flat_fields(value: Any) -> dict[str, Field]:
    """Every field of a dataclass and of those inside it, by name."""
    found: dict[str, Field] = {}
    hints = get_type_hints(type(value))
    for entry in fields(value):
        own = getattr(value, entry.name)
        found |= flat_fields(own) if is_dataclass(own) else {entry.name: Field(hints[entry.name], own)}
    return found


def read(kind: Any, words: Sequence[str]) -> Any:
    """The value of this type that the words of a command line give. ValueError if they do not."""
    if get_origin(kind) in (Union, UnionType):
        for member in sorted(get_args(kind), key=lambda member: member is not type(None)):  # None before text
            with suppress(ValueError):
                return read(member, words)
        raise ValueError
    if get_origin(kind) is tuple:
        members = get_args(kind)
        if Ellipsis in members:
            members = members[:1] * len(words)
        return tuple(read(member, [word]) for member, word in zip(members, words, strict=True))
    (word,) = words
    if choices := {str(value): value for value in _choices(kind)}:
        if word not in choices:
            raise ValueError
        return choices[word]
    return kind(word)


def rule(kind: Any) -> str:
    """What `read` accepts for this type, in words: "a whole number or None"."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(rule(member) for member in get_args(kind))
    if get_origin(kind) is tuple:
        members = get_args(kind)
        return f"{'any number of' if Ellipsis in members else len(members)} {NAMES[members[0]].split(' ', 1)[1]}s"
    return ", ".join(_words(kind)) or NAMES[kind]


NAMES = {int: "a whole number", float: "a number", str: "one word"}
"""what a field of a type holds"""


def _choices(kind: Any) -> tuple[Any, ...]:
    """The values of a type that has few."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return {bool: (True, False), type(None): (None,)}.get(kind, ())


def _words(kind: Any) -> list[str]:
    """The choices of a field of this type, as text; empty if they are not a few words."""
    if choices := _choices(kind):
        return [str(value) for value in choices]
    if get_origin(kind) in (Union, UnionType):
        members = [_words(member) for member in get_args(kind)]
        return [word for words in members for word in words] if all(members) else []
    return []


def rebuild(kind: type[T], values: dict[str, Any]) -> T:
    """The inverse of `asdict` and JSON: restores tuples and nested dataclasses.

    Missing fields keep their defaults; an unknown field is a TypeError.
    """
    hints = get_type_hints(kind)
    return kind(
        **{
            name: rebuild(hints[name], value)
            if isinstance(value, dict) and is_dataclass(hints.get(name))
            else _tuples(value)
            for name, value in values.items()
        }
    )


def describe(config: Any, kinds: dict[str, type[Any]]) -> dict[str, Any]:
    """A dataclass as plain data, with the name of its type in `kinds` under `kind`."""
    return {"kind": next(name for name, kind in kinds.items() if type(config) is kind), **asdict(config)}


def from_description(values: dict[str, Any], kinds: dict[str, type[T]], default: str) -> T:
    """The dataclass that `describe` made plain data of. Without a `kind` it is the one of the name `default`."""
    values = dict(values)
    return rebuild(kinds[values.pop("kind", default)], values)


def _tuples(value: Any) -> Any:
    """JSON has no tuples: turn its lists into tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
