"""Numbers as people read them: `97.50 %`, `1.23 M`, `2 min 5 s`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def number(value: Any) -> float | None:
    """A finite number; None for anything else, such as a missing entry of a log."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def median(values: Iterable[Any]) -> float | None:
    """The median of the finite numbers among the values; None if there is none."""
    numbers = sorted(found for value in values if (found := number(value)) is not None)
    return numbers[len(numbers) // 2] if numbers else None


def score_text(value: float) -> str:
    """A score with four digits that tell something: fractions as `0.9778`, others as `2.303`, `1e-06`, `12,345`."""
    size = abs(value)
    if size <= 1 and (size >= 1e-3 or size == 0):
        return f"{value:.4f}"
    return f"{value:,.0f}" if 1e4 <= size < 1e9 else f"{value:.4g}"


def percent(value: Any) -> str:
    """A fraction as a percentage; empty if it is not a number."""
    found = number(value)
    return "" if found is None else f"{100 * found:.2f} %"


def count(value: Any) -> str:
    """A number with at most four digits and a unit letter."""
    found = number(value)
    if found is None:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(found) >= size:
            return f"{found / size:.3g} {letter}"
    return f"{found:.3g}"


def duration(seconds: Any) -> str:
    """Seconds in readable units: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    found = number(seconds)
    if found is None:
        return ""
    if found < 60:
        return f"{found:.3g} s"
    whole = round(found)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def time_left(seconds: float) -> str:
    """An estimate in words that cannot be taken for a time of day: `40 s left`, `14 min left`, `2 h 5 min left`."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{round(seconds)} s left"
    if minutes < 60:
        return f"{minutes} min left"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min left" if hours < 24 else f"{hours // 24} d {hours % 24} h left"
