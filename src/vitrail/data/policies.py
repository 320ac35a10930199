"""RandAugment (arXiv 1909.13719), TrivialAugment (2103.10158) and three-augment (2204.07118), drawn per image.

torchvision's transforms draw once per batch. Here each image draws its operation and magnitude, which are parameters
of one function of the whole batch. The operations equal torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as V

BINS = 31
FILL = 128.0
"""grey, near zero after normalisation, for pixels from outside the image"""
COLOUR_JITTER = 0.3
BLUR = (0.1, 2.0)
"""range of sigma in pixels, as in DeiT-III's code"""


def magnitudes(policy: str, height: int, width: int) -> dict[str, tuple[list[float], bool]]:
    """Each operation's magnitudes, weakest first, and whether the sign is random: torchvision's two tables."""
    wide = policy == "trivial"
    shear, colour = (0.99, 0.99) if wide else (0.3, 0.9)
    across, down = (32.0, 32.0) if wide else (150 / 331 * width, 150 / 331 * height)
    steps = torch.arange(BINS)
    bits = (8 - steps / ((BINS - 1) / (6 if wide else 4))).round().tolist()
    none = [0.0] * BINS

    def up_to(most: float) -> list[float]:
        return torch.linspace(0, most, BINS).tolist()

    return {
        "Identity": (none, False),
        "ShearX": (up_to(shear), True),
        "ShearY": (up_to(shear), True),
        "TranslateX": (up_to(across), True),
        "TranslateY": (up_to(down), True),
        "Rotate": (up_to(135.0 if wide else 30.0), True),
        "Brightness": (up_to(colour), True),
        "Color": (up_to(colour), True),
        "Contrast": (up_to(colour), True),
        "Sharpness": (up_to(colour), True),
        "Posterize": (bits, False),
        "Solarize": (torch.linspace(1, 0, BINS).tolist(), False),
        "AutoContrast": (none, False),
        "Equalize": (none, False),
    }


MOVING = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
"""operations that move pixels, but not masks or boxes; neighbours in the table of `magnitudes`"""


def matrix(operation: str, m: float, height: int, width: int) -> tuple[float, ...]:
    """The two rows of numbers for `warp` of an operation that moves pixels, with magnitude `m`."""
    match operation:
        case "ShearX":  # about the upper left corner, as in AutoAugment's code
            return 1.0, m, height / 2 * m, 0.0, 1.0, 0.0
        case "ShearY":
            return 1.0, 0.0, 0.0, m, 1.0, width / 2 * m
        case "TranslateX":  # by whole pixels, to the right
            return 1.0, 0.0, -float(int(m)), 0.0, 1.0, 0.0
        case "TranslateY":
            return 1.0, 0.0, 0.0, 0.0, 1.0, -float(int(m))
    cosine, sine = math.cos(math.radians(m)), math.sin(math.radians(m))  # about the centre, anticlockwise
    return cosine, -sine, 0.0, sine, cosine, 0.0


@lru_cache
def parameters(policy: str, height: int, width: int) -> Tensor:
    """Six numbers for each operation, magnitude, and sign (that of the table, or the opposite), [14, BINS, 2, 6].

    They are the matrix of an operation that moves pixels; otherwise the first is the magnitude, as `operate` reads it.
    """

    def numbers(operation: str, magnitude: float) -> tuple[float, ...]:
        if operation in MOVING:
            return matrix(operation, magnitude, height, width)
        return magnitude, *[0.0] * 5

    rows = [
        [[numbers(name, sign * m) for sign in (1, -1 if signed else 1)] for m in values]
        for name, (values, signed) in magnitudes(policy, height, width).items()
    ]
    return torch.tensor(rows)


