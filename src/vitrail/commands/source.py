"""The model that a command's SOURCE names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitrail.tasks.task import Task


def load_model(
    source: str, device: str | None, revision: str | None, verify: bool = False, merge: Sequence[int] | None = None
) -> Task:
    """The model of a source on the chosen device."""
    from vitrail.train.device import choose_device
    from vitrail.zoo import load

    return load(source, device=choose_device(device), revision=revision, verify=verify, merge=merge)
