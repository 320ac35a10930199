"""Compare every Hugging Face model type that vitrail reads with transformers: same random weights, two sizes.

    python bench/parity_huggingface.py

A row is the largest difference divided by the largest value, in the final tokens and in the output: logits, or pooled
vectors if the model has no classes. The models are small but otherwise configured like published ones. Then the model
is written in Hugging Face's layout: the row also has the difference of transformers' outputs with that folder, and
whether the weights are bit-identical. The exit code is 1 if a difference is above the limit. `--tiny` compares two
models.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Parser, record
from torch import Tensor

import vitrail
from vitrail.tasks.task import Task
from vitrail.zoo import huggingface

NAME = "parity-huggingface"
LIMIT = 1e-4
SIZE = (32, 32)
OTHER = (40, 24)
PATCH = 8
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 47,  # not a multiple of the width
    "image_size": SIZE[0],
    "patch_size": PATCH,
}
RATIO = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
PATCHES = {name: value for name, value in SMALL.items() if name != "image_size"} | {"num_patches": 16}
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
    "siglip2": of("Siglip2Model", "Siglip2Config", vision_config=PATCHES, text_config={**TEXT, "projection_size": 32}),
    "siglip2, image tower": of("Siglip2VisionModel", "Siglip2VisionConfig", **PATCHES),
}
"""a readable name, whose first word is the type in `config.json`"""


def parser() -> Parser:
    parser = Parser(__doc__, names=["vit, classes", "dinov2"])
    parser.set_defaults(names=[*MODELS])
    return parser


def main() -> int:
    asked = parser().parse_args()
    rows = {}
    for name in asked.names:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = compare(name, Path(folder))
        print(f"{name}: {worst_of(rows[name]):.1e}", file=sys.stderr, flush=True)
    record(NAME, rows, asked.results)
    worst = max(map(worst_of, rows.values()))
    print(f"{len(rows)} models of {len({name.split(',')[0] for name in rows})} types, largest difference {worst:.1e}")
    return int(worst > LIMIT or not all(row["same bits"] for row in rows.values()))


def worst_of(row: dict[str, Any]) -> float:
    found = [*row["sizes"].values(), *([row["written"]] if row["written"] else [])]
    return max(max(at["tokens"], at["outputs"]) for at in found)


def compare(name: str, folder: Path) -> dict[str, Any]:
    """The differences of one model at both sizes, and of the checkpoint that vitrail writes."""
    model = randomised(MODELS[name])
    model.save_pretrained(folder / "theirs")
    task = vitrail.load(folder / "theirs")
    sizes = {f"{size[0]}x{size[1]}": difference(task, model, size) for size in (SIZE, OTHER)}
    huggingface.write(task, folder / "ours")
    # SigLIP 2 with a fixed size is written as SigLIP, which is the same model at that size.
    written = difference(task, reload(folder / "ours")[0], SIZE)
    bits = vitrail.load(folder / "ours").state_dict()
    same = all(torch.equal(bits[key], value) for key, value in task.state_dict().items())
    return {
        "class": type(model).__name__,
        "outputs": "logits" if has_classes(model) else "pooled",
        "transformers": transformers.__version__,
        "sizes": sizes,
        "written": written,
        "same bits": same,
    }


def randomised(make: Callable[[], Any], seed: int = 0) -> Any:
    """A model with every parameter random, also norms, layer scales, registers and tables."""
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def reload(folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model from a folder, by the class in its config, and its report on the names of weights."""
    config = json.loads((folder / "config.json").read_text())
    maker = getattr(transformers, config["architectures"][0])
    model, report = maker.from_pretrained(folder, output_loading_info=True)
    return model.eval(), report


def has_classes(model: Any) -> bool:
    return hasattr(model, "classifier") or hasattr(model, "cls_classifier")


@torch.no_grad()
def difference(task: Task, model: Any, size: tuple[int, int]) -> dict[str, float]:
    """The largest difference divided by the largest value."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    tokens, outputs = theirs(model, images)
    ours = task.features(images)
    assert ours.grid == (size[0] // PATCH, size[1] // PATCH)
    return {
        "tokens": relative(torch.cat([ours.prefix, ours.patches], 1), tokens),
        "outputs": relative(task(images), outputs),
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    found = float((ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max())
    return found if found == found else float("inf")


@torch.no_grad()
def theirs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' tokens [B, P + N, D], and its logits or, without classes, its pooled vectors."""
    kind = model.config.model_type
    tower = getattr(model, "vision_model", None) or (model if "dinov3" in kind else model.base_model)
    more: dict[str, Any] = {}
    if kind.startswith("siglip2"):
        return _siglip2(tower, images)
    if "vit_mae" in kind:
        patches = images.shape[2] // PATCH * (images.shape[3] // PATCH)
        more["noise"] = torch.arange(patches).expand(len(images), -1)  # nothing is masked or shuffled
    if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        more["interpolate_pos_encoding"] = True
    encoded = tower(images, **more)
    tokens = encoded.last_hidden_state
    if has_classes(model):
        # In some releases classifiers do not pass arguments to their vision tower.
        with tower.register_forward_pre_hook(lambda _, args, named: (args, named | more), with_kwargs=True):
            return tokens, model(images).logits
    if hasattr(model, "get_image_features"):
        features = model.get_image_features(images, **more)
        return tokens, features if isinstance(features, Tensor) else features.pooler_output  # transformers 4, and 5
    if hasattr(model, "visual_projection"):
        return tokens, model(images, **more).image_embeds
    pooled = encoded.get("pooler_output")
    if pooled is None:
        averaged = tokens.mean(1) if kind in ("ijepa", "siglip_vision_model") else tokens[:, 0]
        pooled = tokens[:, 1:].mean(1) if getattr(model.config, "use_mean_pooling", False) else averaged
    return tokens, pooled


def _siglip2(tower: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """These models take patches, row by row with channels last, and the number of patches."""
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    mask, shapes = torch.ones(len(images), rows * columns), torch.tensor([[rows, columns]] * len(images))
    # In transformers 4 the argument has another name in a vision tower.
    takes = inspect.signature(tower.forward).parameters
    name = "pixel_attention_mask" if "pixel_attention_mask" in takes else "attention_mask"
    encoded = tower(patches, spatial_shapes=shapes, **{name: mask})
    return encoded.last_hidden_state, encoded.pooler_output


if __name__ == "__main__":
    logging.getLogger("vitrail").setLevel(logging.ERROR)
    sys.exit(main())
