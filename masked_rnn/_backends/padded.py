"""PyTorch's kernel over the padded batch. It does not wait for the device, except for a nested tensor.

The backward direction runs over sequences that are reversed within their own length, so padding comes last in both
directions. Outputs are zeroed at padding. The last h is gathered at each sequence's last step; an LSTM's c is held by
its gates.

T time, N batch, I input, H hidden, G gates, P the state that is fed back, D directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._call import Call
from .._cells import HOLD, relu_drive, stack_layers
from .._plan import real_mask, reverse_index
from .._spec import LayerWeights, Spec, States, Weights
from .._torch import to_device
from . import cudnn
from .kernels import run_layer, run_stack, why_no_lstm_kernel


def why_not(call: Call) -> str | None:
    """Return the reason why this backend can't run a call. None: it can."""
    reason = call.context.only_scan or call.why_unreadable(reads_plan=call.form.is_rows)
    if reason:
        return reason
    if not call.parameters[0].is_complex():
        return why_no_lstm_kernel(call, torch.is_grad_enabled())
    if call.spec.mode == "LSTM" and not call.is_full and not _has_one_step(call):
        return "it saturates an LSTM's gates over padding, where PyTorch's complex sigmoid is NaN"
    return None


def run(call: Call) -> tuple[Tensor, States]:
    if call.is_full:
        return run_stack(call, call.data, call.states)
    if call.lengths is not None and _has_one_step(call):
        return _run_one_step(call, call.states, to_device(call.lengths == 0, call.data.device))
    x, lengths, restore = call.padded_last()
    padding = None if lengths is None else find_padding(lengths, x.size(0), call.spec.bidirectional)

    def run_one(spec: Spec, x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States]:
        return run_padded(spec, x, padding, initial, weights)

    output, last = stack_layers(call.spec, x, call.states, call.parameters, run_one, call.dropout)
    return restore(output), last


def _has_one_step(call: Call) -> bool:
    return not call.form.is_rows and call.form.steps == 1 and not call.context.traced


class Padding(NamedTuple):
    """Where the padding is, found once for all layers."""

    real: Tensor
    """(T, N, 1), True at real steps"""
    runs: Tensor
    """(1, N, 1), True for sequences that have a step"""
    last: Tensor
    """(1, N, 1), the last step of each sequence, or 0"""
    reverse: Tensor | None
    """(T, N, 1), for each step the step in its place in the backward direction. None: there is none"""


def find_padding(lengths: Tensor, steps: int, bidirectional: bool) -> Padding:
    return Padding(
        real=real_mask(lengths, steps),
        runs=(lengths > 0).view(1, -1, 1),
        last=(lengths - 1).clamp(min=0).view(1, -1, 1),
        reverse=reverse_index(lengths, steps) if bidirectional else None,
    )


def run_padded(
    spec: Spec,
    x: Tensor,  # (T, N, I)
    padding: Padding | None,
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
) -> tuple[Tensor, States]:
    """Run one layer; return its output (T, N, D·P) and last states (D, N, P or H)."""
    if padding is None:
        return run_layer(spec, x, initial, weights)
    real, runs, at_last, reverse = padding
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    x = torch.where(real, x, zero)
    is_driven = spec.mode == "LSTM" or (spec.mode == "RNN_RELU" and x.is_floating_point())
    one_direction = spec.changed(bidirectional=False, input_size=spec.input_size + is_driven)
    outputs, lasts = [], []
    for d, w in enumerate(weights):
        steps = x if d == 0 or reverse is None else x.gather(0, reverse.expand_as(x))
        before = tuple(h[d : d + 1] for h in initial)
        state = tuple(torch.where(runs, h, zero) for h in before)
        if is_driven:
            hold = _with_cell_states_held if spec.has_cell_state else _with_states_at_zero
            steps, w = hold(steps, real, w)
        output, (_, *cells) = run_layer(one_direction, steps, state, (w,))
        last = (output.gather(0, at_last.expand(1, -1, output.size(-1))), *cells)
        if d == 1 and reverse is not None:
            output = output.gather(0, reverse.expand_as(output))
        outputs.append(torch.where(real, output, zero.to(output.dtype)))
        lasts.append(tuple(torch.where(runs, new, h.to(new.dtype)) for new, h in zip(last, before, strict=True)))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return output, tuple(torch.cat(states) if len(states) > 1 else states[0] for states in zip(*lasts, strict=True))


def _run_one_step(call: Call, initial: States, idle: Tensor) -> tuple[Tensor, States]:
    """Run a batch of one step. Sequences without a step, marked in `idle` (N,), run over zeros and keep their state."""
    x, idle = call.data, idle.unsqueeze(1)
    at = idle.unsqueeze(1) if call.form.batch_first else idle
    zero = x.new_zeros(())
    states = [torch.where(idle, zero, h) for h in initial]
    output, last = run_stack(call, torch.where(at, zero, x), tuple(states))
    last = tuple([torch.where(idle, h.to(new.dtype), new) for h, new in zip(initial, last, strict=True)])
    return torch.where(at, zero.to(output.dtype), output), last


def _with_cell_states_held(x: Tensor, real: Tensor, w: Weights) -> tuple[Tensor, Weights]:
    """Add an input that holds an LSTM's c over padding, because the kernel returns c only after step T.

    It is 1 at padding, and drives the gates there to i = 0 and f = 1 exactly, so that c' = f c + i g = c.
    """
    drive = w.w_ih.new_zeros(4, w.w_hh.size(0) // 4)
    drive[0], drive[1] = -HOLD, HOLD
    return _driven_at_padding(x, real, w, drive.flatten())


def _with_states_at_zero(x: Tensor, real: Tensor, w: Weights) -> tuple[Tensor, Weights]:
    """Add an input that makes the state of a relu RNN zero over padding.

    Otherwise the state could grow there to infinity, and its gradient would be 0 · inf = NaN. The input is 1 at
    padding, with a weight that makes the argument of relu negative.
    """
    return _driven_at_padding(x, real, w, w.w_ih.new_full((w.w_hh.size(0),), relu_drive(cudnn.running_dtype(x))))


def _driven_at_padding(
    x: Tensor,  # (T, N, I)
    real: Tensor,  # (T, N, 1)
    w: Weights,
    drive: Tensor,  # (G·H,)
) -> tuple[Tensor, Weights]:
    """Add an input that is 1 at padding and 0 elsewhere, with `drive` as its weights."""
    # F.pad, because after torch.cat the gradient of w_ih would not be contiguous. If w_ih has one row, the gradient of
    # F.pad has the strides of a wide row. The views give it those of w_ih.
    w_ih = w.w_ih.flatten().view(w.w_ih.shape)
    wide = F.pad(w_ih, (0, 1)) + F.pad(drive.unsqueeze(1), (w_ih.size(1), 0))
    return torch.cat([x, (~real).to(x.dtype)], -1), w._replace(w_ih=wide)
