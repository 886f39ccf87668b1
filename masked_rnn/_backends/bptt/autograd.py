"""Runs a call in our own loops, with one autograd.Function for each layer (docs/bptt.md)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..._call import Call
from ..._call.context import PLAIN
from ..._cells import LayerWeights, States, flatten_weights, group_weights, stack_layers
from ..double_backward import gradient_of, needs_another_backward
from ..gather import gather_rows, scatter_rows
from ..recurrence import scan_rows
from . import native
from .layer_run import LayerRun, Saved

NEEDS_GRADIENT = attrgetter("requires_grad")


def why_not(call: Call) -> str | None:
    """Return the reason why this backend can't run a call. None: it can."""
    context = call.context
    reason = context.only_scan
    if context is not PLAIN and not reason:
        reason = call.why_unreadable(reads_plan=context.traced or context.cuda_graph or not call.is_plain)
    if reason or not call.parameters[0].is_complex():
        return reason
    return "its gradients are those of real numbers, and this layer is complex"


def run(call: Call) -> tuple[Tensor, States]:
    plan, L = call.plan, call.layer.num_layers
    number = count()

    def run_one(x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States]:
        k = next(number)
        layer_run = LayerRun(call.layer.mode, call.directions, plan, gather=k == 0, scatter=k == L - 1)
        tensors = (*initial, *flatten_weights([weights]))
        if torch.is_grad_enabled() and any(map(NEEDS_GRADIENT, (x, *tensors))):
            output, *last = ThroughTime.apply(layer_run, len(initial), x, *tensors)
            return output, tuple(last)
        output, states, _ = native.forward(layer_run, x, initial, weights, save=False)
        return output, states

    output, last = stack_layers(call.rows(), call.states, call.weights, run_one, call.dropout)
    return call.from_rows(output), last


class ThroughTime(torch.autograd.Function):
    """One layer. Second derivatives go through the recurrence in plain ops."""

    @staticmethod
    def forward(ctx: Any, layer_run: LayerRun, n_states: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        initial, (weights,) = tensors[:n_states], group_weights(tensors[n_states:], 1, layer_run.directions)
        output, last, saved = native.forward(layer_run, x, initial, weights, save=True)
        ctx.layer_run, ctx.n_states, ctx.n_inputs = layer_run, n_states, len(tensors)
        assert saved is not None
        kept = (x, *tensors, *saved.history, *(() if saved.buffer is None else (saved.buffer,)))
        ctx.save_for_backward(*kept)
        ctx.shapes = [t.shape for t in kept]
        ctx.set_materialize_grads(False)
        return output, *last

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, *d_last: Tensor | None) -> tuple[Any, ...]:
        layer_run, n_states = ctx.layer_run, ctx.n_states
        x, *rest = ctx.saved_tensors
        if [t.shape for t in (x, *rest)] != ctx.shapes:
            raise RuntimeError(
                "A tensor that backward needs has another shape than in forward. It was replaced since, or a hook on "
                "saved tensors gave back another one."
            )
        tensors, saved = rest[: ctx.n_inputs], rest[ctx.n_inputs :]
        grads = (d_output, *d_last)
        if needs_another_backward(grads):
            plain = partial(_recurrence, layer_run, n_states)
            return None, None, *gradient_of(plain, (x, *tensors), ctx.needs_input_grad[2:], grads)
        initial, (weights,) = tuple(tensors[:n_states]), group_weights(tensors[n_states:], 1, layer_run.directions)
        dx, d_initial, d_weights = native.backward(
            layer_run,
            x,
            initial,
            weights,
            Saved(tuple(saved[:n_states]), saved[n_states] if saved[n_states:] else None),
            grads,
            ctx.needs_input_grad[2],
            any(ctx.needs_input_grad[3 + n_states :]),
        )
        flat = [None] * (ctx.n_inputs - n_states) if d_weights is None else flatten_weights([d_weights])
        return None, None, dx, *d_initial, *flat


def _recurrence(layer_run: LayerRun, n_states: int, x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
    """Run one layer in plain ops. Arguments and results are those of `ThroughTime.forward`."""
    plan = layer_run.plan
    initial, (weights,) = tensors[:n_states], group_weights(tensors[n_states:], 1, layer_run.directions)
    x = gather_rows(x, plan.index if layer_run.gather else None)
    output, last = scan_rows(layer_run.mode, plan, x, initial, weights)
    return scatter_rows(output, plan.index if layer_run.scatter else None, plan.size), *last
