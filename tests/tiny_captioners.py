"""Tiny captioners and language models of transformers with random weights, as folders, for tests of several rooms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

SIDE, PATCH, WIDTH = 16, 8, 16
TEXTS = [
    "a dog runs over the grass .",
    "two children play in the water .",
    "a man's hat isn't red , it is blue",
    "a dark image",
    "a light and noisy image",
    "something middle and noisy",
    "naïve café ☕ שלום",
]
EYES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
PIXELS = """{"do_resize": true, "size": {"height": 16, "width": 16}, "resample": 3, "do_center_crop": false,
"do_rescale": true, "rescale_factor": 0.00392156862745098, "do_normalize": true,
"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}"""


def byte_pairs() -> tokenizers.Tokenizer:
    """As GPT-2's, whose one special word begins and ends a text."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    return inner


def word_pieces() -> tokenizers.Tokenizer:
    """As BERT's: pieces that continue with ##, and a decoder that cleans up."""
    letters = sorted(set("".join(TEXTS)) - {" "})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", *letters, *(f"##{c}" for c in letters), "dog", "runs", "red"]
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.add_special_tokens(words[:5])
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=True)
    return inner


def gpt2(vocabulary: int, **more: Any) -> Any:
    """A config."""
    from transformers import GPT2Config

    size = {"vocab_size": vocabulary, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    return GPT2Config(**{**size, "bos_token_id": 0, "eos_token_id": 0, **more})


def language_model(folder: Path) -> Any:
    """GPT-2, and what lies beside it."""
    from transformers import GPT2LMHeadModel

    inner = byte_pairs()
    return _save(GPT2LMHeadModel(gpt2(inner.get_vocab_size())), inner, folder, pixels=False)


def vit_gpt2(folder: Path) -> Any:
    """`vision-encoder-decoder` of a ViT and a GPT-2 of another width."""
    from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    inner = byte_pairs()
    eyes = ViTConfig(**{**EYES, "hidden_size": 24})
    text = gpt2(inner.get_vocab_size(), add_cross_attention=True, is_decoder=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        eyes, text, decoder_start_token_id=0, pad_token_id=0, eos_token_id=0
    )
    return _save(VisionEncoderDecoderModel(config), inner, folder)


def blip(folder: Path) -> Any:
    """BLIP's captioner."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    inner = word_pieces()
    text = {
        **{name: value for name, value in EYES.items() if name not in ("image_size", "patch_size")},
        "vocab_size": inner.get_vocab_size(),
        "encoder_hidden_size": WIDTH,
        "projection_dim": WIDTH,
        "max_position_embeddings": 64,
        "bos_token_id": 4,
        "eos_token_id": 2,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    return _save(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=EYES)), inner, folder)


def git(folder: Path, **more: Any) -> Any:
    """GIT, its config with `more`."""
    from transformers import GitConfig, GitForCausalLM

    inner = word_pieces()
    config = GitConfig(
        vision_config=EYES,
        vocab_size=inner.get_vocab_size(),
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **{name: value for name, value in EYES.items() if name not in ("image_size", "patch_size")},
        **more,
    )
    return _save(GitForCausalLM(config), inner, folder)


CAPTIONERS = {"vision-encoder-decoder": vit_gpt2, "blip": blip, "git": git}


def _save(model: Any, inner: tokenizers.Tokenizer, folder: Path, pixels: bool = True) -> Any:
    """The model with weights large enough that its words change with the image."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.tie_weights()
    folder.mkdir(parents=True)
    model.eval().save_pretrained(folder)
    inner.save(str(folder / "tokenizer.json"))
    if pixels:
        (folder / "preprocessor_config.json").write_text(PIXELS)
    return model


def encoder(folder: Path, kind: str) -> Any:
    """An image encoder: `dinov2`, `clip` (with its projection) or `siglip`, and how it wants its images."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2Config,
        Dinov2Model,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    models_of: dict[str, Callable[[], Any]] = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(**{**EYES, "image_size": 40}, mlp_ratio=2)),
        "clip": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**EYES, projection_dim=12)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**EYES)),
    }
    folder.mkdir(parents=True)
    model = models_of[kind]().eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(PIXELS)
    return model
