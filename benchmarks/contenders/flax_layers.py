"""Flax: nnx.RNN with seq_lengths, under jax.jit.

Its GRU applies the reset gate after the product, as torch's does, but has no b_hn. The other hidden biases are added to
the input's, so torch's weights can be used if b_hn = 0. Its LSTM and simple cell have one bias, the sum of torch's two.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..problem import PARTS, Array, Problem, Result

CELLS = {"gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell, "rnn": nnx.SimpleCell}


class Stack(nnx.Module):
    def __init__(self, layers: list[Any], hidden_size: int) -> None:
        self.layers = nnx.List(layers)
        self.hidden_size = hidden_size

    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
        carries = []
        for layer in self.layers:
            start = self.zeros(layer, len(x))
            last, x = layer(x, seq_lengths=lengths, initial_carry=start, return_carry=True)
            carries += last if isinstance(layer, nnx.Bidirectional) else [last]
        if isinstance(carries[0], tuple):  # the LSTM's (c, h)
            return x, jnp.stack([h for _, h in carries]), jnp.stack([c for c, _ in carries])
        return x, jnp.stack(carries)

    def zeros(self, layer: Any, N: int) -> Any:
        if isinstance(layer, nnx.Bidirectional):
            return tuple(self.zeros(way, N) for way in (layer.forward_rnn, layer.backward_rnn))
        h = jnp.zeros((N, self.hidden_size))
        return (h, h) if isinstance(layer.cell, nnx.OptimizedLSTMCell) else h


class Flax:
    def __init__(self, problem: Problem, threads: int, device: str = "cpu") -> None:
        jax.config.update("jax_platforms", device)
        self.problem = problem
        data, shape = problem.data(), problem.shape
        self.names: list[str] = []
        layers = []
        for layer in range(shape.L):
            directions = []
            for suffix in ("", "_reverse")[: shape.D]:
                width = shape.I if layer == 0 else shape.D * shape.H
                cell = CELLS[problem.cell](width, shape.H, rngs=nnx.Rngs(0))
                self.names.append(f"l{layer}{suffix}")
                load(cell, problem.cell, data.weights, self.names[-1])
                directions.append(nnx.RNN(cell, rngs=False))
            layers.append(nnx.Bidirectional(*directions, rngs=False) if shape.bidirectional else directions[0])
        graph, self.weights, rest = nnx.split(Stack(layers, shape.H), nnx.Param, ...)

        def forward(weights: Any, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
            return nnx.merge(graph, weights, rest)(x, lengths)

        def forward_backward(weights: Any, x: jax.Array, lengths: jax.Array, cotangents: Any) -> Any:
            results, pull_back = jax.vjp(lambda w: forward(w, x, lengths), weights)
            return results, pull_back(cotangents)[0]

        self._infer, self._train = jax.jit(forward), jax.jit(forward_backward)
        self.input, self.lengths = jnp.asarray(data.input), jnp.asarray(data.lengths)
        self.cotangents = tuple(jnp.asarray(d) for d in (data.d_output, *data.d_states))

    def infer(self) -> Any:
        return jax.block_until_ready(self._infer(self.weights, self.input, self.lengths))

    def train(self) -> Any:
        return jax.block_until_ready(self._train(self.weights, self.input, self.lengths, self.cotangents))

    def result(self, training: bool) -> Result:
        (output, *states), grads = self.train() if training else (self.infer(), None)
        named = None
        if grads is not None:
            named = {}
            for name, cell in zip(self.names, self.cells(grads), strict=True):
                named[f"weight_ih_{name}"] = np.asarray(cell["dense_i"]["kernel"][...]).T
                named[f"weight_hh_{name}"] = np.asarray(cell["dense_h"]["kernel"][...]).T
                bias = cell["dense_h" if self.problem.cell == "lstm" else "dense_i"]["bias"]
                named[f"bias_ih_{name}"] = np.asarray(bias[...])
        return Result(np.asarray(output), tuple(np.asarray(h) for h in states), named)

    def cells(self, state: Any) -> list[Any]:
        """Returns the cells' parts of a state, in the order of `names`."""
        layers = [state["layers"][k] for k in range(self.problem.shape.L)]
        if self.problem.shape.bidirectional:
            return [layer[f"{way}_rnn"]["cell"] for layer in layers for way in ("forward", "backward")]
        return [layer["cell"] for layer in layers]


def load(cell: Any, kind: str, weights: dict[str, Array], name: str) -> None:
    w_ih, w_hh, b_ih, b_hh = (weights[f"{part}_{name}"] for part in PARTS)
    if kind == "gru" and np.any(b_hh[2 * len(b_hh) // 3 :]):
        raise ValueError("nnx.GRUCell has no b_hn; it can only carry weights in which that bias is zero")
    cell.dense_i.kernel = nnx.Param(jnp.asarray(w_ih.T))
    cell.dense_h.kernel = nnx.Param(jnp.asarray(w_hh.T))
    (cell.dense_h if kind == "lstm" else cell.dense_i).bias = nnx.Param(jnp.asarray(b_ih + b_hh))
