"""The largest attention logits of each layer, and the kernels of attention that training may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checked import checked

import vitrail
from vitrail.baselines import CNNConfig
from vitrail.cli import main
from vitrail.data.preprocess import Preprocess
from vitrail.tasks.embed import Embed
from vitrail.tasks.encoder import encoder_for
from vitrail.train.device import choose_attention
from vitrail.train.logits import IMAGES, largest_logits
from vitrail.train.state import RunFolder
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
