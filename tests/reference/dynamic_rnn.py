"""TensorFlow 1's `tf.nn.dynamic_rnn` and `tf.nn.bidirectional_dynamic_rnn` in NumPy, and the cells they run.

A cell is a function `step(x, state) -> (output, state)` of one time step: x (N, I), output (N, P), and a state that is
always a tuple, `(h,)` or `(h, c)`, whose first member is as wide as the output.

https://www.tensorflow.org/api_docs/python/tf/compat/v1/nn/dynamic_rnn
https://www.tensorflow.org/api_docs/python/tf/compat/v1/nn/bidirectional_dynamic_rnn

T time, N batch, I input, H hidden, P the state that is fed back (H, or proj_size).
"""

from collections.abc import Callable

import numpy as np
from numpy import tanh

Array = np.ndarray
State = tuple[Array, ...]
Cell = Callable[[Array, State], tuple[Array, State]]


def dynamic_rnn(cell: Cell, inputs: Array, sequence_length: Array | None, initial_state: State) -> tuple[Array, State]:
    """Returns outputs (N, T, P) and the last state, from inputs (N, T, I).

    TensorFlow on `sequence_length`: "Used to copy-through state and zero-out outputs when past a batch element's
    sequence length."
    """
    N, T, _ = inputs.shape
    sequence_length = np.full(N, T) if sequence_length is None else np.asarray(sequence_length)
    state = initial_state
    outputs = np.zeros((N, T, state[0].shape[1]))
    for t in range(T):
        live = (t < sequence_length)[:, None]
        output, new_state = cell(inputs[:, t], state)
        outputs[:, t] = np.where(live, output, 0)
        state = tuple(np.where(live, new, old) for new, old in zip(new_state, state, strict=True))
    return outputs, state


def bidirectional_dynamic_rnn(
    cell_fw: Cell,
    cell_bw: Cell,
    inputs: Array,
    sequence_length: Array | None,
    initial_state_fw: State,
    initial_state_bw: State,
) -> tuple[tuple[Array, Array], tuple[State, State]]:
    """Returns `(output_fw, output_bw), (output_state_fw, output_state_bw)`.

    TensorFlow on `sequence_length`: "If not provided, all batch entries are assumed to be full sequences; and time
    reversal is applied from time `0` to `max_time` for each sequence."
    """
    output_fw, state_fw = dynamic_rnn(cell_fw, inputs, sequence_length, initial_state_fw)
    reversed_inputs = reverse_sequence(inputs, sequence_length)
    reversed_output, state_bw = dynamic_rnn(cell_bw, reversed_inputs, sequence_length, initial_state_bw)
    return (output_fw, reverse_sequence(reversed_output, sequence_length)), (state_fw, state_bw)


def reverse_sequence(inputs: Array, sequence_length: Array | None) -> Array:
    """Reverses the first `sequence_length[n]` steps of row n, and leaves the rest, as `tf.reverse_sequence` does."""
    if sequence_length is None:
        return inputs[:, ::-1]
    result = inputs.copy()
    for n, length in enumerate(sequence_length):
        result[n, :length] = inputs[n, :length][::-1]
    return result


def gru_cell(W_ih: Array, W_hh: Array, b_ih: Array, b_hh: Array) -> Cell:
    """Returns PyTorch's and cuDNN's GRU, whose reset gate comes after the product.

    Gates r, z, n; weights (3H, I), (3H, H).
    """

    def step(x, state):
        (h,) = state
        x_r, x_z, x_n = np.split(x @ W_ih.T + b_ih, 3, axis=1)
        h_r, h_z, h_n = np.split(h @ W_hh.T + b_hh, 3, axis=1)
        r = sigmoid(x_r + h_r)
        z = sigmoid(x_z + h_z)
        n = tanh(x_n + r * h_n)
        h = (1 - z) * n + z * h
        return h, (h,)

    return step


def classic_gru_cell(gate_kernel: Array, gate_bias: Array, candidate_kernel: Array, candidate_bias: Array) -> Cell:
    """Returns `tf.nn.rnn_cell.GRUCell`, whose reset gate comes before the product.

    Gates r, u; kernels (I + H, 2H), (I + H, H).

    https://www.tensorflow.org/api_docs/python/tf/compat/v1/nn/rnn_cell/GRUCell
    """

    def step(x, state):
        (h,) = state
        gates = sigmoid(np.concatenate([x, h], axis=1) @ gate_kernel + gate_bias)
        r, u = np.split(gates, 2, axis=1)
        c = tanh(np.concatenate([x, r * h], axis=1) @ candidate_kernel + candidate_bias)
        h = u * h + (1 - u) * c
        return h, (h,)

    return step


def lstm_cell(W_ih: Array, W_hh: Array, b_ih: Array, b_hh: Array, W_hr: Array | None = None) -> Cell:
    """Returns PyTorch's LSTM. Gates i, f, g, o; weights (4H, I), (4H, P); W_hr (P, H) projects h.

    Keras has the same gates in the same order, calls g c, and stores the transposed weights and the biases' sum.
    """

    def step(x, state):
        h, c = state
        i, f, g, o = np.split(x @ W_ih.T + b_ih + h @ W_hh.T + b_hh, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        if W_hr is not None:
            h = h @ W_hr.T
        return h, (h, c)

    return step


def rnn_cell(W_ih: Array, W_hh: Array, b_ih: Array, b_hh: Array) -> Cell:
    """Returns PyTorch's tanh RNN: `tf.nn.rnn_cell.BasicRNNCell` with separate weights (H, I), (H, H)."""

    def step(x, state):
        (h,) = state
        h = tanh(x @ W_ih.T + b_ih + h @ W_hh.T + b_hh)
        return h, (h,)

    return step


def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def layer_cells(layer, k: int = 0) -> list[Cell]:
    """Returns the cells of a `torch.nn` recurrent layer's k-th layer: forward and, if there is one, backward."""
    cell = {"GRU": gru_cell, "LSTM": lstm_cell, "RNN_TANH": rnn_cell}[layer.mode]
    return [cell(*direction_weights(layer, k, suffix)) for suffix in ("", "_reverse")[: 1 + layer.bidirectional]]


def direction_weights(layer, k: int, suffix: str) -> list[Array]:
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"] + ["weight_hr"] * bool(layer.proj_size)
    return [getattr(layer, f"{name}_l{k}{suffix}").detach().numpy() for name in names]
