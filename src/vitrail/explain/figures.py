"""Figures: each function draws one figure of the paper, and `png` encodes it."""

from __future__ import annotations

import io
import math
import warnings

import matplotlib
import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from torch import Tensor

from vitrail.fonts import fonts_for

Pixels = NDArray[np.float32]

HEAT = "inferno"
LAYERS = 6  # rows of the figure of heads
TILES = 16  # positions shown along a side


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as the bytes of a PNG file. Letters without an installed font are boxes; warns once."""
    buffer = io.BytesIO()
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    fonts = [font.name for font in fonts_for("".join(text.get_text() for text in texts))]
    for text in texts:
        text.set_fontfamily(fonts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", bbox_inches="tight", pad_inches=0.1)
    return buffer.getvalue()


def draw_rollout(opened: Tensor, heat: Tensor, title: str = "") -> Figure:
    """The image uint8 [C, H, W], the image darkened where rollout [h, w] is low (figure 6), and the rollout.

    The darkest place has the lowest rollout and the brightest the highest, even if they are close; see the scale.
    """
    pixels = _enlarged(opened)
    spread = _resized((heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-12), pixels)
    height = 3.4 * _aspect(pixels)
    figure = Figure(figsize=(11.2, height + 1.0), layout="compressed")
    seen, masked, map_ = figure.subplots(1, 3)
    _image(seen, pixels, "image")
    _image(masked, pixels * (0.1 + 0.9 * spread[..., None]), "attended regions")
    share = (heat / heat.mean()).numpy()
    image = map_.imshow(share, cmap=HEAT, extent=(0, pixels.shape[1], pixels.shape[0], 0))
    _bare(map_, "rollout (1: uniform)")
    figure.colorbar(image, ax=map_, shrink=0.9, pad=0.02)
    if title:
        figure.suptitle(title, fontsize=13, parse_math=False)
    return figure


def draw_heads(image: Tensor, maps: list[Tensor], layers: list[int]) -> Figure:
    """Attention of every head over the image: uint8 [C, H, W] and one map [heads, h, w] per layer, one row per layer.

    `layers` are the numbers of the rows, from 1. The brightest colour is the head's largest value, or three times a
    uniform attention if that is more, so that a head with uniform attention stays dim.
    """
    pixels = _enlarged(image, 128)
    grey = pixels.mean(axis=2, keepdims=True).repeat(3, axis=2)
    rows, heads = len(maps), len(maps[0])
    side = min(1.7, max(0.95, 11 / heads))
    figure = Figure(figsize=(side * heads + 0.8, side * rows * _aspect(pixels) + 0.7), layout="compressed")
    axes = figure.subplots(rows, heads, squeeze=False)
    colours = matplotlib.colormaps[HEAT]
    for row in range(rows):
        for head in range(heads):
            heat = maps[row][head]
            heat = heat / max(float(heat.max()), 3 * float(heat.mean()), 1e-12)
            _image(axes[row, head], 0.4 * grey + 0.6 * colours(_resized(heat, pixels))[..., :3])
        axes[row, 0].set_ylabel(f"layer {layers[row]}", fontsize=9)
    for head in range(heads):
        axes[0, head].set_title(f"head {head + 1}", fontsize=9)
    return figure


def draw_words(image: Tensor, words: list[tuple[str, float, Tensor]]) -> Figure:
    """A captioner's attention for each word: image uint8 [C, H, W], and text, probability and a map [h, w] per word.

    The brightest colour is the word's largest value, or three times a uniform attention if that is more.
    """
    pixels = _enlarged(image)
    grey = pixels.mean(axis=2, keepdims=True).repeat(3, axis=2)
    columns = min(6, len(words) + 1)
    rows = math.ceil((len(words) + 1) / columns)
    figure = Figure(figsize=(1.9 * columns, rows * (1.9 * _aspect(pixels) + 0.35) + 0.2), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    _image(axes[0], pixels, "image")
    colours = matplotlib.colormaps[HEAT]
    for place, (text, p, heat) in zip(axes[1:], words, strict=False):
        heat = heat / max(float(heat.max()), 3 / heat.numel(), 1e-12)
        _image(place, 0.45 * grey + 0.55 * colours(_resized(heat, pixels))[..., :3])
        place.set_title(f"{text.strip()}  {p:.0%}", fontsize=11, parse_math=False)
    for place in axes[len(words) + 1 :]:
        place.axis("off")
    return figure


def draw_positions(similarity: Tensor) -> Figure:
    """Similarity of positions [h * w, h, w]: one tile per patch, at the patch's place (figure 7, centre).

    A grid of more than 16 patches per side shows every second or third one.
    """
    rows, columns = similarity.shape[1:]
    step = math.ceil(max(rows, columns) / TILES)
    tiles = similarity.unflatten(0, (rows, columns))[::step, ::step]
    times = math.ceil(12 / max(rows, columns))  # enlarge small tiles, so that the gap stays thin
    tiles = tiles.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    rows, columns = tiles.shape[2:]
    down, across = tiles.shape[:2]
    gap = max(1, round(max(rows, columns) / 12))
    # Drawing hundreds of tiles as one image with gaps is faster.
    tiles = F.pad(tiles, (0, gap, 0, gap), value=math.nan)
    wall = tiles.permute(0, 2, 1, 3).reshape(down * (rows + gap), -1)[:-gap, :-gap]
    figure = Figure(figsize=(7.6, 6.6 * min(max(wall.shape[0] / wall.shape[1], 0.3), 2.5) + 0.6), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(wall.numpy(), vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_xticks([i * (columns + gap) + (columns - 1) / 2 for i in range(across)], _numbers(across, step))
    axes.set_yticks([i * (rows + gap) + (rows - 1) / 2 for i in range(down)], _numbers(down, step))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("column of the patch")
    axes.set_ylabel("row of the patch")
    axes.set_title("similarity of positions", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, label="cosine similarity")
    return figure


def draw_filters(filters: Tensor, title: str) -> Figure:
    """Filters [count, C, height, width], seven per row, zero as grey (figure 7, left)."""
    columns = min(7, len(filters))
    rows = math.ceil(len(filters) / columns)
    figure = Figure(figsize=(max(columns, 3.5), rows + 0.5), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, values in zip(axes, filters, strict=False):
        scaled = 0.5 + 0.5 * values / values.abs().max().clamp_min(1e-12)
        place.imshow(_three_channels(scaled).numpy(), interpolation="nearest")
        _bare(place)
        place.spines[:].set(visible=True, color="0.8")  # a border, so that white corners stay visible on the page
    for place in axes[len(filters) :]:
        place.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure


def draw_distance(distances: Tensor, diagonal: float) -> Figure:
    """Mean attention distance [L, heads] in pixels, one point per head (figure 7, right). `diagonal` is the image's."""
    layers, heads = distances.shape
    places = range(1, layers + 1)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for head in range(heads):
        colour = matplotlib.colormaps["viridis"](head / max(heads - 1, 1))
        axes.scatter(places, distances[:, head].numpy(), s=30, color=colour, label=f"head {head + 1}")
    axes.plot(places, distances.mean(dim=1).numpy(), color="0.6", linewidth=1, zorder=0, label="mean of heads")
    axes.set_xticks(range(1, layers + 1, math.ceil(layers / 16)))
    axes.set_ylim(0, max(diagonal * 0.6, float(distances.max()) * 1.08))
    axes.set_xlabel("layer")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def shown_layers(layers: int) -> list[int]:
    """The layers, counted from 0, in the figure of heads: all, or six evenly spaced with the first and last."""
    if layers <= LAYERS:
        return list(range(layers))
    return [round(i * (layers - 1) / (LAYERS - 1)) for i in range(LAYERS)]


def _three_channels(image: Tensor) -> Tensor:
    """[C, H, W] to [H, W, 3]: the first three channels, or the first one as grey."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0)


def _enlarged(image: Tensor, least: int = 256) -> Pixels:
    """uint8 [C, H, W] to floats [H, W, 3] in [0, 1], with pixels repeated until the longer side is at least `least`."""
    pixels: Pixels = _three_channels(image).float().div(255).cpu().numpy()
    times = math.ceil(least / max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def _resized(heat: Tensor, pixels: Pixels) -> Pixels:
    """A map [h, w] at the size of the image, bilinear between the patches' centres."""
    size = (pixels.shape[0], pixels.shape[1])
    resized: Pixels = F.interpolate(heat[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
    return resized


def _aspect(pixels: Pixels) -> float:
    return min(max(pixels.shape[0] / pixels.shape[1], 0.25), 3.0)


def _image(axes: Axes, pixels: Pixels, title: str = "") -> None:
    axes.imshow(pixels.clip(0, 1), interpolation="nearest")
    _bare(axes, title)


def _bare(axes: Axes, title: str = "") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)


def _numbers(count: int, step: int) -> list[str]:
    return [str(1 + i * step) for i in range(count)]
