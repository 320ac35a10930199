"""Variants of attention: norms, biases, shared keys, rotary and relative positions, windows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.ops import attend
from vitrail.variants.config import VariantConfig
from vitrail.variants.norms import norm_for
from vitrail.variants.place import Place, locate
from vitrail.variants.relative import DecomposedBias, RelativeTable
from vitrail.variants.windows import in_windows
from vitrail.vit import Attention, attention_weights


class VariantAttention(Attention):
    """The attention of block `index`: equations 5 to 8 with what the config adds to each."""

    def __init__(self, config: VariantConfig, index: int = 0) -> None:
        c = config
        super().__init__(c.width, c.heads, c.qkv_bias and c.key_bias, c.dropout)
        per_head = c.width // c.heads
        self.kv_heads = c.kv_heads[index] if c.kv_heads else c.heads
        self.sizes = [c.width, per_head * self.kv_heads, per_head * self.kv_heads]
        if self.kv_heads != c.heads:
            self.qkv = nn.Linear(c.width, sum(self.sizes), self.qkv.bias is not None)
        alone = c.qkv_bias and not c.key_bias  # queries and values have a bias, keys have none
        self.q_bias = nn.Parameter(torch.zeros(c.width)) if alone else None
        self.v_bias = nn.Parameter(torch.zeros(self.sizes[2])) if alone else None
        if not c.output_bias:
            self.out.register_parameter("bias", None)
        self.q_norm, self.k_norm = (norm_for(c, per_head) if c.qk_norm else nn.Identity() for _ in range(2))
        self.norm = norm_for(c) if c.attention_norm else nn.Identity()
        self.differential = Differential(per_head, index) if c.differential else None
        self.window = 0 if index in c.global_blocks else c.window
        self.relative: RelativeTable | DecomposedBias | None = None
        if c.relative == "decomposed":
            self.relative = DecomposedBias((c.window, c.window) if self.window else c.grid, per_head)
        elif c.relative in ("table", "both"):
            self.relative = RelativeTable(c.grid, c.heads, c.relative_resampling)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        place: Place | None = None,
    ) -> Tensor:
        """Mix tokens [B, N, D] with themselves. `place` gives their positions in the image."""
        if context is not None or is_causal:
            raise UserError("the attention of a variant is for the tokens of one image: use vit.Attention")
        if self.window and mask is not None:
            raise UserError("attention in windows takes no mask: leave it out, or use a block without windows")
        if self.window and place is not None:
            if isinstance(place.grid[0], torch.SymInt) or place.grid != (self.window, self.window):
                return in_windows(self.forward, x, place, self.window)
            place = place._replace(rotation=None)  # as inside windows where there are several
        q, k, v = self.project(x)
        q, k, mask = locate(q, k, mask, place, self.relative)
        return self.mix(q, k, v, mask)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Equations 6 to 8 for what `project` gives: [B, N, D]."""
        x = (attend if self.differential is None else self.differential)(q, k, v, mask)
        return self.dropout(self.out(self.norm(x.transpose(1, 2).flatten(2))))

    def project(self, x: Tensor, first: int = 0, last: int = 3) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [B, heads, N, D/heads]."""
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        if self.q_bias is not None and self.v_bias is not None:
            q, v = q + self.q_bias, v + self.v_bias
        per_head = self.sizes[0] // self.heads
        q, k, v = (y.unflatten(-1, (-1, per_head)).transpose(1, 2) for y in (q, k, v))
        if self.kv_heads != self.heads:  # several query heads share each key and value head
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        return (self.q_norm(q), self.k_norm(k), v)[first:last]

    def weights(self, x: Tensor, mask: Tensor | None = None, place: Place | None = None) -> Tensor:
        """The matrix A of equation 6, [B, heads, N, N], with positional terms."""
        if self.window or self.differential is not None:
            raise UserError("windowed or differential attention has no single matrix for the whole image")
        q, k, _ = self.project(x)
        q, k, mask = locate(q, k, mask, place, self.relative)
        return attention_weights(q, k, mask)


class MergingAttention(VariantAttention):
    """Attention to merged tokens: one that stands for several counts as often (arXiv 2210.09461, equation 1)."""

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Mix tokens [B, N, D] of these sizes [B, N], None for 1. Also returns their keys [B, heads, N, D/heads]."""
        q, k, v = self.project(x)
        return self.mix(q, k, v, None if size is None else size.log()[:, None, None].to(v.dtype)), k


class Differential(nn.Module):
    """The difference of two attention maps, each on half of every head's channels (arXiv 2410.05258)."""

    def __init__(self, per_head: int, index: int) -> None:
        """`index` is the number of the block: later ones start with a larger share of the second attention."""
        super().__init__()
        self.start = 0.8 - 0.6 * math.exp(-0.3 * index)
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(0.1 * torch.randn(per_head // 2)) for _ in range(4))
        self.norm = nn.RMSNorm(per_head, eps=1e-5)

    def share(self) -> Tensor:
        """The factor on the second attention (equation 2)."""
        return (self.q1 * self.k1).sum().exp() - (self.q2 * self.k2).sum().exp() + self.start

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, heads, N, d] from queries, keys and values, as PyTorch's own attention."""
        first, second = (attend(a, b, v, mask) for a, b in zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True))
        return self.norm(first - self.share().to(q.dtype) * second) * (1 - self.start)
