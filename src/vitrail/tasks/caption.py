"""Captioning: what an image shows, in words."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.decode import Preprocess
from vitrail.data.random import uniform
from vitrail.data.sets import ImageSet, Splits
from vitrail.data.targets import Target, Texts
from vitrail.data.text import END, PAD, START, UNKNOWN, Tokenizer
from vitrail.errors import UserError
from vitrail.plain import describe, described, rebuild
from vitrail.tasks.caption_scores import CaptionMetric, Cider, check_scorers, human_ceiling, words
from vitrail.tasks.consensus import Consensus
from vitrail.tasks.decoders import AttentiveDecoder, Decoder, Memory, RecurrentDecoder, TransformerDecoder
from vitrail.tasks.encoder import KINDS, Encoder, encoder_for, one_vector, pooled_width, token_width
from vitrail.tasks.matching import BagOfWords, Match
from vitrail.tasks.search import Decoding, Written, write
from vitrail.tasks.task import Batch, Checkpoint, Features, Metric, Prediction, Score, Section, Settings, Task
from vitrail.vit import Tokens

log = logging.getLogger("vitrail")
Words = TypeVar("Words", bound=Tokenizer)

Reward = Callable[[Iterable[int], Iterable[str], Iterable[bool]], list[float]]
"""sample numbers of images, a caption of each and whether it came to its end, to the captions' scores"""


