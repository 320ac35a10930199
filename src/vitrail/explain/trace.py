"""What an encoder computed for images: the input of every attention, from which its matrix is computed again.

Fused attention never forms the matrix A of equation 6. Hooks keep the input of each layer instead, [B, T, D], and the
matrix of a layer is computed from it when somebody asks. So at most one layer's matrices are in memory. Shapes are
those of `vit.py`, with L layers and T = P + N tokens: the prefix, then the patches row by row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.ops import Grid
from vitrail.tasks.exported import ExportedEncoder, refuse
from vitrail.variants.attention import VariantAttention
from vitrail.variants.place import Place, locate
from vitrail.variants.windows import in_windows
from vitrail.vit import Attention, Tokens, ViT, attention_weights

Pool = Literal["token", "average"]
"""the rows of an attention matrix that the pooling reads: the class token's, or the mean of the patches'"""

Pause = Callable[[], None]
"""called between the steps of something long, while the model has no hooks and may run for others"""


def no_pause() -> None:
    """Do nothing between two steps."""


LAYER_BYTES = 2 << 30
"""the largest attention matrices of one layer, float32 [B, heads, T, T], that are computed"""


def encoder_of(task: nn.Module) -> ViT:
    """The Vision Transformer inside a task; UserError, which names the model, if there is none."""
    encoder = getattr(task, "encoder", None)
    encoder = getattr(encoder, "_orig_mod", encoder)  # of `torch.compile(encoder)`
    if isinstance(encoder, ViT):
        if getattr(encoder.config, "merge", ()):
            raise UserError("this model merges tokens, so its attention is not between patches: load it with merge 0")
        return encoder
    if isinstance(encoder, ExportedEncoder):
        refuse(encoder.made_from)
    found = type(encoder if isinstance(encoder, nn.Module) else task).__name__
    raise UserError(f"explain reads the attention of a Vision Transformer, and this model is a {found}: choose a ViT")


def pool_of(encoder: ViT) -> Pool:
    """The rows that the encoder's pooling reads. Other kinds of pooling read all patches, like the average."""
    return "token" if encoder.config.pool in ("token", "distilled", "token_average") else "average"


@dataclass
class Layer:
    """One attention and what it read."""

    attention: Attention
    tokens: Tensor
    """its input [B, T, D]"""
    place: Place | None
    mixed: Tensor | None = None
    """`attention_weights(q, k) @ v` with the heads side by side, [B, T, D]; with gradients only"""

    def weights(self) -> Tensor:
        """The matrices A (equation 6), float32 [B, heads, T, T]; each row sums to one.

        Attention in windows is zero between them, and a row leaves out what its window's padding receives.
        """
        return self._matrices(self.tokens, self.place, ())

    def relevance(self, gradients: Sequence[Tensor]) -> Tensor:
        """The mean over heads of A times its gradient, where positive (equation 5 of arXiv 2103.15679).

        `gradients` are those of `mixed`, Y = A V, for some outputs, so that the gradient of A is the product of the
        gradient of Y with V. Returns [B, outputs, T, T].
        """
        return self._matrices(self.tokens, self.place, gradients)

    def _matrices(self, x: Tensor, place: Place | None, gradients: Sequence[Tensor]) -> Tensor:
        """A, float32 [B, heads, T, T]; with gradients of `mixed` as for `relevance`, [B, outputs, T, T]."""
        layer = self.attention
        if isinstance(layer, VariantAttention):
            if layer.differential is not None:
                raise UserError("differential attention has two matrices per head: explain shows models with one")
            if layer.window and place is not None:
                if place.grid != (layer.window, layer.window):
                    return self._in_windows(x, place, gradients)
                place = place._replace(rotation=None)  # as in the layer itself
        _check_size(len(x), layer.heads, x.shape[1])
        q, k, v = layer.project(x)
        mask = None
        if isinstance(layer, VariantAttention):
            q, k, mask = locate(q, k, None, place, layer.relative)
        weights = attention_weights(q.float(), k.float(), None if mask is None else mask.float())
        if not gradients:
            return weights
        each = []
        for gradient in gradients:
            own = gradient.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2) @ v.float().mT
            each.append(own.mul_(weights).clamp_(min=0).mean(dim=1, keepdim=True))
        return torch.cat(each, dim=1)

    def _in_windows(self, x: Tensor, place: Place, gradients: Sequence[Tensor]) -> Tensor:
        """The matrices of attention in windows, which are blocks of those of the whole image."""
        assert isinstance(self.attention, VariantAttention)
        (rows, columns), size = place.grid, self.attention.window
        blocks: list[Tensor] = []
        keep: list[Tensor] = []

        def each(windows: Tensor, place: Place) -> Tensor:
            blocks.append(self._matrices(windows, place, gradients))
            return windows

        def number(windows: Tensor, place: Place) -> Tensor:
            keep.append(windows[..., 0].long())
            return windows

        in_windows(each, x, place, size)
        numbers = torch.arange(1, rows * columns + 1, device=x.device, dtype=torch.float64)  # 0 is padding
        in_windows(number, numbers[None, :, None], place, size)
        images, windows = len(x), len(keep[0])
        _check_size(images, self.attention.heads, rows * columns)
        found = blocks[0].unflatten(0, (images, windows))
        full = found.new_zeros(images, found.shape[2], 1 + rows * columns, 1 + rows * columns)
        for window, tokens in enumerate(keep[0]):
            full[:, :, tokens[:, None], tokens[None, :]] = found[:, window]
        return full[:, :, 1:, 1:]


