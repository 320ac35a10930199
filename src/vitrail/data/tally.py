"""The count of a set's bad images, and the fraction at which they are too many."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from vitrail.data.sets import ImageSet
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

SHOWN = 5
"""bad rows of a table that an error names"""


@dataclass
class Tally:
    """Counts bad images. The loaders of a set's splits may share one tally."""

    images: int
    bad: int = 0

    @classmethod
    def of(cls, set: ImageSet, max_bad: float) -> Tally:
        """The tally of a set, in which the bad rows of its table count. Raises UserError if these are too many."""
        rows = set.bad_rows
        tally = cls(len(set) + len(rows), len(rows))
        more = f"; and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        tally.check(set.name, max_bad, "; ".join(rows[:SHOWN]) + more)
        for reason in rows:
            log.warning(f"left out: {reason}")
        return tally

    def add(self, reason: str) -> None:
        self.bad += 1
        log.warning(f"left out: {reason}")

    def check(self, name: str, max_bad: float, why: str, remedy: str = ", or raise --max-bad") -> None:
        """Raise UserError if more than the fraction `max_bad` of the set `name` is bad. `why` names some errors."""
        if self.bad > max_bad * self.images:
            raise UserError(
                f"{self.bad} of {self.images} images of {name} are bad, more than {max_bad:.1%} ({why}): "
                f"repair or remove them{remedy}"
            )
