"""HTML snippets for the reports of runs. All given texts are escaped here."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

NO_SCORES = "its scores say nothing about the model"  # of a fast dev run


def section(title: str, body: str) -> str:
    """A section of a page; empty without a body."""
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def card(label: str, value: str, note: str = "") -> str:
    """A value in large letters at the top of a page; empty without a value."""
    body = f"<b>{escape(value)}</b><span>{escape(label)}</span><small>{escape(note)}</small>"
    return f'<div class="card">{body}</div>' if value else ""


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def bar(name: str, value: float, strong: bool) -> str:
    """A table row: a name, a bar for `value` from 0 to 1, and its percentage."""
    width = 100 * min(max(value, 0.0), 1.0)
    return (
        f'<tr{" class=strong" if strong else ""}><td class="name" title="{escape(name)}">{escape(name)}</td>'
        f'<td class="bar"><i style="--share:{width:.1f}%"></i></td><td class="value">{100 * value:.1f}</td></tr>'
    )


def example(image: Any, caption: str, body: str = "", look: str = "plain") -> str:
    """An image with HTML below it. `image` is a PNG in base64; empty if it is not.

    `look` is `good` or `bad` for answers that are right or wrong, `plain` for others, and `wide` for large images.
    """
    try:
        there = bool(image) and bool(base64.b64decode(str(image), validate=True))
    except (binascii.Error, ValueError):
        there = False
    if not there:
        return ""
    shown = f'<img src="data:image/png;base64,{image}" alt="">'
    return f'<figure class="example {look}">{shown}<figcaption>{caption}</figcaption>{body}</figure>'


def examples(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of a run's `examples.json`: their figures, or their images where they have none, with their text."""
    shown = ((row.get("figure") or row.get("image"), escape(str(row.get("text", "")))) for row in rows)
    return "".join(example(image, text) for image, text in shown)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: training report</title>
<style>
:root {{ color-scheme: light }}
body {{ font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1f2430; background: #f4f5f7;
       margin: 0 }}
main {{ max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }}
h1 {{ margin: 0; font-size: 1.9rem }} h2 {{ margin: 0 0 .75rem; font-size: 1.2rem }} h3 {{ font-size: 1rem }}
.note {{ color: #5b6270; margin: 0 0 1rem }}
section {{ background: #fff; border: 1px solid #e3e5ea; border-radius: 10px; padding: 1.25rem 1.5rem;
          margin-top: 1.25rem }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.25rem 0 }}
.card {{ background: #fff; border: 1px solid #e3e5ea; border-radius: 10px; padding: .8rem 1rem; display: flex;
        flex-direction: column }}
.card b {{ font-size: 1.35rem; white-space: nowrap }} .card small {{ color: #5b6270 }}
pre {{ background: #1f2430; color: #f4f5f7; padding: .7rem 1rem; border-radius: 8px; white-space: pre-wrap;
      overflow-wrap: anywhere; margin: .5rem 0 }}
.wide {{ width: 100% }} .single {{ width: 22rem; max-width: 100% }}
table {{ border-collapse: collapse }}
td, th {{ padding: .12rem .5rem .12rem 0; text-align: left; vertical-align: top }}
th {{ color: #5b6270; font-weight: 500 }}
.value {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
.plain td + td, .plain th + th {{ padding-left: .75rem }} code {{ overflow-wrap: anywhere }}
.columns {{ columns: 21rem; column-gap: 2.5rem }}
.columns table, .example table {{ width: 100% }} .columns table, .columns tbody {{ display: block }}
.columns tr {{ break-inside: avoid; display: flex; gap: .25rem; border-bottom: 1px solid #f0f1f4 }}
.columns .plain td:first-child {{ flex: 0 0 55%; overflow-wrap: anywhere }}
.columns .plain td + td {{ flex: 1; min-width: 0; padding-left: 0 }}
.name {{ flex: 0 0 9rem; max-width: 9rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }}
.bar {{ flex: 1; width: 100%; vertical-align: middle; align-self: center }}
.bar i {{ --ink: #9db8d9; display: block; height: .65rem; border-radius: 2px;
         background: linear-gradient(90deg, var(--ink) var(--share), #eef0f4 var(--share)) }}
.strong td {{ font-weight: 600 }} .strong .bar i {{ --ink: #2563a8 }}
.columns .value {{ flex: 0 0 3.2rem }}
.example {{ display: inline-block; width: 13rem; margin: 0 .65rem .75rem 0; padding: .75rem; border: 1px solid #e3e5ea;
           border-top: 4px solid; border-radius: 8px; vertical-align: top; box-sizing: border-box; font-size: .85rem }}
.example.good {{ border-top-color: #15803d }} .example.bad {{ border-top-color: #c2410c }}
.example img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #f4f5f7; image-rendering: pixelated }}
.example .name {{ max-width: 6rem }} .example .bar {{ min-width: 2rem }}
.example.plain {{ border-top-color: #2563a8 }} .example.plain img {{ image-rendering: auto }}
.example.wide {{ width: 100%; border-top-color: #2563a8 }}
.example.wide img {{ aspect-ratio: auto; image-rendering: auto }}
.key {{ display: inline-block; margin-right: 1.2rem }}
.key i {{ display: inline-block; width: .9em; height: .9em; margin-right: .4em; vertical-align: -.1em }}
.example ul {{ color: #5b6270; margin: .4rem 0 0; padding-left: 1rem }}
.right {{ color: #15803d; font-weight: 600 }} .wrong {{ color: #c2410c; font-weight: 600 }}
.scroll {{ overflow: auto }}
</style></head>
<body><main>
<h1>{title}</h1>
<p class="note">Training report of the run <code>{folder}</code></p>
{body}
</main></body></html>
"""
