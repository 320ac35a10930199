"""The answer after each layer, against the same encoder with fewer blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from task_examples import EXAMPLES, batch_for
from torch import nn

import vitrail
from vitrail.explain.lens import layer_by_layer
from vitrail.explain.trace import encoder_of
from vitrail.tasks.values import Batch


@pytest.mark.parametrize("changes", [{}, {"registers": 2, "rotary": "axial"}])
@torch.no_grad()
def test_each_layer_answers_like_an_encoder_that_ends_there(changes: dict[str, Any]) -> None:
    task = vitrail.create("nano/2", classes=["a", "b", "c"], **changes).eval()
    nn.init.normal_(task.head.linear.weight)  # type: ignore[union-attr, arg-type]
    images, encoder = torch.randn(2, 3, 8, 8), encoder_of(task)
    found = layer_by_layer(task, {"image": images})
    assert len(found) == len(encoder.blocks) == 4
    x, grid = encoder.embed(images)
    for layer, block in enumerate(encoder.blocks_on(grid, x.shape[1])):
        x = block(x)
        logits = task.head(encoder.pool(encoder.finish(x, grid)))  # type: ignore[operator]
        for image, probabilities in enumerate(logits.softmax(1)):
            labels = found[layer][image].row()["labels"]
            best = probabilities.argsort(descending=True).tolist()
            assert [row["label"] for row in labels] == ["abc"[k] for k in best]
            assert [row["score"] for row in labels] == pytest.approx(probabilities[best].tolist(), abs=1e-5)
    assert "encode" not in vars(encoder)


@pytest.mark.parametrize("name, example", [("segment", "linear"), ("segment", "queries"), ("caption", "transformer")])
def test_the_last_layer_gives_the_answer_of_any_task(name: str, example: str) -> None:
    torch.manual_seed(0)
    task = EXAMPLES[name][example]().eval()
    batch = batch_for(task, 1)
    shown: Batch = {key: batch[key] for key in ("image", "sample") if key in batch}
    with torch.no_grad():
        expected = task.answer(shown)[0].row()
    found = layer_by_layer(task, shown)
    assert len(found) == 4
    assert found[-1][0].row() == expected
