"""`preprocessor_config.json`, in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitrail.data.decode import Interpolation
from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.zoo.huggingface.kinds import Kind

# Pillow's numbers. Lanczos is missing; bicubic is the closest.
RESAMPLE: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic", 1: "bicubic"}


def settings(texts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings beside the weights: a separate file, or (transformers 5) a section of the processor's file."""
    found = texts.get("preprocessor_config.json")
    if found is None:
        found = texts.get("processor_config.json", {}).get("image_processor")
    return found or None


def default_settings(kind: Kind, size: tuple[int, int]) -> dict[str, Any]:
    """The settings of the published checkpoints of a type, for images of `size`."""
    height, width = (round(side * kind.enlarge) for side in size)
    values = {"size": {"height": height, "width": width} if kind.square else {"shortest_edge": max(height, width)}}
    if kind.pixels.get("do_center_crop"):
        values["crop_size"] = {"height": size[0], "width": size[1]}
    return {**kind.pixels, **values}


def preprocess(values: Mapping[str, Any], kind: Kind, size: tuple[int, int], channels: int) -> Preprocess:
    """The settings as a `Preprocess`. `size` is the model's own, for settings without resizing."""
    values = {**default_settings(kind, size), **values}
    box, squash = size, False
    if values.get("do_resize", True):
        box, squash = _box(values["size"], kind.square, size)
    target = _box(values["crop_size"], True, size)[0] if values.get("do_center_crop") else box
    if min(target) > max(box):
        raise UserError(
            f"preprocessor_config.json resizes images to {box[0]}x{box[1]} and crops {target[0]}x{target[1]} of them, "
            "which would leave a black margin: set do_center_crop to false, or a larger size"
        )
    mean, std = _statistics(values, channels)
    return Preprocess(
        size=target,
        resize="squash" if squash else "crop",
        crop_fraction=min(1.0, max(target) / max(box)),
        interpolation=RESAMPLE.get(values["resample"], "bicubic"),
        mean=mean,
        std=std,
        channels=channels,
    )


def _box(value: Any, square: bool, size: tuple[int, int]) -> tuple[tuple[int, int], bool]:
    """A size of the settings as (height, width), and whether images are squashed to it."""
    if isinstance(value, int):
        return (value, value), square
    if isinstance(value, list | tuple) and len(value) == 2:
        return (int(value[0]), int(value[1])), True
    if not isinstance(value, Mapping):
        raise UserError(f"preprocessor_config.json has a size of {value!r}: give height and width, or shortest_edge")
    if "height" in value and "width" in value:
        return (int(value["height"]), int(value["width"])), True
    if "shortest_edge" in value:
        return (int(value["shortest_edge"]),) * 2, False
    return size, True  # the longest edge, padded (SAM): squashing is the closest


def _statistics(values: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, for pixels in [0, 1]."""
    mean, std = [0.0], [1.0]
    if values.get("do_normalize", True):
        mean, std = (x if isinstance(x, list) else [x] for x in (values["image_mean"], values["image_std"]))
    # transformers normalises pixels times this factor; without rescaling they range up to 255.
    factor = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255
    means, stds = (_spread([float(x) / round(factor, 9) for x in numbers], channels) for numbers in (mean, std))
    return means, stds


def _spread(numbers: list[float], channels: int) -> tuple[float, ...]:
    """One number per channel: for grey the mean over the colours, for other channels the colours in turn."""
    if channels == 1:
        return (math.fsum(numbers) / len(numbers),)
    return tuple(numbers[i % len(numbers)] for i in range(channels))


def settings_of(p: Preprocess) -> dict[str, Any]:
    """Our preprocessing as transformers' settings."""
    height, width = p.resized(*p.size) if p.resize == "squash" else (max(p.size), max(p.size))
    size: dict[str, int] = {"height": height, "width": width}
    processor = "ViTImageProcessor"
    if p.resize == "crop":
        processor, size = "CLIPImageProcessor", {"shortest_edge": math.floor(round(max(p.size) / p.crop_fraction, 6))}
    elif (height, width) != p.size:
        processor = "DeiTImageProcessor"
    values: dict[str, Any] = {
        "image_processor_type": processor,
        "do_resize": True,
        "size": size,
        "resample": next(number for number, name in RESAMPLE.items() if name == p.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
    if processor != "ViTImageProcessor":
        values["do_center_crop"] = True
        values["crop_size"] = {"height": p.size[0], "width": p.size[1]}
    if p.channels == 3:
        values["do_convert_rgb"] = True
    return values
