"""The count of a set's bad images, and the fraction at which they are too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from vitrail.data.sets import ImageSet
from vitrail.errors import UserError

log = logging.getLogger("vitrail")

SHOWN = 5
"""bad images, or bad rows of a table, that an error names"""


@dataclass
class Tally:
    """Counts bad images. The loaders of a set's splits may share one tally."""

    images: int
    bad: int = 0

    @classmethod
    def of(cls, set: ImageSet, max_bad: float) -> Tally:
        """The tally of a set, in which the bad rows of its table count. Raises UserError if these are too many."""
        tally = cls(len(set) + len(set.bad_rows))
        tally.add(set.bad_rows, set.name, max_bad)
        return tally

    def add(self, reasons: Sequence[str], name: str, max_bad: float) -> None:
        """Count bad images of the set `name`, and log each.

        Raises UserError, which names a few, if more than the fraction `max_bad` of the set is bad.
        """
        self.bad += len(reasons)
        if reasons and self.bad > max_bad * self.images:
            why = "; ".join(reasons[:SHOWN]) + f"; and {len(reasons) - SHOWN:,} more" * (len(reasons) > SHOWN)
            raise UserError(
                f"{self.bad} of {self.images} images of {name} are bad, more than {max_bad:.1%} ({why}): "
                "repair or remove them, or raise --max-bad"
            )
        for reason in reasons:
            log.warning(f"left out: {reason}")
