"""Captioning: what an image shows, in words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, Splits
from vitrail.data.targets import Target, Texts
from vitrail.data.text import PAD, Tokenizer
from vitrail.errors import UserError
from vitrail.hf import fresh, with_memory
from vitrail.plain import describe, from_description, rebuild
from vitrail.tasks.caption.answers import Drafts, Thresholds, answers_of, pieces_of
from vitrail.tasks.caption.components import NextWords, ReadImages, Reranker
from vitrail.tasks.caption.consensus import Consensus
from vitrail.tasks.caption.decoders import Decoder, Memory, decoder_for
from vitrail.tasks.caption.exported import programs, run_programs
from vitrail.tasks.caption.language import HFTokenizer, VocabMap
from vitrail.tasks.caption.losses import caption_loss, captions_of_epoch, drop_words, log_probabilities
from vitrail.tasks.caption.matching import BagOfWords, Gather, Match, contrastive_loss, text_states
from vitrail.tasks.caption.prefix import PrefixDecoder, pretrained
from vitrail.tasks.caption.scores import CaptionMetric, check_scorers, human_ceiling
from vitrail.tasks.caption.scst import Reward, reward_of, self_critical_loss
from vitrail.tasks.caption.search import Generated, generate
from vitrail.tasks.caption.settings import FREE, USED_WITH, Captioning, Decoding, merge_settings
from vitrail.tasks.caption.text import numbered, stored_tokenizer, words_before
from vitrail.tasks.encoder import KINDS, Encoder, encoder_for, one_vector, pooled_width, token_width
from vitrail.tasks.exported import Engine, Program
from vitrail.tasks.task import Task
from vitrail.tasks.values import Batch, Checkpoint, Features, Metric, Piece, Prediction, Score, Section
from vitrail.vit import Tokens

log = logging.getLogger("vitrail")


class Caption(Task):
    """An encoder of images and a decoder of words.

    Keys of a batch: `image` [B, C, H, W] normalised floats, `sample` [B]; to learn from, `label` int64 [B, K, T], the
    tokens of K captions, each ended by `END` and padded with `PAD` (missing captions are all `PAD`); to score,
    `captions`, the references as text; to stream, `tell` (see `Task.stream`). In training `epoch` selects among the
    captions; `key` as in `Task.keep`; self-critical training samples by it.
    """

    name = "caption"
    settings = Captioning
    target = Texts
    options = Decoding
    score = Score("cider", unit="")
    solved = ("knn",)
    free = FREE
    unused_when_frozen = tuple(name for name in FREE if name != "decoding")
    used_with = USED_WITH
    metric_reads = "answers"
    streams = True

    decoder: Decoder
    match: Match | None
    """head of the contrastive loss, if trained with one"""
    bag: BagOfWords | None
    """head of the bag-of-words loss, if that has a weight"""
    consensus: Consensus | None
    """an index of the training images' captions, from the recipe caption-rerank"""
    sure_from: Thresholds | None = None
    """what an answer needs to be `sure`, where that was measured for these weights"""

    def __init__(
        self,
        encoder: Encoder,
        config: Captioning,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        decoder: Decoder | None = None,
    ) -> None:
        """`decoder` is for pretrained decoders: a language model, or one of the Hub."""
        super().__init__()
        self.encoder = encoder
        self.captioning = config
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.option = config.decoding
        width = pooled_width(encoder.config)
        self.decoder = decoder or decoder_for(config, tokenizer.size, token_width(encoder.config), width)
        self.frozen = list(self.decoder.frozen)
        self.match, self.bag, self.consensus = None, None, None
        self._make_heads()
        # Not a weight, so it has values even while the weights have none.
        self.spaced = torch.tensor(tokenizer.spaced(), device="cpu")
        self.reward: Reward | None = None
        """reward of self-critical training"""

    def _make_heads(self) -> None:
        """Create the head of each loss that has a weight, unless it exists."""
        config, width = self.captioning, pooled_width(self.encoder.config)
        self.match = (self.match or Match(width, config.decoder_width)) if config.contrastive else None
        self.bag = (self.bag or BagOfWords(width, self.tokenizer.size)) if config.bag_of_words else None

    # Making one

    @classmethod
    def create(cls, settings: Captioning, encoder: Encoder, splits: Splits, preprocess: Preprocess) -> Self:
        """A captioner with the vocabulary of the training split's captions, or of its language model."""
        check_scorers()  # fail now rather than at the first evaluation
        captions = Texts.of(splits.train).captions
        if settings.self_critical:
            raise UserError("self-critical training continues from a captioner: name one with --init")
        if settings.decoder == "language_model":
            model, vocabulary, words = pretrained(settings.language.language_model)
            decoder = PrefixDecoder(model, vocabulary, settings.language, encoder.config)
            task = cls(encoder, settings, words, preprocess, decoder)
        else:
            texts = [text for several in captions for text in several]
            own = Tokenizer.train(texts, settings.vocabulary, settings.vocabulary_size, lower=settings.lower)
            task = cls(encoder, settings, own, preprocess)
        task.init_word_bias(task.numbered(captions))
        return task

    @classmethod
    def continues(cls, settings: Any, loaded: Task) -> bool:
        return isinstance(loaded, cls)

    @classmethod
    def merged(cls, settings: Any, loaded: Task) -> Any:
        """The settings with the decoder and the vocabulary of `loaded`, if that is a captioner."""
        if not isinstance(loaded, cls):
            if settings.self_critical:
                raise UserError("self-critical training continues from a captioner: name one with --init")
            return settings
        if settings.contrastive and not settings.self_critical and not loaded.captioning.text_depth:
            raise UserError(
                "matching needs text-only blocks, which this captioner lacks: start from one of caption-match"
            )
        return merge_settings(loaded.captioning, settings)

    @classmethod
    def adopt(cls, settings: Any, loaded: Task, splits: Splits, preprocess: Preprocess) -> Self:
        """The captioner `loaded` itself, or a new decoder on the encoder of another task."""
        if not isinstance(loaded, cls):
            return cls.create(settings, loaded.encoder, splits, preprocess)
        check_scorers()
        captions = Texts.of(splits.train).captions
        had_bag = loaded.bag is not None
        loaded.configure(settings)
        loaded.preprocess = preprocess
        if settings.self_critical:
            loaded.reward = reward_of(captions)
        if loaded.bag is not None and not had_bag:
            loaded.bag.init_word_bias(loaded.numbered(captions))
        return loaded

    def configure(self, config: Captioning) -> None:
        """Continue training with these settings and the loaded weights. Drops what no longer fits them."""
        self.captioning = merge_settings(self.captioning, config)
        self.consensus, self.sure_from = None, None
        self.option = self.captioning.decoding
        self._make_heads()

    @classmethod
    def rebuild(cls, config: dict[str, Any], files: Checkpoint) -> Self:
        if "transformers" in config:
            from vitrail.tasks.caption.hub import HubCaption

            return cast(Self, HubCaption.rebuild(config, files))
        settings, preprocess = rebuild(Captioning, config["captioning"]), Preprocess.from_dict(config["preprocess"])
        encoder = from_description(config["encoder"], KINDS, "vit")
        if settings.decoder == "language_model":
            vocabulary = VocabMap(**config["language_model"]["vocabulary"])
            words = stored_tokenizer(config, files, lambda text: HFTokenizer.from_text(text, vocabulary))

            def make() -> Caption:
                model = fresh(config["language_model"]["transformers"], "AutoModelForCausalLM")
                decoder = PrefixDecoder(model, vocabulary, settings.language, encoder)
                return cls(encoder_for(encoder), settings, words, preprocess, decoder)

            return cast(Self, with_memory(make, files.shapes))
        own = stored_tokenizer(config, files, Tokenizer.from_json)
        task = cls(encoder_for(encoder), settings, own, preprocess)
        if "consensus" in config:
            task.consensus = Consensus(**config["consensus"])
        if "sure_from" in config:
            task.sure_from = Thresholds(**config["sure_from"])
        return task

    # Text and numbers

    def numbered(self, captions: Sequence[Sequence[str]]) -> Tensor:
        """Captions of images as `label` of a batch, int64 [N, K, T] (see `numbered`)."""
        return numbered(captions, self.tokenizer, self.captioning.most_words)

    def encode_target(self, target: Target) -> Target:
        """The target with captions as token numbers, for training."""
        assert isinstance(target, Texts)
        return target.numbered(self.numbered(target.captions))

    def init_word_bias(self, labels: Tensor) -> None:
        """Initialise the output bias with the word frequencies of the captions `labels` [N, K, T].

        AdamW changes a bias by its learning rate per step. Without this, the image vectors would encode the word
        frequencies for a long time, as one direction that all share, and lose what distinguishes the images.
        """
        there = labels[labels != PAD]
        counts = torch.bincount(there, minlength=self.tokenizer.size) + 0.1
        self.decoder.init_word_bias((counts / counts.sum()).log())
        if self.bag is not None:
            self.bag.init_word_bias(labels)

    # Methods with a frozen encoder

    @classmethod
    def check(cls, settings: Any, method: str) -> None:
        if settings.decoding.consensus and method != "knn":
            raise UserError("consensus needs the recipe caption-rerank with its method knn: set it to 0")

    def prepare_to_solve(self, method: str, images: int) -> None:
        if method not in self.solved:
            super().prepare_to_solve(method, images)
        if self.match is None:
            raise UserError("knn needs matching vectors: with --init name a captioner with a contrastive loss")

    @torch.no_grad()
    def solve(self, method: str, train: Features, val: Callable[[], Features]) -> list[dict[str, float]]:
        """Build the index of the training images' captions, `labels` [N, K, T]."""
        assert self.match is not None
        index = Consensus.of(self.match(train.vectors), train.labels, self.tokenizer.size)
        self.consensus = index.to(train.vectors.device)
        return []

    # From an image to an answer

    def forward(
        self, images: Tensor, words: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Normalised images [B, C, H, W] to the decoder's inputs `tokens` [B, M, D] and `pooled` [B, D].

        With the words [B, K, T] of K captions per image: logits [B, K, T, V]. `keep` is stochastic depth's.
        """
        tokens = self.encoder(images) if keep is None else self.encoder(images, keep)
        every = torch.cat([tokens.prefix, tokens.patches], dim=1)
        memory = Memory(every, one_vector(self.encoder.pool(tokens)))
        return dict(zip(Memory._fields, memory, strict=True)) if words is None else self.decoder(words, memory)

    def memory(self, images: Tensor, keep: Tensor | None = None) -> Memory:
        """The image features for the decoder."""
        return Memory(**self(images, keep=keep))

    def features(self, images: Tensor) -> Tokens:
        return self.encoder(images)

    def components(self) -> dict[str, nn.Module]:
        """`encoder` and `step`, and `rerank` of a captioner that has learned to match."""
        found: dict[str, nn.Module] = {"encoder": ReadImages(self, self.decoder), "step": NextWords(self.decoder)}
        if self.match is not None:
            found["rerank"] = Reranker(self.match, self.decoder, self.consensus, self.option)
        return found

    def programs(self, batch: Batch) -> dict[str, Program]:
        return programs(self, batch)

    def run_programs(self, engines: Mapping[str, Engine], outputs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        return run_programs(self, engines, outputs)

    def tables(self) -> dict[str, nn.Module]:
        return {} if self.consensus is None else {"consensus": self.consensus}

    def choose(self, changes: Mapping[str, Any]) -> None:
        if changes.get("match") and self.match is None:
            raise UserError("--match needs a captioner with a contrastive loss, such as caption-match: remove it")
        if (changes.get("consensus") or "neighbours" in changes) and self.consensus is None:
            raise UserError("--consensus and --neighbours need a captioner of caption-rerank: remove them")
        super().choose(changes)
        drawing = [name for name in changes if name in ("temperature", "top_k", "top_p", "sampling_seed")]
        if not self.option.sample and drawing:
            flag = drawing[-1].replace("_", "-")
            raise UserError(f"--{flag} applies to sampling: add --sample")
        if (limit := self.decoder.within_limit(self.option.max_length)) < changes.get("max_length", 0):
            log.warning(f"this model writes at most {limit} tokens per caption: --max-length is {limit}")

    def answer(self, batch: Batch) -> list[Prediction]:
        """The best captions of each image, with the probability of each piece of text."""
        return answers_of(self.generate(batch), self.tokenizer, self.sure_from)

    def generate(self, batch: Batch) -> Generated:
        """Captions of a batch, with the current options."""
        for name, module in (("match", self.match), ("consensus", self.consensus)):
            if getattr(self.option, name) and module is None:
                raise UserError(f"this captioner was not trained for {name} in decoding: set it to 0")
        images = batch["image"]
        samples = batch.get("sample", torch.arange(len(images), device=images.device))
        size, tell = self.decoder.images_at_once or max(len(images), 1), batch.get("tell")
        several = zip(images.split(size), samples.split(size), strict=True)
        return Generated.joined([self._generate(*some, tell) for some in several])

    def _generate(self, images: Tensor, samples: Tensor, tell: Callable[[str], None] | None) -> Generated:
        modules = self.components()
        pooled, state = modules["encoder"](images)
        how = replace(self.option, max_length=self.decoder.within_limit(self.option.max_length))
        step = modules["step"] if tell is None else Drafts(modules["step"], self.tokenizer, tell)
        written = generate(step, state, how, samples, self.spaced.to(images.device))
        if "rerank" in modules:
            written = written.ranked(*modules["rerank"](pooled, written.words, written.score))
        return written

    @torch.no_grad()
    def pieces(self, batch: Batch) -> list[list[Piece]]:
        """The words of each image's best caption, and the attention over the patches at each word.

        It is the mean over layers and heads; prefix tokens receive the rest of the attention.
        """
        written, (_, _, grid) = self.generate(batch), self.features(batch["image"])
        modules = self.components()
        _, state = modules["encoder"](batch["image"])
        return pieces_of(written, modules["step"], state, grid, self.tokenizer)

    def explained(self, batch: Batch, outputs: Sequence[int] | None = None) -> Tensor:
        """The log-probability of each image's best caption, [B]; or of some of its words, by their place."""
        with torch.no_grad():
            best = self.generate(batch).words[:, :1]
        logp = log_probabilities(self.decoder, self.memory(batch["image"]), best)[:, 0]
        return logp.sum(dim=1) if outputs is None else logp[:, list(outputs)]

    @torch.no_grad()
    def explainable(self, batch: Batch) -> list[tuple[int, str]]:
        """The pieces of the best caption, without its end."""
        (answer,) = answers_of(self.generate({"image": batch["image"][:1]}), self.tokenizer)
        return [(place, piece["text"]) for place, piece in enumerate(answer.row()["captions"][0]["tokens"])]

    # Training and scores

    @property
    def whole_batch(self) -> bool:  # type: ignore[override]
        """The contrastive loss compares the images of a batch, and the bag-of-words loss is a mean over them."""
        return self.captioning.self_critical == 0 and (self.match is not None or self.bag is not None)

    @property
    def draws(self) -> bool:
        return True

    def loss(self, batch: Batch, gather: Gather | None = None) -> dict[str, Tensor]:
        """Sums over the captions' words; in self-critical training over the sampled words."""
        memory = self.memory(batch["image"], self.keep(batch))
        config = self.captioning
        if config.self_critical:
            return self_critical_loss(self, memory, batch)
        labels = captions_of_epoch(batch, config.captions)
        count = (labels != PAD).sum()
        words = words_before(labels)
        if self.training and config.word_dropout:
            words = drop_words(words, config.word_dropout)
        loss, right = caption_loss(self.decoder, memory, words, labels, config.smoothing)
        sums = {"loss": loss, "count": count, "accuracy": right}
        if self.match is not None and config.contrastive:
            texts = text_states(self.decoder, captions_of_epoch(batch, 1)[:, 0])
            matching = contrastive_loss(self.match(memory.pooled, texts, gather))
            sums["contrastive"] = matching.detach() * count
            sums["loss"] = sums["loss"] + config.contrastive * matching * count
        if self.bag is not None and config.bag_of_words:
            bow_loss = self.bag(memory.pooled, batch["label"], gather)
            sums["bag_of_words"] = bow_loss.detach() * count
            sums["loss"] = sums["loss"] + config.bag_of_words * bow_loss * count
        return sums

    def metric(self, data: ImageSet | None = None, train: ImageSet | None = None) -> Metric:
        if data is None:
            return CaptionMetric()
        check_scorers()  # before generating the captions, which is slow
        seen = [] if train is None else [text for texts in Texts.of(train).captions for text in texts]
        return CaptionMetric(seen=seen or None, java=None)

    @classmethod
    def human(cls, data: ImageSet) -> dict[str, Any]:
        return human_ceiling(dict(enumerate(Texts.of(data).captions)))

    @classmethod
    def report(cls, run: Any) -> list[Section]:
        from vitrail.tasks.caption.report import sections  # draws with Matplotlib, which a captioner can do without

        return sections(run)

    # Files

    def config(self) -> dict[str, Any]:
        return {
            "encoder": describe(self.encoder.config, KINDS),
            "captioning": {**asdict(self.captioning), "decoding": asdict(self.option)},
            "tokenizer": self.tokenizer.fingerprint,
            **({"consensus": self.consensus.sizes} if self.consensus is not None else {}),
            **({"sure_from": asdict(self.sure_from)} if self.sure_from is not None else {}),
            **self.decoder.description(),
        }

    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self.tokenizer.to_json()}
