"""Draws look uniform and independent, and depend on nothing but their numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitrail.data.random import seed_for, uniform
from vitrail.train.device import ready_to_compile

numbers = st.integers(-(2**62), 2**62)


def test_uniform() -> None:
    values = uniform(seed_for(0, 0, 0), torch.arange(20_000), 8)
    assert values.dtype == torch.float32 and values.shape == (20_000, 8)
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 50, 0, 1)
    expected = values.numel() / 50
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert 20 < chi < 90  # 49 degrees of freedom: mean 49, standard deviation 10


def test_neighbours_are_unrelated() -> None:
    many = torch.arange(50_000)
    reference = uniform(seed_for(3, 5, 0), many, 2)
    others = {
        "next draw": reference[:, 1],
        "next sample": uniform(seed_for(3, 5, 0), many + 1, 1)[:, 0],
        "next epoch": uniform(seed_for(3, 6, 0), many, 1)[:, 0],
        "next seed": uniform(seed_for(4, 5, 0), many, 1)[:, 0],
        "next stream": uniform(seed_for(3, 5, 1), many, 1)[:, 0],
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([reference[:, 0], other]))[0, 1]
        assert abs(float(correlation)) < 0.02, name


@given(st.lists(numbers, min_size=1, max_size=9), numbers, st.integers(0, 10**6), st.integers(0, 9))
def test_an_image_draws_the_same_in_any_batch(samples: list[int], seed: int, epoch: int, stream: int) -> None:
    together = uniform(seed_for(seed, epoch, stream), torch.tensor(samples), 5)
    for i, sample in enumerate(samples):
        alone = uniform(seed_for(seed, epoch, stream), torch.tensor([sample]), 3)
        assert torch.equal(alone[0], together[i, :3])


def test_seeds_differ_and_stay() -> None:
    assert len({seed_for(a, b) for a in range(40) for b in range(40)}) == 1600
    assert seed_for(1, 23) != seed_for(12, 3)
    assert 0 <= seed_for(-1) < 2**63
    # A run that is resumed with a later version must find the same draws.
    assert seed_for(0, 1) == 2024819301478721300
    assert (uniform(seed_for(0, 0, 0), torch.tensor([0]), 2) * 2**24).tolist() == [[9011518, 16332413]]


@pytest.mark.slow
def test_compiled_draws_are_the_same() -> None:
    def draw(key: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        numbers = uniform(key, samples, 67)
        return numbers, numbers[:, 33] + 1

    ready_to_compile(torch.device("cpu"))
    key, samples = torch.tensor(seed_for(1, 2, 3)), torch.arange(100, 164)
    torch._dynamo.reset()
    found = torch.compile(draw, dynamic=False)(key, samples)
    assert all(torch.equal(a, b) for a, b in zip(found, draw(key, samples), strict=True))
