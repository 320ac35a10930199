"""The sections of a segmenter's report: examples with their truth, IoU of each class, and what is confused."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitrail.data.rle import decode
from vitrail.html import bar, evenly_spaced, example, note, worst
from vitrail.tasks.segment.figures import colours, overlay
from vitrail.tasks.values import Section
from vitrail.units import number

VOID = -1
GAP = 8
"""pixels between truth and prediction"""


def sections(run: Any) -> list[Section]:
    """The sections of a `vitrail.report.RunRecord`."""
    return [
        Section("IoU of each class", _per_class(run)),
        Section("Most frequent confusions", _confused(run)),
        Section("Worst predictions", _examples(run, worst(run.examples))),
        Section("Example predictions", _examples(run, evenly_spaced(run.examples))),
    ]


def _examples(run: Any, rows: list[Mapping[str, Any]]) -> str:
    """The truth and the prediction of each example, side by side over its image."""
    names = [str(name) for name in run.final.get("classes", [])]
    shown = "".join(_pair(row, names) for row in rows)
    legend = "".join(
        f'<span class="key"><i style="background: rgb{colour}"></i>{escape(name)}</span>'
        for name, colour in zip(names, colours(len(names)), strict=True)
    )
    intro = note("Left: the ground truth; without a colour: void. Right: the prediction.")
    return f"{intro}<p>{legend}</p>{shown}" if shown else ""


def _pair(row: Mapping[str, Any], names: list[str]) -> str:
    try:
        image = Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")
        truth, found = (painted(each["segments"], names) for each in (row["truth"], row))
    except (LookupError, TypeError, ValueError, OSError):
        return ""  # a folder of another version, or a damaged one
    pair = Image.new("RGB", (2 * image.width + GAP, image.height), "white")
    for left, mask in ((0, truth), (image.width + GAP, found)):
        pair.paste(overlay(image, mask, len(names)), (left, 0))
    buffer = io.BytesIO()
    pair.save(buffer, "PNG")
    return example(base64.b64encode(buffer.getvalue()).decode(), escape(str(row.get("text", ""))), look="wide")


def painted(segments: list[dict[str, Any]], names: list[str]) -> Tensor:
    """Class numbers int32 [H, W] from the run-length code of each class; `VOID` elsewhere."""
    mask = torch.full(tuple(segments[0]["rle"]["size"]), VOID, dtype=torch.int32)
    for segment in segments:
        mask[decode(segment["rle"])] = names.index(segment["label"])
    return mask


def _per_class(run: Any) -> str:
    rows = [(name, value) for name, score in _named(run) if (value := number(score)) is not None]
    if not rows:
        return ""
    bars = "".join(bar(name, score, False) for name, score in sorted(rows, key=lambda row: row[1]))
    intro = note("Intersection over union of each class over all pixels of the split, lowest first.")
    return f'{intro}<div class="columns"><table>{bars}</table></div>'


def _named(run: Any) -> list[tuple[str, Any]]:
    names, scores = run.final.get("classes"), run.final.get("iou")
    if not isinstance(names, list) or not isinstance(scores, list) or len(names) != len(scores):
        return []
    return [(str(name), score) for name, score in zip(names, scores, strict=True)]


def _confused(run: Any, most: int = 12) -> str:
    """The largest entries beside the diagonal, as shares of their true class."""
    names, matrix = [name for name, _ in _named(run)], run.final.get("confusion")
    if not names or not isinstance(matrix, list) or len(matrix) != len(names):
        return ""
    found = []
    for i, row in enumerate(matrix):
        total = sum(row)
        found += [(count / total, names[i], names[j]) for j, count in enumerate(row) if total and i != j and count]
    rows = "".join(
        f"<tr><td>{escape(true)}</td><td>{escape(predicted)}</td><td class=value>{share:.1%}</td></tr>"
        for share, true, predicted in sorted(found, reverse=True)[:most]
    )
    head = "<tr><th>true class</th><th>predicted as</th><th>share of its pixels</th></tr>"
    return f'<table class="plain">{head}{rows}</table>' if rows else ""
