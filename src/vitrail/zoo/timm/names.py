"""timm's names of weights, and which of them it splits or joins."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrail.variants import VariantConfig, VariantViT, head_for
from vitrail.zoo.meta import without_memory
from vitrail.zoo.source import Weight


class Entry(NamedTuple):
    """The origin of one of vitrail's tensors in timm's weights."""

    names: tuple[str, ...]
    """names whose rows, in this order, form the tensor; or the name that it equals or is a slice of"""
    sizes: tuple[int, ...] = ()
    """number of rows of each of several names"""
    piece: tuple[int, int, int] | None = None
    """dimension, start and length of the slice; other slices are other tensors"""
    shape: tuple[int, ...] = ()
    """timm's shape, if it is another view of the same numbers"""

    def weight(self, own: Sequence[int]) -> Weight:
        """The renaming row for a tensor of shape `own`."""
        if len(self.names) > 1:
            return Weight(self.names, lambda *tensors: torch.cat(tensors), "joined")
        if self.piece is not None:
            dim, start, length = self.piece
            return Weight(self.names, lambda whole: whole.narrow(dim, start, length), "cut out")
        if self.shape:
            return Weight(self.names, lambda value: value.reshape(tuple(own)), "reshaped")
        return Weight(self.names)


RENAMED = (
    (r"^patches\.projection\.", "patch_embed.proj."),
    (r"^norm_patches\.", "patch_embed.norm."),
    (r"^norm_before\.", "norm_pre."),
    (r"^norm_pooled\.", "fc_norm."),
    (r"^class_token$", "cls_token"),
    (r"^distillation_token$", "dist_token"),
    (r"^registers$", "reg_token"),
    (r"^positions$", "pos_embed"),
    (r"^rotary\.frequencies$", "rope.freqs"),
    (r"^relative\.table$", "rel_pos_bias.relative_position_bias_table"),
    (r"^pooling\.probe$", "attn_pool.latent"),
    (r"^pooling\.attention\.out\.", "attn_pool.proj."),
    (r"^pooling\.", "attn_pool."),
    (r"\.attentions\.(\d)\.norm\.", r".attns.\1.norm."),
    (r"\.attentions\.(\d)\.inner\.", r".attns.\1.attn."),
    (r"\.attentions\.(\d)\.branch\.0\.scale$", r".attns.\1.ls.gamma"),
    (r"\.mlps\.(\d)\.norm\.", r".ffns.\1.norm."),
    (r"\.mlps\.(\d)\.inner\.", r".ffns.\1.mlp."),
    (r"\.mlps\.(\d)\.branch\.0\.scale$", r".ffns.\1.ls.gamma"),
    (r"\.attention\.relative\.table$", ".attn.relative_position_bias_table"),
    (r"\.attention\.relative\.rows$", ".attn.rel_pos_h"),
    (r"\.attention\.relative\.columns$", ".attn.rel_pos_w"),
    (r"\.attention\.differential\.norm\.", ".attn.sub_norm."),
    (r"\.attention\.differential\.([qk][12])$", r".attn.lambda_\1"),
    (r"\.attention\.", ".attn."),
    (r"\.attn\.out\.", ".attn.proj."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
)
"""applied in this order to the encoder's names"""

JOINT = (
    (r"\.attn\.(sub_norm\.|lambda_|q_norm\.|k_norm\.)", r".\1"),
    (r"\.norm1\.", ".in_norm."),
    (r"\.ls1\.gamma$", ".ls.gamma"),
    (r"\.attn\.proj\.", ".attn_out_proj."),
    (r"\.mlp\.fc2\.", ".mlp_out_proj."),
)
"""other names in ViT-22B's blocks"""

RESNETV2 = (
    (r"^patches\.stem\.root\.0\.", "patch_embed.backbone.stem."),
    (r"^patches\.stem\.stages\.(\d+)\.(\d+)\.", r"patch_embed.backbone.stages.\1.blocks.\2."),
    (r"\.shortcut\.", ".downsample."),
)
RESNET = (
    (r"^patches\.stem\.root\.2\.conv\.", "patch_embed.backbone.conv1.6."),
    (r"^patches\.stem\.root\.2\.norm\.", "patch_embed.backbone.bn1."),
    (r"^patches\.stem\.root\.0\.conv\.", "patch_embed.backbone.conv1.0."),
    (r"^patches\.stem\.root\.0\.norm\.", "patch_embed.backbone.conv1.1."),
    (r"^patches\.stem\.root\.1\.conv\.", "patch_embed.backbone.conv1.3."),
    (r"^patches\.stem\.root\.1\.norm\.", "patch_embed.backbone.conv1.4."),
    (r"\.shortcut\.conv\.", ".downsample.1."),
    (r"\.shortcut\.norm\.", ".downsample.2."),
    (r"^(patches\.stem\.stages.*)\.norm(\d)\.", r"\1.bn\2."),
)
CONV = (
    (r"^patches\.stem\.layers\.0\.", "patch_embed.backbone.0.conv."),
    (r"^patches\.stem\.layers\.1\.", "patch_embed.backbone.0.bn."),
    (r"^patches\.stem\.layers\.3\.", "patch_embed.backbone.1.conv."),
    (r"^patches\.stem\.layers\.4\.", "patch_embed.backbone.1.bn."),
    (r"^patches\.projection\.", "patch_embed.backbone.2.conv."),
)


def skeleton(config: VariantConfig, classes: int | None) -> nn.ModuleDict:
    """Encoder and head without memory for their weights."""
    with without_memory():
        modules: dict[str, nn.Module] = {"encoder": VariantViT(config)}
        if classes:
            modules["head"] = head_for(config, classes)
        return nn.ModuleDict(modules)


def spelling(config: VariantConfig, kind: str, there: Collection[str], classes: int | None) -> dict[str, Entry]:
    """timm's name for every tensor of a task with this encoder, for timm's class `kind`.

    `there` are the names in the file: some classes store query, key and value separately.
    """
    own = skeleton(config, classes).state_dict()
    return {name: _spelled(name, tuple(value.shape), config, kind, there) for name, value in own.items()}


def _spelled(name: str, shape: tuple[int, ...], config: VariantConfig, kind: str, there: Collection[str]) -> Entry:
    top, _, own = name.partition(".")
    if top == "head":
        head = {"linear": "head.fc" if kind == "VisionTransformerSAM" else "head", "distillation": "head_dist"}
        layer, _, rest = own.partition(".")
        return Entry((f"{head[layer]}.{rest}",))
    if config.backbone != "none" and own.startswith("patches."):
        return Entry((_backbone_name(own, config),))
    theirs = _renamed(own, RENAMED)
    if kind == "VisionTransformerSAM":
        if own == "positions":
            return Entry((theirs,), shape=(1, *config.grid, config.width))
        if own.startswith("norm."):
            return Entry((own.replace("norm.", "neck."),))
    theirs = _scale_name(theirs, kind)
    if config.arrangement in ("joint", "joint_fused"):
        return _joint(theirs, shape, config)
    return _joined(theirs, config, there)


def _joined(theirs: str, config: VariantConfig, there: Collection[str]) -> Entry:
    """Tensors that timm splits into several."""
    if match := re.match(r"attn_pool\.attn\.qkv\.(\w+)$", theirs):
        return Entry((f"attn_pool.q.{match[1]}", f"attn_pool.kv.{match[1]}"), (config.width, 2 * config.width))
    if match := re.match(r"(blocks\.(\d+)\.attn\.)qkv\.(\w+)$", theirs):
        apart = tuple(f"{match[1]}{letter}_proj.{match[3]}" for letter in "qkv")
        if apart[0] in there:
            kv = config.kv_heads[int(match[2])] if config.kv_heads else config.heads
            rows = config.width // config.heads
            return Entry(apart, (config.width, kv * rows, kv * rows))
    if match := re.match(r"(blocks\.\d+\.attn\.)([qv])_bias$", theirs):
        apart_bias = f"{match[1]}{match[2]}_proj.bias"
        return Entry((apart_bias,) if apart_bias in there else (theirs,))
    if match := re.match(r"(blocks\.\d+\.mlp\.)fc1\.(\w+)$", theirs):
        gate = f"{match[1]}fc1_g.{match[2]}"
        if config.mlp == "gated" and gate in there:
            return Entry((gate, f"{match[1]}fc1_x.{match[2]}"), (config.hidden, config.hidden))
    return Entry((theirs,))


def _joint(theirs: str, shape: tuple[int, ...], config: VariantConfig) -> Entry:
    """ViT-22B's blocks have one product for MLP, queries, keys and values, and may have one for both outputs."""
    hidden, width = config.hidden, config.width
    rows = {"mlp.fc1": (0, 0, hidden), "attn.qkv": (0, hidden, 3 * width)}
    columns = {"attn.proj": (1, 0, width), "mlp.fc2": (1, width, hidden)}
    if match := re.match(r"(blocks\.\d+\.)(mlp\.fc1|attn\.qkv)\.(weight|bias)$", theirs):
        if match[2] == "mlp.fc1" and match[3] == "bias" and not config.qkv_bias:
            return Entry((f"{match[1]}mlp_bias",))
        return Entry((f"{match[1]}in_proj.{match[3]}",), piece=rows[match[2]])
    fused = config.arrangement == "joint_fused"
    if fused and (match := re.match(r"(blocks\.\d+\.)(attn\.proj|mlp\.fc2)\.(weight|bias)$", theirs)):
        name = f"{match[1]}out_proj.{match[3]}"
        return Entry((name,), piece=columns[match[2]] if match[3] == "weight" else None)
    return Entry((_renamed(theirs, JOINT),))


def _scale_name(name: str, kind: str) -> str:
    """Layer scales, which EVA and BEiT store in the block itself."""
    if match := re.match(r"(blocks\.\d+\.)branch([12])\.0\.scale$", name):
        return f"{match[1]}gamma_{match[2]}" if kind in ("Eva", "Beit") else f"{match[1]}ls{match[2]}.gamma"
    return name


def _backbone_name(own: str, config: VariantConfig) -> str:
    rules = {"resnetv2": RESNETV2, "resnet": RESNET, "conv": CONV}[config.backbone]
    theirs = _renamed(own, (*rules, *RENAMED))
    theirs = re.sub(r"^patches\.stem\.stages\.(\d+)\.", lambda m: f"patch_embed.backbone.layer{int(m[1]) + 1}.", theirs)
    if not config.backbone_layers:
        theirs = theirs.replace("backbone.stem.", "backbone.")
    return theirs


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def written(entries: dict[str, Entry], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors from vitrail's: the inverse of `spelling`."""
    out: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[tuple[int, int, int], Tensor]]] = {}
    for name, entry in entries.items():
        value = state[name].detach()
        if len(entry.names) > 1:
            out.update(zip(entry.names, value.split(entry.sizes), strict=True))
        elif entry.piece is not None:
            pieces.setdefault(entry.names[0], []).append((entry.piece, value))
        else:
            out[entry.names[0]] = value.reshape(entry.shape) if entry.shape else value
    for name, found in pieces.items():
        found.sort(key=lambda item: item[0][1])
        out[name] = torch.cat([value for _, value in found], dim=found[0][0][0])
    return out
