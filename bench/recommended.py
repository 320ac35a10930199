"""Write parameters and memory of the recommended encoders to src/vitrail/recommended.json.

    python bench/recommended.py

The parameters are those of the encoder that vitrail builds for the architecture; no weights are downloaded. Memory is
that of training all weights with AdamW in float32: 16 bytes per parameter (weight, gradient, two moments), and what the
forward pass of 32 images of 224 pixels keeps for the backward pass, measured on one image. With `--results DIR` the
table is written to DIR/recommended.json, and the package's file does not change; `--tiny` does this for the smallest.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from harness import RESULTS, ROOT, Parser, record
from torch import Tensor

from vitrail.files import write_atomic
from vitrail.tasks.encoder import encoder_for
from vitrail.variants import VariantConfig, simplest
from vitrail.zoo.huggingface.encoder import encoder_config
from vitrail.zoo.huggingface.kinds import KINDS
from vitrail.zoo.timm import arguments

OUT = ROOT / "src" / "vitrail" / "recommended.json"
IMAGES, SIDE = 32, 224
DINOV2 = {"image_size": 518, "patch_size": 14}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "facebook/dinov2-small": ("dinov2", {**DINOV2, "hidden_size": 384, "num_attention_heads": 6}, set()),
    "facebook/dinov2-base": ("dinov2", DINOV2, set()),
    "facebook/dinov2-large": (
        "dinov2",
        {**DINOV2, "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
        set(),
    ),
    "openai/clip-vit-base-patch32": ("clip", {"projection_dim": 512}, {"projection"}),
}
"""for ids that are no names of timm: `model_type`, what differs from its defaults, and the modules that it has"""


def config_of(name: str) -> VariantConfig:
    """The architecture of a recommended encoder."""
    if name in HUGGING_FACE:
        kind, values, modules = HUGGING_FACE[name]
        return encoder_config(kind, {**KINDS[kind].defaults, **values}, modules)
    architecture = name.removeprefix("timm/").partition(".")[0]
    return arguments.encoder_config(arguments.table()[architecture], (SIDE, SIDE))


def measure(config: VariantConfig) -> dict[str, float]:
    """The parameters of an encoder, and the memory to train it."""
    encoder = encoder_for(simplest(config)).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(torch.rand(1, 3, SIDE, SIDE))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return {"parameters": parameters, "train_gb": round((16 * parameters + IMAGES * activations) / 1e9, 1)}


def parser() -> Parser:
    return Parser(__doc__)


def main() -> None:
    args = parser().parse_args()
    table = json.loads(OUT.read_text(encoding="utf-8"))
    names = list(table["encoders"])[:1] if args.tiny else list(table["encoders"])
    measured = {name: measure(config_of(name)) for name in names}
    for name, row in measured.items():
        table["encoders"][name] |= row
        print(name, row)
    if args.results != RESULTS:
        record("recommended", measured, args.results)
        return
    write_atomic(OUT, json.dumps(table, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
