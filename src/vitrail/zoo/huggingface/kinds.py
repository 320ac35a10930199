"""Names of modules in transformers' model types, and defaults for values that a folder omits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vitrail.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from vitrail.variants.config import Activation

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""transformers' names to ours; of several the first is used for writing"""


class Spelling(NamedTuple):
    """transformers' names of modules. Files on the Hub and models in memory differ for some types."""

    patches: str = "embeddings.patch_embeddings.projection"
    class_token: str = "embeddings.cls_token"
    distillation: str = "embeddings.distillation_token"
    registers: str = "embeddings.register_tokens"
    positions: str = "embeddings.position_embeddings"
    norm_before: str = "pre_layrnorm"
    norm: str = "layernorm"
    norm_pooled: str = "pooler.layernorm"
    shared_table: str = "encoder.relative_position_bias.relative_position_bias_table"
    block: str = "encoder.layer.{}."
    query: str = "attention.attention.query"
    key: str = "attention.attention.key"
    value: str = "attention.attention.value"
    out: str = "attention.output.dense"
    table: str = "attention.attention.relative_position_bias.relative_position_bias_table"
    norm1: str = "layernorm_before"
    norm2: str = "layernorm_after"
    scale1: str = "lambda_1"
    scale2: str = "lambda_2"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    gate: str | None = None
    """the gate besides `up`; None if `up` holds both, the gate first"""
    gated: tuple[str, str] | None = None
    """other names of `up` and `down` in a gated MLP"""


VIT = Spelling()
VIT_IN_MEMORY = VIT._replace(
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    block="layers.{}.",
    up="mlp.fc1",
    down="mlp.fc2",
    table="relative_position_bias.relative_position_bias_table",
    shared_table="shared_position_bias.relative_position_bias_table",
)
DINOV2 = VIT._replace(
    norm1="norm1",
    norm2="norm2",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
    up="mlp.fc1",
    down="mlp.fc2",
    gated=("mlp.weights_in", "mlp.weights_out"),
)
DINOV2_IN_MEMORY = DINOV2._replace(
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    gate="mlp.gate_proj",
    gated=("mlp.up_proj", "mlp.down_proj"),
)
DINOV3 = DINOV2_IN_MEMORY._replace(
    patches="embeddings.patch_embeddings",
    norm="norm",
    block="layer.{}.",
    up="mlp.up_proj",
    down="mlp.down_proj",
    gated=None,
)
DINOV3_IN_MEMORY = DINOV3._replace(block="model.layer.{}.")
CLIP = Spelling(
    patches="embeddings.patch_embedding",
    class_token="embeddings.class_embedding",
    positions="embeddings.position_embedding.weight",
    norm="post_layernorm",
    norm_pooled="post_layernorm",
    block="encoder.layers.{}.",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    norm1="layer_norm1",
    norm2="layer_norm2",
    up="mlp.fc1",
    down="mlp.fc2",
)

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [*IMAGENET_MEAN], "image_std": [*IMAGENET_STD]}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
CROPPED = {"do_center_crop": True, "resample": 3}


@dataclass(frozen=True)
class Kind:
    """One `model_type`."""

    spellings: tuple[Spelling, ...]
    prefixes: tuple[str, ...]
    """prefix of the tower's names in models with more than the tower"""
    defaults: Mapping[str, Any]
    """transformers' defaults for values that `config.json` omits"""
    pixels: Mapping[str, Any]
    """`preprocessor_config.json` of the published checkpoints, for a folder without one; sizes follow the model's"""
    square: bool = True
    """whether a single number as size squashes the image; otherwise it is the shorter side"""
    enlarge: float = 1.0
    """factor by which the image is resized before the center crop"""


BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
BASE_DINOV2 = {**BASE, "intermediate_size": None, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
BASE_DINOV3 = {
    **BASE,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "num_register_tokens": 0,
    "use_gated_mlp": False,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
}
BASE_BEIT = {
    **BASE,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1,
    "use_mean_pooling": True,
}
BASE_CLIP = {**BASE, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
BASE_SIGLIP = {**BASE, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True}

KIND_CLIP = Kind((CLIP,), ("vision_model.", ""), BASE_CLIP, {**OPENAI, **CROPPED}, square=False)
KIND_SIGLIP = Kind((CLIP,), ("vision_model.", ""), BASE_SIGLIP, {**HALF, "resample": 3})
KIND_SIGLIP2 = Kind((CLIP,), ("vision_model.", ""), {**BASE_SIGLIP, "num_patches": 256}, {**HALF, "resample": 2})
KINDS: dict[str, Kind] = {
    "vit": Kind((VIT, VIT_IN_MEMORY), ("vit.", ""), BASE, {**HALF, "resample": 2}),
    "deit": Kind((VIT, VIT_IN_MEMORY), ("deit.", ""), BASE, {**IMAGENET, **CROPPED}, enlarge=256 / 224),
    "dinov2": Kind(
        (DINOV2, DINOV2_IN_MEMORY),
        ("dinov2.", ""),
        {**BASE_DINOV2, "patch_size": 14},
        {**IMAGENET, **CROPPED},
        square=False,
        enlarge=256 / 224,
    ),
    "dinov2_with_registers": Kind(
        (DINOV2, DINOV2_IN_MEMORY),
        ("dinov2_with_registers.", ""),
        {**BASE_DINOV2, "num_register_tokens": 4},
        {**IMAGENET, **CROPPED},
        square=False,
        enlarge=256 / 224,
    ),
    "dinov3_vit": Kind((DINOV3, DINOV3_IN_MEMORY), ("",), BASE_DINOV3, {**IMAGENET, "resample": 2}),
    "clip": KIND_CLIP,
    "clip_vision_model": KIND_CLIP,
    "siglip": KIND_SIGLIP,
    "siglip_vision_model": KIND_SIGLIP,
    "siglip2": KIND_SIGLIP2,
    "siglip2_vision_model": KIND_SIGLIP2,
    "vit_mae": Kind((VIT, VIT_IN_MEMORY), ("vit.", ""), BASE, {**IMAGENET, "resample": 2}),
    "vit_msn": Kind((VIT, VIT_IN_MEMORY), ("vit.", ""), {**BASE, "layer_norm_eps": 1e-6}, {**IMAGENET, "resample": 2}),
    "ijepa": Kind((VIT, VIT_IN_MEMORY), ("ijepa.", ""), BASE, {**IMAGENET, "resample": 2}),
    "beit": Kind((VIT, VIT_IN_MEMORY), ("beit.", ""), BASE_BEIT, {**HALF, "resample": 2}),
    "data2vec-vision": Kind((VIT,), ("data2vec_vision.", ""), BASE_BEIT, {**HALF, "resample": 3}),
}

LEFT = {
    r"text_model\.|text_projection\.": "the text tower: the image tower is read",
    r"logit_(scale|bias)$": "scales the comparison with texts",
    r"(.*\.)?mask_token$": "replaces masked patches in pre-training",
    r"decoder\.": "the decoder of pre-training",
    r"lm_head\.|layernorm\.": "the head of pre-training",
    r"(.*\.)?(decode_head|auxiliary_head|fpn\d?)\.": "the head for segmentation",
    r"embeddings\.register_tokens$": "there are none in it",
    r"(.*\.)?(position_ids|relative_position_index|inv_freq)$": "computed from the config",
    r"(.*\.)?(pooler\.dense|head|post_layernorm)\.": "the outputs of this type do not use it",
}
"""prefixes of names that may be left out, and why"""
