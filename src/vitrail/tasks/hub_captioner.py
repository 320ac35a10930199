"""Captioners that others trained, as they are: image encoder and text decoder through transformers.

Their decoders see the image in one of two ways: by cross-attention to its tokens (`vision-encoder-decoder`, BLIP,
2201.12086), or with its tokens standing before the words (GIT, 2205.14100).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vitrail.data.decode import Preprocess
from vitrail.errors import UserError
from vitrail.tasks.caption import Caption, Captioning
from vitrail.tasks.decoders import DecoderState, Memory
from vitrail.tasks.encoder import Encoder
from vitrail.tasks.language import (
    HFTokenizer,
    Language,
    LanguageState,
    VocabMap,
    cache_arguments,
    cache_of,
    in_parts,
)
from vitrail.tasks.search import Written
from vitrail.tasks.task import Batch
from vitrail.vit import Tokens

TYPES = ("vision-encoder-decoder", "blip", "git")
"""what transformers calls them"""


class HubCaption(Caption):
    """A captioner of the Hub. Keys of a batch are those of `Caption`; it writes, and is not trained on."""

    def __init__(
        self, model: Any, numbers: VocabMap, tokenizer: HFTokenizer, preprocess: Preprocess, config: Captioning
    ) -> None:
        """`model` is one of transformers, which is taken apart."""
        self.description = json.loads(model.config.to_json_string(use_diff=False))
        encoder, decoder = taken_apart(model, numbers)
        seen = TheirConfig(encoder.config.hidden_size, preprocess.channels, preprocess.size)
        super().__init__(cast(Encoder, HFEncoder(encoder, seen)), config, tokenizer, preprocess, decoder)
        self.numbers = numbers

    def memory(self, images: Tensor, keep: Tensor | None = None) -> Memory:
        tokens = cast(HFEncoder, self.encoder).see(images)
        return Memory(tokens, tokens.mean(dim=1))

    def write(self, batch: Batch) -> Written:
        return in_parts(super().write, batch)

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        raise UserError("a captioner of the Hub is used as it is: train caption-zoo or caption-prefix from an encoder")

    def config(self) -> dict[str, Any]:
        return {
            "transformers": self.description,
            "numbers": asdict(self.numbers),
            "captioning": {"decoding": asdict(self.option)},
            "tokenizer": self.tokenizer.fingerprint,
        }


@dataclass(frozen=True)
class TheirConfig:
    """What the rest of the package asks of an encoder's config."""

    kind: ClassVar[str] = "transformers"
    width: int
    channels: int
    image_size: tuple[int, int]


class HFEncoder(nn.Module):
    """An image encoder of transformers."""

    def __init__(self, model: nn.Module, config: TheirConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def see(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] to all their tokens [B, M, D], as the decoder wants them."""
        channels = self.config.channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise UserError(f"expected images [B, {channels}, H, W], got {list(images.shape)}: check the channels")
        return self.model(pixel_values=images).last_hidden_state

    def forward(self, images: Tensor) -> Tokens:
        """The same, parted."""
        tokens = self.see(images)
        grid = grid_of(tokens.shape[1], images.shape[2], images.shape[3])
        prefix = tokens.shape[1] - grid[0] * grid[1]
        return Tokens(tokens[:, :prefix], tokens[:, prefix:], grid)

    def pool(self, tokens: Tokens) -> Tensor:
        """The mean of all tokens, [B, D]."""
        return torch.cat([tokens.prefix, tokens.patches], dim=1).mean(dim=1)


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of an image's tokens: the grid of its shape with the fewest tokens left over, as a prefix."""
    for count in range(tokens, 0, -1):
        rows = max(1, round((count * height / width) ** 0.5))
        columns = count // rows
        if rows * columns == count and abs(rows * width - columns * height) < max(height, width):
            return rows, columns
    raise ValueError("an image has at least one token")


class CrossDecoder(Language):
    """A text decoder that looks at the image by cross-attention."""

    def __init__(self, model: Any, numbers: VocabMap, positions: int, project: nn.Module | None = None) -> None:
        """`project` takes the image's tokens to the decoder's width, where the model has that."""
        super().__init__(model, numbers, positions)
        self.project = project or nn.Identity()

    def forward(self, words: Tensor, memory: Memory) -> Tensor:
        """Words [B, K, T] of K captions for each image to their logits after each, [B, K, T, V]."""
        ids = self.read(words.flatten(0, 1))
        tokens = self.project(memory.tokens).repeat_interleave(words.shape[1], dim=0)
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=tokens)
        return out.logits.view(*words.shape, -1)

    def start(self, memory: Memory, captions: int = 1) -> LanguageState:
        return LanguageState([self.project(memory.tokens).repeat_interleave(captions, dim=0)], [])

    def step(self, words: Tensor, state: DecoderState) -> tuple[Tensor, LanguageState]:
        assert isinstance(state, LanguageState)
        ids, length = self.read(words[:, None], state.length), state.length + 1
        out = self.model(
            input_ids=ids,
            attention_mask=ids.new_ones(len(ids), length),
            encoder_hidden_states=state.words[0],
            output_attentions=True,
            **cache_arguments(self.model, state.cache),
        )
        looked = [_mean(out.cross_attentions)] if out.cross_attentions else []
        return out.logits[:, -1], LanguageState(state.words, [], length, looked, cache_of(out))


