"""Runs a call in our own loops, with one autograd.Function for the whole stack of layers (docs/bptt.md)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._call import Call
from ..._call.context import PLAIN
from ..._cells import SHAPE_OF
from ..._spec import States, flatten_weights
from ..double_backward import gradient_of, needs_another_backward
from ..gather import gather_rows, scatter_rows
from ..recurrence import scan_planned
from . import passes
from .job import Job, flatten
from .ops import first_states


def why_not(call: Call) -> str | None:
    """Return the reason why this backend can't run a call. None: it can."""
    context = call.context
    reason = context.only_scan
    if context is not PLAIN and not reason:
        reason = call.why_unreadable(reads_plan=context.traced or context.cuda_graph or not call.is_full)
    if reason or not call.parameters[0].is_complex():
        return reason
    return "its gradients are those of real numbers, and this layer is complex"


def run(call: Call) -> tuple[Tensor, States]:
    job, records = job_of(call), call.records_gradients()
    if not call.dropout:
        return run_job(job, call.data, call.initial or (), call.parameters, records)
    return _run_with_dropout(call, job, records)


def job_of(call: Call) -> Job:
    """Return how a call runs. A padded batch's lengths are planned where it runs; other calls have a plan."""
    form, spec = call.form, call.spec
    if form.is_rows or call.mask is not None or not call.data.is_cpu:
        plan = call.plan
        padded = plan.index is not None
        return Job(spec, plan.batch, form.steps, False, plan=plan, input_is_padded=padded, output_is_padded=padded)
    if call.lengths is None:
        return Job(spec, form.batch, form.steps, form.batch_first)
    lengths = array("q", call.lengths.tolist())
    counts = len(lengths) - lengths.count(0), sum(lengths)
    return Job(spec, form.batch, form.steps, form.batch_first, lengths, counts)


def run_job(
    job: Job,
    x: Tensor,  # (N, T, I), (T, N, I) or (R, I)
    first: Sequence[Tensor],  # initial states in the job's layout; none: zeros
    weights: Sequence[Tensor],
    records_gradients: bool,
) -> tuple[Tensor, States]:
    """Return the output and the last states."""
    if records_gradients:
        output, *last = ThroughTime.apply(job, len(first), x, *first, *weights)
        return output, tuple(last)
    output, last, _ = passes.forward(job, x, first, weights, save=False)
    return output, last


def _run_with_dropout(call: Call, job: Job, records: bool) -> tuple[Tensor, States]:
    """Run each layer as a job of its own, with dropout over the rows that run in between."""
    spec, D = job.spec, job.spec.directions
    x, lasts = call.data, []
    for k, weights in enumerate(spec.group(call.parameters)):
        if k:
            x = F.dropout(x, call.dropout)
        initial = [h[k * D : (k + 1) * D] for h in call.initial or ()]
        x, last = run_job(job.of_layer(k), x, initial, flatten_weights([weights]), records)
        lasts.append(last)
    return call.from_rows(x), tuple([torch.cat(states) for states in zip(*lasts, strict=True)])


class ThroughTime(torch.autograd.Function):
    """A stack of layers. Second derivatives go through the recurrence in plain ops."""

    @staticmethod
    def forward(ctx: Any, job: Job, n_states: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        first, weights = tensors[:n_states], tensors[n_states:]
        output, last, saved = passes.forward(job, x, first, weights, save=True)
        ctx.job, ctx.n_states = job, n_states
        kept = (x, *tensors, saved)
        ctx.save_for_backward(*kept)
        ctx.shapes = list(map(SHAPE_OF, kept))
        ctx.set_materialize_grads(False)
        return output, *last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        job, n_states = ctx.job, ctx.n_states
        kept = ctx.saved_tensors
        if list(map(SHAPE_OF, kept)) != ctx.shapes:
            raise RuntimeError(
                "A tensor that backward needs has another shape than in forward. It was replaced since, or a hook on "
                "saved tensors gave back another one."
            )
        x, *tensors, saved = kept
        if needs_another_backward(grads):
            plain = partial(_recurrence, job, n_states)
            return None, None, *gradient_of(plain, (x, *tensors), ctx.needs_input_grad[2:], grads)
        first, weights = tensors[:n_states], tensors[n_states:]
        want_x, want_weights = ctx.needs_input_grad[2], any(ctx.needs_input_grad[3 + n_states :])
        dx, d_first, d_weights = passes.backward(job, x, first, weights, saved, grads, want_x, want_weights)
        nothing: list[Tensor | None] = [None] * len(weights)
        return None, None, dx, *d_first, *(nothing if d_weights is None else d_weights)


def _recurrence(job: Job, n_states: int, x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
    """Run a job in plain ops. Arguments and results are those of `ThroughTime.forward`."""
    spec, plan = job.spec, job.plan
    initial = first_states(job, tensors[:n_states], x)

    rows = gather_rows(x.flatten(0, -2), plan.index if job.input_is_padded else None)
    rows, last = scan_planned(spec, plan, rows, initial, tensors[n_states:])
    output = scatter_rows(rows, plan.index if job.output_is_padded else None, plan.size)
    return output.view(job.output_shape(x)), *(map(flatten, last) if job.last_is_flat else last)
