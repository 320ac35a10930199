"""The walls between rooms: outside `tasks/`, `recipes/` and the readers of `zoo/`, no code knows a particular task.

What belongs to a task is read from `TASKS` and the modules of their classes, so that a new task is covered as it comes.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import pytest

import vitrail
from vitrail.plain import flat_fields
from vitrail.tasks import TASKS, task_class
from vitrail.tasks.task import Task
from vitrail.tasks.values import Metric, NoOptions, Prediction, Settings

SOURCE = Path(vitrail.__file__).parent
FREE = ("tasks", "recipes")
"""rooms that know tasks"""
READERS = {"zoo/assemble.py", "zoo/captioners.py", "zoo/native.py"}
"""make the task that a checkpoint holds"""


def files() -> Iterator[Any]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if name.split("/")[0] not in FREE and name not in READERS:
            yield pytest.param(path, id=name)


ASKING = {"isinstance", "issubclass", "hasattr", "getattr", "type"}
"""functions that ask what a thing is, in place of asking the contract"""
GENERAL = {Task, Prediction, Settings, NoOptions, Metric}


SHARED = {"vitrail.tasks.task", "vitrail.tasks.encoder", "vitrail.tasks.figures"}
"""modules of all tasks"""


def modules() -> Iterator[ModuleType]:
    """Those of the tasks' classes and of what they inherit from; of a task that is a package, all of its modules."""
    names: set[str] = set()
    for task in TASKS:
        for kind in task_class(task).__mro__:
            parts = kind.__module__.split(".")
            if parts[:2] != ["vitrail", "tasks"] or kind.__module__ in SHARED:
                continue
            names.add(kind.__module__)
            if len(parts) > 3:
                package = import_module(".".join(parts[:3]))
                names |= {package.__name__, *(f"{package.__name__}.{m.name}" for m in iter_modules(package.__path__))}
    yield from map(import_module, sorted(names))


def own_classes() -> set[str]:
    """Concrete tasks, their settings, options, predictions and metrics."""
    found = set()
    for module in modules():
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__:
                found.add(name)
    for name in TASKS:
        for kind in (task_class(name).settings, task_class(name).options, *target_of(task_class(name))):
            if kind not in GENERAL:
                found.add(kind.__name__)
    return found


def target_of(kind: type[Task]) -> list[type]:
    """The kind of target that a task's samples carry, once it says so."""
    target = getattr(kind, "target", None)
    return [] if target is None else [target]


def own_names() -> set[str]:
    """What only concrete tasks have: their attributes beyond the contract, fields of settings and options, scores."""
    contract = set(dir(Task)) | set(Task.__annotations__)
    found: set[str] = set()
    for name in TASKS:
        kind = task_class(name)
        found |= {entry.name for entry in fields(kind.settings)} | flat_fields(kind.options()).keys()
        for base in kind.__mro__:
            if issubclass(base, Task) and base is not Task:
                found |= set(vars(base)) | set(vars(base).get("__annotations__", {}))
        if kind.score is not None:
            found.add(kind.score.name)
    return {name for name in found - contract if not name.startswith("__")}


CLASSES, NAMES = own_classes(), own_names()
TASK_MODULES = {module.__name__ for module in modules()}


def faults(tree: ast.AST, data: bool = False) -> Iterator[str]:
    """What in a module knows a particular task. Files of `data/` have columns with such names."""
    classes = CLASSES - bound(tree)
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitrail.tasks"):
            module = str(node.module)
            names = [f"{module}.{alias.name}" for alias in node.names]
            if module in TASK_MODULES or TASK_MODULES & set(names):
                yield f"{line}: imports {', '.join(alias.name for alias in node.names)} from {module}"
        elif isinstance(node, ast.Import):
            yield from (f"{line}: imports {a.name}" for a in node.names if a.name in TASK_MODULES)
        elif isinstance(node, ast.Name) and node.id in classes:
            yield f"{line}: names {node.id}"
        elif isinstance(node, ast.Attribute) and node.attr in classes:
            yield f"{line}: names {node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKING:
            texts = {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
            if node.func.id in ("hasattr", "getattr") and (asked := texts & NAMES):
                yield f"{line}: asks for {', '.join(sorted(asked))}"
        elif isinstance(node, ast.Compare | ast.MatchValue) and not data:
            parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.value]
            values = {c.value for part in parts for c in ast.walk(part) if isinstance(c, ast.Constant)}
            if known := {value for value in values if isinstance(value, str)} & (set(TASKS) | SCORES):
                yield f"{line}: compares with {', '.join(sorted(known))}"


def bound(tree: ast.AST) -> set[str]:
    """Names that a module gives to things of its own, or of other rooms."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("vitrail.tasks"):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


SCORES = {score.name for name in TASKS if (score := task_class(name).score) is not None}


@pytest.mark.parametrize("path", [*files()])
def test_no_code_knows_a_particular_task(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = list(faults(tree, data=path.relative_to(SOURCE).parts[0] == "data"))
    assert not found, f"{path.relative_to(SOURCE)}: {'; '.join(found)}; ask the contract (vitrail/tasks/task.py)"


def test_what_belongs_to_tasks_is_known() -> None:
    assert {"Classify", "Classification", "Caption", "Captioning", "Decoding", "Regress", "Embed"} <= CLASSES
    assert {"Task", "Prediction", "Score", "Settings"}.isdisjoint(CLASSES)
    assert {"decoder", "smoothing", "beam", "top1"} <= NAMES and {"encoder", "preprocess", "loss"}.isdisjoint(NAMES)


@pytest.mark.parametrize(
    "code, words",
    [
        ("from vitrail.tasks.classify import Classify", "imports Classify"),
        ("from vitrail.tasks import classify", "imports classify"),
        ("import vitrail.tasks.caption", "imports vitrail.tasks.caption"),
        ("x = isinstance(task, Classify)", "names Classify"),
        ("x = type(task) is tasks.Caption", "names Caption"),
        ("x = hasattr(task, 'decoder')", "asks for decoder"),
        ("x = getattr(run.task, 'smoothing', 0)", "asks for smoothing"),
        ("x = task.name == 'caption'", "compares with caption"),
        ("x = task.name in ('caption', 'embed')", "compares with caption, embed"),
        ("x = score == 'top1'", "compares with top1"),
        ("match name:\n  case 'classify': pass", "compares with classify"),
    ],
)
def test_it_finds_what_it_looks_for(code: str, words: str) -> None:
    assert any(words in fault for fault in faults(ast.parse(code)))


def test_imports_point_one_way() -> None:
    """No module imports from a room above its own, but where a name is only for types, or inside a function."""
    rooms = "vit baselines variants data tasks zoo explain report predictions train recipes start demo cli"
    order = rooms.split()
    wrong = []
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in order:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitrail."):
                other = str(node.module).split(".")[1]
                if other in order and order.index(other) > order.index(room):
                    wrong.append(f"{path.relative_to(SOURCE)} imports {node.module}")
    assert not wrong, wrong
