"""Cuts rows at their resets. Each segment is then a sequence, and all run side by side.

T time, N batch, S segments, R real steps, P state, L layers, D directions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._memory import Array, as_array
from ._plan import Plan, plan_listed, real_mask, real_rows
from ._torch import to_device


class Move(NamedTuple):
    """Some of a batch's rows, and for each the segment that its state goes to or comes from."""

    rows: Tensor
    segments: Tensor


Moves = tuple[Move, ...]
"""One for each direction."""


class Segments:
    """The segments of a padded batch, and how states move between rows and segments.

    Forward direction: a row's first segment starts from the row's initial state, unless it begins with a reset. The
    row's last state is that of its last segment. Backward direction: the last segment starts from the initial state,
    and the row's last state is that of its first segment.
    """

    def __init__(
        self,
        resets: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        directions: int,
        batch_first: bool,
        device: torch.device,
    ) -> None:
        """Find the segments. `resets` and `mask` are (T, N), `lengths` is (N,), all on the CPU."""
        marks = mask if lengths is None else real_mask(lengths, resets.size(0)).squeeze(-1)
        real = torch.ones_like(resets) if marks is None else marks
        row, time = as_array(real).T.nonzero()
        anew = as_array(resets_at_real_steps(resets, marks))[time, row]
        opens = np.append(True, row[1:] != row[:-1])[: len(row)]
        begins = (opens | anew).nonzero()[0]
        first, anew = opens[begins], anew[begins]
        last = np.append(first[1:], True)[: len(first)]
        self.lengths: Array = np.diff(np.append(begins, len(row)))
        self.plan: Plan = plan_listed(self.lengths, real_rows(as_array(real), batch_first), real.numel(), device)

        def move(where: Array) -> Move:
            segments = where.nonzero()[0]
            return Move(*(to_device(torch.from_numpy(t), device) for t in (row[begins[segments]], segments)))

        starts, ends = move(first), move(last)
        self._enter: Moves = (move(first & ~anew), ends)[:directions]
        self._leave: Moves = (ends, starts)[:directions]

    def initial(self, states: Tensor) -> Tensor:
        """Return the initial states of the segments: (L·D, N, P) -> (L·D, S, P), zero after a reset."""
        return self._to_segments(states, self._enter)

    def last(self, states: Tensor, initial: Tensor) -> Tensor:
        """Return the last states of the rows: (L·D, S, P) -> (L·D, N, P). A row without steps keeps `initial`."""
        return self._to_rows(states, initial, self._leave)

    def initial_gradient(self, grad: Tensor, d_last: Tensor) -> Tensor:
        """Backward of `initial`. A row without steps gets the gradient of its last state."""
        rest = d_last.index_fill(1, self._leave[0].rows, 0)  # zero for rows with a step
        return self._to_rows(grad, rest, self._enter)

    def last_gradient(self, d_last: Tensor) -> Tensor:
        """Backward of `last`."""
        return self._to_segments(d_last, self._leave)

    def _to_segments(self, states: Tensor, moves: Moves) -> Tensor:
        D = len(moves)
        shape = (states.size(0) // D, len(self.lengths), states.size(2))
        return _interleave(
            [
                states.new_zeros(shape).index_copy(1, move.segments, states[d::D].index_select(1, move.rows))
                for d, move in enumerate(moves)
            ]
        )

    def _to_rows(self, states: Tensor, onto: Tensor, moves: Moves) -> Tensor:
        D = len(moves)
        return _interleave(
            [
                onto[d::D].index_copy(1, move.rows, states[d::D].index_select(1, move.segments))
                for d, move in enumerate(moves)
            ]
        )


def _interleave(directions: list[Tensor]) -> Tensor:
    """Return the states of D directions, each (L, N, P), as (L·D, N, P)."""
    return directions[0] if len(directions) == 1 else torch.stack(directions, 1).flatten(0, 1)


def resets_at_real_steps(
    resets: Tensor,  # (T, ...)
    real: Tensor | None,  # (T, ...)
) -> Tensor:
    """Move each reset at padding to the next real step."""
    if real is None or resets.numel() == 0:
        return resets
    seen = resets.to(torch.int64).cumsum(0)
    before = torch.where(real, seen, 0).cummax(0).values
    is_first = torch.arange(real.size(0), device=real.device).eq(0).view(-1, *[1] * (real.dim() - 1))
    return real & (seen > torch.where(is_first, 0, before.roll(1, 0)))


def resets_backward(
    anew: Tensor,  # (T, ...), at real steps only
    real: Tensor | None,  # (T, ...)
) -> Tensor:
    """Return the steps before which the backward direction starts anew: the next real step in time has a reset."""
    is_last = torch.arange(anew.size(0), device=anew.device).eq(anew.size(0) - 1).view(-1, *[1] * (anew.dim() - 1))
    before = anew.roll(-1, 0) & ~is_last
    return before if real is None else resets_at_real_steps(before.flip(0), real.flip(0)).flip(0)
