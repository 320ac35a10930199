"""Which weights of a model that starts from trained ones may move: the methods of fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from vitrail.errors import UserError
from vitrail.tasks.encoder import layers
from vitrail.tasks.task import Task
from vitrail.train.lora import add_lora

Method = Literal["auto", "full", "frozen", "linear", "lora", "last-blocks", "knn"]
FROZEN: tuple[Method, ...] = ("linear", "knn")
"""methods that leave the encoder as it is, so that its features are computed once"""


@dataclass(frozen=True)
class Tune:
    """What moves. Methods other than `full` need weights to start from."""

    method: Method = "full"
    """full: all weights; frozen: what follows the encoder; linear: a new head alone, solved; lora: low-rank differences
    of the blocks' matrices; last-blocks: the last few blocks; knn: nothing, the images are remembered; auto: by the
    size of the data"""
    lora_rank: int = 8
    """rank of LoRA's differences"""
    lora_alpha: float = 16.0
    """LoRA's differences are scaled by this over the rank"""
    last_blocks: int = 2
    """how many blocks `last-blocks` trains, with the final norm and the head"""

    def __post_init__(self) -> None:
        if self.lora_rank < 1 or self.last_blocks < 1:
            raise UserError("lora_rank and last_blocks must be at least 1")

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays as it is, so that its features are computed once."""
        return self.method in FROZEN


def tune(task: Task, config: Tune) -> None:
    """Freeze what the method leaves as it is, and put LoRA in place. The head always learns."""
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
    # No graph is kept below the first module that learns, so the frozen ones cost a forward pass alone. They stay in
    # evaluation mode, or batch norm's statistics would move.
    still = [module for module in _modules(encoder) if not any(p.requires_grad for p in module.parameters())]
    task.frozen = [*task.frozen, *still]


def _modules(encoder: nn.Module) -> Iterator[nn.Module]:
    """The children of an encoder, and each of its blocks."""
    for child in encoder.children():
        yield from child if isinstance(child, nn.ModuleList) else [child]
