"""Charts of reports: where values lie, and how they are written."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from vitrail.charts import BLUE, HEIGHT, LEFT, RIGHT, WIDTH, Frame, Line, Panel, chart, plain, ticks


def test_values_lie_between_the_edges() -> None:
    frame = Frame((0.0, 100.0), (1.0, 3.0))
    assert frame.at(0, 1)[0] == LEFT and frame.at(100, 1)[0] == WIDTH - RIGHT
    assert frame.at(0, 1)[1] > frame.at(0, 2)[1] > frame.at(0, 3)[1] > 0, "up is more"


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 17), (0.00012, 0.00034), (9000, 123456), (0.97, 0.971)])
def test_ticks_are_round_evenly_spaced_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high
    gaps = [after - before for before, after in pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
    assert re.fullmatch(r"[125]e[+-]\d+", f"{gaps[0]:.0e}")


def test_numbers_of_an_axis() -> None:
    assert [plain(value) for value in (0, 0.05, 1200, 1234.5, 8.5e-4, 1e-6, 60)] == [
        "0", "0.05", "1,200", "1234", "8.5e-4", "1e-6", "60"
    ]  # fmt: skip


@pytest.mark.parametrize("points", [[(0, 0)], [(5, 0.25)], [(0, 2), (7, 2)], [(1, -4), (2, 1e9)]])
def test_any_points_are_drawn_inside_the_chart(points: list[tuple[float, float]]) -> None:
    drawn = chart([Panel("a < b", [Line("", points, BLUE)])])
    for x, y in re.findall(r'<circle cx="([\d.-]+)" cy="([\d.-]+)"', drawn):
        assert LEFT <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT
    assert "nan" not in drawn and "a &lt; b" in drawn


@pytest.mark.parametrize("points", [[(1, 0.00123)], [(1, 0.001), (2, 0.00098)], [(1, 0.0305), (2, 0.0301)], [(1, 99)]])
def test_the_left_margin_holds_the_values_of_the_axis(points: list[tuple[float, float]]) -> None:
    drawn = chart([Panel("learning rate", [Line("", points, BLUE)])])
    labels = re.findall(r'text-anchor="end">([^<]+)</text>', drawn)
    wide = 6.7  # pixels of a digit in the widest font of the page's style
    assert len(labels) > 2 and max(map(len, labels)) * wide <= LEFT - 6


def test_without_points_there_is_no_chart() -> None:
    assert chart([Panel("loss", [Line("", [], BLUE)])]) == ""
