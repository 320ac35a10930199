"""Line charts for reports: values against steps, as SVG inside the page."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitrail.units import number

BLUE, RED, GREY = "#2563a8", "#c2410c", "#6b7280"
POINTS = 600  # maximum points of a curve; more would not be visible
Points = Sequence[tuple[float, float]]


class Line(NamedTuple):
    """A line of a panel."""

    label: str
    points: Points
    """(step, value)"""
    colour: str


class Panel(NamedTuple):
    """Curves that share their axes."""

    title: str
    lines: Sequence[Line]
    mark: tuple[float, float] | None = None
    """a highlighted point"""
    text: Callable[[float], str] | None = None
    """format of the values; plain numbers if None"""


def chart(panels: Sequence[Panel], alt: str) -> str:
    """The panels side by side, without lines that have no points; empty if none is left."""
    panels = [panel._replace(lines=[line for line in panel.lines if line.points]) for panel in panels]
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return ""
    figure = Figure(figsize=(4.2 * len(panels), 3.1), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel)
    wide = "wide" if len(panels) > 1 else "single"
    return f'<img class="{wide}" src="{_svg(figure)}" alt="{alt}">'


def _draw(axes: Axes, panel: Panel) -> None:
    for label, points, colour in panel.lines:
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 30 else ""
        axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3)
    if panel.mark is not None:
        x, y = panel.mark
        text = f"{y:.3g}" if panel.text is None else panel.text(y)
        axes.plot([x], [y], "o", color=RED, markersize=7, markerfacecolor="white")
        axes.annotate(text, (x, y), textcoords="offset points", xytext=(-4, -15), ha="right", fontsize=9, color=RED)
    if len(panel.lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    bare(axes, panel.title)


def bare(axes: Axes, title: str, across: str = "step") -> None:
    """The common style of all charts."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(across, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def points(rows: Iterable[Mapping[str, Any]], name: str) -> Points:
    """(step, value) of the rows of a log, averaged over neighbours if there are many."""
    found = [(float(row["step"]), value) for row in rows if (value := number(row.get(name))) is not None]
    size = math.ceil(len(found) / POINTS)
    if size < 2:
        return found
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _svg(figure: Figure) -> str:
    """A figure as a data URL. As a separate image, its ids cannot clash with those of another figure."""
    buffer = io.BytesIO()
    # Text stays text; a fixed salt and no date make the output of a run reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitrail"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
