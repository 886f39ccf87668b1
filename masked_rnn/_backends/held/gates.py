"""One call of cuDNN for each layer over a padded batch: the gates hold the state over padding.

Each layer's input gets extra features, the marks. Their weights keep padding from changing the state:

- GRU: z = σ(1e4) = 1, so h' = (1 - z) n + z h = h.
- LSTM: i = σ(-1e4) = 0 and f = σ(1e4) = 1, so c' = f c + i g = c. h' = o tanh(c) is 0 if c is 0.
- RNN with relu: the argument is hugely negative, so h' = 0.
- RNN with tanh: the marks are 1 at real steps, and their weights are the biases. So h' = tanh(W_hh h) is 0 if h is.

So padding before the first real step of a direction leaves its state alone: for a GRU any state, for the others zeros.
Nothing is reversed, and both directions run in the same call. After the last real step, an LSTM's h and an RNN's state
change, so the last state is gathered from the output.

T time, N batch, I input, W input and marks, H hidden, G gates, P the state that is fed back, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._call import Call
from ..._call.call import Restore
from ..._call.lengths import is_on_host
from ..._cells import stack_layers
from ..._plan import real_mask
from ..._spec import LayerWeights, Spec, States, flatten_weights
from .. import cudnn
from ..double_backward import gradient_of, needs_another_backward
from ..kernels import run_stack
from ..recurrence import scan
from . import operators
from .marks import flatten, marks_for, narrowed
from .operators import Memory


def why_not(call: Call) -> str | None:
    """Return the reason why this backend can't run a call. None: it can."""
    reason = call.context.only_scan or call.why_unreadable(reads_plan=call.form.is_rows)
    if not reason and not call.context.readable:
        reason = "torch.jit.trace, make_fx and FakeTensorMode can't follow it into cuDNN's operators"
    reason = reason or operators.why_not(call.data)
    if reason or call.is_full or call.spec.mode == "GRU" or call.initial is None or not call.spec.bidirectional:
        return reason
    return "padding comes first in the backward direction, and the gates of an LSTM or RNN can't hold hx over it"


@dataclass(eq=False, repr=False)
class Marked:
    """The padding of a call, as all of its layers need it."""

    real: Tensor
    """(T, N, 1), True at real steps"""
    marks: Tensor
    """(T, N, 1), 1 at padding and 0 at real steps; for an RNN with tanh the reverse. In the dtype that runs"""
    zero: Tensor
    """A number, in the dtype that runs"""
    last: Tensor | None
    """(1, N, P), the last step of each sequence. None for a GRU"""
    runs: Tensor | None
    """(1, N, 1), True for sequences that have a step. None until `find_runs` is called: some calls do not need it"""

    def find_runs(self) -> Tensor:
        if self.runs is None:
            self.runs = self.real.any(0, keepdim=True)
        return self.runs


class Held(NamedTuple):
    """The configuration of one layer, and the padding of the call."""

    spec: Spec
    marked: Marked
    is_top: bool
    """True: the output is zeroed at padding. False: the next layer ignores it there."""
    has_states: bool
    """True: the caller gave initial states. False: they are zeros."""
    grad_enabled: bool


def run(call: Call) -> tuple[Tensor, States]:
    if call.is_full:
        return run_stack(call, call.data, call.states)
    number, grad_enabled = count(), torch.is_grad_enabled()
    x, real, lengths, restore = _padded(call)
    steps = x.size(0)
    if call.lengths is not None and is_on_host(call.lengths):
        longest = max(int(call.lengths.max()), 1)  # beyond it all is padding
        x, real = x[:longest], real[:longest]
    marked, wide, states = _open(call, x, real, lengths)

    def run_one(spec: Spec, x: Tensor, states: States, weights: LayerWeights) -> tuple[Tensor, States]:
        k = next(number)
        held = Held(spec, marked, k == call.spec.num_layers - 1, call.initial is not None, grad_enabled)
        output, *last = HeldLayer.apply(held, wide if k == 0 else None, x, *states, *flatten_weights([weights]))
        return output, tuple(last)

    output, last = stack_layers(call.spec, x, states, call.parameters, run_one, call.dropout)
    if output.size(0) < steps:
        output = F.pad(output, (0, 0, 0, 0, 0, steps - output.size(0)))
    return restore(output), last


