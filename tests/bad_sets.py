"""Rendered sets of images, clean ones and ones with one fault each, for the tests and the measurement of the doctor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

EACH = 24
"""images of each class of a training split"""
SIDE = 64


def shape(kind: str, draw: np.random.Generator, side: int = SIDE) -> Image.Image:
    """A circle, square or triangle of any colour, size and place, on noise of another colour."""
    noise = draw.integers(-18, 19, (side, side, 3)) + draw.integers(40, 216, 3)
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    radius = side * draw.uniform(0.15, 0.3)
    x, y = draw.uniform(radius, side - radius, 2)
    colour = tuple(draw.integers(0, 256, 3).tolist())
    pen = ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif kind == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    return image


def waves(kind: str, draw: np.random.Generator, side: int = SIDE) -> Image.Image:
    """Stripes, rings or a mixture of waves, of any direction and colours."""
    y, x = np.mgrid[0:side, 0:side] / side
    angle, phase = draw.uniform(0, np.pi), draw.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == "stripes":
        height = np.sin(2 * np.pi * draw.uniform(5, 9) * along + phase)
    elif kind == "rings":
        height = np.sin(
            2 * np.pi * draw.uniform(5, 9) * np.hypot(x - draw.uniform(0.3, 0.7), y - draw.uniform(0.3, 0.7)) + phase
        )
    else:
        height = np.zeros_like(x)
        for f, a, p in draw.uniform(0.5, 3, (6, 3)):
            height += np.sin(2 * np.pi * (f * (x * np.cos(a) + y * np.sin(a)) + p)) / 3
    colours = draw.uniform(35, 80, 3) * draw.choice([-1, 1], 3)
    pixels = 128 + height[..., None] * colours + draw.normal(0, 6, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def figures(kind: str, draw: np.random.Generator, side: int = 28) -> Image.Image:
    """One, two or three dots of light on black, in grey, as small as handwritten digits."""
    pixels = np.zeros((side, side))
    y, x = np.mgrid[0:side, 0:side]
    for cy, cx in draw.uniform(5, side - 5, ({"one": 1, "two": 2, "three": 3}[kind], 2)):
        pixels += 255 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / draw.uniform(4, 12))
    return Image.fromarray((pixels + draw.uniform(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8))


CLEAN: dict[str, tuple[Callable[..., Image.Image], tuple[str, ...], str, dict[str, int]]] = {
    "shapes": (shape, ("circle", "square", "triangle"), "png", {"train": EACH, "val": 8}),
    "waves": (waves, ("stripes", "rings", "mixture"), "jpg", {"train": EACH, "test": 10}),
    "figures": (figures, ("one", "two", "three"), "png", {"": EACH}),
}
"""clean sets: what renders an image of a class, the classes, the ending, and images per class of each split"""


def clean(root: Path, name: str = "shapes", seed: int = 0) -> Path:
    """A clean set with one folder per class, in folders for the splits where it has them."""
    render, classes, ending, splits = CLEAN[name]
    draw = np.random.default_rng(seed)
    for split, each in splits.items():
        for kind in classes:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(each):
                render(kind, draw).save(folder / f"{kind}{i}.{ending}", quality=92)
    return root


def captioned(root: Path, seed: int = 0) -> Path:
    """A clean set of captioned images: two sentences per image, as varied as the images."""
    draw, lines = np.random.default_rng(seed), ["image,caption\n"]
    (root / "images").mkdir(parents=True)
    for i in range(30):
        kind = ("circle", "square", "triangle")[i % 3]
        shape(kind, draw).save(root / "images" / f"{i}.png")
        lines += [f"{i}.png,a {kind} number {i} lies on the ground\n", f"{i}.png,the {kind} of image {i}\n"]
    (root / "captions.txt").write_text("".join(lines))
    return root


def masked(root: Path, seed: int = 0) -> Path:
    """A clean set of images with masks: the ground is 0, the shape 1."""
    draw = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(24):
        mask = np.zeros((48, 60), dtype=np.uint8)
        top, left = draw.integers(4, 24, 2)
        mask[top : top + 14, left : left + 20] = 1
        pixels = draw.integers(0, 90, (48, 60, 3)) + draw.integers(0, 60, 3) + 100 * mask[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("ground\nshape\n")
    return root


class Fault(NamedTuple):
    """What to do to a clean set, which finding names it, and what that finding must name."""

    check: str
    make: Callable[[Path], list[str]]
    base: Callable[[Path], Path] = clean


def circle(root: Path, i: int = 0, split: str = "train") -> Path:
    return root / split / "circle" / f"circle{i}.png"


def truncated(root: Path) -> list[str]:
    file = circle(root)
    file.write_bytes(file.read_bytes()[:-400])
    return ["circle0.png"]


def empty(root: Path) -> list[str]:
    circle(root).write_bytes(b"")
    return ["circle0.png"]


def no_image(root: Path) -> list[str]:
    circle(root).write_text("this is no image")
    return ["circle0.png"]


def wrong_ending(root: Path) -> list[str]:
    Image.open(circle(root)).convert("RGB").save(circle(root).with_suffix(".jpg"), "PNG")
    circle(root).unlink()
    return ["circle0.jpg"]


def other_ending(root: Path) -> list[str]:
    circle(root).rename(circle(root).with_suffix(".dat"))
    return ["circle0.dat"]


def duplicate(root: Path) -> list[str]:
    shutil.copy(circle(root), circle(root, 900))
    return ["circle0.png", "circle900.png"]


def near_duplicate(root: Path) -> list[str]:
    """A copy at half the size, one as a poor JPEG, one that is lighter and with less contrast."""
    Image.open(circle(root, 0)).resize((SIDE // 2, SIDE // 2)).save(circle(root, 900))
    Image.open(circle(root, 1)).save(circle(root, 901).with_suffix(".jpg"), quality=40)
    Image.open(circle(root, 2)).point(lambda value: int(40 + 0.7 * value)).save(circle(root, 902))
    return ["circle0.png", "circle900.png", "circle1.png", "circle901.jpg", "circle2.png", "circle902.png"]


def leaked(root: Path) -> list[str]:
    shutil.copy(circle(root), circle(root, 900, "val"))
    return ["train/circle/circle0.png", "val/circle/circle900.png"]


def leaked_nearly(root: Path) -> list[str]:
    Image.open(circle(root)).save(circle(root, 900, "val").with_suffix(".jpg"), quality=60)
    return ["train/circle/circle0.png", "val/circle/circle900.jpg"]


def contradiction(root: Path) -> list[str]:
    shutil.copy(circle(root), root / "train" / "square" / "again.png")
    return ["circle0.png", "again.png"]


def sixteen_bits(root: Path) -> list[str]:
    grey = np.asarray(Image.open(circle(root)).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(circle(root))
    return ["circle0.png"]


def grey(root: Path) -> list[str]:
    Image.open(circle(root)).convert("L").save(circle(root))
    return ["circle0.png"]


def rotated(root: Path) -> list[str]:
    exif = Image.Exif()
    exif[274] = 6
    Image.open(circle(root)).save(circle(root).with_suffix(".jpg"), quality=95, exif=exif)
    circle(root).unlink()
    return ["circle0.jpg"]


def rare_class(root: Path) -> list[str]:
    for i in range(1, EACH):
        circle(root, i).unlink()
    return ["circle"]


def empty_class(root: Path) -> list[str]:
    (root / "train" / "pentagon").mkdir()
    return ["train/pentagon"]


def few_images(root: Path) -> list[str]:
    for kind in ("circle", "square", "triangle"):
        for i in range(4, EACH):
            (root / "train" / kind / f"{kind}{i}.png").unlink()
    return ["circle", "square", "triangle"]


def tiny(root: Path) -> list[str]:
    Image.open(circle(root)).resize((9, 9)).save(circle(root))
    return ["circle0.png"]


def huge(root: Path) -> list[str]:
    Image.open(circle(root)).resize((900, 900)).save(circle(root))
    return ["circle0.png"]


def constant(root: Path) -> list[str]:
    Image.new("RGB", (SIDE, SIDE), (90, 120, 30)).save(circle(root))
    return ["circle0.png"]


def odd_statistics(root: Path) -> list[str]:
    """Blown out, in a set of even brightness."""
    for file in sorted(root.rglob("*.png")):
        pixels = np.asarray(Image.open(file)).astype(float)
        even = (pixels - pixels.mean()) / pixels.std() * 40 + 110
        Image.fromarray(even.clip(0, 255).astype(np.uint8)).save(file)
    pixels = np.asarray(Image.open(circle(root))) / 16 + 238
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(circle(root))
    return ["circle0.png"]


def one_source(root: Path) -> list[str]:
    for file in (root / "train" / "circle").iterdir():
        Image.open(file).resize((80, 60)).save(file.with_suffix(".jpg"), quality=95)
        file.unlink()
    return ["circle"]


def hidden(root: Path) -> list[str]:
    (root / "train" / ".DS_Store").write_bytes(b"\0")
    shutil.copy(circle(root), root / "train" / "circle" / ".circle900.png")
    return [".DS_Store", ".circle900.png"]


def mislabelled(root: Path) -> list[str]:
    """2 % of the labels: two striped images among the rings."""
    for i in (3, 11):
        (root / "train" / "stripes" / f"stripes{i}.jpg").rename(root / "train" / "rings" / f"flipped{i}.jpg")
    return ["flipped3.jpg", "flipped11.jpg"]


def repeated_captions(root: Path) -> list[str]:
    text = root / "captions.txt"
    lines = text.read_text().splitlines()
    text.write_text("\n".join([lines[0], *(line.split(",")[0] + ",a shape" for line in lines[1:])]) + "\n")
    return ["a shape"]


def mask_sizes(root: Path) -> list[str]:
    Image.open(root / "masks" / "3.png").resize((30, 24), Image.Resampling.NEAREST).save(root / "masks" / "3.png")
    return ["3.png"]


def broken_mask(root: Path) -> list[str]:
    (root / "masks" / "3.png").write_bytes(b"no mask")
    return ["3.png"]


def waves_set(root: Path) -> Path:
    return clean(root, "waves")


FAULTS: dict[str, Fault] = {
    "truncated": Fault("broken-files", truncated),
    "empty": Fault("broken-files", empty),
    "no image": Fault("broken-files", no_image),
    "wrong ending": Fault("wrong-endings", wrong_ending),
    "ending of no image": Fault("wrong-endings", other_ending),
    "duplicate": Fault("duplicates", duplicate),
    "near-duplicate": Fault("near-duplicates", near_duplicate),
    "leaked": Fault("leakage", leaked),
    "nearly leaked": Fault("leakage", leaked_nearly),
    "one image in two classes": Fault("conflicting-labels", contradiction),
    "16-bit among 8-bit": Fault("mixed-depth", sixteen_bits),
    "grey among colour": Fault("mixed-channels", grey),
    "rotated by EXIF": Fault("exif-rotation", rotated),
    "one class at 1 %": Fault("rare-classes", rare_class),
    "one class empty": Fault("empty-classes", empty_class),
    "too few images": Fault("few-images", few_images),
    "tiny images": Fault("tiny-images", tiny),
    "huge images": Fault("huge-images", huge),
    "constant images": Fault("constant-images", constant),
    "odd statistics": Fault("odd-statistics", odd_statistics),
    "a class of one source": Fault("one-source", one_source),
    "hidden files": Fault("hidden-files", hidden),
    "2 % of labels flipped": Fault("mislabelled", mislabelled, waves_set),
    "captions repeated": Fault("repeated-captions", repeated_captions, captioned),
    "masks of other size": Fault("mask-sizes", mask_sizes, masked),
    "broken mask": Fault("broken-masks", broken_mask, masked),
}
