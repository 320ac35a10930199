"""Attention matrices of other encoders against products by hand: windows, positions, shared keys, compiled models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checked import checked
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitrail
from vitrail.errors import UserError
from vitrail.explain.attention import attention_maps
from vitrail.explain.trace import encoder_of, image_tokens, trace
from vitrail.variants.attention import VariantAttention
from vitrail.vit import Attention


def mixed_by_hand(layer: Attention, weights: Tensor, x: Tensor) -> Tensor:
    """What an attention gives for tokens [B, T, D] if A is `weights`: equations 7 and 8."""
    _, _, v = layer.project(x)
    heads = (weights @ v).transpose(1, 2).flatten(2)
    return layer.out(layer.norm(heads) if isinstance(layer, VariantAttention) else heads)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"registers": 3, "distillation": True, "pool": "distilled"},
    "rotary": {"rotary": "axial", "positions": "none", "registers": 1},
    "tables": {"relative": "table"},
    "shared table": {"relative": "shared", "positions": "none"},
    "shared keys": {"kv_heads": (2, 2, 4, 1)},
    "norms": {"qk_norm": True, "attention_norm": True},
    "parallel": {"arrangement": "parallel"},
    "joint": {"arrangement": "joint"},
    "post": {"arrangement": "post"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_the_matrix_gives_what_the_layer_gives(changes: dict[str, Any]) -> None:
    """A with the values is the output of the fused attention, so A is what the layer used."""
    task = vitrail.create("nano/2", classes=2, image_size=(8, 12), **changes).eval()
    encoder, given = encoder_of(task), list[tuple[Attention, Tensor]]()
    layers = [module for module in encoder.blocks.modules() if isinstance(module, Attention)]
    for layer in layers:
        if isinstance(layer, VariantAttention) and layer.relative is not None:
            nn.init.normal_(next(layer.relative.parameters()))  # a new table is 0
        layer.register_forward_hook(lambda layer, _, output: given.append((layer, output)))
    found = trace(task, torch.randn(2, 3, 8, 12))
    assert [layer for layer, _ in given] == layers == [layer.attention for layer in found.layers]
    for own, weights, (layer, output) in zip(found.layers, found.maps, given, strict=True):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        torch.testing.assert_close(mixed_by_hand(layer, weights, own.tokens), output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_windows_are_blocks_of_the_whole_matrix() -> None:
    """Windows of 2 x 2 on 3 x 5 patches: padded, and the padding's share of a row is missing."""
    changes: dict[str, Any] = {"window": 2, "global_blocks": (1,), "class_token": False, "pool": "average"}
    task = vitrail.create("nano/2", classes=2, image_size=(6, 10), **changes).eval()
    found = trace(task, torch.randn(2, 3, 6, 10))
    layer = found.layers[0]
    attention = checked(VariantAttention, layer.attention)
    weights, x = found.maps[0], layer.tokens
    q, k, _ = attention.project(x)
    _, padding, _ = attention.project(torch.zeros(1, 1, x.shape[2]))
    expected = torch.zeros(2, 4, 15, 15)
    for i in range(15):
        row, column = divmod(i, 5)
        places = [(row // 2 * 2 + a, column // 2 * 2 + b) for a in (0, 1) for b in (0, 1)]
        inside = [place[0] * 5 + place[1] if place[0] < 3 and place[1] < 5 else None for place in places]
        for image in range(2):
            for head in range(4):
                keys = [padding[0, head, 0] if j is None else k[image, head, j] for j in inside]
                scores = [math.exp(float(q[image, head, i] @ key) / math.sqrt(len(key))) for key in keys]
                for j, score in zip(inside, scores, strict=True):
                    if j is not None:
                        expected[image, head, i, j] = score / sum(scores)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.maps[1].sum(-1), torch.ones(2, 4, 15))  # a global block
    assert not found.maps[1].eq(0).any()


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_maps_do_not_depend_on_the_kind_of_fused_attention(backend: SDPBackend) -> None:
    task, images = vitrail.create("nano/2", classes=2).eval(), torch.randn(1, 3, 8, 8)
    expected = attention_maps(task, images)
    with sdpa_kernel(backend):
        found = attention_maps(task, images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["in place", "wrapped", "blocks", "whole"])
def test_compiled_models(how: str) -> None:
    """Compiled code does not call hooks that come later; explain runs the model's own code."""
    task, images = vitrail.create("nano/2", classes=2).eval(), torch.randn(1, 3, 8, 8)
    expected = attention_maps(task, images)
    wanted: Any = task
    if how == "in place":
        task.encoder.compile(backend="eager")
    elif how == "wrapped":
        task.encoder = torch.compile(task.encoder, backend="eager")
    elif how == "blocks":
        for block in task.encoder.blocks:
            block.compile(backend="eager")
    else:
        wanted = torch.compile(task, backend="eager")
    with torch.no_grad():
        before = wanted(images)
    torch.testing.assert_close(attention_maps(wanted, images), expected)
    with torch.no_grad():
        torch.testing.assert_close(wanted(images), before)


def test_hidden_states_are_those_after_each_block() -> None:
    task, images = vitrail.create("nano/2", classes=2, registers=1), torch.randn(2, 3, 8, 8)
    found, encoder = trace(task, images), encoder_of(task.eval())
    with torch.no_grad():
        x, grid = encoder.embed(images)
        assert found.grid == grid == (4, 4)
        for block, hidden in zip(encoder.blocks, found.hidden, strict=True):
            x = block(x)
            torch.testing.assert_close(hidden, x)


def test_attention_without_one_matrix_is_refused() -> None:
    task = vitrail.create("nano/2", classes=2, differential=True)
    with pytest.raises(UserError, match="differential attention has two matrices"):
        attention_maps(task, torch.randn(1, 3, 8, 8))


def test_matrices_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task, images = vitrail.create("nano/2", classes=2).eval(), torch.randn(1, 3, 8, 8)
    monkeypatch.setattr("vitrail.explain.trace.LAYER_BYTES", 4 * 4 * 17**2 - 1)
    with pytest.raises(UserError, match=r"1 x 4 heads of 17 x 17 tokens.*smaller image size"):
        trace(task, images).maps[0]
    monkeypatch.setattr("vitrail.explain.trace.LAYER_BYTES", 4 * 4 * 17**2)
    assert trace(task, images).maps[0].shape == (1, 4, 17, 17)
    monkeypatch.setattr("vitrail.explain.attention.MAPS_BYTES", 4 * 4 * 4 * 17**2 - 1)
    with pytest.raises(UserError, match="read one layer at a time"):
        attention_maps(task, images)


def test_tokens_of_an_export_are_refused_and_of_other_encoders_are_given() -> None:
    from vitrail.baselines import CNNConfig
    from vitrail.data.preprocess import Preprocess
    from vitrail.tasks.embed import Embed
    from vitrail.tasks.encoder import encoder_for

    task = Embed(encoder_for(CNNConfig(channels=3, image_size=(8, 12))), Preprocess(size=(8, 12)))
    tokens = image_tokens(task, torch.randn(1, 3, 8, 12))
    assert tokens.patches.shape[1] == math.prod(tokens.grid)
