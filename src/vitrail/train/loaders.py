"""Loaders that evaluate: of one split, and of all splits of a run or a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from vitrail.data.loader import Loader
from vitrail.data.sets import ImageSet
from vitrail.data.tally import Tally
from vitrail.tasks.task import Task


class Loaders(Mapping[str, Loader]):
    """Loaders by the name of their split, each made when it is first needed: it may decode a whole split."""

    def __init__(self, makers: Mapping[str, Callable[[], Loader]]) -> None:
        self.makers, self.made = makers, dict[str, Loader]()

    def __getitem__(self, split: str) -> Loader:
        if split not in self.made:
            self.made[split] = self.makers[split]()
        return self.made[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def evaluation_loader(
    task: Task,
    split: ImageSet,
    device: torch.device,
    workers: int = 0,
    seed: int = 0,
    max_bad: float = 0.01,
    tally: Tally | None = None,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """A loader that reads a split once, in order, as the task prepares images; `tally` as in `Loader`.

    Of several processes, the one number `rank` of `world` reads its share, unless the task needs the whole split.
    """
    return Loader(
        split,
        task.preprocess,
        target=task.encode_target(split.target),
        prepare=task.preparation(train=False),
        batch_size=256,
        seed=seed,
        train=False,
        device=device,
        workers=workers,
        max_bad=max_bad,
        tally=tally,
        rank=0 if task.whole_split else rank,
        world=1 if task.whole_split else world,
    )
