"""`vitrail predict`: predictions for many files, and their output as rows of one file or figures in a folder."""

from vitrail.predictions.answers import Answered, answer_files
from vitrail.predictions.outputs import Entry, Output, output_to

__all__ = ["Answered", "Entry", "Output", "answer_files", "output_to"]
