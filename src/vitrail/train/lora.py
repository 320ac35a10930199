"""LoRA (arXiv 2106.09685): low-rank updates of frozen matrices. The saved model is the merged plain model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / rank) B A x (section 4.1), with W and b frozen.

    A is [rank, in], random with A x as large as x; B is [out, rank] and starts at zero, so the model starts unchanged.
    Computing B (A x) instead of (W + B A) x avoids a gradient of the size of W.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        """Takes over the weight and the bias of `linear`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        like = linear.weight
        self.lora_a = nn.Parameter(like.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(like.new_zeros(linear.out_features, rank))
        nn.init.normal_(self.lora_a, std=linear.in_features**-0.5)
        # A buffer, so that a state dict can be merged without the module.
        self.register_buffer("lora_scale", like.new_tensor(alpha / rank))
        self.lora_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(module: nn.Module, rank: int, alpha: float) -> int:
    """Add LoRA to every linear layer inside `module`, in place; returns their number."""
    linears = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name, child in linears:
        setattr(parent, name, LoRALinear(child, rank, alpha))
    return len(linears)


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain model: W + (alpha / rank) B A as W, without the factors. Unchanged without LoRA."""
    plain = {name: value for name, value in weights.items() if ".lora_" not in name}
    for name, a in weights.items():
        if name.endswith(".lora_a"):
            layer = name.removesuffix("lora_a")
            difference = weights[f"{layer}lora_scale"] * (weights[f"{layer}lora_b"] @ a)
            plain[f"{layer}weight"] = weights[f"{layer}weight"] + difference
    return plain


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Merge every LoRA layer inside `module` into an equivalent plain linear layer, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                plain.weight = nn.Parameter(child.weight + child.lora_scale * (child.lora_b @ child.lora_a))
                plain.bias = child.bias
                setattr(parent, name, plain)
