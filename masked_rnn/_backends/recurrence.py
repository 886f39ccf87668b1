"""Reference recurrence in plain ops. `scan` runs it, and higher derivatives of `bptt` and cuDNN.

T time, N batch, I input, P the state that is fed back, D directions, R rows of a packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._cells import STEPS, LayerWeights, States, stack_layers
from .._plan import Plan, restore_states, sort_states
from .._segments import resets_at_real_steps


def scan(
    mode: str,
    x: Tensor,  # (T, N, I)
    real: Tensor | None,  # (T, N, 1)
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
    resets: Tensor | None = None,  # (T, N, 1)
) -> tuple[Tensor, States]:
    """Run one layer step by step; return its output (T, N, D·P) and last states (D, N, P or H).

    Padding may be anywhere. The state is held across it. A reset at padding counts at the next real step.
    """
    step, steps = STEPS[mode], x.size(0)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    if real is not None:
        # The input must be cleaned too: in backward, a zero gradient times a NaN in padding is NaN.
        x = torch.where(real, x, zero)
        runs = real.any(0)
    anew = None if resets is None else resets_at_real_steps(resets, real)
    outputs, lasts = [], []
    for d, w in enumerate(weights):
        projected = F.linear(x, w.w_ih, w.b_ih)
        inputs = projected.unbind(0)  # the gradient of each projected[t] would be as large as `projected`
        state = tuple(h[d] if real is None else torch.where(runs, h[d], zero) for h in initial)
        hidden: list[Tensor] = []
        is_cut = None
        """(N, 1), True if the state is reset before the step. Backward direction: if step t + 1 has a reset."""
        for t in range(steps) if d == 0 else reversed(range(steps)):
            if anew is not None and d == 0:
                is_cut = anew[t]
            start = state if is_cut is None else tuple(torch.where(is_cut, zero, h) for h in state)
            new = step(inputs[t], start, w)
            if real is None:
                state = new
                hidden.append(new[0])
            else:
                state = tuple(torch.where(real[t], n, s) for n, s in zip(new, state, strict=True))
                hidden.append(torch.where(real[t], new[0], zero))
            if anew is not None and d == 1:
                is_cut = anew[t] if real is None or is_cut is None else torch.where(real[t], anew[t], is_cut)
        if d == 1:
            hidden.reverse()
        # Without steps: an empty tensor of the right width.
        outputs.append(torch.stack(hidden) if hidden else projected[..., : initial[0].size(-1)])
        lasts.append(
            state if real is None else tuple(torch.where(runs, s, h[d]) for s, h in zip(state, initial, strict=True))
        )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return output, tuple(torch.stack(states) for states in zip(*lasts, strict=True))


def scan_rows(
    mode: str,
    plan: Plan,
    x: Tensor,  # (R, I)
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
) -> tuple[Tensor, States]:
    """As `scan`, for rows in the plan's order: x (R, I) -> output (R, D·P)."""
    steps, at = len(plan.batch_sizes), plan.padded_index()
    padded = x.new_zeros(steps * plan.sequences, x.size(-1)).index_copy(0, at, x)
    real = torch.zeros(steps * plan.sequences, 1, dtype=torch.bool, device=x.device).index_fill(0, at, True)
    output, last = scan(
        mode,
        padded.view(steps, plan.sequences, x.size(-1)),
        real.view(steps, plan.sequences, 1),
        tuple(sort_states(h, plan) for h in initial),
        weights,
    )
    output = output.flatten(0, 1).index_select(0, at)
    return output, tuple(restore_states(new, h, plan) for h, new in zip(initial, last, strict=True))


def scan_layers(
    mode: str,
    x: Tensor,  # (T, N, I), or (N, T, I) with batch_first; packed rows (R, I) with batch_sizes
    initial: States,  # each (L·D, N, P or H)
    layers: Sequence[LayerWeights],
    batch_sizes: Tensor | None,  # (T,)
    batch_first: bool,
) -> tuple[Tensor, States]:
    """Run all layers without dropout, over a padded batch or, if `batch_sizes` are given, over packed rows."""
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        plan = Plan(sizes, sizes[0], x.size(0), x.device)
        return stack_layers(x, initial, layers, lambda x, states, w: scan_rows(mode, plan, x, states, w))
    x = x.transpose(0, 1) if batch_first else x
    x, last = stack_layers(x, initial, layers, lambda x, states, w: scan(mode, x, None, states, w))
    return x.transpose(0, 1) if batch_first else x, last
