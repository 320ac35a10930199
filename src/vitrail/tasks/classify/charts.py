"""The charts of a classifier's report: the confusion matrix and the calibration, as SVG in the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from vitrail.charts import Frame, axes, svg
from vitrail.units import number

# Maximum number of classes for numbers in the confusion matrix, for names, and for drawing it at all.
NUMBERED, NAMED, DRAWN = 25, 100, 250


def confusion_matrix(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The confusion matrix. Zero cells are not drawn, so the file stays small with 100 classes."""
    size = len(matrix)
    cell = 44 if size <= 10 else 30 if size <= NUMBERED else 14 if size <= 50 else 10
    font = min(13, max(cell - 2, 8)) if size <= NUMBERED else min(10, cell - 1)
    margin = 32 + int(0.62 * font * min(max(map(len, names)), 24)) if size <= NAMED else 24
    side = size * cell
    shapes = [f'<rect x="{margin}" y="{margin}" width="{side}" height="{side}" class="ground"/>']
    for i, row in enumerate(matrix):
        total = sum(row)
        for j, images in enumerate(row):
            if not images:
                continue
            x, y = margin + j * cell, margin + i * cell
            # One mistake among a thousand must be visible: colours start above the ground.
            depth = 0.12 + 0.88 * images / total
            what = "right" if i == j else f"predicted as {names[j]}"
            says = escape(f"{names[i]} {what}: {images} of {total}")
            box = f'x="{x}" y="{y}" width="{cell}" height="{cell}" fill-opacity="{depth:.3g}"'
            shapes.append(f'<rect {box} class="{"hit" if i == j else "miss"}"><title>{says}</title></rect>')
            if size <= NUMBERED:
                high = min(font, int(1.7 * cell / (len(str(images)) + 0.5)))
                at = f'x="{x + cell / 2}" y="{y + cell / 2}" text-anchor="middle" style="font-size: {high}px"'
                full = ' class="full"' if depth > 0.55 else ""
                shapes.append(f'<text {at}{full} pointer-events="none">{images}</text>')
    if size <= NAMED:
        for place, name in enumerate(names):
            middle, look = margin + place * cell + cell / 2, f'style="font-size: {font}px"'
            short = escape(name if len(name) <= 24 else name[:23] + "…")
            shapes.append(f'<text x="{margin - 5}" y="{middle}" {look} text-anchor="end">{short}</text>')
            turned = f"translate({middle} {margin - 5}) rotate(-90)"
            shapes.append(f'<text transform="{turned}" {look}>{short}</text>')
    whole, centre = margin + side + 6, margin + side / 2
    titles = 'class="axes" style="font-size: 13px" text-anchor="middle"'
    shapes.append(f'<text x="{centre}" y="9" {titles}>predicted class</text>')
    shapes.append(f'<text transform="translate(9 {centre}) rotate(-90)" {titles}>true class</text>')
    return (
        f'<div class="scroll"><svg viewBox="0 0 {whole} {whole}" width="{whole}" height="{whole}" class="matrix" '
        f'role="img" aria-label="confusion matrix" dominant-baseline="central">{"".join(shapes)}</svg></div>'
    )


def calibration(bins: Any) -> str:
    """The accuracy of the answers of each confidence, beside the diagonal on which a calibrated model lies.

    `bins` are those of `ClassifyMetric.compute`; empty if they are missing.
    """
    rows = [row for row in bins if isinstance(row, dict)] if isinstance(bins, list) else []
    found = [tuple(number(row.get(name)) for name in ("count", "confidence", "accuracy")) for row in rows]
    points = [(n, sure, right) for n, sure, right in found if n and sure is not None and right is not None]
    if not points:
        return ""
    total = sum(n for n, _, _ in points)
    frame = Frame((0.0, 100.0), (0.0, 1.0))
    (x0, y0), (x1, y1) = frame.at(0, 0), frame.at(100, 1)
    body = axes(frame, "confidence, %", lambda share: f"{100 * share:.0f} %")
    body += f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" class="axis" stroke-dasharray="4 4"/>'
    for n, sure, right in points:
        (x, y), (_, level) = frame.at(100 * sure, right), frame.at(100 * sure, sure)
        says = f"{n:.0f} images with a mean confidence of {sure:.1%}: {right:.1%} are right"
        gap = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{level:.1f}" style="stroke: var(--red)"/>'
        radius = 3 + 7 * (n / total) ** 0.5
        place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"'
        body += f'{gap}<circle {place} class="hit" fill-opacity=".75"><title>{escape(says)}</title></circle>'
    sure, right = (sum(row[0] * row[place] for row in points) / total for place in (1, 2))
    if abs(sure - right) < 0.02:
        verdict = "Its confidence matches its accuracy"
    else:
        verdict = f"On average it is {'too sure' if sure > right else 'not sure enough'}"
    says = (
        f"{verdict}: its mean confidence is {sure:.1%}, and {right:.1%} of its answers are right. Each disc is a group "
        "of images, the larger the more. A calibrated model lies on the dashed line; below it, it is too sure."
    )
    return f'<div class="charts">{svg("accuracy against confidence", body, "", says)}</div>'
