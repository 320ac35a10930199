"""RandAugment and the random crop of big_vision, whose code is that of TensorFlow's AutoAugment (arXiv 1909.13719).

It differs from torchvision's: other operations, magnitudes beyond which no limit is set, colours that only get
stronger, and a few rules that no paper states and that are kept here, since results were obtained with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from vitrail.data.policies import BINS, FILL, inside, moved, posterize, where_used

LEVELS = 10
"""the level at which rotation is by 30 degrees; magnitudes grow in proportion to the level, also beyond"""
DRAWS = 5
"""draws per operation: which one, its sign, the row and column of a cutout; the second is unused"""
CROP_ASPECTS = (0.75, 1.33)
"""width by height"""


def argument(operation: str, level: int) -> float:
    """The magnitude of an operation at a level: degrees, pixels, bits, or a factor of colour."""
    share = level / LEVELS
    match operation:
        case "Rotate":
            return 30 * share
        case "Posterize":
            return float(min(8, int(4 * share)))
        case "Solarize":  # 256 at level 10, which a uint8 holds as 0: everything is inverted
            return float(int(256 * share) % 256)
        case "SolarizeAdd":
            return float(int(110 * share))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return 1.8 * share + 0.1
        case "ShearX" | "ShearY":
            return 0.3 * share
        case "TranslateX" | "TranslateY":
            return 100 * share
        case "Cutout":
            return float(int(40 * share))
    return 0.0


def matrix(operation: str, m: float, height: int, width: int) -> tuple[float, ...]:
    """Two rows of three numbers: their products with (column, row, 1) of a pixel, from 0, are those of its source."""
    match operation:
        case "ShearX":
            return 1.0, m, 0.0, 0.0, 1.0, 0.0
        case "ShearY":
            return 1.0, 0.0, 0.0, m, 1.0, 0.0
        case "TranslateX":
            return 1.0, 0.0, m, 0.0, 1.0, 0.0
        case "TranslateY":
            return 1.0, 0.0, 0.0, 0.0, 1.0, m
    c, s, x, y = math.cos(math.radians(m)), math.sin(math.radians(m)), width - 1, height - 1
    return c, -s, (x - (c * x - s * y)) / 2, s, c, (y - (s * x + c * y)) / 2


@lru_cache
def parameters(height: int, width: int) -> Tensor:
    """Six numbers for each operation, level and sign, [16, BINS, 2, 6], as `vitrail.data.policies.parameters`."""

    def numbers(operation: str, level: int, sign: int) -> tuple[float, ...]:
        value = argument(operation, level)
        return matrix(operation, sign * value, height, width) if operation in MOVING else (value, *[0.0] * 5)

    return torch.tensor([[[numbers(name, i, sign) for sign in (1, -1)] for i in range(BINS)] for name in NAMES])


def randaugment(images: Tensor, draws: Tensor, table: Tensor, level: int) -> Tensor:
    """One random operation on each of uint8 [B, C, H, W], by `draws` [B, 5] and `parameters`.

    Operations on colour change only images with 1 or 3 channels.
    """
    chosen = (draws[:, 0] * len(NAMES)).long()
    numbers = table[chosen, level, (draws[:, 2] < 0.5).long()]
    return operate(images, chosen, torch.cat([numbers, draws[:, 3:]], dim=1))


def operate(x: Tensor, operations: Tensor, numbers: Tensor) -> Tensor:
    """The operations [B], places in `NAMES`, of uint8 [B, C, H, W] with their numbers [B, 8].

    The last two numbers, in [0, 1), are the row and the column of a cutout.
    """
    first, last = (NAMES.index(name) for name in (MOVING[0], MOVING[-1]))
    x = where_used((operations >= first) & (operations <= last), project, x, numbers)
    for place, name in enumerate(NAMES):
        if name not in MOVING and (x.shape[1] in (1, 3) or name not in COLOURED):
            x = where_used(operations == place, OPERATIONS[name], x, numbers)
    return x


def project(images: Tensor, numbers: Tensor) -> Tensor:
    """uint8 [B, C, H, W] moved by their `matrix`, by nearest neighbour: halves are rounded away from 0."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)[:, None].float()
    columns = torch.arange(width, device=images.device).float()
    a, b, c, d, e, f = numbers[:, :6, None, None].unbind(1)

    def rounded(place: Tensor) -> Tensor:
        whole = place.trunc()
        return (whole + place.sign() * ((place - whole).abs() >= 0.5)).long()

    return moved(images, rounded(d * columns + e * rows + f), rounded(a * columns + b * rows + c))


def _first(numbers: Tensor) -> Tensor:
    return numbers[:, :1, None, None]


