"""PyTorch's own kernel over the padded batch, each direction started at its own end: no host sync.

The forward direction reads padding only after a row's real steps, the backward direction runs over rows reversed in
place, so padding comes last there too. Outputs are zeroed at padding, the last state gathered at each row's last step.

T time, N batch, I input, P the state that is fed back, D directions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .._call import Call
from .._cells import LayerWeights, States, Weights, stack_layers
from .._plan import real_mask, reverse_index
from .._torch import is_traced, to_device
from .kernels import run_layer, run_stack


def run(call: Call) -> tuple[Tensor, States]:
    mode = call.layer.mode
    if call.is_plain():
        return run_stack(call, call.data, call.states)
    if call.lengths is not None and call.data.dim() == 3 and not is_traced() and call.steps == 1:
        idle = to_device(call.lengths == 0, call.data.device)
        return run_one_step(partial(run_stack, call), call.data, idle, call.states, call.batch_first)
    x, lengths, restore = call.padded_last()
    output, last = stack_layers(
        x, call.states, call.weights, lambda x, states, w: run_padded(mode, x, lengths, states, w), call.dropout
    )
    return restore(output), last


def run_padded(
    mode: str, x: Tensor, lengths: Tensor | None, initial: States, weights: LayerWeights
) -> tuple[Tensor, States]:
    """x (T, N, I), lengths (N,), initial states (D, N, P) -> output (T, N, D·P), last states (D, N, P)."""
    if lengths is None:
        return run_layer(mode, x, initial, weights)
    steps = x.size(0)
    real = real_mask(lengths, steps)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    x = torch.where(real, x, zero)
    runs = (lengths > 0).view(1, -1, 1)
    reverse = reverse_index(lengths, steps) if len(weights) == 2 else None
    outputs, lasts = [], []
    for d, w in enumerate(weights):
        own = x if d == 0 or reverse is None else x.gather(0, reverse.expand_as(x))
        before = tuple(h[d : d + 1] for h in initial)
        state = tuple(torch.where(runs, h, zero) for h in before)
        if mode == "LSTM":
            output, last = _with_cell_states(own, real, lengths, state, w)
        else:
            output, _ = run_layer(mode, own, state, (w,))
            last = (_at_last_step(output, lengths),)
        if d == 1 and reverse is not None:
            output = output.gather(0, reverse.expand_as(output))
        outputs.append(torch.where(real, output, torch.zeros((), dtype=output.dtype, device=output.device)))
        lasts.append(tuple(torch.where(runs, new, h.to(new.dtype)) for new, h in zip(last, before, strict=True)))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return output, tuple(torch.cat(states) for states in zip(*lasts, strict=True))


def run_one_step(
    run: Callable[[Tensor, States], tuple[Tensor, States]],
    x: Tensor,
    idle: Tensor,
    initial: States,
    batch_first: bool,
) -> tuple[Tensor, States]:
    """A batch of one step, which rows marked in `idle` (N,) do not have: they run over zeros, and keep their state."""
    idle = idle.unsqueeze(1)
    at = idle.unsqueeze(1) if batch_first else idle
    zero = x.new_zeros(())
    output, last = run(torch.where(at, zero, x), tuple(torch.where(idle, zero, h) for h in initial))
    last = tuple(torch.where(idle, h.to(new.dtype), new) for h, new in zip(initial, last, strict=True))
    return torch.where(at, zero.to(output.dtype), output), last


def _at_last_step(output: Tensor, lengths: Tensor) -> Tensor:
    """(1, N, P): each row's output at its last step; at its first where it has none."""
    index = (lengths - 1).clamp(min=0).view(1, -1, 1).expand(1, -1, output.size(-1))
    return output.gather(0, index)


def _with_cell_states(x: Tensor, real: Tensor, lengths: Tensor, initial: States, w: Weights) -> tuple[Tensor, States]:
    """The LSTM returns c only after the last step, so c must stand still over padding until then.

    One more input, 1 at padding, drives the gates there to i = 0 and f = 1 exactly: c' = f c + i g = c.
    """
    hidden = w.w_hh.size(0) // 4
    drive = w.w_ih.new_zeros(4, hidden, w.w_ih.size(1) + 1)
    drive[0, :, -1], drive[1, :, -1] = -_SATURATING, _SATURATING
    # Padded, not concatenated: the gradient of a part of a concatenation is not contiguous.
    w = w._replace(w_ih=F.pad(w.w_ih, (0, 1)) + drive.flatten(0, 1))
    output, (_, c) = run_layer("LSTM", torch.cat([x, (~real).to(x.dtype)], -1), initial, (w,))
    return output, (_at_last_step(output, lengths), c)


_SATURATING = 1e4
"""Sigmoid of it is 1, of its negative 0, in every dtype."""
