"""Semantic segmentation: the class of every pixel."""

from typing import TYPE_CHECKING

from vitrail.tasks.lazy import lazy
from vitrail.tasks.segment.settings import Inference, Segmentation

if TYPE_CHECKING:
    from vitrail.tasks.segment.task import Segment, Segments

__getattr__ = lazy(__name__, {"Segment": "task", "Segments": "task"})

__all__ = ["Inference", "Segment", "Segmentation", "Segments"]
