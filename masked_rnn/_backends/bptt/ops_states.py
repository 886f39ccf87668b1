"""Rows and states of one layer in the loops of PyTorch's ops, where two directions run as a batch of two.

B sequences that have a step, N all, R rows that run, P state that is fed back, H hidden, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._memory import copied
from ..._plan import restore_states, sort_states
from ..._spec import Shape
from .job import Job


def rows_at(job: Job, is_padded: bool) -> list[Tensor | None]:
    """Return the index of each direction's rows: in the caller's layout if `is_padded`, else in the rows that run.

    None: in order.
    """
    index = job.plan.index if is_padded else None
    if not job.spec.bidirectional:
        return [index]
    return [index, job.plan.reversed_rows if index is None else index[job.plan.reversed_rows]]


def output_is_history(job: Job) -> bool:
    """Return whether the caller's output has the same rows as the saved states."""
    return job.output_is_padded and not job.spec.bidirectional and job.plan.index is None


def shape_of_both(job: Job, *sizes: int) -> Shape:
    """Return the shape of a tensor that both directions share: (2, *sizes). With one direction, `sizes`."""
    return (2, *sizes) if job.spec.bidirectional else sizes


def packed_states(
    job: Job,
    states: Tensor,  # (D, N, P or H)
) -> Tensor:
    """Return the states of the sequences that run, in the plan's order: (D, B, P or H); without D for one direction."""
    states = sort_states(states, job.plan)
    return states if job.spec.bidirectional else states[0]


def final_states(
    job: Job,
    history: Tensor,  # (D, B + R, P or H)
    initial: Tensor,  # (D, N, P or H)
) -> Tensor:
    """Return each sequence's last state, (D, N, P or H). A sequence without steps keeps its initial one."""
    last = history.index_select(-2, job.plan.sequences + job.plan.last)
    return restore_states(last if job.spec.bidirectional else last.unsqueeze(0), initial, job.plan)


def last_gradient(
    initial: Tensor,  # (D, N, P or H)
    d_last: Tensor | None,  # (D, N, P or H)
) -> Tensor:
    """Return a copy of the last state's gradient. For a sequence without steps it is the initial state's gradient."""
    if d_last is None:
        return torch.zeros_like(initial, memory_format=torch.contiguous_format)
    return copied(d_last)


def initial_gradient(
    job: Job,
    carried: Tensor | None,  # (D, B, P or H), None if no step ran
    d_last: Tensor | None,  # (D, N, P or H)
    initial: Tensor,  # (D, N, P or H)
) -> Tensor:
    """Return the initial state's gradient: `carried` back through the steps; without steps, the last state's."""
    grad = last_gradient(initial, d_last)
    if carried is None:
        return grad
    return restore_states(carried if job.spec.bidirectional else carried.unsqueeze(0), grad, job.plan)