@dataclass(frozen=True)
class Captioning(Settings):
    """The decoder, its vocabulary, and how both are trained: fields of a run."""

    name = "caption"
    any_encoder = True

    decoder: Literal["recurrent", "attentive", "transformer"] = "transformer"
    """reads the image first (1411.4555), looks at it before each word (1502.03044), or a Transformer (1706.03762)"""
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
    """of each image's captions, how many a step reads"""
    smoothing: float = 0.1
    """label smoothing"""
    word_dropout: float = 0.0
    """chance that a word that is read becomes `<unknown>`"""
    contrastive: float = 0.0
    """weight, that of the captions' words being 1, of the loss that matches images with their captions (CoCa,
    2205.01917), among those of a step; where `accumulate` cuts a step, among those of each part"""
    bag_of_words: float = 0.0
    """weight of the loss that tells from the image alone which words its captions use (1511.02251)"""
    text_depth: int = 0
    """blocks at the bottom of the Transformer that read words alone; the contrastive loss needs them"""
    self_critical: float = 0.0
    """weight of the reward, CIDEr, of sampled captions over the mean of the others (1612.00563); 0 for none. It is
    learned from alone: smoothing, word dropout and `contrastive` rest, and of each image `captions` and one are
    drawn"""
    scst_temperature: float = 1.0
    """at which these samples are drawn: below 1 where label smoothing has left a chance to every word"""
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        for name in ("decoder_width", "decoder_depth", "decoder_heads", "most_words", "captions"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("smoothing", "word_dropout", "decoder_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is a share from 0 to below 1, got {getattr(self, name)}")
        for name in ("contrastive", "bag_of_words", "self_critical"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is a weight, from 0, got {getattr(self, name)}")
        if self.self_critical and self.bag_of_words:
            raise UserError("self_critical learns from the reward alone: let bag_of_words be 0")
        if not 0 < self.scst_temperature < math.inf:
            raise UserError(f"scst_temperature must be above 0, got {self.scst_temperature}")
        if self.decoder == "transformer" and self.decoder_width % self.decoder_heads:
            raise UserError(
                f"decoder width {self.decoder_width} does not divide into {self.decoder_heads} heads: change one"
            )
        if not 0 <= self.text_depth < self.decoder_depth:
            raise UserError(f"text_depth is from 0 to below the decoder's depth, got {self.text_depth}")
        if self.contrastive and not (self.decoder == "transformer" and self.text_depth):
            raise UserError(
                "contrastive compares images with what a Transformer's lowest blocks know from words alone: it needs "
                "the decoder transformer with a text_depth of at least 1, or a weight of 0"
            )
        if (self.decoding.match or self.decoding.consensus) and not self.contrastive:
            raise UserError("match and consensus are for captioners with a contrastive loss: let them be 0, or it not")
        if self.text_depth and self.decoder != "transformer":
            raise UserError(
                f"text_depth counts blocks of the Transformer, and the decoder is {self.decoder}: let it be 0"
            )


FREE = (
    *("captions", "smoothing", "word_dropout", "decoding"),
    *("contrastive", "bag_of_words", "self_critical", "scst_temperature"),
)
"""what of a captioner may change when it goes on learning; the rest is in its weights and its vocabulary"""


@dataclass(frozen=True)
class Captions(Prediction):
    """The best captions of an image."""

    caption: str
    """the best one"""
    captions: list[dict[str, Any]]
    """`{"caption": text, "score": s, "tokens": [{"text": piece, "p": probability}]}`, best first"""

    def row(self) -> dict[str, Any]:
        return {"caption": self.caption, "captions": self.captions}

    def text(self) -> str:
        return self.caption


class Caption(Task):
    """An encoder of images and a decoder of words.

    Keys of a batch: `image` [B, C, H, W] normalised floats, `sample` [B]; to learn from, `label` int64 [B, K, T], the
    numbers of K captions, each ended by `END` and filled up with `PAD` (a caption that is missing is all `PAD`); to
    score, `captions`, the references as text. In training `epoch` tells whose turn it is among them.
    """

    name = "caption"
    settings = Captioning
    target = Texts
    options = Decoding
    score = Score("cider", unit="")
    solved = ("knn",)
    free = FREE
    unused_when_frozen = (
        *("captions", "smoothing", "word_dropout", "contrastive", "bag_of_words"),
        *("self_critical", "scst_temperature"),
    )
    metric_reads = "answers"
    match: Match
    bag: BagOfWords
    decoder: Decoder
    consensus: Consensus

    def __init__(
        self,
        encoder: Encoder,
        config: Captioning,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        decoder: Decoder | None = None,
    ) -> None:
        """`decoder` stands in for the one that the config asks for."""
        super().__init__()
        self.encoder = encoder
        self.captioning = config
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.option = config.decoding
        width = pooled_width(encoder.config)
        self.decoder = decoder or decoder_for(config, tokenizer.size, token_width(encoder.config), width)
        self._make_heads()
        self.spaced = torch.tensor(tokenizer.spaced(), device="cpu")  # no weight: also where weights are yet to come
        self.reward: Reward | None = None
        """what self-critical training is rewarded with"""

    def _make_heads(self) -> None:
        """A head for each loss that has a weight: the one that is there where there is one."""
        config, width = self.captioning, pooled_width(self.encoder.config)
        for name, weight in (("match", config.contrastive), ("bag", config.bag_of_words)):
            if hasattr(self, name) and not weight:
                delattr(self, name)
        if config.contrastive and not hasattr(self, "match"):
            self.match = Match(width, config.decoder_width)
        if config.bag_of_words and not hasattr(self, "bag"):
            self.bag = BagOfWords(width, self.tokenizer.size)

    def init_word_bias(self, labels: Tensor) -> None:
        """Let each word be as likely at first as it is in the captions `labels` [N, K, T], whatever the image.

        AdamW moves a bias by its rate a step, so that to say how common a word is would else be left to the image's
        vectors for long: as one direction that they all share, in which what tells them apart is lost.
        """
        there = labels[labels != PAD]
        counts = torch.bincount(there, minlength=self.tokenizer.size) + 0.1
        self.decoder.bias.data.copy_((counts / counts.sum()).log())
        if self.captioning.bag_of_words:
            self.bag.init_word_bias(labels)

    @classmethod
    def create(cls, settings: Captioning, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        """A captioner whose vocabulary comes from the captions of the training split."""
        check_scorers()  # which are needed at the first evaluation
        captioned = Texts.of(splits.train).captions
        if settings.self_critical:
            raise UserError("self-critical training continues from a captioner: name one with --init")
        texts = [caption for captions in captioned for caption in captions]
        tokenizer = Tokenizer.train(texts, settings.vocabulary, settings.vocabulary_size, lower=settings.lower)
        task = cls(encoder, settings, tokenizer, preprocess)
        task.init_word_bias(numbered(captioned, tokenizer, settings.most_words))
        return task

    @classmethod
    def merged(cls, settings: Any, loaded: Task) -> Any:
        """The settings with the decoder and the vocabulary of `loaded`, where that is a captioner."""
        whole = loaded if isinstance(loaded, cls) else None
        if settings.self_critical and whole is None:
            raise UserError("self-critical training continues from a captioner: name one with --init")
        if whole is None:
            return settings
        if settings.contrastive and not settings.self_critical and not whole.captioning.text_depth:
            raise UserError(
                "matching needs blocks that read words alone, which this captioner lacks: start from one of "
                "caption-match"
            )
        return whole.merge_config(settings)

    @classmethod
    def continues(cls, settings: Any, loaded: Task) -> bool:
        return isinstance(loaded, cls)

    @classmethod
    def adopt(cls, settings: Any, loaded: Task, splits: Splits, preprocess: Preprocess) -> Self:
        """The captioner `loaded` itself, or a fresh decoder around the encoder of another task."""
        if not isinstance(loaded, cls):
            return cls.create(settings, loaded.encoder, splits, preprocess)
        check_scorers()
        captioned = Texts.of(splits.train).captions
        had_bag = hasattr(loaded, "bag")
        loaded.configure(settings)
        loaded.preprocess = preprocess
        if settings.self_critical:
            loaded.reward = reward_of(captioned)
        if loaded.captioning.bag_of_words and not had_bag:
            loaded.bag.init_word_bias(numbered(captioned, loaded.tokenizer, loaded.captioning.most_words))
        return loaded

    @classmethod
    def check(cls, settings: Any, method: str) -> None:
        if settings.decoding.consensus and method != "knn":
            raise UserError("consensus in decoding is for the recipe caption-rerank and its method knn: let it be 0")

    def prepare_to_solve(self, method: str, images: int) -> None:
        if method != "knn" or not hasattr(self, "match"):
            raise UserError(
                "method knn remembers images by what they match: with --init name a captioner that has learned to "
                "match, as with caption-match"
            )

    def solve(self, method: str, train: Features, val: Callable[[], Features]) -> list[dict[str, float]]:
        self.build_index(*train)
        return []

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        encoder = encoder_for(described(config["encoder"], KINDS, "vit"))
        tokenizer = stored_tokenizer(config, files, Tokenizer.from_json)
        settings, preprocess = rebuild(Captioning, config["captioning"]), Preprocess.from_dict(config["preprocess"])
        task = cls(encoder, settings, tokenizer, preprocess)
        if "remembered" in config:
            task.consensus = Consensus(**config["remembered"])
        return task

    def choose(self, changes: Mapping[str, Any]) -> None:
        if changes.get("match") and not hasattr(self, "match"):
            raise UserError("--match is for captioners that have learned to match, as with caption-match: leave it out")
        if (changes.get("consensus") or "neighbours" in changes) and not hasattr(self, "consensus"):
            raise UserError("--consensus and --neighbours are for captioners of caption-rerank: leave them out")
        super().choose(changes)
        drawing = [name for name in changes if name in ("temperature", "top_k", "top_p", "sampling_seed")]
        if not self.option.sample and drawing:
            flag = drawing[-1].replace("_", "-")
            raise UserError(f"--{flag} is for words that are drawn: add --sample")
        if (limit := self.decoder.max_length) is not None and changes.get("max_length", 0) > limit:
            log.warning(f"this model writes at most {limit} words: captions end there")

    def merge_config(self, config: Any) -> Any:
        """`config`, a `Captioning`, with the decoder and the vocabulary that are in these weights.

        Another decoder is a UserError, but in self-critical training, whose recipe is for any captioner.
        """
        own = self.captioning
        other = config.decoder != own.decoder or (own.decoder != "transformer" and config.cell != own.cell)
        if other and not config.self_critical:
            raise UserError(
                f"the captioner to go on with has the decoder {_kind(own)}, and the recipe {_kind(config)}: choose "
                "another recipe, or other weights"
            )
        if config.self_critical and not hasattr(self, "match"):
            config = replace(config, contrastive=0.0, decoding=replace(config.decoding, match=0.0))
        return replace(self.captioning, **{name: getattr(config, name) for name in FREE})

    @torch.no_grad()
    def build_index(self, vectors: Tensor, labels: Tensor) -> None:
        """Keep what is said of the training images: their pooled vectors [N, D], and their captions [N, K, T]."""
        self.consensus = Consensus.of(self.match.image_of(vectors), labels, self.tokenizer.size).to(vectors.device)

    def configure(self, config: Any) -> None:
        """Go on learning as `config` says, with what these weights keep. What they remember is of other vectors."""
        self.captioning = self.merge_config(config)
        if hasattr(self, "consensus"):
            del self.consensus
        self.option = self.captioning.decoding
        self._make_heads()

    def encode_target(self, target: Target) -> Target:
        """The captions with their numbers in the task's vocabulary."""
        assert isinstance(target, Texts)
        return target.numbered(numbered(target.captions, self.tokenizer, self.captioning.most_words))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] and the words [B, K, T] of K captions, to logits [B, K, T, V]."""
        return self.decoder.logits(self.decoder(words, self.memory(images)))

    def features(self, images: Tensor) -> Tokens:
        return self.encoder(images)

    def memory(self, images: Tensor, keep: Tensor | None = None) -> Memory:
        """What the decoder sees of the images: all their tokens, and one vector each; `keep` is stochastic depth's."""
        tokens = self.encoder(images) if keep is None else self.encoder(images, keep)
        return Memory(torch.cat([tokens.prefix, tokens.patches], dim=1), self.pooled(tokens))

    def pooled(self, tokens: Tokens) -> Tensor:
        """One vector an image, [B, D]."""
        return one_vector(self.encoder.pool(tokens))

    def loss(self, batch: Batch, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Sums over the captions' words; in self-critical training over those of the samples."""
        memory = self.memory(batch["image"], self.keep(batch))
        if self.captioning.self_critical:
            return self._self_critical(memory, batch)
        labels = self._some(batch, self.captioning.captions)
        count = (labels != PAD).sum()
        loss, right = self._writing(memory, labels)
        parts = {"loss": loss, "count": count, "accuracy": right}
        if self.captioning.contrastive:
            assert isinstance(self.decoder, TransformerDecoder)
            matching = self.match(memory.pooled, self.decoder, self._some(batch, 1)[:, 0])
            parts["contrastive"] = matching.detach() * count
            parts["loss"] = parts["loss"] + self.captioning.contrastive * matching * count
        if self.captioning.bag_of_words:
            telling = self.bag(memory.pooled, batch["label"])
            parts["bag_of_words"] = telling.detach() * count
            parts["loss"] = parts["loss"] + self.captioning.bag_of_words * telling * count
        return parts

    def _writing(self, memory: Memory, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of each next word of the captions [B, K, T], and how many are the likeliest one."""
        words = F.pad(labels[..., :-1], (1, 0), value=START)
        words = words.masked_fill(words == END, PAD)
        known = self.decoder(self._dropped(words), memory)
        counted = labels != PAD
        logits = self.decoder.logits(known[counted]).float()
        targets = labels[counted]
        loss = F.cross_entropy(logits, targets, label_smoothing=self.captioning.smoothing, reduction="sum")
        return loss, (logits.argmax(dim=1) == targets).sum()

    def _some(self, batch: Batch, most: int) -> Tensor:
        """[B, K, T] of some of the captions of each image: the next ones each epoch, from one that depends on it."""
        labels = batch["label"]
        there = (labels[..., 0] != PAD).sum(dim=1)
        count = min(most, int(there.max()))
        first = (uniform(0, 0, batch["sample"], 1)[:, 0] * there).long() + batch["epoch"] * most
        places = (first[:, None] + torch.arange(count, device=labels.device)) % there[:, None]
        chosen = labels[torch.arange(len(labels), device=labels.device)[:, None], places]
        # An image with fewer captions reads each of them once.
        chosen = chosen.masked_fill((torch.arange(count, device=labels.device) >= there[:, None])[..., None], PAD)
        return chosen[..., : int((chosen != PAD).any(dim=0).any(dim=0).sum())]

    def _dropped(self, words: Tensor) -> Tensor:
        if not self.captioning.word_dropout or not self.training:
            return words
        out = torch.rand(words.shape, device=words.device) < self.captioning.word_dropout
        return words.masked_fill(out & (words > UNKNOWN), UNKNOWN)

    def _self_critical(self, memory: Memory, batch: Batch) -> dict[str, Tensor]:
        """Reward what a sampled caption scores above the mean of the image's other samples (2003.09971)."""
        assert self.reward is not None, "self-critical training needs a reward"
        samples, heat = self.captioning.captions + 1, self.captioning.scst_temperature
        how = Decoding(
            beam=samples,
            sample=True,
            temperature=heat,
            sampling_seed=int(torch.randint(1 << 30, ())),
            no_repeat_ngram_size=0,
            max_length=self.option.max_length,
        )
        self.eval()  # the decoder draws without dropout
        with torch.no_grad():
            written = write(self.decoder, memory, how, batch["sample"])  # with no_repeat_ngram_size 0
        self.train()
        texts = [self.tokenizer.decode(row) for row in written.words.flatten(0, 1).tolist()]
        keys = batch["sample"].repeat_interleave(samples).tolist()
        ended = (written.words == END).any(dim=2).flatten().tolist()
        rewards = torch.tensor(self.reward(keys, texts, ended), device=memory.tokens.device).float().view(-1, samples)
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (samples - 1)
        words = F.pad(written.words[..., :-1], (1, 0), value=START)
        logits = self.decoder.logits(self.decoder(words.masked_fill(words == END, PAD), memory)).float() / heat
        logits[..., [PAD, START, UNKNOWN]] = -torch.inf  # which are never drawn
        logp = logits.log_softmax(dim=-1).gather(3, written.words[..., None])[..., 0]
        counted = written.words != PAD
        # What fills a caption up is masked and not multiplied: a language model cannot say it, and 0 times -inf is nan.
        loss = -((rewards - others)[..., None] * logp.masked_fill(~counted, 0.0)).sum()
        count = counted.sum()
        return {"loss": self.captioning.self_critical * loss, "count": count, "reward": rewards.mean() * count}

    def answer(self, batch: Batch) -> list[Prediction]:
        """The best captions of each image, with the probability of each piece of text."""
        written = self.write(batch)
        probabilities = written.logp.exp().tolist()
        scores = written.score.tolist()
        answers: list[Prediction] = []
        for numbers, ps, ss in zip(written.words.tolist(), probabilities, scores, strict=True):
            rows = [self._row(*row) for row in zip(numbers, ps, ss, strict=True) if row[2] > -math.inf]
            if not rows:
                raise UserError("this captioner gives no probabilities of words, only nan: take other weights")
            answers.append(Captions(rows[0]["caption"], rows))
        return answers

    def write(self, batch: Batch) -> Written:
        """Captions of a batch as `decoding` says."""
        images, how = batch["image"], self.option
        for name in ("match", "consensus"):
            if getattr(how, name) and not hasattr(self, name):
                raise UserError(f"this captioner has not learned what {name} in decoding counts: let it be 0")
        samples = batch.get("sample", torch.arange(len(images), device=images.device))
        memory = self.memory(images)
        written = write(self.decoder, memory, how, samples, spaced=self.spaced.to(images.device))
        if how.match or how.consensus:
            image = self.match.image_of(memory.pooled)
            if how.match:
                assert isinstance(self.decoder, TransformerDecoder)
                text = self.match.text_of(self.decoder, written.words.flatten(0, 1)).unflatten(0, written.score.shape)
                written.score += how.match * self.match.logits(image[:, None], text)[:, 0]
            if how.consensus:
                written.score += how.consensus * self.consensus(image, written.words, how.neighbours)
            written = written.ranked()
        return written

    def _row(self, words: list[int], ps: list[float], score: float) -> dict[str, Any]:
        words = words[: words.index(END)] if END in words else [word for word in words if word != PAD]
        pieces = self.tokenizer.tokens(words)
        return {
            "caption": "".join(pieces).strip(),
            "score": score,
            "tokens": [{"text": piece, "p": p} for piece, p in zip(pieces, ps, strict=False)],
        }

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> Metric:
        if data is None:
            return CaptionMetric()
        check_scorers()  # before the captions are written, which takes its time
        seen = [] if train is None else [text for texts in Texts.of(train).captions for text in texts]
        return CaptionMetric(seen=seen or None, java=None)

    @classmethod
    def human(cls, data: ImageSet) -> dict[str, Any]:
        return human_ceiling(dict(enumerate(Texts.of(data).captions)))

    @classmethod
    def report(cls, run: Any) -> list[Section]:
        from vitrail.tasks.caption_report import sections

        return sections(run)

    def config(self) -> dict[str, Any]:
        captioning = {**asdict(self.captioning), "decoding": asdict(self.option)}
        remembered = {"remembered": self.consensus.sizes} if hasattr(self, "consensus") else {}
        encoder = describe(self.encoder.config, KINDS)
        return {"encoder": encoder, "captioning": captioning, "tokenizer": self.tokenizer.fingerprint, **remembered}

    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self.tokenizer.to_json()}


def _kind(config: Captioning) -> str:
    return config.decoder if config.decoder == "transformer" else f"{config.decoder} {config.cell}"


def decoder_for(config: Captioning, vocabulary: int, memory_width: int, pooled_width: int) -> Decoder:
    """The decoder that a config asks for, for an image's tokens and its one vector."""
    c = config
    if c.decoder == "recurrent":
        return RecurrentDecoder(c.cell, vocabulary, c.decoder_width, c.decoder_depth, pooled_width, c.decoder_dropout)
    if c.decoder == "attentive":
        return AttentiveDecoder(c.cell, vocabulary, c.decoder_width, memory_width, c.decoder_dropout, pooled_width)
    return TransformerDecoder(
        vocabulary,
        c.decoder_width,
        c.decoder_depth,
        c.decoder_heads,
        memory_width,
        c.decoder_dropout,
        c.most_words,
        c.text_depth,
    )


def reward_of(captions: Sequence[Sequence[str]]) -> Reward:
    """CIDEr against the captions of the training images. UserError where it cannot tell captions apart."""
    if not any(words(text) for texts in captions for text in texts):
        raise UserError(
            "no caption has a word of [a-z0-9'], which are what CIDEr rewards: leave self-critical training out"
        )
    cider = Cider(dict(enumerate(captions)), ends=True)
    if not any(cider.weights.values()):
        raise UserError(
            f"self-critical training rewards CIDEr, which weights words by how few of the {len(captions)} training "
            "images have them, and all have the same: add images, or leave it out"
        )
    return cider.rewards


def stored_tokenizer(config: dict[str, Any], files: Checkpoint, read: Callable[[str], Words]) -> Words:
    """The tokenizer of a checkpoint. UserError where it is not its own: its captions would be nonsense."""
    path = files.path / "tokenizer.json"
    try:
        tokenizer = read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: it is missing or damaged, and the captions need it") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    rows = files.shapes.get("decoder.bias", (tokenizer.size,))[0]
    if tokenizer.size != rows:
        raise UserError(f"{path} has {tokenizer.size} entries where the weights have {rows}: put its own file back")
    if config.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{path} belongs to another checkpoint, with other words: put its own file back")
    return tokenizer


def numbered(captions: Sequence[Sequence[str]], tokenizer: Tokenizer, max_length: int) -> Tensor:
    """Captions of images as int64 [N, K, T] (see `Caption`): their first `max_length` words, the end counted as one."""
    rows = [[[*tokenizer.encode(text), END][:max_length] for text in texts] for texts in captions]
    most = max((len(texts) for texts in rows), default=1)
    length = max((len(text) for texts in rows for text in texts), default=1)
    table = torch.full((len(rows), most, length), PAD)
    for i, texts in enumerate(rows):
        for k, text in enumerate(texts):
            table[i, k, : len(text)] = torch.tensor(text)
    return table
