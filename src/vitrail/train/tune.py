"""The methods of fine-tuning: which weights of a pretrained model are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from vitrail.errors import UserError, require, require_choices
from vitrail.tasks.encoder import layers
from vitrail.tasks.task import Task
from vitrail.train.lora import add_lora

Method = Literal["auto", "full", "frozen", "linear", "lora", "last-blocks", "knn"]
FROZEN: tuple[Method, ...] = ("linear", "knn")
"""methods that keep the encoder frozen, so its features are computed only once"""


@dataclass(frozen=True)
class Tune:
    """Which weights are trained. Methods other than `full` need pretrained weights."""

    method: Method = "full"
    """fine-tuning method. full: train all weights; frozen: train only what follows the encoder; linear: linear probe,
    solved exactly; lora: low-rank updates of the blocks' matrices; last-blocks: train the last few blocks; knn: k
    nearest neighbours, without training; auto: choose by the size of the data"""
    lora_rank: int = 8
    """rank of the LoRA updates"""
    lora_alpha: float = 16.0
    """scale of the LoRA updates: alpha / rank"""
    last_blocks: int = 2
    """number of blocks that `last-blocks` trains, with the final norm and the head"""

    def __post_init__(self) -> None:
        require_choices(self)
        require(self, 1, math.inf, "lora_rank", "last_blocks")

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays frozen, so its features are computed only once."""
        return self.method in FROZEN


def tune(task: Task, config: Tune) -> None:
    """Freeze what the method does not train, and add LoRA if the method is lora. The head is always trained."""
    if config.method == "full":
        return
    encoder = task.encoder
    encoder.requires_grad_(False)
    blocks = getattr(encoder, "blocks", None)
    if config.method in ("lora", "last-blocks") and not isinstance(blocks, nn.ModuleList):
        raise UserError(f"method {config.method} needs an encoder of blocks, such as a ViT: choose full or frozen")
    if config.method == "lora":
        assert blocks is not None
        add_lora(blocks, config.lora_rank, config.lora_alpha)
    if config.method == "last-blocks":
        assert blocks is not None
        if config.last_blocks > len(blocks):
            raise UserError(f"the encoder has {len(blocks)} blocks: lower --last-blocks, or choose --method full")
        for layer in layers(encoder)[-1 - config.last_blocks :]:
            for parameter in layer:
                parameter.requires_grad_()
    # Autograd keeps no graph below the first trained module, so frozen modules cost only a forward pass. They stay in
    # evaluation mode, or the statistics of batch norm would change.
    unchanged = [module for module in _modules(encoder) if not any(p.requires_grad for p in module.parameters())]
    task.frozen = [*task.frozen, *unchanged]


def _modules(encoder: nn.Module) -> Iterator[nn.Module]:
    """The children of an encoder, and each of its blocks."""
    for child in encoder.children():
        yield from child if isinstance(child, nn.ModuleList) else [child]
