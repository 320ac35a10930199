"""The fields that a recipe may set for a model of several labels, and the options of its answers."""

from __future__ import annotations

from dataclasses import dataclass

from vitrail.errors import UserError
from vitrail.tasks.values import Settings


@dataclass(frozen=True)
class Tagging(Settings):
    """Training settings of a model of several labels."""

    name = "tag"

    smoothing: float = 0.0
    """label smoothing: the goals of a label are smoothing / 2 and 1 - smoothing / 2, instead of 0 and 1"""
    hidden: int | None = None
    """width of the hidden tanh layer of the paper's pre-training head; None for a linear head"""

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden must be at least 1, or None for a linear head, got {self.hidden}")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"smoothing must be at least 0 and below 1, got {self.smoothing}")


@dataclass(frozen=True)
class TagOptions:
    """Prediction options of a model of several labels."""

    threshold: float = 0.5
    """list the labels whose probability is at least this; the score `f1` counts them too"""
    top: int | None = None
    """the most labels to list per image, most probable first; None: all above the threshold"""
    flip: bool = False
    """average with the outputs for the image flipped left to right"""

    def __post_init__(self) -> None:
        if self.top is not None and self.top < 1:
            raise UserError(f"top must be at least 1, got {self.top}")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold must be a fraction from 0 to 1, got {self.threshold}")
