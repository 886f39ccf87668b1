"""Checks the operators' arguments and makes a call of them. Anybody can call an operator, with unchecked arguments.

T time, N batch, I input, H hidden, P the state that is fed back, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .._call import Call
from .._call.context import PLAIN
from .._call.inputs import Padded
from .._call.lengths import assert_range, check_range
from .._cells import BackendName
from .._spec import Spec, make_spec


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

    def spec(self) -> Spec:
        """Return the configuration of this one layer, as the shapes and the number of tensors imply it."""
        directions = self.initial[0].size(0)
        count = len(self.weights) // max(directions, 1)  # 2, with biases 4; with a projection one more
        proj_size = self.initial[0].size(-1) if self.mode == "LSTM" and count in (3, 5) else 0
        hidden_size = self.initial[-1].size(-1)
        return make_spec(self.mode, self.x.size(-1), hidden_size, 1, count >= 4, directions == 2, proj_size)

    def open(self) -> Call:
        """Check the arguments, and return a call of this one layer.

        As in an eager call, lengths that are all T become None if they are on the CPU, and so do resets without a True.
        """
        if self.backend not in ("auto", "bptt"):
            raise RuntimeError(f"Expected backend 'auto' or 'bptt', got {self.backend!r}.")
        _check_count("initial states", self.initial, 2 if self.mode == "LSTM" else 1)
        spec, (batch, steps) = self.spec(), self.x.shape[:2]
        if not self.batch_first:
            batch, steps = steps, batch
        self._check_shapes(spec, batch, steps)
        lengths, resets = self.lengths, self.resets
        layout = f"batch_first={self.batch_first}"
        if lengths is not None and lengths.is_cpu:
            lengths = None if check_range(lengths, steps, layout) and self.x.is_cpu else lengths
        elif lengths is not None and not assert_range(lengths, steps, layout):
            check_range(lengths, steps, layout)
        if resets is not None and resets.is_cpu and not bool(resets.any()):
            resets = None
        return Call(
            spec=spec,
            backend=self.backend,
            dropout=0.0,
            is_sorted=False,
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

    def _check_shapes(self, spec: Spec, batch: int, steps: int) -> None:
        """Refuse shapes that don't fit each other, because the loops would read beyond a tensor's memory."""
        if self.initial[0].size(0) not in (1, 2):
            raise RuntimeError(f"Expected initial states of 1 or 2 directions, got {self.initial[0].size(0)}.")
        for h, width in zip(self.initial, spec.state_widths, strict=True):
            _check_shape("an initial state", h, (spec.directions, batch, width))
        _check_count("weights", self.weights, len(spec.names))
        for weight, name, shape in zip(self.weights, spec.names, spec.shapes, strict=True):
            _check_shape(name, weight, shape)
        if self.lengths is not None:
            _check_shape("lengths", self.lengths, (batch,))
        if self.resets is not None:
            _check_shape("resets", self.resets, (steps, batch))

    def check_saved(self, saved: Tensor, size: int, grads: Sequence[Tensor]) -> None:
        """Refuse `saved` if it is not of shape (size,), and gradients that do not have the results' shapes."""
        _check_shape("saved", saved, (size,))
        _check_count("gradients", grads, 1 + len(self.initial))
        _check_shape("the output's gradient", grads[0], (*self.x.shape[:2], self.spec().output_width))
        for h, grad in zip(self.initial, grads[1:], strict=True):
            _check_shape("a last state's gradient", grad, h.shape)


def _check_count(name: str, tensors: Sequence[Tensor], expected: int) -> None:
    if len(tensors) != expected:
        raise RuntimeError(f"Expected {expected} {name}, got {len(tensors)}.")


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"Expected {name} of size {list(shape)}, got {list(tensor.shape)}.")
