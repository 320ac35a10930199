"""The captioning ladder: what came before, rung by rung, and what each idea adds. docs/captioning.md has the table."""

from __future__ import annotations

from dataclasses import replace

from vitrail.baselines import ResNetConfig
from vitrail.data.augment import Augment
from vitrail.tasks.caption import Captioning
from vitrail.tasks.encoder import EncoderConfig
from vitrail.tasks.search import Decoding
from vitrail.train.optim import Optim
from vitrail.train.run import Run
from vitrail.vit import ViTConfig

PHOTOS_MEAN, PHOTOS_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _cnn() -> ResNetConfig:
    """2.8 M parameters, a map of 8x8 at 128 pixels."""
    return ResNetConfig(widths=(48, 96, 192), depth=3, stem_stride=2, strides=(2, 2, 2), image_size=(128, 128))


def _vit() -> ViTConfig:
    """2.9 M parameters, 8x8 patches at 128 pixels."""
    return ViTConfig(
        width=192,
        depth=6,
        heads=3,
        patch=16,
        image_size=(128, 128),
        class_token=False,
        pool="average",
        stem=(16, 32, 64, 128),
        attention_init="mimetic",
        drop_path=0.1,
    )


def _run(recipe: str, model: EncoderConfig, task: Captioning) -> Run:
    """What all rungs share."""
    return Run(
        recipe=recipe,
        data="flickr8k",
        task=task,
        model=model,
        augment=Augment(crop="resized", scale=(0.5, 1.0), flip=True),
        optim=Optim(optimizer="muon", lr=1e-3, matrix_lr=4e-3, weight_decay=0.05, beta2=0.98, clip=1.0, ema=0.998),
        mean=PHOTOS_MEAN,
        std=PHOTOS_STD,
        resize="squash",
        epochs=20,
        batch_size=64,
        eval_every=4,
    )


def caption_cnn_rnn(pictures: int) -> Run:
    """A CNN sees, a vanilla RNN writes: the picture is the first thing that it reads.

    Command: vitrail train caption-cnn-rnn --data flickr8k
    """
    task = Captioning(decoder="recurrent", cell="rnn", decoder_depth=1, decoder_dropout=0.3)
    return _run("caption-cnn-rnn", _cnn(), task)


def caption_cnn_lstm(pictures: int) -> Run:
    """Show and Tell (arXiv 1411.4555): the same with an LSTM.

    Command: vitrail train caption-cnn-lstm --data flickr8k
    """
    task = Captioning(decoder="recurrent", cell="lstm", decoder_depth=1, decoder_dropout=0.3)
    return _run("caption-cnn-lstm", _cnn(), task)


def caption_cnn_attention(pictures: int) -> Run:
    """Show, Attend and Tell (arXiv 1502.03044): the LSTM looks at the feature map before each word.

    Command: vitrail train caption-cnn-attention --data flickr8k
    """
    return _run("caption-cnn-attention", _cnn(), Captioning(decoder="attentive", decoder_dropout=0.3))


def caption_vit_lstm(pictures: int) -> Run:
    """A ViT sees, the LSTM with attention writes.

    Command: vitrail train caption-vit-lstm --data flickr8k
    """
    return _run("caption-vit-lstm", _vit(), Captioning(decoder="attentive", decoder_dropout=0.3))


def caption_vit(pictures: int) -> Run:
    """A ViT sees, a Transformer with cross-attention writes, both from scratch.

    Command: vitrail train caption-vit --data flickr8k
    """
    return _run("caption-vit", _vit(), Captioning(decoder_dropout=0.2, word_dropout=0.1))


def caption_coca(pictures: int) -> Run:
    """The same, while pictures are matched with their captions: CoCa's contrastive loss (arXiv 2205.01917).

    Command: vitrail train caption-coca --data flickr8k
    """
    task = Captioning(decoder_dropout=0.2, word_dropout=0.1, decoder_depth=4, text_depth=1, contrastive=0.5)
    return _run("caption-coca", _vit(), task)


def caption_critic(pictures: int) -> Run:
    """Self-critical training on CIDEr (arXiv 1612.00563), on top of a captioner.

    Command: vitrail train caption-critic --data flickr8k --init RUN
    """
    task = Captioning(captions=4, self_critical=1.0, decoding=Decoding(longest=24))
    run = _run("caption-critic", _vit(), task)
    optim = replace(run.optim, lr=5e-5, matrix_lr=2e-4, warmup=0.02)
    return replace(run, optim=optim, epochs=6, batch_size=32, eval_every=1)
