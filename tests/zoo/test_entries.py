"""Which entry of a checkpoint holds the weights, and under which prefix, as training frameworks write them."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitrail
from vitrail.errors import UserError
from vitrail.zoo import convert, load_certified

Weights = dict[str, Tensor]
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """A small classifier under timm's names."""
    folder = tmp_path_factory.mktemp("entries")
    torch.manual_seed(0)
    model = vitrail.create("nano/2", classes=3, width=64, depth=1, heads=1, image_size=8, norm_eps=1e-6)
    torch.nn.init.normal_(model.get_parameter("head.linear.weight"))
    model.save(folder / "v")
    convert(folder / "v", folder / "t", "timm")
    return load_file(folder / "t" / "model.safetensors")


def pre(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def other(weights: Weights) -> Weights:
    """Weights that must not be read."""
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def answers(path: Path) -> Tensor:
    with torch.inference_mode():
        return vitrail.load(path)(IMAGES)


@pytest.fixture(scope="module")
def expected(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    save_file(weights, path)
    return answers(path)


def notes(path: Path) -> str:
    certificate = load_certified(path)[1]
    return "; ".join([*certificate.notes, *(f"{name}: {why}" for name, why in certificate.left.items())])


COUNT = {"n_averaged": torch.tensor(3)}
AVERAGED: dict[str, Callable[[Weights], Any]] = {
    "AveragedModel": lambda w: {**COUNT, **pre("module.", w)},
    "'model_ema'": lambda w: {"model": other(w), "model_ema": {**COUNT, **pre("module.", w)}, "epoch": 3},
    "'ema.shadow'": lambda w: {"model": other(w), "ema": {"decay": 0.999, "shadow": w}},
    "'ema_state_dict'": lambda w: {"model": other(w), "ema_state_dict": w},
    "'state_dict_ema'": lambda w: {"state_dict": other(w), "state_dict_ema": pre("module._orig_mod.", w), "arch": "x"},
    "'swa_state_dict'": lambda w: {"state_dict": other(w), "swa_state_dict": pre("module.", w)},
    "'callbacks.EMACallback.ema_state'": lambda w: {
        "state_dict": pre("model.", other(w)),
        "callbacks": {"EMACallback": {"ema_state": pre("model.", w), "updates": 3}, "ModelCheckpoint": {"best": None}},
    },
    "'extra_state.ema'": lambda w: {"model": other(w), "extra_state": {"epoch": 3, "ema": w}, "cfg": None},
    "'ema_model.'": lambda w: {**pre("online_model.", other(w)), **pre("ema_model.", w), "step": torch.tensor(3)},
    "'model_ema.module.'": lambda w: {
        "state_dict": {**pre("model.", other(w)), **pre("model_ema.module.", w), "criterion.weight": torch.ones(3)}
    },
    "'teacher'": lambda w: {"student": pre("module.", other(w)), "teacher": w, "optimizer": {"state": {0: {"s": w}}}},
    "'averaged'": lambda w: {"averaged": w, "model": other(w)},
    "come from the entry 'model'": lambda w: {
        "model": {**other(w), "pos_embed": w["pos_embed"]},
        "ema": {"shadow": {name: value for name, value in w.items() if name != "pos_embed"}},
    },
}
PASSED_OVER: dict[str, Callable[[Weights], Any]] = {
    "entry 'model'": lambda w: {"model": w, "model_ema": None},
    "from the entry 'model'": lambda w: {"model": w, "ema": {}},
    "'ema.shadow_params' is a list of tensors": lambda w: {
        "model": w,
        "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": list(other(w).values()), "collected_params": None},
    },
    "the average in 'ema' makes no model": lambda w: {"model": w, "ema": {"decay": torch.tensor(0.9)}},
    "'model_ema.blocks0norm1weight' makes no model": lambda w: {
        **pre("model.", w),
        "model_ema.blocks0norm1weight": torch.ones(64),
        "model_ema.decay": torch.tensor(0.99),
    },
    "'base_encoder.'": lambda w: {
        "state_dict": {**pre("base_encoder.", w), **pre("momentum_encoder.", other(w)), "predictor.0.weight": IMAGES}
    },
}
FRAMEWORKS: dict[str, Callable[[Weights], Any]] = {
    "Lightning": lambda w: {"state_dict": pre("model.", w), "hyper_parameters": {"lr": 1e-3}, "loops": {}},
    "Lightning with a loss": lambda w: {"state_dict": {**pre("net.", w), "loss_fn.pos_weight": torch.ones(3)}},
    "Lightning with metrics": lambda w: {
        "state_dict": {**pre("model.", w), "train_acc.tp": torch.ones(3), "val_metrics.f1.fp": torch.ones(3)}
    },
    "thop": lambda w: {**w, "total_ops": torch.zeros(1), "blocks.0.attn.qkv.total_params": torch.zeros(1)},
    "DeepSpeed": lambda w: {"module": w, "optimizer": None, "global_steps": 3, "ds_version": "0.14"},
    "composer": lambda w: {"state": {"model": pre("module.model.", w), "timestamp": {"epoch": 3}}, "rng": [{"x": 3}]},
    "ignite": lambda w: {"model": w, "optimizer": {"param_groups": [], "state": {}}, "trainer": {"epoch": 3}},
    "catalyst": lambda w: {"model_state_dict": w, "epoch_metrics": {"loss": 0.3}, "loss": torch.tensor(0.3)},
    "arguments": lambda w: {"model": OrderedDict(w), "args": argparse.Namespace(data=Path("/images")), "best_acc": 0.5},
    "compiled blocks": lambda w: {name.replace("blocks.0.", "blocks.0._orig_mod."): v for name, v in w.items()},
    "FSDP": lambda w: pre("_fsdp_wrapped_module.module._checkpoint_wrapped_module.", w),
    "a head of its own": lambda w: {name if "head" in name else f"backbone.{name}": v for name, v in w.items()},
    "the same twice": lambda w: {"model": w, "net": w},
}
PREFIXES = ["net.", "vit.", "encoder.", "model.module.", "_orig_mod.module.", "module._orig_mod.model.backbone."]
PREFIXES += ["student.", "classifier.", "backbone.encoder.", "a.b.c.d."]


@pytest.mark.parametrize("note", AVERAGED)
def test_averages_are_read(tmp_path: Path, weights: Weights, expected: Tensor, note: str) -> None:
    path = tmp_path / "a.pth"
    torch.save(AVERAGED[note](weights), path)
    assert torch.equal(answers(path), expected)
    assert note == "AveragedModel" or note in notes(path)


@pytest.mark.parametrize("note", PASSED_OVER)
def test_averages_that_are_none_give_way(tmp_path: Path, weights: Weights, expected: Tensor, note: str) -> None:
    path = tmp_path / "a.pth"
    torch.save(PASSED_OVER[note](weights), path)
    assert torch.equal(answers(path), expected)
    assert note in notes(path)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_frameworks(tmp_path: Path, weights: Weights, expected: Tensor, name: str) -> None:
    path = tmp_path / "a.pth"
    torch.save(FRAMEWORKS[name](weights), path)
    assert torch.equal(answers(path), expected)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_prefixes(tmp_path: Path, weights: Weights, expected: Tensor, prefix: str, save: Any) -> None:
    path = tmp_path / "a.ckpt"
    save(pre(prefix, weights), path)
    assert torch.equal(answers(path), expected)
    kept = prefix.replace("_orig_mod.", "")
    assert (f"prefix {kept!r} dropped" in notes(path)) == bool(kept)
    assert ("'_orig_mod.'" in notes(path)) == ("_orig_mod" in prefix)


def test_torchvisions_names_under_a_prefix_of_their_own(tmp_path: Path) -> None:
    """`encoder.` belongs to them and may stand before them too."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(8, 2, 1, 1, 64, 64, num_classes=3).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    torch.save(pre("encoder.", model.state_dict()), tmp_path / "a.pth")
    with torch.inference_mode():
        torch.testing.assert_close(answers(tmp_path / "a.pth"), model(IMAGES), atol=1e-5, rtol=1e-4)


def test_a_folder_as_accelerate_saves_it(tmp_path: Path, weights: Weights, expected: Tensor) -> None:
    save_file(pre("module.", weights), tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("optimizer.bin", "random_states_0.pkl"):
        torch.save({"state": {}}, tmp_path / name)
    assert torch.equal(answers(tmp_path), expected)


REFUSED: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "an addition": (lambda w: {**w, "extra.weight": torch.ones(3)}, "extra.weight"),
    "something beside": (lambda w: {**pre("model.", w), "decoder.weight": torch.ones(3)}, "decoder.weight beside"),
    "a half": (
        lambda w: {**pre("encoder.", w), **{f"decoder.{i}.weight": torch.ones(3) for i in range(9)}},
        r"decoder.0.weight and 8 more besides the model at the prefix 'encoder.'",
    ),
    "a head under another name": (lambda w: {**pre("model.", w), "fc.weight": torch.ones(3)}, "fc.weight beside"),
    "two models": (lambda w: {"model": w, "best": other(w)}, "several models, at the entry 'model' and .*'best'"),
    "two prefixes": (lambda w: {**pre("a.", w), **pre("b.", w)}, "several models, at the prefix 'a.' and .*'b.'"),
    "a teacher of another shape": (
        lambda w: {"student": w, "teacher": {**w, "head.weight": torch.ones(7, 64)}},
        "several models",
    ),
    "a list": (lambda w: {"ema": {"shadow_params": list(w.values())}}, "ema.shadow_params: a list of tensors"),
    "LoRA": (
        lambda w: {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 64)},
        r"LoRA's updates .* merge_and_unload",
    ),
    "peft": (
        lambda w: {f"base_model.model.{k.replace('qkv.', 'qkv.base_layer.')}": v for k, v in w.items()},
        "peft's layers .* merge_and_unload",
    ),
    "quantised": (lambda w: {**w, "blocks.0.mlp.fc1.SCB": torch.ones(3)}, "quantised weights"),
    "a shard": (lambda w: {"_flat_param": torch.ones(99)}, "a shard of FSDP's"),
    "ZeRO-3": (lambda w: {"module": {name: torch.empty(0) for name in w}}, "zero_to_fp32.py"),
    "pruned": (lambda w: {k.replace("fc1.weight", "fc1.weight_orig"): v for k, v in w.items()}, "prune.remove"),
    "Hugging Face's": (
        lambda w: pre("model.vit.", {"encoder.layer.0.attention.attention.query.weight": torch.ones(4, 4)}),
        "Hugging Face's names without its config.json",
    ),
    "mmpretrain's": (lambda w: {"backbone.layers.0.ffn.layers.0.0.weight": torch.ones(4, 4)}, "mmpretrain"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_a_line_that_names_it(tmp_path: Path, weights: Weights, name: str) -> None:
    make, words = REFUSED[name]
    torch.save(make(weights), tmp_path / "a.pth")
    with pytest.raises(UserError, match=words) as caught:
        vitrail.load(tmp_path / "a.pth")
    line = str(caught.value)
    assert str(tmp_path / "a.pth") in line and "\n" not in line and len(line) < 330 + len(str(tmp_path))


def test_a_head_in_an_entry_of_its_own(tmp_path: Path, weights: Weights, expected: Tensor) -> None:
    """Under the name `head` it is the encoder's; another one is left out, and a note says so."""
    encoder = {name: value for name, value in weights.items() if not name.startswith("head.")}
    head = {name.removeprefix("head."): weights[name] for name in weights.keys() - encoder.keys()}
    torch.save({"backbone": encoder, "head": head}, tmp_path / "a.pth")
    assert torch.equal(answers(tmp_path / "a.pth"), expected)
    torch.save({"backbone": encoder, "classifier": head}, tmp_path / "b.pth")
    assert vitrail.load(tmp_path / "b.pth").name == "embed"
    assert "the entry 'classifier' is left out" in notes(tmp_path / "b.pth")


def test_pretraining_gives_an_encoder(tmp_path: Path, weights: Weights) -> None:
    encoder = {name: value for name, value in weights.items() if not name.startswith("head.")}
    more = {"projector.0.weight": torch.ones(4, 64), "predictor.0.weight": torch.ones(4, 4), "queue": torch.ones(4, 9)}
    torch.save({"state_dict": {**pre("encoder.", encoder), **more}}, tmp_path / "a.pth")
    assert vitrail.load(tmp_path / "a.pth").name == "embed"
    assert "predictor.0.weight: the head of pre-training" in notes(tmp_path / "a.pth")
    heads = {"student_head.0.weight": torch.ones(4, 64), "teacher_head.0.weight": torch.ones(4, 64)}
    both = {**pre("student_backbone.", other(encoder)), **pre("teacher_backbone.", encoder), **heads}
    torch.save(both, tmp_path / "b.pth")
    assert torch.equal(answers(tmp_path / "b.pth"), answers(tmp_path / "a.pth"))
