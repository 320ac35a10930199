"""Augmentation of a whole batch on its device; each image has its own random draws (see `random`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data import affine, big_vision
from vitrail.data.affine import Affine
from vitrail.data.policies import FILL, MOVING, apply_policy, magnitudes, parameters, three_augment
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import seed_for, uniform
from vitrail.errors import UserError, require_choices

# Streams of draws: enabling one augmentation does not change the draws of the others.
CROP, FLIP, POLICY, ERASE, MIX, ROTATE = STREAMS = range(6)
ORDER = 6

TRIES = 10
"""boxes that a random resized crop tries before it falls back to the centre, as torchvision"""
CROP_DRAWS = 2 * TRIES + 2
ASPECTS = (3 / 4, 4 / 3)
BOXES = ("resized", "inception")
"""crops that resize a random box to the input"""
STEPS = 1024
"""steps of the tables of aspects, scales and angles, since devices differ in the last bit of `exp` and `sin`"""


@dataclass(frozen=True)
class Augment:
    """Augmentation of a training image, applied in this order."""

    crop: Literal["none", "shift", "resized", "inception", "jitter"] = "none"
    """shift: shifted by at most `shift` pixels, reflected at the edge; resized: a random resized crop (Inception) as
    torchvision draws it; inception: as TensorFlow and big_vision draw it, with more small crops; jitter: the image at a
    random scale, of which a random place is cut, or which is padded with the mean colour"""
    shift: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    """range of the crop's area, as a fraction of the image's"""
    jitter: tuple[float, float] = (0.5, 2.0)
    """range of a jitter's scale, drawn log-uniformly; 1 is the size that evaluation resizes the image to"""
    flip: bool = False
    """left to right, with probability 0.5"""
    rotation: float = 0.0
    """largest angle in degrees of a random rotation after the crop; the corners get the mean colour"""
    policy: Literal["none", "randaugment", "trivial", "three", "big-vision"] = "none"
    """big-vision: the RandAugment of Google's code and papers"""
    policy_strength: int = 9
    """RandAugment's magnitude, 0 to 30. As strong as 30 in torchvision's randaugment is about 10 in big-vision"""
    policy_count: int = 2
    """RandAugment's operations per image"""
    erase: float = 0.0
    """probability that a rectangle of 2 to 33 % of the area becomes grey (random erasing, arXiv 1708.04896)"""
    mixup: float = 0.0
    """alpha of mixup's beta distribution (arXiv 1710.09412), at most 1; 0 for none"""
    cutmix: float = 0.0
    """alpha of cutmix's (arXiv 1905.04899); with both, each image gets one of the two with probability 0.5"""
    repeats: int = 1
    """repeated augmentation (arXiv 1901.09335): copies of an image in its batch, each with draws of its own; an epoch
    then shows one of so many images"""

    @property
    def cuts(self) -> bool:
        """Whether a random box of each image is read (see `random_cuts`)."""
        return self.crop in (*BOXES, "jitter")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs (see `vitrail.data.mixing`)."""
        return bool(self.mixup or self.cutmix)

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("scale", "jitter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.jitter) != 2 or not 0 < self.jitter[0] <= self.jitter[1] < math.inf:
            raise UserError(f"jitter must be two rising numbers above 0, got {self.jitter}")
        if not 0 <= self.rotation <= 180:
            raise UserError(f"rotation must be 0 to 180 degrees, got {self.rotation}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale must be two rising numbers above 0 and at most 1, got {self.scale}")
        if not 0 <= self.policy_strength <= 30:
            raise UserError(f"policy_strength must be 0 to 30, got {self.policy_strength}")
        for name in ("erase", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        if self.repeats < 1:
            raise UserError(f"repeats must be at least 1, got {self.repeats}")
        for name in ("shift", "policy_count"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")


def refuse_spatial(augment: Augment, target: str) -> None:
    """Raise UserError if the augmentation moves pixels in a way that masks or boxes (`target`) cannot follow."""
    if augment.mixup or augment.cutmix:
        name = "mixup" if augment.mixup else "cutmix"
        raise UserError(f"{target} cannot follow {name}, which joins two images: set --{name} 0")
    if moving := moving_operations(augment):
        raise UserError(
            f"{target} cannot follow the policy {augment.policy}, since its operations move pixels "
            f"({', '.join(moving)}): set --policy none or three"
        )


def moving_operations(augment: Augment) -> list[str]:
    """The operations of the policy that move pixels."""
    if augment.policy == "big-vision":
        return list(big_vision.MOVING)
    if augment.policy not in ("randaugment", "trivial"):
        return []
    return [name for name in magnitudes(augment.policy, 1, 1) if name in MOVING]


def training_affine(
    augment: Augment,
    preprocess: Preprocess,
    seed: int,
    epoch: int,
    draws: Tensor,
    sources: Tensor,
    kept: Tensor | None = None,
) -> Affine:
    """The map of training images: their random crop, shift, flip and rotation.

    `draws` [B] are the numbers that seed each image's draws, `sources` [B, 2] the heights and widths of the originals,
    and `kept` [B, 2] the smaller sizes at which the images are kept in memory, if they are: crops are drawn at that
    size. Raises UserError for a policy that moves pixels. A crop from a JPEG is decoded at 1/2 to 1/8 of its size
    where that suffices; if EXIF rotates it, the map may be off by up to half a pixel of the input.
    """
    if moving := moving_operations(augment):
        raise UserError(
            f"the policy {augment.policy} moves pixels ({', '.join(moving)}) in a way that no affine map describes"
        )
    draws, sources = draws.cpu(), sources.cpu()
    if augment.cuts:
        sizes = sources if kept is None else kept.cpu()
        boxes, places = random_cuts(augment, preprocess, seed, epoch, draws, sizes)
        found = Affine.crop(boxes * (sources.double() / sizes).repeat(1, 2), sources, preprocess.size, places)
    else:
        found = preprocess.affine(sources)
    if augment.crop == "shift":
        moves = _moves(augment, uniform(seed_for(seed, epoch, CROP), draws, 2))
        found = found.then(affine.shift(moves))
    if augment.flip:
        flips = uniform(seed_for(seed, epoch, FLIP), draws, 1)[:, 0] < 0.5
        found = found.then(affine.flip(flips, preprocess.size[1]))
    if augment.rotation:
        chosen = (uniform(seed_for(seed, epoch, ROTATE), draws, 1)[:, 0] * STEPS).long()
        found = found.clipped().then(_rotations(augment.rotation, preprocess.size)[chosen])
    return found


def _moves(augment: Augment, draws: Tensor) -> Tensor:
    """Pixels down and right, int64 [B, 2], from draws [B, 2]."""
    return (draws * (2 * augment.shift + 1)).long() - augment.shift


@lru_cache
def _rotations(largest: float, size: tuple[int, int]) -> Tensor:
    """Matrices float64 [STEPS, 2, 3], from the `largest` angle anticlockwise to that clockwise."""
    return affine.rotate((2 * (torch.arange(STEPS) + 0.5) / STEPS - 1) * largest, size)


def random_cuts(
    augment: Augment, preprocess: Preprocess, seed: int, epoch: int, draws: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """The random box of each image and its place in the input, int64 [B, 4] each: top, left, height and width.

    `draws` [B] are the numbers that seed each image's draws, `sizes` [B, 2] the heights and widths; all on the CPU.
    """
    if augment.crop == "jitter":
        return jitter_boxes(uniform(seed_for(seed, epoch, CROP), draws, 3), sizes, augment.jitter, preprocess)
    crops = uniform(seed_for(seed, epoch, CROP), draws, CROP_DRAWS)
    boxes = boxes_of(augment, crops, sizes[:, 0], sizes[:, 1], preprocess.size, aspect_roots())
    return boxes, torch.tensor([[0, 0, *preprocess.size]]).expand(len(boxes), -1)


def stream_keys(seed: int, epoch: int) -> Tensor:
    """int64 [6]: the key of each stream of draws, on the CPU."""
    return torch.tensor([seed_for(seed, epoch, stream) for stream in STREAMS])


class Augmenter:
    """The augmentation of uint8 [B, C, H, W] to uint8 [B, C, size], by all operations but mixup and cutmix.

    It holds the tables of the operations on the device. A jitter is cut where the images are read (see
    `vitrail.data.prepare`), so it is not among the operations here.
    """

    def __init__(
        self,
        augment: Augment,
        size: tuple[int, int],
        device: torch.device | str = "cpu",
        fill: Tensor | None = None,
    ) -> None:
        """`fill` is the colour of a rotation's corners, uint8 [C, 1, 1]; None for grey."""
        self.augment, self.size = augment, size
        self.fill = torch.full((1, 1, 1), FILL, device=device) if fill is None else fill.to(device).float()
        self.roots = aspect_roots().to(device) if augment.crop in BOXES else None
        self.rotations = self.policy = None
        if augment.rotation:  # from the result back to the source: by the opposite angle
            self.rotations = _rotations(augment.rotation, size).flip(0).float().to(device)
        if augment.policy in ("randaugment", "trivial"):
            self.policy = parameters(augment.policy, *size).to(device)
        if augment.policy == "big-vision":
            self.policy = big_vision.parameters(*size).to(device)

    def __call__(self, images: Tensor, samples: Tensor, keys: Tensor) -> Tensor:
        """`samples` int64 [B], the numbers that seed the draws, and `stream_keys` are on the device of the images.

        So nothing waits for a GPU, and a compiled step is the same in every epoch. The result for an image depends on
        (seed, epoch, sample) and is the same in any batch.
        """
        augment = self.augment

        def draw(count: int, stream: int) -> Tensor:
            return uniform(keys[stream], samples, count)

        if self.roots is not None:
            heights, widths = (torch.full_like(samples, side) for side in images.shape[-2:])
            boxes = boxes_of(augment, draw(CROP_DRAWS, CROP), heights, widths, self.size, self.roots)
            images = crop_resized(images, boxes, self.size)
        if augment.crop == "shift" or augment.flip:
            moves = _moves(augment, draw(2, CROP)) * (augment.crop == "shift")
            images = shift_flip(images, moves, (draw(1, FLIP)[:, 0] < 0.5) & augment.flip)
        if self.rotations is not None:
            images = rotated(images, self.rotations[(draw(1, ROTATE)[:, 0] * STEPS).long()], self.fill)
        if augment.policy == "three":
            images = three_augment(images, draw(5, POLICY))
        if self.policy is not None:
            count = 1 if augment.policy == "trivial" else augment.policy_count
            each = big_vision.DRAWS if augment.policy == "big-vision" else 3
            for draws in draw(each * count, POLICY).view(len(images), count, each).unbind(1):
                if augment.policy == "big-vision":
                    images = big_vision.randaugment(images, draws, self.policy, augment.policy_strength)
                else:
                    images = apply_policy(images, draws, self.policy, augment.policy, augment.policy_strength)
        if augment.erase:
            images = erase(images, draw(5, ERASE), augment.erase)
        return images


