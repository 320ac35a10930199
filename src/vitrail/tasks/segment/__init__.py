"""Semantic segmentation: the class of every pixel."""

from vitrail.tasks.segment.settings import Inference, Segmentation
from vitrail.tasks.segment.task import Segment, Segments

__all__ = ["Inference", "Segment", "Segmentation", "Segments"]
