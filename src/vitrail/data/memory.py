"""Keep a set that fits in memory: decoded once, as one tensor on the device if all images have one size."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitrail.data.augment import BOXES, Augment
from vitrail.data.decode import BadImage, EncodedImage, resize
from vitrail.data.pixels import to_bytes, with_channels
from vitrail.data.prepare import size_of
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Target
from vitrail.process import cores, memory_left

T = TypeVar("T")

IN_MEMORY = 2 << 30
"""bytes of decoded images up to which a set is kept in memory, if they fit in a quarter of the free memory"""
KEPT = 2
"""An image kept in memory for random crops is up to this many times as large as the crop."""


@dataclass
class Kept:
    """A set in memory. Its pixels are either in `table` or in `images`."""

    samples: Tensor
    """int64 [M], on the CPU: the numbers of the good images, in order"""
    bad: dict[int, str]
    """the errors of the others, by number in the set"""
    values: dict[int, Any]
    """values read by the target, by number in the set"""
    sources: dict[int, tuple[int, int]]
    """height and width of the originals, by number in the set, if the target is spatial"""
    images: dict[int, Tensor]
    """uint8 [C, h, w], by number in the set, if their sizes differ"""
    table: Tensor | None = None
    """uint8 [rows, C, h, w] on the device, if all have one size"""
    rows: Tensor | None = None
    """int64 [N] on the device: the row of each image in the table; None if row i is image i"""

    @property
    def reads(self) -> bool:
        """Whether the target has values of its own that are read image by image."""
        return next(iter(self.values.values()), None) is not None

    def good(self, samples: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers int64 [B] in which the next good image replaces a bad one, with its own draws, as `Fetch` does it.

        So an image that rots between two starts of a run changes the order of no other.
        """
        found = self.samples[torch.searchsorted(self.samples, samples) % len(self.samples)]
        return found, torch.where(found == samples, draws, found)

    def pixels(self, samples: Tensor) -> Tensor:
        """uint8 [B, C, h, w] from the table, for numbers int64 [B] on its device."""
        assert self.table is not None
        return self.table[samples if self.rows is None else self.rows[samples]]


