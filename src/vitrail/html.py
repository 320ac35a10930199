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


def bar(name: str, value: float, strong: bool, *beside: str) -> str:
    """A table row: a name, a bar for `value` from 0 to 1, its percentage, and what else stands `beside` it."""
    width = 100 * min(max(value, 0.0), 1.0)
    return (
        f'<tr{" class=strong" if strong else ""}><td class="name" title="{escape(name)}">{escape(name)}</td>'
        f'<td class="bar"><i style="--share:{width:.1f}%"></i></td><td class="value">{100 * value:.1f}</td>'
        f"{''.join(f'<td class=value>{escape(text)}</td>' for text in beside)}</tr>"
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


def evenly_spaced(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of `examples.json` that were not chosen as the worst mistakes."""
    return [row for row in rows if not row.get("mistake")]


def worst(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of `examples.json` that are the worst mistakes, the worst first."""
    return [row for row in rows if row.get("mistake")]


def examples(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of a run's `examples.json`: their figures, or their images where they have none, with their text."""
    shown = ((row.get("figure") or row.get("image"), escape(str(row.get("text", "")))) for row in rows)
    return "".join(example(image, text) for image, text in shown)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: training report</title>
<style>
:root {{ color-scheme: light dark; --ink: #1f2430; --soft: #5b6270; --ground: #f4f5f7; --pane: #fff; --line: #dfe2e8;
        --blue: #2563a8; --red: #c2410c; --green: #15803d; --bar: #9db8d9; --empty: #eef0f4; --on: #fff }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8eaf0; --soft: #a3abbb; --ground: #14161b; --pane: #1c1f27;
        --line: #343945; --blue: #7fb2f0; --red: #ff9466; --green: #5fce8a; --bar: #4b6a93; --empty: #2a2e38;
        --on: #10131a }} }}
* {{ box-sizing: border-box }}
body {{ font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
       background: var(--ground); margin: 0 }}
main {{ max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }}
h1 {{ margin: 0; font-size: 1.9rem; line-height: 1.2 }} h2 {{ margin: 0 0 .75rem; font-size: 1.2rem }}
h3 {{ font-size: 1rem; margin: 1.25rem 0 .4rem }}
.note {{ color: var(--soft); margin: 0 0 1rem; max-width: 46rem }}
.warn {{ border-left: 4px solid var(--red); padding: .1rem 0 .1rem .8rem }}
section {{ background: var(--pane); border: 1px solid var(--line); border-radius: 10px; padding: 1.25rem 1.5rem;
          margin-top: 1.25rem }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.25rem 0 }}
.card {{ background: var(--pane); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
        display: flex; flex-direction: column }}
.card b {{ font-size: 1.35rem; white-space: nowrap }} .card small {{ color: var(--soft) }}
pre {{ border: 1px solid var(--line); background: var(--empty); padding: .7rem 1rem; border-radius: 8px;
      white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 }}
table {{ border-collapse: collapse }}
td, th {{ padding: .12rem .5rem .12rem 0; text-align: left; vertical-align: top }}
th {{ color: var(--soft); font-weight: 500 }}
.value {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
.plain td + td, .plain th + th {{ padding-left: .75rem }} .plain td {{ overflow-wrap: anywhere }}
.columns {{ columns: 21rem; column-gap: 2.5rem }}
.columns table, .example table {{ width: 100% }} .columns table, .columns tbody {{ display: block }}
.columns tr {{ break-inside: avoid; display: flex; gap: .25rem; border-bottom: 1px solid var(--line) }}
.columns .plain td:first-child {{ flex: 0 0 55%; overflow-wrap: anywhere }}
.columns .plain td + td {{ flex: 1; min-width: 0; padding-left: 0 }}
.name {{ flex: 0 0 9rem; max-width: 9rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }}
.bar {{ flex: 1; width: 100%; vertical-align: middle; align-self: center }}
.bar i {{ --ink: var(--bar); display: block; height: .65rem; border-radius: 2px; print-color-adjust: exact;
         background: linear-gradient(90deg, var(--ink) var(--share), var(--empty) var(--share)) }}
.strong td {{ font-weight: 600 }} .strong .bar i {{ --ink: var(--blue) }}
.columns .value {{ flex: 0 0 3.2rem }} .classes table {{ width: 100%; max-width: 40rem }}
.classes tr {{ border-bottom: 1px solid var(--line) }} .classes {{ display: grid; gap: 1.25rem 2.5rem;
         grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); align-items: start }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr));
          gap: 1.25rem 1.75rem }}
.chart {{ margin: 0; max-width: 30rem; break-inside: avoid }} .chart svg {{ display: block; width: 100%; height: auto;
         overflow: visible }}
.chart p {{ color: var(--soft); font-size: .88rem; margin: .3rem 0 0 }} .chart figcaption {{ margin-bottom: .3rem }}
.chart figcaption b {{ margin-right: .8rem }}
svg text {{ font-size: 10.5px; fill: var(--soft); stroke: none }} .chart .marked {{ fill: var(--ink); font-weight: 600;
         paint-order: stroke; stroke: var(--pane); stroke-width: 3px }}
.grid, .axis {{ stroke: var(--line) }} .axis {{ stroke: var(--soft) }}
polyline {{ fill: none; stroke-width: 1.8; stroke-linejoin: round }}
.mark {{ fill: var(--pane); stroke: var(--ink); stroke-width: 1.8 }}
.example {{ display: inline-block; width: 12.3rem; margin: 0 .65rem .75rem 0; padding: .75rem; font-size: .85rem;
           border: 1px solid var(--line); border-top: 4px solid; border-radius: 8px; vertical-align: top;
           break-inside: avoid }}
.example.good {{ border-top-color: var(--green) }} .example.bad {{ border-top-color: var(--red) }}
.example img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--empty);
               image-rendering: pixelated }}
