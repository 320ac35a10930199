"""Recurrent cells against torch.nn's, step by step, and how they remember."""

from __future__ import annotations

import pytest
import torch
from checked import checked
from torch import Tensor, nn

from vitrail.baselines import CELLS, RNN, GRUCell, LSTMCell, Recurrent, RNNCell, RNNConfig
from vitrail.errors import UserError

PEERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
STEPS, DEPTH = 32, 2


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def paired(layers: Recurrent, peer: nn.RNNBase) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters of ours with torch's of the same meaning."""
    names = {
        "input.weight": "weight_ih",
        "hidden.weight": "weight_hh",
        "input.bias": "bias_ih",
        "hidden.bias": "bias_hh",
    }
    return [
        (layers.get_parameter(f"cells.{i}.{ours}"), peer.get_parameter(f"{theirs}_l{i}"))
        for i in range(DEPTH)
        for ours, theirs in names.items()
    ]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_outputs_states_and_gradients_equal_torchs(name: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    layers = Recurrent(CELLS[name], 7, 12, DEPTH).to(dtype)
    peer = PEERS[name](7, 12, DEPTH, batch_first=True).to(dtype)
    pairs = paired(layers, peer)
    assert len(pairs) == len(list(layers.parameters())) == len(list(peer.parameters()))
    for ours, theirs in pairs:
        ours.data.copy_(theirs.data)
    x = torch.randn(3, STEPS, 7, dtype=dtype, requires_grad=True)
    first = [[torch.randn(3, 12, dtype=dtype, requires_grad=True) for _ in layers.start(3)[0]] for _ in range(DEPTH)]
    shown, last = layers(x, tuple(map(tuple, first)))
    stacked = [torch.stack(states) for states in zip(*first, strict=True)]  # torch's: [layers, B, D] each
    expected, expected_last = peer(x, tuple(stacked) if len(stacked) > 1 else stacked[0])
    expected_last = expected_last if len(stacked) > 1 else (expected_last,)
    outputs = [shown, *(value for state in last for value in state)]
    expected_outputs = [expected, *(states[i] for i in range(DEPTH) for states in expected_last)]

    # A random weight for each number, so that no error hides in a sum.
    weights = [torch.randn_like(output) for output in outputs]
    starts = [value for state in first for value in state]
    gradients = torch.autograd.grad(
        sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)),
        [x, *starts, *(ours for ours, _ in pairs)],
    )
    expected_gradients = torch.autograd.grad(
        sum((output * weight).sum() for output, weight in zip(expected_outputs, weights, strict=True)),
        [x, *starts, *(theirs for _, theirs in pairs)],
    )
    for ours, theirs in zip([*outputs, *gradients], [*expected_outputs, *expected_gradients], strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) <= tolerance


@pytest.mark.parametrize("name", CELLS)
def test_step_by_step_equals_the_whole_sequence(name: str) -> None:
    torch.manual_seed(0)
    layers = Recurrent(CELLS[name], 5, 8, DEPTH, dropout=0.5).double().eval()
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    whole, last = layers(x)
    states, shown = layers.start(4), []
    for t in range(6):
        now, states = layers(x[:, t : t + 1], states)
        shown.append(now)
    torch.testing.assert_close(torch.cat(shown, dim=1), whole)
    torch.testing.assert_close(states, last)
    # A sequence in two pieces, the second from the first one's states.
    _, middle = layers(x[:, :2])
    torch.testing.assert_close(layers(x[:, 2:], middle)[0], whole[:, 2:])


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_alone_equals_a_layer(name: str) -> None:
    torch.manual_seed(0)
    layers = Recurrent(CELLS[name], 5, 8)
    cell, x = checked(CELLS[name], layers.cells[0]), torch.randn(2, 3, 5)
    state = cell.start(2)
    for t in range(3):
        state = cell(x[:, t], state)
    torch.testing.assert_close(state, layers(x)[1][0])


def test_recurrent_matrices_start_orthogonal_gate_by_gate_and_the_lstm_remembers() -> None:
    for cell in (RNNCell(3, 8), GRUCell(3, 8), LSTMCell(3, 8)):
        for gate in cell.hidden.weight.split(8):
            torch.testing.assert_close(gate @ gate.T, torch.eye(8))
    bias = LSTMCell(3, 8).input.bias
    assert bias.view(4, 8).sum(dim=1).tolist() == [0, 8, 0, 0]


def test_open_gates_carry_a_state_untouched_over_a_hundred_steps() -> None:
    torch.manual_seed(0)
    x, h = torch.randn(2, 100, 3), torch.randn(2, 8)
    gru, lstm = Recurrent(GRUCell, 3, 8), Recurrent(LSTMCell, 3, 8)
    gru.get_parameter("cells.0.input.bias").data[8:16] = 40.0  # z = 1: keep
    gates = lstm.get_parameter("cells.0.input.bias").data
    gates[0:8] = -40.0  # i = 0: write nothing
    gates[8:16] = 40.0  # f = 1: forget nothing
    torch.testing.assert_close(gru(x, ((h,),))[1][0][0], h)
    torch.testing.assert_close(lstm(x, ((torch.zeros(2, 8), h),))[1][0][1], h)


def test_dropout_lies_between_layers_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3)
    one, two = Recurrent(RNNCell, 3, 8, 1, dropout=0.5), Recurrent(RNNCell, 3, 8, 2, dropout=0.5)
    assert torch.equal(one(x)[0], one(x)[0])
    assert not torch.equal(two(x)[0], two(x)[0])
    assert torch.equal(two.eval()(x)[0], two(x)[0])


def test_rows_are_read_from_the_top_down() -> None:
    torch.manual_seed(0)
    model = RNN(RNNConfig(cell="gru", width=8, image_size=(5, 3), channels=2)).eval()
    images = torch.randn(2, 2, 5, 3)
    changed = images.clone()
    changed[:, :, 3] += 1  # the fourth row
    before, after = model(images).patches, model(changed).patches
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).all()
    # Columns of all channels are one step's input, in the order of memory.
    cell = checked(GRUCell, model.layers.cells[0])
    torch.testing.assert_close(cell(images[:, :, 0].flatten(1), cell.start(2))[0], before[:, 0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cell": "elman"}, "no cell 'elman'"),
        ({"depth": 0}, "at least one layer, got depth 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"image_size": (8, 0)}, r"image_size must be at least 1, got \(8, 0\)"),
        ({"dropout": 1.5}, "dropout must be at least 0 and below 1, got 1.5"),
    ],
)
def test_bad_configs_are_refused_in_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        RNNConfig(**changes)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_rows_of_another_width_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="rows of 9 pixels do not fit a network that reads rows of 8"):
        RNN(RNNConfig())(torch.zeros(1, 1, 8, 9))
