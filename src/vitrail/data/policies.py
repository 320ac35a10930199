"""RandAugment (arXiv 1909.13719), TrivialAugment (2103.10158) and three-augment (2204.07118), drawn per image.

torchvision's transforms draw once per batch. Here each image draws its operation and magnitude. Images with the same
operation are processed together, each with its own magnitude; the result is the same as one by one. The operations
equal torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
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


def warp(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Affine warp of uint8 [B, C, H, W], by nearest neighbour, with `FILL` outside the image.

    `across` and `down` [B, 3] are the rows of the matrices: their products with a pixel's (column, row, 1), counted
    from the centre, are the column and row of its source.
    """
    count, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    columns = torch.arange(width, device=images.device) - (width - 1) / 2

    def place(factors: Tensor, size: int) -> Tensor:
        by_column, by_row, shift = on_device(factors, images).unbind(1)
        return (by_column * columns + by_row * rows + (shift + (size - 1) / 2)).round().long()[:, 0]

    row, column = place(down, height), place(across, width)
    inside = ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
    places = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).view(count, 1, -1)
    moved = images.flatten(2).gather(2, places.expand(-1, channels, -1)).view(images.shape)
    return moved.masked_fill(~inside, int(FILL))


def on_device(numbers: Tensor, images: Tensor) -> Tensor:
    """float64 [B] or [B, N] on the CPU as float32 [B, (N,) 1, 1, 1] on the device of `images`."""
    return numbers.float().to(images.device, non_blocking=True)[..., None, None, None]


def _rows(*columns: Tensor | float) -> Tensor:
    """Stack numbers and tensors [B] to [B, 3]."""
    tensors = [torch.as_tensor(column, dtype=torch.float64) for column in columns]
    return torch.stack(torch.broadcast_tensors(*tensors), dim=-1)


def shear(x: Tensor, tangents: Tensor, down: bool) -> Tensor:
    """Shear about the upper left corner, as in AutoAugment's code."""
    along = x.shape[-1 if down else -2] / 2 * tangents
    one, none = torch.ones_like(tangents), torch.zeros_like(tangents)
    if down:
        return warp(x, _rows(one, 0, 0), _rows(tangents, 1, along))
    return warp(x, _rows(one, tangents, along), _rows(none, 1, 0))


def translate(x: Tensor, pixels: Tensor, down: bool) -> Tensor:
    """Translate by whole pixels, to the right or down."""
    none = torch.zeros_like(pixels)
    moves = (none, pixels.trunc()) if down else (pixels.trunc(), none)
    return warp(x, _rows(1, 0, -moves[0]), _rows(0, 1, -moves[1]))


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Rotate about the centre, anticlockwise."""
    cosines, sines = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return warp(x, _rows(cosines, -sines, 0), _rows(sines, cosines, 0))


def brightness(x: Tensor, factors: Tensor) -> Tensor:
    return (x * on_device(factors, x)).clamp_(0, 255).to(torch.uint8)


def saturation(x: Tensor, factors: Tensor) -> Tensor:
    return _interpolate(x, _luma(x), factors) if x.shape[1] == 3 else x


def contrast(x: Tensor, factors: Tensor) -> Tensor:
    grey = _luma(x) if x.shape[1] == 3 else x
    return _interpolate(x, _mean(grey), factors)


def sharpness(x: Tensor, factors: Tensor) -> Tensor:
    """Blend with a 3x3 blur, whose centre has five times a neighbour's weight; edge pixels are unchanged."""
    if min(x.shape[-2:]) <= 2:
        return x
    inner, whole = x[..., 1:-1, 1:-1].float(), x.float()
    total = 4 * inner
    for down in range(3):
        for right in range(3):
            total = total + whole[..., down : down + inner.shape[-2], right : right + inner.shape[-1]]
    whole[..., 1:-1, 1:-1] = inner + ((total / 13).round() - inner) * on_device(1 - factors, x)
    return whole.clamp_(0, 255).to(torch.uint8)


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Keep only the upper bits."""
    masks = (256 - 2 ** (8 - bits.long().clamp(max=8))).to(torch.uint8)
    return x & masks.to(x.device, non_blocking=True)[:, None, None, None]


def solarize(x: Tensor, shares: Tensor) -> Tensor:
    """Invert pixels of at least 255 times `shares`."""
    return torch.where(x >= on_device(255 * shares, x), 255 - x, x)


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
    return (x * on_device(factors, x) + other * on_device(1 - factors, x)).clamp_(0, 255).to(torch.uint8)


def _coloured(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The function for grey and colour images; other images are returned unchanged."""
    return lambda x, m: function(x, m) if x.shape[1] in (1, 3) else x


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Identity": lambda x, m: x,
    "ShearX": lambda x, m: shear(x, m, down=False),
    "ShearY": lambda x, m: shear(x, m, down=True),
    "TranslateX": lambda x, m: translate(x, m, down=False),
    "TranslateY": lambda x, m: translate(x, m, down=True),
    "Rotate": rotate,
    "Brightness": _coloured(lambda x, m: brightness(x, 1 + m)),
    "Color": _coloured(lambda x, m: saturation(x, 1 + m)),
    "Contrast": _coloured(lambda x, m: contrast(x, 1 + m)),
    "Sharpness": _coloured(lambda x, m: sharpness(x, 1 + m)),
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": _coloured(lambda x, m: V.autocontrast(x)),
    "Equalize": lambda x, m: V.equalize(x),
}
"""functions of uint8 [B, C, H, W] and of magnitudes float64 [B] on the CPU. Operations on colour change only images
with 1 or 3 channels."""


