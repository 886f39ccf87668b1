"""Compares the layers and the NumPy reproduction with TensorFlow itself: outputs, last states and every gradient.

TensorFlow's dynamic_rnn and bidirectional_dynamic_rnn run in graph mode, in float64. Its own GRUCell applies the reset
gate before the product and can't share weights with `nn.GRU`, so it proves the relations. A cell of the cuDNN form, and
TensorFlow's LSTM and RNN cells, carry a layer's weights, so they prove the numbers.

Skipped where TensorFlow is missing; MASKED_RNN_REQUIRE_TENSORFLOW=1 makes that a failure.
"""

import importlib.util
import os
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from dynamic_rnn import bidirectional_dynamic_rnn, classic_gru_cell, dynamic_rnn, layer_cells
from numpy.testing import assert_allclose, assert_array_equal

from masked_rnn import MaskedGRU, MaskedLSTM, MaskedRNN

# These functions have been deprecated since TensorFlow 2.0. Their cells warn of it whenever one is made.
pytestmark = pytest.mark.filterwarnings("ignore:`tf.nn.rnn_cell.*` is deprecated:UserWarning")

LAYERS = {
    "GRU": (MaskedGRU, {}),
    "LSTM": (MaskedLSTM, {}),
    "LSTM with proj_size": (MaskedLSTM, {"proj_size": 2}),
    "RNN": (MaskedRNN, {}),
}
LENGTHS = {"unsorted": [3, 0, 6, 1, 5], "all zero": [0] * 5, "none": None}
N, T, I, H = 5, 6, 3, 4  # noqa: E741
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(scope="module")
def tf():
    missing = [name for name in ("tensorflow", "tf_keras") if importlib.util.find_spec(name) is None]
    if missing:
        words = f"needs {' and '.join(missing)}: pip install -e '.[reference]'"
        if os.environ.get("MASKED_RNN_REQUIRE_TENSORFLOW") == "1":
            pytest.fail(f"MASKED_RNN_REQUIRE_TENSORFLOW=1, but this {words}")
        pytest.skip(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_USE_LEGACY_KERAS", "1")  # otherwise tf.compat.v1.nn.rnn_cell is missing
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TensorFlow and its dependencies warn of each other
            import tensorflow

            _ = tensorflow.compat.v1.nn.rnn_cell.GRUCell  # imported at its first use
        yield tensorflow


class Result(NamedTuple):
    output: np.ndarray
    """(N, T, D·P)"""
    states: list[np.ndarray]
    """Each (N, D·P or D·H): the directions' last states side by side."""
    gradients: dict[str, np.ndarray]


class Problem(NamedTuple):
    """The inputs of a layer, and random cotangents of its results."""

    x: np.ndarray
    lengths: list[int] | None
    states: list[np.ndarray]
    d_output: np.ndarray
    d_states: list[np.ndarray]


def make_layer(kind, bidirectional, backend="auto"):
    torch.manual_seed(1)
    cls, more = LAYERS[kind]
    return cls(I, H, batch_first=True, bidirectional=bidirectional, dtype=torch.float64, backend=backend, **more)


def make_problem(layer, lengths):
    rng = np.random.default_rng(2)
    D = 1 + layer.bidirectional
    P = layer.proj_size or H
    widths = [P, H] if layer.mode == "LSTM" else [H]
    return Problem(
        x=rng.normal(size=(N, T, I)),
        lengths=lengths,
        states=[rng.normal(size=(D, N, w)) for w in widths],
        d_output=rng.normal(size=(N, T, D * P)),
        d_states=[rng.normal(size=(N, D * w)) for w in widths],
    )


def run_layer(layer, problem):
    x, *hx = (torch.from_numpy(a).requires_grad_() for a in (problem.x, *problem.states))
    output, last = layer(x, tuple(hx) if layer.mode == "LSTM" else hx[0], problem.lengths)
    last = last if layer.mode == "LSTM" else (last,)
    parameters = dict(layer.named_parameters())
    cotangents = [torch.from_numpy(a) for a in (problem.d_output, *problem.d_states)]
    x_grad, *rest = torch.autograd.grad((output, *last), [x, *hx, *parameters.values()], cotangents)
    hx_grads, weight_grads = rest[: len(hx)], rest[len(hx) :]
    gradients = {"x": x_grad.numpy()}
    gradients |= {f"hx[{k}]": g.numpy() for k, g in enumerate(hx_grads)}
    weight_grads = dict(zip(parameters, (g.numpy() for g in weight_grads), strict=True))
    for suffix in suffixes(layer):
        for k, g in enumerate(to_tensorflow(layer, weight_grads, suffix, gradients=True)):
            gradients[f"weight {k}{suffix}"] = g
    return Result(output.detach().numpy(), [h.detach().numpy() for h in last], gradients)


def suffixes(layer):
    return ("", "_reverse")[: 1 + layer.bidirectional]


def to_tensorflow(layer, weights, suffix, gradients=False):
    """Returns a direction's weights, or their gradients, in the order of the TensorFlow cell.

    TensorFlow has one bias where PyTorch adds two. Its value is their sum, and its gradient is that of both.
    """
    w_ih, w_hh, b_ih, b_hh = (weights[f"{n}_l0{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    if layer.mode == "GRU":
        return [w_ih, w_hh, b_ih, b_hh]
    kernel = np.concatenate([w_ih, w_hh], axis=1)
    bias = (b_ih + b_hh) / (2 if gradients else 1)
    if layer.mode == "LSTM":  # i, f, g, o here; i, j, f, o there
        kernel, bias = (np.concatenate([np.split(a, 4)[k] for k in (0, 2, 1, 3)]) for a in (kernel, bias))
    projection = [weights[f"weight_hr_l0{suffix}"].T] if layer.proj_size else []
    return [kernel.T, bias, *projection]


def make_cell(tf, layer):
    cells = tf.compat.v1.nn.rnn_cell
    if layer.mode == "GRU":
        return cudnn_gru_cell(tf)
    if layer.mode == "LSTM":
        return cells.LSTMCell(H, num_proj=layer.proj_size or None, forget_bias=0.0, dtype=tf.float64)
    return cells.BasicRNNCell(H, dtype=tf.float64)


def cudnn_gru_cell(tf):
    class CudnnGRUCell(tf.compat.v1.nn.rnn_cell.RNNCell):
        """Applies the reset gate after the product, as cuDNN and PyTorch do."""

        state_size = output_size = H

        def build(self, input_shape):
            shapes = {"w_ih": (3 * H, I), "w_hh": (3 * H, H), "b_ih": (3 * H,), "b_hh": (3 * H,)}
            self.w_ih, self.w_hh, self.b_ih, self.b_hh = (self.add_weight(k, shape) for k, shape in shapes.items())
            super().build(input_shape)

        def call(self, x, h):
            x_r, x_z, x_n = tf.split(x @ tf.transpose(self.w_ih) + self.b_ih, 3, axis=1)
            h_r, h_z, h_n = tf.split(h @ tf.transpose(self.w_hh) + self.b_hh, 3, axis=1)
            r, z = tf.sigmoid(x_r + h_r), tf.sigmoid(x_z + h_z)
            n = tf.tanh(x_n + r * h_n)
            h = (1 - z) * n + z * h
            return h, h

    return CudnnGRUCell(dtype=tf.float64)


def run_tensorflow(tf, layer, problem):
    weights = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    swap = slice(None, None, -1)  # TensorFlow's LSTM state is (c, h)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        cells = [make_cell(tf, layer) for _ in suffixes(layer)]
        x = tf.constant(problem.x)
        hx = [tf.constant(h) for h in problem.states]
        initial = [[h[d] for h in hx] for d in range(len(cells))]
        if layer.mode == "LSTM":
            pair = tf.compat.v1.nn.rnn_cell.LSTMStateTuple
            initial = [pair(*state[swap]) for state in initial]
        else:
            initial = [h for (h,) in initial]
        if len(cells) == 1:
            output, last = tf.compat.v1.nn.dynamic_rnn(*cells, x, problem.lengths, *initial)
            lasts = [last]
        else:
            both, lasts = tf.compat.v1.nn.bidirectional_dynamic_rnn(*cells, x, problem.lengths, *initial)
            output = tf.concat(both, axis=2)
        lasts = [state[swap] if layer.mode == "LSTM" else [state] for state in lasts]
        states = [tf.concat(h, axis=1) for h in zip(*lasts, strict=True)]

        sources = {"x": x} | {f"hx[{k}]": h for k, h in enumerate(hx)}
        for cell, suffix in zip(cells, suffixes(layer), strict=True):
            sources |= {f"weight {k}{suffix}": w for k, w in enumerate(cell.weights)}
        cotangents = [tf.constant(a) for a in (problem.d_output, *problem.d_states)]
        gradients = tf.gradients([output, *states], list(sources.values()), cotangents)
        set_weights(tf, session, cells, [to_tensorflow(layer, weights, suffix) for suffix in suffixes(layer)])
        output, states, gradients = session.run((output, states, gradients))
    return Result(output, states, dict(zip(sources, gradients, strict=True)))


def set_weights(tf, session, cells, values):
    variables = [v for cell in cells for v in cell.weights]
    values = [v for of_cell in values for v in of_cell]
    session.run(tf.compat.v1.global_variables_initializer())
    session.run([variable.assign(value) for variable, value in zip(variables, values, strict=True)])


@pytest.fixture(scope="module")
def in_tensorflow(tf):
    """Returns a function that computes the result of each problem once for all backends."""
    results = {}

    def get(kind, bidirectional, lengths):
        key = kind, bidirectional, lengths
        if key not in results:
            layer = make_layer(kind, bidirectional)
            results[key] = run_tensorflow(tf, layer, make_problem(layer, LENGTHS[lengths]))
        return results[key]

    return get


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "bidirectional"])
@pytest.mark.parametrize("backend", ["packed", "padded", "bptt", "scan"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_equals_tensorflow(in_tensorflow, kind, backend, bidirectional, lengths):
    expected = in_tensorflow(kind, bidirectional, lengths)
    layer = make_layer(kind, bidirectional, backend)
    result = run_layer(layer, make_problem(layer, LENGTHS[lengths]))
    assert_allclose(result.output, expected.output, **CLOSE)
    for h, expected_h in zip(result.states, expected.states, strict=True):
        assert_allclose(h, expected_h, **CLOSE)
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in result.gradients.items():
        assert_allclose(gradient, expected.gradients[name], **CLOSE, err_msg=name)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "bidirectional"])
@pytest.mark.parametrize("kind", LAYERS)
def test_reproduction_equals_tensorflow(in_tensorflow, kind, bidirectional, lengths):
    expected = in_tensorflow(kind, bidirectional, lengths)
    layer = make_layer(kind, bidirectional)
    problem = make_problem(layer, LENGTHS[lengths])
    output, states = run_numpy(layer_cells(layer), problem)
    assert_allclose(output, expected.output, **CLOSE)
    for h, expected_h in zip(states, expected.states, strict=True):
        assert_allclose(h, expected_h, **CLOSE)


def run_numpy(cells, problem):
    initial = [tuple(h[d] for h in problem.states) for d in range(len(cells))]
    if len(cells) == 1:
        output, last = dynamic_rnn(*cells, problem.x, problem.lengths, *initial)
        return output, list(last)
    outputs, lasts = bidirectional_dynamic_rnn(*cells, problem.x, problem.lengths, *initial)
    return np.concatenate(outputs, axis=2), [np.concatenate(h, axis=1) for h in zip(*lasts, strict=True)]


class Classic(NamedTuple):
    """TensorFlow's GRUCell in two directions: its results for the rows in one batch and alone, and its weights."""

    output: np.ndarray
    last: np.ndarray
    alone: list[tuple[np.ndarray, np.ndarray]]
    """The results of the rows that have a step."""
    weights: list[list[np.ndarray]]


def classic_problem():
    rng = np.random.default_rng(3)
    return rng.normal(size=(N, T, I)), LENGTHS["unsorted"], rng.normal(size=(2, N, H))


@pytest.fixture(scope="module")
def classic(tf):
    x, lengths, hx = classic_problem()
    rng = np.random.default_rng(4)
    shapes = [(I + H, 2 * H), (2 * H,), (I + H, H), (H,)]
    weights = [[rng.normal(size=shape) for shape in shapes] for _ in range(2)]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        cells = [tf.compat.v1.nn.rnn_cell.GRUCell(H, dtype=tf.float64) for _ in range(2)]
        given = [tf.compat.v1.placeholder(tf.float64, shape) for shape in ((None, None, I), (2, None, H))]

        def run(lengths):
            outputs, lasts = tf.compat.v1.nn.bidirectional_dynamic_rnn(
                *cells, given[0], lengths, given[1][0], given[1][1]
            )
            return tf.concat(outputs, axis=2), tf.stack(lasts)

        in_one_batch, without_lengths = run(lengths), run(None)
        set_weights(tf, session, cells, weights)
        output, last = session.run(in_one_batch, dict(zip(given, (x, hx), strict=True)))
        alone = [
            session.run(without_lengths, dict(zip(given, (x[n : n + 1, :length], hx[:, n : n + 1]), strict=True)))
            for n, length in enumerate(lengths)
            if length  # TensorFlow can't run no steps at all
        ]
    return Classic(output, last, alone, weights)


def test_tensorflow_equals_each_row_alone(classic):
    _, lengths, hx = classic_problem()
    alone = iter(classic.alone)
    for n, length in enumerate(lengths):
        assert_array_equal(classic.output[n, length:], 0)
        if length == 0:
            assert_array_equal(classic.last[:, n], hx[:, n])
            continue
        output, last = next(alone)
        assert_allclose(classic.output[n, :length], output[0], **CLOSE)
        assert_allclose(classic.last[:, n], last[:, 0], **CLOSE)


def test_reproduction_equals_tensorflow_with_its_gru_cell(classic):
    x, lengths, hx = classic_problem()
    cells = [classic_gru_cell(*weights) for weights in classic.weights]
    outputs, states = bidirectional_dynamic_rnn(*cells, x, lengths, (hx[0],), (hx[1],))
    assert_allclose(np.concatenate(outputs, axis=2), classic.output, **CLOSE)
    assert_allclose(np.stack([h for (h,) in states]), classic.last, **CLOSE)


def run_keras(tf, layer, x, mask, states):
    """Runs a Keras layer for each direction. The second reads time, and the mask, from the end."""
    layers = tf.keras.layers
    cls = {"GRU": layers.GRU, "LSTM": layers.LSTM, "RNN_TANH": layers.SimpleRNN}[layer.mode]
    options = {"return_sequences": True, "return_state": True, "zero_output_for_mask": True, "dtype": "float64"}
    outputs, lasts = [], []
    for d, (suffix, step) in enumerate([("", 1), ("_reverse", -1)]):
        keras = cls(H, **options)
        keras.build(x.shape)
        keras.set_weights(to_keras(layer, suffix))
        output, *last = keras(
            tf.constant(x[:, ::step]),
            mask=tf.constant(mask[:, ::step]),
            initial_state=[tf.constant(h[d]) for h in states],
        )
        outputs.append(output.numpy()[:, ::step])
        lasts.append([h.numpy() for h in last])
    return np.concatenate(outputs, axis=2), [np.concatenate(h, axis=1) for h in zip(*lasts, strict=True)]


def to_keras(layer, suffix):
    """Returns kernel, recurrent kernel, bias: gates z, r, h for r, z, n, with two biases; i, f, c, o for i, f, g, o."""
    weights = [p.detach().numpy() for name, p in layer.named_parameters() if name.endswith(f"_l0{suffix}")]
    if layer.mode == "GRU":
        w_ih, w_hh, b_ih, b_hh = (np.concatenate([np.split(w, 3)[k] for k in (1, 0, 2)]) for w in weights)
        return [w_ih.T, w_hh.T, np.stack([b_ih, b_hh])]
    w_ih, w_hh, b_ih, b_hh = weights
    return [w_ih.T, w_hh.T, b_ih + b_hh]


@pytest.mark.parametrize("backend", ["packed", "padded", "bptt", "scan"])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_mask_with_holes_equals_keras(tf, kind, backend):
    layer = make_layer(kind, bidirectional=True, backend=backend)
    problem = make_problem(layer, None)
    mask = np.random.default_rng(5).random((N, T)) < 0.6
    mask[0] = False
    mask[1] = [False, True, False, False, True, False]
    expected_output, expected_states = run_keras(tf, layer, problem.x, mask, problem.states)
    hx = tuple(map(torch.from_numpy, problem.states))
    output, last = layer(torch.from_numpy(problem.x), hx if kind == "LSTM" else hx[0], mask=torch.from_numpy(mask))
    assert_allclose(output.detach().numpy(), expected_output, **CLOSE)
    for h, expected in zip(last if kind == "LSTM" else (last,), expected_states, strict=True):
        assert_allclose(h.detach().numpy(), expected, **CLOSE)
