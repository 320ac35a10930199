"""RandAugment (arXiv 1909.13719), TrivialAugment (2103.10158) and three-augment (2204.07118), a draw a picture.

torchvision's transforms draw once a batch. Here each picture draws its operation and magnitude, the pictures that
drew the same go through torchvision's function together, and the result is the same as one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

BINS = 31
FILL = 128.0
"""grey, near zero after normalisation, for what comes in from outside the picture"""
COLOUR_JITTER = 0.3
BLUR = (0.1, 2.0)
"""range of sigma in pixels, as DeiT-III's code"""


def magnitudes(policy: str, height: int, width: int) -> dict[str, tuple[list[float], bool]]:
    """An operation's magnitudes, least to greatest, and whether it has a sign: torchvision's two tables."""
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


def _affine(images: Tensor, move: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    # torchvision shears about the corner, as AutoAugment's first code did.
    centre = [0.0, 0.0] if any(shear) else None
    fill = [FILL] * images.shape[-3]
    return V.affine(images, 0.0, list(move), 1.0, [_degrees(tangent) for tangent in shear], fill=fill, center=centre)


def _degrees(tangent: float) -> float:
    return math.degrees(math.atan(tangent))


OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": lambda x, m: x,
    "ShearX": lambda x, m: _affine(x, shear=(m, 0.0)),
    "ShearY": lambda x, m: _affine(x, shear=(0.0, m)),
    "TranslateX": lambda x, m: _affine(x, move=(int(m), 0)),
    "TranslateY": lambda x, m: _affine(x, move=(0, int(m))),
    "Rotate": lambda x, m: V.rotate(x, m, fill=[FILL] * x.shape[-3]),
    "Brightness": lambda x, m: V.adjust_brightness(x, 1 + m) if x.shape[-3] in (1, 3) else x,
    "Color": lambda x, m: V.adjust_saturation(x, 1 + m) if x.shape[-3] in (1, 3) else x,
    "Contrast": lambda x, m: V.adjust_contrast(x, 1 + m) if x.shape[-3] in (1, 3) else x,
    "Sharpness": lambda x, m: V.adjust_sharpness(x, 1 + m) if x.shape[-3] in (1, 3) else x,
    "Posterize": lambda x, m: V.posterize(x, int(m)),
    "Solarize": lambda x, m: V.solarize(x, 255.0 * m),
    "AutoContrast": lambda x, m: V.autocontrast(x) if x.shape[-3] in (1, 3) else x,
    "Equalize": lambda x, m: V.equalize(x),
}
"""uint8 [B, C, H, W] and a magnitude. Those about colour leave pictures of other channel counts than 1 and 3 alone."""


def apply_policy(images: Tensor, draws: Tensor, policy: str, strength: int) -> Tensor:
    """One operation of `policy` ("randaugment" at bin `strength`, or "trivial") on each of uint8 [B, C, H, W].

    `draws` [B, 3] choose the operation, the magnitude's bin and the sign.
    """
    table = magnitudes(policy, images.shape[-2], images.shape[-1])
    names = list(table)
    chosen = (draws[:, 0] * len(names)).long().tolist()
    bins = (draws[:, 1] * BINS).long().tolist() if policy == "trivial" else [strength] * len(images)
    signs = (draws[:, 2] < 0.5).tolist()
    groups: dict[tuple[str, float], list[int]] = {}
    for i, (operation, place, negative) in enumerate(zip(chosen, bins, signs, strict=True)):
        values, signed = table[names[operation]]
        magnitude = -values[place] if signed and negative else values[place]
        groups.setdefault((names[operation], magnitude), []).append(i)
    return _in_groups(images, groups, OPERATIONS)


def three_augment(images: Tensor, draws: Tensor) -> Tensor:
    """DeiT-III: grey, solarised or blurred, one of them for each of uint8 [B, C, H, W], then colour jitter.

    `draws` [B, 5] choose the operation, the blur's sigma, and the factors of brightness, contrast and saturation
    (applied in this order). Grey and jitter leave pictures of other channel counts than 3 alone.
    """
    chosen = (draws[:, 0] * 3).long()
    grey, solar = chosen == 0, chosen == 1
    colour = images.shape[1] == 3
    result = images.clone()
    if colour and bool(grey.any()):
        result[grey] = V.rgb_to_grayscale(images[grey], 3)
    if bool(solar.any()):
        result[solar] = V.solarize(images[solar], 128.0)
    if bool((chosen == 2).any()):
        result[chosen == 2] = blur(images[chosen == 2], BLUR[0] + draws[chosen == 2, 1] * (BLUR[1] - BLUR[0]))
    return colour_jitter(result, draws[:, 2:5]) if colour else result


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Gaussian blur of uint8 [B, C, H, W], each with its own sigma [B]."""
    # Sums of shifted pictures, and no convolution: its order of additions changes with the batch.
    radius = math.ceil(3 * BLUR[1])
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = [torch.exp(-((offset / sigmas.double()) ** 2) / 2) for offset in offsets.tolist()]
    total = torch.stack(weights).sum(0)
    x = images.float()
    for axis in (-1, -2):
        size = x.shape[axis]
        places = torch.arange(size, device=x.device)
        parts = torch.zeros_like(x)
        for offset, weight in zip(offsets.tolist(), weights, strict=True):
            source = (places + offset).clamp(0, size - 1)
            parts = parts + x.index_select(x.ndim + axis, source) * (weight / total).float()[:, None, None, None]
        x = parts
    return x.round().clamp(0, 255).to(torch.uint8)


def colour_jitter(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast and saturation of uint8 [B, 3, H, W], factors uniform in 0.7 to 1.3 by `draws` [B, 3]."""
    factors = 1 + COLOUR_JITTER * (2 * draws - 1)
    x = (images.float() * factors[:, 0, None, None, None]).clamp(0, 255).floor()
    # Whole numbers have the same sum in any order.
    mean = _grey(x).floor().double().mean(dim=(-3, -2, -1), keepdim=True).float()
    x = _blend(x, mean, factors[:, 1]).floor()
    x = _blend(x, _grey(x).floor(), factors[:, 2]).floor()
    return x.to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    return x[:, :1] * 0.299 + x[:, 1:2] * 0.587 + x[:, 2:3] * 0.114


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    return (x * factor + other * (1 - factor)).clamp(0, 255)


def _in_groups(
    images: Tensor, groups: dict[tuple[str, float], list[int]], operations: dict[str, Callable[[Tensor, float], Tensor]]
) -> Tensor:
    result = images.clone()
    for (operation, magnitude), members in groups.items():
        if operation != "Identity":
            places = torch.tensor(members, device=images.device)
            result[places] = operations[operation](images[places], magnitude)
    return result
