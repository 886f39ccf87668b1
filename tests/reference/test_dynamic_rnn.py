"""Compares every layer, on every backend, with dynamic_rnn in NumPy. TensorFlow is not needed."""

import numpy as np
import pytest
import torch
from dynamic_rnn import (
    bidirectional_dynamic_rnn,
    classic_gru_cell,
    dynamic_rnn,
    gru_cell,
    layer_cells,
    lstm_cell,
    reverse_sequence,
    rnn_cell,
)
from numpy.testing import assert_allclose, assert_array_equal

from masked_rnn import MaskedGRU, MaskedLSTM, MaskedRNN

BACKENDS = ("packed", "padded", "bptt", "scan")
LAYERS = {
    "GRU": (MaskedGRU, {}),
    "LSTM": (MaskedLSTM, {}),
    "LSTM with proj_size": (MaskedLSTM, {"proj_size": 2}),
    "RNN": (MaskedRNN, {}),
}
STACKS = {
    "one direction": {},
    "bidirectional": {"bidirectional": True},
    "two bidirectional layers": {"bidirectional": True, "num_layers": 2},
}
LENGTHS = {
    "unsorted": [3, 0, 7, 1, 7, 5],
    "shorter than T": [2, 5, 0, 1, 4, 3],
    "all zero": [0] * 6,
    "none": None,
}
N, T, I, H = 6, 7, 3, 4  # noqa: E741
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def make_layer(kind, **options):
    torch.manual_seed(1)
    cls, more = LAYERS[kind]
    return cls(I, H, batch_first=True, dtype=torch.float64, **more, **options)


def random_input(*shape, seed=2):
    return np.random.default_rng(seed).normal(size=shape)


def random_states(layer, batch, seed=3):
    """Returns initial states of a layer, each (L·D, N, P or H)."""
    rng = np.random.default_rng(seed)
    stacked = layer.num_layers * (1 + layer.bidirectional)
    widths = [layer.proj_size or H, H] if layer.mode == "LSTM" else [H]
    return tuple(rng.normal(size=(stacked, batch, width)) for width in widths)


def run_layer(layer, x, lengths, states):
    """Returns the output (N, T, D·P), and the last states, each (N, L·D·P or H)."""
    hx = None if states is None else tuple(map(torch.from_numpy, states))
    if hx is not None and layer.mode != "LSTM":
        (hx,) = hx
    output, last = layer(torch.from_numpy(x), hx, lengths)
    return output.detach().numpy(), [h.detach().numpy() for h in (last if layer.mode == "LSTM" else (last,))]


def run_numpy(layer, x, lengths, states):
    """Returns the same by the reproduction. Each layer reads the one below; the last states stand side by side."""
    if states is None:
        states = tuple(np.zeros_like(h) for h in random_states(layer, len(x)))
    lasts = []
    for k in range(layer.num_layers):
        cells = layer_cells(layer, k)
        if layer.bidirectional:
            fw, bw = (tuple(h[2 * k + d] for h in states) for d in (0, 1))
            outputs, last = bidirectional_dynamic_rnn(*cells, x, lengths, fw, bw)
            x = np.concatenate(outputs, axis=2)
            lasts += last
        else:
            x, last = dynamic_rnn(*cells, x, lengths, tuple(h[k] for h in states))
            lasts.append(last)
    return x, [np.concatenate(h, axis=1) for h in zip(*lasts, strict=True)]


def random_cell(kind, rng):
    """Returns a cell with random weights, and a random state of six rows for it."""
    if kind == "classic GRU":
        shapes = [(I + H, 2 * H), (2 * H,), (I + H, H), (H,)]
        cell = classic_gru_cell
    else:
        cell, gates = {"GRU": (gru_cell, 3), "LSTM": (lstm_cell, 4), "RNN": (rnn_cell, 1)}[kind]
        shapes = [(gates * H, I), (gates * H, H), (gates * H,), (gates * H,)]
    states = 2 if kind == "LSTM" else 1
    return cell(*(rng.normal(size=shape) for shape in shapes)), tuple(rng.normal(size=(N, H)) for _ in range(states))


