"""Reference recurrence in plain ops. `scan` runs it, and higher derivatives of `bptt` and cuDNN.

T time, N batch, I input, H hidden, P the state that is fed back, D directions, L layers, R rows of a packed batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._cells import STEPS, stack_layers
from .._plan import Plan, restore_states, sort_states
from .._segments import resets_at_real_steps, resets_backward
from .._spec import LayerWeights, Spec, States, Weights

Marks = tuple[bool, bool]
"""Whether it is given which steps are real, and before which ones the state is reset."""
Loop = Callable[[str, Weights, Marks, States, Sequence[Tensor], bool], tuple[States, Tensor]]
"""Runs the steps of one direction, as `unrolled` does."""


def advance(
    mode: str,
    w: Weights,
    marks: Marks,
    state: States,  # each (N, P or H)
    step: Sequence[Tensor],
) -> tuple[States, Tensor]:
    """Run one step of one direction; return the new state and the step's output (N, P).

    `step` is W_ih x_t + b_ih, then the marks.
    """
    x, *given = step
    has_real, has_cuts = marks
    start = tuple(torch.where(given[-1], 0, h) for h in state) if has_cuts else state
    new = STEPS[mode](x, start, w)
    if not has_real:
        return new, new[0]
    real = given[0]
    return tuple(torch.where(real, n, h) for n, h in zip(new, state, strict=True)), torch.where(real, new[0], 0)


def unrolled(
    mode: str,
    w: Weights,
    marks: Marks,
    state: States,  # each (N, P or H)
    given: Sequence[Tensor],  # each (T, N, ...)
    backward: bool,
) -> tuple[States, Tensor]:
    """Run `advance` for each step, from the last on if `backward`. Return the last state and the outputs (T, N, P).

    A graph that records it has the steps of this call.
    """
    # The gradient of each given[k][t] would be as large as given[k].
    steps = list(zip(*(t.unbind(0) for t in given), strict=True))
    outputs = []
    for now in reversed(steps) if backward else steps:
        state, output = advance(mode, w, marks, state, now)
        outputs.append(output)
    if backward:
        outputs.reverse()
    # Without steps: an empty tensor of the right width.
    return state, torch.stack(outputs) if outputs else given[0][..., : state[0].size(-1)]


def scan(
    mode: str,
    x: Tensor,  # (T, N, I)
    real: Tensor | None,  # (T, N, 1)
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
    resets: Tensor | None = None,  # (T, N, 1)
    loop: Loop = unrolled,
) -> tuple[Tensor, States]:
    """Run one layer step by step; return its output (T, N, D·P) and last states (D, N, P or H).

    Padding may be anywhere. The state is held across it. A reset at padding counts at the next real step.
    """
    if real is not None:
        # The input must be cleaned too: in backward, a zero gradient times a NaN in padding is NaN.
        x = torch.where(real, x, 0)
    anew = None if resets is None else resets_at_real_steps(resets, real)
    outputs, lasts = [], []
    for d, w in enumerate(weights):
        cuts = anew if anew is None or d == 0 else resets_backward(anew, real)
        marks = (real is not None, cuts is not None)
        steps = [F.linear(x, w.w_ih, w.b_ih), *(t for t in (real, cuts) if t is not None)]
        state = tuple(h[d] for h in initial)
        if real is None:
            state, output = loop(mode, w, marks, state, steps, d == 1)
        else:
            runs = real.any(0)
            clean = tuple(torch.where(runs, h, 0) for h in state)
            last, output = loop(mode, w, marks, clean, steps, d == 1)
            state = tuple(torch.where(runs, new, h) for new, h in zip(last, state, strict=True))
        outputs.append(output)
        lasts.append(state)
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
    spec: Spec,
    x: Tensor,  # (T, N, I), or (N, T, I) with batch_first; packed rows (R, I) with batch_sizes
    initial: States,  # each (L·D, N, P or H)
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,  # (T,)
    batch_first: bool,
) -> tuple[Tensor, States]:
    """Run all layers without dropout, over a padded batch or, if `batch_sizes` are given, over packed rows."""
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        plan = Plan(sizes, sizes[0], x.size(0), x.device)
        return scan_planned(spec, plan, x, initial, weights)

    def run_one(spec: Spec, x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States]:
        return scan(spec.mode, x, None, initial, weights)

    x = x.transpose(0, 1) if batch_first else x
    x, last = stack_layers(spec, x, initial, weights, run_one)
    return x.transpose(0, 1) if batch_first else x, last


def scan_planned(
    spec: Spec,
    plan: Plan,
    x: Tensor,  # (R, I)
    initial: States,  # each (L·D, N, P or H)
    weights: Sequence[Tensor],
) -> tuple[Tensor, States]:
    """Run all layers without dropout, over rows in the plan's order."""

    def run_one(spec: Spec, x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States]:
        return scan_rows(spec.mode, plan, x, initial, weights)

    return stack_layers(spec, x, initial, weights, run_one)
