"""The page of an explanation: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from vitrail.explain.explanation import Explanation
from vitrail.explain.overlay import HEAT
from vitrail.explain.packing import jpeg
from vitrail.files import printable


def page(found: Explanation, source: str, figures: Mapping[str, bytes], says: Mapping[str, str], view: str) -> bytes:
    """The HTML of an explanation of the image `source`, with figures (PNG by name) and what they show.

    `view` is what the image is shown under at first.
    """
    folder = files("vitrail.explain")
    html = folder.joinpath("page.html").read_text(encoding="utf-8")
    drawn = "".join(_figure(name, says[name], figures[name]) for name in says if name in figures)
    filled = html.format(
        title=escape(source),
        answer=escape(found.text),
        source=escape(source),
        tables="".join(_table(rows) for rows in found.row.values() if is_table(rows)),
        lens=_lens(found.facts.get("lens", [])),
        figures=drawn,
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in found.notes),
        data=_data(found, view),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
    )
    return printable(filled).encode()


def _data(found: Explanation, view: str) -> str:
    """What the page's script reads, safe inside of a script element."""
    drawn = ("answer", "text", "lens", "notes")  # which stand in the HTML
    told = {name: value for name, value in found.packed().items() if name not in drawn}
    told["colours"] = bytes(HEAT(np.arange(256), bytes=True)[:, :3].reshape(-1)).hex()
    return json.dumps({**told, "view": view}).replace("<", "\\u003c")


def _figure(name: str, says: str, data: bytes) -> str:
    title, _, rest = says.partition(": ")
    rest = rest[:1].upper() + rest[1:]
    kind, data = _smaller(data)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return (
        f'<section class="pane"><h2>{escape(title)}</h2><figure><figcaption>{escape(rest)}</figcaption>'
        f'<img src="{source}" alt="{escape(title)}" data-file="{escape(name)}"></figure></section>\n'
    )


def _smaller(data: bytes) -> tuple[str, bytes]:
    """The bytes of a PNG, or as a JPEG, which is much smaller for photos."""
    with Image.open(io.BytesIO(data)) as opened:
        as_jpeg = jpeg(np.asarray(opened.convert("RGB")))
    return ("jpeg", as_jpeg) if len(as_jpeg) < len(data) else ("png", data)


def is_table(value: Any) -> bool:
    """Whether a value of an answer is a list of rows."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def named_shares(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The rows of an answer that are a name and a share from 0 to 1, such as a class and its probability."""
    for rows in row.values():
        if not is_table(rows):
            continue
        found = []
        for entry in rows:
            names = [value for value in entry.values() if isinstance(value, str)]
            shares = [value for value in entry.values() if isinstance(value, float) and 0 <= value <= 1]
            if len(names) != 1 or len(shares) != 1:
                break
            found.append((names[0], shares[0]))
        else:
            return found
    return []


def _table(rows: list[dict[str, Any]]) -> str:
    columns = [name for name, value in rows[0].items() if isinstance(value, str | int | float)]
    bars = dict(named_shares({"rows": rows}))
    lines = []
    for row in rows:
        cells = "".join(_cell(row[name]) for name in columns if name in row)
        share = bars.get(next((value for value in row.values() if isinstance(value, str)), ""))
        bar = "" if share is None else f'<td class="share"><i style="width:{100 * share:.1f}%"></i></td>'
        lines.append(f"<tr>{cells}{bar}</tr>")
    numeric = (' class="number"' if isinstance(rows[0][name], int | float) else "" for name in columns)
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(columns, numeric, strict=True)) + (
        "<th></th>" if bars else ""
    )
    return f'<section class="pane scroll"><h2>The answer</h2><table><tr>{head}</tr>{"".join(lines)}</table></section>\n'


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return (
            f'<td class="number">{value:,.4g}</td>'
            if isinstance(value, float)
            else f'<td class="number">{value:,}</td>'
        )
    return f"<td dir=auto>{escape(str(value))}</td>"


def _lens(lens: list[dict[str, Any]]) -> str:
    """The answer after each layer."""
    if not lens:
        return ""
    rows = []
    for entry in lens:
        best = named_shares(entry["answer"])[:1]
        bar = "".join(f'<td class="share"><i style="width:{100 * share:.1f}%"></i></td>' for _, share in best)
        rows.append(f'<tr><td class="number">{entry["layer"]}</td><td dir=auto>{escape(entry["text"])}</td>{bar}</tr>')
    return (
        '<section class="pane scroll"><h2>Layer by layer</h2><p class="soft">What the model would answer if its '
        "encoder ended after each layer (the logit lens). Only the last answer is one that it was trained to give.</p>"
        f"<table><tr><th>layer</th><th>answer</th></tr>{''.join(rows)}</table></section>\n"
    )