def _padded(call: Call) -> tuple[Tensor, Tensor, Tensor | None, Restore]:
    """Return the input (T, N, I), the mask (T, N, 1), the lengths (N,), None for a GRU; how to restore an output."""
    if call.spec.mode == "GRU":
        x, real, restore = call.padded_in_place()
        lengths = None
    else:
        x, lengths, restore = call.padded_last()
        real = None if lengths is None else real_mask(lengths, x.size(0))
    assert real is not None
    return x, real, lengths, restore


def _open(
    call: Call,
    x: Tensor,  # (T, N, I)
    real: Tensor,  # (T, N, 1)
    lengths: Tensor | None,  # (N,)
) -> tuple[Marked, Tensor, States]:
    """Return what all layers need, the first one's input (T, N, W), and the initial states.

    One buffer holds everything that starts as zeros, so that one kernel fills it.
    """
    spec, dtype = call.spec, cudnn.running_dtype(x)
    T, N, inputs = x.shape
    W = inputs + marks_for(spec.layer(0), dtype)
    shapes = [(spec.stacked, N, width) for width in (spec.state_widths if call.initial is None else ())]
    sizes = [T * N * W, *map(prod, shapes), 1]
    wide, *zeros, zero = x.new_zeros(sum(sizes), dtype=dtype).split(sizes)
    wide, zero = wide.view(T, N, W), zero.view(())
    torch.where(real, x.detach().to(dtype), zero, out=wide[..., :inputs])
    marks = wide[..., inputs : inputs + 1]
    marks.copy_(real) if spec.mode == "RNN_TANH" else torch.logical_not(real, out=marks)
    states = call.initial or tuple(h.view(shape) for h, shape in zip(zeros, shapes, strict=True))
    last = runs = None
    if lengths is not None:
        runs = (lengths > 0).view(1, N, 1)
        last = (lengths - 1).clamp(min=0).view(1, N, 1).expand(1, N, spec.fed_back)
    return Marked(real, marks, zero, last, runs), wide, states


def forward(
    held: Held,
    wide: Tensor | None,  # (T, N, W), None if it has to be made of x
    x: Tensor,  # (T, N, I)
    given: States,  # each (D, N, P or H)
    weights: LayerWeights,
    train: bool,
) -> tuple[Tensor, States, tuple[Memory, Tensor, Tensor]]:
    """Run a layer. Return its output, the last states, and for backward memory, cuDNN's output and reserve."""
    last = held.marked.last
    memory = _memory(held, wide, x, given, weights)
    raw, states, reserve = operators.run(held.spec, memory, train)
    if last is not None:  # the forward direction's h has not stayed
        h = raw.gather(0, last)
        states = (torch.cat([h, states[0][1:]]) if held.spec.bidirectional else h, *states[1:])
    if held.has_states:
        runs = held.marked.find_runs()
        states = tuple([torch.where(runs, new, h.to(new.dtype)) for new, h in zip(states, given, strict=True)])
    output = torch.where(held.marked.real, raw, held.marked.zero) if held.is_top else raw
    return output, states, (memory, raw, reserve)


def _memory(held: Held, wide: Tensor | None, x: Tensor, given: States, weights: LayerWeights) -> Memory:
    """Return what the kernel reads. The arguments are those of `forward`."""
    spec, marked, zero = held.spec, held.marked, held.marked.zero
    if wide is None:
        marks = marked.marks.expand(-1, -1, marks_for(spec, zero.dtype))
        wide = torch.cat([torch.where(marked.real, x, zero), marks], -1)
    states = given
    if held.has_states:
        runs = marked.find_runs()
        states = tuple([torch.where(runs, h.to(zero.dtype), zero).contiguous() for h in given])
    flat, views = flatten(spec, weights, wide.size(-1), zero.dtype)
    return Memory(wide, flat, views, states)


