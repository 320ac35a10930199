"""The page of a run, and runs side by side. Nothing here knows a particular task: each adds its own sections."""

from vitrail.html import NO_SCORES
from vitrail.report.page import write_report
from vitrail.report.run import RunRecord, read_run

__all__ = ["NO_SCORES", "RunRecord", "read_run", "write_report"]
