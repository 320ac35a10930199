"""The report of a run: one HTML file that needs no other, made from what the run folder holds.

A run folder has `recipe.json` (the resolved recipe), `metrics.jsonl` (one object a line; its `kind` is "start",
"train", "val", "test" or "done"), `classes.json` (names) and maybe `examples.json` (images with their predictions).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitrail.errors import UserError
from vitrail.files import printable, write_whole

Row = dict[str, Any]

BLUE, RED, GREY = "#2563a8", "#c2410c", "#6b7280"
NO_SCORES = "its scores say nothing about the model"  # of a fast dev run
POINTS = 600  # of a curve; more would not be seen
CAPTION_SCORES = ("cider", "bleu4", "rouge_l")
# Classes up to which the confusion matrix has numbers, has names, and is drawn at all.
NUMBERED, NAMED, DRAWN = 25, 100, 250


@dataclass
class RunRecord:
    """What a run folder says of its run. Parts that are missing are empty."""

    folder: Path
    recipe: Row
    starts: list[Row]
    train: list[Row]
    val: list[Row]
    test: Row
    done: Row
    classes: list[str]
    examples: list[Row]
    groups: str | None = None
    """how many groups of images were kept on one side of the split; None where none were named"""

    @property
    def best(self) -> Row:
        """The row of the best validation score; empty where there is none."""
        scored = [row for row in self.val if _number(row.get(self.score)) is not None]
        return max(scored, key=lambda row: row[self.score], default={})

    @property
    def score(self) -> str:
        """The entry of the scores that chose the best checkpoint."""
        return str(self.starts[-1].get("score") or "top1") if self.starts else "top1"

    @property
    def fast_dev_run(self) -> bool:
        """Whether it only tried everything, so that its scores say nothing."""
        return bool(self.recipe.get("fast_dev_run"))

    @property
    def images_per_s(self) -> float | None:
        """Median over the rows of training."""
        return _median(row.get("images_per_s") for row in self.train)


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder, also of a run that still goes on or was killed. A folder without a run is a UserError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give a run folder, which `vitrail train` writes")
    recipe = _json(folder / "recipe.json", dict)
    rows = _lines(folder / "metrics.jsonl")
    if not recipe and not rows:
        raise UserError(
            f"{folder} holds no run, neither recipe.json nor metrics.jsonl: give a folder of `vitrail train`"
        )
    kinds: dict[str, list[Row]] = {kind: [] for kind in ("start", "train", "val", "test", "done")}
    for row in rows:
        kinds.get(str(row.get("kind")), []).append(row)
    return RunRecord(
        folder=folder,
        recipe=recipe,
        starts=kinds["start"],
        train=_by_step(kinds["train"]),
        val=_by_step(kinds["val"]),
        test=kinds["test"][-1] if kinds["test"] else {},
        done=kinds["done"][-1] if kinds["done"] else {},
        classes=[str(name) for name in _json(folder / "classes.json", list)],
        examples=[row for row in _json(folder / "examples.json", list) if isinstance(row, dict)],
        groups=next(
            (value for name, value in _flat(_json(folder / "data.json", dict)) if name == "groups.count"), None
        ),
    )


def _json(path: Path, kind: type[Any]) -> Any:
    """What a file holds, or an empty `kind` where it is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _lines(path: Path) -> list[Row]:
    """Rows of a file of JSON lines. A killed run may leave half a line at the end, which is passed over."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _by_step(rows: list[Row]) -> list[Row]:
    """In the order of steps. A resumed run repeats steps after its checkpoint: the last row of a step counts."""
    steps = {row["step"]: row for row in rows if _number(row.get("step")) is not None}
    return [steps[step] for step in sorted(steps)]


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _median(values: Iterable[Any]) -> float | None:
    numbers = sorted(number for value in values if (number := _number(value)) is not None)
    return numbers[len(numbers) // 2] if numbers else None


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path. Parts that the folder lacks are left out."""
    run = read_run(run_folder)
    name = run.folder.resolve().name
    title = str(run.recipe.get("recipe") or name)
    sections = [
        _headline(run),
        _section("Learning curves", _curves(run)),
        _section("Example predictions", _examples(run)),
        _section("Accuracy of each class", _per_class(run)),
        _section("Confusion matrix", _confusion(run)),
        _section("Recipe", _recipe(run)),
    ]
    page = PAGE.format(title=escape(title), folder=escape(name), body="\n".join(filter(None, sections)))
    path = run.folder / "report.html"
    write_whole(path, printable(page))
    return path


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n{body}\n</section>" if body else ""


