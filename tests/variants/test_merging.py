"""Token merging against a reference in plain loops, and by what must not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.errors import UserError
from vitrail.variants import VariantConfig, VariantViT
from vitrail.variants.attention import MergingAttention, VariantAttention
from vitrail.variants.blocks import MergingBlock, PreNormBlock, block_for
from vitrail.variants.merging import Groups, merge, unmerge
from vitrail.vit import ViT, ViTConfig

SMALL = VariantConfig(width=8, depth=3, heads=2, patch=4, image_size=(12, 20))
"""15 patches, an odd number"""


def filled(config: ViTConfig, seed: int = 0) -> VariantViT:
    """An encoder without zeros: class token, positions and biases count."""
    torch.manual_seed(seed)
    encoder = VariantViT(config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


def reference(x: Tensor, keys: Tensor, sizes: list[int], prefix: int, count: int) -> tuple[Tensor, list[list[int]]]:
    """One image's tokens [T, D] with keys [heads, T, d]: the merged ones, and which of the T each is made of."""
    mean = keys.mean(dim=0)
    first, second = range(prefix, len(x), 2), range(prefix + 1, len(x), 2)
    pairs = []
    for i in first:
        similar = [float(F.cosine_similarity(mean[i], mean[j], dim=0)) for j in second]
        if similar:
            pairs.append((max(similar), i, second[similar.index(max(similar))]))
    chosen = sorted(pairs, reverse=True)[: min(count, (len(x) - prefix) // 2)]
    into = {i: j for _, i, j in chosen}
    groups = [[t, *(i for i in into if into[i] == t)] for t in range(len(x)) if t not in into]
    merged = [
        sum((sizes[t] * x[t] for t in group), torch.zeros_like(x[0])) / sum(sizes[t] for t in group) for group in groups
    ]
    return torch.stack(merged), groups


@settings(max_examples=40, deadline=None)
@given(
    patches=st.integers(1, 13),
    prefix=st.integers(0, 3),
    count=st.integers(0, 20),
    heads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_merging_twice_equals_the_plain_reference(patches: int, prefix: int, count: int, heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + patches
    x = torch.randn(2, tokens, 4, generator=generator, dtype=torch.float64)
    found, groups = x, None
    expected, made_of = list(x), [[[t] for t in range(tokens)] for _ in x]
    for _ in range(2):
        keys = torch.randn(2, heads, found.shape[1], 3, generator=generator, dtype=torch.float64)
        found, groups = merge(found, keys, groups, prefix, count)
        for b in range(2):
            sizes = [len(group) for group in made_of[b]]
            expected[b], joined = reference(expected[b], keys[b], sizes, prefix, count)
            made_of[b] = [[token for t in group for token in made_of[b][t]] for group in joined]
        torch.testing.assert_close(found, torch.stack(expected))
    if groups is None:
        assert count == 0 or patches == 1
        return
    assert groups.size.tolist() == [[len(group) for group in each] for each in made_of]
    assert groups.size.sum(dim=1).tolist() == [tokens, tokens]
    for b in range(2):
        for place, group in enumerate(made_of[b]):
            assert all(groups.place[b, t] == place for t in group)
            # A merged token is the mean of its original ones, however they came together.
            torch.testing.assert_close(found[b, place], x[b, group].mean(dim=0))
    assert torch.equal(groups.place[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert groups.size[:, :prefix].eq(1).all()
    whole = unmerge(found, groups)
    assert whole.shape == x.shape
    torch.testing.assert_close(whole.mean(dim=1), x.mean(dim=1))  # so the average pooling needs no sizes


def test_at_most_half_of_the_patches_merge_in_a_block() -> None:
    x, groups = torch.randn(1, 10, 4), None  # a class token and nine patches
    left = []
    for _ in range(5):
        x, groups = merge(x, torch.randn(1, 2, x.shape[1], 2), groups, 1, 100)
        left.append(x.shape[1] - 1)
    assert left == [5, 3, 2, 1, 1]


def test_merging_has_right_gradients() -> None:
    """By finite differences, through two merges, in attention with sizes and in the whole encoder."""
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 7, 3, dtype=torch.float64), torch.randn(2, 2, 5, 3, dtype=torch.float64)

    def twice(x: Tensor) -> Tensor:
        x, groups = merge(x, keys[0], None, 1, 2)
        x, groups = merge(x, keys[1], groups, 1, 2)
        return unmerge(x, groups)

    assert torch.autograd.gradcheck(twice, torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True))
    encoder = filled(replace(SMALL, width=4, merge=(2,), image_size=(8, 12))).double()
    images = torch.randn(1, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: encoder.pool(encoder(x)), images)


def test_the_choice_of_tokens_has_no_gradient() -> None:
    x, keys = torch.randn(1, 6, 4, requires_grad=True), torch.randn(1, 2, 6, 2, requires_grad=True)
    found, _ = merge(x, keys, None, 0, 2)
    found.square().sum().backward()
    assert x.grad is not None and keys.grad is None


def test_attention_with_sizes_equals_attention_to_copies() -> None:
    """Proportional attention: a token of size 3 counts as three equal ones (equation 1)."""
    torch.manual_seed(0)
    config = replace(SMALL, merge=(1,), qk_norm=True)
    attention = MergingAttention(config)
    plain = VariantAttention(replace(config, merge=()))
    plain.load_state_dict(attention.state_dict())
    x, size = torch.randn(2, 4, 8), torch.tensor([[1, 3, 2, 1], [1, 1, 1, 4]])
    found, keys = attention(x, size)
    assert keys.shape == (2, 2, 4, 4)
    for b in range(2):
        copies = x[b].repeat_interleave(size[b], dim=0)
        expected = plain(copies[None])[0]
        torch.testing.assert_close(found[b].repeat_interleave(size[b], dim=0), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "average", "class_token": False},
        {"pool": "attention"},
        {"registers": 2, "pool": "max"},
        {"distillation": True, "pool": "distilled"},
        {"kv_heads": (1, 1, 2), "norm_pooled": True, "layer_scale": 0.5},
        {"differential": True, "pool": "average_max", "pool_prefix": True},
    ],
)
def test_merging_equal_tokens_changes_nothing(changes: dict[str, Any]) -> None:
    """With a copy beside each patch, the model that merges the copies gives what the plain one gives."""
    config = replace(SMALL, positions="none", image_size=(8, 32), **changes)
    encoder = filled(replace(config, merge=(8, 0, 0)))
    plain = VariantViT(config).eval()
    plain.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 2, 4, 4, 4).repeat_interleave(2, dim=3)  # [B, 3, h, w, 4, 4]
    images = images.transpose(3, 4).reshape(2, 3, 8, 32)
    found, expected = encoder(images), plain(images)
    torch.testing.assert_close(found.patches, expected.patches, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.pool(found), plain.pool(expected), rtol=1e-4, atol=1e-4)


def test_without_merging_the_bits_are_the_plain_models() -> None:
    assert VariantConfig(merge=(0, 0), depth=2, width=8, heads=2) == VariantConfig(depth=2, width=8, heads=2)
    none = filled(replace(SMALL, merge=(0,)))
    plain = ViT(ViTConfig(width=8, depth=3, heads=2, patch=4, image_size=(12, 20))).eval()
    plain.load_state_dict(none.state_dict())
    images = torch.randn(2, 3, 12, 20)
    assert torch.equal(none(images).patches, plain(images).patches)
    block = block_for(replace(SMALL, merge=(0, 3, 0)), 0)
    same = block_for(SMALL, 0)
    assert isinstance(block, MergingBlock) and type(same) is PreNormBlock
    same.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 8)
    found, groups = block(x, None, 1)
    assert groups is None and torch.equal(found, same(x))


