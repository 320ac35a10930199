"""The walls between rooms: outside `tasks/`, `recipes/` and the readers of `zoo/`, no code knows a particular task.

What belongs to a task is read from `TASKS` and the modules of their classes, so that a new task is covered as it comes.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from task_examples import EXAMPLES, batch_for
from torch import Tensor, nn

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
LOOKUPS = {"get", "pop", "setdefault"}
"""methods of dicts whose first argument is a key"""

SHARED = {"vitrail.tasks.task", "vitrail.tasks.values", "vitrail.tasks.encoder", "vitrail.tasks.figures"}
"""modules of all tasks"""
ALLOWED: dict[str, dict[str, str]] = {
    "data/builtin.py": {"labels": "an array of the bundled digits"},
    "data/captions.py": {"caption": "a column of people's tables"},
    "data/kinds.py": {"caption": "a column of people's tables"},
    "data/masks.py": {"mask": "the field of its own target"},
    "data/shards.py": {"label": "an entry of people's files"},
    "data/targets.py": {"label": "the field of its own target"},
    "zoo/hub.py": {"head": "HTTP's HEAD"},
    "zoo/timm/__init__.py": {"labels": "an entry of timm's configs", "tag": "the same"},
}
"""by file: the names it may use, each with the reason"""


def modules() -> Iterator[ModuleType]:
    """Those of the tasks' classes and of what they inherit from; of a task that is a package, all of its modules."""
    names: set[str] = set()
    for task in TASKS:
        for kind in task_class(task).__mro__:
            path = kind.__module__.split(".")
            if path[:2] != ["vitrail", "tasks"] or kind.__module__ in SHARED:
                continue
            names.add(kind.__module__)
            if len(path) > 3:
                package = import_module(".".join(path[:3]))
                names |= {package.__name__, *(f"{package.__name__}.{m.name}" for m in iter_modules(package.__path__))}
    yield from map(import_module, sorted(names))


def classes_in(modules: Iterable[ModuleType]) -> Iterator[type]:
    """The classes that are defined in these modules."""
    for module in modules:
        yield from (
            kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__
        )


def own_classes() -> set[str]:
    """Concrete tasks, their settings, options, targets, predictions and metrics."""
    found = {kind.__name__ for kind in classes_in(modules())}
    for name in TASKS:
        kind = task_class(name)
        found |= {own.__name__ for own in (kind.settings, kind.options, kind.target) if own not in GENERAL}
    return found


def attributes(kind: type) -> set[str]:
    """The names that a class itself defines."""
    return {*vars(kind), *vars(kind).get("__annotations__", {}), *getattr(kind, "__static_attributes__", ())}