def operate(x: Tensor, operations: Tensor, numbers: Tensor) -> Tensor:
    """One operation on each of uint8 [B, C, H, W]: its place [B] in the table of `magnitudes`, its numbers [B, 6].

    Operations on colour change only images with 1 or 3 channels.
    """
    first, last = (NAMES.index(name) for name in (MOVING[0], MOVING[-1]))
    x = where_used((operations >= first) & (operations <= last), warp, x, numbers)
    for name, function in OPERATIONS.items():
        if x.shape[1] in (1, 3) or name not in COLOURED:
            x = where_used(operations == NAMES.index(name), function, x, numbers[:, :1, None, None])
    return x


def where_used(used: Tensor, function: Callable[..., Tensor], x: Tensor, *numbers: Tensor) -> Tensor:
    """`function(x, *numbers)` for the images [B, C, H, W] that are `used` [B]; the others unchanged.

    A CPU computes it for these alone. A GPU, for which reading their number would mean to wait, computes it for all.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(used[:, None, None, None], function(x, *numbers), x)
    rows = used.nonzero()[:, 0]
    if not len(rows):
        return x
    return x.index_copy(0, rows, function(x[rows], *(number[rows] for number in numbers)))


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Affine warp of uint8 [B, C, H, W], by nearest neighbour, with `FILL` outside the image.

    Two rows of three numbers per image, [B, 6]: their products with a pixel's (column, row, 1), counted from the
    centre, are the column and the row of its source.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    columns = torch.arange(width, device=images.device) - (width - 1) / 2

    def place(factors: Tensor, size: int) -> Tensor:
        by_column, by_row, shift = factors[:, :, None, None].unbind(1)
        return (by_column * columns + by_row * rows + (shift + (size - 1) / 2)).round().long()

    return moved(images, place(matrices[:, 3:], height), place(matrices[:, :3], width))


def moved(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """uint8 [B, C, H, W] with each pixel from its source's row and column, int64 [B, H, W]; `FILL` outside."""
    count, channels, height, width = images.shape
    within = ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
    places = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).view(count, 1, -1)
    found = images.flatten(2).gather(2, places.expand(-1, channels, -1)).view(images.shape)
    return found.masked_fill(~within, int(FILL))


def brightness(x: Tensor, magnitudes: Tensor) -> Tensor:
    return (x * (1 + magnitudes)).clamp(0, 255).to(torch.uint8)


def saturation(x: Tensor, magnitudes: Tensor) -> Tensor:
    return _interpolate(x, _luma(x), 1 + magnitudes) if x.shape[1] == 3 else x


def contrast(x: Tensor, magnitudes: Tensor) -> Tensor:
    return _interpolate(x, _mean(_luma(x) if x.shape[1] == 3 else x), 1 + magnitudes)


