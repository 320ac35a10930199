"""Attention maps against a naive attention, and what follows from them against explicit products."""

from __future__ import annotations

import math

import pytest
import torch
from checked import checked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vitrail
from vitrail.errors import UserError
from vitrail.explain.attention import attention_distance, attention_maps, per_head, rollout
from vitrail.explain.trace import encoder_of
from vitrail.variants.blocks import PreNormBlock
from vitrail.vit import Attention


def naive(x: Tensor, attention: Attention) -> Tensor:
    """Equation 6, one head and one image at a time."""
    width = x.shape[-1]
    size = width // attention.heads
    q, k = (x @ attention.qkv.weight[i : i + width].T + attention.qkv.bias[i : i + width] for i in (0, width))
    maps = []
    for image in range(len(x)):
        for head in range(attention.heads):
            columns = slice(head * size, (head + 1) * size)
            scores = torch.exp(q[image, :, columns] @ k[image, :, columns].T / math.sqrt(size))
            maps.append(scores / scores.sum(1, keepdim=True))
    return torch.stack(maps).unflatten(0, (len(x), attention.heads))


def random_maps(seed: int, layers: int = 3, tokens: int = 7) -> Tensor:
    return torch.randn(layers, 2, 4, tokens, tokens, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.mark.parametrize("height, width", [(8, 8), (6, 10)])
def test_maps_equal_a_naive_attention(height: int, width: int) -> None:
    task = vitrail.create("nano/2", classes=3, registers=2, stem=(8,)).eval()
    images = torch.randn(2, 3, height, width)
    maps = attention_maps(task, images)
    tokens = 3 + height * width // 4
    assert maps.shape == (4, 2, 4, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(4, 2, 4, tokens))
    with torch.no_grad():
        encoder = encoder_of(task)
        x, _ = encoder.embed(images)
        for layer, block in zip(maps, encoder.blocks, strict=True):
            assert isinstance(block, PreNormBlock)
            torch.testing.assert_close(layer, naive(block.norm1(x), checked(Attention, block.attention)))
            x = block(x)


def test_the_model_is_left_as_it_was() -> None:
    task = vitrail.create("nano/2", classes=3, stem=(8,), drop_path=0.5, dropout=0.5).train()
    task.get_submodule("encoder.blocks.1").eval()
    modes = [module.training for module in task.modules()]
    state = {name: value.clone() for name, value in task.state_dict().items()}
    images = torch.randn(2, 3, 8, 8)
    first, second = attention_maps(task, images), attention_maps(task, images)
    assert torch.equal(first, second), "dropout must be off"
    assert [module.training for module in task.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())
    assert not any(module._forward_pre_hooks for module in task.modules())
    with pytest.raises(ValueError, match="do not divide"):
        attention_maps(task, torch.randn(1, 3, 7, 8))
    assert not any(module._forward_pre_hooks for module in task.modules())
    assert [module.training for module in task.modules()] == modes


def test_half_precision_models_give_float32_maps() -> None:
    maps = attention_maps(vitrail.create("nano/2", classes=3).to(torch.bfloat16), torch.randn(1, 3, 8, 8))
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]), atol=0.02, rtol=0)


def test_a_model_that_is_no_vit_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, 4, 3)

    with pytest.raises(UserError, match="Conv2d"):
        attention_maps(Net(), torch.randn(1, 3, 8, 8))
    with pytest.raises(UserError, match="Linear"):
        attention_maps(nn.Linear(2, 2), torch.randn(1, 3, 8, 8))


@given(seed=st.integers(0, 10**6), prefix=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_rollout_equals_the_product_of_all_layers(seed: int, prefix: int) -> None:
    maps = random_maps(seed)
    product = torch.eye(7).expand(2, 7, 7)
    for layer in maps:
        mixed = (layer.mean(1) + torch.eye(7)) / 2
        product = mixed @ product
    torch.testing.assert_close(rollout(maps, prefix), product[:, 0, prefix:])
    torch.testing.assert_close(rollout(maps, prefix, "average"), product[:, prefix:, prefix:].mean(1))


@pytest.mark.parametrize("pool, prefix", [("token", 1), ("average", 0), ("average", 2)])
def test_rollout_of_even_attention_is_even(pool: str, prefix: int) -> None:
    heat = rollout(torch.full((3, 1, 2, 9, 9), 1 / 9), prefix, pool)  # type: ignore[arg-type]
    assert heat.shape == (1, 9 - prefix)
    torch.testing.assert_close(heat, heat.mean().expand_as(heat))


def test_rollout_follows_one_path() -> None:
    """The class token looks at patch 2 in the last layer, which looks at patch 0 in the first."""
    first, last = torch.eye(4), torch.eye(4)
    first[3] = torch.tensor([0, 1.0, 0, 0])
    last[0] = torch.tensor([0, 0, 0, 1.0])
    heat = rollout(torch.stack([first, last])[:, None, None], 1)
    assert heat.tolist() == [[0.25, 0, 0.25]]


def test_without_a_prefix_there_is_no_class_token() -> None:
    with pytest.raises(ValueError, match="average"):
        rollout(random_maps(0), 0)


def test_per_head_reads_the_rows_of_the_pooling() -> None:
    maps = random_maps(1)
    assert torch.equal(per_head(maps, 2), maps[-1][:, :, 0, 2:])
    torch.testing.assert_close(per_head(maps, 2, "average", layer=0), maps[0][:, :, 2:, 2:].mean(2))


def test_distance_of_identity_and_of_one_step() -> None:
    grid = (2, 3)
    identity = torch.eye(7).expand(2, 1, 4, 7, 7)
    assert attention_distance(identity, grid, 16).eq(0).all()
    # Every patch looks at its right or left neighbour, and half of it at the class token, which has no place.
    step = torch.zeros(7, 7)
    for row in (0, 3):
        for a, b in ((0, 1), (1, 2), (2, 1)):
            step[1 + row + a, 1 + row + b] = 0.5
    step[:, 0] = 0.5
    distance = attention_distance(step.expand(3, 2, 4, 7, 7), grid, 16)
    assert distance.shape == (3, 4)
    torch.testing.assert_close(distance, torch.full((3, 4), 16.0))


def test_distance_of_a_head_that_sees_only_the_class_token() -> None:
    blind = torch.zeros(1, 1, 1, 5, 5)
    blind[..., 0] = 1
    assert attention_distance(blind, (2, 2), 4).tolist() == [[0.0]]
