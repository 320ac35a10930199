"""The values of the contract: scores, predictions, settings, and what else a task gives to those who do not know it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Batch = dict[str, Any]
UsedWith = Mapping[str, tuple[str, tuple[Any, ...]]]
"""options that only some values of another option use: its name and these values; () for any but none, 0 and false"""
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""what the outputs of a head mean, in transformers' words: one class of all, each class for itself, or values"""


@dataclass(frozen=True)
class Score:
    """The entry of a metric that chooses the best checkpoint."""

    name: str
    best: Literal["max", "min"] = "max"
    unit: Literal["%", ""] = "%"
    """how it is displayed: a fraction as a percentage, or a plain number"""
    label: str = ""
    """its display name, if that differs; training logs its running mean under either"""

    def better(self, new: float, old: float | None) -> bool:
        """Whether `new` is at least as good as `old`: of equal scores, the one that has trained longer counts."""
        return old is None or (new >= old if self.best == "max" else new <= old)

    def text(self, value: float | None) -> str:
        """`84.60 %`, or `0.427`."""
        if value is None:
            return ""
        return f"{100 * value:.2f} %" if self.unit == "%" else f"{value:.3f}"


class Prediction(ABC):
    """The answer for one image. Each task has its own."""

    @abstractmethod
    def row(self) -> dict[str, Any]:
        """Plain data for a line of JSON."""

    @abstractmethod
    def text(self) -> str:
        """One line for a terminal."""

    def records(self) -> list[dict[str, Any]]:
        """Rows of a CSV file: one per image, as `row` has it, unless a task tells several things of an image."""
        return [self.row()]

    def images(self) -> dict[str, Image.Image]:
        """Images that are the answer itself, such as masks, by the word that is added to the name of the figure."""
        return {}

    def draw(self, image: Image.Image) -> Image.Image:
        """A figure for people: the image with the answer written below it, where a task does not draw it better."""
        from vitrail.tasks.figures import with_text

        return with_text(image, self.text())


class Section(NamedTuple):
    """A section of the report of a run that a task writes itself, from the pieces in `vitrail.html`."""

    title: str
    html: str


class Piece(NamedTuple):
    """A piece of an answer, such as a word, and where in the image it was read from."""

    text: str
    p: float
    """probability"""
    heat: Tensor | None
    """attention over the patches [h, w]; None for a model without"""


class Features(NamedTuple):
    """A split of a set, as a frozen encoder represents it."""

    vectors: Tensor
    """[N, D] float32, pooled"""
    labels: Tensor
    """the class of each image, int64 [N]"""


@dataclass(frozen=True)
class Portable:
    """What other libraries' checkpoints store of a task: an encoder, and a head if it has `outputs`."""

    outputs: Sequence[str] = ()
    """names of the head's outputs"""
    hidden: int | None = None
    """width of the tanh layer of the paper's pre-training head; None for a linear head"""
    problem: Problem | None = None
    """what the outputs mean; None if there is only one possible meaning"""


class Metric(Protocol):
    """Scores of an evaluation. Its state is kept by sample, so that a repeated or padded sample counts once."""

    def update(self, batch: Batch, outputs: Any) -> None:
        """Take in a batch and what the task gave for it (see `Task.metric_reads`)."""

    def state(self) -> dict[str, Tensor]:
        """What another process needs to merge."""

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in another process's state."""

    def compute(self) -> dict[str, Any]:
        """The scores: numbers, lists, or nested lists.

        `worst`, where there are mistakes to rank, are the numbers of the samples with the worst ones, the worst first:
        the report of a run shows them.
        """


@dataclass(frozen=True)
class Settings:
    """How a task is trained: the base of the dataclasses whose fields a recipe sets."""

    name: ClassVar[str]
    """of the task, in `TASKS`"""

    main: ClassVar[tuple[str, ...]] = ()
    """fields that the short help of a recipe shows"""
    balanced: ClassVar[bool] = False
    """class-balanced sampling: draw each class equally often"""
    any_encoder: ClassVar[bool] = False
    """weights to start from may be of another kind of encoder than the recipe's, whose preparation is then theirs"""
    resizes: ClassVar[bool] = False
    """the recipe's resizing and crop fraction hold for all weights: they are the scale at which answers have places"""

    def data_options(self) -> dict[str, Any]:
        """Keyword arguments with which the task's target opens a data set, such as the value that marks void pixels."""
        return {}


@dataclass(frozen=True)
class NoOptions:
    """The options of a task that has none."""


class Checkpoint(Protocol):
    """The files that a task is rebuilt from."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
