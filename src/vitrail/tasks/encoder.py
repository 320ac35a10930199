"""Every network that maps images to tokens, by the type of its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitrail.baselines import CNN, MLP, RNN, CNNConfig, MLPConfig, ResNet, ResNetConfig, RNNConfig
from vitrail.errors import UserError
from vitrail.tasks.exported import ExportedEncoder, refuse
from vitrail.variants import VariantConfig, VariantViT, patches_for
from vitrail.vit import ViT, ViTConfig

if TYPE_CHECKING:
    from vitrail.tasks.task import Task

Encoder = ViT | MLP | CNN | ResNet | RNN
"""maps normalised images [B, C, H, W] to Tokens, and `pool` maps those to one vector per image, [B, D]"""
EncoderConfig = ViTConfig | VariantConfig | MLPConfig | CNNConfig | ResNetConfig | RNNConfig
"""has at least `width` (D), `channels` and `image_size`"""

NETWORKS: dict[type[Any], Callable[[Any], Encoder]] = {
    ViTConfig: lambda config: ViT(config, patches_for(config)),
    VariantConfig: VariantViT,
    MLPConfig: MLP,
    CNNConfig: CNN,
    ResNetConfig: ResNet,
    RNNConfig: RNN,
}
KINDS: dict[str, type[Any]] = {
    "vit": ViTConfig,
    "variant": VariantConfig,
    "mlp": MLPConfig,
    "cnn": CNNConfig,
    "resnet": ResNetConfig,
    "rnn": RNNConfig,
}
"""the name of each config in `config.json`: "vit", "mlp", ..."""


def encoder_for(config: EncoderConfig) -> Encoder:
    """A new encoder with this config."""
    return NETWORKS[type(config)](config)


def encoder_of(task: Task) -> Encoder:
    """The task's encoder: a Vision Transformer, or one of `baselines/`."""
    encoder = task.encoder
    if isinstance(encoder, ExportedEncoder):
        refuse(encoder.made_from)
    if not isinstance(encoder, Encoder):
        raise UserError(f"the model of task {task.name} has no encoder that vitrail could change or train on")
    return encoder


def layers(encoder: nn.Module) -> list[list[nn.Parameter]]:
    """An encoder's parameters by layer: everything before the blocks, each block, and everything after the last one.

    The blocks are in `blocks`; `after_blocks` names the modules after them.
    """
    blocks = [list(block.parameters()) for block in getattr(encoder, "blocks", ())]
    following = [getattr(encoder, name) for name in getattr(encoder, "after_blocks", ())]
    after = [parameter for module in following if module is not None for parameter in module.parameters()]
    above = {parameter for layer in (*blocks, after) for parameter in layer}
    return [[parameter for parameter in encoder.parameters() if parameter not in above], *blocks, after]


def token_width(config: EncoderConfig) -> int:
    """Width of an encoder's tokens."""
    return config.token_width if isinstance(config, VariantConfig) else config.width


def pooled_width(config: EncoderConfig) -> int:
    """Width of the pooled image vector; a ViT may project it, as CLIP does."""
    return config.pooled_width if isinstance(config, VariantConfig) else config.width


def one_vector(pooled: Tensor) -> Tensor:
    """The pooled vector [B, D]; for DeiT's pair of vectors [B, 2, D], their mean."""
    return pooled.mean(dim=1) if pooled.ndim == 3 else pooled