def test_every_patch_has_its_token_again_after_the_blocks() -> None:
    encoder = filled(replace(SMALL, merge=(3, 2, 0)))
    images = torch.randn(2, 3, 12, 20)
    x, grid = encoder.embed(images)
    x, states = encoder.encode(x, grid, layers=(0, 2))
    assert [tuple(state.shape) for state in (x, *states)] == [(2, 16, 8)] * 3
    assert torch.equal(x, states[1])
    assert [len(state[0].unique(dim=0)) for state in states] == [13, 11]
    tokens = encoder(images)
    assert tokens.prefix.shape == (2, 1, 8) and tokens.patches.shape == (2, 15, 8) and tokens.grid == (3, 5)
    # Tokens that a task adds after the prefix, as segmentation does with its queries, do not merge.
    x, grid = encoder.embed(images)
    queries = torch.zeros(2, 4, 8)
    x, _ = encoder.encode(torch.cat([x[:, :1], queries, x[:, 1:]], dim=1), grid, blocks=slice(0, 1))
    assert x.shape == (2, 20, 8) and len(x[0, 5:].unique(dim=0)) == 12


def test_an_image_merges_alike_alone_and_in_a_batch_and_of_another_size() -> None:
    encoder = filled(replace(SMALL, merge=(4,)))
    images = torch.randn(3, 3, 12, 20)
    torch.testing.assert_close(encoder(images).patches[1:2], encoder(images[1:2]).patches)
    assert encoder(torch.randn(1, 3, 8, 8)).patches.shape == (1, 4, 8)


def test_training_with_merging_skips_branches_and_gives_every_weight_a_gradient() -> None:
    encoder = filled(replace(SMALL, merge=(2,), drop_path=0.5, image_size=(8, 12))).train()
    images = torch.randn(4, 3, 8, 12)
    keep = torch.tensor([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]]).expand(4, 3, 2)
    torch.testing.assert_close(encoder(images, keep).prefix, encoder(images, keep).prefix)
    assert not torch.equal(encoder(images).prefix, encoder(images).prefix)  # drawn anew without `keep`
    with torch.autocast("cpu", torch.bfloat16):
        encoder.pool(encoder(images, keep)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_sizes_stay_whole_numbers_in_half_precision() -> None:
    """bf16 cannot count beyond 256."""
    x = torch.randn(1, 600, 2, dtype=torch.bfloat16)
    groups: Groups | None = None
    for _ in range(9):
        x, groups = merge(x, torch.ones(1, 1, x.shape[1], 2), groups, 0, 300)
    assert groups is not None and groups.size.dtype == torch.int64 and int(groups.size.sum()) == 600
    assert int(groups.size.max()) > 256


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rotary": "axial"}, "since its rotary positions turn each patch by its own place"),
        ({"relative": "table"}, "since its relative position biases are for pairs of patches"),
        ({"window": 2, "class_token": False, "pool": "average"}, "since its windows hold a square of patches"),
        ({"arrangement": "joint"}, "since its blocks have the arrangement joint, and not pre"),
        ({"arrangement": "post"}, "since its blocks have the arrangement post"),
        ({"merge": (1, 2)}, "merge needs one number for all blocks, or one for each of 3: got 2"),
        ({"merge": (-1,)}, "merge must be at least 0"),
        ({"merge": (1.5,)}, "merge must be whole numbers"),
    ],
)
def test_what_cannot_merge_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **{"merge": (2,), **changes})
