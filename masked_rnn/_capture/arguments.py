"""Checks the operators' arguments and makes a call of them. Anybody can call an operator, with unchecked arguments.

T time, N batch, I input, H hidden, P the state that is fed back, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .._call import Call
from .._call.context import PLAIN
from .._call.inputs import Padded
from .._call.lengths import assert_range, check_range
from .._cells import BackendName
from .._spec import expected_weights


@dataclass(eq=False, repr=False)
class OneLayer:
    """The configuration of one layer of a stack."""

    mode: str
    input_size: int
    hidden_size: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    proj_size: int
    num_layers: int = 1
    dropout: float = 0.0
    training: bool = False
    enforce_sorted: bool = False
    flatten_hidden: bool = False
    backend: BackendName = "auto"


class Arguments(NamedTuple):
    """The arguments that both operators have."""

    x: Tensor
    """(N, T, I) or (T, N, I)"""
    lengths: Tensor | None
    """(N,)"""
    resets: Tensor | None
    """(T, N)"""
    initial: Sequence[Tensor]
    """Each (D, N, P or H)"""
    weights: Sequence[Tensor]
    """In `torch.nn`'s order"""
    mode: str
    batch_first: bool
    backend: BackendName
    """"auto", or "bptt" if the layer was told to run it"""

    @property
    def directions(self) -> int:
        return self.initial[0].size(0)

    def layer(self) -> OneLayer:
        each = len(self.weights) // max(self.directions, 1)
        projects = self.mode == "LSTM" and each % 2 == 1
        return OneLayer(
            mode=self.mode,
            input_size=self.x.size(-1),
            hidden_size=self.initial[-1].size(-1),
            bias=each > 3,
            batch_first=self.batch_first,
            bidirectional=self.directions == 2,
            proj_size=self.initial[0].size(-1) if projects else 0,
            backend=self.backend,
        )

    def open(self) -> Call:
        """Check the arguments, and return a call of this one layer.

        As in an eager call, lengths that are all T become None if they are on the CPU, and so do resets without a True.
        """
        if self.backend not in ("auto", "bptt"):
            raise RuntimeError(f"Expected backend 'auto' or 'bptt', got {self.backend!r}.")
        _check_count("initial states", self.initial, 2 if self.mode == "LSTM" else 1)
        layer, (batch, steps) = self.layer(), self.x.shape[:2]
        if not self.batch_first:
            batch, steps = steps, batch
        self._check_shapes(layer, batch, steps)
        lengths, resets = self.lengths, self.resets
        layout = f"batch_first={self.batch_first}"
        if lengths is not None and lengths.is_cpu:
            lengths = None if check_range(lengths, steps, layout) and self.x.is_cpu else lengths
        elif lengths is not None and not assert_range(lengths, steps, layout):
            check_range(lengths, steps, layout)
        if resets is not None and resets.is_cpu and not bool(resets.any()):
            resets = None
        return Call(
            layer=layer,
            context=PLAIN,
            form=Padded(self.x, batch, steps, self.batch_first),
            parameters=list(self.weights),
            data=self.x,
            lengths=lengths,
            mask=None,
            resets=resets,
            real=lengths,
            initial=tuple(self.initial),
        )

    def _check_shapes(self, layer: OneLayer, batch: int, steps: int) -> None:
        """Refuse shapes that don't fit each other, because the loops would read beyond a tensor's memory."""
        D, proj = self.directions, layer.proj_size
        if D not in (1, 2):
            raise RuntimeError(f"Expected initial states of 1 or 2 directions, got {D}.")
        for h, width in zip(self.initial, (proj or layer.hidden_size, layer.hidden_size), strict=False):
            _check_shape("an initial state", h, (D, batch, width))
        names, shapes = expected_weights(
            self.mode, layer.input_size, layer.hidden_size, 1, layer.bias, layer.bidirectional, proj
        )
        _check_count("weights", self.weights, len(names))
        for weight, name, shape in zip(self.weights, names, shapes, strict=True):
            _check_shape(name, weight, shape)
        if self.lengths is not None:
            _check_shape("lengths", self.lengths, (batch,))
        if self.resets is not None:
            _check_shape("resets", self.resets, (steps, batch))

    def check_saved(self, saved: Tensor, size: int, grads: Sequence[Tensor]) -> None:
        """Refuse `saved` if it is not of shape (size,), and gradients that do not have the results' shapes."""
        _check_shape("saved", saved, (size,))
        _check_count("gradients", grads, 1 + len(self.initial))
        width = self.directions * self.initial[0].size(-1)
        _check_shape("the output's gradient", grads[0], (*self.x.shape[:2], width))
        for h, grad in zip(self.initial, grads[1:], strict=True):
            _check_shape("a last state's gradient", grad, h.shape)


def _check_count(name: str, tensors: Sequence[Tensor], expected: int) -> None:
    if len(tensors) != expected:
        raise RuntimeError(f"Expected {expected} {name}, got {len(tensors)}.")


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"Expected {name} of size {list(shape)}, got {list(tensor.shape)}.")
