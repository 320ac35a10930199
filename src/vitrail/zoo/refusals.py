"""Error lines for models that another library cannot express, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitrail.errors import UserError

KEPT = "keep it in vitrail's own layout (--to vitrail), which holds every model"


def no_place(library: str, nearest: str, differ: Mapping[str, tuple[Any, Any]]) -> UserError:
    """The error for a model whose fields `differ` from those of the `nearest` model of `library`.

    `differ` has, per field, the model's value and the value that can be written.
    """
    fields = " and ".join(f"{name}={own!r}" for name, (own, _) in differ.items())
    flags = [_flag(name, value) for name, (_, value) in differ.items()]
    bare = [flag for flag, (_, value) in zip(flags, differ.values(), strict=True) if value == ()]
    alone = f" (with no value after {' and '.join(bare)})" if bare else ""
    return UserError(
        f"{library} cannot store {fields} (nearest: {nearest}): {KEPT}, or train one that can be written with "
        f"`vitrail train RECIPE {' '.join(flags)}`{alone}"
    )


def no_hidden_layer(library: str, hidden: int) -> UserError:
    """The error for a head with two layers."""
    return UserError(
        f"{library} cannot store the hidden layer of the pre-training head (hidden={hidden}): {KEPT}, write the "
        "encoder alone (vitrail.load(SOURCE, classes=0).save(FOLDER), then convert FOLDER), or train without --hidden"
    )


def _flag(name: str, value: Any) -> str:
    """The option of `vitrail train` that sets a field to this value."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([f"--{name}", *map(str, values)])
