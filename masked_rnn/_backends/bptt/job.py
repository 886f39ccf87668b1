"""A job: how a stack of layers runs in our loops, and what it saves for backward. Everything but its tensors.

T steps, N sequences, B that have a step, R rows that run, H hidden, P state that is fed back, D directions, L layers.
"""

from __future__ import annotations

from array import array
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._plan import Plan, plan_full, plan_padded
from ..._spec import Shape, Spec, States
from .ops_cells import CELLS

Gradients = tuple[Tensor | None, States, list[Tensor] | None]
"""Those of x, of the given initial states and of the weights. None: not wanted"""


class Job:
    """How a stack of layers runs.

    Which rows run is given by lengths, or by a plan. Either can be made from a padded batch's lengths; an index, as of
    a mask, needs a plan.
    """

    def __init__(
        self,
        spec: Spec,
        batch: int,
        steps: int,
        batch_first: bool,
        lengths: array[int] | None = None,  # N numbers. None: all are T
        counts: tuple[int, int] | None = None,  # B, R. None: N, N·T
        plan: Plan | None = None,  # in place of lengths
        input_is_padded: bool = True,
        output_is_padded: bool = True,
    ) -> None:
        self.spec = spec
        self.batch = batch
        self.steps = steps
        self.batch_first = batch_first
        self.lengths = lengths
        self.given_plan = plan
        self.input_is_padded = input_is_padded
        """True: the input has the caller's layout, with padding. False: only the rows that run, in the plan's order."""
        self.output_is_padded = output_is_padded
        self.sequences, self.rows = counts or (batch if steps else 0, batch * steps)
        self.padded_rows = batch * steps
        """The number of rows in the caller's layout"""
        if plan is not None:
            self.sequences, self.rows, self.padded_rows = plan.sequences, plan.rows, plan.size
        self.first_is_flat = False
        """Whether initial states are (N, L·D·P), as the layer returns them; else (L·D, N, P)."""
        self.last_is_flat = False
        self.dropped: array[int] | None = None
        """(N,) bytes, 1 where the forward direction starts from zeros although a state is given. For one step"""

    @cached_property
    def plan(self) -> Plan:
        if self.given_plan is not None:
            return self.given_plan
        device = torch.device("cpu")
        if self.lengths is None:
            return plan_full(self.batch, self.steps, self.batch_first, device)
        lengths = torch.from_numpy(np.array(self.lengths, np.int64))
        return plan_padded(lengths, self.steps, self.batch_first, device)

    def of_layer(self, k: int, plan: Plan | None = None) -> Job:
        """Return the job of one layer, if each runs alone. Between layers there are only the rows that run."""
        return Job(
            self.spec.layer(k),
            self.batch,
            self.steps,
            self.batch_first,
            self.lengths,
            (self.sequences, self.rows),
            plan or self.given_plan,
            self.input_is_padded and k == 0,
            self.output_is_padded and k == self.spec.num_layers - 1,
        )

    def output_shape(self, x: Tensor) -> Shape:
        width = self.spec.output_width
        if self.input_is_padded == self.output_is_padded:
            return (*x.shape[:-1], width)
        return (self.padded_rows if self.output_is_padded else self.rows, width)

    def last_shape(self, width: int) -> Shape:
        if self.last_is_flat:
            return (self.batch, self.spec.stacked * width)
        return (self.spec.stacked, self.batch, width)

    def saved_size(self) -> int:
        return saved_size(self.spec, self.sequences, self.rows)


class Saved(NamedTuple):
    """What one layer's backward needs: the states, initial ones first, then after every row; each row's activations."""

    history: States
    """Each (D, B + R, P), the LSTM's c (D, B + R, H). With one direction, there is no dimension D."""
    buffer: Tensor | None
    """(D, R, width · H)"""


class Parts(NamedTuple):
    """The shapes of what one layer saves, in the order in which they lie in memory."""

    history: list[Shape]
    """(D, B + R, P), and the LSTM's c: (D, B + R, H). With one direction, there is no dimension D."""
    buffer: Shape | None
    """(D, R, width · H): each row's activations, if the cell's derivative needs them"""
    output: Shape | None
    """(R, 2·P): a layer's output that the next layer reads. With one direction it is part of the history."""


def saved_parts(spec: Spec, sequences: int, rows: int) -> list[Parts]:
    """Return what each layer saves. engine/sizes.h has the same layout."""
    cell, lead = CELLS[spec.mode], (2,) if spec.directions == 2 else ()
    history: list[Shape] = [(*lead, sequences + rows, width) for width in spec.state_widths]
    buffer = (*lead, rows, cell.width * spec.hidden_size) if cell.saves_buffer else None
    between = (rows, 2 * spec.fed_back) if spec.directions == 2 else None
    below = Parts(history, buffer, between)
    return [*[below] * (spec.num_layers - 1), Parts(history, buffer, None)]


def saved_size(spec: Spec, sequences: int, rows: int) -> int:
    """Return how many numbers a job saves: the sum of `saved_parts`."""
    cell, D, L = CELLS[spec.mode], spec.directions, spec.num_layers
    states = (sequences + rows) * sum(spec.state_widths)
    buffer = rows * cell.width * spec.hidden_size if cell.saves_buffer else 0
    between = (L - 1) * rows * 2 * spec.fed_back if D == 2 else 0
    return L * D * (states + buffer) + between


def saved_views(
    job: Job,
    saved: Tensor,  # one dimension, of at least `saved_size`
) -> list[tuple[Saved, Tensor | None]]:
    """Return for each layer what it saves, and its output (R, 2·P) if that is kept apart, as views."""
    place = 0
    views = []

    def take(shape: Shape) -> Tensor:
        nonlocal place
        place += prod(shape)
        return saved.narrow(0, place - prod(shape), prod(shape)).view(shape)

    for history, buffer, output in saved_parts(job.spec, job.sequences, job.rows):
        layer_saved = Saved(tuple([take(shape) for shape in history]), None if buffer is None else take(buffer))
        views.append((layer_saved, None if output is None else take(output)))
    return views


def unflatten(job: Job, states: Tensor) -> Tensor:
    """Return states (N, L·D·P) as (L·D, N, P)."""
    return states.view(job.batch, job.spec.stacked, -1).transpose(0, 1)


def flatten(states: Tensor) -> Tensor:
    """Return states (L·D, N, P) as (N, L·D·P)."""
    return states.transpose(0, 1).flatten(1)
