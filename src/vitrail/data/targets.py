"""Targets: the data of a set's samples beside their images. Each type reads, warps, mixes and splits itself.

The loader, the training loop and the checks of a set use this interface only, never a concrete type.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
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
"""the fields of a batch, by name: tensors and lists with one entry per sample, plain values and scalar tensors for all
samples"""


class Target(ABC):
    """A column with one entry per sample of a set."""

    fields: ClassVar[tuple[str, ...]]
    """its field names in a batch"""
    spatial: ClassVar[bool] = False
    """whether it is warped by its image's affine, as masks and boxes are"""
    noun: ClassVar[str] = "these targets"
    """its name in error messages"""
    classes: list[str]
    """names of the classes; [] if there are none"""

    @classmethod
    def of(cls, images: ImageSet) -> Self:
        """The target of a set, which must have this type. Raises TypeError otherwise."""
        if not isinstance(images.target, cls):
            raise TypeError(f"{images.name} has {type(images.target).__name__}, not {cls.__name__}")
        return images.target

    @classmethod
    def open(
        cls,
        data: str | Path,
        *,
        name: str | None = None,
        group: str | None = None,
        val_fraction: float = 0.1,
        **options: Any,
    ) -> Splits:
        """The splits at a path, or of a built-in set by name.

        `name` is the built-in set that the caller expects. No `group` (see `vitrail.data.groups`) may be in two
        splits. `val_fraction` is for types that hold images back when they open a set without named splits; others
        leave this to `split_val`. `options` are of the type: see `open_splits`. Raises UserError if the path contains
        no set of this type.
        """
        from vitrail.data.groups import check_splits

        splits = cls.open_splits(data, name, group, val_fraction, **options)
        if group is not None:
            check_splits(splits, group)
        return splits

    @classmethod
    def open_splits(cls, data: str | Path, name: str | None, group: str | None, val_fraction: float) -> Splits:
        """What `open` reads. Types with options of their own have them as further arguments."""
        raise UserError(f"{cls.__name__} cannot be opened from {data}: pass the sets themselves")

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def subset(self, places: Tensor) -> Self:
        """The entries at `places`, int64 [M], in that order."""

    @abstractmethod
    def joined(self, other: Self) -> Self:
        """These entries, then those of another target of the same type and classes."""

    @abstractmethod
    def fingerprint(self) -> bytes:
        """Bytes for the data hash of a run: they differ if the entries differ."""

    @abstractmethod
    def collate(self, values: list[Any], samples: Tensor, training: bool) -> Fields:
        """The fields of a batch, with tensors on the device of `samples` (int64 [B], numbers in the set).

        `values` are the results of `read` and `warp`. Evaluation may need more fields than training.
        """

    def strata(self) -> Tensor:
        """int64 [N]: the strata for validation splits and balanced sampling; zeros if there is only one."""
        return torch.zeros(len(self), dtype=torch.int64)

    def stratum(self, number: int) -> str:
        """The name of a stratum; empty if it has none."""
        return ""

    def per_image(self) -> Tensor:
        """[N, ...]: what is learned of each image from the features of a frozen encoder. UserError if there is none."""
        raise UserError(f"methods for frozen features learn one label per image, and {self.noun} are none: choose full")

    def truth(self, i: int) -> dict[str, Any]:
        """The ground truth of sample i, as plain data for a report."""
        return {}

    def read(self, i: int) -> Any:
        """Read the value of sample i, in a worker; None if all values are in memory.

        Raises BadImage to leave the sample out; so may `warp`, if the value does not fit its image.
        """
        return None

    def warp(self, value: Any, affine: Affine) -> Any:
        """Map the value of one sample to the model's input. Called for spatial targets only."""
        return value

    def to(self, device: torch.device) -> Self:
        """The same target, with the tensors from which it builds batches on `device`."""
        return self

    def mix(self, fields: Fields, partner: Tensor, share: Tensor) -> Fields:
        """The fields after mixup or cutmix: each sample has weight `share` [B], its `partner` (int64 [B]) the rest.

        Raises UserError if this target cannot be mixed. The loader first calls it with an empty batch, as a check.
        """
        raise UserError(f"mixup and cutmix mix class labels, and {self.noun} have none: set both to 0")

    @classmethod
    def split(cls, fields: Fields, count: int) -> list[Fields]:
        """Split a batch into at most `count` micro-batches of nearly equal size; none is empty.

        Pairs (places 2k and 2k + 1, which mixup and cutmix mix) stay together if there are at least as many pairs as
        micro-batches.
        """
        size = len(next(value for name, value in fields.items() if name != "views" and _per_sample(value)))
        unit = 2 if size >= 2 * count else 1
        units = -(-size // unit)
        sizes = [units // count + (i < units % count) for i in range(min(count, units))]
        bounds = [min(unit * end, size) for end in itertools.accumulate(sizes)]
        return [_cut(fields, start, stop) for start, stop in zip([0, *bounds[:-1]], bounds, strict=True)]

    @classmethod
    def rescale(cls, fields: Fields, size: tuple[int, int]) -> Fields:
        """The fields after the images of the batch were resized to `size` (height, width)."""
        return fields


def _per_sample(value: Any) -> bool:
    """False for plain values and scalar tensors, which all samples of a batch share."""
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)


def _cut(fields: Fields, start: int, stop: int) -> Fields:
    cut = {name: value[start:stop] if _per_sample(value) else value for name, value in fields.items()}
    if "views" in fields:  # a list of batches, one per view
        cut["views"] = [view[start:stop] for view in fields["views"]]
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
    def open_splits(cls, data: str | Path, name: str | None, group: str | None, val_fraction: float) -> Splits:
        from vitrail.data.sets import open_data

        return open_data(data, name=name, grouped=group is not None)

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

    def per_image(self) -> Tensor:
        return self.labels

    def truth(self, i: int) -> dict[str, Any]:
        return {"label": self.classes[int(self.labels[i])]}

    def fingerprint(self) -> bytes:
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
class _Rows(Target):
    """A row of numbers per image. Mixup and cutmix give an image the mean of two rows, by their shares."""

    values: Tensor
    """[N, K]"""

    def __len__(self) -> int:
        return len(self.values)

    def subset(self, places: Tensor) -> Self:
        return replace(self, values=self.values[places])

    def joined(self, other: Self) -> Self:
        return replace(self, values=torch.cat([self.values, other.values]))

    def fingerprint(self) -> bytes:
        return self.values.numpy().tobytes()

    def to(self, device: torch.device) -> Self:
        return replace(self, values=self.values.to(device))

    def collate(self, values: list[Any], samples: Tensor, training: bool) -> Fields:
        return {self.fields[0]: self.values[samples]}

    def mix(self, fields: Fields, partner: Tensor, share: Tensor) -> Fields:
        (name,), own = self.fields, share[:, None]
        return {**fields, name: fields[name] * own + fields[name][partner] * (1 - own)}


@dataclass(frozen=True, eq=False)
class Tags(_Rows):
    """Any number of labels per image. In a batch `tags`: float32 [B, K], 1 for the labels that an image has, else 0."""

    fields = ("tags",)
    noun = "images with several labels"

    classes: list[str]

    @classmethod
    def open_splits(cls, data: str | Path, name: str | None, group: str | None, val_fraction: float) -> Splits:
        from vitrail.data.table_sets import open_tags

        return open_tags(data, val_fraction, group)

    def truth(self, i: int) -> dict[str, Any]:
        return {"labels": [self.classes[k] for k in self.values[i].nonzero()[:, 0].tolist()]}


@dataclass(frozen=True, eq=False)
class Numbers(_Rows):
    """Numbers of each image, such as an age. In a batch `values`: [B, V], as float64, or as the task encodes them."""

    fields = ("values",)
    noun = "images with numbers"

    names: list[str]
    """what each number is"""
    classes: list[str] = field(default_factory=list, init=False)

    @classmethod
    def open_splits(
        cls,
        data: str | Path,
        name: str | None,
        group: str | None,
        val_fraction: float,
        values: Sequence[str] | None = None,
    ) -> Splits:
        """`values` are the columns of a table that are read; None for all."""
        from vitrail.data.table_sets import open_numbers

        return open_numbers(data, val_fraction, group, values)

    def changed(self, values: Tensor) -> Numbers:
        """The same with other values, [N, V]."""
        return replace(self, values=values)

    def truth(self, i: int) -> dict[str, Any]:
        pairs = zip(self.names, self.values[i].tolist(), strict=True)
        return {"values": [{"name": name, "value": value} for name, value in pairs]}


@dataclass(frozen=True, eq=False)
class Texts(Target):
    """Captions, at least one per image. A batch in evaluation contains `captions`, the texts of each image.

    A task that trains on token ids passes `numbered` texts to the loader; then each batch also contains `label`, int64
    [B, K, T].
    """

    fields = ("label", "captions")
    noun = "captions"

    captions: list[list[str]]
    """of each image, as in the file except that white space between words becomes one space"""
    numbers: Tensor | None = None
    """int64 [N, K, T]: K captions per image as token ids"""
    classes: list[str] = field(default_factory=list, init=False)

    @classmethod
    def open_splits(cls, data: str | Path, name: str | None, group: str | None, val_fraction: float) -> Splits:
        from vitrail.data.captions import open_captions

        return open_captions(data, val_fraction, group)

    def __len__(self) -> int:
        return len(self.captions)

    def truth(self, i: int) -> dict[str, Any]:
        return {"captions": self.captions[i]}

    def numbered(self, numbers: Tensor) -> Texts:
        """These texts with their token ids, int64 [N, K, T]."""
        return replace(self, numbers=numbers)

    def per_image(self) -> Tensor:
        return super().per_image() if self.numbers is None else self.numbers

    def subset(self, places: Tensor) -> Texts:
        numbers = None if self.numbers is None else self.numbers[places]
        return Texts([self.captions[i] for i in places.tolist()], numbers)

    def joined(self, other: Texts) -> Texts:
        """Without token ids, whose length T differs from set to set."""
        return Texts(self.captions + other.captions)

    def fingerprint(self) -> bytes:
        return repr(self.captions).encode(errors="surrogatepass")

    def to(self, device: torch.device) -> Texts:
        return self if self.numbers is None else replace(self, numbers=self.numbers.to(device))

    def collate(self, values: list[Any], samples: Tensor, training: bool) -> Fields:
        fields: Fields = {} if self.numbers is None else {"label": self.numbers[samples]}
        # No texts in training: reading Python values per sample would make a step wait for the device.
        return fields if training else {**fields, "captions": [self.captions[i] for i in samples.tolist()]}
