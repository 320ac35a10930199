"""Tagging: any number of labels per image. `task.py` has the task, `metric.py` the scores, `settings.py` the fields."""

from vitrail.tasks.tag.settings import Tagging
from vitrail.tasks.tag.task import PredictedLabels, Tag

__all__ = ["PredictedLabels", "Tag", "Tagging"]
