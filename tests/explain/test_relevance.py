"""Relevance against explicit matrices and their gradients, for every task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checked import checked
from task_examples import EXAMPLES, batch_for
from torch import Tensor, nn

from vitrail.data.preprocess import Preprocess
from vitrail.explain.relevance import relevance
from vitrail.explain.trace import encoder_of
from vitrail.tasks.classify import Classify
from vitrail.vit import Block, Head, Tokens, ViT, ViTConfig


def by_hand(task: Any, images: Tensor, number: int, rows: str) -> Tensor:
    """Relevance of class `number` from explicit attention in every layer, whose matrices get their own gradients."""
    encoder: ViT = task.encoder
    x, grid = encoder.embed(images)
    matrices = []
    for block in encoder.blocks:
        assert isinstance(block, Block)
        y = block.norm1(x)
        q, k, v = block.attention.project(y)
        a = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1)
        a.retain_grad()
        matrices.append(a)
        x = x + block.attention.out((a @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    final = encoder.norm(x)
    final.retain_grad()
    prefix = encoder.config.prefix_tokens
    task.head(encoder.pool(Tokens(final[:, :prefix], final[:, prefix:], grid)))[:, number].sum().backward()
    relevance = torch.eye(x.shape[1]).expand(len(images), -1, -1)
    for a in matrices:
        assert a.grad is not None
        positive = (a * a.grad).clamp(min=0).mean(1)
        sums = positive.sum(-1, keepdim=True)
        relevance = relevance + torch.where(sums > 0, positive / sums, 0) @ relevance
    if rows == "token":
        return relevance[:, 0, prefix:].detach()
    assert final.grad is not None
    weights = (final * final.grad).sum(-1).clamp(min=0)
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights[:, None] @ relevance)[:, 0, prefix:].detach()


@pytest.mark.parametrize("pool", ["token", "average"])
def test_relevance_equals_that_of_explicit_matrices(pool: str) -> None:
    task = _classifier(pool)
    images = torch.randn(2, 3, 8, 8)
    found = relevance(task, {"image": images}, [2, 0])
    assert found.shape == (2, 2, 16)
    for place, number in enumerate((2, 0)):
        torch.testing.assert_close(found[:, place], by_hand(task, images, number, pool), atol=1e-5, rtol=1e-4)
    best = task(images).argmax(1)
    own = relevance(task, {"image": images})
    for image in range(2):
        one = relevance(task, {"image": images[image : image + 1]}, [int(best[image])])
        torch.testing.assert_close(own[image], one[0, 0], atol=1e-5, rtol=1e-4)


def _classifier(pool: str) -> Any:
    torch.manual_seed(0)
    config = ViTConfig(width=16, depth=3, heads=2, patch=2, image_size=(8, 8), pool=pool)
    task = Classify(ViT(config), ["a", "b", "c"], Preprocess(size=(8, 8))).eval()
    nn.init.normal_(checked(Head, task.head).linear.weight)
    return task


def test_classes_have_different_maps_and_weights_get_no_gradient() -> None:
    task, images = _classifier("token"), torch.randn(1, 3, 8, 8)
    task.requires_grad_(False)
    found = relevance(task.train(), {"image": images}, [0, 1, 2])
    assert task.training and all(parameter.grad is None for parameter in task.parameters())
    assert not torch.allclose(found[0, 0], found[0, 1]) and (found >= 0).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in task.modules())


def test_relevance_finds_the_patch_that_decides() -> None:
    """With attention and MLPs at zero, a token's share is its own: the head reads one channel of the mean."""
    task = _classifier("average")
    encoder = encoder_of(task)
    with torch.no_grad():
        for block in encoder.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.out, block.mlp.down):
                linear.weight.zero_()
                linear.bias.zero_()
        encoder.positions.zero_()
        task.head.linear.weight.copy_(torch.eye(3, 16))
        weight = encoder.patches.projection.weight
        weight.zero_()
        weight[1] = 1.0  # channel 1 is the brightness of the patch
    images = torch.zeros(1, 3, 8, 8)
    images[..., 4:6, 2:4] = 1.0  # row 2, column 1
    found = relevance(task, {"image": images}, [1])[0, 0]
    assert int(found.argmax()) == 2 * 4 + 1


@pytest.mark.parametrize("name, example", [(name, example) for name in EXAMPLES for example in EXAMPLES[name]])
def test_every_task_has_relevance(name: str, example: str) -> None:
    """For each output that its answer consists of, and for the answer itself: a map of the image's patches."""
    torch.manual_seed(0)
    task = EXAMPLES[name][example]().eval()
    for parameter in task.parameters():
        if not parameter.any():  # a new head starts at 0
            nn.init.normal_(parameter, std=0.02)
    batch = batch_for(task, 1)
    with torch.no_grad():
        outputs = task.explainable(batch)[:3]
        patches = task.features(batch["image"]).patches.shape[1]
    assert outputs or name in ("embed", "caption")  # a caption of random weights may be empty
    assert all(isinstance(text, str) for _, text in outputs)
    whole = relevance(task, batch)
    assert whole.shape == (1, patches)
    assert whole.isfinite().all() and (whole >= 0).all() and whole.any()
    if outputs:
        each = relevance(task, batch, [number for number, _ in outputs])
        assert each.shape == (1, len(outputs), patches) and each.isfinite().all() and (each >= 0).all()
