"""Where numbers are no longer finite: the layer that a run names when it stops."""

from __future__ import annotations

from dataclasses import replace

import torch
from small_runs import CPU, small_run, spoiled
from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import open_data
from vitrail.data.text import Tokenizer
from vitrail.tasks.caption import Caption, Captioning, numbered
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.values import Batch
from vitrail.train.build import build
from vitrail.train.finite import FULL, first_non_finite
from vitrail.vit import ViTConfig


def test_a_gradient_alone_that_is_not_finite_names_its_layer() -> None:
    components, _ = build(run := small_run(), open_data("digits"), CPU)
    task, batch = components.task, next(components.train.batches(0))
    task.loss = spoiled(task, "gradient")  # type: ignore[method-assign]
    assert first_non_finite(run, task, batch) == "every value is finite, but not the gradient of head.linear.weight"


def test_the_layer_is_looked_for_in_the_precision_and_the_micro_batches_of_the_step() -> None:
    """A number above 65,504 is infinite in fp16 alone."""
    components, _ = build(run := small_run(accumulate=4), open_data("digits"), CPU)
    task, batch = components.task.eval(), next(components.train.batches(0))
    block = task.encoder.blocks[0]
    with torch.no_grad():
        block.mlp.up.bias.fill_(1e5)
    assert first_non_finite(replace(run, precision="fp32"), task, batch) is None
    sizes: list[int] = []
    block.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = first_non_finite(replace(run, precision="fp16"), task, batch)
    assert found == "it began in the layer encoder.blocks.0.mlp.up" and sizes == [8]


def test_a_memory_that_is_too_full_to_repeat_the_step_ends_in_no_traceback() -> None:
    components, _ = build(run := small_run(), open_data("digits"), CPU)

    def full(batch: Batch) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    components.task.loss = full  # type: ignore[method-assign,assignment]
    assert first_non_finite(run, components.task, next(components.train.batches(0))) == FULL


def test_a_captioner_whose_loss_is_not_finite_names_the_layer() -> None:
    config = Captioning(decoder_width=8, decoder_depth=1, decoder_heads=2, most_words=8)
    words = Tokenizer.train(["a dog"], "words", 8)
    encoder = encoder_for(ViTConfig(width=8, depth=1, heads=2, patch=4, image_size=(8, 8)))
    task = Caption(encoder, config, words, Preprocess(size=(8, 8)))
    task.decoder.blocks[0].mlp.register_forward_hook(lambda *_: torch.tensor(torch.inf))  # type: ignore[union-attr,index]
    batch = {"image": torch.randn(2, 3, 8, 8), "label": numbered([["a dog"], ["a dog"]], words, 8)}
    batch |= {"sample": torch.arange(2), "epoch": torch.tensor(0)}
    assert str(first_non_finite(small_run(), task, batch)).startswith("it began in the layer decoder.")
