"""Batches. A set that fits is decoded once and kept on the device; a large one streams from disk through workers.

A step's batch is a function of (seed, step), so training starts at any step in constant time, and any number of
workers gives the same bits.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitrail.data.augment import ORDER, Augment, augment_batch
from vitrail.data.decode import BadImage, EncodedImage, Preprocess, log
from vitrail.data.fetch import Fetch, Fetched, Want, shrink
from vitrail.data.pixels import to_bytes, with_channels
from vitrail.data.random import draw_key, seed_for
from vitrail.data.sets import ImageSet
from vitrail.errors import RunError, UserError

Batch = dict[str, Any]
T = TypeVar("T")

STALLED = 300
"""seconds without a batch after which the workers count as stuck"""
IN_MEMORY = 2 << 30
"""bytes of decoded images up to which a set is kept in memory, if a quarter of the free memory holds them"""


@dataclass
class Tally:
    """How many of some images are bad. The loaders of a set's parts may share one."""

    images: int
    bad: int = 0


class Loader:
    """Batches of a set, for training (endless, augmented) and for evaluation (once, in order).

    A batch is a dict: `image` float32 [B, C, H, W], normalised; `label` int64 [B], or soft targets [B, K] where the
    augmentation mixes; `sample` int64 [B], numbers in the set; `epoch`; and what the set adds (see `ImageSet.extras`).

    `batch_size` counts the images of a step over all `world` processes: each takes every world-th one. `memory`
    None decides by size; what was decided stands in `.memory`, and belongs to a run that is resumed, since the two
    ways round differently. Raises UserError where more than the share `max_bad` of the images is bad: of those of
    the set, or of all that share the `tally`.
    """

    def __init__(
        self,
        set: ImageSet,
        preprocess: Preprocess,
        *,
        batch_size: int,
        seed: int,
        train: bool,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
        memory: bool | None = None,
        balanced: bool = False,
        rank: int = 0,
        world: int = 1,
        max_bad: float = 0.01,
        tally: Tally | None = None,
    ) -> None:
        if not len(set):
            raise UserError(f"{set.name} has no images to {'train on' if train else 'evaluate'}")
        if batch_size < 1 or batch_size % world:
            raise UserError(f"a batch of {batch_size} does not divide among {world} processes")
        self.set, self.preprocess, self.seed, self.train = set, preprocess, seed, train
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.device = torch.device(device)
        self.workers, self.balanced, self.max_bad = workers, balanced, max_bad
        self.tally = tally or Tally(len(set))
        self.augment = (augment or Augment()) if train else None
        self.wait = 0.0
        """seconds spent in making or waiting for batches"""
        self.bad: dict[int, str] = {}
        """what was wrong with each image that is left out, by its number in the set"""
        self.samples = torch.arange(len(set))
        """the numbers of the images in use"""
        self.memory = self._fits() if memory is None else memory
        self._table: Tensor | None = None
        self._kept: dict[int, Tensor] | None = None
        self._shuffled: tuple[int, Tensor, Tensor] | None = None
        if self.memory:
            self._load()
        self.labels = set.labels.to(self.device)

    @property
    def steps_per_epoch(self) -> int:
        """Training leaves out a last short batch, unless the set is smaller than a batch."""
        if self.train:
            return max(1, len(self.samples) // self.batch_size)
        return -(-len(self.samples) // self.batch_size)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Training batches without end, from any step."""
        assert self.augment is not None, "batches are for training: use evaluation()"
        if self._table is not None:
            made = (self._from_table(self._plan(step)) for step in itertools.count(start_step))
        else:
            fetched = self._fetch((self._plan(step) for step in itertools.count(start_step)), train=True)
            made = (self._from_fetched(part, epoch) for part, epoch in fetched)
        return self._timed(made)

    def evaluation(self) -> Iterator[Batch]:
        """Every image once, in order and as it is; the last batch may be short."""
        mine = self.samples[self.rank :: self.world].tolist()
        each = self.batch_size // self.world
        plans = [[Want(i, 0, i) for i in mine[start : start + each]] for start in range(0, len(mine), each)]
        if self._table is not None:
            made = (self._from_table(plan, augment=False) for plan in plans)
        else:
            fetched = self._fetch(iter(plans), train=False)
            made = (self._from_fetched(part, epoch, augment=False) for part, epoch in fetched if len(part.samples))
        return self._timed(made)

    def _timed(self, made: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(made, None)
            self.wait += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _plan(self, step: int) -> list[Want]:
        """The images of this process in a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        samples, draws = self._order(epoch)
        mine = slice(within * self.batch_size + self.rank, (within + 1) * self.batch_size, self.world)
        return [Want(s, epoch, d) for s, d in zip(samples[mine].tolist(), draws[mine].tolist(), strict=True)]

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's images in order, and the numbers that their draws depend on."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(seed_for(self.seed, epoch, ORDER))
            count = len(self.samples)
            if self.balanced:
                labels = self.set.labels[self.samples]
                weights = 1 / labels.bincount().double()[labels]
                rows = weights.multinomial(count, replacement=True, generator=generator)
                # An image that comes again in an epoch gets other draws.
                draws = self.samples[rows] + _occurrence(rows) * len(self.set)
            else:
                rows = torch.randperm(count, generator=generator)
                draws = self.samples[rows]
            self._shuffled = (epoch, self.samples[rows], draws)
        return self._shuffled[1:]

    def _from_table(self, plan: list[Want], augment: bool = True) -> Batch:
        assert self._table is not None
        samples = torch.tensor([want.sample for want in plan])
        draws = torch.tensor([want.draw for want in plan])
        there = self._there(samples)
        images = self._table[self._rows[there] if self.bad else there]
        return self._finish(images, samples, draws, plan[0].epoch, self.augment if augment else None)

    def _from_fetched(self, part: Fetched, epoch: int, augment: bool = True) -> Batch:
        rest = self.augment
        if rest is not None and rest.crop == "resized":
            rest = replace(rest, crop="none")  # the workers did it
        images = self._there(part.images)
        return self._finish(images, part.samples, part.draws, epoch, rest if augment else None)

    def _there(self, tensor: Tensor) -> Tensor:
        """A tensor of the processor's on the device, without waiting for what the device has yet to do."""
        return tensor.to(self.device, non_blocking=True)

    def _finish(self, images: Tensor, samples: Tensor, draws: Tensor, epoch: int, augment: Augment | None) -> Batch:
        """Images on the device, with their numbers and draws on the processor, to a batch."""
        there, size = self._there(samples), self.preprocess.size
        labels = self.labels[there]
        if augment is not None:
            classes = len(self.set.classes)
            images, labels = augment_batch(images, labels, draws, self.seed, epoch, augment, classes, size)
        if images.shape[-2:] != size:
            images = self.preprocess.prepare(images)
        extras = self.set.extras(samples.tolist())
        return {
            "image": self.preprocess.normalise(images),
            "label": labels,
            "sample": there,
            "epoch": torch.full((), epoch, device=self.device),
            "key": draw_key(self.seed, epoch, self.device),
            **extras,
        }

    def _fetch(self, plans: Iterator[list[Want]], train: bool) -> Iterator[tuple[Fetched, int]]:
        """Plans bundled out by the workers, in order, with their epochs."""
        fetch = Fetch(self.set, self.preprocess, self.seed, self.augment, train, self._kept)
        # The sampler runs some batches ahead of the workers, so the epochs wait in a second copy of the plans.
        plans, copy = itertools.tee(plans)
        with warnings.catch_warnings():
            # How many workers read best depends on the disk as much as on the processor.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader: DataLoader[Fetched] = DataLoader(
                fetch,
                batch_sampler=plans,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                prefetch_factor=4 if self.workers else None,
                timeout=STALLED if self.workers else 0,
                worker_init_fn=_let_one_pass,
                # Forked workers share the set's lists; elsewhere they are not to be had.
                multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
                # Not the default one, which belongs to the model: drawing from it would change a resumed run.
                generator=torch.Generator(),
            )
            batches = iter(loader)
        for part, plan in zip(_told_apart(batches), copy, strict=False):
            self._note(part.bad)
            if train and not len(part.samples):
                raise UserError(f"no image of {self.set.name} can be read")
            if self.device.type == "cuda":
                part.images = part.images.pin_memory()
            yield part, plan[0].epoch

    def _note(self, bad: dict[int, str]) -> None:
        """Name each bad image once, and stop where they are too many."""
        for sample, reason in bad.items():
            if sample not in self.bad:
                self.bad[sample] = reason
                self.tally.bad += 1
                log.warning(f"left out: {reason}")
        if self.bad and self.tally.bad > self.max_bad * self.tally.images:
            raise UserError(
                f"{self.tally.bad} of {self.tally.images} images of {self.set.name} are bad, more than "
                f"{self.max_bad:.1%} (the last: {reason_of(self.bad)}): mend or remove them"
                + ", or raise --max-bad"
                * self.train
            )

    def _load(self) -> None:
        """Decode the set once: to one tensor on the device, or where crops need larger images to a tensor each."""
        p, items = self.preprocess, self.set.items
        resized = self.augment is not None and self.augment.crop == "resized"
        if isinstance(items, Tensor) and not (resized and _larger(items.shape[-2:], p.size)):
            parts = [with_channels(to_bytes(part), p.channels) for part in items.split(1024)]
            self._table = torch.cat(parts if resized else [p.prepare(part) for part in parts]).to(self.device)
            return

        def decode(i: int) -> Tensor | str:
            try:
                opened = self.set.open(i)
                if not resized:
                    return p.prepare(opened)
                return shrink(
                    opened.pixels(p.channels) if isinstance(opened, EncodedImage) else self.set.image(i, p.channels), p
                )
            except BadImage as error:
                return str(error)

        images: dict[int, Tensor] = {}
        bad: dict[int, str] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, made in enumerate(_progress(_ahead(pool, decode, len(self.set)), len(self.set))):
                if isinstance(made, Tensor):
                    images[i] = made
                else:
                    bad[i] = made
        self._note(bad)
        if not images:
            raise UserError(f"no image of {self.set.name} can be read")
        self.samples = torch.tensor(list(images))
        self._rows = torch.full((len(self.set),), -1, device=self.device)
        self._rows[self.samples.to(self.device)] = torch.arange(len(images), device=self.device)
        sizes = {tuple(image.shape[-2:]) for image in images.values()}
        if len(sizes) == 1 and not (resized and _larger(next(iter(sizes)), p.size)):
            self._table = torch.stack(list(images.values())).to(self.device)
        else:
            self._kept = images

    def _fits(self) -> bool:
        """Whether the decoded set is small enough to keep, judged by some of its images."""
        p, count = self.preprocess, len(self.set)
        pixels = p.size[0] * p.size[1]
        if self.augment is not None and self.augment.crop == "resized":
            sizes = []
            for i in range(0, count, max(1, count // 16)):
                try:
                    opened = self.set.open(i)
                    size = opened.shape[-2:] if isinstance(opened, Tensor) else opened.measure(p.channels)
                    sizes.append(shrink(torch.empty(1, *size, dtype=torch.uint8, device="meta"), p).numel())
                except BadImage:
                    continue
            pixels = max(1, sum(sizes) // max(1, len(sizes)))
        return count * pixels * p.channels <= min(IN_MEMORY, _free_memory(self.device) // 4)


def reason_of(bad: dict[int, str]) -> str:
    """The last reason noted."""
    return next(reversed(bad.values()))


def _occurrence(rows: Tensor) -> Tensor:
    """How often each entry has come before: [3, 5, 3, 3] to [0, 0, 1, 2]."""
    order = rows.argsort(stable=True)
    _, counts = rows[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    result = torch.empty_like(rows)
    result[order] = torch.arange(len(rows)) - starts
    return result


def _larger(size: Iterable[int], than: tuple[int, int]) -> bool:
    return any(a > b for a, b in zip(size, than, strict=True))


def _as_it_is(part: Any) -> Any:
    return part


def _let_one_pass(worker: int) -> None:
    """A worker outlives its first SIGTERM: sent to all processes of a job, as Slurm does, it is for the run to save.

    When that is done the workers end with it. One that hangs gets a second, from PyTorch or from Python's exit.
    """

    def pass_by(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, pass_by)


def _told_apart(batches: Iterator[T]) -> Iterator[T]:
    """Batches, with one plain line where the workers are at an end: the system ended one, or none answers."""
    try:
        yield from batches
    except RuntimeError as error:
        text = str(error)
        if "timed out" in text:
            raise RunError(
                f"the workers made no batch in {STALLED} seconds: see to the disk, or try --workers 0"
            ) from None
        if "exited unexpectedly" in text or "is killed by signal" in text:
            raise RunError(
                "a worker was ended by the system, which does so where memory (or /dev/shm) is short: "
                "lower --workers or --batch-size"
            ) from None
        raise


def _ahead(pool: ThreadPoolExecutor, function: Callable[[int], T], count: int) -> Iterator[T]:
    """Results in order, in tasks large enough that threads do not spend their time on handing over."""

    def some(start: int) -> list[T]:
        return [function(i) for i in range(start, min(start + 64, count))]

    for part in pool.map(some, range(0, count, 64)):
        yield from part


def _progress(items: Iterable[T], total: int) -> Iterable[T]:
    """A bar on standard error, where a person sees it and it takes long enough to look."""
    if total < 1000 or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, "decoding", total, console=Console(stderr=True), transient=True)


def _free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device and on the machine, whichever is less."""
    free = IN_MEMORY * 4
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # only Linux says so
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free
