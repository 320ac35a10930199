"""The report of a run: a single HTML file, made from the files of the run folder."""

from __future__ import annotations

from html import escape
from pathlib import Path

from vitrail.files import printable, write_atomic
from vitrail.html import NO_SCORES, PAGE, card, note, section
from vitrail.report.curves import learning_curves
from vitrail.report.run import RunRecord, flat, read_run
from vitrail.units import count, duration, median, number

SPLITS = {"train": "training", "val": "validation"}
"""splits in words, where the words are others"""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path. Sections without their files are left out."""
    run = read_run(run_folder)
    title = str(run.recipe.get("recipe") or run.folder.resolve().name)
    own = run.kind.report(run) if run.kind is not None else []
    sections = [
        _head(run, "".join(each.html for each in own if not each.title)),
        section("Learning curves", learning_curves(run)),
        *(section(each.title, each.html) for each in own if each.title),
        section("Recipe", _recipe(run)),
    ]
    page = PAGE.format(title=escape(title), subtitle=_subtitle(run), body="\n".join(filter(None, sections)))
    path = run.folder / "report.html"
    write_atomic(path, printable(page))
    return path


def _subtitle(run: RunRecord) -> str:
    """The run's folder, its data, and the number of images of each split that trained, chose and scored."""
    images = ", ".join(f"{count:,} {SPLITS.get(name, name)}" for name, count in run.images.items())
    data = run.recipe.get("data")
    told = f" on <code>{escape(str(data))}</code>" if data else ""
    told += f": {escape(images)} images" if images else ""
    return f"Training report of the run <code>{escape(run.folder.resolve().name)}</code>{told}"


def _head(run: RunRecord, cards: str) -> str:
    """Summary cards, including the task's own, what to know of the scores, and the commands of the run."""
    score, best = run.score, run.best
    label = score.label or score.name
    final = card(f"{run.split} {label}", score.text(number(run.final.get(score.name))))
    chosen = "" if final and run.split == "validation" else score.text(best.get(score.name))
    cards = "".join(
        [
            final,
            cards,
            card(f"best validation {label}", chosen, f"at step {best.get('step')}"),
            card("parameters", count(run.done.get("parameters"))),
            card("time", duration(run.done.get("seconds")), f"{run.done['step']} steps" if "step" in run.done else ""),
            card("images per second", count(run.images_per_s), _waiting(run)),
        ]
    )
    # A resumed run has one start row per command.
    commands = dict.fromkeys(str(row["command"]) for row in run.starts if row.get("command"))
    lines = "".join(f"<pre>{escape(command)}</pre>" for command in commands)
    return f'{_warnings(run)}<div class="cards">{cards}</div>{lines}'


def _warnings(run: RunRecord) -> str:
    """What a reader must know before the scores."""
    found = []
    if run.fast_dev_run:
        found.append(f"<b>A fast dev run: {NO_SCORES}.</b>")
    if not run.done:
        found.append("This run is not finished.")
    if run.final and run.split == "validation":
        found.append(
            "<b>The scores are those of the validation split, on which the checkpoint was chosen</b>, so they are a "
            "little too good. If the data has a test split, that is scored once, at the end."
        )
    return "".join(f'<p class="note warn">{text}</p>' for text in found)


def _waiting(run: RunRecord) -> str:
    share = median(row.get("wait") for row in run.train)
    return "" if share is None else f"{share:.0%} of the time waiting for data"


def _recipe(run: RunRecord) -> str:
    """The fields that differ from the recipe's, and all fields in a list that opens."""
    values = run.recipe if run.groups is None else {**run.recipe, "groups in the data": run.groups}
    rows = "".join(_row(name, value) for name, value in flat(values))
    if not rows:
        return ""
    if run.changed is None:
        differs = ""
    elif run.changed:
        head = "<tr><th>field</th><th>this run</th><th>recipe</th></tr>"
        told = note("Fields that differ from the recipe, by an option, the data or the pretrained weights.")
        differs = f'{told}<table class="plain">{head}{"".join(_row(*entry) for entry in run.changed)}</table>'
    else:
        differs = note("Every field is as the recipe has it.")
    return (
        f'{differs}<details><summary>All fields</summary><div class="columns"><table class="plain">{rows}</table></div>'
        "</details>"
    )


def _row(name: str, *values: str) -> str:
    return f"<tr><td>{escape(name)}</td>{''.join(f'<td><code>{escape(value)}</code></td>' for value in values)}</tr>"
