"""Batches of a set: decoded once and kept on the device if it fits, or else streamed from disk by workers.

A step's batch is a function of (seed, step), so training can start at any step in constant time, and any number of
workers gives the same batches, bit for bit.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.data import memory as in_memory
from vitrail.data.augment import ORDER, Augment, Augmenter, refuse_spatial, stream_keys
from vitrail.data.fetch import Fetch, Fetched, Want, affine_of, joined
from vitrail.data.mixing import mix_pairs
from vitrail.data.prepare import Prepare, View, batched, cropped, view_seeds
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import draw_key, seed_for
from vitrail.data.repeats import occurrence, repeated
from vitrail.data.sets import ImageSet
from vitrail.data.tally import Tally
from vitrail.data.targets import Target
from vitrail.data.workers import fetched_by, start_workers
from vitrail.errors import UserError

Batch = dict[str, Any]


class Plan(NamedTuple):
    """The images of a step."""

    epoch: int
    samples: Tensor
    """int64 [B]: their numbers in the set, on the CPU"""
    draws: Tensor
    """int64 [B]: the numbers that seed their draws, on the CPU"""
    on_device: tuple[Tensor, Tensor]
    """both on the loader's device"""

    def wants(self) -> list[Want]:
        numbers = zip(self.samples.tolist(), self.draws.tolist(), strict=True)
        return [Want(sample, self.epoch, draw) for sample, draw in numbers]


class Keys(NamedTuple):
    """What an epoch's draws depend on, on the device."""

    epoch: Tensor
    key: Tensor
    streams: list[Tensor]
    """of each view: see `stream_keys`"""


