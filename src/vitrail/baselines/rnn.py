"""Recurrent networks, cell by cell: Elman's RNN, the GRU and the LSTM; a layer over a sequence; an image read by rows.

A cell takes one step: from an input x_t and a state to the next state. Shapes:

    B sequences in the batch    T steps    I width of an input    D width of the state    G gates (products per step)
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vitrail.baselines.mlp import check, check_sizes
from vitrail.errors import UserError, require_choices
from vitrail.vit import Tokens

State = tuple[Tensor, ...]
"""the state of a cell: (h,), or (h, c) for the LSTM, each [B, D]; the first is its output"""


class Cell(nn.Module):
    """Shared by all cells: W x_t + b for all gates in one product, and U h_(t-1) + d in another.

    The rows of the matrices are gate by gate in the order of `torch.nn`, with two biases as there, so weights are
    interchangeable. The second bias matters only for the GRU; otherwise the two could be one.
    """

    gates: ClassVar[int]
    states: ClassVar[int] = 1
    """number of tensors in the state"""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.input = nn.Linear(inputs, self.gates * width)  # W [G * D, I] and b
        self.hidden = nn.Linear(width, self.gates * width)  # U [G * D, D] and d
        with torch.no_grad():
            for gate in range(self.gates):
                rows = slice(gate * width, (gate + 1) * width)
                # Xavier: tanh and sigmoid are near linear around zero, so this keeps the signal's size.
                nn.init.xavier_uniform_(self.input.weight[rows])
                # U is multiplied with itself T times. An orthogonal matrix keeps lengths, so neither the state nor
                # its gradient starts by vanishing or exploding (arXiv 1312.6120, section 3).
                nn.init.orthogonal_(self.hidden.weight[rows])
            nn.init.zeros_(self.input.bias)
            nn.init.zeros_(self.hidden.bias)

    def start(self, batch: int) -> State:
        """The state before the first step: zeros."""
        zeros = self.hidden.weight.new_zeros(batch, self.width)
        return (zeros,) * self.states

    def forward(self, x: Tensor, state: State) -> State:
        """One step: an input [B, I] and the state before it to the state after it."""
        return self.step(self.input(x), state)

    @abstractmethod
    def step(self, x: Tensor, state: State) -> State:
        """One step from the products W x_t + b, [B, G * D], which `Recurrent` computes for all steps at once."""


class RNNCell(Cell):
    """The simple recurrent network of Elman (1990):

        h_t = tanh(W x_t + b + U h_(t-1) + d)

    The state goes through U and tanh at every step, so it vanishes or explodes within about ten steps
    (Bengio et al. 1994; arXiv 1211.5063).
    """

    gates = 1

    def step(self, x: Tensor, state: State) -> State:
        (h,) = state
        return (torch.tanh(x + self.hidden(h)),)


class GRUCell(Cell):
    """The gated recurrent unit of Cho et al. (arXiv 1406.1078, equations 5 to 8), in the form of `torch.nn.GRU`:

        r_t = sigmoid(W_r x_t + b_r + U_r h_(t-1) + d_r)                  reset: how much of the old state to use
        z_t = sigmoid(W_z x_t + b_z + U_z h_(t-1) + d_z)                  update: how much of the old state to keep
        n_t = tanh(W_n x_t + b_n + r_t * (U_n h_(t-1) + d_n))             a new state
        h_t = (1 - z_t) * n_t + z_t * h_(t-1)

    The paper resets before the product, U_n (r_t * h_(t-1)); after it, as here, all three products are one.
    Where z_t is 1 the state is unchanged.
    """

    gates = 3

    def step(self, x: Tensor, state: State) -> State:
        (h,) = state
        x_gates, x_new = x.split([2 * self.width, self.width], dim=1)
        h_gates, h_new = self.hidden(h).split([2 * self.width, self.width], dim=1)
        r, z = torch.sigmoid(x_gates + h_gates).chunk(2, dim=1)
        n = torch.tanh(x_new + r * h_new)
        return ((1 - z) * n + z * h,)


class LSTMCell(Cell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997), with the forget gate of Gers et al. (2000):

        i_t = sigmoid(W_i x_t + b_i + U_i h_(t-1) + d_i)        input gate: how much of the new to write
        f_t = sigmoid(W_f x_t + b_f + U_f h_(t-1) + d_f)        forget gate: how much of the memory to keep
        g_t = tanh(W_g x_t + b_g + U_g h_(t-1) + d_g)           the new content
        o_t = sigmoid(W_o x_t + b_o + U_o h_(t-1) + d_o)        output gate: how much of the memory to output
        c_t = f_t * c_(t-1) + i_t * g_t                         the memory
        h_t = o_t * tanh(c_t)                                   the output of the cell

    The memory passes from step to step by a product with f_t and a sum, through no matrix and no tanh: its gradient
    lasts for as long as f_t is near 1.
    """

    gates = 4
    states = 2

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        # At zero the forget gate would halve the memory every step; at 1 it keeps 73 % (Gers et al. 2000;
        # Jozefowicz et al. 2015, section 2.2).
        nn.init.ones_(self.input.bias[width : 2 * width])

    def step(self, x: Tensor, state: State) -> State:
        h, c = state
        i, f, g, o = (x + self.hidden(h)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


CELLS: dict[str, type[Cell]] = {"rnn": RNNCell, "gru": GRUCell, "lstm": LSTMCell}


class Recurrent(nn.Module):
    """Cells stacked in `depth` layers: the outputs of one layer are the inputs of the next."""

    def __init__(self, cell: type[Cell], inputs: int, width: int, depth: int = 1, dropout: float = 0.0) -> None:
        """`dropout` is applied between layers, not along time (arXiv 1409.2329)."""
        super().__init__()
        self.cells = nn.ModuleList(cell(inputs if i == 0 else width, width) for i in range(depth))
        self.dropout = nn.Dropout(dropout)

    def start(self, batch: int) -> tuple[State, ...]:
        """The states before the first step, one per layer."""
        return tuple(cell.start(batch) for cell in self._layers())

    def forward(self, x: Tensor, states: tuple[State, ...] | None = None) -> tuple[Tensor, tuple[State, ...]]:
        """A sequence [B, T, I] to the last layer's outputs, [B, T, D], and the states after the last step."""
        states = self.start(x.shape[0]) if states is None else states
        x = x.transpose(0, 1)  # steps first: the rows of each step are then contiguous
        last = []
        for i, (cell, state) in enumerate(zip(self._layers(), states, strict=True)):
            shown = []
            # All inputs are known, so their products are one large one; only U h waits for the step before.
            for products in cell.input(self.dropout(x) if i else x).unbind(0):
                state = cell.step(products, state)
                shown.append(state[0])
            x = torch.stack(shown)
            last.append(state)
        return x.transpose(0, 1), tuple(last)

    def _layers(self) -> list[Cell]:
        return cast("list[Cell]", list(self.cells))


@dataclass(frozen=True)
class RNNConfig:
    """A recurrent network that reads an image row by row."""

    cell: Literal["rnn", "gru", "lstm"] = "lstm"
    width: int = 128
    """width of the state"""
    depth: int = 1
    """number of layers of cells"""
    image_size: tuple[int, int] = (8, 8)
    """(height, width) in pixels: another height gives a longer or shorter sequence, another width does not fit"""
    channels: int = 1
    dropout: float = 0.0
    """dropout between layers and on the last layer's output"""

    def __post_init__(self) -> None:
        require_choices(self)
        if self.depth < 1:
            raise UserError(f"a recurrent network needs at least one layer, got depth {self.depth}")
        check_sizes(self)


class RNN(nn.Module):
    """An image as a sequence: each row of pixels is a step, from top to bottom; the last state represents it."""

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.config = c = config
        self.layers = Recurrent(CELLS[c.cell], c.channels * c.image_size[1], c.width, c.depth, c.dropout)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, H, W] to the network's output after each row, [B, H, D]."""
        check(images, self.config.channels)
        if images.shape[3] != self.config.image_size[1]:
            raise UserError(
                f"rows of {images.shape[3]} pixels do not fit a network that reads rows of "
                f"{self.config.image_size[1]}: resize the images"
            )
        rows = images.transpose(1, 2).flatten(2)  # [B, H, C * W]
        states, _ = self.layers(rows)
        states = self.dropout(states)
        return Tokens(states[:, :0], states, (images.shape[2], 1))

    def pool(self, tokens: Tokens) -> Tensor:
        """The network's output after the last row, [B, D]."""
        return tokens.patches[:, -1]
