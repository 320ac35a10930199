"""The captioning ladder: from early captioners to current ones, one idea per step. Table: docs/captioning.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitrail.baselines import ResNetConfig
from vitrail.data.augment import Augment
from vitrail.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from vitrail.tasks.caption import Captioning, Decoding
from vitrail.tasks.classify import Classification
from vitrail.tasks.encoder import EncoderConfig
from vitrail.train.optim import Optim
from vitrail.train.run import Run
from vitrail.train.tune import Tune
from vitrail.variants import VariantConfig
from vitrail.vit import ViTConfig


def _cnn() -> ResNetConfig:
    """2.8 M parameters, a 7x7 feature map."""
    return ResNetConfig(widths=(52, 104, 208), depth=3, stem_stride=2, strides=(2, 2, 2), image_size=(112, 112))


def _vit() -> VariantConfig:
    """2.7 M parameters, 7x7 patches of a small ResNet's 14x14 feature map: the hybrid of section 3.1."""
    return VariantConfig(
        width=192,
        depth=4,
        heads=3,
        patch=16,
        image_size=(112, 112),
        class_token=False,
        pool="average",
        stem=(32, 64, 128),
        stem_blocks=2,
        drop_path=0.1,
    )


def _task(**choices: Any) -> Captioning:
    """Small decoders, for sentences of a dozen words.

    Of Flickr8k's captions, 92 % have at most `most_words`. A step reads all five captions of an image: together they
    show what is in the image, and with one of them per step the decoder would see a fifth as many sentences.
    """
    small = {"decoder_width": 192, "decoder_depth": 2, "decoder_heads": 3, "most_words": 20, "captions": 5}
    return Captioning(**{**small, **choices})


def _run(recipe: str, model: EncoderConfig, task: Captioning) -> Run:
    """Shared by all captioning recipes."""
    return Run(
        recipe=recipe,
        data="flickr8k",
        task=task,
        model=model,
        attention_init="mimetic" if isinstance(model, ViTConfig) else "xavier",
        augment=Augment(crop="resized", scale=(0.5, 1.0), flip=True),
        # Weight decay of twenty times the usual keeps the encoder from memorising 6,000 images.
        optim=Optim(optimizer="muon", lr=1e-3, muon_lr=4e-3, weight_decay=1.0, beta2=0.98, clip=1.0, ema=0.998),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize="squash",
        # Most steps use images of 5x5 patches: they cost half as much, and their content is still visible.
        early_size=80,
        epochs=20,
        batch_size=48,
        eval_every=5,
    )


def caption_cnn_rnn(images: int) -> Run:
    """Captions by a CNN encoder and a vanilla RNN decoder, whose first input is the image.

    Command: vitrail train caption-cnn-rnn --data flickr8k
    """
    task = _task(decoder="recurrent", cell="rnn", decoder_depth=1, decoder_dropout=0.3)
    return _run("caption-cnn-rnn", _cnn(), task)


def caption_cnn_lstm(images: int) -> Run:
    """Show and Tell (arXiv 1411.4555): a CNN encoder and an LSTM decoder.

    Command: vitrail train caption-cnn-lstm --data flickr8k
    """
    task = _task(decoder="recurrent", cell="lstm", decoder_depth=1, decoder_dropout=0.3)
    return _run("caption-cnn-lstm", _cnn(), task)


def caption_cnn_attention(images: int) -> Run:
    """Show, Attend and Tell (arXiv 1502.03044): an LSTM decoder that attends to the feature map before each word.

    Command: vitrail train caption-cnn-attention --data flickr8k
    """
    return _run("caption-cnn-attention", _cnn(), _task(decoder="attentive", decoder_dropout=0.3))


def caption_vit_lstm(images: int) -> Run:
    """A ViT encoder and an LSTM decoder with attention.

    Command: vitrail train caption-vit-lstm --data flickr8k
    """
    return _run("caption-vit-lstm", _vit(), _task(decoder="attentive", decoder_dropout=0.3))


def caption_vit(images: int) -> Run:
    """A ViT encoder and a Transformer decoder with cross-attention, both from scratch.

    Command: vitrail train caption-vit --data flickr8k
    """
    return _run("caption-vit", _vit(), _task(decoder_dropout=0.2, word_dropout=0.1))


MATCHING = {"contrastive": 0.5, "decoder_depth": 3, "text_depth": 1}
"""decoder depths for matching, which needs blocks that read only text; continued training keeps the captioner's
depths"""


def _matching(**choices: Any) -> Captioning:
    """Captioning, contrastive matching of images and captions, and bag-of-words prediction."""
    return _task(decoder_dropout=0.2, word_dropout=0.1, bag_of_words=0.1, **MATCHING, **choices)


def caption_match(images: int) -> Run:
    """CoCa (arXiv 2205.01917) on small images: losses for captions, matching and bag of words.

    Command: vitrail train caption-match --data flickr8k
    `caption-coca --init` starts from its result.
    """
    run = _run("caption-match", replace(_vit(), image_size=(64, 64)), _matching(captions=1))
    return replace(run, early_size=None, epochs=60, eval_every=15, batch_size=192)


def encoder_cifar10(images: int) -> Run:
    """The ladder's ViT encoder, trained on CIFAR-10 at the image size of `caption-match`.

    Command: vitrail train encoder-cifar10
    `caption-vit --init` starts from its result.
    """
    run = caption_match(images)
    task = Classification(smoothing=0.1)
    return replace(run, recipe="encoder-cifar10", data="cifar10", task=task, epochs=8, eval_every=4)


def caption_coca(images: int) -> Run:
    """Continues from `caption-match`: larger images, all captions of each image, a quarter of the learning rate.

    Command: vitrail train caption-coca --data flickr8k --init RUN
    """
    run = _run("caption-coca", _vit(), _matching())
    # The full learning rate gave no gain (docs/captioning.md), and the weight decay of `_run`, which scales with the
    # rate, would undo most of what the encoder learned by matching. Lower layers get less of both.
    optim = replace(run.optim, lr=2.5e-4, muon_lr=1e-3, layer_decay=0.8)
    return replace(run, optim=optim)


def caption_rerank(images: int) -> Run:
    """Reranks a captioner's captions by those of similar training images; nothing is trained.

    Command: vitrail train caption-rerank --data flickr8k --init RUN
    Of the captions that the beam search finds, it chooses the one closest to the captions of the most similar training
    images. After `caption-scst`, add `--length-penalty 1.5`, which that recipe uses.
    """
    decoding = Decoding(beam=10, match=0.2, consensus=6.0)
    task = _task(decoding=decoding, **MATCHING)
    return replace(_run("caption-rerank", _vit(), task), tune=Tune(method="knn"), early_size=None)


def caption_scst(images: int) -> Run:
    """Self-critical training on CIDEr (arXiv 1612.00563), starting from a trained captioner.

    Command: vitrail train caption-scst --data flickr8k --init RUN
    """
    # Captions become two words shorter, for which this length penalty compensates by half. A captioner that has learned
    # to match reranks ten captions; others do not rerank.
    decoding = Decoding(length_penalty=1.5, beam=10, match=0.2)
    task = _task(captions=4, self_critical=1.0, scst_temperature=0.7, decoding=decoding, **MATCHING)
    run = _run("caption-scst", _vit(), task)
    optim = replace(run.optim, lr=5e-5, muon_lr=2e-4, warmup=0.02)
    return replace(run, early_size=None, optim=optim, epochs=3, batch_size=32, eval_every=1)
