"""Hugging Face folders: the same tokens and outputs as transformers' own models, in and out."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vitrail
from vitrail.errors import UserError
from vitrail.tasks.encoder import encoder_of
from vitrail.zoo import huggingface
from vitrail.zoo.files import open_files
from vitrail.zoo.huggingface.kinds import KINDS
from vitrail.zoo.huggingface.processor import preprocess, settings, settings_of

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    """A module of bench/parity.py, whose models and comparison are the ones here."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "bench"))


peer, relative = load("peers.huggingface"), load("peers.comparison").relative
MODELS, SMALL, SIZE, NAMES = peer.MODELS, peer.SMALL, peer.SIZE, peer.NAMES
randomised, reload, difference = peer.randomised, peer.reload, peer.difference
OTHER = (40, 24)


def worst(task: Any, model: Any, size: tuple[int, int]) -> float:
    return max(difference(task, model, size).values())


def test_the_models_are_of_every_type_that_is_read() -> None:
    assert {make().config.model_type for make in MODELS.values()} == set(KINDS)


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_again(name: str, tmp_path: Path) -> None:
    """transformers' outputs here; the written folder gives them there and comes back with the same bits."""
    model = randomised(MODELS[name])
    model.save_pretrained(tmp_path / "theirs")
    task = vitrail.load(tmp_path / "theirs")
    assert task.classes == (["cat", "dog", "fish"] if model.config.id2label.get(0) == "cat" else [])
    assert worst(task, model, SIZE) < 1e-5
    assert worst(task, model, OTHER) < 1e-5

    huggingface.write(task, tmp_path / "ours")
    written, report = reload(tmp_path / "ours")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert worst(task, written, SIZE) < 1e-5
    back = vitrail.load(tmp_path / "ours")
    # SigLIP 2 of a fixed size is SigLIP, whose positions fit other sizes in another way.
    assert encoder_of(back).config == encoder_of(task).config or "siglip2" in name
    assert back.preprocess == task.preprocess
    assert back.classes == task.classes
    bits = back.state_dict()
    assert bits.keys() == task.state_dict().keys()
    assert all(torch.equal(bits[key], value) for key, value in task.state_dict().items())


SOME = ["vit, classes", "deit, distilled", "dinov2, classes", "dinov3_vit, gated", "beit", "clip", "siglip2"]


@pytest.mark.parametrize("name", SOME)
def test_half_precision_in_shards(name: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name]).half()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    task = vitrail.load(tmp_path)
    assert {value.dtype for value in task.parameters()} == {torch.float32}
    whole = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert worst(task, whole, SIZE) < 1e-5
    assert {value.dtype for value in vitrail.load(tmp_path, dtype=torch.float16).parameters()} == {torch.float16}


@pytest.mark.parametrize("name", SOME)
def test_a_training_checkpoint_of_a_model_in_parallel(name: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name])
    model.config.save_pretrained(tmp_path)
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert worst(vitrail.load(tmp_path), model, SIZE) < 1e-5


