"""Classification. `task.py` has the task, `settings.py` the fields that a recipe may set, `metric.py` the scores.

`knn.py` and `linear_probe.py` fit heads to the features of a frozen encoder, and `probe.py` scores such features.
"""

from typing import TYPE_CHECKING

from vitrail.tasks.classify.settings import Classification
from vitrail.tasks.lazy import lazy

if TYPE_CHECKING:
    from vitrail.tasks.classify.task import Classes, Classify

__getattr__ = lazy(__name__, {"Classes": "task", "Classify": "task"})

__all__ = ["Classes", "Classification", "Classify"]
