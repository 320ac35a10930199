"""What to do with a model that another library cannot express: the lines of the writers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitrail.errors import UserError

KEPT = "keep it in vitrail's own layout (--to vitrail), which holds every model"


def no_place(library: str, nearest: str, differ: Mapping[str, tuple[Any, Any]]) -> UserError:
    """The line for a model whose fields `differ` from those of the `nearest` that `library` has.

    `differ` has for each field the model's value and the value that can be written.
    """
    fields = " and ".join(f"{name}={own!r}" for name, (own, _) in differ.items())
    flags = [_flag(name, value) for name, (_, value) in differ.items()]
    bare = [flag for flag, (_, value) in zip(flags, differ.values(), strict=True) if value == ()]
    alone = f" (with no value after {' and '.join(bare)})" if bare else ""
    return UserError(
        f"{library} has no place for {fields} (nearest: {nearest}): {KEPT}, or train one that can be written with "
        f"`vitrail train RECIPE {' '.join(flags)}`{alone}"
    )


def no_hidden_layer(library: str, hidden: int) -> UserError:
    """The line for a head in two layers."""
    return UserError(
        f"{library} has no place for the hidden layer of the pre-training head (hidden={hidden}): {KEPT}, write the "
        "encoder alone (vitrail.load(SOURCE, classes=0).save(FOLDER), then convert FOLDER), or train without --hidden"
    )


def _flag(name: str, value: Any) -> str:
    """The option of `vitrail train` that gives a field this value."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([f"--{name}", *map(str, values)])
