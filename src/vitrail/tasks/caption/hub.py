"""Pretrained captioners of the Hub: image encoder and text decoder through transformers.

Their decoders read the image in one of two ways: by cross-attention to its tokens (`vision-encoder-decoder`, BLIP,
arXiv 2201.12086), or with its tokens as a prefix before the words (GIT, arXiv 2205.14100).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.hf import CAPTIONERS, fresh, with_memory
from vitrail.tasks.caption.decoders import Memory
from vitrail.tasks.caption.language import (
    HFTokenizer,
    LanguageDecoder,
    LanguageState,
    VocabMap,
    cache_arguments,
    cache_of,
    last_word_attention,
)
from vitrail.tasks.caption.settings import Captioning, Decoding
from vitrail.tasks.caption.task import Caption
from vitrail.tasks.caption.text import stored_tokenizer
from vitrail.tasks.encoder import Encoder
from vitrail.tasks.values import Batch, Checkpoint
from vitrail.vit import Tokens


class HubCaption(Caption):
    """A captioner of the Hub. Batch keys are those of `Caption`. It predicts, but cannot be trained further."""

    def __init__(
        self, model: Any, vocabulary: VocabMap, tokenizer: HFTokenizer, preprocess: Preprocess, how: Decoding
    ) -> None:
        """`model` is a model of transformers, which is split into encoder and decoder."""
        self.transformers = json.loads(model.config.to_json_string(use_diff=False))
        encoder, decoder = taken_apart(model, vocabulary)
        config = HFEncoderConfig(encoder.config.hidden_size, preprocess.channels, preprocess.size)
        settings = Captioning(smoothing=0.0, lower=False, decoding=how)
        super().__init__(cast(Encoder, HFEncoder(encoder, config)), settings, tokenizer, preprocess, decoder)
        self.vocabulary = vocabulary

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        vocabulary = VocabMap(**config["vocabulary"])
        tokenizer = stored_tokenizer(config, files, lambda text: HFTokenizer.from_text(text, vocabulary))
        preprocess, how = Preprocess.from_dict(config["preprocess"]), Decoding(**config["captioning"]["decoding"])
        values = config["transformers"]
        maker = CAPTIONERS[values["model_type"]]
        return with_memory(lambda: cls(fresh(values, maker), vocabulary, tokenizer, preprocess, how), files.shapes)

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        raise UserError("a captioner of the Hub cannot be trained: train caption-zoo or caption-prefix from an encoder")

    def config(self) -> dict[str, Any]:
        return {
            "transformers": self.transformers,
            "vocabulary": asdict(self.vocabulary),
            "captioning": {"decoding": asdict(self.option)},
            "tokenizer": self.tokenizer.fingerprint,
        }


@dataclass(frozen=True)
class HFEncoderConfig:
    """The config fields that the rest of the package needs of an encoder."""

    kind: ClassVar[str] = "transformers"
    width: int
    channels: int
    image_size: tuple[int, int]


class HFEncoder(nn.Module):
    """An image encoder of transformers."""

    def __init__(self, model: nn.Module, config: HFEncoderConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, H, W] to all tokens that the decoder needs, with the prefix separate."""
        channels = self.config.channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise UserError(f"expected images [B, {channels}, H, W], got {list(images.shape)}: check the channels")
        tokens = self.model(pixel_values=images).last_hidden_state
        grid = grid_of(tokens.shape[1], images.shape[2], images.shape[3])
        prefix = tokens.shape[1] - grid[0] * grid[1]
        return Tokens(tokens[:, :prefix], tokens[:, prefix:], grid)

    def pool(self, tokens: Tokens) -> Tensor:
        """The mean of all tokens, [B, D]."""
        return torch.cat([tokens.prefix, tokens.patches], dim=1).mean(dim=1)


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of an image's tokens: the grid of its shape that leaves the fewest tokens as a prefix."""
    for count in range(tokens, 0, -1):
        rows = max(1, round((count * height / width) ** 0.5))
        columns = count // rows
        if rows * columns == count and abs(rows * width - columns * height) < max(height, width):
            return rows, columns
    raise ValueError("an image has at least one token")


