"""Tasks whose components are the programs of an export, and what export writes of a task.

A program is a component with plain tensors in and out, so that every engine can run it. `Task.programs` gives those of
a task, and `Task.run_programs` the components that call them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.tasks.values import Batch

if TYPE_CHECKING:
    from vitrail.tasks.task import Task

Engine = Callable[..., tuple[Tensor, ...]]
"""runs a program: its inputs to its outputs, in their order"""

AFTER = ".after"
"""ending of an output that is an input of the next step"""


@dataclass(frozen=True)
class Program:
    """A component as export writes it."""

    module: nn.Module
    """tensors to a tuple of tensors"""
    inputs: Mapping[str, Tensor]
    """examples; no free axis may have a length of 0 or 1, which tracing takes for constant"""
    outputs: Sequence[str]
    """names"""
    free: Mapping[str, Mapping[int, str]]
    """for each input the axes of any length, with a name; those of one name have one length. `height` and `width` are
    those of images in pixels"""
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """smallest and largest length of axes, where the model has limits"""
    steps: int = 1
    """how often the proof runs it: each time with the outputs `NAME.after` of the last one as the inputs `NAME`"""
    answer: str = ""
    """lines of Python for `example.py`: from `outputs`, the arrays of one image, and `config` to the text `answer`"""


class _Outputs(nn.Module):
    """A task as a program: images to the tensors of its raw outputs."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.task(images)
        return tuple(found.values()) if isinstance(found, dict) else (found,)


CLASS = """\
answer = config["classes"][np.bincount(outputs[0].reshape(len(outputs[0]), -1).argmax(0)).argmax()]  # most places
"""
"""`Program.answer` of a task with classes: of a mask, the class of most places"""


def whole(task: Task, batch: Batch, answer: str = CLASS) -> dict[str, Program]:
    """The one program of a task whose component is its forward. `answer` is that of the `Program`."""
    found = task(batch["image"])
    names = list(found) if isinstance(found, dict) else ["output"]
    free = {"images": {0: "batch", 2: "height", 3: "width"}}
    return {"model": Program(_Outputs(task), {"images": batch["image"]}, names, free, answer=answer)}


def run_whole(engine: Engine, names: Sequence[str]) -> Callable[[Tensor], Tensor | dict[str, Tensor]]:
    """The inverse of `whole`: what calls the engine as the task's forward is called."""

    def run(images: Tensor) -> Tensor | dict[str, Tensor]:
        found = engine(images)
        return found[0] if list(names) == ["output"] else dict(zip(names, found, strict=True))

    return run


class Exported:
    """The first base class of a task that an export runs: the same task in every answer, without weights."""

    exported: dict[str, Any]
    """the components"""
    engines: dict[str, Engine]
    """what runs each program"""
    made_from: str
    """the export, in errors"""

    def components(self) -> dict[str, Any]:
        return self.exported

    def forward(self, images: Tensor, *others: Any, **named: Any) -> Any:
        if "model" not in self.exported or any(value is not None for value in (*others, *named.values())):
            self._refuse()
        return self.exported["model"](images)

    def features(self, images: Tensor) -> NoReturn:
        self._refuse()

    def loss(self, batch: Batch, gather: Any = None) -> NoReturn:
        self._refuse()

    def explained(self, batch: Batch, outputs: Any = None) -> NoReturn:
        self._refuse()

    def explainable(self, batch: Batch) -> NoReturn:
        self._refuse()

    def pieces(self, batch: Batch) -> NoReturn:
        self._refuse()

    def with_classes(self, classes: list[str]) -> NoReturn:
        self._refuse()

    def programs(self, batch: Batch) -> NoReturn:
        self._refuse()

    def save(self, path: Any, weights: Any = None) -> NoReturn:
        self._refuse()

    def __reduce__(self) -> tuple[Any, ...]:
        """For workers that prepare images: the task without its engines, which no process can give to another."""
        kept = {name: value for name, value in vars(self).items() if name not in ("engines", "exported")}
        return _without_engines, (type(self).__mro__[2], kept)

    def _refuse(self) -> NoReturn:
        refuse(self.made_from)


def _without_engines(kind: type[Task], values: dict[str, Any]) -> Task:
    task = kind.__new__(kind)
    vars(task).update(values)
    return task


class ExportedEncoder(nn.Module):
    """Stands for the encoder of an export: its config without a network."""

    def __init__(self, config: Any, source: object) -> None:
        super().__init__()
        self.config, self.made_from = config, str(source)

    def forward(self, images: Tensor) -> NoReturn:
        refuse(self.made_from)


def refuse(source: object) -> NoReturn:
    """An export predicts and is scored; it has no weights and no tokens for anything else."""
    raise UserError(
        f"{source} is an export, which predicts and is scored but has no weights and features: "
        "give the checkpoint that it was made from"
    )


def run_by(task: Task, engines: Mapping[str, Engine], outputs: Mapping[str, Sequence[str]], source: object) -> Task:
    """The task, which has lost its weights, with `engines` in the place of its components.

    Args:
        task: built for a config; its weights may be on the meta device.
        engines: those of all its programs, by name.
        outputs: names of their outputs.
        source: the export, for errors.
    """
    for module in task.modules():
        for tensors in (module._parameters, module._buffers):
            for name in tensors:
                if tensors[name] is not None and tensors[name].is_meta:  # type: ignore[union-attr]
                    tensors[name] = None
    task.encoder = ExportedEncoder(task.encoder.config, source)
    kind = type(task)
    # A class of its own, so that everything that asks for the kind of task gets its answer.
    task.__class__ = type(f"Exported{kind.__name__}", (Exported, kind), {})
    running: Any = task
    running.made_from = str(source)
    # Tells where images go, as the first parameter of any task does.
    running.register_parameter("place", nn.Parameter(torch.empty(0), requires_grad=False))
    running._parameters = {"place": running._parameters.pop("place"), **running._parameters}
    running.engines = dict(engines)
    running.exported = kind.run_programs(task, engines, outputs)
    return task.eval()
