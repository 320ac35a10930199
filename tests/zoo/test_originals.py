"""MAE's, MoCo v3's, DINO's, DINOv2's, DINOv3's and SAM's own files, against timm's and transformers' models of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import vitrail
from vitrail.errors import UserError
from vitrail.zoo import sam
from vitrail.zoo.assemble import recognise
from vitrail.zoo.files import open_files

SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def plain(**changes: Any) -> Any:
    """timm's model of MAE's and DINO's encoder."""
    timm = pytest.importorskip("timm")
    values = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 0}
    return randomised(timm.models.VisionTransformer(**{**values, **changes}))


@torch.no_grad()
def assert_same_tokens(path: Path, expected: Tensor, images: Tensor) -> Any:
    task = vitrail.load(path)
    tokens = torch.cat(task.features(images)[:2], dim=1)
    assert tokens.shape == expected.shape
    assert float((tokens - expected).abs().max() / expected.abs().max()) < 1e-5
    return task


def at_another_size(model: nn.Module, weights: dict[str, Tensor], **how: Any) -> Any:
    """The same timm model for 48x48 pixels, its positions interpolated as F.interpolate is told."""
    first, grid = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, mode="bicubic", align_corners=False, **how).flatten(2).transpose(1, 2)
    larger = plain(img_size=48)
    larger.load_state_dict({**model.state_dict(), "pos_embed": torch.cat([first, grid], dim=1)})
    return larger


def test_mae_leaves_its_decoder(tmp_path: Path) -> None:
    model = plain()
    weights = model.state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 32)}
    decoder |= {"decoder_embed.weight": torch.zeros(32, 128), "decoder_blocks.0.norm1.weight": torch.ones(32)}
    torch.save({"model": {**weights, **decoder}, "epoch": 3}, tmp_path / "mae.pth")
    images = torch.randn(2, 3, 32, 32)
    assert_same_tokens(tmp_path / "mae.pth", model.forward_features(images), images)
    larger = torch.randn(2, 3, 48, 48)
    expected = at_another_size(model, weights, size=(6, 6)).forward_features(larger)
    assert_same_tokens(tmp_path / "mae.pth", expected, larger)
    _, _, found = recognise(tmp_path / "mae.pth")
    assert set(found.left) == set(decoder) and found.source == "MAE's .pth"
    assert found.preprocess.mean == (0.485, 0.456, 0.406) and found.preprocess.resized(100, 100) == (36, 36)


def test_moco_is_its_base_encoder_with_twelve_heads(tmp_path: Path) -> None:
    """Its projector ends in a norm without weights, which no classifier's head does; ViT-S has heads of 32 channels."""
    model = plain(embed_dim=96, num_heads=12)
    head = {"head.0.weight": torch.ones(8, 96), "head.1.weight": torch.ones(8), "head.1.running_mean": torch.ones(8)}
    head |= {"head.6.weight": torch.ones(4, 8), "head.7.running_mean": torch.ones(4)}
    base = {f"module.base_encoder.{name}": value for name, value in {**model.state_dict(), **head}.items()}
    momentum = {name.replace("base", "momentum"): torch.zeros_like(value) for name, value in base.items()}
    more = {"module.predictor.0.weight": torch.ones(8, 4)}
    torch.save({"state_dict": {**base, **momentum, **more}, "arch": "vit_small"}, tmp_path / "moco.pth")
    images = torch.randn(2, 3, 32, 32)
    assert_same_tokens(tmp_path / "moco.pth", model.forward_features(images), images)


def test_dino_is_its_teacher_without_the_head(tmp_path: Path) -> None:
    model = plain()
    weights = model.state_dict()
    teacher = {f"backbone.{name}": value for name, value in weights.items()}
    teacher |= {"head.mlp.0.weight": torch.zeros(8, 128), "head.last_layer.weight_g": torch.ones(8, 1)}
    student = {f"module.{name}": torch.zeros_like(value) for name, value in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 100}, tmp_path / "dino.pth")
    images = torch.randn(2, 3, 32, 32)
    assert_same_tokens(tmp_path / "dino.pth", model.forward_features(images), images)
    # DINO adds a tenth of a patch to the new size, which shifts the places that are read.
    larger = torch.randn(2, 3, 48, 48)
    expected = at_another_size(model, weights, scale_factor=(6.1 / 4, 6.1 / 4)).forward_features(larger)
    assert_same_tokens(tmp_path / "dino.pth", expected, larger)


RENAMED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
    "encoder.layer.": "blocks.",
    "layer.": "blocks.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}