def sharpness(x: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend with a 3x3 blur, whose centre has five times a neighbour's weight; edge pixels are unchanged."""
    if min(x.shape[-2:]) <= 2:
        return x
    inner, whole = x[..., 1:-1, 1:-1].float(), x.float()
    total = 4 * inner
    for down in range(3):
        for right in range(3):
            total = total + whole[..., down : down + inner.shape[-2], right : right + inner.shape[-1]]
    blended = inner + ((total / 13).round() - inner) * -magnitudes
    return F.pad(blended, (1, 1, 1, 1)).where(inside(x), whole).clamp(0, 255).to(torch.uint8)


def inside(x: Tensor) -> Tensor:
    """Whether a pixel [H, W] is not at the edge."""
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[-2:])
    return ((rows > 0) & (rows < len(rows) - 1))[:, None] & (columns > 0) & (columns < len(columns) - 1)


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Keep only the upper bits."""
    return x & (256 - 2 ** (8 - bits.trunc().clamp(max=8))).to(torch.uint8)


def solarize(x: Tensor, shares: Tensor) -> Tensor:
    """Invert pixels of at least 255 times `shares`."""
    return torch.where(x >= 255 * shares, 255 - x, x)


def _exact(x: Tensor) -> Tensor:
    """The numbers as float64: on their device, or on the CPU if it is one of Apple's GPUs, which have no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _mean(x: Tensor) -> Tensor:
    """The mean of each image of whole numbers [B, C, H, W], [B, 1, 1, 1]."""
    # In float64 the sum of whole numbers is exact, so it does not depend on the order.
    return _exact(x).mean(dim=(-3, -2, -1), keepdim=True).float().to(x.device)


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.float().split(1, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()


def _interpolate(x: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    return (x * factors + other * (1 - factors)).clamp(0, 255).to(torch.uint8)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": brightness,
    "Color": saturation,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": lambda x, _: V.autocontrast_image(x),
    "Equalize": lambda x, _: V.equalize_image(x),
}
"""functions of uint8 [B, C, H, W] and of magnitudes [B, 1, 1, 1]"""
COLOURED = ("Brightness", "Color", "Contrast", "Sharpness", "AutoContrast")
NAMES = list(magnitudes("trivial", 1, 1))


def apply_policy(images: Tensor, draws: Tensor, table: Tensor, policy: str, strength: int) -> Tensor:
    """Apply one operation of `policy` ("randaugment" at bin `strength`, or "trivial") to each of uint8 [B, C, H, W].

    `draws` [B, 3] choose the operation, the magnitude's bin and the sign in the policy's `parameters`.
    """
    chosen = (draws[:, 0] * len(table)).long()
    bins = (draws[:, 1] * BINS).long() if policy == "trivial" else torch.full_like(chosen, strength)
    return operate(images, chosen, table[chosen, bins, (draws[:, 2] < 0.5).long()])


def three_augment(images: Tensor, draws: Tensor) -> Tensor:
    """DeiT-III: grey, solarised or blurred, one of them for each of uint8 [B, C, H, W], then colour jitter.

    `draws` [B, 5] choose the operation, the blur's sigma, and the factors of brightness, contrast and saturation
    (applied in this order). Grey and jitter leave images of other channel counts than 3 alone.
    """
    kind, colour = (draws[:, 0] * 3).long(), images.shape[1] == 3
    sigmas = BLUR[0] + draws[:, 1] * (BLUR[1] - BLUR[0])
    result = where_used(kind == 0, lambda x: V.rgb_to_grayscale(x, 3), images) if colour else images
    result = where_used(kind == 1, solarize, result, torch.full_like(draws[:, :1, None, None], 128 / 255))
    result = where_used(kind == 2, blur, result, sigmas)
    return colour_jitter(result, draws[:, 2:5]) if colour else result


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Gaussian blur of uint8 [B, C, H, W], each with its own sigma [B]."""
    # A sum of shifted images, not a convolution, whose order of additions depends on the batch.
    radius = math.ceil(3 * BLUR[1])
    offsets = range(-radius, radius + 1)
    sigmas = _exact(sigmas)
    weights = [torch.exp(-((offset / sigmas) ** 2) / 2) for offset in offsets]
    total = torch.stack(weights).sum(0)
    shares = [(weight / total).float().to(images.device)[:, None, None, None] for weight in weights]
    x = images.float()
    for axis in (-1, -2):
        size = x.shape[axis]
        places = torch.arange(size, device=x.device)
        total = torch.zeros_like(x)
        for offset, share in zip(offsets, shares, strict=True):
            source = (places + offset).clamp(0, size - 1)
            total = total + x.index_select(x.ndim + axis, source) * share
        x = total
    return x.round().clamp(0, 255).to(torch.uint8)


def colour_jitter(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast and saturation of uint8 [B, 3, H, W], factors uniform in 0.7 to 1.3 by `draws` [B, 3]."""
    factors = 1 + COLOUR_JITTER * (2 * draws - 1)
    x = (images.float() * factors[:, 0, None, None, None]).clamp(0, 255).floor()
    mean = _mean(_grey(x).floor())
    x = _blend(x, mean, factors[:, 1]).floor()
    x = _blend(x, _grey(x).floor(), factors[:, 2]).floor()
    return x.to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    return x[:, :1] * 0.299 + x[:, 1:2] * 0.587 + x[:, 2:3] * 0.114


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    return (x * factor + other * (1 - factor)).clamp(0, 255)
