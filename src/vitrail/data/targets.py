"""Targets: what the samples of a set carry beside their images. Each kind reads, warps, mixes and splits itself.

The loader, the loop and the checks of a set ask a target for these, and know no kind of it.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import UserError

if TYPE_CHECKING:
    from vitrail.data.affine import Affine
    from vitrail.data.sets import ImageSet, Splits

Fields = dict[str, Any]
"""of a batch, by name: tensors and lists with one entry per sample; plain values and tensors without axes, which all
samples share"""


class Target(ABC):
    """A column with one entry per sample of a set."""

    fields: ClassVar[tuple[str, ...]]
    """its names in a batch"""
    spatial: ClassVar[bool] = False
    """whether it follows the affine of its image, as masks and boxes do"""
    noun: ClassVar[str] = "these targets"
    """what error messages call it"""
    classes: list[str]
    """names, where it has classes; else []"""

    @classmethod
    def of(cls, images: ImageSet) -> Self:
        """The target of a set, which must be of this kind: TypeError elsewhere."""
        if not isinstance(images.target, cls):
            raise TypeError(f"{images.name} has {type(images.target).__name__}, not {cls.__name__}")
        return images.target

    @classmethod
    def open(
        cls, data: str | Path, *, name: str | None = None, group: str | None = None, val_fraction: float = 0.1
    ) -> Splits:
        """The sets of this kind at a path, or of a name.

        `name` is the built-in set that the caller expects. No `group` (see `vitrail.data.groups`) may lie in two
        splits. `val_fraction` is for kinds that hold images back as they open a set that names no split at all; others
        leave it to `split_val`. Raises UserError where the path holds no set of this kind.
        """
        raise UserError(f"{cls.__name__} cannot be opened from {data}: give the sets themselves")

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def subset(self, places: Tensor) -> Self:
        """The entries at `places`, int64 [M], in that order."""

    @abstractmethod
    def joined(self, other: Self) -> Self:
        """These entries and then those of another target of the same kind and classes."""

    @abstractmethod
    def marks(self) -> bytes:
        """What the data hash of a run covers: other bytes for other entries."""

    @abstractmethod
    def collate(self, values: list[Any], samples: Tensor, training: bool) -> Fields:
        """The fields of a batch, with tensors on the device of `samples` (int64 [B], numbers in the set).

        `values` are those that `read` and `warp` gave. Evaluation may need more fields than training does.
        """

    def strata(self) -> Tensor:
        """int64 [N]: the strata that validation splits and balanced draws go by; zeros where there is only one."""
        return torch.zeros(len(self), dtype=torch.int64)

    def stratum(self, number: int) -> str:
        """What people call a stratum; empty where it has no name."""
        return ""

    def truth(self, i: int) -> dict[str, Any]:
        """What is known of sample i, as plain data for a report."""
        return {}

    def read(self, i: int) -> Any:
        """In a worker: what must be fetched for sample i; None where all is in memory.

        Raises BadImage to leave the sample out; so may `warp`, where the value does not fit its image.
        """
        return None

    def warp(self, value: Any, affine: Affine) -> Any:
        """The value of one sample in the pixels of the model's input. Called for spatial targets only."""
        return value

    def to(self, device: torch.device) -> Self:
        """The same target, with what it gathers batches from on `device`."""
        return self

    def mix(self, fields: Fields, partner: Tensor, share: Tensor) -> Fields:
        """The fields after mixup or cutmix: each sample keeps its `share` [B], the rest is its `partner`'s (int64 [B]).

        Raises UserError where there is nothing that can be mixed. The loader asks with an empty batch first.
        """
        raise UserError(f"mixup and cutmix mix the labels of classes, and {self.noun} have none: leave them out")

    @classmethod
    def split(cls, fields: Fields, count: int) -> list[Fields]:
        """A batch in at most `count` micro-batches, as even as they can be; none is empty.

        They take whole pairs (places 2k and 2k + 1, which mixup and cutmix mix), where there are as many pairs as
        micro-batches.
        """
        size = len(next(value for value in fields.values() if _per_sample(value)))
        unit = 2 if size >= 2 * count else 1
        units = -(-size // unit)
        sizes = [units // count + (i < units % count) for i in range(min(count, units))]
        bounds = [min(unit * end, size) for end in itertools.accumulate(sizes)]
        return [_cut(fields, start, stop) for start, stop in zip([0, *bounds[:-1]], bounds, strict=True)]

    @classmethod
    def rescale(cls, fields: Fields, size: tuple[int, int]) -> Fields:
        """The fields for images of the batch that were resized to `size` (height, width)."""
        return fields


def _per_sample(value: Any) -> bool:
    """Plain values and tensors without axes are shared by all samples of a batch."""
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)


def _cut(fields: Fields, start: int, stop: int) -> Fields:
    cut = {name: value[start:stop] if _per_sample(value) else value for name, value in fields.items()}
    if (affine := fields.get("affine")) is not None:
        cut["affine"] = affine.subset(range(start, stop))
    return cut


@dataclass(frozen=True, eq=False)
class Labels(Target):
    """One class per image. In a batch `label`: int64 [B], or soft targets float32 [B, K] after mixup or cutmix."""

    fields = ("label",)

    labels: Tensor
    """class numbers, int64 [N]"""
    classes: list[str]

    @classmethod
    def open(
        cls, data: str | Path, *, name: str | None = None, group: str | None = None, val_fraction: float = 0.1
    ) -> Splits:
        from vitrail.data.groups import check_splits
        from vitrail.data.sets import open_data

        splits = open_data(data, name=name, grouped=group is not None)
        if group is not None:
            check_splits(splits, group)
        return splits

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, places: Tensor) -> Labels:
        return replace(self, labels=self.labels[places])

    def joined(self, other: Labels) -> Labels:
        return replace(self, labels=torch.cat([self.labels, other.labels]))

    def strata(self) -> Tensor:
        return self.labels

    def stratum(self, number: int) -> str:
        return self.classes[number]

    def truth(self, i: int) -> dict[str, Any]:
        return {"label": self.classes[int(self.labels[i])]}

    def marks(self) -> bytes:
        return self.labels.numpy().tobytes()

    def to(self, device: torch.device) -> Labels:
        return replace(self, labels=self.labels.to(device))

    def collate(self, values: list[Any], samples: Tensor, training: bool) -> Fields:
        return {"label": self.labels[samples]}

    def mix(self, fields: Fields, partner: Tensor, share: Tensor) -> Fields:
        targets = F.one_hot(fields["label"], len(self.classes)).float()
        own = share[:, None]
        return {**fields, "label": targets * own + targets[partner] * (1 - own)}


