"""The pixels, masks and affines of recipes stay what they were, bit for bit."""

from __future__ import annotations

import hashlib

import pytest
import torch

from vitrail.data.augment import Augment
from vitrail.data.loader import Loader
from vitrail.data.masks import Masks
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet

# Of the code before letterbox, jitter and rotation. Interpolation is by nearest neighbour, which every release of
# PyTorch and every processor rounds alike.
BEFORE: dict[tuple[str, str, bool], str] = {
    ("crop", "evaluation", True): "0290b1783984fa4e",
    ("crop", "evaluation", False): "0290b1783984fa4e",
    ("crop", "none", True): "572797b465d6153c",
    ("crop", "none", False): "572797b465d6153c",
    ("crop", "shift", True): "4a2e0369afbe3d0c",
    ("crop", "shift", False): "4a2e0369afbe3d0c",
    ("crop", "resized", True): "fdc9a21899060272",
    ("crop", "resized", False): "04755c83d9ae99fd",
    ("crop", "small boxes, erased", True): "3c79d04ac88b6007",
    ("crop", "small boxes, erased", False): "858194207d98946f",
    ("squash", "evaluation", True): "df113402618447ed",
    ("squash", "evaluation", False): "df113402618447ed",
    ("squash", "none", True): "0005a3f4a177cde5",
    ("squash", "none", False): "0005a3f4a177cde5",
    ("squash", "shift", True): "ab37760647e1ad7e",
    ("squash", "shift", False): "ab37760647e1ad7e",
    ("squash", "resized", True): "8fcc8e7e8b78b077",
    ("squash", "resized", False): "d3618f262467fec4",
    ("squash", "small boxes, erased", True): "3963b13e57471613",
    ("squash", "small boxes, erased", False): "df356508539114fb",
}
AUGMENTS: dict[str, Augment | None] = {
    "evaluation": None,
    "none": Augment(),
    "shift": Augment(crop="shift", shift=5, flip=True),
    "resized": Augment(crop="resized", flip=True),
    "small boxes, erased": Augment(crop="resized", scale=(0.05, 0.3), erase=0.5),
}
WAYS = {
    "crop": Preprocess((24, 20), "crop", 0.875, "nearest"),
    "squash": Preprocess((18, 30), "squash", 0.9, "nearest"),
}


def digest(resize: str, name: str, memory: bool) -> str:
    draw = torch.Generator().manual_seed(0)
    sides = torch.randint(1, 90, (12, 2), generator=draw).tolist()
    images = [torch.randint(0, 256, (3, *size), generator=draw).to(torch.uint8) for size in sides]
    masks = [torch.randint(0, 5, size, generator=draw).to(torch.uint8) for size in sides]
    names = [str(i) for i in range(12)]
    dataset = ImageSet("noise", names, images, Masks(masks, names, list("abcde")))
    way, augment = WAYS[resize], AUGMENTS[name]
    loader = Loader(dataset, way, batch_size=6, seed=5, train=augment is not None, augment=augment, memory=memory)
    batches = loader.evaluation() if augment is None else loader.batches()
    found = hashlib.sha256()
    for _ in range(2):
        batch = next(batches)
        affine = batch["affine"]
        pixels = (batch["image"] * 127.5 + 127.5).round().to(torch.uint8)
        for tensor in (pixels, batch["mask"], affine.matrix.float() + 0.0, affine.window.float()):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("resize", WAYS)
@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("memory", [True, False])
def test_pixels_masks_and_affines_are_what_they_were(resize: str, name: str, memory: bool) -> None:
    assert digest(resize, name, memory) == BEFORE[resize, name, memory]
