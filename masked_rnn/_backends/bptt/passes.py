"""The two passes of a job: in the native loops where they can run it, in those of PyTorch's ops elsewhere.

Both have the same arguments and results, and save the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from ..._memory import NotPlainError, contiguous, with_memory
from ..._spec import States
from ..._torch import is_recorded
from . import library, native, ops
from .job import Gradients, Job

Given = tuple[Tensor, list[Tensor], list[Tensor]]
"""x, the initial states, the weights"""


def forward(
    job: Job,
    x: Tensor,  # (N, T, I), (T, N, I) or (R, I)
    first: Sequence[Tensor],  # initial states in the job's layout; none: zeros
    weights: Sequence[Tensor],
    save: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, States, Tensor | None]:
    """Return the output, the last states in the job's layout, and what is saved, which is `into` or new."""
    if library.runs(x.dtype) and job.rows and not is_recorded():
        try:
            return native.forward(job, x, first, weights, save, into)
        except NotPlainError:
            pass  # perhaps only the strides are unusual
        with suppress(NotPlainError):
            return native.forward(job, *_contiguous(x, first, weights), save, into)
        # The loops of PyTorch's ops take other tensors, or refuse them.
    return ops.forward(job, *_with_memory(x, first, weights), save, into)


def backward(
    job: Job,
    x: Tensor,
    first: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Tensor,
    grads: Sequence[Tensor | None],  # of the output, then of each last state
    want_x: bool,
    want_weights: bool,
) -> Gradients:
    if library.runs(x.dtype) and job.rows and not is_recorded():
        # The gradient of a sum is expanded.
        grads = [d if d is None or d.is_contiguous() else contiguous(d) for d in grads]
        try:
            return native.backward(job, x, first, weights, saved, grads, want_x, want_weights)
        except NotPlainError:
            pass
        with suppress(NotPlainError):
            given = _contiguous(x, first, weights)
            return native.backward(job, *given, contiguous(saved), grads, want_x, want_weights)
    grads = [None if d is None else with_memory(d) for d in grads]
    given = _with_memory(x, first, weights)
    return ops.backward(job, *given, with_memory(saved), grads, want_x, want_weights)


def _contiguous(x: Tensor, first: Sequence[Tensor], weights: Sequence[Tensor]) -> Given:
    return contiguous(x), list(map(contiguous, first)), list(map(contiguous, weights))


def _with_memory(x: Tensor, first: Sequence[Tensor], weights: Sequence[Tensor]) -> Given:
    return with_memory(x), list(map(with_memory, first)), list(map(with_memory, weights))
