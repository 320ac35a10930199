"""The fields that a recipe may set for a classifier, and the options of its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitrail.errors import UserError, require_choices
from vitrail.tasks.values import Settings


@dataclass(frozen=True)
class Classification(Settings):
    """Training settings of a classifier."""

    name = "classify"
    main = ("balanced", "smoothing")

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """training loss. softmax: cross-entropy; sigmoid: binary cross-entropy per class (DeiT-III)"""
    smoothing: float = 0.0
    """label smoothing"""
    hidden: int | None = None
    """width of the hidden tanh layer of the paper's pre-training head; None for a linear head"""
    weighted: bool = False
    """weight the loss of each class by the inverse of its frequency"""
    balanced: bool = False  # type: ignore[misc]
    """class-balanced sampling: draw each class equally often"""

    def __post_init__(self) -> None:
        require_choices(self)
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden must be at least 1, or None for a linear head, got {self.hidden}")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"smoothing must be at least 0 and below 1, got {self.smoothing}")
        if self.weighted and self.balanced:
            raise UserError(
                "weighted and balanced both compensate for rare classes: add --no-balanced or --no-weighted"
            )


@dataclass(frozen=True)
class ClassifyOptions:
    """Prediction options of a classifier."""

    top: int | None = None
    """number of classes to list per image, most probable first; None: 5 in tables and JSON, 3 as text"""
    flip: bool = False
    """average with the outputs for the image flipped left to right"""

    def __post_init__(self) -> None:
        if self.top is not None and self.top < 1:
            raise UserError(f"top must be at least 1, got {self.top}")
