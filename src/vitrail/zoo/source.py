"""The interface of all checkpoint sources: they read files into a config and a renaming table.

A source is a module of this folder with the names of `Source`. It never builds a model: `read` describes the files, and
`vitrail.zoo.load` builds the model, so that every source is checked and reported in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.tasks.task import Task
from vitrail.tasks.values import Problem
from vitrail.vit import ViTConfig


class Lazy(Mapping[str, Tensor]):
    """Tensors that are mapped or read on access, not when listing names."""

    def __init__(
        self, names: Iterable[str], get: Callable[[str], Tensor], passing: Callable[[str], Tensor] | None = None
    ) -> None:
        self.names, self.get_tensor = dict.fromkeys(names), get
        self.passing = passing or get
        """a tensor to copy from: it is mapped separately, so that its memory is freed with it"""

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
    """The origin of one of the model's tensors."""

    names: tuple[str, ...]
    """its names in the source"""
    make: Callable[..., Tensor] | None = None
    """function of those tensors, in that order; None: the single tensor unchanged, which stays memory-mapped"""
    change: str = ""
    """`make` in words, for the certificate: "joined", "transposed", "interpolated from 14x14 to 16x16" """


@dataclass
class Files:
    """A checkpoint on disk, before its source is known."""

    path: Path
    """the requested folder or file"""
    json: dict[str, Any]
    """the contents of the small JSON files beside the weights, by file name: `config.json`, ..."""
    weights: Mapping[str, Tensor]
    """tensors by name; in nested dictionaries, by names joined with dots. Names are free; a tensor is mapped
    (safetensors, PyTorch) or read (NumPy) on access.
    """
    shapes: Mapping[str, tuple[int, ...]]
    """every weight's shape, without reading it"""
    notes: list[str] = field(default_factory=list)
    """notes of the reader, such as the chosen entry"""
    left: dict[str, str] = field(default_factory=dict)
    """entries that are not weights (an optimizer, an epoch number), with the reason for not using them"""
    entries: tuple[str, ...] = ("",)
    """the inner dictionaries that hold tensors, by the same joined names; "" is the outermost"""


@dataclass
class Found:
    """The result of reading a source: the model in vitrail's terms."""

    source: str
    """display name, with the variant: "timm vit_base_patch16_224", "Google's AugReg .npz" """
    encoder: ViTConfig | None
    """None if `task` builds something else"""
    classes: list[str] | None
    """names of the head's outputs (numbers in words where the source has no names); None for an encoder without one"""
    preprocess: Preprocess
    weights: dict[str, Weight]
    """weights by the names of the task's `state_dict`: `encoder.*`, and `head.*` if there are classes"""
    left: dict[str, str]
    """names in the source that are left out on purpose, each with the reason; any other unused name is an error"""
    hidden: int | None = None
    """width of the pre-training head's hidden layer"""
    notes: list[str] = field(default_factory=list)
    """notes for the user, such as a default for a missing file"""
    task: Callable[[], Task] | None = None
    """builds the model, with new weights, if it is more than an encoder and a head (vitrail's own format)"""
    ready: Callable[[], Task] | None = None
    """returns the model with its weights, if another library loads them"""
    problem: Problem = "single_label_classification"
    """the meaning of the head's outputs"""


class Source(Protocol):
    """A module for one kind of checkpoint. `reference` and `write` are optional.

    `reference(files) -> Callable[[Tensor], dict[str, Tensor]] | None` gives the source library's own model, from
    normalised images to `logits` and/or `tokens` [B, P + N, D], where that library is installed.
    `write(task, folder)` fills a folder that the library's own loader reads, and refuses what it cannot express.
    """

    NAME: str
    """its name in `convert --to`"""

    def recognise(self, files: Files) -> bool:
        """Whether the files are of this source. Fast: only names, shapes and JSON."""

    def read(self, files: Files) -> Found:
        """Read the files. UserError if they contradict themselves or hold a model that vitrail cannot express."""
