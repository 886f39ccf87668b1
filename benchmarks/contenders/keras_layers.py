"""Keras 3 on TensorFlow, with a mask made from the lengths, in one tf.function."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ..problem import PARTS, Array, Problem, Result

# The order of torch's gates in Keras: the GRU's r, z, n are z, r, n; the LSTM's i, f, g, o are in torch's order.
ORDER = {"gru": (1, 0, 2), "lstm": (0, 1, 2, 3), "rnn": (0,)}
LAYERS = {"gru": keras.layers.GRU, "lstm": keras.layers.LSTM, "rnn": keras.layers.SimpleRNN}


class Keras:
    def __init__(self, problem: Problem, threads: int, jit_compile: bool = False) -> None:
        set_threads(threads)
        self.problem = problem
        data, shape = problem.data(), problem.shape
        options = {"return_sequences": True, "return_state": True}
        if problem.cell == "gru":
            options["reset_after"] = True
        self.layers, self.cells = [], {}
        for layer in range(shape.L):
            made = LAYERS[problem.cell](shape.H, **options)
            if shape.bidirectional:
                made = keras.layers.Bidirectional(made)
            made.build((shape.N, shape.T, shape.I if layer == 0 else shape.D * shape.H))
            self.layers.append(made)
            directions = (made.forward_layer, made.backward_layer) if shape.bidirectional else (made,)
            for suffix, one in zip(("", "_reverse"), directions, strict=False):
                self.cells[f"l{layer}{suffix}"] = one.cell
        for name, cell in self.cells.items():
            for variable, value in zip(variables(cell), self.from_torch(data.weights, name), strict=True):
                variable.assign(value)
        self.variables = [variable for cell in self.cells.values() for variable in variables(cell)]
        self.input, self.lengths = tf.constant(data.input), tf.constant(data.lengths)
        self.cotangents = [tf.constant(d) for d in (data.d_output, *data.d_states)]
        self._infer = tf.function(self.forward, jit_compile=jit_compile)
        self._train = tf.function(self.forward_backward, jit_compile=jit_compile)

    def forward(self, x: tf.Tensor, lengths: tf.Tensor) -> list[tf.Tensor]:
        D, parts = self.problem.shape.D, 2 if self.problem.cell == "lstm" else 1
        mask = tf.sequence_mask(lengths, self.problem.shape.T)
        states: list[list[tf.Tensor]] = [[] for _ in range(parts)]
        for layer in self.layers:
            x, *last = layer(x, mask=mask)
            for d in range(D):
                for part in range(parts):
                    states[part].append(last[d * parts + part])
        return [x, *(tf.stack(part) for part in states)]

    def forward_backward(self, x: tf.Tensor, lengths: tf.Tensor, cotangents: list[tf.Tensor]) -> Any:
        with tf.GradientTape() as tape:
            results = self.forward(x, lengths)
        return results, tape.gradient(results, self.variables, output_gradients=cotangents)

    def infer(self) -> Any:
        return self._infer(self.input, self.lengths)

    def train(self) -> Any:
        return self._train(self.input, self.lengths, self.cotangents)

    def result(self, training: bool) -> Result:
        (output, *states), grads = self.train() if training else (self.infer(), None)
        named = None if grads is None else self.to_torch([np.asarray(g) for g in grads])
        return Result(output.numpy(), tuple(h.numpy() for h in states), named)

    def from_torch(self, weights: dict[str, Array], name: str) -> list[Array]:
        """Returns the kernel (I, G·H), the recurrent kernel, and the bias.

        The bias is (2, G·H) for the GRU. Other cells have one bias, the sum of torch's two.
        """
        w_ih, w_hh, b_ih, b_hh = (self.reorder(weights[f"{part}_{name}"], ORDER[self.problem.cell]) for part in PARTS)
        return [w_ih.T, w_hh.T, np.stack([b_ih, b_hh]) if self.problem.cell == "gru" else b_ih + b_hh]

    def to_torch(self, grads: list[Array]) -> dict[str, Array]:
        order, named = np.argsort(ORDER[self.problem.cell]), {}
        for k, name in enumerate(self.cells):
            d_kernel, d_recurrent, d_bias = grads[3 * k : 3 * k + 3]
            named[f"weight_ih_{name}"] = self.reorder(d_kernel.T, order)
            named[f"weight_hh_{name}"] = self.reorder(d_recurrent.T, order)
            for part, d in zip(("bias_ih", "bias_hh"), np.atleast_2d(d_bias), strict=False):
                named[f"{part}_{name}"] = self.reorder(d, order)
        return named

    def reorder(self, rows: Array, order: Any) -> Array:
        blocks = np.split(rows, len(order))
        return np.concatenate([blocks[gate] for gate in order])


def variables(cell: Any) -> list[tf.Variable]:
    return [cell.kernel.value, cell.recurrent_kernel.value, cell.bias.value]


def set_threads(threads: int) -> None:
    """Sets TensorFlow's threads, once in a process: it refuses a change after its first operation."""
    if tf.config.threading.get_intra_op_parallelism_threads() != threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
