"""Forward and backward through time in PyTorch's ops, without autograd: one layer, both directions as a batch of two.

Rows run packed (see `Plan`). The second direction runs over sequences reversed within their own length. Both loops run
in chunks of steps that stay in the cache: a chunk's input product comes just before its steps, its share of the
weights' gradients just after. docs/bptt.md has the equations.

M input rows with padding, R rows that run, B sequences that have one, N all, I input, H hidden, P the state that is fed
back, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._plan import Chunk, Plan
from ..._spec import LayerWeights, States
from ..._torch import below_autograd
from .job import Job, Saved
from .ops_cells import CELLS, AddProduct, Cell
from .ops_products import InputProduct, WeightGradients, recurrent_product
from .ops_states import final_states, initial_gradient, output_is_history, packed_states, rows_at, shape_of_both

CHUNK_BYTES = 2 << 20
"""The size of a chunk's activations, for each direction. About what stays in a core's caches."""


def _chunks(job: Job, cell: Cell, itemsize: int) -> list[Chunk]:
    return job.plan.chunks(max(1, CHUNK_BYTES // (cell.width * cell.hidden * itemsize)))


@below_autograd
def forward(
    job: Job,
    x: Tensor,  # (M, I) or (R, I)
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
    saved: Saved | None,
) -> tuple[Tensor, States]:
    """Return the output (M, D·P) or (R, D·P), and the last states (D, N, P or H).

    Fill `saved` with what backward needs.
    """
    plan, cell, axis = job.plan, CELLS[job.spec.mode](job.spec, weights), int(job.spec.bidirectional)
    chunks = _chunks(job, cell, x.element_size())
    if saved is None:
        history = tuple([x.new_empty(shape_of_both(job, plan.sequences + plan.rows, h.size(-1))) for h in initial])
        buffer = None
    else:
        history, buffer = saved
    if buffer is None:
        most = max((chunk.rows for chunk in chunks), default=0)
        shared = x.new_empty(shape_of_both(job, most, cell.width * cell.hidden))
    for states, first in zip(history, initial, strict=True):
        states.narrow(-2, 0, plan.sequences).copy_(packed_states(job, first))

    add_ = recurrent_product(cell.join(*(cell.order_gates(w.w_hh) for w in weights)).mT)
    products = [InputProduct(cell, w) for w in weights]
    rows_in = rows_at(job, job.input_is_padded)
    states_at = [torch.split_with_sizes(h, [plan.sequences, *plan.batch_sizes], axis) for h in history]
    for chunk in chunks:
        rows = shared.narrow(-2, 0, chunk.rows) if buffer is None else buffer.narrow(-2, chunk.start, chunk.rows)
        for direction, product in enumerate(products):
            product(_rows(x, rows_in[direction], chunk), rows[direction] if job.spec.bidirectional else rows)
        parts = [torch.split_with_sizes(part, chunk.sizes, axis) for part in cell.parts(rows)]
        stop = chunk.first + len(chunk.sizes)
        before = [_first_rows(views[chunk.first : stop], chunk) for views in states_at]
        cell.run_(parts, before, [views[chunk.first + 1 : stop + 1] for views in states_at], add_)

    output = _place_output(job, history[0].narrow(-2, plan.sequences, plan.rows))
    if saved is not None and output_is_history(job):
        output = output.clone()  # the caller may change it in place; the history must not change
    return output, tuple(final_states(job, h, first) for h, first in zip(history, initial, strict=True))


@below_autograd
def backward(
    job: Job,
    x: Tensor,  # (M, I) or (R, I)
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
    saved: Saved,
    grads: Sequence[Tensor | None],  # of the output (M, D·P) or (R, D·P), and of the last states (D, N, P or H)
    want_x: bool,
    want_weights: bool,
) -> tuple[Tensor | None, States, LayerWeights | None]:
    """Return the gradients of x, of the initial states and of the weights."""
    d_output, *d_last = grads
    plan, cell, (history, buffer) = job.plan, CELLS[job.spec.mode](job.spec, weights), saved
    chunks = _chunks(job, cell, x.element_size())
    add_ = recurrent_product(cell.join(*(w.w_hh for w in weights)))
    rows_in = rows_at(job, job.input_is_padded)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if want_x else None
    dw = WeightGradients(cell, weights) if want_weights else None
    ends = [None if d is None else packed_states(job, d) for d in d_last]
    incoming = Incoming(d_output, rows_at(job, job.output_is_padded), ends)
    carried: list[Tensor] = []
    most = max((chunk.rows for chunk in chunks), default=0)
    scratch = x.new_empty(shape_of_both(job, most, job.spec.gates * cell.hidden))
    gradients = [x.new_empty(shape_of_both(job, plan.sequences + most, h.size(-1))) for h in history]

    for chunk in reversed(chunks):
        before = tuple(_before(plan, h, chunk) for h in history)
        after = tuple(h.narrow(-2, plan.sequences + chunk.start, chunk.rows) for h in history)
        activations = after[0] if buffer is None else buffer.narrow(-2, chunk.start, chunk.rows)
        derivatives = cell.local_derivatives(activations, before, after, scratch.narrow(-2, 0, chunk.rows))

        # The gradients of the states: those of the step before the chunk first, then those of its rows.
        d_states = [states.narrow(-2, 0, chunk.before + chunk.rows) for states in gradients]
        d_rows = [d.narrow(-2, chunk.before, chunk.rows) for d in d_states]
        _read_incoming(job, incoming, chunk, d_states, d_rows)
        for d, carry in zip(d_rows, carried, strict=False):
            d.narrow(-2, chunk.rows - carry.size(-2), carry.size(-2)).add_(carry)

        _run_back(job, chunk, cell, cell.back_parts(derivatives, activations, d_rows), d_states, add_)
        carried = [d.narrow(-2, 0, chunk.before).clone() for d in d_states]

        if dw is not None:
            dw.add_recurrent(derivatives, before[0], d_rows[0])
        cell.input_gradient_(derivatives, d_rows)
        for direction, d in enumerate(derivatives[0] if job.spec.bidirectional else [derivatives[0]]):
            if dx is not None:
                _add_input_gradient(dx, rows_in[direction], chunk, d, weights[direction].w_ih)
            if dw is not None:
                dw.add_input(direction, d, _rows(x, rows_in[direction], chunk))

    d_initial = [
        initial_gradient(job, carried[s] if carried else None, d_last[s], first) for s, first in enumerate(initial)
    ]
    return dx, tuple(d_initial), None if dw is None else dw.result()


class Incoming(NamedTuple):
    """The gradients of a layer's output and last states."""

    d_output: Tensor | None
    """(M, D·P) or (R, D·P)"""
    rows: list[Tensor | None]
    """The index of each direction's rows in d_output. None: in order"""
    ends: list[Tensor | None]
    """The gradients of the last states, in the layout of `packed_states`"""


