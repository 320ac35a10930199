"""The components of variants, each against its definition; whole models with them are in tests/zoo."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.errors import UserError
from vitrail.ops import RESAMPLINGS, attend, resize_positions, sine_positions
from vitrail.variants import VariantConfig, VariantViT, resize
from vitrail.variants.attention import Differential, VariantAttention
from vitrail.variants.mlp import GatedMLP
from vitrail.variants.place import Place, locate
from vitrail.variants.pooling import Neck, pooled
from vitrail.variants.relative import RelativeTable, relative_index, resize_table
from vitrail.variants.rotary import Rotary
from vitrail.variants.windows import in_windows
from vitrail.vit import attention_weights

SMALL = VariantConfig(width=8, depth=1, heads=2, patch=4, image_size=(8, 8))
GRIDS = st.tuples(st.integers(2, 6), st.integers(2, 6))


@settings(max_examples=30, deadline=None)
@given(old=GRIDS, new=GRIDS, how=st.sampled_from([*RESAMPLINGS, "offset"]), prefix=st.integers(0, 2))
def test_even_positions_stay_even_and_prefixes_stay(
    old: tuple[int, int], new: tuple[int, int], how: str, prefix: int
) -> None:
    positions = torch.cat([torch.arange(prefix).float()[:, None] + 5, torch.full((old[0] * old[1], 1), 2.0)])[None]
    found = resize_positions(positions, old, new, prefix, how)
    assert found.shape == (1, prefix + new[0] * new[1], 1)
    torch.testing.assert_close(found[:, :prefix], positions[:, :prefix])
    torch.testing.assert_close(found[:, prefix:], torch.full_like(found[:, prefix:], 2.0))


def test_registers_without_a_position_get_zeros_behind_the_class_token() -> None:
    encoder = VariantViT(VariantConfig(width=4, depth=1, heads=1, patch=4, image_size=(4, 8), registers=2))
    assert encoder.positions.shape == (1, 3, 4)
    expected = torch.cat([encoder.positions[:, :1], torch.zeros(1, 2, 4), encoder.positions[:, 1:]], dim=1)
    assert torch.equal(encoder.positions_for((1, 2)), expected)


def test_sine_positions_need_a_width_that_four_divides() -> None:
    assert sine_positions((2, 3), 8).shape == (6, 8)
    with pytest.raises(UserError, match="divisible by 4"):
        sine_positions((2, 3), 6)


@pytest.mark.parametrize("pairs", ["neighbours", "halves"])
def test_rotary_scores_depend_on_how_far_apart_patches_are(pairs: str) -> None:
    variant = VariantConfig(rotary="axial", rotary_pairs=pairs)  # type: ignore[arg-type]
    rotation = Rotary(variant, width=16, heads=2, depth=1)((3, 4), torch.device("cpu"))[0]
    first, second = torch.randn(8), torch.randn(8)
    q, k = first.expand(1, 1, 13, 8), second.expand(1, 1, 13, 8)
    q, k, _ = locate(q, k, None, Place((3, 4), prefix=1, rotation=rotation), None)
    scores = (q @ k.transpose(-2, -1))[0, 0]
    patches = scores[1:, 1:].view(3, 4, 3, 4)
    torch.testing.assert_close(patches[0, 0, 1, 1], patches[1, 2, 2, 3])  # both one down and one to the right
    assert not torch.isclose(patches[0, 0, 1, 1], patches[0, 0, 2, 1])
    assert torch.equal(q[0, 0, 0], first)  # the class token has no place


def test_rotary_positions_want_all_patches() -> None:
    rotation = Rotary(VariantConfig(rotary="axial"), width=16, heads=2, depth=1)((3, 4), torch.device("cpu"))[0]
    with pytest.raises(UserError, match="rotary positions for 12 patches, got 11"):
        rotation.apply(torch.zeros(1, 2, 11, 8), prefix=0)


def test_relative_index_counts_each_distance_once() -> None:
    index = relative_index((2, 3))
    patches = index[1:, 1:]
    assert patches.unique().numel() == 3 * 5  # distances of -1 to 1 rows and -2 to 2 columns
    assert patches.diagonal().unique().numel() == 1
    assert patches[0, 1] == patches[1, 2] == patches[3, 4]  # one to the right
    assert [int(index[0, 1]), int(index[1, 0]), int(index[0, 0])] == [15, 16, 17]


@pytest.mark.parametrize("resampling", ["geometric", "bilinear"])
def test_an_even_table_stays_even_and_keeps_its_class_token(resampling: str) -> None:
    table = torch.cat([torch.full((15, 2), 3.0), torch.arange(6.0).view(3, 2)])
    found = resize_table(table, (2, 3), (4, 4), resampling)
    assert found.shape == (49 + 3, 2)
    torch.testing.assert_close(found[:-3], torch.full((49, 2), 3.0))
    assert torch.equal(found[-3:], table[-3:])
    assert resize_table(table, (2, 3), (2, 3), resampling) is table


def test_a_relative_bias_goes_with_a_mask() -> None:
    relative = RelativeTable((2, 2), heads=2, resampling="geometric")
    relative.table.data.normal_()
    attention = VariantAttention(SMALL)
    attention.relative = relative
    place = Place((2, 2), prefix=1, pairs=relative_index((2, 2)))
    x, mask = torch.randn(1, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    mask[:, 3] = False
    weights = attention.weights(x, mask=mask, place=place)
    assert torch.equal(weights[..., 3], torch.zeros(1, 2, 5))
    _, _, v = attention.project(x)
    expected = attention.out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, mask=mask, place=place), expected)


def test_windows_do_not_see_each_other() -> None:
    attention = VariantAttention(SMALL)
    attention.window = 2
    x = torch.randn(1, 16, 8)
    place = Place((4, 4))
    before = attention(x, place=place).view(4, 4, 8)
    x[0, 0] += 1
    changed = (attention(x, place=place).view(4, 4, 8) != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_an_image_of_one_window_is_attended_to_as_a_whole() -> None:
    attention = VariantAttention(SMALL)
    x = torch.randn(2, 9, 8)
    whole = attention(x)
    attention.window = 3
    torch.testing.assert_close(attention(x, place=Place((3, 3))), whole)


def test_one_window_is_attended_to_like_each_of_several() -> None:
    """Also where the other blocks rotate queries and keys by their places in the whole image."""
    torch.manual_seed(0)
    config = VariantConfig(width=16, depth=1, heads=2, patch=4, image_size=(8, 8), positions="none", rotary="axial")
    model = VariantViT(replace(config, window=2, class_token=False, pool="average")).eval()
    images = torch.randn(1, 3, 8, 8)
    alone, twice = model(images), model(torch.cat([images, images], dim=3))
    torch.testing.assert_close(twice.patches.view(1, 2, 4, 16)[:, :, :2].flatten(1, 2), alone.patches)


def test_windows_that_do_not_divide_the_image_are_filled_up() -> None:
    seen = []

    def attend(windows: Tensor, place: Place) -> Tensor:
        seen.append((tuple(windows.shape), place.grid))
        return windows

    x = torch.randn(2, 15, 4)
    assert torch.equal(in_windows(attend, x, Place((3, 5)), 2), x)
    assert seen == [((2 * 6, 4, 4), (2, 2))]


@pytest.mark.parametrize("kind", ["none", "hidden", "added", "causal"])
def test_attention_of_each_precision_is_the_softmax_of_the_products(kind: str) -> None:
    """Also where a processor trains in bf16, which has its own path: values and gradients, against float64."""
    torch.manual_seed(0)
    q, k, v = values = [torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7)]
    hidden = torch.rand(5, 7) < 0.7
    hidden[:, 0] = True
    masks = {"none": None, "hidden": hidden, "added": torch.randn(3, 5, 7), "causal": torch.ones(5, 7).tril().bool()}
    mask = masks[kind]
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / 8**0.5
    if mask is not None:
        scores = scores + mask if kind == "added" else scores.masked_fill(~mask, -torch.inf)
    q64, k64, v64 = tensors = [value.clone().requires_grad_() for value in values]
    expected = torch.einsum("bhnm,bhmd->bhnd", attention_weights(q64, k64, mask), v64)
    torch.testing.assert_close(attention_weights(q, k, mask), scores.softmax(dim=-1))
    expected.square().sum().backward()
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        own = q, k, v = [value.to(dtype).requires_grad_() for value in values]
        added = mask.to(dtype) if mask is not None and kind == "added" else mask
        found = attend(q, k, v, None, is_causal=True) if kind == "causal" else attend(q, k, v, added)
        assert found.dtype == dtype
        found.square().sum().backward()
        with torch.no_grad():  # fused whatever the precision
            fused = attend(q, k, v, None, is_causal=True) if kind == "causal" else attend(q, k, v, added)
        for one in (found, fused):
            torch.testing.assert_close(one.double(), expected, rtol=close, atol=close)
        for one, other in zip(own, tensors, strict=True):
            assert one.grad is not None
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=close, atol=3 * close)


def test_queries_and_keys_after_a_norm_have_the_precision_of_the_values() -> None:
    """Autocast computes norms in float32. Their outputs must not leave the fast path of bf16 training on a CPU."""
    q, k, v = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(3))
    low = v.bfloat16()
    assert torch.equal(attend(q, k, low), attend(q.bfloat16(), k.bfloat16(), low))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(attend(q, k, low), attend(q.bfloat16(), k.bfloat16(), low))


def test_a_query_that_may_look_nowhere_learns_nothing() -> None:
    """On every path, and nothing becomes nan."""
    mask = torch.tensor([[True, True, False], [False, False, False]])
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, 2, n, 8, dtype=dtype, requires_grad=True) for n in (2, 3, 3))
        found = attend(q, k, v, mask)
        found.float().square().sum().backward()
        assert q.grad is not None and v.grad is not None
        assert not found[:, :, 1].any() and not q.grad[:, :, 1].any() and v.grad.isfinite().all()


def test_equal_attentions_cancel_but_for_the_share() -> None:
    differential = Differential(8, index=0)
    q, k = (torch.randn(1, 2, 5, 4).repeat(1, 1, 1, 2) for _ in range(2))
    v = torch.randn(1, 2, 5, 8)
    one = torch.nn.functional.scaled_dot_product_attention(q[..., :4], k[..., :4], v)
    expected = differential.norm(one * (1 - differential.share())) * (1 - differential.start)
    torch.testing.assert_close(differential(q, k, v, None), expected)


def test_a_gate_of_zero_lets_nothing_through() -> None:
    mlp = GatedMLP(4, 6, bias=False)
    mlp.up.weight.data[:6] = 0
    assert torch.equal(mlp(torch.randn(2, 3, 4)), torch.zeros(2, 3, 4))


def test_necks_keep_the_grid() -> None:
    assert Neck(8, 4)(torch.randn(2, 8, 3, 5)).shape == (2, 4, 3, 5)


def test_pooling_of_every_kind() -> None:
    prefix, patches = torch.tensor([[[9.0]]]), torch.tensor([[[1.0], [2.0], [6.0]]])
    found = {kind: pooled(prefix, patches, kind, False, None).tolist() for kind in ("average", "max", "average_max")}
    assert found == {"average": [[3.0]], "max": [[6.0]], "average_max": [[4.5]]}
    assert pooled(prefix, patches, "average", True, None).tolist() == [[4.5]]
    assert pooled(prefix, patches, "token_average", False, None).tolist() == [[9.0, 3.0]]


SIZES = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "image_size": (8, 8)}
PATCHES = {"class_token": False, "pool": "average"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 2}, "windowed attention is for patches only"),
        ({"relative": "table", "registers": 1}, "relative tables need a class token"),
        ({"kv_heads": (1,)}, "a number for each of 2 blocks"),
        ({"distillation": True, "class_token": False, "pool": "average"}, "distillation token"),
        ({"pool": "distilled"}, "distillation token"),
        ({"norm": "rsm"}, "no norm 'rsm': choose from layer, rms"),
        ({"rotary": "centered"}, "no rotary 'centered': choose from none, axial, centred, mixed"),
        ({"resizing": "linear"}, "no resizing 'linear'"),
        ({"positions": "learnt"}, "no positions 'learnt': choose from learned, sine, none"),
        ({"window": 2, "global_blocks": (2,), **PATCHES}, "global_blocks names block 2, and the model's are 0 to 1"),
        ({"window": -1, **PATCHES}, "window must be at least 0"),
        ({"relative": "decomposed"}, "decomposed relative positions are for patches only"),
        ({"kv_heads": (2, 4)}, "2 query heads cannot share 4 key heads equally"),
        ({"kv_heads": (2, 0)}, "2 query heads cannot share 0 key heads equally"),
        ({"differential": True, "width": 6}, "differential attention halves a head's 3 channels"),
        ({"neck": 8}, "a neck gives patches only, and pool='token' reads the class token"),
        ({"neck": 0, **PATCHES}, "neck must be at least 1"),
        ({"norm_pooled": True, "pool": "token_average"}, "norm_pooled is a norm of one token's width"),
        ({"pool": "attention", "pool_heads": 3}, "tokens of width 16 do not divide into 3 heads"),
        ({"pool": "attention", "pool_hidden": -1}, "pool_hidden must be at least 1"),
        ({"stem": (8,), "backbone": "resnet"}, "stem and backbone both come before the patches"),
        ({"backbone": "conv"}, "backbone='conv' needs backbone_layers"),
    ],
)
def test_changes_that_do_not_go_together_are_refused_in_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        VariantConfig(**{**SIZES, **changes})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_windows_refuse_a_mask_that_they_would_not_apply() -> None:
    attention = VariantAttention(SMALL)
    attention.window = 2
    with pytest.raises(UserError, match="attention in windows takes no mask"):
        attention(torch.randn(1, 16, 8), mask=torch.ones(16, 16, dtype=torch.bool), place=Place((4, 4)))


def test_a_model_can_be_made_for_another_size_in_another_way_than_it_runs() -> None:
    """timm's FlexiViT: bilinear where weights are loaded, as all others where sizes change from image to image."""
    config = VariantConfig(width=16, depth=1, heads=2, patch=4, image_size=(16, 16), resizing="bilinear")
    encoder = VariantViT(config)
    moving = encoder.positions_for((3, 5))
    expected = resize_positions(encoder.positions, (4, 4), (3, 5), 1, "bilinear")
    resize(encoder, (12, 20))
    assert torch.equal(encoder.positions, expected)
    assert not torch.allclose(moving, expected)


def test_weights_that_are_interpolated_for_another_size_are_contiguous() -> None:
    """FSDP2 shares out no others."""
    config = VariantConfig(
        width=16,
        depth=1,
        heads=2,
        patch=4,
        image_size=(16, 16),
        relative="decomposed",
        class_token=False,
        pool="average",
    )
    encoder = VariantViT(config)
    resize(encoder, (12, 20))
    assert all(parameter.is_contiguous() for parameter in encoder.parameters())