@lru_cache
def aspect_roots() -> Tensor:
    """Square roots of the aspects of a random resized crop, spread evenly between their logarithms, [STEPS]."""
    least, ratio = math.log(ASPECTS[0]) / 2, math.log(ASPECTS[1] / ASPECTS[0]) / 2
    return torch.tensor([math.exp(least + (i + 0.5) / STEPS * ratio) for i in range(STEPS)])


def boxes_of(
    augment: Augment, draws: Tensor, heights: Tensor, widths: Tensor, size: tuple[int, int], roots: Tensor
) -> Tensor:
    """The boxes of `crop_boxes`, or those of the crop `inception`."""
    if augment.crop == "resized":
        return crop_boxes(draws, heights, widths, augment.scale, size, roots)
    boxes = big_vision.inception_boxes(draws, heights, widths, augment.scale)
    return _aligned(boxes, torch.minimum(boxes[:, 2:3] // size[0], boxes[:, 3:] // size[1]))


def crop_boxes(
    draws: Tensor, heights: Tensor, widths: Tensor, scale: tuple[float, float], size: tuple[int, int], roots: Tensor
) -> Tensor:
    """Boxes (top, left, height, width) int64 [B, 4] of a random resized crop to `size`, from draws [B, CROP_DRAWS].

    `heights` and `widths` [B] are those of the images, `roots` come from `aspect_roots`.
    The first of ten boxes that fits in the image, or else the largest centred box of an allowed aspect. If a JPEG can
    be decoded at 1/2, 1/4 or 1/8 for a box, the box is aligned to whole pixels of that scale (by at most 7 pixels).
    """
    heights, widths = heights[:, None], widths[:, None]
    root = roots[(draws[:, TRIES : 2 * TRIES] * STEPS).long()]
    side = (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES]).sqrt() * (heights * widths).float().sqrt()
    w, h = (side * root).round().long(), (side / root).round().long()
    good = (w > 0) & (h > 0) & (w <= widths) & (h <= heights)
    first = good.to(torch.uint8).argmax(dim=1, keepdim=True)
    centre_w = torch.minimum(widths, (heights * ASPECTS[1]).round().long()).clamp(min=1)
    centre_h = torch.minimum(heights, (widths / ASPECTS[0]).round().long()).clamp(min=1)
    found = good.any(dim=1, keepdim=True)
    w = torch.where(found, w.gather(1, first), centre_w)
    h = torch.where(found, h.gather(1, first), centre_h)
    top = (draws[:, -2:-1] * (heights - h + 1)).long()
    left = (draws[:, -1:] * (widths - w + 1)).long()
    top = torch.where(found, top, (heights - h) // 2)
    left = torch.where(found, left, (widths - w) // 2)
    return _aligned(torch.cat([top, left, h, w], dim=1), torch.minimum(h // size[0], w // size[1]))


def _aligned(boxes: Tensor, ratio: Tensor) -> Tensor:
    """Boxes [B, 4] at whole pixels of the scale that a JPEG is decoded at, where they shrink by `ratio` [B, 1]."""
    step = torch.ones_like(ratio)
    for divisor in (2, 4, 8):
        step = torch.where(ratio >= divisor, divisor, step)
    return boxes // step * step


def jitter_boxes(
    draws: Tensor, sizes: Tensor, jitter: tuple[float, float], preprocess: Preprocess
) -> tuple[Tensor, Tensor]:
    """Boxes of images of `sizes` [B, 2], and their places in the input, int64 [B, 4] each, from draws [B, 3].

    The draws are the scale, relative to the size that `preprocess` resizes to, and the place from top and left. Along a
    side where the scaled image is smaller than the input, the box is the whole side, at a random place of the input.
    Boxes are whole pixels, aligned as those of `crop_boxes`: where a JPEG is decoded at a smaller scale, a box may be
    up to 7 pixels less than the whole side.
    """
    least, ratio = math.log(jitter[0]), math.log(jitter[1] / jitter[0])
    table = torch.tensor([math.exp(least + (i + 0.5) / STEPS * ratio) for i in range(STEPS)], dtype=torch.float64)
    resized = torch.tensor([preprocess.resized(*size) for size in sizes.tolist()], dtype=torch.float64).view(-1, 2)
    scaled = (table[(draws[:, 0] * STEPS).long()][:, None] * resized).round().clamp(min=1)
    shown = scaled.clamp(max=torch.tensor(preprocess.size))
    box = (sizes * (shown / scaled)).round().long().clamp(min=1)
    shown = shown.long()
    corner = (draws[:, 1:] * (sizes - box + 1)).long()
    place = (draws[:, 1:] * (torch.tensor(preprocess.size) - shown + 1)).long()
    return _aligned(torch.cat([corner, box], dim=1), (box // shown).amin(dim=1, keepdim=True)), torch.cat(
        [place, shown], dim=1
    )


def rotated(images: Tensor, back: Tensor, fill: Tensor) -> Tensor:
    """uint8 [B, C, H, W], each rotated about its middle, bilinearly.

    `back` [B, 2, 3] are matrices from the result to the image. What lies outside has the colour `fill` [C, 1, 1].
    """
    height, width = images.shape[-2:]
    y, x = (torch.arange(side, device=images.device) + 0.5 for side in (height, width))
    y = y[:, None]
    rows = back[:, :, :1, None] * x + back[:, :, 1:2, None] * y + back[:, :, 2:, None]  # [B, 2, H, W]
    grid = torch.stack([rows[:, 0] * 2 / width - 1, rows[:, 1] * 2 / height - 1], dim=-1)
    # Outside there are zeros, so the colour is subtracted, and added again.
    sampled = F.grid_sample(images.float() - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (sampled + fill).round().clamp(0, 255).to(torch.uint8)


def crop_resized(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops boxes [B, 4] of uint8 [B, C, H, W], resized to `size` bilinearly, without antialias: for enlarging only."""
    top, left, height, width = (side.float()[:, None] for side in boxes.unbind(1))
    rows = (torch.arange(size[0], device=images.device) + 0.5) * (height / size[0]) + top
    columns = (torch.arange(size[1], device=images.device) + 0.5) * (width / size[1]) + left
    # grid_sample's coordinates run from -1 to 1, from edge to edge.
    rows, columns = rows * 2 / images.shape[-2] - 1, columns * 2 / images.shape[-1] - 1
    grid = torch.stack([columns[:, None, :].expand(-1, size[0], -1), rows[:, :, None].expand(-1, -1, size[1])], dim=-1)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.round_().to(torch.uint8)


def shift_flip(images: Tensor, moves: Tensor, flips: Tensor) -> Tensor:
    """[B, C, H, W] shifted by int64 [B, 2] pixels down and right, reflected at the edge; flipped where `flips` [B]."""
    count, channels, height, width = images.shape
    rows = _reflect(torch.arange(height, device=images.device) - moves[:, :1], height)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = _reflect(torch.where(flips[:, None], width - 1 - columns, columns) - moves[:, 1:], width)
    places = (rows[:, :, None] * width + columns[:, None, :]).reshape(count, 1, height * width)
    return images.flatten(2).gather(2, places.expand(-1, channels, -1)).view(images.shape)


def _reflect(places: Tensor, size: int) -> Tensor:
    """Indices beyond the edges are reflected, without repeating the edge pixel."""
    period = max(2 * (size - 1), 1)
    places = places.remainder(period)
    return torch.minimum(places, period - places) if size > 1 else places.clamp(0, 0)


def erase(images: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Random erasing of uint8 [B, C, H, W]: `draws` [B, 5] decide whether, area, aspect (0.3 to 3.3), top and left."""
    height, width = images.shape[-2:]
    side = ((0.02 + 0.31 * draws[:, 1]) * height * width).sqrt()
    root = torch.exp(math.log(0.3) / 2 + draws[:, 2] * math.log(3.3 / 0.3) / 2)
    h = (side / root).round().clamp(1, height)
    w = (side * root).round().clamp(1, width)
    mask = boxes_mask(images, draws[:, 3] * (height - h + 1), draws[:, 4] * (width - w + 1), h, w)
    mask &= (draws[:, 0] < probability)[:, None, None, None]
    return images.masked_fill(mask, int(FILL))


def boxes_mask(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """A mask [B, 1, H, W], true inside one box per image; all arguments [B]."""
    rows = torch.arange(images.shape[-2], device=images.device)
    columns = torch.arange(images.shape[-1], device=images.device)
    top, left = top.floor()[:, None], left.floor()[:, None]
    inside_rows = (rows >= top) & (rows < top + height[:, None])
    inside_columns = (columns >= left) & (columns < left + width[:, None])
    return inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
