"""The passes of a job in the native loops: fills the record that the library takes, and calls it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._memory import addresses, new_like, new_tensor
from ..._plan import Plan
from ..._spec import Spec, States
from . import library, threads
from .job import Gradients, Job
from .ops_cells import CELLS
from .record import Run

CELL_NUMBERS = {mode: number for number, mode in enumerate(CELLS)}


def forward(
    job: Job,
    x: Tensor,
    first: Sequence[Tensor],
    weights: Sequence[Tensor],
    save: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, States, Tensor | None]:
    """As `passes.forward`. Raises NotPlainError for tensors that the library can't read."""
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


def backward(
    job: Job,
    x: Tensor,
    first: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Tensor,
    grads: Sequence[Tensor | None],
    want_x: bool,
    want_weights: bool,
) -> Gradients:
    """As `passes.backward`. Raises NotPlainError for tensors that the library can't read."""
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
