"""The hand-written backend: `_loops` as one autograd.Function a layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ._call import Call, each_layer
from ._cells import States, Weights
from ._loops import Kept, Layer, backward, forward
from ._plain import scan_rows
from ._rows import pick_rows, place_rows
from ._twice import gradient_of, wants_plain


def run(call: Call) -> tuple[Tensor, States]:
    plan, L = call.plan(), call.layer.num_layers
    number = count()

    def run_layer(x: Tensor, initial: States, weights: tuple[Weights, ...]) -> tuple[Tensor, States]:
        k = next(number)
        layer = Layer(call.layer.mode, call.directions, plan, gather=k == 0, scatter=k == L - 1)
        tensors = (*initial, *(t for w in weights for t in w))
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
            output, *last = _Layer.apply(layer, len(initial), x, *tensors)  # type: ignore[no-untyped-call]
            return output, tuple(last)
        output, states, _ = forward(layer, x, initial, weights, keep=False)
        return output, states

    output, last = each_layer(call, call.rows(), run_layer)
    return call.from_rows(output), last


class _Layer(torch.autograd.Function):
    """One layer. Its gradient is itself differentiated through the plain form."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, n_states: int, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        initial: Any = tensors[:n_states]
        weights = unpack(tensors[n_states:], layer.directions)
        output, last, kept = forward(layer, x, initial, weights, keep=True)
        ctx.layer, ctx.n_states = layer, n_states
        ctx.save_for_backward(x, *tensors, *kept.history, *kept.buffers)
        ctx.set_materialize_grads(False)
        return output, *last

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, *d_last: Tensor | None) -> tuple[Any, ...]:
        layer, n_states = ctx.layer, ctx.n_states
        n_inputs = n_states + layer.directions * len(Weights._fields)
        x, *saved = ctx.saved_tensors
        tensors, kept = saved[:n_inputs], saved[n_inputs:]
        grads = (d_output, *d_last)
        if wants_plain(grads):
            plain = partial(_plain, layer, n_states)
            return None, None, *gradient_of(plain, (x, *tensors), ctx.needs_input_grad[2:], grads)
        initial, weights = tuple(tensors[:n_states]), unpack(tensors[n_states:], layer.directions)
        dx, d_initial, d_weights = backward(
            layer,
            x,
            initial,
            weights,
            Kept(tuple(kept[:n_states]), kept[n_states:]),
            d_output,
            d_last,
            ctx.needs_input_grad[2],
            any(ctx.needs_input_grad[3 + n_states :]),
        )
        flat = [None] * (n_inputs - n_states) if d_weights is None else [g for w in d_weights for g in w]
        return None, None, dx, *d_initial, *flat


def unpack(tensors: Any, directions: int) -> tuple[Weights, ...]:
    n = len(Weights._fields)
    return tuple(Weights(*tensors[d * n : (d + 1) * n]) for d in range(directions))


def _plain(layer: Layer, n_states: int, x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
    """`forward` in plain ops."""
    plan = layer.plan
    index = plan.index if layer.gather else None
    initial, weights = tensors[:n_states], unpack(tensors[n_states:], layer.directions)
    output, last = scan_rows(layer.mode, plan, pick_rows(x, index), initial, weights)
    return place_rows(output, plan.index if layer.scatter else None, plan.size), *last
