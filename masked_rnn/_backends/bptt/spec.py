"""What one layer's run is, what it saves for backward, and how states come in and go out: alike for all loops.

B sequences that have a step, N all, R rows that run, P state that is fed back, H hidden, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._cells import LayerWeights, States
from ..._memory import with_memory
from ..._plan import Plan, restore_states, sort_states
from .cells import CELLS, Cell


class LayerSpec(NamedTuple):
    """What one layer's run is, apart from its tensors."""

    mode: str
    directions: int
    plan: Plan
    gather: bool
    """The input lies as the caller's does, padding and all; False: as rows that run."""
    scatter: bool
    """The output is wanted as the caller's input lies; False: as rows that run."""

    def cell(self, weights: LayerWeights) -> Cell:
        return CELLS[self.mode](weights)

    def rows_at(self, there: bool) -> list[Tensor | None]:
        """Where each direction's rows lie, in the caller's input or among the rows that run; None: in order."""
        index = self.plan.index if there else None
        if self.directions == 1:
            return [index]
        return [index, self.plan.reversed_rows if index is None else index[self.plan.reversed_rows]]

    @property
    def output_is_history(self) -> bool:
        """Whether the output that the caller gets is the states at every row, as they stand."""
        return self.scatter and self.directions == 1 and self.plan.index is None

    @property
    def pair(self) -> tuple[int, ...]:
        return (2,) if self.directions == 2 else ()


class Saved(NamedTuple):
    """What backward needs: each state at every row, behind its initial value, and each row's activations."""

    history: States
    """Each (D, B + R, P), the LSTM's c (D, B + R, H); without D for one direction"""
    buffer: Tensor | None
    """(D, R, width H)"""


def history_shapes(spec: LayerSpec, initial: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [(*spec.pair, spec.plan.sequences + spec.plan.rows, h.size(-1)) for h in initial]


def buffer_shape(spec: LayerSpec, weights: LayerWeights) -> tuple[int, ...] | None:
    cell = CELLS[spec.mode]
    hidden = weights[0].w_hh.size(0) // cell.gates
    return (*spec.pair, spec.plan.rows, cell.width * hidden) if cell.saves_buffer else None


def new_history(spec: LayerSpec, x: Tensor, initial: Sequence[Tensor]) -> States:
    return tuple(x.new_empty(shape) for shape in history_shapes(spec, initial))


def new_saved(spec: LayerSpec, x: Tensor, initial: Sequence[Tensor], weights: LayerWeights) -> Saved:
    buffer = buffer_shape(spec, weights)
    return Saved(new_history(spec, x, initial), None if buffer is None else x.new_empty(buffer))


def pick_states(spec: LayerSpec, states: Tensor) -> Tensor:
    """(D, N, H) -> (D, B, H), sorted; (B, H) for one direction."""
    states = sort_states(states, spec.plan)
    return states if spec.pair else states[0]


def place_last(spec: LayerSpec, history: Tensor, initial: Tensor) -> Tensor:
    last = history.index_select(-2, spec.plan.sequences + spec.plan.last)
    return restore_states(last if spec.pair else last.unsqueeze(0), initial, spec.plan)


def last_gradient(initial: Tensor, d_last: Tensor | None) -> Tensor:
    """The last state's gradient, in memory of its own; of a row without steps it is the initial state's, too."""
    if d_last is None:
        return torch.zeros_like(initial, memory_format=torch.contiguous_format)
    return with_memory(d_last).clone(memory_format=torch.contiguous_format)


def place_initial(spec: LayerSpec, carried: Tensor | None, d_last: Tensor | None, initial: Tensor) -> Tensor:
    """The initial state's gradient: what came back through the steps; of a row without steps, its last state's."""
    grad = last_gradient(initial, d_last)
    if carried is None:
        return grad
    return restore_states(carried if spec.pair else carried.unsqueeze(0), grad, spec.plan)
