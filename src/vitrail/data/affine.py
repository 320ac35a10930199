"""Where the pixels of a model's input lie in their originals: for masks, boxes, tiles and dense answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import UserError

BAND = 64 << 20
"""bytes that a band of dense logits takes at the size of its original"""
_EDGE = 1e-6
"""A pixel's centre that falls on the edge of two pixels of the original takes the later one, however it was rounded."""


class Dense(NamedTuple):
    """Rows of dense logits at the size of their original."""

    top: int
    """the first of the rows"""
    logits: Tensor
    """float32 [K, rows, W]: the mean over the frames that show a pixel; 0 where none does"""
    seen: Tensor
    """int64 [rows, W]: how many frames show each pixel. What a crop leaves out is 0: there is no answer there"""


@dataclass(frozen=True)
class Affine:
    """From continuous pixel coordinates (x, y) of originals, upright by EXIF, to those of the model's input.

    (0, 0) is the outer corner of the first pixel, so that the pixels' centres lie at .5. There are F frames: views of
    images. Each image has one, or several that are tiles or flips of it.
    """

    matrix: Tensor
    """float64 [F, 2, 3], on the CPU: x' = m00 x + m01 y + m02 and y' = m10 x + m11 y + m12"""
    sources: Tensor
    """int64 [F, 2]: height and width of each frame's original"""
    size: tuple[int, int]
    """height and width of the model's input"""
    image_of: Tensor
    """int64 [F]: which image each frame shows, from 0"""
    window: Tensor
    """float64 [F, 4]: the region (x1, y1, x2, y2) of the original that the frame shows. What else of the input there
    is, beside a letterbox or where a shift reflects, shows nothing: it is void"""

    @staticmethod
    def crop(boxes: Tensor, sources: Tensor, size: tuple[int, int]) -> Affine:
        """One frame per image: the box (top, left, height, width) of each original, [F, 4], resized to `size`.

        Boxes need not be whole pixels, and may reach beyond the original.
        """
        top, left, height, width = boxes.to("cpu", torch.float64).unbind(1)
        sources = sources.to("cpu", torch.int64)
        down, across, none = size[0] / height, size[1] / width, torch.zeros_like(top)
        rows = [torch.stack(row, dim=-1) for row in ((across, none, -left * across), (none, down, -top * down))]
        window = torch.stack([left, top, left + width, top + height], dim=-1)
        return Affine(
            torch.stack(rows, dim=1), sources, size, torch.arange(len(sources)), _clip(window, _whole(sources))
        )

    @staticmethod
    def join(affines: Sequence[Affine]) -> Affine:
        """Those of a batch as one. Each one's images come after those of the ones before it."""
        if len(sizes := {affine.size for affine in affines}) != 1:
            raise ValueError(f"only frames of one size join, got {sorted(sizes)}")
        before, image_of = 0, []
        for affine in affines:
            image_of.append(affine.image_of + before)
            before += affine.images
        columns = [[a.matrix for a in affines], [a.sources for a in affines], image_of, [a.window for a in affines]]
        matrix, sources, images, window = (torch.cat(column) for column in columns)
        return Affine(matrix, sources, affines[0].size, images, window)

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def images(self) -> int:
        """How many images the frames show."""
        return int(self.image_of.max()) + 1 if len(self) else 0

    def frames(self, image: int) -> Tensor:
        """The frames of an image, int64."""
        return (self.image_of == image).nonzero()[:, 0]

    def subset(self, images: Sequence[int] | Tensor) -> Affine:
        """The frames of some images, such as those of a micro-batch, in the order given; the images count from 0."""
        wanted = torch.as_tensor(images, dtype=torch.int64)
        image_of, places = (wanted[:, None] == self.image_of).nonzero().unbind(1)
        return Affine(self.matrix[places], self.sources[places], self.size, image_of, self.window[places])

    def then(self, matrix: Tensor) -> Affine:
        """Moved within the input after that: by [2, 3], or [F, 2, 3] for each frame, in pixels of the input."""
        matrix = matrix.to("cpu", torch.float64)
        linear = matrix[..., :2] @ self.matrix
        linear[..., 2] += matrix[..., 2]
        return replace(self, matrix=linear)

    def with_flips(self) -> Affine:
        """Every frame, then every frame flipped left to right, of the same images."""
        flipped = self.then(flip(torch.ones(len(self), dtype=torch.bool), self.size[1]))
        return replace(Affine.join([self, flipped]), image_of=self.image_of.repeat(2))

    def inverse(self) -> Tensor:
        """Matrices float64 [F, 2, 3] from the input back to the originals."""
        linear = torch.linalg.inv(self.matrix[..., :2])
        return torch.cat([linear, -linear @ self.matrix[..., 2:]], dim=-1)

    def points(self, xy: Tensor, frame: int | Tensor = 0) -> Tensor:
        """Points [..., 2] of originals in the input. `frame` is one number, or int64 of the shape [...]."""
        return _apply(self.matrix[frame], xy)

    def points_back(self, xy: Tensor, frame: int | Tensor = 0) -> Tensor:
        """Points [..., 2] of the input in originals."""
        return _apply(self.inverse()[frame], xy)

    def boxes(self, xyxy: Tensor, frame: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """Boxes [..., 4] of originals in the input, clipped to what the frame shows, and their visible shares [...].

        The share is of a box's area within the original; it is 0 where nothing is left of it. A rotated box is the box
        around its corners.
        """
        whole = _clip(xyxy, _whole(self.sources[frame]))
        shown = _clip(whole, self.window[frame])
        moved = _apply_boxes(self.matrix[frame], shown)
        clipped = _clip(moved, torch.tensor([0, 0, self.size[1], self.size[0]]))
        share = _ratio(_area(shown), _area(whole)) * _ratio(_area(clipped), _area(moved))
        return clipped, share

    def boxes_back(self, xyxy: Tensor, frame: int | Tensor = 0) -> Tensor:
        """Boxes [..., 4] of the input in pixels of their originals, clipped to these."""
        return _clip(_apply_boxes(self.inverse()[frame], xyxy), _whole(self.sources[frame]))

    def masks(self, masks: Tensor, void: int) -> Tensor:
        """Index masks of originals in the input, [F, h, w], by nearest neighbour; `void` where it shows nothing.

        `masks` are [F, H, W], one per frame, or [H, W] for the same one in all frames; on any device, of any integer
        type that holds `void`. Raises ValueError where a mask has not the size of its original.
        """
        height, width = masks.shape[-2:]
        if len(wrong := (self.sources != torch.tensor([height, width])).any(dim=1).nonzero()):
            rows, columns = self.sources[wrong[0, 0]].tolist()
            raise ValueError(f"the mask is {width}x{height} pixels, its image {columns}x{rows}")
        xy = _apply(self.inverse()[:, None, None], _centres(range(self.size[0]), range(self.size[1]), masks.device))
        xy = xy + _EDGE
        least, most = _beside(self.window[:, None, None], xy).split(2, dim=-1)
        inside = ((xy >= least) & (xy < most)).all(dim=-1)
        column, row = (xy[..., i].floor().long().clamp(0, side - 1) for i, side in ((0, width), (1, height)))
        found = masks.expand(len(self), -1, -1).flatten(1).gather(1, (row * width + column).flatten(1))
        return found.view(-1, *self.size).masked_fill(~inside, void)

    def back(self, logits: Tensor, image: int = 0, top: int = 0, bottom: int | None = None) -> Dense:
        """Dense logits of all frames, [F, K, h, w], at the size of one image's original: its rows `top` to `bottom`.

        The grid h x w covers the whole input, at any resolution; between its centres logits are bilinear. Several
        frames of the image are averaged.
        """
        if len(logits) != len(self):
            raise ValueError(f"expected logits of {len(self)} frames, got {len(logits)}")
        frames = self.frames(image).tolist()
        height, width = self.sources[frames[0]].tolist()
        bottom = height if bottom is None else min(bottom, height)
        total = torch.zeros(logits.shape[1], bottom - top, width, device=logits.device)
        seen = torch.zeros(bottom - top, width, dtype=torch.int64, device=logits.device)
        for frame in frames:
            # The pixels whose centres lie in the window.
            left, first, right, last = (self.window[frame] - 0.5 - _EDGE).ceil().long().tolist()
            first, last = max(first, top), min(last, bottom)
            if first >= last or left >= right:
                continue
            grid, inside = self._grid(frame, range(first, last), range(left, right), logits.device)
            moved = F.grid_sample(
                logits[frame : frame + 1].float(),
                grid[None],
                mode="bilinear",
                padding_mode="border",
                align_corners=False,
            )[0]
            total[:, first - top : last - top, left:right] += moved * inside
            seen[first - top : last - top, left:right] += inside
        return Dense(top, total.div_(seen.clamp(min=1)), seen)

    def bands(self, logits: Tensor, image: int = 0, limit: int = BAND) -> Iterator[Dense]:
        """What `back` gives for the whole image, in bands of rows of at most about `limit` bytes.

        All logits of a large image may not fit in memory: 150 classes of 24 megapixels take 14 GB.
        """
        height, width = self.sources[self.frames(image)[0]].tolist()
        rows = max(1, limit // (4 * (logits.shape[1] + 8) * width))
        for top in range(0, height, rows):
            yield self.back(logits, image, top, top + rows)

    def merge(self, logits: Tensor) -> list[Dense]:
        """What `back` gives for each image."""
        return [self.back(logits, image) for image in range(self.images)]

    def _grid(self, frame: int, rows: range, columns: range, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where pixels of an original lie in the input, as `grid_sample` counts [r, c, 2], and which lie within it."""
        xy = _apply(self.matrix[frame], _centres(rows, columns, device))
        size = _beside(torch.tensor(self.size[::-1]), xy)
        inside = ((xy > -_EDGE) & (xy < size + _EDGE)).all(dim=-1)
        return (xy / size * 2 - 1).float(), inside


def shift(moves: Tensor) -> Tensor:
    """Matrices [F, 2, 3] that move by [F, 2] pixels down and right."""
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(len(moves), 1, 1)
    matrix[:, :, 2] = moves.flip(1)
    return matrix


def flip(flips: Tensor, width: int) -> Tensor:
    """Matrices [F, 2, 3] that flip an input of this width left to right where bool [F] says so."""
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(len(flips), 1, 1)
    matrix[flips, 0] = torch.tensor([-1.0, 0.0, width], dtype=torch.float64)
    return matrix


def tiles(source: tuple[int, int], size: tuple[int, int], overlap: float = 0.25, scale: float = 0.0) -> Affine:
    """Frames of one image of `source` (height, width): sliding windows that cover it, each resized to `size`.

    `scale` is how many pixels of the input one of the original becomes. A window never reaches beyond the image, so
    that the scale is at least the one at which the largest window that fits, no wider or higher than the image, is
    resized to `size`; 0 for just that. Neighbours share at least `overlap` of a window's side, to a pixel.
    """
    if not 0 <= overlap < 1:
        raise UserError(f"overlap must be at least 0 and below 1, got {overlap}: tiles have to move on")
    if not 0 <= scale < math.inf:
        raise UserError(f"scale must be a number of at least 0, got {scale}")
    scale = max(scale, *(side / whole for side, whole in zip(size, source, strict=True)))
    window = [min(whole, max(1, round(side / scale))) for side, whole in zip(size, source, strict=True)]
    starts = []
    for side, whole in zip(window, source, strict=True):
        steps = math.ceil((whole - side) / max(1, math.floor(side * (1 - overlap))))
        starts.append([i * (whole - side) // max(1, steps) for i in range(steps + 1)])
    boxes = torch.tensor([[top, left, *window] for top in starts[0] for left in starts[1]])
    found = Affine.crop(boxes, torch.tensor([source]).expand(len(boxes), -1), size)
    return replace(found, image_of=torch.zeros(len(boxes), dtype=torch.int64))


def _centres(rows: range, columns: range, device: torch.device) -> Tensor:
    """The centres (x, y) of pixels, [r, c, 2]."""
    kind = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    y, x = (torch.arange(r.start, r.stop, dtype=kind, device=device) + 0.5 for r in (rows, columns))
    return torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)


def _apply(matrix: Tensor, xy: Tensor) -> Tensor:
    """Points [..., 2] by matrices [..., 2, 3]; the result is float32, or float64 where the points are."""
    # No matrix product: a GPU may round its factors to ten bits.
    xy = xy if xy.dtype == torch.float64 else xy.float()
    (a, b, c), (d, e, f) = (row.unbind(-1) for row in _beside(matrix, xy).unbind(-2))
    x, y = xy.unbind(-1)
    return torch.stack([a * x + b * y + c, d * x + e * y + f], dim=-1)


def _apply_boxes(matrix: Tensor, xyxy: Tensor) -> Tensor:
    """The boxes [..., 4] around the corners of boxes [..., 4], moved."""
    corners = xyxy[..., [0, 1, 2, 1, 0, 3, 2, 3]].unflatten(-1, (4, 2))
    moved = _apply(matrix[..., None, :, :], corners)
    return torch.cat([moved.amin(dim=-2), moved.amax(dim=-2)], dim=-1)


def _whole(sources: Tensor) -> Tensor:
    """The boxes (x1, y1, x2, y2) of whole originals, from their heights and widths [..., 2]."""
    return torch.cat([torch.zeros_like(sources), sources.flip(-1)], dim=-1)


def _clip(xyxy: Tensor, to: Tensor) -> Tensor:
    """Boxes [..., 4] cut to others [..., 4]; those outside end at the nearest edge, without an area."""
    xyxy = xyxy if xyxy.dtype == torch.float64 else xyxy.float()
    least, most = _beside(to, xyxy).split(2, dim=-1)
    return torch.cat([torch.minimum(torch.maximum(xy, least), most) for xy in xyxy.split(2, dim=-1)], dim=-1)


def _area(xyxy: Tensor) -> Tensor:
    return (xyxy[..., 2:] - xyxy[..., :2]).clamp(min=0).prod(dim=-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where both are."""
    return torch.where(whole > 0, part / whole, 0.0)


def _beside(numbers: Tensor, other: Tensor) -> Tensor:
    """The numbers in the type and on the device of the other ones."""
    return numbers.to(other.dtype).to(other.device, non_blocking=True)
