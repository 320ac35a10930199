"""Pixels of the published recipes equal those of their training code, written out here for one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
import pytest
import torch
from images import smooth
from PIL import ImageEnhance as Enhance

from vitrail.data import big_vision
from vitrail.data.augment import CROP_DRAWS, TRIES, Augment, moving_operations
from vitrail.data.policies import colour_jitter, three_augment
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import seed_for, uniform
from vitrail.recipes import RECIPES
from vitrail.train.build import preparation

Image = np.ndarray[Any, Any]  # uint8 [H, W, C]
SINGLE = np.float32


def blended(first: Image, second: Image, factor: float) -> Image:
    """`blend` of big_vision's autoaugment.py: beyond the second image above 1, cut to 0 to 255, rounded down."""
    first_single, second_single = first.astype(SINGLE), second.astype(SINGLE)
    return np.clip(first_single + SINGLE(factor) * (second_single - first_single), 0, 255).astype(np.uint8)


def grey(image: Image) -> Image:
    """`tf.image.rgb_to_grayscale` of whole numbers, which are scaled to [0, 1] and back by 255.5."""
    floats = image.astype(SINGLE) * SINGLE(1 / 255)
    weighted = floats[..., 0] * SINGLE(0.2989) + floats[..., 1] * SINGLE(0.587) + floats[..., 2] * SINGLE(0.114)
    return np.repeat((weighted * SINGLE(255.5)).astype(np.uint8)[..., None], 3, axis=2)


def sharpened(image: Image, factor: float) -> Image:
    blurred = image.copy()
    for row in range(1, image.shape[0] - 1):
        for column in range(1, image.shape[1] - 1):
            near = image[row - 1 : row + 2, column - 1 : column + 2].astype(int).sum(axis=(0, 1))
            blurred[row, column] = (near + 4 * image[row, column].astype(int)) // 13
    return blended(blurred, image, factor)


def stretched(image: Image) -> Image:
    made = image.copy()
    for channel in range(3):
        low, high = SINGLE(image[..., channel].min()), SINGLE(image[..., channel].max())
        if high > low:
            scale = SINGLE(255) / (high - low)
            made[..., channel] = np.clip(image[..., channel].astype(SINGLE) * scale + -low * scale, 0, 255)
    return made


