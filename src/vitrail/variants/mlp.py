"""MLPs with other activations, gates and norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitrail.vit import MLP


class QuickGELU(nn.Module):
    """The approximation of GELU in OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


# GPT-2 and Google's JAX code use the tanh approximation of GELU, PyTorch's models the exact one.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


class VariantMLP(MLP):
    """The paper's MLP with another activation, a norm after it, or no biases."""

    def __init__(
        self, width: int, hidden: int, activation: str = "gelu", dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__(width, hidden, dropout)
        self.activation = ACTIVATIONS[activation]()
        self.norm: nn.Module = nn.Identity()
        if not bias:
            self.up.register_parameter("bias", None)
            self.down.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return self.dropout(self.down(self.norm(self.dropout(self.activation(self.up(x))))))


class GatedMLP(nn.Module):
    """An MLP whose activation is a gate: down(activation(a) * b), with a and b from one product (arXiv 2002.05202)."""

    def __init__(
        self, width: int, hidden: int, activation: str = "silu", dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=bias)  # the gate's rows first
        self.activation = ACTIVATIONS[activation]()
        self.norm: nn.Module = nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        gate, x = self.up(x).chunk(2, dim=-1)
        return self.dropout(self.down(self.norm(self.dropout(self.activation(gate) * x))))
