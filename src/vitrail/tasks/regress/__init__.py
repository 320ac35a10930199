"""Regression: `task.py` has the task, `metric.py` the scores, `report.py` the sections of a run's page."""

from vitrail.tasks.regress.task import Regress, Regression, Units, Values, units_of

__all__ = ["Regress", "Regression", "Units", "Values", "units_of"]