def backward(
    held: Held,
    saved: tuple[Memory, Tensor, Tensor],
    d_output: Tensor | None,  # (T, N, D·P)
    d_last: Sequence[Tensor | None],  # each (D, N, P or H)
    want_weights: bool,
) -> tuple[Tensor, Sequence[Tensor | None], LayerWeights | None]:
    """Return the gradients of x (T, N, I), of the initial states if the caller gave them, and of the weights.

    At least one of the given gradients must not be None.
    """
    real, zero, last = held.marked.real, held.marked.zero, held.marked.last
    memory, raw, reserve = saved
    raw = raw.contiguous()  # a hook on saved tensors may have laid it out anew
    d_raw = torch.where(real, d_output, zero) if held.is_top and d_output is not None else d_output
    # The last state of a row without steps depends on no weight. But its gradient may be NaN, and 0 · NaN is NaN.
    d_h, *d_c = [None if d is None else torch.where(held.marked.find_runs(), d, zero) for d in d_last]
    if last is not None and d_h is not None:
        d_raw = torch.zeros_like(raw) if d_raw is None else d_raw if held.is_top else d_raw.clone()
        d_raw.scatter_add_(0, last, d_h[:1])
        d_h[0].zero_()
    dx, d_states, d_weights = operators.run_back(held.spec, memory, raw, reserve, d_raw, (d_h, *d_c), want_weights)
    d_initial: Sequence[Tensor | None] = [None] * len(d_states)
    if held.has_states:
        runs = held.marked.find_runs()
        d_initial = [torch.where(runs, d, zero if e is None else e) for d, e in zip(d_states, d_last, strict=True)]
    dx = torch.where(real, dx[..., : held.spec.input_size], zero)
    return dx, d_initial, narrowed(held.spec, d_weights) if want_weights else None


class HeldLayer(torch.autograd.Function):
    """One layer. First derivatives are cuDNN's. With `create_graph=True` they go through `recurrence.scan`."""

    @staticmethod
    def forward(ctx: Any, held: Held, wide: Tensor | None, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        S = len(held.spec.state_widths)
        (weights,) = held.spec.group(tensors[S:])
        saves = held.grad_enabled and any(ctx.needs_input_grad)
        output, last, (memory, raw, reserve) = forward(held, wide, x, tensors[:S], weights, saves)
        ctx.held, ctx.n_states, ctx.shapes = held, S, [w.shape for w in memory.weights]
        if saves:
            ctx.save_for_backward(x, *tensors, memory.x, memory.flat, *memory.states, raw, reserve)
        ctx.set_materialize_grads(False)
        return output, *last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        held, S = ctx.held, ctx.n_states
        x, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        tensors, rest = rest[: len(needs) - 1], rest[len(needs) - 1 :]
        if needs_another_backward(grads):
            return None, None, *gradient_of(partial(_recurrence, held), (x, *tensors), needs, grads)
        if all(g is None for g in grads):
            return (None,) * (2 + len(needs))
        wide, flat, *rest = rest
        memory = Memory(wide, flat, cudnn.views_of(flat, ctx.shapes), tuple(rest[:S]))
        saved = (memory, *rest[S:])
        dx, d_initial, d_weights = backward(held, saved, grads[0], grads[1:], any(needs[1 + S :]))
        found = [None] * (len(needs) - 1 - S) if d_weights is None else flatten_weights([d_weights])
        return None, None, dx if needs[0] else None, *d_initial, *found


def _recurrence(held: Held, x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
    """Run one layer in plain ops. Arguments and results are those of `HeldLayer.forward`."""
    S = len(held.spec.state_widths)
    (weights,) = held.spec.group(tensors[S:])
    dtype = weights[0].w_ih.dtype  # under autocast, x and the states may have other dtypes
    x, *states = (t.to(dtype) for t in (x, *tensors[:S]))
    output, last = scan(held.spec.mode, x, held.marked.real, tuple(states), weights)
    return output, *last
