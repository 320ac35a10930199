"""The records of a run folder.

A run folder has `recipe.json` (the resolved recipe), `metrics.jsonl` (one object per line; its `kind` is "start",
"train", "val", "test" or "done"), `classes.json` (names) and maybe `examples.json` (images with their predictions).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.errors import UserError
from vitrail.plain import rebuild
from vitrail.tasks import TASKS, task_class
from vitrail.tasks.values import Score
from vitrail.units import median, number

if TYPE_CHECKING:
    from vitrail.tasks.task import Task

Row = dict[str, Any]


@dataclass
class RunRecord:
    """The records of a run folder. Missing entries are empty."""

    folder: Path
    recipe: Row
    starts: list[Row]
    train: list[Row]
    val: list[Row]
    test: Row
    final: Row
    """the scores of the end, on the test split, or on the validation split if there is none"""
    done: Row
    classes: list[str]
    examples: list[Row]
    groups: str | None = None
    """number of image groups that were kept within one split; None without groups"""
    images: dict[str, int] = field(default_factory=dict)
    """number of images of each split, where those that are held back for validation are not in the training split"""
    before_split: int = 1
    """number of images of the training split with those that are held back: a recipe's values depend on it"""

    @property
    def best(self) -> Row:
        """The row of the best validation score, the last of equal ones; empty if there is none."""
        best: Row = {}
        for row in self.val:
            value = number(row.get(self.score.name))
            if value is not None and (not best or self.score.better(value, best[self.score.name])):
                best = row
        return best

    @property
    def kind(self) -> type[Task] | None:
        """The trained task; None if the folder does not name it."""
        task = self.recipe.get("task")
        name = task.get("kind") if isinstance(task, dict) else None
        return task_class(str(name)) if name in TASKS else None

    @property
    def score(self) -> Score:
        """The score that chose the best checkpoint, from the run's start row, or else from its task."""
        for row in reversed(self.starts):
            if isinstance(score := row.get("score"), dict):
                with suppress(TypeError):  # not a row that vitrail wrote
                    return rebuild(Score, score)
        return (self.kind and self.kind.score) or Score("loss", best="min", unit="")

    @property
    def split(self) -> str:
        """The split of the final scores, in words: test or validation."""
        return {"val": "validation"}.get(name := str(self.final.get("split", "test")), name)

    @property
    def changed(self) -> list[tuple[str, str, str]] | None:
        """Name, value and the recipe's value of each field that is not as the recipe has it; None without a recipe."""
        from vitrail.recipes import RECIPES

        name = self.recipe.get("recipe")
        if name not in RECIPES:
            return None
        given = dict(flat(json.loads(json.dumps(RECIPES[name](self.before_split).as_dict()))))
        return [(key, value, given.get(key, "")) for key, value in flat(self.recipe) if given.get(key) != value]

    @property
    def fast_dev_run(self) -> bool:
        """Whether it is a fast dev run, whose scores mean nothing."""
        return bool(self.recipe.get("fast_dev_run"))

    @property
    def images_per_s(self) -> float | None:
        """Median over the training rows."""
        return median(row.get("images_per_s") for row in self.train)


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder, also of a run that is in progress or was killed. A folder without a run is a UserError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a run folder, which `vitrail train` writes")
    recipe = _json(folder / "recipe.json", dict)
    rows = _lines(folder / "metrics.jsonl")
    if not recipe and not rows:
        raise UserError(
            f"{folder} holds no run, neither recipe.json nor metrics.jsonl: give a folder of `vitrail train`"
        )
    kinds: dict[str, list[Row]] = {kind: [] for kind in ("start", "train", "val", "test", "done")}
    for row in rows:
        kinds.get(str(row.get("kind")), []).append(row)
    data = _json(folder / "data.json", dict)
    test = kinds["test"][-1] if kinds["test"] else {}
    return RunRecord(
        folder=folder,
        recipe=recipe,
        starts=kinds["start"],
        train=_by_step(kinds["train"]),
        val=_by_step(kinds["val"]),
        test=test,
        final=_json(folder / "scores.json", dict) or test,
        done=kinds["done"][-1] if kinds["done"] else {},
        classes=[str(name) for name in _json(folder / "classes.json", list)],
        examples=[row for row in _json(folder / "examples.json", list) if isinstance(row, dict)],
        groups=next((value for name, value in flat(data) if name == "groups.count"), None),
        images=_images(kinds["start"]),
        before_split=int(count) if (count := dict(flat(data)).get("splits.train.images", "")).isdigit() else 1,
    )


def _images(starts: list[Row]) -> dict[str, int]:
    """The number of images of each split, from the newest row of a start."""
    images = starts[-1].get("images") if starts else None
    counts = images.items() if isinstance(images, dict) else ()
    return {str(name): int(count) for name, own in counts if (count := number(own)) is not None}


def _json(path: Path, kind: type[Any]) -> Any:
    """The content of a file, or an empty `kind` if it is missing or of another type."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _lines(path: Path) -> list[Row]:
    """Rows of a file of JSON lines. A killed run may leave an incomplete last line, which is ignored."""
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
    steps = {row["step"]: row for row in rows if number(row.get("step")) is not None}
    return [steps[step] for step in sorted(steps)]


def flat(values: Row, before: str = "") -> Iterable[tuple[str, str]]:
    """Names joined with dots, and values as JSON; 60 epochs of a recipe and 60.0 of its recipe file are both 60."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{before}{name}.")
        else:
            plain = json.dumps(json.loads(json.dumps(value), parse_float=_number), ensure_ascii=False)
            yield f"{before}{name}", value if isinstance(value, str) else plain


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value