def _headline(run: RunRecord) -> str:
    best = run.best
    cards = [
        ("test accuracy", percent(run.test.get("top1")), "first guess is right"),
        ("test top 5", percent(run.test.get("top5")) if len(run.classes) > 5 else "", "among the first five guesses"),
        *((name, shown(name, (run.test or best).get(name)), "test" if run.test else "") for name in CAPTION_SCORES),
        ("best validation", shown(run.score, best.get(run.score)), f"at step {best.get('step')}"),
        ("calibration error", percent(run.test.get("calibration_error")), "confidence against accuracy"),
        ("parameters", count(run.done.get("parameters")), ""),
        ("time", duration(run.done.get("seconds")), f"{run.done.get('step')} steps" if "step" in run.done else ""),
        ("images a second", count(run.images_per_s), _waiting(run)),
    ]
    drawn = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{label}</span><small>{escape(note)}</small></div>'
        for label, value, note in cards
        if value
    )
    # A run that was resumed has one start for each command.
    commands = dict.fromkeys(str(row["command"]) for row in run.starts if row.get("command"))
    lines = "".join(f"<pre>{escape(command)}</pre>" for command in commands)
    going = "" if run.done else '<p class="note">This run has not ended.</p>'
    fast = f'<p class="note"><b>A fast dev run: {NO_SCORES}.</b></p>' if run.fast_dev_run else ""
    return f'{fast}<div class="cards">{drawn}</div>{going}{lines}'


def _waiting(run: RunRecord) -> str:
    share = _median(row.get("wait") for row in run.train)
    return "" if share is None else f"{share:.0%} of the time waiting for data"


def percent(value: Any) -> str:
    """A fraction as a percentage; nothing for what is no number."""
    number = _number(value)
    return "" if number is None else f"{100 * number:.2f} %"


def shown(name: str, value: Any) -> str:
    """A score as its field writes it: an accuracy as a percentage, scores of captions as they are."""
    number = _number(value)
    if name not in CAPTION_SCORES:
        return percent(value)
    return "" if number is None else f"{number:.3f}"


