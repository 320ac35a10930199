"""What a recipe may set of a captioner: the decoder, its vocabulary, how both are trained, how captions are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from vitrail.errors import UserError
from vitrail.tasks.task import Settings

MOST = 10_000
"""captions at a time, or pieces of one, far above any use: more would only ask for memory that no machine has"""


@dataclass(frozen=True)
class Decoding:
    """How captions are written. It travels with a checkpoint: its score was taken so."""

    beam: int = 3
    """captions kept at each word; 1 is greedy"""
    length_penalty: float = 0.7
    """a caption's log-probability is divided by its length to this power, or short ones would always win"""
    sample: bool = False
    """draw words by their probabilities in place of a search; `beam` is then how many captions are drawn"""
    temperature: float = 1.0
    """of the draws: below 1 likely words become likelier"""
    top_k: int = 0
    """draw among this many likeliest words; 0 for all"""
    top_p: float = 1.0
    """draw among the likeliest words that hold this share of the probability (1904.09751)"""
    sampling_seed: int = 0
    """of the draws"""
    no_repeat_ngram_size: int = 3
    """no row of this many pieces comes twice in a caption; 0 allows it. A rare word is several pieces"""
    max_length: int = 40
    """pieces of a caption at most, its end included"""
    match: float = 0.0
    """how much a finished caption's match with its image counts, in a captioner that has learned to match them: the
    logit of its contrastive loss times this is added to the score, and the best of the `beam` captions comes first"""
    consensus: float = 0.0
    """the same for its CIDEr with the captions of similar training images, in a captioner with an index of these"""
    neighbours: int = 100
    """how many similar images those are"""

    def __post_init__(self) -> None:
        if (
            self.beam < 1
            or self.max_length < 1
            or self.top_k < 0
            or self.no_repeat_ngram_size < 0
            or self.length_penalty < 0
        ):
            raise UserError(
                "beam and max_length must be at least 1, top_k, no_repeat_ngram_size and length_penalty at least 0"
            )
        if max(self.beam, self.max_length) > MOST:
            raise UserError(f"beam and max_length must be at most {MOST:,}")
        if not 0 < self.top_p <= 1:
            raise UserError("top_p must be above 0 and at most 1")
        if not self.length_penalty <= 10 or not 0.01 <= self.temperature <= 100:
            raise UserError("length_penalty must be at most 10, and temperature from 0.01 to 100")
        if not (0 <= self.match <= 100 and 0 <= self.consensus <= 100):
            raise UserError(f"match and consensus must be from 0 to 100, got {self.match} and {self.consensus}")
        if self.neighbours < 1:
            raise UserError(f"neighbours must be at least 1, got {self.neighbours}")


