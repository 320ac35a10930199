"""The largest attention logits of an encoder, and a bound on them: under Muon they grow until a kernel fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.errors import UserError
from vitrail.tasks.task import Task
from vitrail.variants.attention import VariantAttention
from vitrail.vit import Attention

IMAGES = 8
"""images of a batch that are looked at"""
CLIP_EVERY = 10
"""steps between two measurements of `QKClip`"""


class Largest(TorchFunctionMode):
    """Notes the largest attention logit of each head, [heads], of every call of fused attention while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[0], args[1]
            self.found.append((q.float() @ k.float().mT).abs().amax((0, 2, 3)) * q.shape[-1] ** -0.5)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def largest_logits(task: Task, images: Tensor) -> list[float]:
    """max |q k| / sqrt(d) of each layer of the encoder, for the first few of a batch of images; [] without attention.

    Whatever a mask hides counts too.
    """
    found = _largest_of_heads(task, images[:IMAGES]).values()
    return torch.stack([heads.amax() for heads in found]).tolist() if found else []


def _largest_of_heads(task: Task, images: Tensor) -> dict[Attention, Tensor]:
    """The same for each head, [heads], of each attention that the encoder calls, in the order of the calls."""
    heads: dict[Attention, Tensor] = {}
    training = task.training
    task.eval()
    with Largest() as largest:

        def take(attention: nn.Module, inputs: Any, output: Any) -> None:
            assert isinstance(attention, Attention)
            heads[attention] = torch.stack(largest.found).amax(0)  # differential attention calls it twice
            largest.found.clear()

        attentions = [module for module in task.modules() if isinstance(module, Attention)]
        handles = [attention.register_forward_hook(take) for attention in attentions]
        try:
            task.features(images)
        finally:
            for handle in handles:
                handle.remove()
    task.train(training)
    return heads


class QKClip:
    """A bound on attention logits in the optimizer (QK-clip, arXiv 2507.20534, section 2.1).

    After a step, the query and key rows of each head whose largest logit S is above `bound` are multiplied by
    sqrt(bound / S). The architecture stays the paper's.

    The authors' attention kernel returns S of the whole batch in every step. PyTorch's does not, and to compute it
    again takes half of the arithmetic of attention and, on a GPU, a launch per layer. S changes little from step to
    step, so it is measured every `CLIP_EVERY` steps, on the first images of the batch, with the new weights. That
    takes 0.6 % of the time of `cifar10-quick` on a CPU and 1.5 % of `folder`. The compiled step is unchanged, and
    nothing waits for a GPU. A measurement depends only on step, batch and weights: a resumed run is the same.

    A head that does not train as a whole (frozen, or with LoRA) is left alone.
    """

    def __init__(self, task: Task, bound: float) -> None:
        """Raises UserError if there is no head to scale."""
        self.task, self.bound = task, bound
        # A decoder's are bounded by nothing: no image alone tells their logits.
        self.rows = {module: _rows(module) for module in task.encoder.modules() if isinstance(module, Attention)}
        if not any(self.rows.values()):
            raise UserError(
                "--qk-clip has no effect: the encoder has no attention, or its queries and keys are normalised "
                "(qk_norm), frozen, or trained by LoRA; leave it out"
            )

    @torch.no_grad()
    def after(self, step: int, images: Tensor) -> None:
        """To be called after each step, with the images of its batch."""
        if step % CLIP_EVERY:
            return
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Together, processes look at the images that one would look at: each has every n-th of a batch.
        count = max(1, IMAGES // torch.distributed.get_world_size()) if several else IMAGES
        for attention, largest in _largest_of_heads(self.task, images[:count]).items():
            if several:  # all must scale by the same factor
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            factor = torch.where((largest > self.bound) & largest.isfinite(), self.bound / largest, 1.0)
            for row, power in self.rows.get(attention, []):
                row.mul_(factor.pow(power).view(-1, *[1] * (row.ndim - 1)))


def _rows(attention: Attention) -> list[tuple[Tensor, float]]:
    """Views [heads, d, ...] of the weights and biases of queries and keys, each with the power of the heads' factor.

    Empty if they cannot be scaled. Of heads that share a key, each has its own factor, so the queries take all of it.
    """
    linear, width = attention.qkv, attention.out.in_features
    keys = (len(linear.weight) - width) // 2
    own = [linear.weight, *([] if linear.bias is None else [linear.bias])]
    rows = [tensor[:width] for tensor in own]
    if isinstance(attention, VariantAttention):
        if not isinstance(attention.q_norm, nn.Identity):
            return []
        if attention.q_bias is not None:
            own.append(attention.q_bias)
            rows.append(attention.q_bias)
    if not all(tensor.requires_grad for tensor in own):
        return []
    if keys == width:
        rows += [tensor[width : 2 * width] for tensor in own if len(tensor) > width]
    power = 0.5 if keys == width else 1.0
    return [(tensor.detach().unflatten(0, (-1, width // attention.heads)), power) for tensor in rows]