def fits(
    images: ImageSet,
    target: Target,
    preprocess: Preprocess,
    augment: Augment | None,
    device: torch.device,
    processes: int = 1,
) -> bool:
    """Whether the decoded set is small enough to keep, judged by a sample of its images.

    Each of the `processes` keeps its own; on a CPU they share the memory.

    Random crops of `augment` need larger images. The value of a spatial target is counted as one byte per pixel of the
    original. A streamed set is not kept: it would have to be downloaded first.
    """
    if images.streamed is not None:
        return False
    p, count = preprocess, len(images)
    cuts = augment is not None and augment.cuts
    each = p.size[0] * p.size[1] * p.channels
    if cuts or target.spatial:
        sizes = []
        for i in range(0, count, max(1, count // 16)):
            try:
                size = size_of(images.open(i), p)
                own = math.prod(kept_size(*size, p, augment)) * p.channels if augment is not None and cuts else each
                sizes.append(own + target.spatial * size[0] * size[1])
            except BadImage:
                continue
        each = max(1, sum(sizes) // max(1, len(sizes)))
    free = _free_memory(device) // (1 if device.type == "cuda" else processes)
    return count * each <= min(IN_MEMORY, free // 4)


def keep(
    images: ImageSet, target: Target, preprocess: Preprocess, augment: Augment | None, device: torch.device
) -> Kept:
    """Decode a set once: at the size of `preprocess` or, for random crops of `augment`, no larger than they need."""
    p, items = preprocess, images.items
    cuts = augment is not None and augment.cuts

    def one_table(size: Iterable[int]) -> bool:
        # Crops from a table are resized without antialias, which is for enlarging only.
        return not cuts or (augment is not None and augment.crop in BOXES and not _larger(size, p.size))

    if isinstance(items, Tensor) and one_table(items.shape[-2:]):
        return _keep_tensor(items, target, p, cuts, device)

    def decode(i: int) -> tuple[Tensor, Any, tuple[int, int]] | str:
        try:
            opened = images.open(i)
            if augment is None or not cuts:
                size = size_of(opened, p) if target.spatial else (0, 0)
                return p.prepare(opened), _read(target, i, size, p), size
            whole = opened.pixels(p.channels) if isinstance(opened, EncodedImage) else images.image(i, p.channels)
            size = whole.shape[-2], whole.shape[-1]
            shrunk = resize(whole, kept_size(*size, p, augment), p.interpolation).contiguous()
            return shrunk, _read(target, i, size, p), size
        except BadImage as error:
            return str(error)

    kept = Kept(torch.empty(0), {}, {}, {}, {})
    with ThreadPoolExecutor(cores()) as pool:
        for i, result in enumerate(progress(_map_in_order(pool, decode, len(images)), len(images), "decoding")):
            if isinstance(result, str):
                kept.bad[i] = result
            else:
                kept.images[i], kept.values[i], kept.sources[i] = result
    kept.samples = torch.tensor(list(kept.images), dtype=torch.int64)
    sizes = {tuple(image.shape[-2:]) for image in kept.images.values()}
    if len(sizes) == 1 and one_table(next(iter(sizes))):
        kept.table = torch.stack(list(kept.images.values())).to(device)
        kept.images = {}
        if kept.bad:
            kept.rows = torch.full((len(images),), -1, device=device)
            kept.rows[kept.samples.to(device)] = torch.arange(len(kept.samples), device=device)
    return kept


def _keep_tensor(items: Tensor, target: Target, p: Preprocess, cuts: bool, device: torch.device) -> Kept:
    """`keep` for a set that is already one tensor."""
    pieces = [with_channels(to_bytes(piece), p.channels) for piece in items.split(1024)]
    table = torch.cat(pieces if cuts else [p.prepare(piece) for piece in pieces]).to(device)
    size = items.shape[-2], items.shape[-1]
    kept = Kept(torch.empty(0), {}, {}, {}, {}, table)
    for i in range(len(items)):
        try:
            kept.values[i], kept.sources[i] = _read(target, i, size, p), size
        except BadImage as error:
            kept.bad[i] = str(error)
    kept.samples = torch.tensor(list(kept.values), dtype=torch.int64)
    return kept


def _read(target: Target, i: int, size: tuple[int, int], p: Preprocess) -> Any:
    """The target's value for an image. Raises BadImage also if the value does not fit an image of this size."""
    value = target.read(i)
    if target.spatial:
        target.warp(value, p.affine(torch.tensor([size])))
    return value


def kept_size(height: int, width: int, preprocess: Preprocess, augment: Augment) -> tuple[int, int]:
    """The size at which an image is kept for random crops: at most its own, and no larger than they need.

    The shorter side is at most KEPT times the longer side of a resized crop. A jitter needs its largest scale.
    """
    if augment.crop == "jitter":
        needed = zip(preprocess.resized(height, width), (height, width), strict=True)
        ratio = augment.jitter[1] * max(side / own for side, own in needed)
    else:
        ratio = KEPT * max(preprocess.size) / min(height, width)
    return (height, width) if ratio >= 1 else (max(1, round(height * ratio)), max(1, round(width * ratio)))


def _larger(size: Iterable[int], than: tuple[int, int]) -> bool:
    return any(a > b for a, b in zip(size, than, strict=True))


def _map_in_order(pool: ThreadPoolExecutor, function: Callable[[int], T], count: int) -> Iterator[T]:
    """Results in order. Each task is a chunk, so that threads do not spend their time on synchronisation."""

    def chunk(start: int) -> list[T]:
        return [function(i) for i in range(start, min(start + 64, count))]

    for results in pool.map(chunk, range(0, count, 64)):
        yield from results


def progress(items: Iterable[T], total: int, text: str) -> Iterable[T]:
    """A progress bar on standard error, if it is a terminal and there are enough images."""
    if total < 1000 or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, text, total, console=Console(stderr=True), transient=True)


def _free_memory(device: torch.device) -> int:
    """Bytes available on the device, on the machine or in its container, whichever is least."""
    free = IN_MEMORY * 4
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # only Linux has this file
    free = int(min(free, memory_left()))
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free
