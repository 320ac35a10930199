"""Reports and comparisons of runs. Nothing here depends on a particular task: tasks add their own sections."""

from vitrail.html import NO_SCORES
from vitrail.report.page import write_report
from vitrail.report.run import RunRecord, read_run

__all__ = ["NO_SCORES", "RunRecord", "read_run", "write_report"]
