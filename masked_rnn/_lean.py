"""The lean way in: runs an ordinary call without opening it, which for few steps would take longer than the loops.

It knows what makes a call ordinary, and asks `measured.py` which way is faster. Any other call, and so every error, is
left to `open_call` and the choice of a backend, which give an ordinary call the same results.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ._backends.bptt import library
from ._backends.bptt.autograd import run_job
from ._backends.bptt.job import Job
from ._backends.kernels import call_kernel
from ._backends.measured import kernel_beats_native
from ._call.context import PLAIN, find_context, records_gradients
from ._call.states import close_states
from ._cells import SHAPE_OF, Layer
from ._memory import NotPlainError, addresses
from ._spec import Shape, Spec, States, spec_of
from ._torch import is_autocast_on, listed_weights

LEAN_BACKENDS = ("auto", "bptt")
INT64, BOOL = torch.int64, torch.bool


def run_lean(layer: Layer, input: Any, hx: Any, lengths: Any, resets: Any) -> tuple[Any, Any] | None:
    """Return a call's results if it is ordinary.

    That is: a padded batch of plain tensors on the CPU, of a dtype that the native loops run; no dropout; nothing is
    traced, transformed, compiled or cast.
    """
    if type(input) is not Tensor or input.is_nested or input.dim() != 3 or not input.is_cpu:
        return None
    weights = listed_weights(layer)
    if weights is None or layer.backend not in LEAN_BACKENDS or find_context() is not PLAIN or is_autocast_on("cpu"):
        return None
    spec, dtype, computes_in = spec_of(layer), input.dtype, library.WIDER.get(input.dtype, input.dtype)
    batch, steps, width = input.shape
    if not layer.batch_first:
        batch, steps = steps, batch
    if (
        width != spec.input_size
        or not batch * steps
        or not library.runs(computes_in)
        or not _are_ordinary(weights, spec, dtype)
        or (layer.dropout and layer.training and spec.num_layers > 1)
    ):
        return None
    given = _first_states(spec, batch, hx, dtype)
    if given is None:
        return None
    first_is_flat, first = given
    try:
        job = _job(layer, spec, batch, steps, lengths)
        if job is None:
            return None
        records = records_gradients(weights, (input,), first)
        if job.lengths is None and kernel_beats_native(spec, dtype, steps, batch, records):
            is_rnn = not spec.has_cell_state and resets is None
            return _run_kernel(layer, spec, input, batch, given, weights) if is_rnn else None
        if resets is not None and not _drop_states(job, input, resets, first):
            return None
        job.first_is_flat, job.last_is_flat = first_is_flat, layer.flatten_hidden
        if computes_in is not dtype:
            output, last = _run_in_float32(job, input, first, weights, records)
        else:
            output, last = run_job(job, input, first, weights, records)
    except NotPlainError:
        return None
    return output, last[0] if len(last) == 1 else last


FACTS = attrgetter("shape", "dtype", "is_cpu")


@lru_cache(maxsize=256)
def _ordinary_facts(spec: Spec, dtype: torch.dtype) -> list[tuple[Shape, torch.dtype, bool]]:
    return [(shape, dtype, True) for shape in spec.shapes]


def _are_ordinary(weights: list[Tensor], spec: Spec, dtype: torch.dtype) -> bool:
    try:
        return list(map(FACTS, weights)) == _ordinary_facts(spec, dtype)
    except AttributeError:  # something that is no tensor stands in a parameter's place
        return False


def _run_kernel(
    layer: Layer, spec: Spec, input: Tensor, batch: int, given: tuple[bool, States], weights: list[Tensor]
) -> tuple[Tensor, Any]:
    is_flat, first = given
    if not first:
        first = (input.new_zeros(spec.stacked, batch, spec.fed_back),)
    elif is_flat:
        first = (first[0].view(batch, spec.stacked, -1).transpose(0, 1),)
    output, last = call_kernel(spec, input, first, weights, None, layer.batch_first)
    return output, close_states(layer.flatten_hidden, last, False)


def _run_in_float32(
    job: Job, input: Tensor, first: States, weights: list[Tensor], records: bool
) -> tuple[Tensor, States]:
    output, last = run_job(job, input.float(), [h.float() for h in first], [w.float() for w in weights], records)
    return output.to(input.dtype), tuple([h.to(input.dtype) for h in last])


def _job(layer: Layer, spec: Spec, batch: int, steps: int, lengths: Any) -> Job | None:
    """Return how the call runs. None: its lengths are unusual, or wrong."""
    if lengths is None:
        return Job(spec, batch, steps, layer.batch_first)
    if type(lengths) in (list, tuple):
        if set(map(type, lengths)) != {int}:
            return None
        try:
            numbers = array("q", lengths)
        except OverflowError:
            return None
    elif type(lengths) is Tensor and lengths.dim() == 1:
        place, count = addresses((lengths,), INT64)
        numbers = array("q", ctypes.string_at(place, 8 * count))  # a copy, because the caller may change the original
    else:
        return None
    if len(numbers) != batch:
        return None
    counts = library.count(numbers.buffer_info()[0], batch, steps)
    if counts.fault >= 0 or not counts.rows or (layer.enforce_sorted and counts.unsorted >= 0):
        return None
    if counts.rows == batch * steps:
        return Job(spec, batch, steps, layer.batch_first)
    return Job(spec, batch, steps, layer.batch_first, numbers, counts[:2])


def _first_states(spec: Spec, batch: int, hx: Any, dtype: torch.dtype) -> tuple[bool, States] | None:
    """Return the given initial states, () for zeros, and whether they are flat. None: they are unusual, or wrong."""
    if hx is None:
        return False, ()
    states = hx if spec.has_cell_state else (hx,)
    if type(states) not in (tuple, list) or len(states) != len(spec.state_widths):
        return None
    for h in states:
        if type(h) is not Tensor or h.dtype is not dtype:
            return None
    shapes = list(map(SHAPE_OF, states))
    for is_flat in (True, False):
        if shapes == [(batch, spec.stacked * w) if is_flat else (spec.stacked, batch, w) for w in spec.state_widths]:
            return is_flat, tuple(states)
    return None


def _drop_states(job: Job, input: Tensor, resets: Any, first: States) -> bool:
    """Note the states that one step's resets drop. Return False if they are unusual, wrong, or of more steps."""
    if job.steps != 1 or type(resets) is not Tensor or resets.shape != input.shape[:2]:
        return False
    place, count = addresses((resets,), BOOL)
    if first:
        job.dropped = array("b", ctypes.string_at(place, count))
    return True