def _check_size(images: int, heads: int, tokens: int) -> None:
    """Refuse matrices of one layer that are larger than `LAYER_BYTES`."""
    if (size := 4 * images * heads * tokens**2) > LAYER_BYTES:
        raise UserError(
            f"the attention of one layer takes {size / 2**30:.1f} GiB ({images} x {heads} heads of {tokens:,} x "
            f"{tokens:,} tokens), and at most {LAYER_BYTES >> 30} GiB are used: explain fewer images, or load "
            "a smaller image size"
        )


class Maps(Sequence[Tensor]):
    """The attention matrices [B, heads, T, T] of each layer, float32, computed when they are read."""

    def __init__(self, layers: Sequence[Layer], pause: Pause = no_pause) -> None:
        """`pause` is called before each layer is computed."""
        self.layers, self.pause = layers, pause

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, layer: int) -> Tensor: ...
    @overload
    def __getitem__(self, layer: slice) -> Maps: ...
    @torch.no_grad()
    def __getitem__(self, layer: int | slice) -> Tensor | Maps:
        if isinstance(layer, slice):
            return Maps(self.layers[layer], self.pause)
        self.pause()
        return self.layers[layer].weights()


@dataclass
class Trace:
    """What an encoder computed for a batch of images, on its own device."""

    encoder: ViT
    layers: list[Layer] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    """the tokens after each block, [B, T, D], before the final norm"""
    normed: list[Tensor] = field(default_factory=list)
    """what the final norm gave, [B, T, D]; a task may use the norm more than once"""
    grid: Grid = ()
    pause: Pause = no_pause
    """called before each layer's matrices are computed"""

    @property
    def maps(self) -> Maps:
        """The attention matrices, one layer at a time."""
        return Maps(self.layers, self.pause)

    @property
    def prefix(self) -> int:
        """P: the number of tokens before those of the patches."""
        return self.encoder.config.prefix_tokens

    @property
    def pool(self) -> Pool:
        """The rows of a matrix that the pooling reads."""
        return pool_of(self.encoder)


@torch.no_grad()
def trace(task: nn.Module, images: Tensor) -> Trace:
    """Run the encoder on normalised images [B, C, H, W], and keep what it computed. Leaves the model unchanged."""
    encoder = encoder_of(task)
    weight = encoder.patches.projection.weight
    with recording(encoder) as found:
        found.grid = encoder(images.to(weight.device, weight.dtype)).grid
    return found


@contextmanager
def recording(encoder: ViT, graph: bool = False) -> Iterator[Trace]:
    """Record each pass of the encoder in evaluation mode, run eagerly even if it is compiled; the last pass counts.

    With `graph`, only passes that build a graph count, and what is kept belongs to it.
    """
    found = Trace(encoder)
    layers = [module for module in encoder.blocks.modules() if isinstance(module, Attention)]
    place_of = {layer: index for index, layer in enumerate(layers)}

    def counts() -> bool:
        return not graph or torch.is_grad_enabled()

    def begin(*_: Any) -> None:
        if counts():
            found.layers, found.hidden, found.normed = [], [], []

    def read(layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if counts():
            if place_of[layer] != len(found.layers):
                raise UserError(
                    "the encoder runs its layers in another order than they stand: explain cannot follow it"
                )
            found.layers.append(Layer(layer, args[0].detach(), kwargs.get("place")))

    def mixed(_: nn.Module, args: tuple[Any, ...]) -> None:
        if graph and counts():
            found.layers[-1].mixed = args[0]

    def after_block(_: nn.Module, __: Any, output: Tensor) -> None:
        if counts():
            found.hidden.append(output if graph else output.detach())

    def after_norm(_: nn.Module, __: Any, output: Tensor) -> None:
        if counts():
            found.normed.append(output if graph else output.detach())

    hooks = [encoder.patches.register_forward_pre_hook(begin), encoder.norm.register_forward_hook(after_norm)]
    hooks += [layer.register_forward_pre_hook(read, with_kwargs=True) for layer in layers]
    hooks += [_reader(layer).register_forward_pre_hook(mixed) for layer in layers]
    hooks += [block.register_forward_hook(after_block) for block in encoder.blocks]
    try:
        with evaluating(encoder):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def _reader(layer: Attention) -> nn.Module:
    """The module that reads the heads' outputs."""
    return layer.norm if isinstance(layer, VariantAttention) else layer.out


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, without dropout or moving averages; afterwards restore each module's own mode.

    Compiled modules run eagerly meanwhile: compiled code does not call hooks that were added later.
    """
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def image_tokens(task: Any, images: Tensor) -> Tokens:
    """The tokens of normalised images [B, C, H, W] from any task's encoder. UserError if they have no grid."""
    device = next(task.parameters()).device
    with torch.no_grad(), evaluating(task):
        tokens: Tokens = task.features(images.to(device, next(task.parameters()).dtype))
    if len(tokens.grid) != 2 or tokens.patches.shape[1] != tokens.grid[0] * tokens.grid[1]:
        raise UserError("the model's tokens have no places in the image: choose a model with patches")
    return tokens
