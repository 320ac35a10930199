"""A value of the type that it must have: torch tells of a submodule only that it is a tensor or a module."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def checked(kind: type[T], value: object) -> T:
    assert isinstance(value, kind), f"a {type(value).__name__}, not a {kind.__name__}"
    return value
