"""Finds which rows run at which step, and moves steps, rows and states there and back.

T time, N batch, D directions, H hidden.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._memory import Array, as_array
from ._torch import to_device


class Plan:
    """Which rows run at which step: step 0 of every sequence that has one, longest first, then step 1, ...

    Gathering the input's rows by `index` packs, sorts and drops padding in one move; scattering by it undoes all three.
    """

    def __init__(
        self,
        batch_sizes: list[int],
        batch: int,
        size: int,
        device: torch.device,
        index: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        self.batch_sizes = batch_sizes
        self.batch = batch
        self.size = size
        """How many rows the input has, padding included."""
        self.device = device
        self.index = index
        """The place in the input of each row that runs. None: all rows of the input run, in order."""
        self.order = order
        """The sequence at each sorted place. None: the batch is in sorted order."""
        self.sequences = batch_sizes[0] if batch_sizes else 0
        """The number of sequences that have a step."""
        self.starts = [0, *accumulate(batch_sizes)]
        """The first row of each step."""
        self.rows = self.starts[-1]

    def share_of_padding(self) -> float:
        """Return the share of padding if all sequences that have a step are padded to the longest."""
        return 1 - self.rows / max(self.sequences * len(self.batch_sizes), 1)

    def _tensor(self, array: Array) -> Tensor:
        return to_device(torch.from_numpy(array), self.device)

    @cached_property
    def step_tables(self) -> tuple[array[int], array[int]]:
        """The number of sequences at each step, then 0; and the first row of each step, then the number of rows."""
        return array("q", [*self.batch_sizes, 0]), array("q", self.starts)

    @cached_property
    def _step_and_place(self) -> tuple[Array, Array]:
        return _step_and_place(np.array(self.batch_sizes, np.int64))

    @cached_property
    def _last_step(self) -> Array:
        """The last step of each sequence, in sorted order."""
        sizes = np.array([*self.batch_sizes, 0], np.int64)
        return np.repeat(np.arange(len(self.batch_sizes)), sizes[:-1] - sizes[1:])[::-1].copy()

    @cached_property
    def reversed_rows(self) -> Tensor:
        """For each row, the row in its place when every sequence is reversed within its own length."""
        step, place = self._step_and_place
        return self._tensor(np.array(self.starts)[self._last_step[place] - step] + place)

    @cached_property
    def last(self) -> Tensor:
        """The row of each sequence's last step, in sorted order."""
        return self._tensor(np.array(self.starts)[self._last_step] + np.arange(self.sequences))

    @cached_property
    def previous(self) -> Tensor:
        """For each row, the row of the step before. `sequences` rows with the initial states come first."""
        before = np.array([self.sequences, *self.batch_sizes[:-1]], np.int64)
        return self._tensor(np.arange(self.sequences, self.sequences + self.rows) - np.repeat(before, self.batch_sizes))

    @cached_property
    def sorted_lengths(self) -> Tensor:
        """The lengths of the sequences that have a step, longest first."""
        return self._tensor(self._last_step + 1)

    def padded_index(self, order: Tensor | None = None) -> Tensor:
        """Return the place of each row in a sorted padded batch `(T, sequences)`, or in `(T, N)` in the given order."""
        step, place = map(self._tensor, self._step_and_place)
        return step * self.sequences + place if order is None else step * self.batch + order[place]

    def chunks(self, rows: int) -> list[Chunk]:
        """Split the steps into chunks of about this many rows, each of at least one step."""
        chunks, first = [], 0
        while first < len(self.batch_sizes):
            start = self.starts[first]
            stop = max(first + 1, bisect_right(self.starts, start + rows) - 1)
            before = self.batch_sizes[first - 1] if first else self.sequences
            after = self.batch_sizes[stop] if stop < len(self.batch_sizes) else 0
            chunks.append(Chunk(first, start, self.starts[stop] - start, self.batch_sizes[first:stop], before, after))
            first = stop
        return chunks


class Chunk(NamedTuple):
    """Consecutive steps."""

    first: int
    """The first step"""
    start: int
    """The first row"""
    rows: int
    """The number of rows"""
    sizes: list[int]
    """The number of sequences at each step"""
    before: int
    """The number of sequences at the step before the first"""
    after: int
    """The number of sequences at the step after the last"""