def equalized(image: Image) -> Image:
    made = image.copy()
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step:
            table = np.concatenate([[0], (np.cumsum(counts) + step // 2)[:-1] // step]).clip(0, 255)
            made[..., channel] = table[image[..., channel]]
    return made


def projected(image: Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image:
    """`ImageProjectiveTransform`: the source of each pixel, in single precision, to the nearest; halves away from 0."""
    made, (height, width) = np.full_like(image, 128), image.shape[:2]
    rows = [[SINGLE(number) for number in row] for row in ((a, b, c), (d, e, f))]
    for row in range(height):
        for column in range(width):
            places = [float(p * SINGLE(column) + q * SINGLE(row) + r) for p, q, r in rows]
            x, y = (int(math.copysign(math.floor(abs(place) + 0.5), place)) for place in places)
            if 0 <= x < width and 0 <= y < height:
                made[row, column] = image[y, x]
    return made


def rotated(image: Image, degrees: float) -> Image:
    height, width = image.shape[:2]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = ((width - 1) - (c * (width - 1) - s * (height - 1))) / 2
    y = ((height - 1) - (s * (width - 1) + c * (height - 1))) / 2
    return projected(image, c, -s, x, s, c, y)


def cut(image: Image, pad: int, row: int, column: int) -> Image:
    made = image.copy()
    made[max(0, row - pad) : row + pad, max(0, column - pad) : column + pad] = 128
    return made


def darkest_lighter(image: Image, addition: int) -> Image:
    return np.where(image < 128, np.clip(image.astype(int) + addition, 0, 255), image).astype(np.uint8)


def mean_of_contrast(image: Image) -> Image:
    """The mean of the histogram's 256 counts, which that code takes for the mean of the image."""
    return np.full_like(image, min(255, int(image.shape[0] * image.shape[1] / 256)))


Reference = Callable[[Image, int, int], Image]
"""of an image, a level and a sign"""
REFERENCES: dict[str, Reference] = {
    "AutoContrast": lambda x, level, sign: stretched(x),
    "Equalize": lambda x, level, sign: equalized(x),
    "Invert": lambda x, level, sign: 255 - x,
    "Rotate": lambda x, level, sign: rotated(x, sign * 3.0 * level),
    "Posterize": lambda x, level, sign: (x >> (8 - int(0.4 * level))) << (8 - int(0.4 * level)),
    "Solarize": lambda x, level, sign: np.where(x < {10: 0, 15: 128}[level], x, 255 - x),
    "SolarizeAdd": lambda x, level, sign: darkest_lighter(x, 11 * level),
    "Color": lambda x, level, sign: blended(grey(x), x, 0.18 * level + 0.1),
    "Contrast": lambda x, level, sign: blended(mean_of_contrast(x), x, 0.18 * level + 0.1),
    "Brightness": lambda x, level, sign: blended(np.zeros_like(x), x, 0.18 * level + 0.1),
    "Sharpness": lambda x, level, sign: sharpened(x, 0.18 * level + 0.1),
    "ShearX": lambda x, level, sign: projected(x, 1, sign * level / 10 * 0.3, 0, 0, 1, 0),
    "ShearY": lambda x, level, sign: projected(x, 1, 0, 0, sign * level / 10 * 0.3, 1, 0),
    "TranslateX": lambda x, level, sign: projected(x, 1, 0, sign * 10 * level, 0, 1, 0),
    "TranslateY": lambda x, level, sign: projected(x, 1, 0, 0, 0, 1, sign * 10 * level),
    "Cutout": lambda x, level, sign: cut(x, 4 * level, 120, 30),
}


def test_the_operations_are_big_visions() -> None:
    assert sorted(REFERENCES) == sorted(big_vision.NAMES) and len(REFERENCES) == 16
    assert moving_operations(Augment(policy="big-vision")) == list(big_vision.MOVING)


@pytest.mark.parametrize("level", [10, 15])
@pytest.mark.parametrize("name", REFERENCES)
def test_pixels_of_big_visions_randaugment(name: str, level: int) -> None:
    """On given draws, at the two levels of the recipes: the operation, its sign, the centre of a cutout."""
    height, width = 150, 140
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    calm = smooth(height, width)
    images = [calm, noise, np.full_like(calm, 77), (calm // 3 + 40).astype(np.uint8)]
    batch = torch.from_numpy(np.stack(images * 2)).permute(0, 3, 1, 2)
    draws = torch.zeros(8, 5)
    draws[:, 0] = (big_vision.NAMES.index(name) + 0.5) / 16
    draws[:, 2] = torch.tensor([0.6] * 4 + [0.4] * 4)  # the sign of the table, then the opposite
    draws[:, 3], draws[:, 4] = (120 + 0.5) / height, (30 + 0.5) / width
    made = big_vision.randaugment(batch, draws, big_vision.parameters(height, width), level)
    for i, found in enumerate(made.permute(0, 2, 3, 1).numpy()):
        wanted = REFERENCES[name](images[i % 4], level, 1 if i < 4 else -1)
        assert np.array_equal(found, wanted), np.abs(found.astype(int) - wanted).max()


def test_each_operation_is_as_frequent() -> None:
    draws = uniform(seed_for(5, 0), torch.arange(16_000), big_vision.DRAWS)
    counts = torch.bincount((draws[:, 0] * len(big_vision.NAMES)).long(), minlength=16)
    assert len(counts) == 16 and (counts - 1000).abs().max() < 120
    signs = (draws[:, 2] < 0.5).float().mean()
    assert 0.48 < float(signs) < 0.52


def boxes_one_by_one(draws: list[float], height: int, width: int) -> list[int]:
    """`GenerateRandomCrop` of TensorFlow's sample_distorted_bounding_box_op.cc, for areas of 5 to 100 %."""

    def nearest(value: Any) -> int:
        return int(np.rint(SINGLE(value)))

    least, most = SINGLE(0.05) * SINGLE(width) * SINGLE(height), SINGLE(width) * SINGLE(height)
    for attempt in range(TRIES):
        aspect = SINGLE(0.75) + SINGLE(draws[TRIES + attempt]) * SINGLE(0.58)
        lowest, highest = nearest(np.sqrt(least / aspect)), nearest(np.sqrt(most / aspect))
        if nearest(highest * aspect) > width:
            highest = int((width + 0.5 - 1e-7) / float(aspect))
            highest -= nearest(highest * aspect) > width
        highest = min(highest, height)
        lowest = min(lowest, highest)
        h = lowest + math.floor(draws[attempt] * (highest - lowest + 1))
        if h * nearest(h * aspect) < least:
            h += 1
        if h * nearest(h * aspect) > most:
            h -= 1
        w = nearest(h * aspect)
        if least <= h * w <= most and 0 < w <= width and 0 < h <= height:
            return [math.floor(draws[-2] * (height - h)), math.floor(draws[-1] * (width - w)), h, w]
    return [0, 0, height, width]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (224, 224), (100, 2000), (1200, 60), (7, 9)])
def test_boxes_of_the_inception_crop(height: int, width: int) -> None:
    draws = uniform(seed_for(3, 1), torch.arange(300), CROP_DRAWS)
    made = big_vision.inception_boxes(
        draws, torch.full((300,), height), torch.full((300,), width), RECIPES["augreg-s16"](10**6).augment.scale
    )
    wanted = [boxes_one_by_one(row, height, width) for row in draws.tolist()]
    differ = (made != torch.tensor(wanted)).any(dim=1)
    assert differ.float().mean() < 0.01, made[differ].tolist()  # where a product rounds the other way


def test_the_inception_crop_takes_small_boxes_more_often() -> None:
    draws = uniform(seed_for(0, 0), torch.arange(20_000), CROP_DRAWS)
    many = torch.full((20_000,), 1000)
    boxes = big_vision.inception_boxes(draws, many, many, (0.05, 1.0)).double()
    # The mean of a h ** 2 over aspects a and heights h from sqrt(0.05 / a) to min(1, 1 / a).
    aspects = np.linspace(0.75, 1.33, 1001)
    low, high = np.sqrt(0.05 / aspects), np.minimum(1, 1 / aspects)
    wanted = float((aspects * (high**2 + high * low + low**2) / 3).mean())
    assert wanted < 0.4 < 0.525, "the mean of a uniform area"
    assert float((boxes[:, 2] * boxes[:, 3] / 1e6).mean()) == pytest.approx(wanted, abs=0.005)


@pytest.mark.parametrize(
    ("name", "size", "resized", "corner"),
    [
        ("vit-s16-90", (375, 500), (256, 341), (16, 58)),
        ("augreg-s16", (500, 375), (341, 256), (58, 16)),
        ("deit3-s16", (375, 500), (224, 298), (0, 37)),
        ("finetune-b16-384", (375, 500), (384, 384), (0, 0)),
    ],
)
def test_the_crop_of_evaluation(
    name: str, size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    """resize_small(256) and central_crop(224); Resize and CenterCrop at a ratio of 1; squashed to 384 x 384."""
    way = preparation(RECIPES[name](10**6))
    assert way.resized(*size) == resized and way._corner(*resized) == corner
    assert way.interpolation == ("bicubic" if name == "deit3-s16" else "bilinear")


def test_normalisation() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2)
    for name in ("vit-s16-90", "augreg-s16", "finetune-b16-384"):  # value_range(-1, 1)
        assert preparation(RECIPES[name](10**6)).normalise(pixels).unique().tolist() == [-1, 1]
    deit: Preprocess = preparation(RECIPES["deit3-s16"](10**6))
    assert deit.normalise(pixels)[:, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


def test_three_augment_is_near_pils() -> None:
    """The bounds in docs/recipes.md: of grey, blur and jitter on a smooth image; solarization is equal."""
    image = smooth(96, 128)
    pixels, pil = torch.from_numpy(image).permute(2, 0, 1)[None], PIL.Image.fromarray(image)
    half = torch.full((1, 5), 0.5)

    def apart(made: torch.Tensor, wanted: PIL.Image.Image) -> int:
        return int((made[0].permute(1, 2, 0).int() - torch.from_numpy(np.array(wanted)).int()).abs().max())

    for kind, wanted, bound in (
        (0.1, PIL.ImageOps.grayscale(pil).convert("RGB"), 1),
        (0.5, PIL.ImageOps.solarize(pil), 0),
        (0.9, pil.filter(PIL.ImageFilter.GaussianBlur(1.05)), 2),
    ):
        draws = half.clone()
        draws[0, 0] = kind
        assert apart(three_augment(pixels, draws), wanted) <= bound
    for numbers in ((0.1, 0.5, 0.5), (0.5, 0.1, 0.9), (0.9, 0.2, 0.1)):
        wanted = pil
        for enhance, draw in zip((Enhance.Brightness, Enhance.Contrast, Enhance.Color), numbers, strict=True):
            wanted = enhance(wanted).enhance(0.7 + 0.6 * draw)
        assert apart(colour_jitter(pixels, torch.tensor([numbers])), wanted) <= 2