@pytest.mark.slow_but_each(3)
@pytest.mark.parametrize("with_hx", [False, True], ids=["no hx", "hx"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_equals_dynamic_rnn(kind, backend, stack, lengths, with_hx):
    layer = make_layer(kind, backend=backend, **stack)
    x = random_input(N, T, I)
    states = random_states(layer, N) if with_hx else None
    output, last = run_layer(layer, x, lengths, states)
    expected_output, expected_last = run_numpy(layer, x, lengths, states)
    assert_allclose(output, expected_output, **CLOSE)
    assert len(last) == len(expected_last)
    for h, expected in zip(last, expected_last, strict=True):
        assert_allclose(h, expected, **CLOSE)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "bidirectional"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_with_padding_and_lengths_equals_no_padding(kind, backend, bidirectional):
    layer = make_layer(kind, backend=backend, bidirectional=bidirectional)
    x = random_input(N, T, I)
    states = random_states(layer, N)
    output, last = run_layer(layer, x, [4] * N, states)
    short_output, short_last = run_layer(layer, x[:, :4], None, states)
    assert_allclose(output[:, :4], short_output, **CLOSE)
    assert_array_equal(output[:, 4:], 0)
    for h, expected in zip(last, short_last, strict=True):
        assert_allclose(h, expected, **CLOSE)
    _, padded_last = run_layer(layer, x, None, states)
    assert np.abs(padded_last[0] - short_last[0]).max() > 0.01


@pytest.mark.parametrize("kind", ["GRU", "classic GRU", "LSTM", "RNN"])
def test_reproduction_equals_each_row_alone(kind):
    rng = np.random.default_rng(4)
    (cell_fw, fw), (cell_bw, bw) = random_cell(kind, rng), random_cell(kind, rng)
    x = rng.normal(size=(N, T, I))
    outputs, states = bidirectional_dynamic_rnn(cell_fw, cell_bw, x, LENGTHS["unsorted"], fw, bw)
    for n, length in enumerate(LENGTHS["unsorted"]):
        row_fw, row_bw = (tuple(h[n : n + 1] for h in state) for state in (fw, bw))
        alone, last = bidirectional_dynamic_rnn(cell_fw, cell_bw, x[n : n + 1, :length], None, row_fw, row_bw)
        for output, expected in zip(outputs, alone, strict=True):
            assert_allclose(output[n : n + 1, :length], expected, **CLOSE)
            assert_array_equal(output[n, length:], 0)
        for state, expected in zip(states, last, strict=True):
            for h, expected_h in zip(state, expected, strict=True):
                assert_allclose(h[n : n + 1], expected_h, **CLOSE)


def test_reproduction_matches_hand_computed_sums():
    """The cell sums its input, so that every number can be checked by eye."""

    def running_sum(x, state):
        h = state[0] + x
        return h, (h,)

    x = np.array([[[1.0], [2.0], [4.0]], [[8.0], [16.0], [32.0]], [[64.0], [64.0], [64.0]]])
    fw, bw = np.zeros((3, 1)), np.array([[100.0], [200.0], [300.0]])
    outputs, states = bidirectional_dynamic_rnn(running_sum, running_sum, x, [3, 2, 0], (fw,), (bw,))
    assert_array_equal(outputs[0][..., 0], [[1, 3, 7], [8, 24, 0], [0, 0, 0]])
    assert_array_equal(outputs[1][..., 0], [[107, 106, 104], [224, 216, 0], [0, 0, 0]])
    assert_array_equal(states[0][0][:, 0], [7, 24, 0])
    assert_array_equal(states[1][0][:, 0], [107, 224, 300])


def test_reverse_sequence_matches_hand_computed_rows():
    x = np.arange(1.0, 10).reshape(3, 3, 1)
    assert_array_equal(reverse_sequence(x, [3, 2, 0])[..., 0], [[3, 2, 1], [5, 4, 6], [7, 8, 9]])
    assert_array_equal(reverse_sequence(x, None)[..., 0], [[3, 2, 1], [6, 5, 4], [9, 8, 7]])


@pytest.mark.parametrize("scale", [0, 1])
def test_gru_forms_agree_only_without_recurrent_weights(scale):
    rng = np.random.default_rng(5)
    W_ih, W_hh = rng.normal(size=(3 * H, I)), scale * rng.normal(size=(3 * H, H))
    b_ih = rng.normal(size=3 * H)
    kernel = np.concatenate([W_ih, W_hh], axis=1).T
    torch_form = gru_cell(W_ih, W_hh, b_ih, np.zeros(3 * H))
    classic_form = classic_gru_cell(kernel[:, : 2 * H], b_ih[: 2 * H], kernel[:, 2 * H :], b_ih[2 * H :])
    x, h = rng.normal(size=(N, T, I)), rng.normal(size=(N, H))
    a, _ = dynamic_rnn(torch_form, x, None, (h,))
    b, _ = dynamic_rnn(classic_form, x, None, (h,))
    if scale:
        assert np.abs(a - b).max() > 0.01
    else:
        assert_allclose(a, b, **CLOSE)
