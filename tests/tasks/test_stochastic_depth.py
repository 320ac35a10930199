"""Stochastic depth by (seed, epoch, sample): who draws, what is skipped, and that nothing else in a batch matters."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from checked import checked
from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.data.random import draw_key
from vitrail.data.sets import open_data
from vitrail.data.text import Tokenizer
from vitrail.tasks.caption import Caption, Captioning, numbered
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch
from vitrail.train.build import build
from vitrail.train.run import Run
from vitrail.train.step import LossModule
from vitrail.train.tune import Method, Tune, tune
from vitrail.variants import VariantConfig
from vitrail.vit import ViT, ViTConfig

RATE = 0.5
PLAIN = ViTConfig(16, 4, 2, 4, (8, 8), drop_path=RATE)
VARIANTS: dict[str, dict[str, Any]] = {
    "pre": {"layer_scale": 0.1, "registers": 1},
    "post": {"arrangement": "post"},
    "joint": {"arrangement": "joint"},
    "fused": {"arrangement": "joint_fused"},
    "parallel": {"arrangement": "parallel", "layer_scale": 0.1},
    "windows": {"window": 2, "global_blocks": (1,), "class_token": False, "pool": "average", "relative": "decomposed"},
    "rotary": {"rotary": "axial", "pool": "attention"},
}


def classifier(config: ViTConfig | VariantConfig = PLAIN) -> Classify:
    torch.manual_seed(0)
    task = Classify(encoder_for(config), ["a", "b"], Preprocess(size=config.image_size))
    torch.nn.init.normal_(task.get_parameter("head.linear.weight"))
    return task


def batch_of(samples: Tensor, seed: int = 0, epoch: int = 0) -> Batch:
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))[samples % 64]
    return {"image": images, "label": samples % 2, "sample": samples, "key": draw_key(seed, epoch)}


def factors(task: Task, samples: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
    keep = task.train().keep({"sample": samples, "key": draw_key(seed, epoch)})
    assert keep is not None
    return keep


def test_a_samples_factors_are_its_own_in_any_batch() -> None:
    task, samples = classifier(), torch.arange(32)
    whole = factors(task, samples)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(factors(task, order), whole[order])
    assert torch.equal(torch.cat([factors(task, samples[i : i + 5]) for i in range(0, 32, 5)]), whole)
    assert not torch.equal(factors(task, samples, epoch=1), whole)
    assert not torch.equal(factors(task, samples, seed=1), whole)


def test_branches_are_skipped_as_often_as_the_rate_of_their_block_says() -> None:
    count = 20_000
    keep = factors(classifier(), torch.arange(count))
    rates = torch.linspace(0, RATE, 4)
    skipped = (keep == 0).double().mean(dim=0)
    for i, rate in enumerate(rates.tolist()):
        assert skipped[i].tolist() == pytest.approx([rate, rate], abs=4 * (rate * (1 - rate) / count) ** 0.5)
        assert keep[:, i].unique().tolist() == pytest.approx(sorted({0.0, 1 / (1 - rate)} if rate else {1.0}))
    # No branch follows another: of six whose rate is above 0, the correlations are those of so many tosses.
    tosses = (keep[:, 1:] == 0).flatten(1).double()
    assert (torch.corrcoef(tosses.T) - torch.eye(6)).abs().max() < 5 / count**0.5


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_block_leaves_out_just_the_branches_that_are_skipped(name: str) -> None:
    config = VariantConfig(16, 2, 2, 4, image_size=(16, 16), drop_path=RATE, **VARIANTS[name])
    torch.manual_seed(0)
    encoder = checked(ViT, encoder_for(config)).train()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        images = torch.randn(3, 3, 16, 16)
        x, grid = encoder.embed(images)
        keep = torch.ones(3, 2, 2)
        keep[0], keep[1, 1] = 0, 0  # the first image skips all branches, the second those of the last block
        found = encoder.encode(x, grid, keep)[0]
        torch.testing.assert_close(found[0], x[0])
        torch.testing.assert_close(found[1], encoder.encode(x[1:2], grid, torch.ones(1, 2, 2), slice(0, 1))[0][0])
        whole = encoder.eval().encode(x, grid)[0]
        torch.testing.assert_close(found[2], whole[2])
        assert not torch.allclose(whole[0], x[0], atol=1e-3) and not torch.allclose(whole[1], found[1], atol=1e-3)


def test_the_loss_draws_by_the_key_and_a_batch_without_one_by_torchs_generator() -> None:
    task = classifier().train()
    batch = batch_of(torch.arange(16))
    again = [task.loss(batch)["loss"] for _ in range(2)]
    assert torch.equal(*again) and not torch.equal(again[0], task.loss(batch | {"key": draw_key(0, 1)})["loss"])
    keyless = {name: value for name, value in batch.items() if name != "key"}
    assert not torch.equal(*(task.loss(keyless)["loss"] for _ in range(2)))
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(task.loss(keyless)["loss"])
    assert torch.equal(*drawn)
    task.eval()
    assert task.keep(batch) is None and torch.equal(task.loss(batch)["loss"], task.loss(keyless)["loss"])


@pytest.mark.parametrize("method, skipping", [("full", 3), ("lora", 3), ("last-blocks", 2), ("frozen", 0)])
def test_blocks_that_do_not_learn_are_never_skipped(method: Method, skipping: int) -> None:
    """Four blocks, the first of which has a rate of 0; `last-blocks` leaves two to learn."""
    task = classifier()
    tune(task, Tune(method=method, lora_rank=2))
    keep = factors(task, torch.arange(200))
    assert [bool((keep[:, i] == 0).any()) for i in range(4)] == [False] * (4 - skipping) + [True] * skipping
    assert keep[:, -1].max() == (1 / (1 - RATE) if skipping else 1)


WORDS = Tokenizer.train(["a dog runs on the grass", "two cats sit"], "words", 50)


def captioner() -> Caption:
    torch.manual_seed(0)
    config = Captioning(decoder_width=16, decoder_depth=1, decoder_heads=2, decoder_dropout=0.0, most_words=8)
    return Caption(encoder_for(PLAIN), config, WORDS, Preprocess(size=(8, 8)))


def caption_batch(samples: Tensor, epoch: int = 0, most: int = 3) -> Batch:
    """Images with one to `most` captions each."""
    texts = ["a dog runs", "two cats sit on the grass", "the grass"]
    labels = numbered([texts[: 1 + i % most] for i in range(64)], WORDS, 8)
    return batch_of(samples, epoch=epoch) | {"label": labels[samples % 64], "epoch": torch.tensor(epoch)}


def test_a_captioners_loss_is_the_sum_over_its_images_in_any_batch() -> None:
    task, samples = captioner().train(), torch.arange(24)
    for epoch in range(3):
        whole = task.loss(caption_batch(samples, epoch))
        single = [task.loss(caption_batch(samples[i : i + 1], epoch)) for i in range(24)]
        for name, value in whole.items():
            torch.testing.assert_close(sum(found[name] for found in single), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make, batches",
    [
        (classifier, batch_of),
        # A captioner's graphs are of so many words; here these are as many in every batch.
        pytest.param(captioner, partial(caption_batch, most=1), marks=pytest.mark.slow),
    ],
)
def test_a_compiled_loss_is_the_same_graph_in_every_epoch(make: Any, batches: Any) -> None:
    task = make().train()
    module, graphs = LossModule(task), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module.compile(backend=backend, dynamic=False)
    samples, counts = torch.arange(24), []
    for epoch in range(4):
        batch = batches(samples + 64 * 3 * epoch, epoch=epoch)
        torch.testing.assert_close(module(batch)["loss"], task.loss(batch)["loss"], rtol=1e-4, atol=1e-4)
        counts.append(len(graphs))
    assert counts[0] > 0 and set(counts) == {counts[0]}


def test_a_loaders_batches_bring_what_is_drawn_by() -> None:
    """The factors of a run change with its epoch and its seed, and stay where the same epoch comes again."""
    run = Run(recipe="x", data="digits", model=ViTConfig(16, 2, 2, 2, (8, 8), 1, drop_path=RATE), batch_size=128)
    found = {}
    for seed in (0, 1):
        components, _ = build(Run(**{**vars(run), "seed": seed}), open_data("digits"), torch.device("cpu"))
        steps = components.train.steps_per_epoch
        for start in (0, steps):
            batch = next(iter(components.train.batches(start)))
            components.task.train()
            keep = components.task.keep(batch)
            assert keep is not None and keep.shape == (128, 2, 2)
            again = components.task.keep(next(iter(components.train.batches(start))))
            assert again is not None and torch.equal(keep, again)
            by_sample = dict(zip(batch["sample"].tolist(), keep, strict=True))
            found[seed, start // steps] = by_sample
    first, *others = found.values()
    for other in others:
        both = first.keys() & other.keys()
        assert any(not torch.equal(first[i], other[i]) for i in both)
