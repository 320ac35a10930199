"""The report of a run: a single HTML file, made from the files of the run folder."""

from __future__ import annotations

from html import escape
from pathlib import Path

from vitrail.files import printable, write_whole
from vitrail.html import NO_SCORES, PAGE, card, section
from vitrail.report.curves import learning_curves
from vitrail.report.run import RunRecord, flat, read_run
from vitrail.units import count, duration, median, number


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path. Sections without their files are left out."""
    run = read_run(run_folder)
    name = run.folder.resolve().name
    title = str(run.recipe.get("recipe") or name)
    own = run.kind.report(run) if run.kind is not None else []
    sections = [
        _head(run, "".join(each.html for each in own if not each.title)),
        section("Learning curves", learning_curves(run)),
        *(section(each.title, each.html) for each in own if each.title),
        section("Recipe", _recipe(run)),
    ]
    page = PAGE.format(title=escape(title), folder=escape(name), body="\n".join(filter(None, sections)))
    path = run.folder / "report.html"
    write_whole(path, printable(page))
    return path


def _head(run: RunRecord, cards: str) -> str:
    """Summary cards, including the task's own, and the commands of the run."""
    score, best = run.score, run.best
    label = score.label or score.name
    cards = "".join(
        [
            card(f"test {label}", score.text(number(run.test.get(score.name)))),
            cards,
            card(f"best validation {label}", score.text(best.get(score.name)), f"at step {best.get('step')}"),
            card("parameters", count(run.done.get("parameters"))),
            card("time", duration(run.done.get("seconds")), f"{run.done['step']} steps" if "step" in run.done else ""),
            card("images per second", count(run.images_per_s), _waiting(run)),
        ]
    )
    # A resumed run has one start row per command.
    commands = dict.fromkeys(str(row["command"]) for row in run.starts if row.get("command"))
    lines = "".join(f"<pre>{escape(command)}</pre>" for command in commands)
    going = "" if run.done else '<p class="note">This run is not finished.</p>'
    fast = f'<p class="note"><b>A fast dev run: {NO_SCORES}.</b></p>' if run.fast_dev_run else ""
    return f'{fast}<div class="cards">{cards}</div>{going}{lines}'


def _waiting(run: RunRecord) -> str:
    share = median(row.get("wait") for row in run.train)
    return "" if share is None else f"{share:.0%} of the time waiting for data"


def _recipe(run: RunRecord) -> str:
    values = run.recipe if run.groups is None else {**run.recipe, "groups in the data": run.groups}
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>" for name, value in flat(values)
    )
    return f'<div class="columns"><table class="plain">{rows}</table></div>' if rows else ""
