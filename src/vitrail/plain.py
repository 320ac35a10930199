"""Dataclasses as plain data and back: what `config.json` and `recipe.json` hold."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def rebuild(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass of what `asdict` and JSON made of it: lists are tuples again, and nested dataclasses themselves.

    Fields that `values` lacks keep their defaults; one that `kind` does not know is a TypeError.
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
    """A dataclass as plain data, with the name that `kinds` gives its type under `kind`."""
    return {"kind": next(name for name, kind in kinds.items() if type(config) is kind), **asdict(config)}


def described(values: dict[str, Any], kinds: dict[str, type[T]], default: str) -> T:
    """What `describe` told of. Files from before there were kinds hold the `default`."""
    values = dict(values)
    return rebuild(kinds[values.pop("kind", default)], values)


def _tuples(value: Any) -> Any:
    """JSON has no tuples: its lists become tuples again."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
