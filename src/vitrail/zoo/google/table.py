"""The renaming table of Google's `.npz` files: reading and writing share it.

Kernels are [in, out], attention's are [D, heads, d], and convolutions are [height, width, in, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.variants import VariantConfig
from vitrail.zoo.source import Weight


@dataclass(frozen=True)
class Names:
    """The names of a block's modules in a code base."""

    title: str
    positions: str
    norm1: str = "LayerNorm_0"
    norm2: str = "LayerNorm_1"
    attention: str = "MultiHeadDotProductAttention_0"
    mlp: str = "MlpBlock_0"

    @property
    def papers(self) -> bool:
        """Whether it is the paper's code, which also adds positions to the class token."""
        return self.title == "Google's"


PAPER = Names(
    "Google's",
    "Transformer/posembed_input/pos_embedding",
    norm2="LayerNorm_2",
    attention="MultiHeadDotProductAttention_1",
    mlp="MlpBlock_3",
)

PAPER_LINEN = Names("Google's", PAPER.positions)

BIG_VISION = Names("big_vision's", "pos_embedding")


def renaming_table(
    config: VariantConfig, names: Names, shapes: Mapping[str, tuple[int, ...]], hidden: int | None, head: bool
) -> dict[str, Weight]:
    """Our names and where they come from, without the prefix."""
    table = {
        "encoder.patches.projection.weight": _conv("embedding/kernel"),
        "encoder.patches.projection.bias": Weight(("embedding/bias",)),
        **_norm("encoder.norm", "Transformer/encoder_norm"),
    }
    if config.class_token:
        table["encoder.class_token"] = Weight(("cls",))
    if config.positions == "learned":
        table["encoder.positions"] = Weight((names.positions,))
    if config.backbone == "resnetv2":
        table |= _resnet(config.backbone_layers)
    stacked = any(name.startswith("Transformer/encoderblock/") for name in shapes)
    for i in range(config.depth):
        block = _block(f"encoder.blocks.{i}", f"Transformer/encoderblock{'' if stacked else f'_{i}'}", names)
        table |= {n: _layer(weight, i) for n, weight in block.items()} if stacked else block
    if config.pool == "attention":
        pool = "MAPHead_0/"
        table["encoder.pooling.probe"] = Weight((f"{pool}probe",))
        table |= _attention("encoder.pooling.attention", f"{pool}MultiHeadDotProductAttention_0")
        table |= _norm("encoder.pooling.norm", f"{pool}LayerNorm_0")
        table |= _mlp("encoder.pooling.mlp", f"{pool}MlpBlock_0")
    if hidden:
        table |= _linear("head.hidden.0", "pre_logits")
    if head:
        table |= _linear("head.linear", "head")
    elif config.projection:
        table |= _linear("encoder.projection", "head")
    return table


def _block(own: str, theirs: str, names: Names) -> dict[str, Weight]:
    return {
        **_norm(f"{own}.norm1", f"{theirs}/{names.norm1}"),
        **_attention(f"{own}.attention", f"{theirs}/{names.attention}"),
        **_norm(f"{own}.norm2", f"{theirs}/{names.norm2}"),
        **_mlp(f"{own}.mlp", f"{theirs}/{names.mlp}"),
    }


def _attention(own: str, theirs: str) -> dict[str, Weight]:
    names = [f"{theirs}/{name}" for name in ("query", "key", "value")]
    return {
        f"{own}.qkv.weight": Weight(tuple(f"{p}/kernel" for p in names), _join_kernels, "joined and transposed"),
        f"{own}.qkv.bias": Weight(tuple(f"{p}/bias" for p in names), _join_biases, "joined"),
        f"{own}.out.weight": Weight((f"{theirs}/out/kernel",), _out_kernel, "transposed"),
        f"{own}.out.bias": Weight((f"{theirs}/out/bias",)),
    }


def _mlp(own: str, theirs: str) -> dict[str, Weight]:
    return {**_linear(f"{own}.up", f"{theirs}/Dense_0"), **_linear(f"{own}.down", f"{theirs}/Dense_1")}


def _resnet(stages: tuple[int, ...]) -> dict[str, Weight]:
    """Section 3.1's ResNet; its group norms are [C], or [1, 1, 1, C] in the oldest files."""
    stem = "encoder.patches.stem"
    table = {f"{stem}.root.0.conv.weight": _conv("conv_root/kernel"), **_group_norm(f"{stem}.root.0.norm", "gn_root")}
    for i, units in enumerate(stages):
        for j in range(units):
            own, theirs = f"{stem}.stages.{i}.{j}", f"block{i + 1}/unit{j + 1}"
            for k in (1, 2, 3):
                table[f"{own}.conv{k}.weight"] = _conv(f"{theirs}/conv{k}/kernel")
                table |= _group_norm(f"{own}.norm{k}", f"{theirs}/gn{k}")
            if j == 0:
                table[f"{own}.shortcut.conv.weight"] = _conv(f"{theirs}/conv_proj/kernel")
                table |= _group_norm(f"{own}.shortcut.norm", f"{theirs}/gn_proj")
    return table


def _linear(own: str, theirs: str) -> dict[str, Weight]:
    return {
        f"{own}.weight": Weight((f"{theirs}/kernel",), torch.t, "transposed"),
        f"{own}.bias": Weight((f"{theirs}/bias",)),
    }


def _norm(own: str, theirs: str) -> dict[str, Weight]:
    return {f"{own}.weight": Weight((f"{theirs}/scale",)), f"{own}.bias": Weight((f"{theirs}/bias",))}


def _group_norm(own: str, theirs: str) -> dict[str, Weight]:
    return {name: weight._replace(make=torch.flatten) for name, weight in _norm(own, theirs).items()}


def _conv(theirs: str) -> Weight:
    return Weight((theirs,), _conv_kernel, "transposed")


def _layer(weight: Weight, i: int) -> Weight:
    """One layer of parameters that are stacked in one array, as by `scan`."""
    make = weight.make

    def of_layer(*stacks: Tensor) -> Tensor:
        layers = [stack[i] for stack in stacks]
        return make(*layers) if make else layers[0]

    return Weight(weight.names, of_layer, f"{weight.change} and taken from a stacked array".removeprefix(" and "))


def split(weight: Weight, value: Tensor, config: VariantConfig, name: str) -> list[Tensor]:
    """The inverse of `weight.make`."""
    heads = config.pool_heads or config.heads if name.startswith("encoder.pooling") else config.heads
    if weight.make is _join_kernels:
        return [matrix.t().unflatten(1, (heads, -1)) for matrix in value.chunk(3)]
    if weight.make is _join_biases:
        return [bias.unflatten(0, (heads, -1)) for bias in value.chunk(3)]
    if weight.make is _out_kernel:
        return [value.t().unflatten(0, (heads, -1))]
    if weight.make is _conv_kernel:
        return [value.permute(2, 3, 1, 0)]
    return [value.t()] if weight.make is torch.t else [value]


def _conv_kernel(kernel: Tensor) -> Tensor:
    """[h, w, in, out] to [out, in, h, w]."""
    return kernel.permute(3, 2, 0, 1)


def _join_kernels(*kernels: Tensor) -> Tensor:
    """Three [D, heads, d] to [3D, D]."""
    return torch.cat([kernel.flatten(1).t() for kernel in kernels])


def _join_biases(*biases: Tensor) -> Tensor:
    """Three [heads, d] to [3D]."""
    return torch.cat([bias.flatten() for bias in biases])


def _out_kernel(kernel: Tensor) -> Tensor:
    """[heads, d, D] to [D, D]."""
    return kernel.flatten(0, 1).t()
