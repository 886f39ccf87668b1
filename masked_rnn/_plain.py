"""The recurrence in plain ops, differentiable any number of times: what every backend falls back on for more than one.

T time, N batch, I input, P the state that is fed back, D directions, R rows of a packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._cells import CELLS, States, Weights
from ._lengths import Plan


def scan(
    mode: str, x: Tensor, live: Tensor | None, initial: States, weights: tuple[Weights, ...]
) -> tuple[Tensor, States]:
    """x (T, N, I), live (T, N, 1), initial states (D, N, P) -> output (T, N, D·P), last states (D, N, P).

    Padding may stand anywhere: the state is held across it.
    """
    steps = x.size(0)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    if live is not None:
        # Clean the input, not only the output: a gradient of zero times a padding of NaN is NaN.
        x = torch.where(live, x, zero)
    outputs, lasts = [], []
    for d, w in enumerate(weights):
        projected = F.linear(x, w.w_ih, w.b_ih)
        state = tuple(h[d] for h in initial)
        hidden: list[Tensor] = []
        for t in range(steps) if d == 0 else reversed(range(steps)):
            new = CELLS[mode].step(projected[t], state, w)
            if live is None:
                state = new
                hidden.append(new[0])
            else:
                state = tuple(torch.where(live[t], n, s) for n, s in zip(new, state, strict=True))
                hidden.append(torch.where(live[t], new[0], zero))
        if d == 1:
            hidden.reverse()
        outputs.append(torch.stack(hidden) if hidden else x.new_zeros(0, *initial[0].shape[1:]))
        lasts.append(state)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return output, tuple(torch.stack(states) for states in zip(*lasts, strict=True))


def scan_rows(mode: str, plan: Plan, x: Tensor, initial: States, weights: tuple[Weights, ...]) -> tuple[Tensor, States]:
    """As `scan`, but x (R, I) in the plan's order -> output (R, D·P)."""
    steps, at = len(plan.batch_sizes), plan.grid()
    padded = x.new_zeros(steps * plan.live, x.size(-1)).index_copy(0, at, x)
    live = torch.zeros(steps * plan.live, 1, dtype=torch.bool, device=x.device).index_fill(0, at, True)
    order = torch.arange(plan.live, device=x.device) if plan.order is None else plan.order
    output, last = scan(
        mode,
        padded.view(steps, plan.live, x.size(-1)),
        live.view(steps, plan.live, 1),
        tuple(h.index_select(1, order) for h in initial),
        weights,
    )
    return (
        output.flatten(0, 1).index_select(0, at),
        tuple(h.index_copy(1, order, new) for h, new in zip(initial, last, strict=True)),
    )


def scan_layers(
    mode: str,
    x: Tensor,
    initial: States,
    layers: Sequence[tuple[Weights, ...]],
    batch_sizes: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, States]:
    """What `nn.GRU` computes without dropout, over a padded batch or packed rows."""
    plan = None
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        plan = Plan(sizes, sizes[0], x.size(0), x.device)
    elif batch_first:
        x = x.transpose(0, 1)
    lasts = []
    for k, weights in enumerate(layers):
        D = len(weights)
        state = tuple(h[k * D : (k + 1) * D] for h in initial)
        x, last = scan(mode, x, None, state, weights) if plan is None else scan_rows(mode, plan, x, state, weights)
        lasts.append(last)
    if batch_first and plan is None:
        x = x.transpose(0, 1)
    return x, tuple(torch.cat(states) for states in zip(*lasts, strict=True))