def original_names(model: Any, folder: Path, more: dict[str, str]) -> dict[str, Tensor]:
    """Weights of transformers' model under the authors' names, queries, keys and values in one.

    They come from the file that it saves: names in memory change with the release.
    """
    model.save_pretrained(folder)
    weights: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for theirs, ours in {**more, **RENAMED}.items():
            name = name.replace(theirs, ours)
        weights[name] = value
    for name in [name for name in weights if "q_proj.weight" in name]:
        start = name.removesuffix("attention.q_proj.weight")
        for end in ("weight", "bias"):
            projections = [weights.pop(f"{start}attention.{x}_proj.{end}", None) for x in "qkv"]
            given = next(value for value in projections if value is not None)
            projections = [
                torch.full_like(given, 7.0) if value is None else value for value in projections
            ]  # masked, so never read
            weights[f"{start}attn.qkv.{end}"] = torch.cat(projections)  # type: ignore[arg-type]
    return weights


@pytest.mark.parametrize(("registers", "gated", "chunks"), [(0, False, False), (3, False, True), (3, True, False)])
def test_dinov2(registers: int, gated: bool, chunks: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind, count = ("Dinov2WithRegisters", {"num_register_tokens": registers}) if registers else ("Dinov2", {})
    config = getattr(transformers, f"{kind}Config")(**SMALL, **count, use_swiglu_ffn=gated)
    model = randomised(getattr(transformers, f"{kind}Model")(config))
    weights = original_names(model, tmp_path / "theirs", {"embeddings.register_tokens": "register_tokens"})
    if chunks:  # its training cuts the blocks into chunks and counts on
        weights = {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", name): value for name, value in weights.items()}
    torch.save(weights, tmp_path / "dinov2.pth")
    images = torch.randn(2, 3, 32, 32)
    task = assert_same_tokens(tmp_path / "dinov2.pth", model(images).last_hidden_state, images)
    if registers:  # the two agree on how positions fit another size
        images = torch.randn(2, 3, 40, 24)
        assert_same_tokens(tmp_path / "dinov2.pth", model(images).last_hidden_state, images)
    else:
        assert task.encoder.config.resampling == "offset"


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(gated: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        **SMALL,
        intermediate_size=192,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    model = randomised(transformers.DINOv3ViTModel(config))
    mlp = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    weights = original_names(model, tmp_path / "theirs", {"embeddings.register_tokens": "storage_tokens", **mlp})
    weights["mask_token"] = weights["mask_token"][0]
    weights["rope_embed.periods"] = torch.ones(16)
    for i in range(2):
        weights[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(384)
    torch.save(weights, tmp_path / "dinov3.pth")
    for size in ((32, 32), (40, 24)):
        images = torch.randn(2, 3, *size)
        assert_same_tokens(tmp_path / "dinov3.pth", model(images).last_hidden_state, images)


def sam_model() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=40,
        patch_size=8,
        window_size=2,  # 5x5 patches: the last windows are filled up
        global_attn_indexes=[1],
        mlp_dim=48,
        output_channels=24,
    )
    return randomised(transformers.SamVisionModel(config))


SAM_NAMES = {
    "patch_embed.projection": "patch_embed.proj",
    "layers.": "blocks.",
    "neck.conv1": "neck.0",
    "neck.layer_norm1": "neck.1",
    "neck.conv2": "neck.2",
    "neck.layer_norm2": "neck.3",
    "layer_norm": "norm",
    "vision_encoder.": "image_encoder.",
}


@pytest.mark.parametrize("whole", [True, False])
def test_sams_image_encoder(whole: bool, tmp_path: Path) -> None:
    model = sam_model()
    weights = dict(model.state_dict())
    for theirs, ours in SAM_NAMES.items():
        weights = {name.replace(theirs, ours): value for name, value in weights.items()}
    if whole:
        weights |= {"prompt_encoder.no_mask_embed.weight": torch.zeros(1, 24), "mask_decoder.x.weight": torch.zeros(2)}
    else:
        weights = {name.removeprefix("image_encoder."): value for name, value in weights.items()}
    torch.save(weights, tmp_path / "sam.pth")
    images = torch.randn(2, 3, 40, 40)
    expected = model(images).last_hidden_state.flatten(2).transpose(1, 2)
    task = assert_same_tokens(tmp_path / "sam.pth", expected, images)
    assert task.encoder.config.window == 2 and task.encoder.config.global_blocks == (1,)
    assert task(images).shape == (2, 24)
    assert len(sam.read(open_files(tmp_path / "sam.pth")).left) == (2 if whole else 0)


def test_sam_as_transformers_saves_it(tmp_path: Path) -> None:
    model = sam_model()
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 40, 40)
    assert_same_tokens(tmp_path, model(images).last_hidden_state.flatten(2).transpose(1, 2), images)


def test_what_does_not_belong_is_an_error(tmp_path: Path) -> None:
    weights = plain().state_dict() | {"decoder_embed.weight": torch.zeros(32, 128), "blocks.0.extra": torch.zeros(1)}
    torch.save(weights, tmp_path / "mae.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.extra"):
        vitrail.load(tmp_path / "mae.pth")
    weights = {name: value for name, value in sam_model().state_dict().items() if "rel_pos" not in name}
    torch.save(weights, tmp_path / "sam.pth")
    with pytest.raises(UserError, match="which determine its windows"):
        vitrail.load(tmp_path / "sam.pth")
