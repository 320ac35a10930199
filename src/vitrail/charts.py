"""Line charts for reports: values against steps, as SVG that takes its colours from the page and fits its width."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from vitrail.units import number

BLUE, RED, GREY = "var(--blue)", "var(--red)", "var(--soft)"
"""colours of a page's style (`vitrail.html.PAGE`), each readable on its light and its dark ground"""
POINTS = 600  # maximum points of a curve; more would not be visible
DOTTED = 30  # fewer points than this are drawn as dots too
Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 30
"""margins around the area of the curves; the left one holds eight characters, such as `0.001234`"""


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
    says: str = ""
    """what the curves tell, in a sentence or two"""


class Frame(NamedTuple):
    """Where values lie in a chart: the ranges of both axes."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a value in the SVG."""
        (x0, x1), (y0, y1) = self
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x - x0) / (x1 - x0)
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y0) / (y1 - y0)


def chart(panels: Sequence[Panel]) -> str:
    """The panels side by side, or below each other on a narrow page, without lines that have no points.

    Empty if none is left.
    """
    panels = [panel._replace(lines=[line for line in panel.lines if line.points]) for panel in panels]
    drawn = "".join(_panel(panel) for panel in panels if panel.lines)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _panel(panel: Panel) -> str:
    xs, ys = zip(*(point for line in panel.lines for point in line.points), strict=True)
    frame = Frame((min(0.0, *xs), max(xs) or 1.0), _range(min(ys), max(ys)))
    text = panel.text or plain
    body = axes(frame, "step", text) + "".join(_curve(frame, line) for line in panel.lines)
    if panel.mark is not None:
        (x, y), label = frame.at(*panel.mark), text(panel.mark[1])
        body += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="mark"/>'
        body += _label(x, y + (16 if y < HEIGHT / 2 else -9), label)
    names = [line for line in panel.lines if line.label] if len(panel.lines) > 1 else []
    legend = "".join(
        f'<span class="key"><i style="background: {line.colour}"></i>{line.label}</span>' for line in names
    )
    return svg(panel.title, body, legend, panel.says)


def svg(title: str, body: str, legend: str = "", says: str = "") -> str:
    """A chart with its title above, and its legend (HTML) and explanation below."""
    told = f"<p>{escape(says)}</p>" if says else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>{told}</figure>'
    )


def axes(frame: Frame, across: str, text: Callable[[float], str]) -> str:
    """Grid lines with their values, and the name of the x axis. `text` formats a value of the y axis."""
    found = []
    for value in ticks(*frame.y, 5):
        _, y = frame.at(frame.x[0], value)
        found.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        found.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{escape(_short(text(value)))}</text>')
    for value in ticks(*frame.x, 5):
        x, _ = frame.at(value, frame.y[0])
        found.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{plain(value)}</text>')
    base = HEIGHT - BOTTOM
    found.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" class="axis"/>')
    found.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(across)}</text>')
    return "".join(found)


def _curve(frame: Frame, line: Line) -> str:
    places = [frame.at(*point) for point in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline points="{path}" style="stroke: {line.colour}"/>' if len(places) > 1 else ""
    if len(places) < DOTTED:
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" style="fill: {line.colour}"/>' for x, y in places)
    return drawn


def _label(x: float, y: float, text: str) -> str:
    """A text at a point, on the side where there is room."""
    side, shift = ("end", -6) if x > WIDTH / 2 else ("start", 6)
    return f'<text x="{x + shift:.1f}" y="{y:.1f}" text-anchor="{side}" class="marked">{escape(text)}</text>'


def _range(low: float, high: float) -> tuple[float, float]:
    """A range that holds the values with some room, also where they are all equal."""
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low <= high / 2 else low - room), high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in a range, about `most`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(power * times for times in (1, 2, 5, 10) if (high - low) / (power * times) <= most)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plain(value: float) -> str:
    """A value as an axis shows it: `0.05`, `1,200`, `8.5e-4`."""
    if abs(value) >= 1000 and value == round(value):
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def _short(text: str) -> str:
    """Without the zeros after a decimal point that axes do not need: `80 %` for `80.00 %`."""
    whole, point, rest = text.partition(".")
    digits = rest.rstrip(" %")
    unit = rest[len(digits) :]
    return f"{whole}{point}{digits.rstrip('0')}".rstrip(".") + unit if point and digits.isdigit() else text


def bare(axes: Axes, title: str, across: str = "step") -> None:
    """The common style of charts that matplotlib draws."""
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
