"""Runs a stack of layers in the native loops where they can run it, and in those of PyTorch's ops elsewhere.

The native loops are compiled from C++ when the package is installed. Both kinds have the same arguments and results,
and save the same numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._cells import States, flatten_weights, group_weights
from ..._memory import NotPlainError, addresses, contiguous, new_like, new_tensor, with_memory
from ..._plan import Plan
from ..._spec import Spec
from ..._torch import below_autograd, is_recorded
from . import library, ops_layer, threads
from .job import Job, dropped_states, first_states, flatten, saved_views, unflatten
from .ops_cells import CELLS
from .ops_states import Saved
from .record import Run

CELL_NUMBERS = {mode: number for number, mode in enumerate(CELLS)}
Gradients = tuple[Tensor | None, States, list[Tensor] | None]
"""Those of x, of the given initial states and of the weights. None: not wanted."""


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
            return run_forward(job, x, first, weights, save, into)
        except NotPlainError:
            pass  # perhaps only the strides are unusual
        with suppress(NotPlainError):
            return run_forward(job, *_contiguous(x, first, weights), save, into)
        # The loops of PyTorch's ops take other tensors, or refuse them.
    return _forward_in_ops(job, *_with_memory(x, first, weights), save, into)


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
            return run_backward(job, x, first, weights, saved, grads, want_x, want_weights)
        except NotPlainError:
            pass
        with suppress(NotPlainError):
            given = _contiguous(x, first, weights)
            return run_backward(job, *given, contiguous(saved), grads, want_x, want_weights)
    grads = [None if d is None else with_memory(d) for d in grads]
    given = _with_memory(x, first, weights)
    return _backward_in_ops(job, *given, with_memory(saved), grads, want_x, want_weights)


def run_forward(
    job: Job,
    x: Tensor,
    first: Sequence[Tensor],
    weights: Sequence[Tensor],
    save: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, States, Tensor | None]:
    """As `forward`, in the native loops."""
    record, _alive = _record(job, x, weights)
    if save and into is None:
        into, record.saved, record.saved_size = new_tensor(x, (job.saved_size(),))
    elif into is not None:
        record.saved, record.saved_size = addresses((into,), x.dtype)
    output, record.output, record.output_size = new_tensor(x, job.output_shape(x))
    widths = job.spec.state_widths
    h, record.h_last, record.h_last_size = new_tensor(x, job.last_shape(widths[0]))
    last: States = (h,)
    if len(widths) == 2:
        c, record.c_last, record.c_last_size = new_tensor(x, job.last_shape(widths[1]))
        last = (h, c)
    if first:
        record.h_first, record.h_first_size, *of_c = addresses(first, x.dtype)
        if of_c:
            record.c_first, record.c_first_size = of_c
    library.call("forward", record)
    return output, last, into


def run_backward(
    job: Job,
    x: Tensor,
    first: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Tensor,
    grads: Sequence[Tensor | None],
    want_x: bool,
    want_weights: bool,
) -> Gradients:
    """As `backward`, in the native loops."""
    record, _alive = _record(job, x, weights)
    record.saved, record.saved_size = addresses((saved,), x.dtype)
    d_output, dh_last, *d_rest = grads
    if d_output is not None:
        record.d_output, record.d_output_size = addresses((d_output,), x.dtype)
    if dh_last is not None:
        record.dh_last, record.dh_last_size = addresses((dh_last,), x.dtype)
    if d_rest and d_rest[0] is not None:
        record.dc_last, record.dc_last_size = addresses((d_rest[0],), x.dtype)
    d_first: States = ()
    if first:
        addresses(first, x.dtype)
        dh, record.dh_first, record.dh_first_size = new_like(first[0])
        d_first = (dh,)
        if len(first) == 2:
            dc, record.dc_first, record.dc_first_size = new_like(first[1])
            d_first = (dh, dc)
    dx = d_weights = None
    if want_x:
        dx, record.dx, record.dx_size = new_like(x)
    if want_weights:
        made = [new_like(w) for w in weights]
        d_weights = [w for w, _, _ in made]
        table = array("q", [number for _, place, size in made for number in (place, size)])
        record.gradients, record.gradients_size = table.buffer_info()[0], len(d_weights)
    library.call("backward", record)
    return dx, d_first, d_weights


@lru_cache(maxsize=256)
def _template(spec: Spec, item_bytes: int) -> Run:
    """Return a record with the numbers that are the same in each call of a layer."""
    return Run(
        cell=CELL_NUMBERS[spec.mode],
        item_bytes=item_bytes,
        layers=spec.num_layers,
        directions=spec.directions,
        inputs=spec.input_size,
        hidden=spec.hidden_size,
        fed_back=spec.fed_back,
        has_biases=spec.bias,
        projects=spec.proj_size > 0,
    )


def _record(job: Job, x: Tensor, weights: Sequence[Tensor]) -> tuple[Run, Any]:
    """Return the part of a record that both passes have, and an object that must live as long as its addresses."""
    record = Run.from_buffer_copy(_template(job.spec, x.dtype.itemsize))
    record.batch, record.steps, record.batch_first = job.batch, job.steps, job.batch_first
    record.sequences, record.rows, record.padded_rows = job.sequences, job.rows, job.padded_rows
    record.input_is_padded, record.output_is_padded = job.input_is_padded, job.output_is_padded
    record.first_is_flat, record.last_is_flat = job.first_is_flat, job.last_is_flat
    record.threads, record.parallel = threads.count_and_start()
    record.x, record.x_size = addresses((x,), x.dtype)
    table = array("q", addresses(weights, x.dtype))
    record.weights, record.weights_size = table.buffer_info()[0], len(weights)
    if job.lengths is not None:
        record.lengths, record.lengths_size = job.lengths.buffer_info()
    if job.dropped is not None:
        record.dropped, record.dropped_size = job.dropped.buffer_info()
    if job.given_plan is not None:
        _set_tables(record, job.given_plan)
    return record, table


def _set_tables(record: Run, plan: Plan) -> None:
    sizes, starts = plan.step_tables
    record.steps = len(plan.batch_sizes)
    record.sizes, record.sizes_size = sizes.buffer_info()
    record.starts, record.starts_size = starts.buffer_info()
    if plan.index is not None:
        record.index, record.index_size = addresses((plan.index,), torch.int64)
    else:  # all rows run, in order
        record.input_is_padded = record.output_is_padded = False
    if plan.order is not None:
        record.order, record.order_size = addresses((plan.order,), torch.int64)


def _contiguous(
    x: Tensor, first: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return contiguous(x), list(map(contiguous, first)), list(map(contiguous, weights))


def _with_memory(
    x: Tensor, first: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return with_memory(x), list(map(with_memory, first)), list(map(with_memory, weights))


@below_autograd
def _forward_in_ops(
    job: Job, x: Tensor, first: Sequence[Tensor], weights: Sequence[Tensor], save: bool, into: Tensor | None
) -> tuple[Tensor, States, Tensor | None]:
    spec, D = job.spec, job.spec.directions
    if save and into is None:
        into = x.new_empty(job.saved_size())
    views = saved_views(job, into) if save and into is not None else [(None, None)] * spec.num_layers
    initial = first_states(job, first, x)
    rows, lasts = x.reshape(-1, x.size(-1)), []
    for k, own in enumerate(group_weights(weights, spec.num_layers, D)):
        saved, kept = views[k]
        states = tuple([h[k * D : (k + 1) * D] for h in initial])
        rows, last = ops_layer.forward(job.layer_run(k), rows, states, own, saved)
        if kept is not None:
            kept.copy_(rows)
        lasts.append(last)
    joined = tuple([torch.cat(states) for states in zip(*lasts, strict=True)])
    return rows.view(job.output_shape(x)), tuple(map(flatten, joined)) if job.last_is_flat else joined, into


@below_autograd
def _backward_in_ops(
    job: Job,
    x: Tensor,
    first: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Tensor,
    grads: Sequence[Tensor | None],
    want_x: bool,
    want_weights: bool,
) -> Gradients:
    spec, D = job.spec, job.spec.directions
    views, initial = saved_views(job, saved), first_states(job, first, x)
    d_output, *d_last = grads
    if job.last_is_flat:
        d_last = [None if d is None else unflatten(job, d) for d in d_last]
    d_rows = None if d_output is None else d_output.reshape(-1, d_output.size(-1))
    d_first: list[States] = []
    d_weights: list[Tensor] = []
    for k, own in reversed(list(enumerate(group_weights(weights, spec.num_layers, D)))):
        part = slice(k * D, (k + 1) * D)
        rows = x.reshape(-1, x.size(-1)) if k == 0 else _output_of(job, *views[k - 1])
        d_rows, d_initial, d_own = ops_layer.backward(
            job.layer_run(k),
            rows,
            tuple([h[part] for h in initial]),
            own,
            views[k][0],
            [d_rows, *(None if d is None else d[part] for d in d_last)],
            want_x or k > 0,
            want_weights,
        )
        d_first.insert(0, d_initial)
        d_weights = [*([] if d_own is None else flatten_weights([d_own])), *d_weights]
    dx = None if d_rows is None or not want_x else d_rows.view(x.shape)
    return dx, _first_gradients(job, d_first) if first else (), d_weights if want_weights else None


def _output_of(job: Job, saved: Saved, kept: Tensor | None) -> Tensor:
    """Return the output (R, D·P) of a layer below the top."""
    return saved.history[0].narrow(0, job.sequences, job.rows) if kept is None else kept


def _first_gradients(job: Job, d_first: Sequence[States]) -> States:
    """Return the gradients of the initial states as they were given."""
    joined = [torch.cat(states) for states in zip(*d_first, strict=True)]
    anew = dropped_states(job)
    if anew is not None:
        joined = [torch.where(anew, torch.zeros_like(d), d) for d in joined]
    return tuple(map(flatten, joined)) if job.first_is_flat else tuple(joined)
