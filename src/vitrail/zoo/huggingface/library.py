"""transformers itself, if installed: not needed to read or write its files."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitrail.hf import quiet
from vitrail.zoo.source import Files

IGNORED = ("model_type", "dtype", "torch_dtype", "attn_implementation", "quantization_config", "auto_map")
"""config entries that do not affect a model's outputs, and that may name code to download"""


def reference(files: Files) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """transformers' own model on normalised images; None if it is missing or has no such model."""
    text = files.json["config.json"]
    if importlib.util.find_spec("transformers") is None or text["model_type"].startswith("siglip2"):
        return None  # SigLIP 2's models take patches and no images
    import transformers

    maker = getattr(transformers, (text.get("architectures") or ["AutoModel"])[0], None)
    if maker is None:
        return None
    values = {key: value for key, value in text.items() if key not in IGNORED and not key.startswith("_")}
    try:
        with quiet():
            config = transformers.AutoConfig.for_model(text["model_type"], **values)
            model, report = maker.from_pretrained(
                None, config=config, state_dict=dict(files.weights), dtype=torch.float32, output_loading_info=True
            )
    except Exception:  # an older release may raise any error
        return None
    # A pooler that is not in the file would be random, so it is not compared.
    if any("pooler" not in name for name in report["missing_keys"]) or report["mismatched_keys"]:
        return None
    model.eval()
    return lambda images: _outputs(model, images)


def _outputs(model: Any, images: Tensor) -> dict[str, Tensor]:
    tower = getattr(model, "vision_model", None) or (model if "dinov3" in model.config.model_type else model.base_model)
    takes = inspect.signature(tower.forward).parameters
    size = getattr(tower.config, "image_size", None)
    # At their own size positions are not interpolated; transformers cannot interpolate positions of non-square grids.
    other = [*images.shape[2:]] != (list(size) if isinstance(size, list | tuple) else [size, size])
    more: dict[str, Any] = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes and other else {}
    if "noise" in takes:  # MAE: keep every patch, in its place
        model.config.mask_ratio = tower.config.mask_ratio = 0.0
        patches = math.prod(side // model.config.patch_size for side in images.shape[2:])
        more["noise"] = torch.arange(patches, dtype=images.dtype).expand(len(images), -1)
    found = {"tokens": tower(images, **more).last_hidden_state}
    if hasattr(model, "classifier") or hasattr(model, "cls_classifier"):
        # Not every release's classifiers pass arguments on to their tower.
        with tower.register_forward_pre_hook(lambda _, args, named: (args, named | more), with_kwargs=True):
            found["logits"] = model(images).logits
    return found
