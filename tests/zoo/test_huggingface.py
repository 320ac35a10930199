"""Hugging Face folders: the same tokens and outputs as transformers' own models, in and out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitrail
from vitrail.errors import UserError
from vitrail.layers import Variant
from vitrail.zoo import huggingface
from vitrail.zoo.files import open_files
from vitrail.zoo.huggingface.kinds import KINDS
from vitrail.zoo.huggingface.processor import preprocess, settings, settings_of

transformers = pytest.importorskip("transformers")

SIZE = 32
OTHER = (40, 24)
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 47,  # no multiple of the width
    "image_size": SIZE,
    "patch_size": 8,
}
RATIO = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 11,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {"id2label": {0: "cat", 1: "dog", 2: "fish"}, "label2id": {"cat": 0, "dog": 1, "fish": 2}}


def of(model: str, config: str, **values: Any) -> Callable[[], Any]:
    """A maker of a transformers model with random weights."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**values))


TABLES = {"use_relative_position_bias": True, "layer_norm_eps": 1e-6}
MODELS: dict[str, Callable[[], Any]] = {
    "vit": of("ViTModel", "ViTConfig", **SMALL, pooler_output_size=20),
    "vit, no pooler": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL), add_pooling_layer=False),
    "vit, classes": of("ViTForImageClassification", "ViTConfig", **SMALL, **NAMES, qkv_bias=False, hidden_act="relu"),
    "vit, masked images": of("ViTForMaskedImageModeling", "ViTConfig", **SMALL, encoder_stride=8),
    "deit": of("DeiTModel", "DeiTConfig", **SMALL),
    "deit, classes": of("DeiTForImageClassification", "DeiTConfig", **SMALL, **NAMES),
    "deit, distilled": of("DeiTForImageClassificationWithTeacher", "DeiTConfig", **SMALL, **NAMES),
    "dinov2": of("Dinov2Model", "Dinov2Config", **RATIO),
    "dinov2, classes": of("Dinov2ForImageClassification", "Dinov2Config", **RATIO, **NAMES, use_swiglu_ffn=True),
    "dinov2_with_registers": of("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **RATIO, use_swiglu_ffn=True),
    "dinov2_with_registers, classes": of(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **RATIO, **NAMES
    ),
    "dinov3_vit": of("DINOv3ViTModel", "DINOv3ViTConfig", **SMALL, num_register_tokens=3),
    "dinov3_vit, gated": of(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        **SMALL,
        use_gated_mlp=True,
        hidden_act="silu",
        key_bias=True,
        query_bias=False,
        proj_bias=False,
        mlp_bias=False,
    ),
    "clip": of("CLIPModel", "CLIPConfig", vision_config=SMALL, text_config=TEXT, projection_dim=24),
    "clip, classes": of("CLIPForImageClassification", "CLIPConfig", vision_config=SMALL, text_config=TEXT, **NAMES),
    "clip_vision_model": of("CLIPVisionModel", "CLIPVisionConfig", **SMALL),
    "clip_vision_model, projected": of("CLIPVisionModelWithProjection", "CLIPVisionConfig", **SMALL, projection_dim=24),
    "siglip": of("SiglipModel", "SiglipConfig", vision_config=SMALL, text_config=TEXT),
    "siglip, classes": of(
        "SiglipForImageClassification", "SiglipConfig", vision_config=SMALL, text_config=TEXT, **NAMES
    ),
    "siglip_vision_model": of("SiglipVisionModel", "SiglipVisionConfig", **SMALL),
    "siglip_vision_model, no head": of("SiglipVisionModel", "SiglipVisionConfig", **SMALL, vision_use_head=False),
    "vit_mae": of("ViTMAEModel", "ViTMAEConfig", **SMALL, mask_ratio=0.0),
    "vit_mae, decoder": of(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        **SMALL,
        mask_ratio=0.0,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    ),
    "vit_msn": of("ViTMSNModel", "ViTMSNConfig", **SMALL),
    "vit_msn, classes": of("ViTMSNForImageClassification", "ViTMSNConfig", **SMALL, **NAMES),
    "ijepa": of("IJepaModel", "IJepaConfig", **SMALL),
    "ijepa, classes": of("IJepaForImageClassification", "IJepaConfig", **SMALL, **NAMES),
    "beit": of("BeitModel", "BeitConfig", **SMALL, **TABLES),
    "beit, classes": of(
        "BeitForImageClassification", "BeitConfig", **SMALL, **NAMES, use_shared_relative_position_bias=True
    ),
    "beit, masked images": of(
        "BeitForMaskedImageModeling",
        "BeitConfig",
        **SMALL,
        **TABLES,
        use_mask_token=True,
        use_mean_pooling=False,
        use_absolute_position_embeddings=True,
        vocab_size=9,
        layer_scale_init_value=0.0,
    ),
    "data2vec-vision": of("Data2VecVisionModel", "Data2VecVisionConfig", **SMALL, **TABLES),
    "data2vec-vision, classes": of(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", **SMALL, **TABLES, **NAMES
    ),
}


