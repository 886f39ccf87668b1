"""The passes of a job in PyTorch's ops, layer by layer: the reference for the native loops, and what runs without them.

T steps, N sequences, R rows that run, I input, H hidden, P state that is fed back, D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._spec import States, flatten_weights
from ..._torch import below_autograd
from . import ops_layer
from .job import Gradients, Job, Saved, flatten, saved_views, unflatten


@below_autograd
def forward(
    job: Job, x: Tensor, first: Sequence[Tensor], weights: Sequence[Tensor], save: bool, into: Tensor | None
) -> tuple[Tensor, States, Tensor | None]:
    spec, D = job.spec, job.spec.directions
    if save and into is None:
        into = x.new_empty(job.saved_size())
    views = saved_views(job, into) if save and into is not None else [(None, None)] * spec.num_layers
    initial = first_states(job, first, x)
    rows, lasts = x.reshape(-1, x.size(-1)), []
    for k, layer_weights in enumerate(spec.group(weights)):
        saved, kept = views[k]
        states = tuple([h[k * D : (k + 1) * D] for h in initial])
        rows, last = ops_layer.forward(job.of_layer(k, job.plan), rows, states, layer_weights, saved)
        if kept is not None:
            kept.copy_(rows)
        lasts.append(last)
    joined = tuple([torch.cat(states) for states in zip(*lasts, strict=True)])
    return rows.view(job.output_shape(x)), tuple(map(flatten, joined)) if job.last_is_flat else joined, into


@below_autograd
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
    spec, D = job.spec, job.spec.directions
    views, initial = saved_views(job, saved), first_states(job, first, x)
    d_output, *d_last = grads
    if job.last_is_flat:
        d_last = [None if d is None else unflatten(job, d) for d in d_last]
    d_rows = None if d_output is None else d_output.reshape(-1, d_output.size(-1))
    d_first: list[States] = []
    d_weights: list[Tensor] = []
    for k, layer_weights in reversed(list(enumerate(spec.group(weights)))):
        part = slice(k * D, (k + 1) * D)
        rows = x.reshape(-1, x.size(-1)) if k == 0 else _output_of(job, *views[k - 1])
        d_rows, d_initial, d_layer_weights = ops_layer.backward(
            job.of_layer(k, job.plan),
            rows,
            tuple([h[part] for h in initial]),
            layer_weights,
            views[k][0],
            [d_rows, *(None if d is None else d[part] for d in d_last)],
            want_x or k > 0,
            want_weights,
        )
        d_first.insert(0, d_initial)
        if d_layer_weights is not None:
            d_weights = [*flatten_weights([d_layer_weights]), *d_weights]
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


def first_states(job: Job, given: Sequence[Tensor], like: Tensor) -> States:
    """Return a job's initial states, each (L·D, N, P or H): the given ones without the dropped ones, or zeros."""
    spec = job.spec
    if not given:
        return tuple([like.new_zeros(spec.stacked, job.batch, width) for width in spec.state_widths])
    states = [unflatten(job, h) if job.first_is_flat else h for h in given]
    anew = dropped_states(job)
    return tuple(states if anew is None else [torch.where(anew, torch.zeros_like(h), h) for h in states])


def dropped_states(job: Job) -> Tensor | None:
    """Return a mask (L·D, N, 1) of the states that are dropped, as by `_call.states.forget`. None: none is."""
    if job.dropped is None:
        return None
    dropped = torch.tensor(list(job.dropped), dtype=torch.bool)
    if job.lengths is not None:
        dropped &= torch.tensor(job.lengths) > 0
    anew = torch.zeros(job.spec.stacked, job.batch, 1, dtype=torch.bool)
    anew[:: job.spec.directions, :, 0] = dropped
    return anew