class CrossDecoder(LanguageDecoder):
    """A text decoder that reads the image by cross-attention."""

    def __init__(self, model: Any, vocabulary: VocabMap, positions: int, project: nn.Module | None = None) -> None:
        """`project` maps the image's tokens to the decoder's width, if the model has such a layer."""
        super().__init__(model, vocabulary, positions)
        self.project = project or nn.Identity()

    def _captions(self, words: Tensor, memory: Memory) -> Tensor:
        ids = self.read(words.flatten(0, 1))
        tokens = self.project(memory.tokens).repeat_interleave(words.shape[1], dim=0)
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=tokens)
        return out.logits.view(*words.shape, -1)

    def _start(self, memory: Memory) -> LanguageState:
        return LanguageState(None, tokens=self.project(memory.tokens))

    def _step(
        self, words: Tensor, rows: Tensor | None, state: LanguageState
    ) -> tuple[Tensor, Tensor | None, LanguageState]:
        state = state.chosen(rows)
        ids, length = self.read(words[:, None], state.length), state.length + 1
        out = self.model(
            input_ids=ids,
            attention_mask=ids.new_ones(len(ids), length),
            encoder_hidden_states=state.tokens,
            output_attentions=True,
            **cache_arguments(self.model, state.cache),
        )
        attention = last_word_attention(out.cross_attentions) if out.cross_attentions else None
        return out.logits[:, -1], attention, LanguageState(cache_of(out), length, state.tokens)


class GitDecoder(LanguageDecoder):
    """GIT: the image's tokens come before the words, which attend to both.

    The model encodes the image itself at the start of each caption. Here the image is encoded once for all captions, so
    the model's image encoder is replaced by a module that passes the tokens through.
    """

    def __init__(self, model: Any, vocabulary: VocabMap, positions: int) -> None:
        super().__init__(model, vocabulary, positions)
        model.git.image_encoder = _Seen()

    def _captions(self, words: Tensor, memory: Memory) -> Tensor:
        ids = self.read(words.flatten(0, 1))
        tokens = memory.tokens.repeat_interleave(words.shape[1], dim=0)
        out = self.model(input_ids=ids, pixel_values=tokens[:, None], use_cache=False)
        return out.logits[:, tokens.shape[1] :].view(*words.shape, -1)

    def _start(self, memory: Memory) -> LanguageState:
        # transformers 4 separates image tokens from words by this count, which is wrong if a video model gets one
        # image: the first words would be dropped from its cache.
        for layer in self.model.git.encoder.layer:
            layer.attention.self.image_patch_tokens = memory.tokens.shape[1]
        return LanguageState(None, tokens=memory.tokens)

    def _step(
        self, words: Tensor, rows: Tensor | None, state: LanguageState
    ) -> tuple[Tensor, Tensor | None, LanguageState]:
        state = state.chosen(rows)
        assert state.tokens is not None
        ids, tokens = self.read(words[:, None], state.length), state.tokens
        # transformers 4 caches only the words, and reads the image again with each word.
        unseen = state.cache is None or state.cache.get_seq_length() == state.length
        out = self.model(
            input_ids=ids,
            position_ids=torch.full_like(ids, state.length),
            pixel_values=tokens[:, None] if unseen else None,
            output_attentions=True,
            **cache_arguments(self.model, state.cache),
        )
        attention = last_word_attention(out.attentions)[:, : tokens.shape[1]]
        return out.logits[:, -1], attention, LanguageState(cache_of(out), state.length + 1, tokens)


class _Seen(nn.Module):
    """Replaces the image encoder: the images are already encoded."""

    def forward(self, pixel_values: Tensor, **named: Any) -> SimpleNamespace:
        """Tokens [R, 1, M, D] instead of images, to tokens [R, M, D]."""
        return SimpleNamespace(last_hidden_state=pixel_values[:, 0])


def vision_tower(model: Any) -> Any:
    """The image encoder of a captioner."""
    kind = model.config.model_type
    return model.git.image_encoder if kind == "git" else model.vision_model if kind == "blip" else model.encoder


def taken_apart(model: Any, vocabulary: VocabMap) -> tuple[Any, LanguageDecoder]:
    """Image encoder and text decoder of a captioner. The decoder computes its attention explicitly, for figures."""
    kind, encoder = model.config.model_type, vision_tower(model)
    text = model if kind == "git" else model.text_decoder if kind == "blip" else model.decoder
    text.set_attn_implementation("eager")
    positions = getattr(text.config, "max_position_embeddings", None) or 1024
    if kind == "git":
        return encoder, GitDecoder(text, vocabulary, positions)
    return encoder, CrossDecoder(text, vocabulary, positions, getattr(model, "enc_to_dec_proj", None))