class Loader:
    """Batches of a set, for training (endless, augmented) and for evaluation (once, in order).

    A batch is a dict: `image` float32 [B, C, H, W], normalised; the fields of the target (see `vitrail.data.targets`),
    which is the set's own unless `target` replaces it; `sample` int64 [B], numbers in the set; `epoch` [] and `key` [],
    by which a loss draws (see `vitrail.data.random`). Where the target is spatial, `affine` is that of its images, and
    in evaluation `truth` the entries as they were read. Where a sample becomes several images (`View`), `views` lists
    them, of which `image` is the first. `prepare` is a task's own way to take an image, with one frame in training and
    any number of any size in evaluation: then `image` holds the frames of all images of a batch, and `affine` tells
    which image each is of. Such a batch has at most the pixels of `batch_size` images of the preprocessing's size.
    `compile` compiles the augmentation.

    `batch_size` counts the images of a step over all `world` processes. If the augmentation mixes images, places 2k and
    2k + 1 of an epoch's order are partners, and whole pairs are distributed round-robin over the processes; otherwise
    single images are. In evaluation whole batches are, so that outputs are the same to the last bit. With `memory` None
    the size decides. `.memory` is the decision; a resumed run must keep it, since the two ways round differently.
    Raises UserError if more than the fraction `max_bad` of the images is bad, counted over the set, or over all loaders
    that share the `tally`.
    """

    def __init__(
        self,
        set: ImageSet,
        preprocess: Preprocess,
        *,
        batch_size: int,
        seed: int,
        train: bool,
        target: Target | None = None,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
        memory: bool | None = None,
        balanced: bool = False,
        rank: int = 0,
        world: int = 1,
        max_bad: float = 0.01,
        tally: Tally | None = None,
        views: tuple[View, ...] = (),
        prepare: Prepare | None = None,
        compile: bool = False,
    ) -> None:
        self.prepare = prepare
        self.set, self.preprocess, self.seed, self.train = set, preprocess, seed, train
        self.views = view_seeds(views if train and views else (View(1, preprocess.size),), preprocess, seed)
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.device = torch.device(device)
        self.target = (set.target if target is None else target).to(self.device)
        self.workers, self.balanced, self.max_bad = workers, balanced, max_bad
        self.tally = tally or Tally(len(set))
        self.augment = (augment or Augment()) if train else None
        self.unit = 2 if self.augment is not None and self.augment.mixes else 1
        """number of neighbours in an epoch's order that must stay in one process"""
        self._check()
        self.wait = 0.0
        """seconds spent making batches or waiting for them"""
        self.bad: dict[int, str] = {}
        """the error of each image that is left out, by its number in the set"""
        self._kept: in_memory.Kept | None = None
        self._shuffled: tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
        self._keys: tuple[int, Keys] | None = None
        arguments = (set, self.target, preprocess, self.augment, self.device)
        self.memory = self.prepare is None and (in_memory.fits(*arguments, world) if memory is None else memory)
        if self.memory:
            self._kept = in_memory.keep(*arguments)
            self.record_bad(self._kept.bad)
            if not len(self._kept.samples):
                raise self._none_left()
        self._augmenters: list[Augmenter] = []
        if self.augment is not None and self.prepare is None:  # a task that prepares images itself has augmented them
            rest = self.augment if self._table is not None else cropped(self.augment)
            self._augmenters = [Augmenter(rest, own.size, self.device, own.fill) for _, own in self.views]
        if compile:
            self._transform = torch.compile(self._transform, dynamic=False)  # type: ignore[method-assign]

    @property
    def _table(self) -> in_memory.Kept | None:
        """The set in memory, if it is one tensor on the device."""
        return self._kept if self._kept is not None and self._kept.table is not None else None

    def _check(self) -> None:
        """Refuse invalid settings, before any image is read."""
        if not len(self.set):
            raise UserError(f"{self.set.name} has no images to {'train on' if self.train else 'evaluate'}")
        if len(self.target) != len(self.set):
            raise ValueError(f"a target of {len(self.target)} entries for {len(self.set)} images")
        if self.train and self.batch_size % self.world:
            low, size = self.batch_size // self.world * self.world, self.world
            near = " or ".join(str(number) for number in (low, low + size) if number)
            raise UserError(
                f"a batch of {self.batch_size} cannot be divided among {size} processes: set --batch-size to {near}"
            )
        if self.train and len(self.set) <= self.unit * (self.world - 1):
            raise UserError(f"{len(self.set)} images are too few for {self.world} processes")
        if self.augment is not None and self.target.spatial:
            refuse_spatial(self.augment, self.target.noun)
        if len(self.views) > 1 and self.target.spatial:
            raise UserError(f"{self.target.noun} follow one image per sample, and this task takes several")
        if len(self.views) > 1 and self.prepare is not None:
            raise ValueError("a task prepares its images itself, or has several views of them, and not both")
        if self.augment is not None and self.augment.mixes and len(self.views) > 1:
            raise UserError("mixup and cutmix mix one image per sample, but this task has several: set both to 0")
        if self.unit == 1:
            return
        none = torch.empty(0, dtype=torch.int64)
        self.target.mix(dict.fromkeys(self.target.fields, none), none, none.float())  # raises if it cannot
        pairs = self.unit * self.world
        if self.batch_size < len(self.set) and self.batch_size % pairs:
            raise UserError(
                f"mixup and cutmix mix pairs of images, so batch_size must be a multiple of {pairs}, got "
                f"{self.batch_size}: set it to {-(-self.batch_size // pairs) * pairs}, or set mixup and cutmix to 0"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Training drops a last short batch, unless the set is smaller than a batch."""
        if self.train:
            return max(1, len(self.set) // self.batch_size)
        return -(-len(self.set) // self.batch_size)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Endless training batches, from any step."""
        assert self.augment is not None, "batches are for training: use evaluation()"
        return self._batches((self._plan(step) for step in itertools.count(start_step)), self.augment)

    def evaluation(self) -> Iterator[Batch]:
        """Every image once, in order, without augmentation; the last batch may be short."""
        size = self.batch_size
        # Of the whole set, so that no image is scored twice or never if other processes can read other images.
        own = [*torch.arange(len(self.set)).split(size)[self.rank :: self.world]]
        if self._kept is not None:
            own = [good for each in own if len(good := each[torch.isin(each, self._kept.samples)])]
        if self.prepare is not None:
            found = self._fetch(([Want(i, 0, i)] for each in own for i in each.tolist()), None)
            fetched = (one for one, _ in found if len(one.samples))
            groups = batched(
                fetched, lambda one: one.views[0], size * self.preprocess.size[0] * self.preprocess.size[1]
            )
            return self._timed(self._from_fetched(joined(group), 0, None) for group in groups)
        plans = (Plan(0, each, each, (there := self._to_device(each), there)) for each in own)
        return self._batches(plans, None)

    def _batches(self, plans: Iterator[Plan], augment: Augment | None) -> Iterator[Batch]:
        """The batches of some plans; `augment` is None in evaluation."""
        if (kept := self._table) is not None:
            return self._timed(self._from_table(kept, plan, augment) for plan in plans)
        found = self._fetch((plan.wants() for plan in plans), augment)
        return self._timed(
            self._from_fetched(fetched, epoch, augment) for fetched, epoch in found if len(fetched.samples)
        )

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _plan(self, step: int) -> Plan:
        """The images of this process in a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        size = self.batch_size // self.world
        rows = slice(within * size, (within + 1) * size)
        samples, draws, *there = (numbers[rows] for numbers in self._order(epoch))
        return Plan(epoch, samples, draws, (there[0], there[1]))

    def _order(self, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's images of the epoch in order, and the numbers that seed their draws; again on the device."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(seed_for(self.seed, epoch, ORDER))
            count = len(self.set)
            if self.balanced:
                strata = self.set.target.strata()
                weights = 1 / strata.bincount().double()[strata]
                rows = weights.multinomial(count, replacement=True, generator=generator)
            else:
                rows = torch.randperm(count, generator=generator)
            if (streamed := self.set.streamed) is not None:  # in any other order, each step would need all blocks
                rows = rows[streamed.mixed(rows, generator)]
            repeats = self.augment.repeats if self.augment is not None else 1
            rows = repeated(rows, repeats, self.batch_size)
            draws = rows
            if self.balanced or repeats > 1:  # an image that is repeated in an epoch gets other draws
                draws = draws + occurrence(rows) * len(self.set)
            own = torch.arange(count) // self.unit % self.world == self.rank
            samples, draws = rows[own], draws[own]
            if self._kept is not None:
                samples, draws = self._kept.good(samples, draws)
            self._shuffled = (epoch, (samples, draws, self._to_device(samples), self._to_device(draws)))
        return self._shuffled[1]

    def _keys_of(self, epoch: int) -> Keys:
        if self._keys is None or self._keys[0] != epoch:
            streams = [self._to_device(stream_keys(seed, epoch)) for seed, _ in self.views]
            number = torch.full((), epoch, device=self.device)
            self._keys = (epoch, Keys(number, draw_key(self.seed, epoch, self.device), streams))
        return self._keys[1]

    def _from_table(self, kept: in_memory.Kept, plan: Plan, augment: Augment | None) -> Batch:
        values, truths, affine = [], [], None
        if kept.reads:
            values = [kept.values[sample] for sample in plan.samples.tolist()]
        if self.target.spatial:
            wants = plan.wants()
            sizes = [kept.sources[want.sample] for want in wants]
            affine = affine_of(wants, sizes, sizes, self.preprocess, self.seed, augment)
            truths, values = values, [self.target.warp(value, affine.subset([i])) for i, value in enumerate(values)]
        pixels = kept.pixels(plan.on_device[0])
        if augment is None and self.augment is not None and self.augment.cuts:  # kept whole, for random crops
            pixels = self.preprocess.prepare(pixels)
        images = [pixels] * len(self.views)
        fetched = Fetched(images, plan.samples, plan.draws, values, truths, affine, {})
        return self._finish(fetched, plan.epoch, augment, plan.on_device)

    def _from_fetched(self, fetched: Fetched, epoch: int, augment: Augment | None) -> Batch:
        fetched.views = [self._to_device(images) for images in fetched.views]
        there = self._to_device(fetched.samples), self._to_device(fetched.draws)
        return self._finish(fetched, epoch, augment, there)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, without waiting for the device's pending work."""
        return tensor.to(self.device, non_blocking=True)

    def _finish(self, fetched: Fetched, epoch: int, augment: Augment | None, there: tuple[Tensor, Tensor]) -> Batch:
        """A batch, from images on the device and, `there` too, the numbers of samples and draws."""
        samples, draws = there
        keys = self._keys_of(epoch)
        # An image with several frames has no one target in the pixels of the input.
        one_each = self.prepare is None or augment is not None or not self.target.spatial
        fields = self.target.collate(fetched.values, samples, augment is not None) if one_each else {}
        views = []
        for view, images in enumerate(fetched.views):
            if augment is None:
                views.append(self._normalised(images, self.views[view][1]))
            else:
                image, fields = self._transform(view, images, fields, draws, keys.streams[view])
                views.append(image)
        batch = {"image": views[0], **fields, "sample": samples, "epoch": keys.epoch, "key": keys.key}
        if len(views) > 1:
            batch["views"] = views
        if fetched.affine is not None:
            batch["affine"] = fetched.affine
            if augment is None and self.target.spatial:
                batch["truth"] = fetched.truths
        return batch

    def _transform(
        self, view: int, images: Tensor, fields: dict[str, Any], draws: Tensor, keys: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """The augmented and normalised images of a view, and the fields, mixed where the images are."""
        assert self.augment is not None
        if self._augmenters:
            images = self._augmenters[view](images, draws, keys)
        if self.augment.mixes:
            images, partner, share = mix_pairs(images, draws, keys, self.augment)
            fields = self.target.mix(fields, partner, share)
        return self._normalised(images, self.views[view][1]), fields

    def _normalised(self, images: Tensor, preprocess: Preprocess) -> Tensor:
        whole = self.prepare is not None or images.shape[-2:] == preprocess.size
        return preprocess.normalise(images if whole else preprocess.prepare(images))

    def rate(self, seconds: float = 0.3) -> float:
        """Images per second that one process decodes and crops for training, measured for about so many seconds."""
        fetch, wants = self._fetcher(self.augment), self._plan(0).wants()
        threads, count = torch.get_num_threads(), 0
        torch.set_num_threads(1 if self.workers else threads)  # as in a worker
        try:
            fetch.__getitems__(wants[:1])  # the first call is slower
            start = time.perf_counter()
            while (spent := time.perf_counter() - start) < seconds and count < len(wants):
                fetch.__getitems__([wants[count]])
                count += 1
        finally:
            torch.set_num_threads(threads)
        return count / spent

    def first(self, count: int) -> Batch:
        """The first images of the run as a training batch, read here. No counts change, and no worker starts."""
        epoch, samples, draws, there = self._plan(0)
        own = slice(count // self.unit * self.unit)
        plan = Plan(epoch, samples[own], draws[own], (there[0][own], there[1][own]))
        if (kept := self._table) is not None:
            return self._from_table(kept, plan, self.augment)
        return self._from_fetched(self._fetcher(self.augment).__getitems__(plan.wants()), epoch, self.augment)

    def _fetcher(self, augment: Augment | None) -> Fetch:
        views = self.views if augment is not None else self.views[:1]
        return Fetch(self.set, self.target, views, augment, self._kept, self.prepare)

    def _fetch(self, plans: Iterator[list[Want]], augment: Augment | None) -> Iterator[tuple[Fetched, int]]:
        """The plans as fetched by the workers, in order, with their epochs."""
        for fetched, plan in fetched_by(partial(start_workers, self._fetcher(augment), self.workers), plans):
            self.record_bad(fetched.bad)
            if augment is not None and not len(fetched.samples):
                raise self._none_left()
            if self.device.type == "cuda":
                fetched.views = [images.pin_memory() for images in fetched.views]
            yield fetched, plan[0].epoch

    def _none_left(self) -> UserError:
        use = "to train on" if self.train else "to score"
        return UserError(f"no image of {self.set.name} {use} can be read: repair or remove them")

    def record_bad(self, bad: dict[int, str]) -> None:
        """Log each bad image once. Raises UserError if there are too many."""
        new = {sample: reason for sample, reason in bad.items() if sample not in self.bad}
        self.bad |= new
        self.tally.add([*new.values()], self.set.name, self.max_bad)
