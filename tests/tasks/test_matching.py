"""How well pictures and captions find each other, against ranks counted one by one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.tasks.matching import Recall
from vitrail.tasks.task import Prediction

CAPTIONS = [["a", "b", "c"], ["d"], ["e", "f"], ["g", "h"], ["i"], ["j", "k", "l", "m"]]


def vectors(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=1)


TEXTS = dict(zip("abcdefghijklm", vectors(13, 1), strict=True))
NEAR = torch.stack([torch.stack([TEXTS[caption] for caption in own]).mean(dim=0) for own in CAPTIONS])
PICTURES = F.normalize(NEAR + vectors(6, 2), dim=1)


def recall(
    pictures: Tensor = PICTURES, texts: dict[str, Tensor] = TEXTS, samples: tuple[int, ...] = (*range(6),)
) -> Recall:
    made = Recall(lambda captions: torch.stack([texts[caption] for caption in captions]))
    update(made, pictures, samples)
    return made


def update(metric: Recall, pictures: Tensor, samples: tuple[int, ...]) -> None:
    batch = {"sample": torch.tensor(samples), "captions": [CAPTIONS[i] for i in samples]}
    metric.update(batch, [Prediction(embedding=pictures[i].tolist()) for i in samples])


@pytest.mark.parametrize("rows", [2, 1000])
def test_recall_is_what_sorting_gives(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recall, "ROWS", rows)
    found = recall().compute()
    every = [(text, i) for i, own in enumerate(CAPTIONS) for text in own]
    for n in (1, 5, 10):
        right = 0
        for i, picture in enumerate(PICTURES):
            best = sorted(every, key=lambda each: -float(TEXTS[each[0]] @ picture))[:n]
            right += any(owner == i for _, owner in best)
        assert found[f"recall{n}"] == pytest.approx(right / len(PICTURES))
        hits = sum(
            owner in sorted(range(6), key=lambda i: -float(TEXTS[text] @ PICTURES[i]))[:n] for text, owner in every
        )
        assert found[f"search{n}"] == pytest.approx(hits / len(every))
    assert found["count"] == 6 and 0 < found["recall1"] < found["recall5"]


def test_recall_in_parts_is_that_of_the_whole() -> None:
    one, two = recall(samples=(4, 0, 2)), recall(samples=(5, 1, 3, 4))  # a sample in both counts once
    update(one, PICTURES, (0,))
    one.merge(two.state())
    assert one.compute() == recall().compute()


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_what_cannot_tell_pictures_apart_finds_nothing(value: float) -> None:
    same = torch.full((6, 3), value)
    scores = recall(same, dict.fromkeys(TEXTS, same[0])).compute()
    assert scores["recall1"] == scores["search1"] == 0
