"""What a layer is: its cell, its sizes, and the names, shapes and order of its weights. Made once for a configuration.

I input, H hidden, P the state that is fed back (H, or proj_size), D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

GATES = {"GRU": 3, "LSTM": 4, "RNN_TANH": 1, "RNN_RELU": 1}
"""The number of gates, by `nn.RNNBase.mode`. A weight has H rows for each."""
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
"""The names of the parameters, without the suffix `_l0`, `_l0_reverse`, ..."""
Shape = tuple[int, ...]
"""A plain tuple, because Dynamo in torch 2.6 can't make a `torch.Size`."""
States = tuple[Tensor, ...]
"""(h,) or (h, c)"""


class Weights(NamedTuple):
    """One direction of one layer, as `torch.nn` names and shapes them."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


LayerWeights = tuple[Weights, ...]
"""One for each direction."""


class Configured(Protocol):
    """The attributes of `torch.nn`'s layers that a spec holds."""

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    bidirectional: bool
    proj_size: int


class Spec:
    """The configuration of a stack of layers, and what follows from it. It does not change.

    Dynamo follows this class, except the cached properties.
    """

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> None:
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.bidirectional = bool(bidirectional)  # PyTorch's kernels take no number in its place
        self.proj_size = proj_size
        self.gates = GATES[mode]
        self.directions = 2 if bidirectional else 1
        self.fed_back = proj_size or hidden_size
        self.output_width = self.directions * self.fed_back
        self.stacked = num_layers * self.directions
        """The number of states that are stacked in `nn.GRU`'s hx: L·D"""
        self.has_cell_state = mode == "LSTM"
        self.state_widths = (self.fed_back, hidden_size) if self.has_cell_state else (self.fed_back,)
        """The width of each state: (P,), for the LSTM (P, H)"""

    def changed(self, **changes: Any) -> Spec:
        sizes = {name: getattr(self, name) for name in FIELDS}
        return make_spec(*{**sizes, **changes}.values())

    def layer(self, k: int) -> Spec:
        """Return the spec of one layer of the stack."""
        if self.num_layers == 1:
            return self
        return self.changed(input_size=self.output_width if k else self.input_size, num_layers=1)

    def expected_weights(self) -> tuple[list[str], list[Shape]]:
        """Return the names and the shapes of the weights, in `torch.nn`'s order."""
        rows = self.gates * self.hidden_size
        has = (True, True, self.bias, self.bias, self.proj_size > 0)
        names, shapes = [], []
        for k in range(self.num_layers):
            width = self.output_width if k else self.input_size
            every: list[Shape] = [
                (rows, width),
                (rows, self.fed_back),
                (rows,),
                (rows,),
                (self.proj_size, self.hidden_size),
            ]
            for suffix in ("", "_reverse")[: self.directions]:
                names += [f"{name}_l{k}{suffix}" for name, here in zip(NAMES, has, strict=True) if here]
                shapes += [shape for shape, here in zip(every, has, strict=True) if here]
        return names, shapes

    @cached_property
    def names(self) -> list[str]:
        return self.expected_weights()[0]

    @cached_property
    def shapes(self) -> list[Shape]:
        return self.expected_weights()[1]

    def group(self, tensors: Sequence[Tensor]) -> list[LayerWeights]:
        """Return each layer's weights. `tensors` are in `torch.nn`'s order. Undo it with `flatten_weights`."""
        count = 2 + 2 * self.bias + (self.proj_size > 0)
        directions = []
        for start in range(0, len(tensors), count):
            w_ih, w_hh, *rest = tensors[start : start + count]
            b_ih, b_hh = rest[:2] if self.bias else (None, None)
            directions.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if self.proj_size > 0 else None))
        D = self.directions
        return [tuple(directions[k : k + D]) for k in range(0, len(directions), D)]


FIELDS = ("mode", "input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")
"""The arguments of `Spec`, in their order"""
_make_once: Callable[..., Spec] = lru_cache(maxsize=256)(Spec)


def make_spec(*configuration: Any) -> Spec:
    """Return the spec of these arguments: the same one each time, except while Dynamo compiles."""
    if torch.compiler.is_compiling():
        return Spec(*configuration)
    try:
        return _make_once(*configuration)
    except TypeError:  # a fake tensor's size may be a symbol, which has no hash
        return Spec(*configuration)


def spec_of(layer: Configured, compiling: bool = False) -> Spec:
    """Return a layer's spec. Dynamo, if it is `compiling`, can't follow a cache."""
    make = Spec if compiling else _make_once
    return make(
        layer.mode,
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        layer.bias,
        layer.bidirectional,
        layer.proj_size,
    )


def flatten_weights(layers: Iterable[LayerWeights]) -> list[Tensor]:
    """Return the weights as one list, in `torch.nn`'s order."""
    return [t for layer in layers for w in layer for t in w if t is not None]
