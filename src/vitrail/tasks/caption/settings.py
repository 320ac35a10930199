"""Settings of a captioner: the decoder, its vocabulary, training, and decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from vitrail.errors import UserError, require, require_choices
from vitrail.tasks.values import Settings, UsedWith

MAX_COUNT = 10_000
"""upper limit for beams and caption lengths, far above any real use: more would exhaust any machine's memory"""
LIMITS = (
    ("beam", 1, MAX_COUNT),
    ("max_length", 1, MAX_COUNT),
    ("length_penalty", 0, 10),
    ("temperature", 0.01, 100),
    ("match", 0, 100),
    ("consensus", 0, 100),
)
"""options of decoding, each with its least and its largest value"""


@dataclass(frozen=True)
class Decoding:
    """How captions are generated. Saved with the checkpoint, whose score was measured with these values."""

    beam: int = 3
    """beam size: captions kept at each step; 1 is greedy search"""
    length_penalty: float = 0.7
    """a caption's log-probability is divided by its length to this power; 0 prefers short captions"""
    sample: bool = False
    """sample words instead of searching; `beam` is then the number of captions to sample"""
    temperature: float = 1.0
    """softmax temperature for sampling; below 1, likely words become more likely"""
    top_k: int = 0
    """sample from this many most likely words; 0 for all"""
    top_p: float = 1.0
    """nucleus sampling: sample from the most likely words with this total probability (arXiv 1904.09751)"""
    sampling_seed: int = 0
    """random seed for sampling"""
    no_repeat_ngram_size: int = 3
    """no sequence of this many tokens occurs twice in a caption; 0 for no limit. A rare word is several tokens"""
    max_length: int = 40
    """maximum caption length in tokens, including the end token"""
    match: float = 0.0
    """weight for reranking captions by how well they match the image, in captioners trained with a contrastive loss:
    its logit times this weight is added to the score"""
    consensus: float = 0.0
    """weight for reranking by CIDEr against the captions of similar training images, in captioners with such an
    index"""
    neighbours: int = 100
    """number of similar training images"""

    def __post_init__(self) -> None:
        require(self, 0, math.inf, "top_k", "no_repeat_ngram_size")
        for name, low, high in LIMITS:
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must be from {low:,} to {high:,}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        require(self, 1, math.inf, "neighbours")