.example .name {{ max-width: 6rem }} .example .bar {{ min-width: 2rem }}
.example.plain, .example.wide {{ border-top-color: var(--blue) }} .example.plain img {{ image-rendering: auto }}
.example.wide {{ width: 100% }} .example.wide img {{ aspect-ratio: auto; image-rendering: auto }}
.key {{ display: inline-block; margin-right: 1.2rem }}
.key i {{ display: inline-block; width: .9em; height: .9em; margin-right: .4em; vertical-align: -.1em;
         border-radius: 2px; print-color-adjust: exact }}
.example ul {{ color: var(--soft); margin: .4rem 0 0; padding-left: 1rem }}
.right {{ color: var(--green); font-weight: 600 }} .wrong {{ color: var(--red); font-weight: 600 }}
.scroll {{ overflow: auto }} .pair {{ display: flex; flex-wrap: wrap; gap: 0 3rem }}
.matrix {{ max-width: 100%; height: auto }}
.matrix text {{ fill: var(--ink) }} .matrix .axes {{ fill: var(--soft) }} .matrix .full {{ fill: var(--on) }}
.matrix .ground {{ fill: none; stroke: var(--line) }} .hit {{ fill: var(--blue) }} .miss {{ fill: var(--red) }}
summary {{ cursor: pointer; color: var(--soft); margin: .75rem 0 }}
@media (max-width: 36rem) {{ main {{ padding: 1.25rem .75rem 3rem }} section {{ padding: 1rem }}
  .cards {{ grid-template-columns: 1fr 1fr }} .card b {{ font-size: 1.15rem }} .name {{ flex-basis: 7rem }}
  .example:not(.wide) {{ width: calc(50% - .4rem); margin-right: .35rem; padding: .5rem }}
  .example .value {{ display: none }} }}
@media print {{ :root {{ --ink: #000; --soft: #444; --ground: #fff; --pane: #fff; --line: #ccc; --blue: #2563a8;
  --red: #c2410c; --green: #15803d; --bar: #9db8d9; --empty: #eee; --on: #fff }} body {{ font-size: 11pt }}
  main {{ padding: 0 }} section {{ border: 0; padding: 0; margin-top: 1.5rem }} h2, h3, .note {{ break-after: avoid }}
  .charts {{ grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)) }}
  .example:not(.wide) {{ width: 8.5rem }} details:not([open]) {{ display: none }} svg {{ print-color-adjust: exact }} }}
</style></head>
<body><main>
<h1>{title}</h1>
<p class="note">{subtitle}</p>
{body}
</main></body></html>
"""
