"""timm's constructor arguments to our config."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from vitrail.errors import UserError
from vitrail.variants import VariantConfig

Arguments = dict[str, Any]

DEFAULTS: Arguments = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
DEFAULTS |= {"in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": True}
"""arguments of all five classes"""

IRRELEVANT = frozenset(
    [
        *("num_classes", "weight_init", "fix_init", "head_init_scale", "use_naflex", "strict_img_size", "out_indices"),
        *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
        *("dynamic_img_size", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords", "in_chans", "class"),
        *("images", "img_size", "features_only"),
    ]
)
"""arguments about training, sizes or shapes that do not change what a model computes"""

POOLS = {"token": "token", "avg": "average", "map": "attention", "max": "max", "avgmax": "average_max"}

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu"}
ACTIVATIONS |= {"relu": "relu", "quickgelu": "quick_gelu", "gelutanh": "gelu_tanh"}

NORMS = {"layernorm": "layer", "rmsnorm": "rms"}


@cache
def table() -> dict[str, Arguments]:
    """The arguments of each architecture, written by bench/timm_models.py. Do not modify it: values are shared."""
    names: dict[str, Arguments] = json.loads((Path(__file__).parent / "models.json").read_text())
    common = names.pop("")["images"]
    return {name: own | {"images": common | own["images"]} for name, own in names.items()}


class Given:
    """Arguments that record which of them were read, so that unread ones can be refused."""

    def __init__(self, values: Arguments) -> None:
        self.values, self.used = values, set(IRRELEVANT)

    def __call__(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        value = self.values.get(name)
        return DEFAULTS.get(name, default) if value is None else value

    def finish(self) -> None:
        """Refuse unread arguments, unless they are off."""
        for name, value in self.values.items():
            if name not in self.used and value not in (None, False, 0, "", 1.0):
                raise UserError(f"timm's {name}={value!r} is not supported by vitrail for a {self.values['class']}")


def encoder_config(values: Arguments, size: tuple[int, int]) -> VariantConfig:
    """The config of a model that timm builds with these arguments (`class` is timm's class)."""
    given = Given(values)
    config = CLASSES[values["class"]](given, size)
    given.finish()
    return config


def _common(given: Given, size: tuple[int, int], variant: Arguments, **fields: Any) -> VariantConfig:
    """The fields shared by all classes; `variant` and `fields` are those of one class."""
    width, ratio, patch = given("embed_dim"), given("mlp_ratio"), _square(given("patch_size"))
    hidden = variant.pop("mlp_hidden", int(width * ratio))
    if hidden != int(width * ratio):
        variant["mlp_hidden"] = hidden
    floor = any(pixels % fields.get("patch", patch) for pixels in size)
    values: Arguments = {
        "width": width,
        "depth": given("depth"),
        "heads": given("num_heads"),
        "patch": patch,
        "image_size": size,
        "channels": given("in_chans"),
        "mlp_ratio": ratio,
        "qkv_bias": given("qkv_bias"),
        "layer_scale": given("init_values"),
    }
    return VariantConfig(**{**values, **fields, **variant, "floor_grid": floor})


def _vision_transformer(given: Given, size: tuple[int, int]) -> VariantConfig:
    pool, kind = _pool(given("global_pool", "token"), given("class_token", True)), "norm_layer"
    norm, eps = _norm(given(kind), 1e-6)
    hidden = int(given("embed_dim") * given("mlp_ratio"))
    pooled = given("fc_norm")
    pooled = pool in ("average", "max", "average_max") if pooled is None else pooled
    mlp = _name(given("mlp_layer", "Mlp"))
    if mlp not in ("Mlp", "SwiGLU", "GluMlp"):
        raise UserError(f"timm's mlp_layer={mlp!r} is not supported by vitrail")
    if (attention := given("attn_layer", "attn")) not in ("attn", "diff"):
        raise UserError(f"timm's attn_layer={attention!r} is not supported by vitrail")
    registers = given("reg_tokens", 0)
    variant: Arguments = {
        "resizing": given("resizing"),
        "norm": norm,
        "norm_patches": given("embed_norm_layer") is not None,
        "norm_before": given("pre_norm", False),
        "patch_bias": not given("pre_norm", False),
        "norm_after": given("final_norm", True) and not pooled,
        "norm_pooled": given("final_norm", True) and pooled,
        "arrangement": given("block", "pre"),
        "output_bias": given("proj_bias", True),
        "qk_norm": given("qk_norm", False),
        "attention_norm": given("scale_attn_norm", False),
        "differential": attention == "diff",
        "mlp": "plain" if mlp == "Mlp" else "gated",
        "mlp_norm": given("scale_mlp_norm", False),
        "prefix_positions": _prefix_positions(given("no_embed_class", False), registers),
        "pool_prefix": given("pool_include_prefix", False),
        **({"mlp_hidden": hidden // 2} if mlp == "GluMlp" else {}),
        **_backbone(given),
    }
    if given("class") == "VisionTransformerDistilled":
        variant["distillation"], pool = True, "distilled"
    fields: Arguments = {"layer_scale": None} if variant["arrangement"] == "post" else {}
    if variant["backbone"] != "none":
        fields["patch"] = _stride(variant) * _square(given("patch_size"))
    if pool == "attention" and "mlp_hidden" in variant:
        variant["pool_hidden"] = hidden
    learned = given("pos_embed", "learn") == "learn"
    return _common(
        given,
        size,
        variant,
        class_token=given("class_token", True),
        registers=registers,
        pool=pool,
        positions="learned" if learned else "none",
        activation=_activation(given("act_layer", "gelu")),
        norm_eps=eps,
        **fields,
    )


def _eva(given: Given, size: tuple[int, int]) -> VariantConfig:
    pool = _pool(given("global_pool", "avg"), given("class_token", True))
    norm, eps = _norm(given("norm_layer"), 1e-6)
    pooled, after = given("use_fc_norm"), given("use_post_transformer_norm")
    pooled = pool == "average" if pooled is None else pooled
    width, heads, ratio = given("embed_dim"), given("num_heads"), given("mlp_ratio")
    hidden, gated = int(width * ratio), given("swiglu_mlp", False)
    if gated and (align := given("swiglu_align_to", 0)):
        hidden += -hidden % align
    kv_heads = given("num_kv_heads")
    kv_heads = [kv_heads] * given("depth") if isinstance(kv_heads, int) else list(kv_heads or [])
    if len(kv_heads) not in (0, given("depth")):
        raise UserError(
            f"timm's num_kv_heads has {len(kv_heads)} numbers: it needs one for each of {given('depth')} blocks"
        )
    registers = given("num_reg_tokens", 0)
    pool_heads, pool_ratio = given("attn_pool_num_heads", heads), given("attn_pool_mlp_ratio", ratio)
    given("qkv_fused"), given("swiglu_align_to")  # storage of weights, and arguments of gates only
    variant: Arguments = {
        "norm": norm,
        "norm_before": given("use_pre_transformer_norm", False),
        "patch_bias": not given("use_pre_transformer_norm", False),
        "norm_after": not pooled if after is None else after,
        "norm_pooled": pooled,
        "arrangement": "post" if given("use_post_norm", False) else "pre",
        "layer_scale_on": "attention" if given("attn_only_layer_scale", False) else "both",
        "key_bias": given("attn_type", "eva") == "rope" or not given("qkv_bias"),
        "qk_norm": given("qk_norm", False),
        "attention_norm": given("scale_attn_inner", False),
        "kv_heads": () if all(n == heads for n in kv_heads) else tuple(kv_heads),
        "mlp": "gated" if gated else "plain",
        "mlp_hidden": hidden,
        "mlp_norm": given("scale_mlp", False),
        "prefix_positions": _prefix_positions(given("no_embed_class", False), registers),
        **_rotary(given),
    }
    if pool == "attention":
        variant |= {
            "pool_prefix": True,
            "pool_heads": pool_heads,
            "pool_hidden": int(width * pool_ratio),
            "pool_activation": "gelu",
        }
    return _common(
        given,
        size,
        variant,
        class_token=given("class_token", True),
        registers=registers,
        pool=pool,
        positions="learned" if given("use_abs_pos_emb", True) else "none",
        activation="silu" if gated else "gelu",
        norm_eps=eps,
        **({"layer_scale": None} if variant["arrangement"] == "post" else {}),
    )


def _beit(given: Given, size: tuple[int, int]) -> VariantConfig:
    pool = _pool(given("global_pool", "avg"), True)
    norm, eps = _norm(given("norm_layer"), 1e-6)
    pooled = given("use_fc_norm")
    pooled = pool == "average" if pooled is None else pooled
    own, shared = given("use_rel_pos_bias", False), given("use_shared_rel_pos_bias", False)
    gated = given("swiglu_mlp", False)
    variant: Arguments = {
        "norm": norm,
        "norm_after": not pooled,
        "norm_pooled": pooled,
        "key_bias": not given("qkv_bias"),
        "mlp": "gated" if gated else "plain",
        "mlp_norm": given("scale_mlp", False),
        "relative": {(True, True): "both", (True, False): "table", (False, True): "shared"}.get((own, shared), "none"),
    }
    positions = "learned" if given("use_abs_pos_emb", True) else "none"
    activation = "silu" if gated else "gelu"
    return _common(given, size, variant, pool=pool, positions=positions, activation=activation, norm_eps=eps)


def _sam(given: Given, size: tuple[int, int]) -> VariantConfig:
    norm, eps = _norm(given("norm_layer"), 1e-5)
    if given("use_rope", False) or given("head_hidden_size"):
        raise UserError("timm's use_rope and head_hidden_size of a VisionTransformerSAM are not supported by vitrail")
    neck = given("neck_chans", 0 if "neck_chans" in given.values else 256)
    blocks = given("global_attn_indexes", ())
    window = given("window_size", 14)
    variant: Arguments = {
        "norm": norm,
        "norm_before": given("pre_norm", False),
        "patch_bias": not given("pre_norm", False),
        "norm_after": not neck,
        "norm_after_eps": None if neck else 1e-6,
        "neck": neck or None,
        "qk_norm": given("qk_norm", False),
        "relative": "decomposed" if given("use_rel_pos", False) else "none",
        "window": window,
        "global_blocks": tuple(i for i in blocks if i < given("depth")) if window else (),
    }
    pool = _pool(given("global_pool", "avg"), False)
    if _name(given("mlp_layer", "Mlp")) != "Mlp":
        raise UserError("timm's mlp_layer of a VisionTransformerSAM is not supported by vitrail")
    return _common(
        given,
        size,
        variant,
        class_token=False,
        pool=pool,
        positions="learned" if given("use_abs_pos", True) else "none",
        activation=_activation(given("act_layer", "gelu")),
        norm_eps=eps,
    )


CLASSES: dict[str, Callable[[Given, tuple[int, int]], VariantConfig]] = {
    "VisionTransformer": _vision_transformer,
    "VisionTransformerDistilled": _vision_transformer,
    "Eva": _eva,
    "Beit": _beit,
    "VisionTransformerSAM": _sam,
}


def _rotary(given: Given) -> Arguments:
    kinds = {"cat": "axial", "dinov3": "centred", "mixed": "mixed"}
    kind, offset, reference = given("rope_type", "cat"), given("rope_grid_offset", 0.0), given("ref_feat_shape")
    temperature, half = given("rope_temperature", 10_000.0), given("rope_rotate_half", False)
    columns = given("rope_grid_indexing", "ij") == "xy"
    if not given("use_rot_pos_emb", False):
        return {}
    if kind not in kinds or (kind != "cat" and offset):
        raise UserError(f"timm's rope_type={kind!r} with rope_grid_offset={offset} is not supported by vitrail")
    if reference is not None:
        reference = (reference, reference) if isinstance(reference, int) else tuple(reference)
    return {
        "rotary": kinds[kind],
        "rotary_temperature": float(temperature),
        "rotary_reference": reference if kind == "cat" else None,
        "rotary_offset": offset,
        "rotary_first": "columns" if columns else "rows",
        "rotary_pairs": "halves" if half else "neighbours",
    }


def _backbone(given: Given) -> Arguments:
    return {"backbone": given("backbone", "none"), "backbone_layers": tuple(given("backbone_layers", ()))}


def _stride(variant: Arguments) -> int:
    """Pixels per position of the backbone's feature map, or per projected patch after plain convolutions."""
    layers = variant["backbone_layers"]
    return 4 * 2 ** len(layers) if variant["backbone"] == "conv" else 4 * 2 ** max(0, len(layers) - 1)


def _prefix_positions(without: bool, registers: int) -> str:
    return "none" if without else "all" if registers else "class"


def _pool(name: str, class_token: bool) -> str:
    if not name:
        return "token" if class_token else "average"
    if name not in POOLS:
        raise UserError(f"timm's global_pool={name!r} is not supported by vitrail: choose from {', '.join(POOLS)}")
    return POOLS[name]


def _norm(value: Any, eps: float) -> tuple[str, float]:
    """Kind and epsilon of a norm layer, given as a name or a name with keywords."""
    if value is None:
        return "layer", eps
    name = _name(value).lower()
    if name not in NORMS:
        raise UserError(f"timm's norm_layer={name!r} is not supported by vitrail: choose from {', '.join(NORMS)}")
    return NORMS[name], value.get("eps", 1e-6) if isinstance(value, dict) else 1e-6


def _activation(value: Any) -> str:
    name = _name(value).lower()
    if name not in ACTIVATIONS:
        raise UserError(f"timm's act_layer={name!r} is not supported by vitrail: choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _name(value: Any) -> str:
    return str(value["name"] if isinstance(value, dict) else value)


def _square(value: Any) -> int:
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise UserError(f"patches of {value[0]}x{value[1]} pixels are not supported by vitrail: they must be square")
    return int(value[0])


def plainness(name: str) -> tuple[bool, int, str]:
    """Plain ViTs first, then architectures with fewer arguments."""
    values = table()[name]
    return not name.startswith("vit_"), len([k for k in values if k != "images"]), name
