"""Figures: each function draws one, and `png` encodes it."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vitrail.explain.image import three_channels
from vitrail.explain.overlay import HEAT, Pixels, coloured, spread, strength, tinted
from vitrail.files import printable
from vitrail.fonts import fonts_for

Frame = Sequence[float]
"""where the model's input lies in a photo: left, top, right and bottom as shares of its size"""
PER_ROW = 5  # maps beside each other, with the photo
TILES = 16  # positions shown along a side
BLUE = "#2563a8"


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as the bytes of a PNG file. Letters without an installed font are boxes; warns once."""
    buffer = io.BytesIO()
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    for text in texts:
        text.set_text(printable(text.get_text()))
    fonts = [font.name for font in fonts_for("".join(text.get_text() for text in texts))]
    for text in texts:
        text.set_fontfamily(fonts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", bbox_inches="tight", pad_inches=0.1)
    return buffer.getvalue()


def draw_maps(photo: Pixels, frame: Frame, maps: Sequence[tuple[str, Tensor]], title: str = "") -> Figure:
    """A photo [H, W, 3], and under each map [h, w] of patches, by its title: the strongest place has the last colour.

    Each map is drawn over its own range, however small; its title tells the range as multiples of its mean.
    """
    rows = math.ceil((len(maps) + 1) / PER_ROW)
    columns = math.ceil((len(maps) + 1) / rows)  # rows of about the same length
    side = 11.5 / max(columns, 3)
    height = rows * (side * _aspect(photo) + 0.45) + 0.5 * bool(title) + 0.45
    figure = Figure(figsize=(side * columns, height), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    _image(axes[0], photo, "image")
    for place, (name, heat) in zip(axes[1:], maps, strict=False):
        _image(place, tinted(photo, spread(heat), frame))
        low, high = (float(edge / heat.mean().clamp_min(1e-12)) for edge in (heat.min(), heat.max()))
        place.set_title(f"{name}\n{low:.2g} to {high:.2g} × uniform", fontsize=9, parse_math=False)
    for place in axes[len(maps) + 1 :]:
        place.axis("off")
    _key(figure, list(axes))
    if title:
        figure.suptitle(textwrap.fill(title, 90), fontsize=13, parse_math=False)
    return figure


def _key(figure: Figure, axes: Iterable[Axes]) -> None:
    """The colours of a map below its figure, as they look on white."""
    values = np.linspace(0, 1, 256, dtype=np.float32)
    opaque = strength(values)[:, None]
    shown = ListedColormap((HEAT(values)[:, :3] * opaque + (1 - opaque)).clip(0, 1))
    bar = figure.colorbar(ScalarMappable(cmap=shown), ax=list(axes), location="bottom", shrink=0.3, aspect=34, pad=0.03)
    bar.set_ticks([0, 1], labels=["weakest patch", "strongest patch"], fontsize=9)
    bar.ax.tick_params(length=0)
    bar.outline.set_edgecolor("0.7")


def draw_heads(photo: Pixels, frame: Frame, maps: Sequence[Tensor], layers: Sequence[int]) -> Figure:
    """Attention of every head over a photo [H, W, 3]: one map [heads, h, w] per layer, one row per layer.

    `layers` are the numbers of the rows, from 1. The last colour is the head's largest value, or three times a uniform
    attention if that is more, so that a head with uniform attention stays pale.
    """
    rows, heads = len(maps), len(maps[0])
    side = min(1.7, max(0.95, 11 / heads))
    figure = Figure(figsize=(side * heads + 0.8, side * rows * _aspect(photo) + 0.7), layout="compressed")
    axes = figure.subplots(rows, heads, squeeze=False)
    step = max(1, round(max(photo.shape[:2]) / 200))
    small = photo[::step, ::step]  # hundreds of small panels
    for row in range(rows):
        for head in range(heads):
            heat = maps[row][head]
            heat = heat / heat.max().clamp_min(3 * heat.mean()).clamp_min(1e-12)
            _image(axes[row, head], tinted(small, heat, frame))
        axes[row, 0].set_ylabel(f"layer {layers[row]}", fontsize=9)
    for head in range(heads):
        axes[0, head].set_title(f"head {head + 1}", fontsize=9)
    return figure


def draw_words(photo: Pixels, frame: Frame, words: Sequence[tuple[str, float, Tensor]]) -> Figure:
    """A captioner's attention for each word over a photo [H, W, 3]: text, probability and a map [h, w] per word.

    The last colour is the word's largest value, or three times a uniform attention if that is more.
    """
    columns = min(6, len(words) + 1)
    rows = math.ceil((len(words) + 1) / columns)
    figure = Figure(figsize=(1.9 * columns, rows * (1.9 * _aspect(photo) + 0.35) + 0.2), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    _image(axes[0], photo, "image")
    for place, (text, p, heat) in zip(axes[1:], words, strict=False):
        heat = heat / max(float(heat.max()), 3 / heat.numel(), 1e-12)
        _image(place, tinted(photo, heat, frame))
        place.set_title(f"{text.strip()}  {p:.0%}", fontsize=11, parse_math=False)
    for place in axes[len(words) + 1 :]:
        place.axis("off")
    return figure


def draw_colours(photos: Sequence[tuple[Pixels, Frame, Tensor]], shares: Sequence[float]) -> Figure:
    """Photos [H, W, 3], and each under the colours [h, w, 3] of its patches; the components' shares of the variance."""
    aspect = max(_aspect(photo) for photo, _, _ in photos)
    figure = Figure(figsize=(7.6, len(photos) * (3.7 * aspect + 0.3) + 0.4), layout="compressed")
    axes = figure.subplots(len(photos), 2, squeeze=False)
    for row, (photo, frame, colours) in zip(axes, photos, strict=True):
        _image(row[0], photo, "image")
        _image(row[1], coloured(photo, colours, frame), "patches by their tokens")
    told = ", ".join(f"{name} {share:.0%}" for name, share in zip(("red", "green", "blue"), shares, strict=True))
    figure.suptitle(f"share of the variance: {told}", fontsize=10)
    return figure