@dataclass(frozen=True, eq=False)
class Texts(Target):
    """Captions, at least one per image. A batch of evaluation holds `captions`, the texts of each of its images.

    A task that learns from numbers hands the loader `numbered` texts; then each batch also holds `label`, int64
    [B, K, T].
    """

    fields = ("label", "captions")
    noun = "captions"

    captions: list[list[str]]
    """of each image, with white space between words made single and otherwise as they stand in the file"""
    numbers: Tensor | None = None
    """int64 [N, K, T]: the same K captions per image in the numbers of a tokenizer"""
    classes: list[str] = field(default_factory=list, init=False)

    @classmethod
    def open(
        cls, data: str | Path, *, name: str | None = None, group: str | None = None, val_fraction: float = 0.1
    ) -> Splits:
        from vitrail.data.captions import open_captions
        from vitrail.data.groups import check_splits

        splits = open_captions(data, val_fraction, group)
        if group is not None:
            check_splits(splits, group)
        return splits

    def __len__(self) -> int:
        return len(self.captions)

    def truth(self, i: int) -> dict[str, Any]:
        return {"captions": self.captions[i]}

    def numbered(self, numbers: Tensor) -> Texts:
        """These texts with their numbers, int64 [N, K, T]."""
        return replace(self, numbers=numbers)

    def subset(self, places: Tensor) -> Texts:
        numbers = None if self.numbers is None else self.numbers[places]
        return Texts([self.captions[i] for i in places.tolist()], numbers)

    def joined(self, other: Texts) -> Texts:
        """Without numbers, which are as long as the longest text."""
        return Texts(self.captions + other.captions)

    def marks(self) -> bytes:
        return repr(self.captions).encode(errors="surrogatepass")

    def to(self, device: torch.device) -> Texts:
        return self if self.numbers is None else replace(self, numbers=self.numbers.to(device))

    def collate(self, values: list[Any], samples: Tensor, training: bool) -> Fields:
        fields: Fields = {} if self.numbers is None else {"label": self.numbers[samples]}
        # No texts in training: a step reads no Python value per sample, and waits for no device.
        return fields if training else {**fields, "captions": [self.captions[i] for i in samples.tolist()]}
