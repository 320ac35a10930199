"""Dataclasses as plain data and back, for `config.json` and `recipe.json`, and their fields, for options."""

from __future__ import annotations

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


def _words(kind: Any) -> list[str]:
    """The choices of a field of this type, as text; empty if they are not a few words."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    if kind is bool:
        return ["True", "False"]
    if kind is type(None):
        return ["None"]
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


def described(values: dict[str, Any], kinds: dict[str, type[T]], default: str) -> T:
    """The inverse of `describe`. Files without a kind hold the `default`."""
    values = dict(values)
    return rebuild(kinds[values.pop("kind", default)], values)


def _tuples(value: Any) -> Any:
    """JSON has no tuples: turn its lists into tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
