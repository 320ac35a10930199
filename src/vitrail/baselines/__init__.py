"""Models before the Vision Transformer, from scratch, with the same interface: MLP, CNN, ResNet, RNN, GRU, LSTM.

Each encoder returns `vit.Tokens` and pools them to one vector, so tasks, loop and reports treat it like a ViT.
`docs/ladder.md` gives the order in which to read them.
"""

from __future__ import annotations

from vitrail.baselines.cnn import CNN, CNNConfig, ResNet, ResNetConfig
from vitrail.baselines.mlp import MLP, MLPConfig
from vitrail.baselines.rnn import CELLS, RNN, Cell, GRUCell, LSTMCell, Recurrent, RNNCell, RNNConfig, State

__all__ = [
    "CELLS",
    "CNN",
    "MLP",
    "RNN",
    "CNNConfig",
    "Cell",
    "GRUCell",
    "LSTMCell",
    "MLPConfig",
    "RNNCell",
    "RNNConfig",
    "Recurrent",
    "ResNet",
    "ResNetConfig",
    "State",
]