def randomised(make: Callable[[], Any], seed: int = 0) -> Any:
    """A model whose every parameter is random, norms, layer scales, registers and tables too."""
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' tokens [B, P + N, D], and its logits or else its pooled vectors."""
    more: dict[str, Any] = {}
    if "vit_mae" in model.config.model_type:
        patches = images.shape[2] // 8 * (images.shape[3] // 8)
        more["noise"] = torch.arange(patches).expand(len(images), -1)  # nothing is masked or shuffled
    tower = getattr(model, "vision_model", None) or (model if "dinov3" in model.config.model_type else model.base_model)
    if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        more["interpolate_pos_encoding"] = True
    encoded = tower(images, **more)
    tokens = encoded.last_hidden_state
    if hasattr(model, "classifier") or hasattr(model, "cls_classifier"):
        return tokens, model(images, **more).logits
    if hasattr(model, "get_image_features"):
        return tokens, model.get_image_features(images, **more).pooler_output
    if hasattr(model, "visual_projection"):
        return tokens, model(images, **more).image_embeds
    pooled = encoded.get("pooler_output")
    if pooled is None:
        without_class_token = model.config.model_type in ("ijepa", "siglip_vision_model")
        averaged = tokens.mean(1) if without_class_token else tokens[:, 0]
        pooled = tokens[:, 1:].mean(1) if getattr(model.config, "use_mean_pooling", False) else averaged
    return tokens, pooled


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def worst(task: Any, model: Any, size: tuple[int, int]) -> float:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    tokens, pooled = outputs(model, images)
    ours = task.features(images)
    assert ours.grid == (size[0] // 8, size[1] // 8)
    return max(difference(torch.cat([ours.prefix, ours.patches], 1), tokens), difference(task(images), pooled))


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_again(name: str, tmp_path: Path) -> None:
    """transformers' outputs here; the written folder gives them there and comes back with the same bits."""
    model = randomised(MODELS[name])
    model.save_pretrained(tmp_path / "theirs")
    task = vitrail.load(tmp_path / "theirs")
    assert task.classes == (["cat", "dog", "fish"] if model.config.id2label.get(0) == "cat" else [])
    assert worst(task, model, (SIZE, SIZE)) < 1e-5
    assert worst(task, model, OTHER) < 1e-5

    huggingface.write(task, tmp_path / "ours")
    written, report = reload(tmp_path / "ours")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert worst(task, written, (SIZE, SIZE)) < 1e-5
    back = vitrail.load(tmp_path / "ours")
    assert back.encoder.config == task.encoder.config and back.preprocess == task.preprocess
    assert back.classes == task.classes
    bits = back.state_dict()
    assert bits.keys() == task.state_dict().keys()
    assert all(torch.equal(bits[key], value) for key, value in task.state_dict().items())


def reload(folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a folder, by the class that its config names, and what it says of the names."""
    config = json.loads((folder / "config.json").read_text())
    maker = getattr(transformers, config["architectures"][0])
    model, report = maker.from_pretrained(folder, output_loading_info=True)
    return model.eval(), report


@pytest.mark.parametrize("name", ["vit, classes", "deit, distilled", "dinov2, classes", "dinov3_vit, gated", "beit"])
def test_names_as_models_have_them_in_memory(name: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert worst(vitrail.load(tmp_path), model, (SIZE, SIZE)) < 1e-5


@pytest.mark.parametrize("tower", [True, False])
def test_siglip2_at_its_fixed_size(tower: bool, tmp_path: Path) -> None:
    vision = {key: value for key, value in SMALL.items() if key != "image_size"} | {"num_patches": 16}
    kind = "Vision" if tower else ""
    values = vision if tower else {"vision_config": vision, "text_config": {**TEXT, "projection_size": 32}}
    model = randomised(of(f"Siglip2{kind}Model", f"Siglip2{kind}Config", **values))
    model.save_pretrained(tmp_path)
    task = vitrail.load(tmp_path)
    for rows, columns in ((4, 4), (5, 3)):
        images = torch.randn(2, 3, 8 * rows, 8 * columns)
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        mask, shapes = torch.ones(2, rows * columns), torch.tensor([[rows, columns]] * 2)
        vision_model = getattr(model, "vision_model", model)
        with torch.no_grad():
            theirs = vision_model(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
            assert difference(task.features(images).patches, theirs.last_hidden_state) < 1e-5
            assert difference(task(images), theirs.pooler_output) < 1e-5


def test_a_size_that_patches_do_not_divide(tmp_path: Path) -> None:
    """SigLIP so400m has 384 pixels in patches of 14: the last pixels are not read."""
    model = randomised(of("SiglipVisionModel", "SiglipVisionConfig", **{**SMALL, "image_size": 30}))
    model.save_pretrained(tmp_path)
    task = vitrail.load(tmp_path)
    images = torch.randn(1, 3, 30, 30)
    tokens, pooled = outputs(model, images)
    assert task.preprocess.size == (30, 30)
    assert difference(task.features(images).patches, tokens) < 1e-5 and difference(task(images), pooled) < 1e-5


def test_what_is_left_out_has_a_reason_and_the_rest_is_an_error(tmp_path: Path) -> None:
    model = randomised(MODELS["clip"])
    model.save_pretrained(tmp_path)
    found = huggingface.read(open_files(tmp_path))
    assert found.left["logit_scale"] and found.left["text_projection.weight"]
    assert any(name.startswith("text_model.") for name in found.left)
    assert not any(name.startswith("vision_model.") for name in found.left)

    weights = load_file(tmp_path / "model.safetensors")
    weights["vision_model.encoder.layers.9.mlp.fc1.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="layers.9"):
        vitrail.load(tmp_path)
    del weights["vision_model.encoder.layers.9.mlp.fc1.weight"], weights["vision_model.pre_layrnorm.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="pre_layrnorm.bias"):
        vitrail.load(tmp_path)


PROCESSORS = {
    "ViTImageProcessor": {"size": {"height": 40, "width": 24}, "resample": 2},
    "DeiTImageProcessor": {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
    "BitImageProcessor": {"size": {"shortest_edge": 32}, "image_mean": [0.1, 0.2, 0.3], "crop_size": 32},
    "SiglipImageProcessor": {"size": {"height": 32, "width": 32}, "do_normalize": False},
    "BeitImageProcessor": {"size": {"height": 32, "width": 32}, "do_rescale": False, "image_std": [60.0, 70.0, 80.0]},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_prepared_as_by_the_processor(name: str, tmp_path: Path) -> None:
    processor = getattr(transformers, name)(**PROCESSORS[name])
    image = picture()
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    processor.save_pretrained(tmp_path)
    texts = {"preprocessor_config.json": json.loads((tmp_path / "preprocessor_config.json").read_text())}
    ours = preprocess(settings(texts), KINDS["vit"], (32, 32), 3)
    step = 1 / 255 / min(ours.std)  # one step of a byte: the two resize with other roundings
    assert ours(image).shape == theirs.shape
    assert float((ours(image) - theirs).abs().max()) < 1.5 * step

    again = getattr(transformers, settings_of(ours)["image_processor_type"])(**settings_of(ours))
    assert float((ours(image) - again(image, return_tensors="pt").pixel_values[0]).abs().max()) < 1.5 * step
    assert preprocess(settings_of(ours), KINDS["vit"], (32, 32), 3) == ours


def picture() -> Image.Image:
    """Smooth, so that resizing has little to decide."""
    x, y = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 70), indexing="xy")
    colours = torch.stack([x, y, (x + y) / 2], dim=-1)
    return Image.fromarray((colours * 255).to(torch.uint8).numpy())


def test_without_a_processor_the_published_settings_stand_in_and_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    randomised(MODELS["deit"]).save_pretrained(tmp_path)
    task = vitrail.load(tmp_path)
    assert caplog.text.count("no preprocessor_config.json") == 1
    assert task.preprocess.resized(100, 50) == (37, 37) and task.preprocess.size == (32, 32)
    assert task.preprocess.mean == (0.485, 0.456, 0.406)


def test_classes_without_fitting_names_are_numbered(tmp_path: Path) -> None:
    randomised(MODELS["vit, classes"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id2label"]["2"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vitrail.load(tmp_path).classes == ["0", "1", "2"]


FRESH: dict[str, dict[str, Any]] = {
    "vit": {"classes": 3},
    "vit of two sides": {"classes": 3, "image_size": (32, 48)},
    "vit, sine positions": {"positions": "sine"},
    "vit, no positions": {"positions": "none", "classes": ["a", "b"], "channels": 5},
    "ijepa": {"class_token": False, "pool": "average", "classes": 3},
    "dinov2": {"layer_scale": 0.1, "variant": Variant(resampling="bicubic")},
    "dinov2_with_registers": {"layer_scale": 0.1, "registers": 4, "pool": "token_average", "classes": 3},
    "beit": {"pool": "average", "variant": Variant(norm_after=False, norm_pooled=True, key_bias=False)},
}


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_model_goes_out(name: str, tmp_path: Path) -> None:
    values = FRESH[name]
    size = values.get("image_size", (32, 32))
    model = vitrail.create("micro/4", **{"patch": 8, "activation": "gelu_tanh", "image_size": (32, 32), **values})
    randomised(lambda: model)
    huggingface.write(model, tmp_path / "out")
    written, report = reload(tmp_path / "out")
    assert written.config.model_type == name.split()[0].rstrip(",")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images = torch.randn(2, model.preprocess.channels, *size)
    with torch.no_grad():
        theirs = written(images)
        expected = theirs.logits if "classes" in values else theirs.pooler_output
        assert difference(model(images), expected) < 1e-5
    back = vitrail.load(tmp_path / "out")
    bits = back.state_dict()
    assert all(torch.equal(bits[key], value) for key, value in model.state_dict().items())
    assert difference(back(images), model(images)) < 1e-6


ROTARY = Variant(rotary="centred", rotary_temperature=100.0, rotary_pairs="halves", key_bias=False)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stem": ({"stem": (8, 16)}, "stem"),
    "qk_norm": ({"variant": Variant(qk_norm=True)}, "qk_norm"),
    "rms": ({"variant": Variant(norm="rms")}, "norm='rms'"),
    "pre-training head": ({"classes": 3, "hidden": 16}, "hidden layer"),
    "MAP head and classes": ({"pool": "attention", "class_token": False, "classes": 3}, "pool='attention'"),
    "rotary and classes": (
        {"positions": "none", "classes": 3, "layer_scale": 1.0, "variant": ROTARY},
        "a classifier in its type dinov3_vit",
    ),
    "two sides": ({"layer_scale": 0.1, "image_size": (32, 48)}, "32x48"),
    "average beside a class token": ({"pool": "average", "classes": 3}, "pool='average'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_type_expresses_is_refused_by_name(name: str, tmp_path: Path) -> None:
    values, part = REFUSED[name]
    model = vitrail.create("micro/4", **{"patch": 8, "image_size": (32, 32), **values})
    with pytest.raises(UserError, match=part):
        huggingface.write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_own_model_is_the_reference(tmp_path: Path) -> None:
    for name in ("vit_mae, decoder", "dinov2, classes"):
        model = randomised(MODELS[name])
        model.save_pretrained(tmp_path / name)
        make = huggingface.reference(open_files(tmp_path / name))
        assert make is not None
        images = torch.randn(1, 3, SIZE, SIZE)
        tokens, last = outputs(model, images)
        with torch.no_grad():
            found = make(images)
        assert difference(found["tokens"], tokens) < 1e-6
        assert "classes" not in name or difference(found["logits"], last) < 1e-6
