"""What the operators are given, checked: a layer has done so before, but they can be called without one.

N batch, H hidden, P the state that is fed back, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._cells import expected_weights
from .._lengths import check_range


def check_arguments(
    x: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    initial: Sequence[Tensor],  # each (D, N, P or H)
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_first: bool,
) -> None:
    """Refuse shapes that don't fit each other: the loops would read memory that is not theirs."""
    batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    _check_count("initial states", initial, 2 if mode == "LSTM" else 1)
    each, hidden = len(weights) // directions, initial[-1].size(-1)
    proj = initial[0].size(-1) if mode == "LSTM" and each % 2 else 0
    for h, width in zip(initial, (proj or hidden, hidden), strict=False):
        _check_shape("an initial state", h, (directions, batch, width))
    names, shapes = expected_weights(mode, x.size(-1), hidden, 1, each > 3, directions == 2, proj)
    _check_count("weights", weights, len(names))
    for weight, name, shape in zip(weights, names, shapes, strict=True):
        _check_shape(name, weight, shape)
    if lengths is not None:
        _check_shape("lengths", lengths, (batch,))
        if lengths.is_cpu:
            check_range(lengths, steps, f"batch_first={batch_first}")
    if resets is not None:
        _check_shape("resets", resets, (steps, batch))


def check_saved(
    x: Tensor, initial: Sequence[Tensor], saved: Tensor, size: int, grads: Sequence[Tensor], directions: int
) -> None:
    """The same of what the gradient is given more."""
    _check_shape("reserve", saved, (size,))
    _check_count("gradients", grads, 1 + len(initial))
    _check_shape("the output's gradient", grads[0], (*x.shape[:2], directions * initial[0].size(-1)))
    for h, grad in zip(initial, grads[1:], strict=True):
        _check_shape("a last state's gradient", grad, h.shape)


def _check_count(name: str, tensors: Sequence[Tensor], expected: int) -> None:
    if len(tensors) != expected:
        raise RuntimeError(f"Expected {expected} {name}, got {len(tensors)}.")


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"Expected {name} of size {list(shape)}, got {list(tensor.shape)}.")