def count(value: Any) -> str:
    """A number in at most four digits and a letter."""
    number = _number(value)
    if number is None:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def duration(seconds: Any) -> str:
    """Seconds as people say them: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    number = _number(seconds)
    if number is None:
        return ""
    if number < 60:
        return f"{number:.3g} s"
    whole = round(number)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _curves(run: RunRecord) -> str:
    losses = _points(run.val, "loss") or _points(run.val, "cross_entropy")
    scores = _points(run.val, run.score)
    score = "accuracy" if run.score == "top1" else run.score
    panels = [
        ("loss", [("training", _points(run.train, "loss"), BLUE), ("validation", losses, RED)]),
        (score, [("training", _points(run.train, score), BLUE), ("validation", scores, RED)]),
        ("learning rate", [("", _points(run.train, "lr"), GREY)]),
        ("share of the commonest caption", [("", _points(run.val, "identical"), GREY)]),
    ]
    panels = [(name, kept) for name, lines in panels if (kept := [line for line in lines if line[1]])]
    if not panels:
        return ""
    figure = Figure(figsize=(4.2 * len(panels), 3.1), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points, colour in lines:
            steps, values = zip(*points, strict=True)
            few = len(points) < 30
            axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker="o" if few else "", markersize=3)
        if name == score and run.best:
            _mark_best(axes, run.best, run.score)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        plain(axes, name)
    return f'<img class="wide" src="{_svg(figure)}" alt="loss, score and learning rate against steps">'


def _points(rows: list[Row], name: str) -> list[tuple[float, float]]:
    """(step, value), thinned to means of neighbours where there are many."""
    points = [(float(row["step"]), value) for row in rows if (value := _number(row.get(name))) is not None]
    size = math.ceil(len(points) / POINTS)
    if size < 2:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _mark_best(axes: Axes, best: Row, score: str) -> None:
    axes.plot([best["step"]], [best[score]], "o", color=RED, markersize=7, markerfacecolor="white")
    axes.annotate(
        shown(score, best[score]),
        (best["step"], best[score]),
        textcoords="offset points",
        xytext=(-4, -15),
        ha="right",
        fontsize=9,
        color=RED,
    )


def plain(axes: Axes, title: str, across: str = "step") -> None:
    """The look that all curves share."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(across, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    """A figure as a data address. As an image of its own, its names cannot meet those of another figure."""
    buffer = io.BytesIO()
    # Text stays text; the fixed salt and the missing date make the same run give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitrail"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _examples(run: RunRecord) -> str:
    return "".join(filter(None, map(_example, run.examples)))


def _example(example: Row) -> str:
    image = str(example.get("image", ""))
    try:
        base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        return ""
    if image and "caption" in example:
        people = "".join(f"<li dir=auto>{escape(str(text))}</li>" for text in example.get("references", [])[:2])
        return (
            f'<figure class="example plain"><img src="data:image/png;base64,{image}" alt="">'
            f"<figcaption><b dir=auto>{escape(str(example['caption'])) or 'no words'}</b><ul>{people}</ul></figcaption>"
            "</figure>"
        )
    guesses = [g for g in example.get("predictions", []) if isinstance(g, dict) and "label" in g][:3]
    if not image or not guesses:
        return ""
    label = str(example.get("label", ""))
    right = str(guesses[0]["label"]) == label
    rows = "".join(_bar(str(g["label"]), _number(g.get("score")) or 0.0, str(g["label"]) == label) for g in guesses)
    mark = '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>'
    return (
        f'<figure class="example {"good" if right else "bad"}"><img src="data:image/png;base64,{image}" alt="">'
        f"<figcaption>{mark} {escape(label)}</figcaption><table>{rows}</table></figure>"
    )


def _bar(name: str, value: float, strong: bool) -> str:
    width = 100 * min(max(value, 0.0), 1.0)
    return (
        f'<tr{" class=strong" if strong else ""}><td class="name" title="{escape(name)}">{escape(name)}</td>'
        f'<td class="bar"><i style="--share:{width:.1f}%"></i></td><td class="value">{100 * value:.1f}</td></tr>'
    )


def _per_class(run: RunRecord) -> str:
    scores = run.test.get("per_class") or []
    rows = [(_name(run, place), number) for place, score in enumerate(scores) if (number := _number(score)) is not None]
    if not rows:
        return ""
    rows.sort(key=lambda row: row[1])
    note = "Per cent of the test images of a class that the first guess names, lowest first."
    if len(rows) > NAMED:
        note += f" The {NAMED} lowest of {len(rows)}."
        rows = rows[:NAMED]
    bars = "".join(_bar(name, score, False) for name, score in rows)
    return f'<p class="note">{note}</p><div class="columns"><table>{bars}</table></div>'


def _name(run: RunRecord, place: int) -> str:
    return run.classes[place] if place < len(run.classes) else f"class {place}"


def _confusion(run: RunRecord) -> str:
    matrix: Any = run.test.get("confusion")
    if not _square(matrix):
        return ""
    parts = []
    if len(matrix) <= DRAWN:
        parts.append(
            '<p class="note">A row is what an image shows, a column what the model took it for; the colour is the '
            "share of the row. Point at a cell to read it.</p>"
        )
        parts.append(_matrix(matrix, [_name(run, place) for place in range(len(matrix))]))
    parts.append(_mistakes(run, matrix))
    return "".join(parts)


def _square(matrix: Any) -> bool:
    return bool(matrix) and all(
        isinstance(row, list) and len(row) == len(matrix) and all(_number(n) is not None for n in row) for row in matrix
    )


def _matrix(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The confusion matrix as SVG: cells that are zero are not drawn, so that 100 classes stay small."""
    size = len(matrix)
    cell = 44 if size <= 10 else 30 if size <= NUMBERED else 14 if size <= 50 else 10
    font = min(13, max(cell - 2, 8)) if size <= NUMBERED else min(10, cell - 1)
    margin = 14 + int(0.62 * font * min(max(map(len, names)), 24)) if size <= NAMED else 6
    side = size * cell
    parts = [f'<rect x="{margin}" y="{margin}" width="{side}" height="{side}" fill="#fafafa" stroke="#ddd"/>']
    for i, row in enumerate(matrix):
        total = sum(row)
        for j, number in enumerate(row):
            if not number:
                continue
            x, y = margin + j * cell, margin + i * cell
            # Even one mistake among a thousand must be seen: colours start above white.
            depth = 0.12 + 0.88 * number / total
            fill = _mix(BLUE if i == j else RED, depth)
            what = "right" if i == j else f"taken for {names[j]}"
            says = escape(f"{names[i]} {what}: {number} of {total}")
            box = f'x="{x}" y="{y}" width="{cell}" height="{cell}"'
            parts.append(f'<rect {box} fill="{fill}"><title>{says}</title></rect>')
            if size <= NUMBERED:
                ink = "#fff" if depth > 0.55 else "#222"
                high = min(font, int(1.7 * cell / (len(str(number)) + 0.5)))
                at = f'x="{x + cell / 2}" y="{y + cell / 2}" text-anchor="middle"'
                parts.append(f'<text {at} font-size="{high}" fill="{ink}" pointer-events="none">{number}</text>')
    if size <= NAMED:
        for place, name in enumerate(names):
            middle = margin + place * cell + cell / 2
            short = escape(name if len(name) <= 24 else name[:23] + "…")
            parts.append(f'<text x="{margin - 5}" y="{middle}" font-size="{font}" text-anchor="end">{short}</text>')
            turned = f"translate({middle} {margin - 5}) rotate(-90)"
            parts.append(f'<text transform="{turned}" font-size="{font}">{short}</text>')
    whole = margin + side + 6
    return (
        f'<div class="scroll"><svg viewBox="0 0 {whole} {whole}" width="{whole}" height="{whole}" role="img" '
        f'aria-label="confusion matrix" fill="#222" dominant-baseline="central">{"".join(parts)}</svg></div>'
    )


def _mix(colour: str, depth: float) -> str:
    """A colour on white paper."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (part - 255) * depth):02x}" for part in parts)


def _mistakes(run: RunRecord, matrix: Sequence[Sequence[int]], most: int = 10) -> str:
    pairs = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j]
    if not pairs:
        return '<p class="note">No mistakes.</p>'
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = "".join(
        f"<tr><td>{escape(_name(run, i))}</td><td>{escape(_name(run, j))}</td>"
        f'<td class="value">{n} of {sum(matrix[i])}</td></tr>'
        for n, i, j in pairs[:most]
    )
    head = "<tr><th>shows</th><th>taken for</th><th>images</th></tr>"
    return f'<h3>Most frequent mistakes</h3><table class="plain">{head}{rows}</table>'


def _recipe(run: RunRecord) -> str:
    values = run.recipe if run.groups is None else {**run.recipe, "groups in the data": run.groups}
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>" for name, value in _flat(values)
    )
    return f'<div class="columns"><table class="plain">{rows}</table></div>' if rows else ""


def _flat(values: Row, before: str = "") -> Iterable[tuple[str, str]]:
    """Names joined with dots, and values as JSON writes them."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
.wide {{ width: 100% }}
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
