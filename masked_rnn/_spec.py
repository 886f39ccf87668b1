"""What a layer is: its cell, its sizes, and the names and shapes of its weights. Made once for each configuration.

I input, H hidden, P the state that is fed back (H, or proj_size), D directions, L layers.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import torch

GATES = {"GRU": 3, "LSTM": 4, "RNN_TANH": 1, "RNN_RELU": 1}
"""The number of gates, by `nn.RNNBase.mode`. A weight has H rows for each."""
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
"""The names of the parameters, without the suffix `_l0`, `_l0_reverse`, ..."""


class Configured(Protocol):
    """The attributes of `torch.nn`'s layers that a spec holds."""

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    bidirectional: bool
    proj_size: int


class _Sizes(NamedTuple):
    mode: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    proj_size: int = 0


class Spec(_Sizes):
    """The configuration of a stack of layers, and what follows from it."""

    @cached_property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @cached_property
    def fed_back(self) -> int:
        return self.proj_size or self.hidden_size

    @cached_property
    def output_width(self) -> int:
        return self.directions * self.fed_back

    @cached_property
    def state_widths(self) -> tuple[int, ...]:
        """The width of each state: (P,), for the LSTM (P, H)."""
        return (self.fed_back, self.hidden_size) if self.mode == "LSTM" else (self.fed_back,)

    @cached_property
    def stacked(self) -> int:
        """The number of states that are stacked in `nn.GRU`'s hx: L·D."""
        return self.num_layers * self.directions

    @cached_property
    def names(self) -> list[str]:
        """The names of the weights, in `torch.nn`'s order."""
        return expected_weights(*self)[0]

    @cached_property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the weights, in `torch.nn`'s order."""
        return expected_weights(*self)[1]

    def layer(self, k: int) -> Spec:
        """Return the spec of one layer of the stack."""
        inputs = self.fed_back * self.directions if k else self.input_size
        return spec(self.mode, inputs, self.hidden_size, 1, self.bias, self.bidirectional, self.proj_size)


spec = lru_cache(maxsize=256)(Spec)


def spec_of(layer: Configured) -> Spec:
    return spec(*configuration(layer))


def configuration(layer: Configured) -> tuple[str, int, int, int, bool, bool, int]:
    return (
        layer.mode,
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        layer.bias,
        layer.bidirectional,
        layer.proj_size,
    )


def expected_weights(
    mode: str, input_size: int, hidden_size: int, num_layers: int, bias: bool, bidirectional: bool, proj_size: int
) -> tuple[list[str], list[torch.Size]]:
    """Return the names and the shapes of a layer's weights, in `torch.nn`'s order. Dynamo can follow this function."""
    suffixes = ("", "_reverse") if bidirectional else ("",)
    rows, fed_back = GATES[mode] * hidden_size, proj_size or hidden_size
    names, shapes = [], []
    for k in range(num_layers):
        width = fed_back * len(suffixes) if k else input_size
        each = [(rows, width), (rows, fed_back), (rows,), (rows,), (proj_size, hidden_size)]
        has = (True, True, bias, bias, proj_size > 0)
        for suffix in suffixes:
            names += [f"{name}_l{k}{suffix}" for name, here in zip(NAMES, has, strict=True) if here]
            shapes += [torch.Size(shape) for shape, here in zip(each, has, strict=True) if here]
    return names, shapes
