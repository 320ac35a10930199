"""Masks, as a target: the class of every pixel, in one file or tensor per image or drawn from annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from vitrail.data import rle
from vitrail.data.affine import Affine
from vitrail.data.decode import BadImage
from vitrail.data.mask_files import VOID, Coding, Drawing, Item, Raw, read_mask
from vitrail.data.targets import Target
from vitrail.errors import UserError

if TYPE_CHECKING:
    from vitrail.data.sets import Splits


class Mask(NamedTuple):
    """The mask of one image as read."""

    name: str
    indices: Tensor
    """uint8 or int32 [H, W]: class numbers, or void"""


class Masks(Target):
    """Masks, each of the size of its upright image: files (their paths or bytes), integer tensors [H, W], or drawings.

    In a batch: `mask` int64 [B, h, w], by nearest neighbour. It is `void`, which is the number of no class and which
    losses and scores ignore, where the mask is void, outside the image, and in the reflection that a shift adds.
    """

    fields = ("mask",)
    spatial = True
    noun = "masks"

    def __init__(
        self,
        items: Sequence[Item] | Tensor,
        names: Sequence[str],
        classes: list[str],
        void: int = 255,
        coding: Coding | None = None,
    ) -> None:
        """`coding` says which classes the numbers and colours of files and tensors mean; by default, the same."""
        if len(items) != len(names):
            raise ValueError(f"{len(items)} masks have {len(names)} names")
        if 0 <= void < len(classes):
            raise UserError(f"void is {void}, the number of the class {classes[void]}: choose another number")
        self.items, self.names, self.classes, self.void = items, names, classes, void
        self.coding = Coding.plain(len(classes), void) if coding is None else coding
        self._kind = torch.uint8 if len(classes) <= 256 and 0 <= void < 256 else torch.int32

    @classmethod
    def open_splits(
        cls, data: str | Path, name: str | None, group: str | None, val_fraction: float, void: int | None = None
    ) -> Splits:
        """`void` is the number of pixels without a class, by default 255, unless the masks hold only 0 and 255.

        `vitrail.data.mask_sets` lists the layouts.
        """
        from vitrail.data.mask_sets import open_masks

        return open_masks(data, val_fraction, group, void)

    def __len__(self) -> int:
        return len(self.items)

    def _with(self, items: Sequence[Item], names: Sequence[str]) -> Self:
        return type(self)(items, names, self.classes, self.void, self.coding)

    def subset(self, places: Tensor) -> Self:
        chosen = places.tolist()
        return self._with([self.items[i] for i in chosen], [self.names[i] for i in chosen])

    def joined(self, other: Self) -> Self:
        return self._with([*self.items, *other.items], [*self.names, *other.names])

    def fingerprint(self) -> bytes:
        """The masks' names, or the masks themselves if they are tensors. Files are not read."""
        rows = [
            item.cpu().numpy().tobytes() if isinstance(item, Tensor) else name.encode(errors="surrogateescape")
            for item, name in zip(self.items, self.names, strict=True)
        ]
        return b"\0".join([str(self.void).encode(), *rows])

    def truth(self, i: int) -> dict[str, Any]:
        """The classes of the mask with their areas in pixels and their shares of the image. Raises BadImage."""
        indices = self.read(i).indices.t().contiguous().t()  # as `encode` reads it
        counts = indices[indices != self.void].long().bincount(minlength=len(self.classes))
        return {
            "segments": [
                {
                    "label": self.classes[k],
                    "share": int(counts[k]) / indices.numel(),
                    "area": int(counts[k]),
                    "rle": rle.encode(indices == k),
                }
                for k in counts.nonzero()[:, 0].tolist()
            ]
        }

    def read(self, i: int) -> Mask:
        """Raises BadImage, which names the mask, for a file that is no mask, numbers of no class, and only void."""
        item, name = self.items[i], self.names[i]
        if item is None:
            raise BadImage(f"{name}: the image has no mask")
        if isinstance(item, Drawing):
            found = item.draw()
        else:
            raw = (
                Raw(item.cpu().numpy())
                if isinstance(item, Tensor)
                else read_mask(item, name, bool(self.coding.colours))
            )
            found = self.coding.classes_of(raw, name)
        void = found == VOID
        if void.all():
            raise BadImage(f"{name}: every pixel of the mask is void")
        indices = torch.from_numpy(found).to(self._kind)
        return Mask(name, indices.masked_fill_(torch.from_numpy(void), self.void) if void.any() else indices)

    def warp(self, value: Mask, affine: Affine) -> Tensor:
        """The mask in each frame of its image, [F, h, w]. Raises BadImage if it does not have the image's size."""
        try:
            return affine.masks(value.indices, self.void)
        except ValueError as error:
            raise BadImage(f"{value.name}: {error} (upright): they must be of one size") from None

    def collate(self, values: list[Tensor], samples: Tensor, training: bool) -> dict[str, Any]:
        return {"mask": torch.cat(values).to(samples.device, non_blocking=True).long()}

    def mix(self, fields: dict[str, Any], partner: Tensor, share: Tensor) -> dict[str, Any]:
        raise UserError("masks cannot follow mixup or cutmix, which join two images: set --mixup 0 and --cutmix 0")

    @classmethod
    def rescale(cls, fields: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        mask = fields["mask"]
        rows, columns = (
            ((2 * torch.arange(new, device=mask.device) + 1) * old).div(2 * new, rounding_mode="floor")
            for new, old in zip(size, mask.shape[-2:], strict=True)
        )
        return {**fields, "mask": mask[:, rows[:, None], columns]}