@dataclass(frozen=True)
class LanguageSettings:
    """The language model, and how the image is passed to it (ClipCap, arXiv 2111.09734)."""

    language_model: str = "openai-community/gpt2"
    """causal language model for transformers: a Hub id or a folder"""
    tune_language: bool = False
    """also train the language model; otherwise it is frozen"""
    join: Literal["transformer", "mlp", "projection"] = "transformer"
    """how image features become the prefix. transformer: learned queries attend to all image tokens, for a frozen
    language model (ClipCap, section 3.3); mlp: the pooled image vector through one hidden layer, for a trained language
    model (section 3.3); projection: each image token through one linear layer, so that attention maps to image
    regions"""
    prefix_length: int = 10
    """number of prefix vectors for the image; with `projection` it is the number of image tokens"""
    join_depth: int = 8
    """blocks of the mapping Transformer"""

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("prefix_length", "join_depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Captioning(Settings):
    """Decoder, vocabulary and training settings of a captioner."""

    name = "caption"
    main = ("decoder", "captions", "smoothing")
    any_encoder = True

    decoder: Literal["recurrent", "attentive", "transformer", "language_model"] = "transformer"
    """recurrent: reads the image first (arXiv 1411.4555); attentive: recurrent, with attention over the image before
    each word (arXiv 1502.03044); transformer (arXiv 1706.03762); language_model: a pretrained language model (recipe
    caption-prefix)"""
    cell: Literal["rnn", "gru", "lstm"] = "lstm"
    """cell of the recurrent decoders"""
    decoder_width: int = 256
    decoder_depth: int = 3
    """number of layers of the Transformer or of the recurrent decoder; the attentive decoder has a single cell"""
    decoder_heads: int = 4
    """attention heads of the Transformer"""
    decoder_dropout: float = 0.1
    most_words: int = 64
    """maximum caption length in tokens, including the end token; longer captions are truncated"""
    vocabulary: Literal["bpe", "words"] = "bpe"
    vocabulary_size: int = 3000
    lower: bool = True
    """convert captions to lower case for training"""
    captions: int = 2
    """captions per image in each training step"""
    smoothing: float = 0.1
    """label smoothing"""
    word_dropout: float = 0.0
    """word dropout: probability that an input word is replaced by `<unknown>`"""
    contrastive: float = 0.0
    """weight of the contrastive loss between images and captions over the whole batch (CoCa, arXiv 2205.01917),
    relative to the captioning loss"""
    bag_of_words: float = 0.0
    """weight of the bag-of-words loss: predict the words of the captions only from the image (arXiv 1511.02251)"""
    text_depth: int = 0
    """number of lowest Transformer blocks that read only text, without the image; the contrastive loss needs them"""
    self_critical: float = 0.0
    """weight of self-critical training on CIDEr (arXiv 1612.00563); 0 for none. It replaces all other losses:
    smoothing, word dropout and `contrastive` are unused, and `captions` + 1 captions are sampled per image"""
    scst_temperature: float = 1.0
    """sampling temperature of self-critical training; below 1 if label smoothing has given every word some
    probability"""
    language: LanguageSettings = field(default_factory=LanguageSettings)
    """settings of the decoder language_model"""
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("decoder_width", "decoder_depth", "decoder_heads", "most_words", "captions"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("smoothing", "word_dropout", "decoder_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("contrastive", "bag_of_words", "self_critical"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a weight of at least 0, got {getattr(self, name)}")
        if self.self_critical and self.bag_of_words:
            raise UserError("self_critical trains on the reward only: set bag_of_words to 0")
        if not 0 < self.scst_temperature < math.inf:
            raise UserError(f"scst_temperature must be above 0, got {self.scst_temperature}")
        if self.contrastive and not (self.decoder == "transformer" and self.text_depth):
            raise UserError(
                "contrastive compares images with the text features of a Transformer's lowest blocks: it needs "
                "the decoder transformer with a text_depth of at least 1, or a weight of 0"
            )
        if (self.decoding.match or self.decoding.consensus) and not self.contrastive:
            raise UserError("match and consensus need a contrastive loss: set both to 0, or contrastive above 0")
        self._check_decoder()

    def _check_decoder(self) -> None:
        if self.decoder == "language_model":
            for name, value in NOT_OF_LANGUAGE_MODELS.items():
                if getattr(self, name) != value:
                    flag = name.replace("_", "-")
                    raise UserError(
                        f"a language model has its own vocabulary and layers, and does not use --{flag}: leave it out, "
                        "and use the recipe caption-prefix"
                    )
        elif self.language != LanguageSettings():
            changed = (e.name for e in fields(self.language) if getattr(self.language, e.name) != e.default)
            flag = next(changed).replace("_", "-")
            raise UserError(f"--{flag} is for a language model, but the decoder is {self.decoder}: use caption-prefix")
        if self.decoder == "transformer" and self.decoder_width % self.decoder_heads:
            raise UserError(
                f"decoder width {self.decoder_width} does not divide into {self.decoder_heads} heads: change one"
            )
        if not 0 <= self.text_depth < self.decoder_depth:
            raise UserError(f"text_depth must be at least 0 and below the decoder's depth, got {self.text_depth}")
        if self.text_depth and self.decoder != "transformer":
            raise UserError(
                f"text_depth is for the Transformer decoder, but the decoder is {self.decoder}: set it to 0"
            )


FREE = (
    *("captions", "smoothing", "word_dropout", "decoding"),
    *("contrastive", "bag_of_words", "self_critical", "scst_temperature"),
)
"""settings that may change when training continues; the others are fixed by the weights and the vocabulary"""

USED_WITH: UsedWith = {
    "cell": ("decoder", ("recurrent", "attentive")),
    "decoder_heads": ("decoder", ("transformer",)),
    "scst_temperature": ("self_critical", ()),
    "join_depth": ("join", ("transformer",)),
    "temperature": ("sample", ()),
    "top_k": ("sample", ()),
    "top_p": ("sample", ()),
    "sampling_seed": ("sample", ()),
    "neighbours": ("consensus", ()),
}
"""settings that only some values of another one use (see `Task.used_with`)"""


PLAIN: dict[str, Any] = {"smoothing": 0.0, "lower": False}
"""required values with a language model's own vocabulary: label smoothing would give probability to tokens that it
cannot produce, and its tokenizer handles upper and lower case"""
_OF_ALL = ("most_words", "captions", "self_critical", "scst_temperature", "decoder", "language", "decoding")
NOT_OF_LANGUAGE_MODELS: dict[str, Any] = {
    **{entry.name: entry.default for entry in fields(Captioning) if entry.name not in _OF_ALL},
    **PLAIN,
}
"""fields that a language model does not use, and their required values"""


def merge_settings(own: Captioning, wanted: Captioning) -> Captioning:
    """The requested settings, with the decoder and the vocabulary of weights whose settings are `own`.

    Another decoder is a UserError, but in self-critical training, whose recipe is for any captioner.
    """
    critical = bool(wanted.self_critical)
    recurrent = own.decoder in ("recurrent", "attentive")
    if not critical and (wanted.decoder != own.decoder or (recurrent and wanted.cell != own.cell)):
        raise UserError(
            f"the captioner to continue from has the decoder {_kind(own)}, but the recipe has {_kind(wanted)}: choose "
            "another recipe, or other weights"
        )
    if critical and not own.contrastive:
        wanted = replace(wanted, contrastive=0.0, decoding=replace(wanted.decoding, match=0.0))
    # Self-critical training uses none of the fields that a language model does not use.
    fixed = NOT_OF_LANGUAGE_MODELS if critical and own.decoder == "language_model" else {}
    return replace(own, **{name: getattr(wanted, name) for name in FREE if name not in fixed})


def _kind(config: Captioning) -> str:
    return f"{config.decoder} {config.cell}" if config.decoder in ("recurrent", "attentive") else config.decoder
