"""Captioners that start from others' weights, as their commands train them, with a Hub on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_captioners
import torch
from local_hub import Hub
from PIL import Image

import vitrail
from vitrail.baselines import ResNet, ResNetConfig
from vitrail.cli import main
from vitrail.data.preprocess import Preprocess
from vitrail.tasks.caption import Caption
from vitrail.tasks.caption.prefix import PrefixDecoder
from vitrail.tasks.embed import Embed
from vitrail.tasks.encoder import encoder_of
from vitrail.train.folder import RunFolder
from vitrail.train.step import train_step

pytest.importorskip("transformers", reason="needs pip install 'vitrail[caption]'")
pytest.importorskip("pycocoevalcap", reason="needs pip install 'vitrail[caption]'")

COMMON = ["--device", "cpu", "--workers", "0", "--batch-size", "8", "--epochs", "1"]
SMALL = ["--vocabulary-size", "300", "--decoder-width", "32", "--decoder-depth", "1", "--max-length", "8", "--ema", "0"]
JOINED = ["--join-depth", "1", "--prefix-length", "2", "--max-length", "8"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen noisy images, each beside two captions."""
    root = tmp_path_factory.mktemp("captioned")
    generator = np.random.default_rng(0)
    for i in range(24):
        kind = ("dark", "middle", "light")[i % 3]
        values = (40, 120, 200)[i % 3] + generator.integers(-20, 20, (24, 18 + i, 3))
        Image.fromarray(values.astype(np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a {kind} image\nsomething {kind} and noisy\n")
    return root


def served(server: Hub, folder: Path) -> Path:
    """A place whose files the Hub has as `some/NAME`."""
    server.repositories[f"some/{folder.name}"] = {"main": folder}
    return folder


def train(recipe: str, init: str, data: Path, out: Path, *more: str) -> Any:
    assert main(["train", recipe, "--init", init, "--data", str(data), "--out", str(out), *COMMON, *more]) == 0
    rows = RunFolder(out).rows()
    assert any(row["kind"] == "val" and row["bleu1"] >= 0 for row in rows)
    return vitrail.load(out)


def predicted(photo: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["predict", str(photo), "--model", str(model), "--json", "--device", "cpu"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert "".join(token["text"] for token in row["captions"][0]["tokens"]).strip() == row["caption"]
    return row


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(value, theirs[name]) for name, value in a.named_parameters() if "positions" not in name)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_an_encoder_of_the_hub_stays_unchanged_and_brings_its_images(
    kind: str, server: Hub, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_captioners.encoder(served(server, tmp_path / kind), kind)
    decoder = {"dinov2": "transformer", "clip": "attentive", "siglip": "recurrent"}[kind]
    task = train("caption-zoo", f"some/{kind}", captioned, tmp_path / "run", *SMALL, "--decoder", decoder)
    source = vitrail.load(f"some/{kind}")
    assert isinstance(task, Caption) and same(encoder_of(source), task.encoder)
    ours, theirs = task.preprocess, source.preprocess
    assert (ours.mean, ours.std, ours.resize, ours.interpolation) == (
        theirs.mean,
        theirs.std,
        theirs.resize,
        theirs.interpolation,
    )
    assert ours.size == task.encoder.config.image_size == (32, 32)  # at most twice the checkpoint's own
    server.status = 503  # a captioner needs no Hub
    predicted(captioned / "1.png", tmp_path / "run", capsys)


def test_an_encoder_is_tuned_on_request(server: Hub, captioned: Path, tmp_path: Path) -> None:
    tiny_captioners.encoder(served(server, tmp_path / "dinov2"), "dinov2")
    source = vitrail.load("some/dinov2")
    for method in ("full", "lora"):
        more = ("--method", method, "--image-size", "16", "16")
        task = train("caption-zoo", "some/dinov2", captioned, tmp_path / method, *SMALL, *more)
        assert not same(encoder_of(source), encoder_of(task))
        assert task.preprocess.size == (16, 16)


def test_a_resnet_of_ours_sees_for_a_captioner(captioned: Path, tmp_path: Path) -> None:
    network = ResNet(ResNetConfig(widths=(8, 12, 16), depth=1, stem_stride=2))
    Embed(network, Preprocess(size=(32, 32), mean=(0.4,) * 3, std=(0.2,) * 3)).save(tmp_path / "resnet")
    size = ("--image-size", "48", "48")
    task = train("caption-zoo", str(tmp_path / "resnet"), captioned, tmp_path / "run", *SMALL, *size)
    assert isinstance(task.encoder, ResNet) and same(network, task.encoder)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), task.encoder.buffers(), strict=True))
    assert task.preprocess.mean == (0.4,) * 3 and task.preprocess.size == (48, 48)
    again = train("caption-cnn-lstm", str(tmp_path / "resnet"), captioned, tmp_path / "on", *SMALL, "--epochs", "2")
    assert isinstance(again.encoder, ResNet) and not same(network, again.encoder)


@pytest.mark.parametrize("join", ["transformer", "mlp", "projection"])
def test_a_language_model_of_the_hub_behind_an_encoder_of_the_hub(
    join: str,
    server: Hub,
    captioned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)  # Java's scores take many seconds
    tiny_captioners.encoder(served(server, tmp_path / "clip"), "clip")
    model = tiny_captioners.language_model(served(server, tmp_path / "lm"))
    tuned = ["--tune-language"] if join == "mlp" else []
    more = [*JOINED, "--language-model", "some/lm", "--join", join, *tuned, "--lr", "1e-2"]
    task = train("caption-prefix", "some/clip", captioned, tmp_path / "run", *more)
    assert isinstance(task, Caption) and isinstance(task.decoder, PrefixDecoder)
    assert same(encoder_of(vitrail.load("some/clip")), task.encoder)
    assert same(model, task.decoder.model) == (join != "mlp")
    server.status = 503
    row = predicted(captioned / "1.png", tmp_path / "run", capsys)
    assert row["task"] == "caption"
    seen = ["--model", str(tmp_path / "run"), "--out", str(tmp_path / "seen"), "--device", "cpu"]
    assert main(["explain", str(captioned / "1.png"), *seen]) == 0
    assert (tmp_path / "seen" / "rollout.png").exists()
    assert (tmp_path / "seen" / "words.png").exists() == (join == "projection")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--data", str(captioned), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["bleu1"] >= 0


def test_a_stopped_run_with_a_language_model_resumes_to_the_same_bits(
    captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vitrail.create("nano/2", image_size=16, patch=8).save(tmp_path / "eyes")
    tiny_captioners.language_model(tmp_path / "lm")
    more = [*JOINED, "--language-model", str(tmp_path / "lm"), "--epochs", "2"]
    whole = train("caption-prefix", str(tmp_path / "eyes"), captioned, tmp_path / "whole", *more)
    half = tmp_path / "half"
    from vitrail.train import loop

    calls = [0]

    def stopping(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return train_step(*args, **named)

    args = ["train", "caption-prefix", "--init", str(tmp_path / "eyes"), "--data", str(captioned), *COMMON, *more]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        assert main([*args, "--out", str(half)]) == 130
    assert main(["train", "--resume", str(half), "--device", "cpu"]) == 0
    again = vitrail.load(half)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    "args, says",
    [
        (["--language-model", "nobody/nothing"], "nobody/nothing is not a local file or folder"),
        (["--method", "linear"], "choose frozen, full, lora or last-blocks"),
        (["--prefix-length", "0"], "--prefix-length must be at least 1, got 0"),
        (["--join", "glue"], "cannot be 'glue'"),
        (["--vocabulary-size", "9"], "does not use --vocabulary-size: leave it out"),
        (["--smoothing", "0.1"], "does not use --smoothing: leave it out"),
    ],
)
def test_wrong_input_is_one_plain_line(
    args: list[str], says: str, server: Hub, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vitrail.create("nano/2", image_size=16, patch=8).save(tmp_path / "eyes")
    tiny_captioners.language_model(served(server, tmp_path / "lm"))
    command = ["train", "caption-prefix", "--init", str(tmp_path / "eyes"), "--data", str(captioned)]
    more = [] if args[0] == "--language-model" else ["--language-model", "some/lm"]
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "run"), *COMMON, *more, *args]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
