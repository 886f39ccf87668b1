"""Forward and backward through time, without autograd: one layer, one direction or both as a batch of two.

Rows run packed (see `Plan`); the second direction runs over rows reversed within their own length. Both loops walk
the sequence in chunks of steps that stay in the cache: a chunk's input product just before its steps, its share of the
weights' gradient just after. docs/bptt.md derives it.

P input rows with padding, R rows that run, B sequences that have one, N all, I input, H hidden, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._cells import CELLS, Cell, States, Weights
from ._lengths import Chunk, Plan
from ._products import adder
from ._torch import below_autograd

CHUNK_BYTES = 2 << 20
"""Of a chunk's buffer, for each direction: about what stays in a core's caches."""


class Layer(NamedTuple):
    """What one layer's run is, apart from its tensors."""

    mode: str
    directions: int
    plan: Plan
    gather: bool
    """The input lies as the caller's does, padding and all; False: as rows that run."""
    scatter: bool
    """The output is wanted as the caller's input lies; False: as rows that run."""

    def cell(self, weights: tuple[Weights, ...]) -> Cell:
        return CELLS[self.mode](weights)

    def rows_at(self, there: bool) -> list[Tensor | None]:
        """Where each direction's rows lie, in the caller's input or among the rows that run; None: in order."""
        index = self.plan.index if there else None
        if self.directions == 1:
            return [index]
        return [index, self.plan.flip if index is None else index[self.plan.flip]]

    @property
    def lies_in_history(self) -> bool:
        """Whether the output that the caller gets is the states at every row, as they stand."""
        return self.scatter and self.directions == 1 and self.plan.index is None

    @property
    def lead(self) -> tuple[int, ...]:
        return (2,) if self.directions == 2 else ()

    def chunks(self, cell: Cell, itemsize: int) -> list[Chunk]:
        return self.plan.chunks(max(1, CHUNK_BYTES // (cell.width * cell.hidden * itemsize)))


class Kept(NamedTuple):
    """What backward needs: each state at every row, behind its initial value, and each chunk's buffer."""

    history: States
    buffers: list[Tensor]


def kept_shapes(
    layer: Layer, cell: Cell, initial: Sequence[Tensor], chunks: list[Chunk]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of what a `Kept` holds."""
    rows = layer.plan.live + layer.plan.rows
    width = cell.width * cell.hidden
    return (
        [(*layer.lead, rows, h.size(-1)) for h in initial],
        [(*layer.lead, chunk.rows, width) for chunk in chunks] if cell.keeps_buffer else [],
    )


@below_autograd
def forward(
    layer: Layer, x: Tensor, initial: States, weights: tuple[Weights, ...], keep: bool, room: Kept | None = None
) -> tuple[Tensor, States, Kept]:
    """x (P, I) or (R, I), initial states (D, N, H) -> output (P, D·H) or (R, D·H), last states (D, N, H).

    What is kept for backward goes into `room`, or into new memory.
    """
    plan, cell, axis = layer.plan, layer.cell(weights), len(layer.lead)
    chunks = layer.chunks(cell, x.element_size())
    if room is None:
        history_shapes, buffer_shapes = kept_shapes(layer, cell, initial, chunks)
        room = Kept(
            tuple(x.new_empty(shape) for shape in history_shapes),
            [x.new_empty(shape) for shape in buffer_shapes] if keep else [],
        )
    history, buffers = room
    if not buffers:
        most = max((chunk.rows for chunk in chunks), default=0)
        shared = x.new_empty(*layer.lead, most, cell.width * cell.hidden)
    for states, first in zip(history, initial, strict=True):
        states.narrow(-2, 0, plan.live).copy_(_pick(layer, first))

    add_ = adder(cell.joined(*(cell.ordered(d.w_hh) for d in weights)).mT, plan.live)
    products = [_InputProduct(cell, d) for d in weights]
    rows_in = layer.rows_at(layer.gather)
    states_at = [torch.split_with_sizes(h, [plan.live, *plan.batch_sizes], axis) for h in history]
    for k, chunk in enumerate(chunks):
        buffer = buffers[k] if buffers else shared.narrow(-2, 0, chunk.rows)
        for d, product in enumerate(products):
            product(_rows(x, rows_in[d], chunk), buffer[d] if layer.lead else buffer)
        parts = [torch.split_with_sizes(part, chunk.sizes, axis) for part in cell.parts(buffer)]
        stop = chunk.first + len(chunk.sizes)
        before = [_first_rows(views[chunk.first : stop], chunk) for views in states_at]
        cell.run_(parts, before, [views[chunk.first + 1 : stop + 1] for views in states_at], add_)

    output = _place_output(layer, history[0].narrow(-2, plan.live, plan.rows))
    if keep and layer.lies_in_history:
        output = output.clone()  # what the caller does to it in place must not reach what is kept
    return output, tuple(_place_last(layer, h, first) for h, first in zip(history, initial, strict=True)), room


@below_autograd
def backward(
    layer: Layer,
    x: Tensor,
    initial: States,
    weights: tuple[Weights, ...],
    kept: Kept,
    d_output: Tensor | None,
    d_last: Sequence[Tensor | None],
    want_x: bool,
    want_weights: bool,
) -> tuple[Tensor | None, States, list[Weights] | None]:
    """The gradients of x, of the initial states and of the weights."""
    plan, cell, axis, (history, buffers) = layer.plan, layer.cell(weights), len(layer.lead), kept
    chunks = layer.chunks(cell, x.element_size())
    add_ = adder(cell.joined(*(d.w_hh for d in weights)), plan.live)
    rows_in, rows_out = layer.rows_at(layer.gather), layer.rows_at(layer.scatter)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if want_x else None
    dw = _WeightGradients(cell, weights) if want_weights else None
    ends = [None if d is None else _pick(layer, d) for d in d_last]
    carried: list[Tensor] = []
    most = max((chunk.rows for chunk in chunks), default=0)
    scratch = x.new_empty(*layer.lead, most, cell.gates * cell.hidden)
    room = [x.new_empty(*layer.lead, plan.live + most, h.size(-1)) for h in history]

    for k, chunk in reversed(list(enumerate(chunks))):
        before = tuple(_before(plan, h, chunk) for h in history)
        after = tuple(h.narrow(-2, plan.live + chunk.start, chunk.rows) for h in history)
        buffer = buffers[k] if buffers else after[0]
        local = cell.local(buffer, before, after, scratch.narrow(-2, 0, chunk.rows))

        # The states' gradients, behind room for those of the step before the chunk.
        grads = [states.narrow(-2, 0, chunk.before + chunk.rows) for states in room]
        own = [grad.narrow(-2, chunk.before, chunk.rows) for grad in grads]
        for states in grads if d_output is None else grads[1:]:
            states.zero_()
        if d_output is not None:
            grads[0].narrow(-2, 0, chunk.before).zero_()
            _read_output(layer, d_output, rows_out, chunk, own[0])
        for grad, end in zip(own, ends, strict=True):
            _add_ends(plan, end, chunk, grad)
        for grad, carry in zip(own, carried, strict=False):
            grad.narrow(-2, chunk.rows - carry.size(-2), carry.size(-2)).add_(carry)

        parts = [torch.split_with_sizes(part, chunk.sizes, axis)[::-1] for part in cell.back_parts(local, buffer, own)]
        views = [torch.split_with_sizes(grad, [chunk.before, *chunk.sizes], axis) for grad in grads]
        earlier = [_first_rows(steps[:-1], chunk)[::-1] for steps in views]
        cell.run_back_(parts, [steps[:0:-1] for steps in views], earlier, add_)
        carried = [grad.narrow(-2, 0, chunk.before).clone() for grad in grads]

        if dw is not None:
            dw.add_recurrent(local, before[0], own[0])
        cell.input_gradient_(local, own)
        for direction, d in enumerate(local[0] if layer.lead else local[:1]):
            if dx is not None:
                _add_input_gradient(dx, rows_in[direction], chunk, d, weights[direction].w_ih)
            if dw is not None:
                dw.add_input(direction, d, _rows(x, rows_in[direction], chunk))

    d_initial = [
        _place_initial(layer, carried[s] if carried else None, d_last[s], first) for s, first in enumerate(initial)
    ]
    return dx, tuple(d_initial), None if dw is None else dw.result()


def _first_rows(views: Sequence[Tensor], chunk: Chunk) -> Sequence[Tensor]:
    """Of the states of the step before each of the chunk's steps, those of the sequences that go on."""
    if chunk.before == chunk.sizes[-1]:
        return views
    had = [chunk.before, *chunk.sizes]
    return [v if b == b_had else v.narrow(-2, 0, b) for v, b, b_had in zip(views, chunk.sizes, had, strict=False)]


class _InputProduct:
    """W_ih x + b_ih, with every recurrent bias that adds to it; the rest of the recurrent bias stands before it."""

    def __init__(self, cell: Cell, weights: Weights) -> None:
        self.w = weights.w_ih.t()
        self.gates = gates = cell.gates * cell.hidden
        self.free = (cell.width - cell.gates) * cell.hidden
        self.bias: Tensor | None = None
        self.free_bias: Tensor | None = None
        if weights.b_ih is not None and weights.b_hh is not None:
            b_hh = cell.ordered(weights.b_hh)
            self.bias = weights.b_ih.clone()
            self.bias[: gates - self.free].add_(b_hh[self.free :])
            self.free_bias = b_hh[: self.free]

    def __call__(self, x: Tensor, buffer: Tensor) -> None:
        product = buffer.narrow(-1, self.free, self.gates)
        if self.bias is None:
            torch.mm(x, self.w, out=product)
        else:
            torch.addmm(self.bias, x, self.w, out=product)
        if self.free:
            free = buffer.narrow(-1, 0, self.free)
            free.zero_() if self.free_bias is None else free.copy_(self.free_bias)


class _WeightGradients:
    """Sums over the chunks, by the weights' names; those of the recurrent product for both directions together."""

    def __init__(self, cell: Cell, weights: tuple[Weights, ...]) -> None:
        self.cell, self.weights = cell, weights
        self.recurrent: dict[str, Tensor] = {}
        self.input: list[dict[str, Tensor]] = [{} for _ in weights]

    def add_recurrent(self, local: States, h: Tensor, dh: Tensor) -> None:
        self._add_product(self.recurrent, "w_hh", local[0].mT, h)
        if self.weights[0].b_hh is not None:
            self._add_sum(self.recurrent, "b_hh", local[0])
        if self.cell.w_hr is not None:
            self._add_product(self.recurrent, "w_hr", dh.mT, local[-1])  # the LSTM's m

    def add_input(self, direction: int, d: Tensor, x: Tensor) -> None:
        self._add_product(self.input[direction], "w_ih", d.t(), x)
        if self.weights[direction].b_ih is not None:
            self._add_sum(self.input[direction], "b_ih", d)

    def _add_product(self, sums: dict[str, Tensor], name: str, a: Tensor, b: Tensor) -> None:
        if name not in sums:
            sums[name] = a @ b
        elif a.dim() == 2:
            sums[name].addmm_(a, b)
        else:
            sums[name].baddbmm_(a, b)

    def _add_sum(self, sums: dict[str, Tensor], name: str, d: Tensor) -> None:
        if name not in sums:
            sums[name] = d.sum(-2)
        else:
            sums[name].add_(d.sum(-2))

    def result(self) -> list[Weights]:
        grads = []
        for direction, weights in enumerate(self.weights):
            sums = self.input[direction] | {
                name: total[direction] if self.cell.paired else total for name, total in self.recurrent.items()
            }
            if not sums:  # no row ran
                sums = {name: torch.zeros_like(w) for name, w in weights._asdict().items() if w is not None}
            grads.append(Weights(**sums))
        return grads


def _rows(x: Tensor, index: Tensor | None, chunk: Chunk) -> Tensor:
    if index is None:
        return x.narrow(0, chunk.start, chunk.rows)
    return x.index_select(0, index.narrow(0, chunk.start, chunk.rows))


def _pick(layer: Layer, states: Tensor) -> Tensor:
    """(D, N, H) -> (D, B, H), sorted; (B, H) for one direction."""
    plan = layer.plan
    states = states.narrow(1, 0, plan.live) if plan.order is None else states.index_select(1, plan.order)
    return states if layer.lead else states[0]


def _before(plan: Plan, history: Tensor, chunk: Chunk) -> Tensor:
    """For each row of the chunk, the state it started from."""
    if chunk.before == chunk.sizes[-1]:
        return history.narrow(-2, plan.live + chunk.start - chunk.before, chunk.rows)
    return history.index_select(-2, plan.previous.narrow(0, chunk.start, chunk.rows))


def _place_output(layer: Layer, rows: Tensor) -> Tensor:
    plan, index = layer.plan, layer.rows_at(layer.scatter)
    size = plan.size if layer.scatter else plan.rows
    new = rows.new_zeros if size > plan.rows else rows.new_empty
    if not layer.lead:
        return rows if index[0] is None else new(size, rows.size(-1)).index_copy_(0, index[0], rows)
    output = new(size, 2, rows.size(-1))
    for own, at, part in zip(output.unbind(1), index, rows, strict=True):
        if at is None:
            own.copy_(part)
        else:
            own.index_copy_(0, at, part)
    return output.flatten(1)


def _read_output(layer: Layer, d_output: Tensor, index: list[Tensor | None], chunk: Chunk, into: Tensor) -> None:
    """The output's gradient at the chunk's rows."""
    halves = d_output.unflatten(1, (2, -1)).unbind(1) if layer.lead else (d_output,)
    for own, at, half in zip(into if layer.lead else (into,), index, halves, strict=True):
        own.copy_(_rows(half, at, chunk))


def _add_ends(plan: Plan, ends: Tensor | None, chunk: Chunk, grad: Tensor) -> None:
    """The last states' gradients, at the rows of the chunk where a sequence ends."""
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


def _place_last(layer: Layer, history: Tensor, initial: Tensor) -> Tensor:
    plan = layer.plan
    last = history.index_select(-2, plan.live + plan.last)
    last = last if layer.lead else last.unsqueeze(0)
    if plan.order is not None:
        return initial.clone().index_copy_(1, plan.order, last)
    return (
        last if plan.live == plan.batch else torch.cat([last, initial.narrow(1, plan.live, plan.batch - plan.live)], 1)
    )


def _place_initial(layer: Layer, carried: Tensor | None, d_last: Tensor | None, initial: Tensor) -> Tensor:
    """The initial state's gradient: what came back through the steps; of a row without steps, its last state's."""
    grad = torch.zeros_like(initial) if d_last is None else d_last.clone()
    if carried is None:
        return grad
    carried = carried if layer.lead else carried.unsqueeze(0)
    if layer.plan.order is not None:
        return grad.index_copy_(1, layer.plan.order, carried)
    grad.narrow(1, 0, layer.plan.live).copy_(carried)
    return grad