def _read_incoming(
    job: Job, incoming: Incoming, chunk: Chunk, d_states: Sequence[Tensor], d_rows: Sequence[Tensor]
) -> None:
    """Fill the states' gradients with the incoming ones. `d_rows` are those of the chunk's rows."""
    d_output, rows, ends = incoming
    for d in d_states if d_output is None else d_states[1:]:
        d.zero_()
    if d_output is not None:
        d_states[0].narrow(-2, 0, chunk.before).zero_()
        _read_output(job, d_output, rows, chunk, d_rows[0])
    for d, end in zip(d_rows, ends, strict=True):
        _add_ends(job.plan, end, chunk, d)


def _run_back(
    job: Job,
    chunk: Chunk,
    cell: Cell,
    parts: Sequence[Tensor],
    d_states: Sequence[Tensor],
    add_: AddProduct,
) -> None:
    """Run the chunk's steps, the last one first."""
    axis = int(job.spec.bidirectional)
    split_parts = [torch.split_with_sizes(part, chunk.sizes, axis)[::-1] for part in parts]
    views = [torch.split_with_sizes(d, [chunk.before, *chunk.sizes], axis) for d in d_states]
    earlier = [_first_rows(steps[:-1], chunk)[::-1] for steps in views]
    cell.run_back_(split_parts, [steps[:0:-1] for steps in views], earlier, add_)


def _first_rows(views: Sequence[Tensor], chunk: Chunk) -> Sequence[Tensor]:
    """Cut the states before each of the chunk's steps down to the sequences that run at that step."""
    if chunk.before == chunk.sizes[-1]:
        return views
    had = [chunk.before, *chunk.sizes]
    return [v if b == b_had else v.narrow(-2, 0, b) for v, b, b_had in zip(views, chunk.sizes, had, strict=False)]


def _rows(x: Tensor, index: Tensor | None, chunk: Chunk) -> Tensor:
    if index is None:
        return x.narrow(0, chunk.start, chunk.rows)
    return x.index_select(0, index.narrow(0, chunk.start, chunk.rows))


def _before(plan: Plan, history: Tensor, chunk: Chunk) -> Tensor:
    """Return the state before each row of the chunk."""
    if chunk.before == chunk.sizes[-1]:
        return history.narrow(-2, plan.sequences + chunk.start - chunk.before, chunk.rows)
    return history.index_select(-2, plan.previous.narrow(0, chunk.start, chunk.rows))


def _place_output(job: Job, rows: Tensor) -> Tensor:
    plan, index = job.plan, rows_at(job, job.output_is_padded)
    size = plan.size if job.output_is_padded else plan.rows
    new = rows.new_zeros if size > plan.rows else rows.new_empty
    if not job.spec.bidirectional:
        return rows if index[0] is None else new(size, rows.size(-1)).index_copy_(0, index[0], rows)
    output = new(size, 2, rows.size(-1))
    for half, at, part in zip(output.unbind(1), index, rows, strict=True):
        if at is None:
            half.copy_(part)
        else:
            half.index_copy_(0, at, part)
    return output.flatten(1)


def _read_output(job: Job, d_output: Tensor, index: list[Tensor | None], chunk: Chunk, into: Tensor) -> None:
    """Copy the output's gradient at the chunk's rows into `into`."""
    halves = d_output.unflatten(1, (2, -1)).unbind(1) if job.spec.bidirectional else (d_output,)
    for target, at, half in zip(into if job.spec.bidirectional else (into,), index, halves, strict=True):
        target.copy_(_rows(half, at, chunk))


def _add_ends(plan: Plan, ends: Tensor | None, chunk: Chunk, grad: Tensor) -> None:
    """Add the last states' gradients at the rows of the chunk where a sequence ends."""
    count = chunk.sizes[0] - chunk.after
    if ends is not None and count:
        at = plan.last.narrow(0, chunk.after, count) - chunk.start
        grad.index_copy_(-2, at, grad.index_select(-2, at).add_(ends.narrow(-2, chunk.after, count)))


def _add_input_gradient(dx: Tensor, index: Tensor | None, chunk: Chunk, d: Tensor, w_ih: Tensor) -> None:
    if index is None:
        dx.narrow(0, chunk.start, chunk.rows).addmm_(d, w_ih)
    else:
        at = index.narrow(0, chunk.start, chunk.rows)
        dx.index_copy_(0, at, dx.index_select(0, at).addmm_(d, w_ih))
