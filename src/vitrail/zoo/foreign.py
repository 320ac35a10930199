"""Checkpoints that vitrail cannot read: error lines that name the kind and the remedy."""

from __future__ import annotations

import math
import re

from vitrail.errors import UserError
from vitrail.zoo.source import Files

BLOCK = r"(^|\.)(blocks|layers?|encoder_layer_\d+|resblocks)\.(\d+\.)?.*\."
UNREADY = (
    (
        r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)",
        "LoRA's updates of a model's weights (peft)",
    ),
    (r"\.(base_layer|modules_to_save)\.", "a model with peft's layers in it"),
    (r"\.(absmax|quant_map|nested_absmax|SCB|qweight|qzeros|weight_scale|weight_packed)$", "quantised weights"),
    (r"\._packed_params(\.|$)|\.quant_state\.|\.weight_zero_point$", "quantised weights"),
    (r"(^|\.)_?flat_param(_\d+)?$", "a shard of FSDP's"),
    (BLOCK + r"(parametrizations\.|weight_orig$|weight_mask$)", "weights that are parametrised or pruned"),
)
"""a pattern of names, and the kind of checkpoint with such names, which are not final weights"""
REMEDIES = {
    "LoRA's": "merge them with merge_and_unload() and save the whole model",
    "a model with peft's": "call merge_and_unload() and save the model again",
    "quantised": "give the checkpoint in float32, float16 or bfloat16",
    "a shard": "gather the full state dict, and save that",
    "weights that": "make it permanent (remove_parametrizations or prune.remove), and save the model again",
}

FOREIGN = (
    (r"layers\.\d+\.blocks\..*relative_position_bias_table$|\.downsample\.reduction\.weight$", "a Swin Transformer"),
    (r"\.(dwconv|conv_dw|depthwise_conv|dwconv_layer)\.weight$", "a ConvNeXt or another convolutional network"),
    (
        r"^(.*\.)?layer1\.0\.conv1\.weight$|^(.*\.)?stages\.0\.(layers|blocks)\.0\.",
        "a ResNet or the like",
    ),
    (r"^features\.\d+\.|^conv_stem\.", "a convolutional network"),
    (r"(wte|embed_tokens|word_embeddings)\.weight$", "a language model"),
    (r"^(down_blocks|up_blocks)\.|^model\.diffusion_model\.", "a diffusion model"),
)
"""a pattern of weight names, and the kind of model"""

LAYOUTS = (
    (
        r"(^|\.)layers?\.0\.((attention\.)*(query|q_proj)|self_attn\.q_proj)\.weight$",
        "a model under Hugging Face's names without its config.json, which is needed to build it: put both into "
        "one folder, the weights as model.safetensors or pytorch_model.bin, and give the folder",
    ),
    (
        r"(^|\.)layers\.0\.ffn\.layers\.0\.0\.weight$",
        "a Vision Transformer under OpenMMLab's names (mmpretrain), which vitrail does not read: "
        "choose timm's or Hugging Face's checkpoint of it",
    ),
    (
        r"(^|\.)transformer\.resblocks\.0\.attn\.in_proj_weight$",
        "CLIP under OpenAI's names, which vitrail does not read: choose Hugging Face's checkpoint of it",
    ),
)
"""the same for ViTs that vitrail reads in another layout"""


def refuse_unready(files: Files) -> None:
    """Refuse checkpoints without final weights, before they are reported as damaged."""
    for name in files.weights:
        if what := next((what for pattern, what in UNREADY if re.search(pattern, name)), None):
            remedy = next(remedy for start, remedy in REMEDIES.items() if what.startswith(start))
            raise UserError(f"{files.path} holds {what}, such as {name}: {remedy}")
    if len(files.shapes) > 1 and not any(map(math.prod, files.shapes.values())):
        raise UserError(
            f"{files.path} holds names without values, as DeepSpeed's ZeRO-3 saves them: "
            "run its zero_to_fp32.py and give the file that it writes"
        )


def what_else(files: Files) -> str:
    """The content of files without a model for vitrail, and the remedy."""
    config = files.json.get("config.json", {})
    named = next((str(config[k]) for k in ("model_type", "architecture", "vitrail") if config.get(k)), None)
    if named is None and (layout := _first(LAYOUTS, files)):
        return f"holds {layout}"
    if (kind := _first(FOREIGN, files)) or named:
        what = " ".join(filter(None, [kind or "a model", f"named {named!r}" if named else None]))
        return f"holds {what}, not a plain Vision Transformer that vitrail can read: choose a ViT's checkpoint"
    names = ", ".join(sorted(files.weights, key=_of_optimizer)[:3])
    return f"holds no Vision Transformer that vitrail can read (weights such as {names}): choose a ViT's checkpoint"


def _first(table: tuple[tuple[str, str], ...], files: Files) -> str | None:
    return next((what for pattern, what in table if any(re.search(pattern, name) for name in files.weights)), None)


def _of_optimizer(name: str) -> bool:
    return re.match(r"(optim|opt|lr_|sched|callbacks|scaler|loops)", name) is not None