def apply_policy(images: Tensor, draws: Tensor, policy: str, strength: int) -> Tensor:
    """Apply one operation of `policy` ("randaugment" at bin `strength`, or "trivial") to each of uint8 [B, C, H, W].

    `draws` [B, 3], preferably on the CPU, choose the operation, the magnitude's bin and the sign.
    """
    table = magnitudes(policy, images.shape[-2], images.shape[-1])
    draws = draws.cpu()
    chosen = (draws[:, 0] * len(table)).long()
    bins = (draws[:, 1] * BINS).long() if policy == "trivial" else torch.full_like(chosen, strength)
    values = torch.tensor([values for values, _ in table.values()], dtype=torch.float64)[chosen, bins]
    signed = torch.tensor([signed for _, signed in table.values()])[chosen]
    values = torch.where(signed & (draws[:, 2] < 0.5), -values, values)
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=len(table)).tolist()
    places = order.to(images.device, non_blocking=True)
    groups = zip(table, images[places].split(counts), values[order].split(counts), strict=True)
    result = torch.empty_like(images)
    result[places] = torch.cat([OPERATIONS[name](x, m) if len(x) else x for name, x, m in groups])
    return result


def three_augment(images: Tensor, draws: Tensor) -> Tensor:
    """DeiT-III: grey, solarised or blurred, one of them for each of uint8 [B, C, H, W], then colour jitter.

    `draws` [B, 5] choose the operation, the blur's sigma, and the factors of brightness, contrast and saturation
    (applied in this order). Grey and jitter leave images of other channel counts than 3 alone.
    """
    grey, solar, blurred = ((draws[:, 0] * 3).long() == kind for kind in range(3))
    colour = images.shape[1] == 3

    def to_device(tensor: Tensor) -> Tensor:
        return tensor.to(images.device, non_blocking=True)

    result = images.clone()
    if colour and bool(grey.any()):
        places = to_device(grey.nonzero()[:, 0])
        result[places] = V.rgb_to_grayscale(images[places], 3)
    if bool(solar.any()):
        places = to_device(solar.nonzero()[:, 0])
        result[places] = V.solarize(images[places], 128.0)
    if bool(blurred.any()):
        places = to_device(blurred.nonzero()[:, 0])
        result[places] = blur(images[places], to_device(BLUR[0] + draws[blurred, 1] * (BLUR[1] - BLUR[0])))
    return colour_jitter(result, to_device(draws[:, 2:5])) if colour else result


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