@dataclass(frozen=True)
class LanguageSettings:
    """The language model that writes, and how the image reaches it (ClipCap, 2111.09734)."""

    language_model: str = "openai-community/gpt2"
    """a causal language model that transformers loads: a Hub id or a folder"""
    tune_language: bool = False
    """train the language model too; else it stays as it is"""
    join: Literal["transformer", "mlp", "projection"] = "transformer"
    """transformer: learned queries read all of the image's tokens, for a frozen language model (section 3.3 of
    ClipCap); mlp: the image's one vector through a hidden layer, for a tuned one (section 3.3); projection: each of
    the image's tokens through one linear layer, so that words can be traced to places"""
    prefix_length: int = 10
    """vectors that stand for the image; with `projection` there are as many as the image has tokens"""
    join_depth: int = 8
    """blocks of the joining Transformer"""

    def __post_init__(self) -> None:
        for name in ("prefix_length", "join_depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Captioning(Settings):
    """The decoder, its vocabulary, and how both are trained: fields of a run."""

    name = "caption"
    any_encoder = True

    decoder: Literal["recurrent", "attentive", "transformer", "language_model"] = "transformer"
    """reads the image first (1411.4555), looks at it before each word (1502.03044), a Transformer (1706.03762), or a
    pretrained language model (recipe caption-prefix)"""
    cell: Literal["rnn", "gru", "lstm"] = "lstm"
    """of the recurrent decoders"""
    decoder_width: int = 256
    decoder_depth: int = 3
    """layers of the Transformer or of the recurrent decoder; the attentive one has a single cell"""
    decoder_heads: int = 4
    """of the Transformer"""
    decoder_dropout: float = 0.1
    most_words: int = 64
    """words of a caption at most, its end included; of a longer one the first words are read, and no end"""
    vocabulary: Literal["bpe", "words"] = "bpe"
    vocabulary_size: int = 3000
    lower: bool = True
    """captions are learned in lower case"""
    captions: int = 2
    """how many of each image's captions a step reads"""
    smoothing: float = 0.1
    """label smoothing"""
    word_dropout: float = 0.0
    """probability that a word that is read becomes `<unknown>`"""
    contrastive: float = 0.0
    """weight, that of the captions' words being 1, of the loss that matches images with their captions, among those of
    the whole batch (CoCa, 2205.01917)"""
    bag_of_words: float = 0.0
    """weight of the loss that predicts from the image alone which words its captions use (1511.02251)"""
    text_depth: int = 0
    """blocks at the bottom of the Transformer that read words alone; the contrastive loss needs them"""
    self_critical: float = 0.0
    """weight of the reward, CIDEr, of sampled captions over the mean of the others (1612.00563); 0 for none. It is
    then the only loss: smoothing, word dropout and `contrastive` rest, and `captions` + 1 are sampled per image"""
    scst_temperature: float = 1.0
    """of these samples: below 1 where label smoothing has left some probability to every word"""
    language: LanguageSettings = field(default_factory=LanguageSettings)
    """of the decoder language_model"""
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        for name in ("decoder_width", "decoder_depth", "decoder_heads", "most_words", "captions"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("smoothing", "word_dropout", "decoder_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is a fraction from 0 to below 1, got {getattr(self, name)}")
        for name in ("contrastive", "bag_of_words", "self_critical"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is a weight, from 0, got {getattr(self, name)}")
        if self.self_critical and self.bag_of_words:
            raise UserError("self_critical learns from the reward alone: set bag_of_words to 0")
        if not 0 < self.scst_temperature < math.inf:
            raise UserError(f"scst_temperature must be above 0, got {self.scst_temperature}")
        if self.contrastive and not (self.decoder == "transformer" and self.text_depth):
            raise UserError(
                "contrastive compares images with what a Transformer's lowest blocks make of words alone: it needs "
                "the decoder transformer with a text_depth of at least 1, or a weight of 0"
            )
        if (self.decoding.match or self.decoding.consensus) and not self.contrastive:
            raise UserError("match and consensus are for captioners with a contrastive loss: set them to 0, or it not")
        self._check_decoder()

    def _check_decoder(self) -> None:
        if self.decoder == "language_model":
            for name, value in NOT_OF_LANGUAGE_MODELS.items():
                if getattr(self, name) != value:
                    flag = name.replace("_", "-")
                    raise UserError(
                        f"a language model comes with its own words and layers, and takes no --{flag}: leave it out, "
                        "and use the recipe caption-prefix"
                    )
        elif self.language != LanguageSettings():
            changed = (e.name for e in fields(self.language) if getattr(self.language, e.name) != e.default)
            flag = next(changed).replace("_", "-")
            raise UserError(f"--{flag} is for a language model, and the decoder is {self.decoder}: use caption-prefix")
        if self.decoder == "transformer" and self.decoder_width % self.decoder_heads:
            raise UserError(
                f"decoder width {self.decoder_width} does not divide into {self.decoder_heads} heads: change one"
            )
        if not 0 <= self.text_depth < self.decoder_depth:
            raise UserError(f"text_depth is from 0 to below the decoder's depth, got {self.text_depth}")
        if self.text_depth and self.decoder != "transformer":
            raise UserError(
                f"text_depth counts blocks of the Transformer, and the decoder is {self.decoder}: set it to 0"
            )


FREE = (
    *("captions", "smoothing", "word_dropout", "decoding"),
    *("contrastive", "bag_of_words", "self_critical", "scst_temperature"),
)
"""what of a captioner may change when its training continues; the rest is in its weights and its vocabulary"""


PLAIN: dict[str, Any] = {"smoothing": 0.0, "lower": False}
"""what a captioner with somebody else's vocabulary has to set: label smoothing would give some probability to words
that it cannot say, and its own tokenizer decides on the case"""
_OF_ALL = ("most_words", "captions", "self_critical", "scst_temperature", "decoder", "language", "decoding")
NOT_OF_LANGUAGE_MODELS: dict[str, Any] = {
    **{entry.name: entry.default for entry in fields(Captioning) if entry.name not in _OF_ALL},
    **PLAIN,
}
"""fields that a language model makes no use of, and what they have to be"""


def merge_settings(own: Captioning, asked: Captioning) -> Captioning:
    """The settings `asked` for, with the decoder and the vocabulary of weights whose settings are `own`.

    Another decoder is a UserError, but in self-critical training, whose recipe is for any captioner.
    """
    critical = bool(asked.self_critical)
    recurrent = own.decoder in ("recurrent", "attentive")
    if not critical and (asked.decoder != own.decoder or (recurrent and asked.cell != own.cell)):
        raise UserError(
            f"the captioner to continue from has the decoder {_kind(own)}, and the recipe {_kind(asked)}: choose "
            "another recipe, or other weights"
        )
    if critical and not own.contrastive:
        asked = replace(asked, contrastive=0.0, decoding=replace(asked.decoding, match=0.0))
    # Self-critical training makes no use of what a language model makes no use of.
    fixed = NOT_OF_LANGUAGE_MODELS if critical and own.decoder == "language_model" else {}
    return replace(own, **{name: getattr(asked, name) for name in FREE if name not in fixed})


def _kind(config: Captioning) -> str:
    return f"{config.decoder} {config.cell}" if config.decoder in ("recurrent", "attentive") else config.decoder
