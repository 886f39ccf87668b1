"""Problems for the contenders: a shape and its arrays, which are the same in every process.

T time, N batch, I input, H hidden, D directions, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

CELLS = ("gru", "lstm", "rnn")
GATES = {"gru": 3, "lstm": 4, "rnn": 1, "rnn-relu": 1}
PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Shape(NamedTuple):
    N: int
    T: int
    I: int  # noqa: E741
    H: int
    L: int = 1
    bidirectional: bool = False

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    def __str__(self) -> str:
        return f"{self.N}×{self.T} {self.I}→{self.H}" + f" ×{self.L}" * (self.L > 1) + " bi" * self.bidirectional


SHAPES = (
    Shape(32, 100, 128, 128),
    Shape(32, 100, 128, 128, 1, True),
    Shape(32, 100, 256, 256, 2, True),
    Shape(64, 50, 64, 64),
    Shape(8, 200, 64, 64, 1, True),
    Shape(128, 100, 512, 512),
    Shape(1, 100, 128, 128),
    Shape(32, 500, 128, 128),
)


class Data(NamedTuple):
    input: Array
    """(N, T, I), random at padding too, so that a contender that reads padding gives wrong results."""
    lengths: Array
    weights: dict[str, Array]
    """By nn.GRU's names."""
    d_output: Array
    """(N, T, D·H): the cotangent of the output, zero at padding."""
    d_states: tuple[Array, ...]
    """(L·D, N, H) each: the cotangents of the last states."""
    states: tuple[Array, ...]
    """(L·D, N, H) each: the initial states, zeros unless the problem is `acting`."""
    starts: Array
    """(N,) bool: rows that begin an episode, so that their initial state counts as zeros."""


@dataclass(frozen=True)
class Problem:
    cell: str
    shape: Shape
    full: bool = False
    """True: every length is T, and a layer that can run without lengths gets none."""
    hidden_bias: bool = True
    """False: b_hn is zero, for a GRU without that bias."""
    seed: int = 0
    dtype: str = "float32"
    """The dtype of weights and input, by torch's name."""
    listed: bool = False
    """True: the lengths are a list, as a data loader often has them."""
    acting: bool = False
    """True: the call has an initial state, which is dropped where `starts` says so."""

    def lengths(self) -> Array:
        """Draws lengths uniform on [1, T], one of them T. A seed gives the same fractions of any T."""
        N, T = self.shape.N, self.shape.T
        if self.full:
            return np.full(N, T)
        random = np.random.default_rng(self.seed)
        lengths = 1 + (random.random(N) * T).astype(int)
        lengths[random.integers(N)] = T
        return lengths

    def data(self) -> Data:
        N, T, I, H, L, _ = self.shape  # noqa: E741
        D, G = self.shape.D, GATES[self.cell]
        lengths = self.lengths()
        random = np.random.default_rng(self.seed + 1)

        def normal(*size: int) -> Array:
            return random.standard_normal(size, dtype=np.float32)

        weights = {}
        for layer in range(L):
            width = I if layer == 0 else D * H
            for suffix in ("", "_reverse")[:D]:
                sizes = {"weight_ih": (G * H, width), "weight_hh": (G * H, H), "bias_ih": (G * H,), "bias_hh": (G * H,)}
                for name, size in sizes.items():
                    uniform = (2 * random.random(size, dtype=np.float32) - 1) / np.sqrt(np.float32(H))
                    if name == "bias_hh" and self.cell == "gru" and not self.hidden_bias:
                        uniform[2 * H :] = 0
                    weights[f"{name}_l{layer}{suffix}"] = uniform
        real = np.arange(T) < lengths[:, None]
        d_output = normal(N, T, D * H) * real[:, :, None]
        d_states = tuple(normal(L * D, N, H) for _ in range(2 if self.cell == "lstm" else 1))
        input = normal(N, T, I)
        starts = (random.random(N) < 0.2) & self.acting
        states = tuple(normal(*d.shape) if self.acting else np.zeros_like(d) for d in d_states)
        return Data(input, lengths, weights, d_output, d_states, states, starts)

    def flops(self, step: str) -> int:
        """Counts the operations of the products that a step ("train" or "infer") needs, at real steps only.

        Forward: W_ih x and W_hh h. Backward: dh, dW_hh, dW_ih, and dx between layers, but not dx of the input.
        """
        _, _, I, H, L, _ = self.shape  # noqa: E741
        D, rows = self.shape.D, int(self.lengths().sum())
        widths = [I] + [D * H] * (L - 1)
        columns = sum(H + width for width in widths)
        if step == "train":
            columns += sum(2 * H + width + (width if layer else 0) for layer, width in enumerate(widths))
        return 2 * rows * D * GATES[self.cell] * H * columns


class Result(NamedTuple):
    """A contender's results for the check, in torch's layout."""

    output: Array
    states: tuple[Array, ...]
    grads: dict[str, Array] | None
    """By nn.GRU's names, those that the contender has. None if it doesn't train."""
