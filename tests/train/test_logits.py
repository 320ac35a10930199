"""The largest attention logits of each layer, their bound, and the kernels of attention that training may use."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import checked

import vitrail
from vitrail.baselines import CNNConfig
from vitrail.cli import main
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import open_data
from vitrail.errors import UserError
from vitrail.recipes import RECIPES
from vitrail.tasks.embed import Embed
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.task import Task
from vitrail.train.build import build
from vitrail.train.device import choose_attention
from vitrail.train.folder import RunFolder
from vitrail.train.logits import CLIP_EVERY, IMAGES, QKClip, largest_logits
from vitrail.train.optim import Optimizers
from vitrail.train.step import LossModule, train_step
from vitrail.train.tune import Tune, tune
from vitrail.variants import VariantConfig
from vitrail.vit import Attention, ViT


def test_the_largest_logits_are_those_of_equation_6() -> None:
    task = vitrail.create("nano/2", classes=3, image_size=8).train()
    encoder, images = checked(ViT, task.encoder), torch.randn(IMAGES + 3, 3, 8, 8)
    wanted: list[float] = []

    def note(attention: Attention, inputs: tuple[torch.Tensor]) -> None:
        q, k, _ = attention.project(inputs[0])
        wanted.append(float((q @ k.mT / q.shape[-1] ** 0.5).abs().max()))

    handles = [block.attention.register_forward_pre_hook(note) for block in encoder.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        task.eval().features(images[:IMAGES])
    for handle in handles:
        handle.remove()
    assert largest_logits(task.train(), images) == pytest.approx(wanted, rel=1e-5) and len(wanted) == len(
        encoder.blocks
    )
    assert task.training


def test_a_network_without_attention_has_none() -> None:
    network = encoder_for(CNNConfig(widths=(4,), strides=(1,), image_size=(8, 8)))
    assert largest_logits(Embed(network, Preprocess(size=(8, 8))), torch.randn(2, 3, 8, 8)) == []


def test_each_evaluation_logs_them(tmp_path: Path) -> None:
    tiny = [
        "--width",
        "16",
        "--depth",
        "2",
        "--heads",
        "2",
        "--epochs",
        "0.2",
        "--eval-every",
        "0.1",
        "--device",
        "cpu",
    ]
    assert main(["train", "digits", "--out", str(tmp_path / "run"), *tiny]) == 0
    rows = [row for row in RunFolder(tmp_path / "run").rows() if row["kind"] == "val"]
    assert len(rows) == 2 and all(len(row["attention_logits"]) == 2 for row in rows)
    assert all(0 < value < 100 for row in rows for value in row["attention_logits"])


def large_logits(**changes: Any) -> tuple[Task, torch.Tensor]:
    """A task with attention logits far above 1 and biases that are not zero, and a batch of images."""
    torch.manual_seed(0)
    config = VariantConfig(**{"width": 24, "depth": 2, "heads": 3, "patch": 2, "image_size": (8, 8), **changes})
    task = Embed(encoder_for(config), Preprocess(size=(8, 8))).train()
    for attention in attentions(task):
        own = attention.get_parameter("qkv.weight")
        torch.nn.init.normal_(own, std=0.5)
        for name, bias in attention.named_parameters():
            if name in ("qkv.bias", "q_bias"):
                torch.nn.init.normal_(bias, std=0.5)
    return task, torch.randn(IMAGES + 1, 3, 8, 8)


def attentions(task: Task) -> list[Attention]:
    return [module for module in task.modules() if isinstance(module, Attention)]


@pytest.mark.parametrize("bias", [True, False])
def test_heads_above_the_bound_are_scaled_down_to_it_and_others_stay(bias: bool) -> None:
    """Against the rule written out: one head at a time, from queries and keys as equation 6 has them."""
    task, images = large_logits(qkv_bias=bias)
    seen: list[tuple[Attention, torch.Tensor]] = []
    handles = [
        attention.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
        for attention in attentions(task)
    ]
    with torch.no_grad():
        task.eval().features(images[:IMAGES])
    for handle in handles:
        handle.remove()
    maxima = []
    for attention, x in seen:
        q, k, _ = (y.detach() for y in attention.project(x))
        maxima.append([float((q[:, head] @ k[:, head].mT).abs().max()) / 8**0.5 for head in range(3)])
    bound = sorted(value for own in maxima for value in own)[2]  # of six heads, three are above
    expected = {name: value.clone() for name, value in task.state_dict().items()}
    for number, largest in enumerate(maxima):
        for head, value in enumerate(largest):
            for start in (0, 24):
                rows = slice(start + 8 * head, start + 8 * head + 8)
                for name in ("weight", "bias")[: 1 + bias]:
                    expected[f"encoder.blocks.{number}.attention.qkv.{name}"][rows] *= min(1, bound / value) ** 0.5
    QKClip(task.train(), bound).after(0, images)
    assert task.training
    before = large_logits(qkv_bias=bias)[0].state_dict()
    for name, value in task.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=0)
        assert torch.equal(value, before[name]) or "qkv" in name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": (1,)},
        {"key_bias": False},
        {"rotary": "axial", "class_token": False, "pool": "average"},
        {"window": 2, "class_token": False, "pool": "average"},
        {"differential": True},
        {"arrangement": "joint"},
    ],
    ids=str,
)
def test_no_logit_is_above_the_bound(changes: dict[str, Any]) -> None:
    task, images = large_logits(depth=1, **changes)
    before = largest_logits(task, images)
    QKClip(task, 1.5).after(0, images)
    assert before[0] > 3 and largest_logits(task, images) == pytest.approx([1.5], rel=1e-4)


def test_two_attentions_of_a_parallel_block_are_bounded_apart() -> None:
    task, images = large_logits(depth=1, arrangement="parallel")
    QKClip(task, 1.5).after(0, images)
    assert largest_logits(task, images) == pytest.approx([1.5, 1.5], rel=1e-4)


def test_only_every_few_steps_are_looked_at_and_only_finite_logits_count() -> None:
    task, images = large_logits()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    clip = QKClip(task, 1.5)
    for step in range(1, CLIP_EVERY):
        clip.after(step, images)
    for bad in (math.inf, math.nan):
        clip.after(0, torch.full_like(images, bad))
    QKClip(task, 1e6).after(0, images)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    clip.after(CLIP_EVERY, images)
    assert not torch.equal(
        task.get_parameter("encoder.blocks.0.attention.qkv.weight"), before["encoder.blocks.0.attention.qkv.weight"]
    )


def test_weights_that_do_not_train_are_not_scaled() -> None:
    task, images = large_logits()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    tune(task, Tune(method="last-blocks", last_blocks=1))
    QKClip(task, 1.5).after(0, images)
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"encoder.blocks.1.attention.qkv.weight", "encoder.blocks.1.attention.qkv.bias"}


@pytest.mark.parametrize("method", ["lora", "frozen"])
def test_a_bound_on_nothing_is_refused(method: str) -> None:
    task, _ = large_logits()
    tune(task, Tune(method=method))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--qk-clip has no effect"):
        QKClip(task, 1.5)
    with pytest.raises(UserError, match="--qk-clip has no effect"):
        QKClip(large_logits(qk_norm=True)[0], 1.5)


def test_a_bound_is_on_the_encoder_and_refused_before_an_image_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder's attention would take the option, and nothing measures its logits."""
    task, _ = large_logits()
    tune(task, Tune(method="frozen"))
    task.decoder = Attention(width=8, heads=2)
    with pytest.raises(UserError, match="the encoder has no attention, or its queries"):
        QKClip(task, 1.5)
    monkeypatch.setattr("vitrail.train.build.training_loader", lambda *args: pytest.fail("images were decoded"))
    run = RECIPES["digits"](1000)
    run = replace(run, optim=replace(run.optim, qk_clip=100.0))
    with pytest.raises(UserError, match="--qk-clip has no effect"):
        build(run, open_data("digits"), torch.device("cpu"))


