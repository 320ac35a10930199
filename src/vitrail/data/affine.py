"""Affine maps between original images and a model's input: for masks, boxes, tiles and dense predictions."""

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
"""bytes of a band of dense logits at the size of its original"""
_EDGE = 1e-6
"""A pixel's centre on the edge between two pixels of the original takes the second one, whatever the rounding error."""


class Dense(NamedTuple):
    """Rows of dense logits at the size of their original."""

    top: int
    """the first of the rows"""
    logits: Tensor
    """float32 [K, rows, W]: the mean over the frames that contain a pixel; 0 where no frame does"""
    seen: Tensor
    """int64 [rows, W]: how many frames contain each pixel; 0 outside all crops, where there is no prediction"""


@dataclass(frozen=True)
class Affine:
    """Maps continuous pixel coordinates (x, y) of originals, upright by EXIF, to those of the model's input.

    (0, 0) is the outer corner of the first pixel, so pixel centres lie at .5. There are F frames, which are views of
    images. An image has one frame, or several that are tiles or flips of it.
    """

    matrix: Tensor
    """float64 [F, 2, 3], on the CPU: x' = m00 x + m01 y + m02 and y' = m10 x + m11 y + m12"""
    sources: Tensor
    """int64 [F, 2]: height and width of each frame's original"""
    size: tuple[int, int]
    """height and width of the model's input"""
    image_of: Tensor
    """int64 [F]: the number of each frame's image, from 0"""
    window: Tensor
    """float64 [F, 4]: the region (x1, y1, x2, y2) of the original that the frame contains. The rest of the input (the
    bars of a letterbox, the reflection after a shift, the corners after a rotation) is void"""

    @staticmethod
    def crop(boxes: Tensor, sources: Tensor, size: tuple[int, int], places: Tensor | None = None) -> Affine:
        """One frame per image: the box (top, left, height, width) of each original, [F, 4], resized to `size`.

        Boxes need not be whole pixels, and may reach beyond the original. With `places`, [F, 4] as boxes of the input,
        each box is resized to its place only, and the rest of the input is void.
        """
        top, left, height, width = boxes.to("cpu", torch.float64).unbind(1)
        sources = sources.to("cpu", torch.int64)
        places = torch.tensor([[0, 0, *size]]) if places is None else places
        first, start, rows, columns = places.to("cpu", torch.float64).unbind(1)
        # As PyTorch divides a number by a tensor: recipes keep their bits.
        down, across, none = rows * height.reciprocal(), columns * width.reciprocal(), torch.zeros_like(top)
        matrix = [
            torch.stack(row, dim=-1)
            for row in ((across, none, start - left * across), (none, down, first - top * down))
        ]
        window = torch.stack([left, top, left + width, top + height], dim=-1)
        return Affine(
            torch.stack(matrix, dim=1), sources, size, torch.arange(len(sources)), _clip(window, _whole(sources))
        )

    @staticmethod
    def join(affines: Sequence[Affine]) -> Affine:
        """The affines of a batch as one. Its images are those of the first, then those of the second, and so on."""
        if len(sizes := {affine.size for affine in affines}) != 1:
            raise ValueError(f"frames must have one size to be joined, got {sorted(sizes)}")
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
        """Number of images."""
        return int(self.image_of.max()) + 1 if len(self) else 0

    def frames(self, image: int) -> Tensor:
        """The frames of an image, int64."""
        return (self.image_of == image).nonzero()[:, 0]

    def subset(self, images: Sequence[int] | Tensor) -> Affine:
        """The frames of some images, such as a micro-batch, in the given order; images are renumbered from 0."""
        wanted = torch.as_tensor(images, dtype=torch.int64)
        image_of, places = (wanted[:, None] == self.image_of).nonzero().unbind(1)
        return Affine(self.matrix[places], self.sources[places], self.size, image_of, self.window[places])

    def then(self, matrix: Tensor) -> Affine:
        """This map, then `matrix`: [2, 3] for all frames or [F, 2, 3] for each, in pixels of the input."""
        matrix = matrix.to("cpu", torch.float64)
        linear = matrix[..., :2] @ self.matrix
        linear[..., 2] += matrix[..., 2]
        return replace(self, matrix=linear)

    def clipped(self) -> Affine:
        """This map, with the window cut to what the frame shows.

        Needed before a rotation of pixels, which may turn to the frame what lies beyond its edges, where there are no
        pixels. Exact for frames that are not rotated yet.
        """
        frame = torch.tensor([0, 0, self.size[1], self.size[0]], dtype=torch.float64).expand(len(self), -1)
        return replace(self, window=_clip(self.window, _apply_boxes(self.inverse(), frame)))

    def with_flips(self) -> Affine:
        """All frames, then all of them flipped left to right, of the same images."""
        flipped = self.then(flip(torch.ones(len(self), dtype=torch.bool), self.size[1]))
        return replace(Affine.join([self, flipped]), image_of=self.image_of.repeat(2))

    def inverse(self) -> Tensor:
        """Matrices float64 [F, 2, 3] from the input back to the originals."""
        linear = torch.linalg.inv(self.matrix[..., :2])
        return torch.cat([linear, -linear @ self.matrix[..., 2:]], dim=-1)

    def points(self, xy: Tensor, frame: int | Tensor = 0) -> Tensor:
        """Maps points [..., 2] of originals to the input. `frame` is one number, or int64 of shape [...]."""
        return _apply(self.matrix[frame], xy)

    def points_back(self, xy: Tensor, frame: int | Tensor = 0) -> Tensor:
        """Maps points [..., 2] of the input to originals."""
        return _apply(self.inverse()[frame], xy)

    def boxes(self, xyxy: Tensor, frame: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """Maps boxes [..., 4] of originals to the input, clipped to the frame, and gives their visible fractions [...].

        The fraction is that of the box's area within the original; 0 where the box is outside. A rotated box becomes
        the box around its corners.
        """
        whole = _clip(xyxy, _whole(self.sources[frame]))
        shown = _clip(whole, self.window[frame])
        moved = _apply_boxes(self.matrix[frame], shown)
        clipped = _clip(moved, torch.tensor([0, 0, self.size[1], self.size[0]]))
        visible = _ratio(_area(shown), _area(whole)) * _ratio(_area(clipped), _area(moved))
        return clipped, visible

    def boxes_back(self, xyxy: Tensor, frame: int | Tensor = 0) -> Tensor:
        """Maps boxes [..., 4] of the input to their originals, clipped to these."""
        return _clip(_apply_boxes(self.inverse()[frame], xyxy), _whole(self.sources[frame]))

    def masks(self, masks: Tensor, void: int) -> Tensor:
        """Maps index masks of originals to the input, [F, h, w], by nearest neighbour; `void` outside the window.

        `masks` are [F, H, W], one per frame, or [H, W], one for all frames, on any device, of any integer type that
        can represent `void`. Raises ValueError if a mask does not have the size of its original.
        """
        height, width = masks.shape[-2:]
        if len(wrong := (self.sources != torch.tensor([height, width])).any(dim=1).nonzero()):
            rows, columns = self.sources[wrong[0, 0]].tolist()
            raise ValueError(f"the mask is {width}x{height} pixels, its image {columns}x{rows}")
        xy = _apply(self.inverse()[:, None, None], _centres(range(self.size[0]), range(self.size[1]), masks.device))
        xy = xy + _EDGE
        least, most = _like(self.window[:, None, None], xy).split(2, dim=-1)
        inside = ((xy >= least) & (xy < most)).all(dim=-1)
        column, row = (xy[..., i].floor().long().clamp(0, side - 1) for i, side in ((0, width), (1, height)))
        found = masks.expand(len(self), -1, -1).flatten(1).gather(1, (row * width + column).flatten(1))
        return found.view(-1, *self.size).masked_fill(~inside, void)

    def back(self, logits: Tensor, image: int = 0, top: int = 0, bottom: int | None = None) -> Dense:
        """Maps dense logits of all frames, [F, K, h, w], to rows `top` to `bottom` of one image's original.

        The grid h x w covers the whole input, at any resolution; logits are interpolated bilinearly. Several frames of
        the image are averaged.
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
        """The result of `back` for the whole image, in bands of rows of about `limit` bytes or less.

        All logits of a large image may not fit in memory: 150 classes at 24 megapixels take 14 GB.
        """
        height, width = self.sources[self.frames(image)[0]].tolist()
        rows = max(1, limit // (4 * (logits.shape[1] + 8) * width))
        for top in range(0, height, rows):
            yield self.back(logits, image, top, top + rows)

    def merge(self, logits: Tensor) -> list[Dense]:
        """The result of `back` for each image."""
        return [self.back(logits, image) for image in range(self.images)]

    def _grid(self, frame: int, rows: range, columns: range, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pixels of an original in `grid_sample`'s coordinates of the input, [r, c, 2], and whether each is inside."""
        xy = _apply(self.matrix[frame], _centres(rows, columns, device))
        size = _like(torch.tensor(self.size[::-1]), xy)
        inside = ((xy > -_EDGE) & (xy < size + _EDGE)).all(dim=-1)
        return (xy / size * 2 - 1).float(), inside


def shift(moves: Tensor) -> Tensor:
    """Matrices [F, 2, 3] that shift by [F, 2] pixels down and right."""
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(len(moves), 1, 1)
    matrix[:, :, 2] = moves.flip(1)
    return matrix


def flip(flips: Tensor, width: int) -> Tensor:
    """Matrices [F, 2, 3] that flip an input of this width left to right where `flips`, bool [F], is true."""
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(len(flips), 1, 1)
    matrix[flips, 0] = torch.tensor([-1.0, 0.0, width], dtype=torch.float64)
    return matrix


def rotate(degrees: Tensor, size: tuple[int, int]) -> Tensor:
    """Matrices [F, 2, 3] that rotate an input of this size about its middle, by [F] degrees clockwise."""
    angles = [math.radians(angle) for angle in degrees.tolist()]  # torch's sine depends on the place in a batch
    y, x = size[0] / 2, size[1] / 2
    rows = [(math.cos(angle), math.sin(angle)) for angle in angles]
    return torch.tensor(
        [[[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y]] for c, s in rows], dtype=torch.float64
    ).view(-1, 2, 3)


def tiles(source: tuple[int, int], size: tuple[int, int], overlap: float = 0.25, scale: float = 0.0) -> Affine:
    """Frames of one image of `source` (height, width): sliding windows that cover it, each resized to `size`.

    `scale` is the number of input pixels per original pixel along a side. A window never reaches beyond the image, so
    the smallest scale is that of the largest window that fits; 0 selects it. Neighbours overlap by at least `overlap`
    of a window's side, to a pixel.
    """
    if not 0 <= overlap < 1:
        raise UserError(f"overlap must be at least 0 and below 1, got {overlap}: each tile must cover new pixels")
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
    """Applies matrices [..., 2, 3] to points [..., 2]; float64 if the points are, else float32."""
    # Not a matrix product: a GPU may round its factors to ten bits (TF32).
    xy = xy if xy.dtype == torch.float64 else xy.float()
    (a, b, c), (d, e, f) = (row.unbind(-1) for row in _like(matrix, xy).unbind(-2))
    x, y = xy.unbind(-1)
    return torch.stack([a * x + b * y + c, d * x + e * y + f], dim=-1)


def _apply_boxes(matrix: Tensor, xyxy: Tensor) -> Tensor:
    """The boxes [..., 4] around the mapped corners of boxes [..., 4]."""
    corners = xyxy[..., [0, 1, 2, 1, 0, 3, 2, 3]].unflatten(-1, (4, 2))
    moved = _apply(matrix[..., None, :, :], corners)
    return torch.cat([moved.amin(dim=-2), moved.amax(dim=-2)], dim=-1)


def _whole(sources: Tensor) -> Tensor:
    """The boxes (x1, y1, x2, y2) of whole originals, from their heights and widths [..., 2]."""
    return torch.cat([torch.zeros_like(sources), sources.flip(-1)], dim=-1)


def _clip(xyxy: Tensor, to: Tensor) -> Tensor:
    """Boxes [..., 4] clipped to others [..., 4]; those outside collapse to the nearest edge, with no area."""
    xyxy = xyxy if xyxy.dtype == torch.float64 else xyxy.float()
    least, most = _like(to, xyxy).split(2, dim=-1)
    return torch.cat([torch.minimum(torch.maximum(xy, least), most) for xy in xyxy.split(2, dim=-1)], dim=-1)


def _area(xyxy: Tensor) -> Tensor:
    return (xyxy[..., 2:] - xyxy[..., :2]).clamp(min=0).prod(dim=-1)


def _ratio(value: Tensor, total: Tensor) -> Tensor:
    """`value / total`, and 0 where the total is 0."""
    return torch.where(total > 0, value / total, 0.0)


def _like(numbers: Tensor, other: Tensor) -> Tensor:
    """`numbers` with the type and device of `other`."""
    return numbers.to(other.dtype).to(other.device, non_blocking=True)