def draw_similarity(
    photo: Pixels,
    frame: Frame,
    grid: tuple[int, int],
    rows: Sequence[tuple[int, Sequence[tuple[Pixels, Frame, Tensor]]]],
) -> Figure:
    """For some patches, by number, where the photo [H, W, 3] and other photos have tokens like theirs: maps [h, w]."""
    columns = 1 + len(rows[0][1])
    figure = Figure(figsize=(3.4 * columns, len(rows) * (3.4 * _aspect(photo) + 0.3)), layout="compressed")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    left, top, right, bottom = frame
    height, width = photo.shape[:2]
    across, down = (right - left) * width / grid[1], (bottom - top) * height / grid[0]
    for line, (patch, maps) in zip(axes, rows, strict=True):
        _image(line[0], photo, f"patch in row {patch // grid[1] + 1}, column {patch % grid[1] + 1}")
        corner = (left * width + patch % grid[1] * across - 0.5, top * height + patch // grid[1] * down - 0.5)
        for colour, thick in (("white", 3.5), ("black", 1.5)):
            line[0].add_patch(Rectangle(corner, across, down, fill=False, edgecolor=colour, linewidth=thick))
        for place, (their, their_frame, similarity) in zip(line[1:], maps, strict=True):
            _image(place, tinted(their, spread(similarity), their_frame))
            place.set_title(f"similarity {similarity.min():.2f} to {similarity.max():.2f}", fontsize=9)
    return figure


def draw_norms(photo: Pixels, frame: Frame, norms: Tensor, prefix: Tensor | None, outlying: Tensor) -> Figure:
    """Norms of patches [L, h, w] and of prefix tokens [L, P] by layer, and those of the last layer over the photo."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    lines, over = figure.subplots(1, 2, width_ratios=(1.4, 1))
    layers, flat = range(1, len(norms) + 1), norms.flatten(1)
    for share, alpha in ((0.0, 0.15), (0.05, 0.3), (0.25, 0.5)):
        edges = (flat.quantile(edge, dim=1).numpy() for edge in (share, 1 - share))
        lines.fill_between(layers, *edges, color=BLUE, alpha=alpha, linewidth=0)
    lines.plot(layers, flat.median(dim=1).values.numpy(), color=BLUE, label="patches: median, and ranges")
    for token in range(0 if prefix is None else min(prefix.shape[1], 8)):
        assert prefix is not None
        name = "prefix token 1 (class token)" if token == 0 else f"prefix token {token + 1}"
        lines.plot(layers, prefix[:, token].numpy(), "--", color=HEAT(0.35 + 0.09 * token), label=name)
    lines.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines.set_xlabel("layer")
    lines.set_ylabel("norm of the token")
    lines.set_ylim(bottom=0)
    lines.spines[["top", "right"]].set_visible(False)
    lines.grid(axis="y", color="0.9")
    lines.legend(fontsize=8, frameon=False)
    _image(over, tinted(photo, spread(norms[-1]), frame))
    count = int(outlying.sum())
    over.set_title(
        f"last layer: {count} outlier{'' if count == 1 else 's'} among {outlying.numel()} patches", fontsize=10
    )
    return figure


def draw_nearest(photo: Pixels, others: Sequence[tuple[Pixels, str, float]]) -> Figure:
    """A photo, and the photos whose vectors are the most similar, with their names and similarity."""
    figure = Figure(figsize=(2.2 * (1 + len(others)), 2.9), layout="compressed")
    axes = figure.subplots(1, 1 + len(others), squeeze=False)[0]
    _image(axes[0], photo, "image")
    for place, (their, name, score) in zip(axes[1:], others, strict=True):
        _image(place, their)
        place.set_title(f"{name[-24:]}\n{score:.3f}", fontsize=9, parse_math=False)
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
        place.imshow(three_channels(scaled).numpy(), interpolation="nearest")
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