def own_names() -> set[str]:
    """What only concrete tasks have: their attributes, and the fields of their settings, options and predictions."""
    found: set[str] = set()
    for name in TASKS:
        kind = task_class(name)
        found |= {entry.name for entry in fields(kind.settings)} | flat_fields(kind.options()).keys()
        for base in kind.__mro__:
            if issubclass(base, Task) and base is not Task:
                found |= attributes(base)
    for kind in classes_in(modules()):
        if issubclass(kind, Prediction):
            found |= {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    contract = set(dir(Task)) | set(Task.__annotations__)
    for kind in classes_in(map(import_module, SHARED)):
        contract |= attributes(kind)
    return {name for name in found - contract if not name.startswith("__")}


def own_keys() -> set[str]:
    """The fields of targets in a batch, the fields of predictions, and the scores."""
    found: set[str] = set()
    for name in TASKS:
        kind = task_class(name)
        found |= {*kind.target.fields}
        if kind.score is not None:
            task = next(iter(EXAMPLES[name].values()))().eval()
            batch, metric = batch_for(task, 2), task.metric()
            with torch.inference_mode():
                metric.update(batch, task.answer(batch) if task.metric_reads == "answers" else task(batch["image"]))
            found |= metric.compute().keys()
    for kind in classes_in(modules()):
        if issubclass(kind, Prediction):
            found |= {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    return found - {"count", "classes", "worst"}  # of any task


def other_names() -> set[str]:
    """Attributes of other classes and modules, which tell nothing of a task: of other rooms, Python and PyTorch."""
    found = {name for kind in (dict, str, Path, Tensor, nn.Module, Image.Image, re.Pattern) for name in dir(kind)}
    for path in ROOMS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


ROOMS = [path for path in sorted(SOURCE.rglob("*.py")) if path.relative_to(SOURCE).parts[0] not in FREE]
CLASSES, NAMES, KEYS = own_classes(), own_names(), own_keys()
ATTRIBUTES = NAMES - other_names()
TASK_MODULES = {module.__name__ for module in modules()}


def faults(tree: ast.AST, allowed: Collection[str] = ()) -> Iterator[str]:
    """What in a module knows a particular task."""
    classes, names, keys = CLASSES - bound(tree), NAMES - {*allowed}, KEYS - {*allowed}
    attributes, compared = ATTRIBUTES - {*allowed}, (set(TASKS) | SCORES) - {*allowed}
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitrail.tasks"):
            module = str(node.module)
            imported = [f"{module}.{alias.name}" for alias in node.names]
            if module in TASK_MODULES or TASK_MODULES & set(imported):
                yield f"{line}: imports {', '.join(alias.name for alias in node.names)} from {module}"
        elif isinstance(node, ast.Import):
            yield from (f"{line}: imports {a.name}" for a in node.names if a.name in TASK_MODULES)
        elif isinstance(node, ast.Name) and node.id in classes:
            yield f"{line}: names {node.id}"
        elif isinstance(node, ast.Attribute) and node.attr in classes | attributes:
            yield f"{line}: names {node.attr}"
        elif isinstance(node, ast.Subscript):
            yield from (f"{line}: reads {key}" for key in sorted(texts(node.slice) & keys))
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in ("hasattr", "getattr") and (found := set().union(*map(texts, node.args[1:2])) & names):
                yield f"{line}: asks for {', '.join(sorted(found))}"
            elif name in LOOKUPS and node.args and (found := texts(node.args[0]) & keys):
                yield f"{line}: reads {', '.join(sorted(found))}"
        elif isinstance(node, ast.Compare | ast.MatchValue):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.value]
            values = {c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)}
            if known := {value for value in values if isinstance(value, str)} & (compared | keys):
                yield f"{line}: compares with {', '.join(sorted(known))}"


def texts(node: ast.AST) -> set[str]:
    """The string that an expression is, if it is one."""
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


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
    found = list(faults(tree, ALLOWED.get(path.relative_to(SOURCE).as_posix(), ())))
    assert not found, f"{path.relative_to(SOURCE)}: {'; '.join(found)}; ask the contract (vitrail/tasks/task.py)"


def test_what_belongs_to_tasks_is_known() -> None:
    assert {"Classify", "Classification", "Caption", "Captioning", "Decoding", "Regress", "Embed"} <= CLASSES
    assert {"Task", "Prediction", "Score", "Settings"}.isdisjoint(CLASSES)
    assert {"decoder", "smoothing", "beam", "neighbours"} <= NAMES and {"encoder", "preprocess", "loss"}.isdisjoint(
        NAMES
    )
    assert {"head", "smoothing", "beam", "neighbours"} <= ATTRIBUTES and "text" not in ATTRIBUTES
    assert {"label", "captions", "top1", "per_class", "cider", "bleu4"} <= KEYS and {"count", "loss"}.isdisjoint(KEYS)


def test_every_allowance_is_needed() -> None:
    for name, allowed in ALLOWED.items():
        found = " ".join(faults(ast.parse((SOURCE / name).read_text(encoding="utf-8"))))
        assert all(re.search(rf"\b{word}\b", found) for word in allowed), (name, found)


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
        ("x = batch['label']", "reads label"),
        ("x = scores['cider']", "reads cider"),
        ("x = scores.get('per_class', ())", "reads per_class"),
        ("x = 'captions' in batch", "compares with captions"),
        ("x = task.neighbours", "names neighbours"),
        ("x = run.task.smoothing", "names smoothing"),
        ("run.task.decoding.beam = 3", "names beam"),
        ("match name:\n  case 'classify': pass", "compares with classify"),
    ],
)
def test_it_finds_what_it_looks_for(code: str, words: str) -> None:
    assert any(words in fault for fault in faults(ast.parse(code)))


def test_imports_point_one_way() -> None:
    """No module imports from a room above its own, but where a name is only for types, or inside a function."""
    rooms = "vit baselines variants data tasks zoo explain report train predictions recipes start demo cli"
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