def _step_and_place(sizes: Array) -> tuple[Array, Array]:
    """Return each row's step, and its place among the sequences at that step."""
    steps = np.repeat(np.arange(len(sizes)), sizes)
    return steps, np.arange(len(steps)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def plan_full(batch: int, steps: int, batch_first: bool, device: torch.device) -> Plan:
    """Plan a batch without padding."""
    index = None
    if batch_first and batch > 1:
        index = torch.arange(batch * steps, device=device).view(batch, steps).t().reshape(-1)
    return Plan([batch] * steps if batch else [], batch, batch * steps, device, index)


def plan_padded(
    lengths: Tensor,  # (N,)
    steps: int,
    batch_first: bool,
    device: torch.device,
    *,
    is_sorted: bool = False,
) -> Plan:
    """Plan a padded batch, `(N, T)` or `(T, N)`."""
    batch = lengths.size(0)
    starts, stride = np.arange(batch), batch
    if batch_first:
        starts, stride = starts * steps, 1
    return plan_rows(as_array(lengths), starts, stride, batch * steps, device, is_sorted=is_sorted)


def plan_masked(mask: Tensor, batch_first: bool, device: torch.device, *, is_sorted: bool = False) -> Plan:
    """Plan a padded batch by its mask (T, N)."""
    real = as_array(mask)
    return plan_listed(real.sum(0), real_rows(real, batch_first), real.size, device, is_sorted=is_sorted)


def plan_listed(lengths: Array, rows: Array, size: int, device: torch.device, *, is_sorted: bool = False) -> Plan:
    """Plan sequences whose rows are listed one sequence after the other."""
    starts = np.cumsum(lengths) - lengths
    return plan_rows(lengths, starts, 1, size, device, is_sorted=is_sorted, rows=rows)


def real_rows(real: Array, batch_first: bool) -> Array:
    """Return the rows of the real steps, one sequence after the other; `real` is (T, N)."""
    steps, batch = real.shape
    sequence, time = real.T.nonzero()
    rows: Array = sequence * steps + time if batch_first else time * batch + sequence
    return rows


def plan_rows(
    lengths: Array,
    starts: Array,
    stride: int,
    size: int,
    device: torch.device,
    *,
    is_sorted: bool = False,
    rows: Array | None = None,
) -> Plan:
    """Plan a batch whose row `(n, t)` lies at `at = starts[n] + stride * t`, or at `rows[at]` if `rows` is given."""
    counts, batch, order = lengths, len(lengths), None
    if not is_sorted:
        order = np.argsort(-counts, kind="stable")
        counts = counts[order]
    steps = counts[0] if batch else 0
    sizes = batch - np.searchsorted(counts[::-1], np.arange(steps), side="right")
    step, place = _step_and_place(sizes)
    index = starts[place if order is None else order[place]] + stride * step
    index = index if rows is None else rows[index]
    batch_sizes = sizes.tolist()
    sequences = None
    if order is not None:
        sequences = to_device(torch.from_numpy(order[: batch_sizes[0] if batch_sizes else 0]), device)
    return Plan(batch_sizes, batch, size, device, to_device(torch.from_numpy(index), device), sequences)


def move_to_front(
    x: Tensor,  # (T, N, I)
    mask: Tensor,  # (T, N)
) -> tuple[Tensor, Tensor]:
    """Move each sequence's real steps to its front. Also return each step's new place (T, N), T for padding."""
    steps = x.size(0)
    place = torch.where(mask, mask.to(torch.int64).cumsum(0) - 1, steps)  # ONNX has no cumsum of bools
    index = place.unsqueeze(-1).expand_as(x)
    moved = x.new_zeros(steps + 1, *x.shape[1:]).scatter(0, index, x)
    return moved[:steps], place


def move_back(
    x: Tensor,  # (T, N, P)
    place: Tensor,  # (T, N)
) -> Tensor:
    """Undo `move_to_front`. The result is zero at padding."""
    padded = torch.cat([x, torch.zeros_like(x[:1])])
    return padded.gather(0, place.unsqueeze(-1).expand(*place.shape, x.size(-1)))


def real_mask(
    lengths: Tensor,  # (N,)
    steps: int,
) -> Tensor:
    """Return a mask (T, N, 1), True at real steps."""
    return (torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths).unsqueeze(-1)


def reverse_index(
    lengths: Tensor,  # (N,)
    steps: int,
) -> Tensor:
    """Return (T, N, 1): for each step, the step in its place when every sequence is reversed within its own length.

    Lengths 3 and 1 of 3 steps give `[[2, 0], [1, 1], [0, 2]]`. Padding stays in its place.
    """
    time = torch.arange(steps, device=lengths.device).unsqueeze(1)
    return torch.where(time < lengths, lengths - 1 - time, time).unsqueeze(-1)


def sort_states(states: Tensor, plan: Plan) -> Tensor:
    """Return those of the states (D, N, H) whose sequences have a step, in the plan's order: (D, B, H)."""
    return states.narrow(1, 0, plan.sequences) if plan.order is None else states.index_select(1, plan.order)


def restore_states(
    last: Tensor,  # (D, B, H)
    initial: Tensor,  # (D, N, H)
    plan: Plan,
) -> Tensor:
    """Undo `sort_states`: return (D, N, H). A sequence without steps gets its initial state."""
    if plan.order is not None:
        return initial.index_copy(1, plan.order, last)
    rest = plan.batch - plan.sequences
    return torch.cat([last, initial.narrow(1, plan.sequences, rest)], 1) if rest else last