@pytest.mark.parametrize("name", SOME[:5])
def test_names_as_models_have_them_in_memory(name: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert worst(vitrail.load(tmp_path), model, SIZE) < 1e-5


def test_a_size_that_patches_do_not_divide(tmp_path: Path) -> None:
    """SigLIP so400m has 384 pixels in patches of 14: the last pixels are not read."""
    model = randomised(peer.of("SiglipVisionModel", "SiglipVisionConfig", **{**SMALL, "image_size": 30}))
    model.save_pretrained(tmp_path)
    task = vitrail.load(tmp_path)
    images = torch.randn(1, 3, 30, 30)
    tokens, pooled = peer.theirs(model, images)
    assert task.preprocess.size == (30, 30)
    assert relative(task.features(images).patches, tokens) < 1e-5 and relative(task(images), pooled) < 1e-5


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


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 40, "width": 24}, "resample": 2},
    "DeiTImageProcessor": {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
    "BitImageProcessor": {"size": {"shortest_edge": 32}, "image_mean": [0.1, 0.2, 0.3], "crop_size": 32},
    "SiglipImageProcessor": {"size": {"height": 32, "width": 32}, "do_normalize": False},
    "BeitImageProcessor": {
        "size": {"height": 32, "width": 32},
        "do_center_crop": False,  # transformers 4 crops 224x224 unless told otherwise, and pads for it
        "do_rescale": False,
        "image_std": [60.0, 70.0, 80.0],
    },
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_by_the_processor(name: str, tmp_path: Path) -> None:
    processor = getattr(transformers, name)(**PROCESSORS[name])
    image = some_image()
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    processor.save_pretrained(tmp_path)
    texts = {"preprocessor_config.json": json.loads((tmp_path / "preprocessor_config.json").read_text())}
    values = settings(texts)
    assert values is not None
    ours = preprocess(values, KINDS["vit"], (32, 32), 3)
    step = 1 / 255 / min(ours.std)  # one step of a byte: the two resize with other roundings
    assert ours(image).shape == theirs.shape
    assert float((ours(image) - theirs).abs().max()) < 1.5 * step

    again = getattr(transformers, settings_of(ours)["image_processor_type"])(**settings_of(ours))
    assert float((ours(image) - again(image, return_tensors="pt").pixel_values[0]).abs().max()) < 1.5 * step
    assert preprocess(settings_of(ours), KINDS["vit"], (32, 32), 3) == ours


def test_a_crop_larger_than_the_image_is_refused() -> None:
    crop = {"size": {"height": 32, "width": 32}, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}}
    with pytest.raises(UserError, match="resizes images to 32x32 and crops 48x48 of them"):
        preprocess(crop, KINDS["vit"], (32, 32), 3)


def some_image() -> Image.Image:
    """Smooth, so that resizing has little to decide."""
    x, y = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 70), indexing="xy")
    colours = torch.stack([x, y, (x + y) / 2], dim=-1)
    return Image.fromarray((colours * 255).to(torch.uint8).numpy())


def test_without_a_processor_the_published_settings_stand_in_and_are_logged(
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
    "dinov2": {"layer_scale": 0.1, "resampling": "bicubic"},
    "dinov2_with_registers": {"layer_scale": 0.1, "registers": 4, "pool": "token_average", "classes": 3},
    "beit": {"pool": "average", "norm_after": False, "norm_pooled": True, "key_bias": False},
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
        assert relative(model(images), expected) < 1e-5
    back = vitrail.load(tmp_path / "out")
    bits = back.state_dict()
    assert all(torch.equal(bits[key], value) for key, value in model.state_dict().items())
    assert relative(back(images), model(images)) < 1e-6


ROTARY = {"rotary": "centred", "rotary_temperature": 100.0, "rotary_pairs": "halves", "key_bias": False}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stem": ({"stem": (8, 16)}, "stem"),
    "qk_norm": ({"qk_norm": True}, "qk_norm"),
    "rms": ({"norm": "rms"}, "norm='rms'"),
    "pre-training head": ({"classes": 3, "hidden": 16}, "hidden layer"),
    "MAP head and classes": ({"pool": "attention", "class_token": False, "classes": 3}, "pool='attention'"),
    "rotary and classes": (
        {"positions": "none", "classes": 3, "layer_scale": 1.0, **ROTARY},
        "a classifier in its type dinov3_vit",
    ),
    "two sides": ({"layer_scale": 0.1, "image_size": (32, 48)}, r"image_size=\(32, 48\)"),
    "average beside a class token": ({"pool": "average", "classes": 3}, "pool='average'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_type_expresses_is_refused_by_name(name: str, tmp_path: Path) -> None:
    values, reason = REFUSED[name]
    model = vitrail.create("micro/4", **{"patch": 8, "image_size": (32, 32), **values})
    with pytest.raises(UserError, match=reason):
        huggingface.write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_own_model_is_the_reference(tmp_path: Path) -> None:
    for name in ("vit_mae, decoder", "dinov2, classes", "clip, classes"):
        model = randomised(MODELS[name])
        model.save_pretrained(tmp_path / name)
        make = huggingface.reference(open_files(tmp_path / name))
        assert make is not None
        images = torch.randn(1, 3, *SIZE)
        tokens, last = peer.theirs(model, images)
        with torch.no_grad():
            found = make(images)
        assert relative(found["tokens"], tokens) < 1e-6
        assert "classes" not in name or relative(found["logits"], last) < 1e-6
