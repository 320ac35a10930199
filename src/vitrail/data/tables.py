"""Tables with a header, in CSV: a line per row, whichever common mark is between the columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vitrail.data.lines import read_lines
from vitrail.errors import UserError


class Row(NamedTuple):
    """A row that is not empty."""

    line: int
    """its number in the file, from 1"""
    cells: list[str]
    """without spaces around them; there may be more or fewer than there are columns"""


class Table(NamedTuple):
    """The header and the rows of a file."""

    file: Path
    columns: list[str]
    """the header's names, as written but for spaces around them"""
    rows: list[Row]

    def where(self, row: Row) -> str:
        """The place of a row, for messages."""
        return f"{self.file}, line {row.line}"

    def find(self, names: Iterable[str]) -> int | None:
        """The column with the first of these names that there is, in upper or lower case; None if there is none."""
        lower = [name.lower() for name in self.columns]
        return next((lower.index(name) for name in names if name in lower), None)


def read_table(file: Path, marks: str = ",\t;") -> Table:
    """A table whose columns are separated by the first of these `marks` in its header.

    Cells may be quoted. Raises UserError for a file that is empty or not text, and for a quote that is not closed.
    """
    lines = read_lines(file)
    start = next((i for i, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise UserError(f"{file} is empty: its first line must name its columns")
    mark = re.search(f"[{re.escape(marks)}]", lines[start])
    # With a line's end, by which the reader would continue a quoted cell in the next line.
    reader = csv.reader(
        (f"{line}\n" for line in lines[start:]), delimiter=mark[0] if mark else marks[0], skipinitialspace=True
    )
    rows: list[Row] = []
    end = start
    try:
        for cells in reader:
            number, end = end + 1, start + reader.line_num
            if end > number:
                raise UserError(f"{file}, line {number}: a quote is not closed in this line: close it, or remove it")
            if any(cell.strip() for cell in cells):
                rows.append(Row(number, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise UserError(f"{file}, line {start + reader.line_num}: {error}") from None
    if not rows:
        raise UserError(f"{file} has rows of empty cells only: its first line must name its columns")
    return Table(file, rows[0].cells, rows[1:])