def _blend(other: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """Towards the image by `factors`, from another; beyond the image above 1."""
    other = other.float()
    return (other + factors * (x.float() - other)).clamp(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    """TensorFlow's grey of [B, 3, H, W]: in numbers of 0 to 1, of which 255.5 times is rounded down."""
    red, green, blue = (x.float() * (1 / 255)).split(1, dim=1)
    return ((red * 0.2989 + green * 0.587 + blue * 0.114) * 255.5).floor()


def color(x: Tensor, numbers: Tensor) -> Tensor:
    return _blend(_grey(x), x, _first(numbers)) if x.shape[1] == 3 else x


def contrast(x: Tensor, numbers: Tensor) -> Tensor:
    """Away from one grey: not the image's mean, but its pixels by 256 (196 at 224 x 224), as in that code."""
    grey = min(255, x.shape[-2] * x.shape[-1] // 256)
    return _blend(torch.full_like(x[:, :1], grey), x, _first(numbers))


def brightness(x: Tensor, numbers: Tensor) -> Tensor:
    return _blend(torch.zeros_like(x), x, _first(numbers))


def sharpness(x: Tensor, numbers: Tensor) -> Tensor:
    """Away from a 3x3 blur, whose centre has five times a neighbour's weight; edge pixels are unchanged."""
    if min(x.shape[-2:]) <= 2:
        return x
    whole = x.float()
    total = 4 * whole[..., 1:-1, 1:-1]
    for down in range(3):
        for right in range(3):
            total = total + whole[..., down : down + total.shape[-2], right : right + total.shape[-1]]
    blurred = F.pad((total / 13).floor(), (1, 1, 1, 1)).where(inside(x), whole)
    return _blend(blurred, x, _first(numbers))


def autocontrast(x: Tensor, numbers: Tensor) -> Tensor:
    """The darkest value of each channel to 0, the lightest to 255."""
    low, high = x.amin(dim=(-2, -1), keepdim=True).float(), x.amax(dim=(-2, -1), keepdim=True).float()
    scale = 255 / (high - low).clamp(min=1)
    stretched = (x.float() * scale + -low * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, x)


def solarize(x: Tensor, numbers: Tensor) -> Tensor:
    return torch.where(x < _first(numbers), x, 255 - x)


def solarize_add(x: Tensor, numbers: Tensor) -> Tensor:
    """Dark pixels, below 128, become lighter."""
    return torch.where(x < 128, (x + _first(numbers)).clamp(0, 255).to(torch.uint8), x)


def cutout(x: Tensor, numbers: Tensor) -> Tensor:
    """A grey square whose centre lies anywhere in the image, with twice the magnitude as its side."""
    half = numbers[:, :1]

    def within(side: int, draws: Tensor) -> Tensor:
        places, centre = torch.arange(side, device=x.device), (draws * side).floor()
        return (places >= centre - half) & (places < centre + half)

    rows, columns = within(x.shape[-2], numbers[:, 6:7]), within(x.shape[-1], numbers[:, 7:])
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None], int(FILL))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": autocontrast,
    "Equalize": lambda x, _: V.equalize_image(x),
    "Invert": lambda x, _: 255 - x,
    "Rotate": project,
    "ShearX": project,
    "ShearY": project,
    "TranslateX": project,
    "TranslateY": project,
    "Posterize": lambda x, numbers: posterize(x, _first(numbers)),
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "Cutout": cutout,
}
"""functions of uint8 [B, C, H, W] and of numbers [B, 8]; each is equally likely"""
NAMES = list(OPERATIONS)
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
"""operations that move pixels; neighbours in `NAMES`"""
COLOURED = ("AutoContrast", "Color", "Contrast", "Brightness", "Sharpness")


def inception_boxes(draws: Tensor, heights: Tensor, widths: Tensor, scale: tuple[float, float]) -> Tensor:
    """Boxes (top, left, height, width) int64 [B, 4] of TensorFlow's `sample_distorted_bounding_box`.

    Its height is uniform between those of the smallest and the largest area (`scale`, fractions of the image's), so
    small crops are more frequent than with a uniform area; its aspect is uniform too. `draws` [B, 2 T + 2] are T
    heights, T aspects, top and left; the first of the T boxes that fits is taken, else the whole image.
    """
    tries = draws.shape[1] // 2 - 1
    tall, wide = heights[:, None].float(), widths[:, None].float()
    aspects = CROP_ASPECTS[0] + draws[:, tries : 2 * tries] * (CROP_ASPECTS[1] - CROP_ASPECTS[0])
    least, most = (share * wide * tall for share in scale)
    limit = ((wide + 0.5) / aspects).floor()
    limit = limit - ((limit * aspects).round() > wide).float()
    highest = (most / aspects).sqrt().round()
    highest = torch.where((highest * aspects).round() > wide, limit, highest).minimum(tall)
    lowest = (least / aspects).sqrt().round().minimum(highest)
    h = lowest + (draws[:, :tries] * (highest - lowest + 1)).floor()
    h = h + (h * (h * aspects).round() < least).float()
    h = h - (h * (h * aspects).round() > most).float()
    w = (h * aspects).round()
    good = (h * w >= least) & (h * w <= most) & (w <= wide) & (h <= tall) & (h > 0) & (w > 0)
    first = good.to(torch.uint8).argmax(dim=1, keepdim=True)
    found = good.any(dim=1, keepdim=True)
    h = torch.where(found, h.gather(1, first), tall)
    w = torch.where(found, w.gather(1, first), wide)
    top, left = (draws[:, -2:-1] * (tall - h)).floor(), (draws[:, -1:] * (wide - w)).floor()
    return torch.cat([top, left, h, w], dim=1).long()