class GitDecoder(Language):
    """GIT: the image's tokens stand before the words, which look at both.

    The model encodes the image by itself wherever it begins to write. Here that is done once for all captions, so
    what it takes for its image encoder hands on the tokens.
    """

    def __init__(self, model: Any, numbers: VocabMap, positions: int) -> None:
        super().__init__(model, numbers, positions)
        model.git.image_encoder = _Seen()

    def forward(self, words: Tensor, memory: Memory) -> Tensor:
        """Words [B, K, T] of K captions for each image to their logits after each, [B, K, T, V]."""
        ids = self.read(words.flatten(0, 1))
        tokens = memory.tokens.repeat_interleave(words.shape[1], dim=0)
        out = self.model(input_ids=ids, pixel_values=tokens[:, None], use_cache=False)
        return out.logits[:, tokens.shape[1] :].view(*words.shape, -1)

    def start(self, memory: Memory, captions: int = 1) -> LanguageState:
        # transformers 4 tells an image's tokens from words by this count, which is wrong where a video model gets one
        # image: the first words would be dropped from its cache.
        for layer in self.model.git.encoder.layer:
            layer.attention.self.image_patch_tokens = memory.tokens.shape[1]
        return LanguageState([memory.tokens.repeat_interleave(captions, dim=0)], [])

    def step(self, words: Tensor, state: DecoderState) -> tuple[Tensor, LanguageState]:
        assert isinstance(state, LanguageState)
        ids, tokens = self.read(words[:, None], state.length), state.words[0]
        # transformers 4 caches the words alone, and reads the image again with each.
        unseen = state.cache is None or state.cache.get_seq_length() == state.length
        out = self.model(
            input_ids=ids,
            position_ids=torch.full_like(ids, state.length),
            pixel_values=tokens[:, None] if unseen else None,
            output_attentions=True,
            **cache_arguments(self.model, state.cache),
        )
        looked = _mean(out.attentions)[:, : tokens.shape[1]]
        return out.logits[:, -1], LanguageState(state.words, [], state.length + 1, [looked], cache_of(out))


class _Seen(nn.Module):
    """Stands for an image encoder whose work is done."""

    def forward(self, pixel_values: Tensor, **named: Any) -> SimpleNamespace:
        """Tokens [R, 1, M, D] in the place of images, to tokens [R, M, D]."""
        return SimpleNamespace(last_hidden_state=pixel_values[:, 0])


def vision_tower(model: Any) -> Any:
    """The image encoder of a captioner."""
    kind = model.config.model_type
    return model.git.image_encoder if kind == "git" else model.vision_model if kind == "blip" else model.encoder


def taken_apart(model: Any, numbers: VocabMap) -> tuple[Any, Language]:
    """Image encoder and text decoder of a captioner. The decoder forms its attention, since people look at it."""
    kind, encoder = model.config.model_type, vision_tower(model)
    text = model if kind == "git" else model.text_decoder if kind == "blip" else model.decoder
    text.set_attn_implementation("eager")
    positions = getattr(text.config, "max_position_embeddings", None) or 1024
    if kind == "git":
        return encoder, GitDecoder(text, numbers, positions)
    return encoder, CrossDecoder(text, numbers, positions, getattr(model, "enc_to_dec_proj", None))


def _mean(layers: Sequence[Tensor]) -> Tensor:
    """Attention of the last word [R, M], the mean over layers of [R, heads, T, M] and their heads."""
    return torch.stack([layer[:, :, -1].float().mean(dim=1) for layer in layers]).mean(dim=0)
