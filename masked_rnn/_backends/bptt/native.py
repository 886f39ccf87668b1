"""Runs a layer in the native loops where they can run it, and in those of PyTorch's ops (`.loops`) elsewhere.

The native loops are compiled from C++ when the package is installed. Both kinds have the same arguments, results and
`Saved`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._cells import LayerWeights, States
from ..._memory import NotPlainError, address, contiguous, copied, with_memory
from ..._torch import below_autograd, is_recorded
from . import library, loops, threads
from .cells import CELLS
from .layer_run import LayerRun, Saved, last_gradient, new_saved

NO_MEMORY = (0, 0)
INT64 = torch.int64


def forward(
    layer_run: LayerRun,
    x: Tensor,  # (P, I) or (R, I)
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
    save: bool,
    into: Saved | None = None,
) -> tuple[Tensor, States, Saved | None]:
    """Return the output (P, D·H) or (R, D·H), the last states (D, N, P or H), and what is saved."""
    if library.runs(x.dtype) and not is_recorded():
        try:
            return run_forward(layer_run, x, initial, weights, save, into)
        except NotPlainError:
            pass  # the loops of PyTorch's ops take other tensors, or refuse them
    return loops.forward(layer_run, *_with_memory(x, initial, weights), save, into)


def backward(
    layer_run: LayerRun,
    x: Tensor,  # (P, I) or (R, I)
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
    saved: Saved,
    grads: Sequence[Tensor | None],  # of the output, then of each last state
    want_x: bool,
    want_weights: bool,
) -> tuple[Tensor | None, States, LayerWeights | None]:
    """Return the gradients of x, of the initial states and of the weights."""
    if library.runs(x.dtype) and not is_recorded():
        try:
            return run_backward(layer_run, x, initial, weights, saved, grads, want_x, want_weights)
        except NotPlainError:
            pass  # as above
    history, buffer = saved
    saved = Saved(tuple(map(with_memory, history)), None if buffer is None else with_memory(buffer))
    grads = [None if d is None else with_memory(d) for d in grads]
    return loops.backward(layer_run, *_with_memory(x, initial, weights), saved, grads, want_x, want_weights)


def _with_memory(x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States, LayerWeights]:
    return with_memory(x), tuple(map(with_memory, initial)), tuple(each.map(with_memory) for each in weights)


@below_autograd
def run_forward(
    layer_run: LayerRun, x: Tensor, initial: States, weights: LayerWeights, save: bool, into: Saved | None = None
) -> tuple[Tensor, States, Saved | None]:
    plan = layer_run.plan
    if not plan.rows:
        return loops.forward(layer_run, x, initial, weights, save, into)
    if save and into is None:
        into = new_saved(layer_run, x, initial, weights)
    x = contiguous(x)
    states = tuple(copied(h) for h in initial)
    size = plan.size if layer_run.scatter else plan.rows
    output = x.new_empty(size, len(weights) * initial[0].size(-1))
    layer, _alive = _layer(layer_run, x, states, weights, into)
    dtype = x.dtype
    library.call(
        "forward",
        [
            *layer,
            *address(states[0], dtype, states[0].numel()),
            *(address(states[1], dtype, states[1].numel()) if len(states) == 2 else NO_MEMORY),
            *address(output, dtype, *output.shape),
            output.size(1),
        ],
    )
    return output, states, into


@below_autograd
def run_backward(
    layer_run: LayerRun,
    x: Tensor,
    initial: States,
    weights: LayerWeights,
    saved: Saved,
    grads: Sequence[Tensor | None],
    want_x: bool,
    want_weights: bool,
) -> tuple[Tensor | None, States, LayerWeights | None]:
    d_output, *d_last = grads
    plan, D, dtype = layer_run.plan, len(weights), x.dtype
    if not plan.rows:
        return loops.backward(layer_run, x, initial, weights, saved, grads, want_x, want_weights)
    x, d_output = contiguous(x), None if d_output is None else contiguous(d_output)
    # A hook on saved tensors may have returned them with other strides.
    history, buffer = saved
    saved = Saved(tuple(map(contiguous, history)), None if buffer is None else contiguous(buffer))
    d_states = tuple(last_gradient(h, d) for h, d in zip(initial, d_last, strict=True))
    layer, _alive = _layer(layer_run, x, d_states, weights, saved)
    dx = x.new_empty(D, *x.shape) if want_x else None
    d_weights = tuple(each.map(lambda w: w.new_empty(w.shape)) for each in weights) if want_weights else None
    numbers = [
        *layer,
        *(NO_MEMORY if d_output is None else address(d_output, dtype, *d_output.shape)),
        0 if d_output is None else d_output.size(1),
        *address(d_states[0], dtype, d_states[0].numel()),
        *(address(d_states[1], dtype, d_states[1].numel()) if len(d_states) == 2 else NO_MEMORY),
        *(NO_MEMORY if dx is None else address(dx, dtype, dx.numel())),
    ]
    for each in d_weights or ():
        for g in each:
            numbers += NO_MEMORY if g is None else address(g, dtype, g.numel())
    numbers += NO_MEMORY * (5 * (2 - D * want_weights))
    library.call("backward", numbers)
    if dx is None:
        return None, d_states, d_weights
    return dx[0] if D == 1 else dx[0].add_(dx[1]), d_states, d_weights


def _layer(
    layer_run: LayerRun, x: Tensor, states: States, weights: LayerWeights, saved: Saved | None
) -> tuple[list[int], Any]:
    """Return the record `Layer` of native/interface.h, and tensors that must live as long as its addresses."""
    plan, D, dtype = layer_run.plan, len(weights), x.dtype
    cell = CELLS[layer_run.mode]
    (rows_of_x, inputs), fed_back = x.shape, states[0].size(-1)
    hidden = weights[0].w_hh.size(0) // cell.gates
    N = cell.gates * hidden
    sizes, starts = plan.step_tables
    steps = len(plan.batch_sizes)
    alive: list[Tensor] = []
    numbers = [
        tuple(CELLS).index(layer_run.mode),
        dtype.itemsize,
        D,
        plan.batch,
        plan.sequences,
        steps,
        plan.rows,
        inputs,
        hidden,
        fed_back,
        *threads.count_and_start(),
        layer_run.gather,
        layer_run.scatter,
        *sizes.buffer_info(),
        *starts.buffer_info(),
        *(NO_MEMORY if plan.index is None else address(plan.index, INT64, plan.rows)),
        *(NO_MEMORY if plan.order is None else address(plan.order, INT64, plan.order.numel())),
        *address(x, dtype, rows_of_x, inputs),
        inputs,
    ]
    for w_ih, w_hh, b_ih, b_hh, w_hr in weights:
        for w, rows, columns in (
            (w_ih, N, inputs),
            (w_hh, N, fed_back),
            (b_ih, N, 1),
            (b_hh, N, 1),
            (w_hr, fed_back, hidden),
        ):
            if w is None:
                numbers += NO_MEMORY
                continue
            if not w.is_contiguous():
                w = contiguous(w)
                alive.append(w)
            numbers += address(w, dtype, rows, columns)
    numbers += NO_MEMORY * (5 * (2 - D))
    if saved is None:
        numbers += NO_MEMORY * 3
        return numbers, alive
    states_at = D * (plan.sequences + plan.rows)
    numbers += address(saved.history[0], dtype, states_at, fed_back)
    numbers += address(saved.history[1], dtype, states_at, hidden) if len(saved.history) == 2 else NO_MEMORY
    buffer = saved.buffer
    numbers += NO_MEMORY if buffer is None else address(buffer, dtype, D * plan.rows, cell.width * hidden)
    return numbers, alive
