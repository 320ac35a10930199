"""What every source of checkpoints gives: a reading of its files, as a config and a renaming table.

A source is a module of this folder with the names of `Source`. It never builds a model: `read` says what the files
hold, and `vitrail.zoo.load` makes the model of it, so that every source is checked and reported in one way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.tasks.task import Problem, Task
from vitrail.vit import ViTConfig


class Lazy(Mapping[str, Tensor]):
    """Tensors that are mapped or read when they are asked for, and not for a look at the names."""

    def __init__(
        self, names: Iterable[str], get: Callable[[str], Tensor], passing: Callable[[str], Tensor] | None = None
    ) -> None:
        self.names, self.get_tensor = dict.fromkeys(names), get
        self.passing = passing or get
        """a tensor to copy from: it is mapped by itself, so that its memory goes when it does"""

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Weight(NamedTuple):
    """Where one of the model's tensors comes from."""

    names: tuple[str, ...]
    """names in the source that it is made of"""
    make: Callable[..., Tensor] | None = None
    """from those tensors, in that order; None: the one tensor as it is, which then stays memory-mapped"""
    change: str = ""
    """`make` in words, for the certificate: "joined", "transposed", "interpolated from 14x14 to 16x16" """


@dataclass
class Files:
    """A checkpoint as it lies on the disk, before anybody knows whose it is."""

    path: Path
    """the folder or the file that was asked for"""
    json: dict[str, Any]
    """the contents of the small JSON files beside the weights, by file name: `config.json`, ..."""
    weights: Mapping[str, Tensor]
    """by name; in a checkpoint of dictionaries within dictionaries, by their names joined with dots.

    Names cost nothing; a tensor is mapped (safetensors, PyTorch) or read (NumPy) when it is asked for.
    """
    shapes: Mapping[str, tuple[int, ...]]
    """every weight's shape, without reading it"""
    notes: list[str] = field(default_factory=list)
    """what the reader did on the way, such as which entry it chose"""
    left: dict[str, str] = field(default_factory=dict)
    """what stands beside the weights (an optimizer, an epoch number) with the reason why it is not used"""
    entries: tuple[str, ...] = ("",)
    """the inner dictionaries that hold tensors, by the same joined names; "" is the outermost"""


@dataclass
class Found:
    """What a source read: the model in vitrail's terms."""

    source: str
    """for people, with the variant: "timm vit_base_patch16_224", "Google's AugReg .npz" """
    encoder: ViTConfig | None
    """None where `task` builds something else"""
    classes: list[str] | None
    """names of the head's outputs (numbers in words where the source has no names); None for an encoder without one"""
    preprocess: Preprocess
    weights: dict[str, Weight]
    """by the names of the task's `state_dict`: `encoder.*`, and `head.*` where there are classes"""
    left: dict[str, str]
    """names in the source that are left out on purpose, each with the reason; any other unused name is an error"""
    hidden: int | None = None
    """width of the pre-training head's hidden layer"""
    notes: list[str] = field(default_factory=list)
    """what a person should know, such as a default that stands in for a missing file"""
    task: Callable[[], Task] | None = None
    """builds the model, with fresh weights, where it is more than an encoder and a head: vitrail's own"""
    ready: Callable[[], Task] | None = None
    """gives the model with its weights, where another library puts them in"""
    problem: Problem = "single_label_classification"
    """what the head's outputs mean"""


class Source(Protocol):
    """A module that knows one kind of checkpoint. `reference` and `write` are there where they can be.

    `reference(files) -> Callable[[Tensor], dict[str, Tensor]] | None` gives the source library's own model, from
    normalised images to `logits` and/or `tokens` [B, P + N, D], where that library is installed.
    `write(task, folder)` fills a folder that the library's own loader reads, and refuses what it cannot express.
    """

    NAME: str
    """what `convert --to` calls it"""

    def recognise(self, files: Files) -> bool:
        """Whether the content is of this source. Cheap: names, shapes and JSON only."""

    def read(self, files: Files) -> Found:
        """What the files hold. UserError where they contradict themselves or hold what vitrail cannot express."""