def test_processes_with_other_images_scale_by_the_same_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    task, images = large_logits(depth=1)
    before = largest_logits(task, images)[0]

    def reduce(largest: torch.Tensor, operation: Any) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        largest.fill_(2 * before)  # what another process has seen, for every head

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    QKClip(task, 1.0).after(0, images)
    assert largest_logits(task, images)[0] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logits_stay_bounded_while_muon_trains(accumulate: int) -> None:
    """Without the bound they pass it; micro-batches change nothing about it."""
    run = RECIPES["digits"](1000)
    model = replace(checked(VariantConfig, run.model), width=16, depth=1, heads=2, stem=(), qk_norm=False)
    run = replace(run, model=model, accumulate=accumulate, optim=replace(run.optim, muon_lr=0.1), precision="fp32")
    largest = []
    for bound in (6.0, math.inf):
        components, _ = build(run, open_data("digits"), torch.device("cpu"))
        task = components.task.train()
        optimizers, module, clip = Optimizers(task, run.optim), LossModule(task), QKClip(task, bound)
        for step, batch in zip(range(2 * CLIP_EVERY + 1), components.train.batches(0), strict=False):
            train_step(run, module, batch, optimizers, 1.0)
            clip.after(step, batch["image"])
        largest.append(largest_logits(task, batch["image"])[0])
    assert largest[0] <= 6.0001 and largest[1] > 8


def test_the_command_bounds_logits_and_a_bound_out_of_reach_changes_no_bit(tmp_path: Path) -> None:
    tiny = ["--width", "16", "--depth", "2", "--heads", "2", "--epochs", "0.5", "--device", "cpu", "--no-qk-norm"]
    bounds: dict[str, list[str]] = {"off": [], "far": ["--qk-clip", "1e6"], "near": ["--qk-clip", "0.5"]}
    weights = {}
    for name, words in bounds.items():
        assert main(["train", "digits", "--out", str(tmp_path / name), *tiny, *words]) == 0
        weights[name] = (tmp_path / name / "last" / "model.safetensors").read_bytes()
    assert weights["off"] == weights["far"] != weights["near"]


def test_cudnns_attention_is_off_for_training_on_cuda() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        choose_attention(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        choose_attention(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
