"""Models before the Vision Transformer, on the same data and with the same training loop, for comparison."""

from __future__ import annotations

from typing import Literal

from vitrail.baselines import CNNConfig, MLPConfig, ResNetConfig, RNNConfig
from vitrail.data.augment import Augment
from vitrail.recipes.small import CIFAR10_MEAN, CIFAR10_STD
from vitrail.tasks.classify import Classification
from vitrail.tasks.encoder import EncoderConfig
from vitrail.train.optim import Optim
from vitrail.train.run import Run


def mlp_cifar10(images: int) -> Run:
    """A multi-layer perceptron (MLP) on CIFAR-10.

    Command: vitrail train mlp-cifar10
    Cost and score: results/mlp-cifar10.json
    """
    return _cifar10("mlp-cifar10", MLPConfig(width=512, depth=3, dropout=0.1), lr=1e-3, epochs=20)


def cnn_cifar10(images: int) -> Run:
    """A convolutional network on CIFAR-10, sized for ten minutes on two cores.

    Command: vitrail train cnn-cifar10
    Cost and score: results/cnn-cifar10.json
    """
    model = CNNConfig(widths=(32, 64, 128, 256), depth=1, strides=(2, 2, 2, 1))
    return _cifar10("cnn-cifar10", model, lr=4e-3, epochs=8)


def resnet_cifar10(images: int) -> Run:
    """A small ResNet on CIFAR-10, sized for ten minutes on two cores.

    Command: vitrail train resnet-cifar10
    Cost and score: results/resnet-cifar10.json
    The paper's ResNet-20 is `--widths 16 32 64 --depth 3 --strides 1 2 2`; its larger maps take longer.
    """
    model = ResNetConfig(widths=(32, 64, 128), depth=1, strides=(2, 2, 2))
    return _cifar10("resnet-cifar10", model, lr=4e-3, epochs=8)


def rnn_digits(images: int) -> Run:
    """The digits, read row by row by a vanilla RNN.

    Command: vitrail train rnn-digits
    Cost and score: results/rnn-digits.json
    """
    return _digits("rnn-digits", "rnn")


def gru_digits(images: int) -> Run:
    """The digits, read row by row by a GRU.

    Command: vitrail train gru-digits
    Cost and score: results/gru-digits.json
    """
    return _digits("gru-digits", "gru")


def lstm_digits(images: int) -> Run:
    """The digits, read row by row by an LSTM.

    Command: vitrail train lstm-digits
    Cost and score: results/lstm-digits.json
    """
    return _digits("lstm-digits", "lstm")


def _cifar10(name: str, model: EncoderConfig, lr: float, epochs: float) -> Run:
    """Shared by the CIFAR-10 recipes: AdamW with linear decay, on shifted and flipped images."""
    return Run(
        recipe=name,
        data="cifar10",
        model=model,
        augment=Augment(crop="shift", shift=4, flip=True),
        optim=Optim(lr=lr, schedule="linear", beta2=0.98, warmup=0.1),
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        epochs=epochs,
        batch_size=128,
        task=Classification(smoothing=0.1),
        eval_every=max(1.0, epochs / 4),
    )


def _digits(name: str, cell: Literal["rnn", "gru", "lstm"]) -> Run:
    """Data and augmentation of `digits`."""
    return Run(
        recipe=name,
        data="digits",
        model=RNNConfig(cell=cell, width=128, image_size=(8, 8), channels=1),
        augment=Augment(crop="shift", shift=1),
        # Gradients through time can explode (arXiv 1211.5063), so they are clipped.
        optim=Optim(lr=3e-3, schedule="linear", beta2=0.98, clip=1.0),
        epochs=60,
        batch_size=64,
        task=Classification(smoothing=0.1),
        eval_every=10,
        precision="fp32",
    )
