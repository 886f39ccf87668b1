"""What both kinds of loops share: how one layer runs, what it saves for backward, how states are laid out.

B sequences that have a step, N all, R rows that run, P state that is fed back, H hidden, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._cells import LayerWeights, States
from ..._memory import copied
from ..._plan import Plan, restore_states, sort_states
from .ops_cells import CELLS, Cell

Shape = tuple[int, ...]


class LayerRun(NamedTuple):
    """How one layer runs: everything but its tensors."""

    mode: str
    directions: int
    plan: Plan
    input_is_padded: bool
    """True: the input is the caller's, with padding. False: it holds only the rows that run, in the plan's order."""
    output_is_padded: bool
    """True: the output must have the layout of the caller's input. False: that of the rows that run."""

    def cell(self, weights: LayerWeights) -> Cell:
        return CELLS[self.mode](weights)

    def rows_at(self, is_padded: bool) -> list[Tensor | None]:
        """Return the index of each direction's rows: in the caller's layout if `is_padded`, else in the rows that run.

        None: in order.
        """
        index = self.plan.index if is_padded else None
        if self.directions == 1:
            return [index]
        return [index, self.plan.reversed_rows if index is None else index[self.plan.reversed_rows]]

    @property
    def output_is_history(self) -> bool:
        """Whether the caller's output has the same rows as the saved states."""
        return self.output_is_padded and self.directions == 1 and self.plan.index is None

    @property
    def is_paired(self) -> bool:
        """Whether two directions run as a batch of two."""
        return self.directions == 2

    def shape(self, *sizes: int) -> Shape:
        """Return the shape of a tensor that all directions share: (2, *sizes) for two."""
        return (2, *sizes) if self.directions == 2 else sizes


class Saved(NamedTuple):
    """What backward needs: the states, initial ones first, then after every row; and each row's activations."""

    history: States
    """Each (D, B + R, P), the LSTM's c (D, B + R, H). With one direction, there is no dimension D."""
    buffer: Tensor | None
    """(D, R, width · H)"""


def new_history(
    layer_run: LayerRun,
    x: Tensor,  # (P, I) or (R, I), for its dtype and device
    initial: Sequence[Tensor],  # each (D, N, P or H)
) -> States:
    plan = layer_run.plan
    return tuple([x.new_empty(layer_run.shape(plan.sequences + plan.rows, h.size(-1))) for h in initial])


def packed_states(
    layer_run: LayerRun,
    states: Tensor,  # (D, N, H)
) -> Tensor:
    """Return the states of the sequences that run, in the plan's order: (D, B, H); (B, H) for one direction."""
    states = sort_states(states, layer_run.plan)
    return states if layer_run.is_paired else states[0]


def final_states(
    layer_run: LayerRun,
    history: Tensor,  # (D, B + R, H)
    initial: Tensor,  # (D, N, H)
) -> Tensor:
    """Return each sequence's last state, (D, N, H). A sequence without steps keeps its initial one."""
    last = history.index_select(-2, layer_run.plan.sequences + layer_run.plan.last)
    return restore_states(last if layer_run.is_paired else last.unsqueeze(0), initial, layer_run.plan)


def last_gradient(
    initial: Tensor,  # (D, N, H)
    d_last: Tensor | None,  # (D, N, H)
) -> Tensor:
    """Return a copy of the last state's gradient. For a sequence without steps it is the initial state's gradient."""
    if d_last is None:
        return torch.zeros_like(initial, memory_format=torch.contiguous_format)
    return copied(d_last)


def initial_gradient(
    layer_run: LayerRun,
    carried: Tensor | None,  # (D, B, H), None if no step ran
    d_last: Tensor | None,  # (D, N, H)
    initial: Tensor,  # (D, N, H)
) -> Tensor:
    """Return the initial state's gradient: `carried` back through the steps; without steps, the last state's."""
    grad = last_gradient(initial, d_last)
    if carried is None:
        return grad
    return restore_states(carried if layer_run.is_paired else carried.unsqueeze(0), grad, layer_run.plan)
