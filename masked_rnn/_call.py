"""Opening and closing a call: every layout that comes in or goes out is known here, and to the operator.

T time, N batch, I input, H hidden, P the state that is fed back (H, or proj_size), D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._cells import Layer, LayerWeights, States, drawn_dropout, group_weights, read_weights
from ._forms import (
    Opened,
    check_devices,
    check_input,
    open_lengths,
    open_nested,
    open_packed,
    open_padded,
    open_resets,
    refuse_twice,
)
from ._lengths import check_sorted, is_on_host
from ._memory import as_array
from ._plan import (
    Plan,
    move_back,
    move_to_front,
    plan_full,
    plan_masked,
    plan_padded,
    plan_rows,
    real_mask,
)
from ._segments import Segments
from ._states import close_states, forget, open_states
from ._torch import is_traced, jagged_like, to_device, unsafe_view, values_can_be_read

Restore = Callable[[Tensor], Tensor]
"""Brings an output into the layout that its input had."""


@dataclass
class Call:
    """One call in canonical form.

    `data` is the input with two leading dimensions, time and batch in the layer's order, or, from a PackedSequence or
    a nested tensor, its rows with one. Backends take it as `rows()` with a `plan`, as `padded()` or as `masked()`.
    """

    layer: Layer
    parameters: list[Tensor]
    """The weights, in `torch.nn`'s order"""
    data: Tensor
    form: str
    """padded, unbatched, packed or nested"""
    batch: int
    steps: int
    batch_first: bool
    lengths: Tensor | None
    mask: Tensor | None
    """(T, N)"""
    resets: Tensor | None
    """(T, N), True where a sequence's state starts anew"""
    packed: PackedSequence | None
    nested: Any
    segments: Segments | None
    """What the batch's sequences are, once it is cut at its resets"""
    states: States
    """Each (L·D, N, P or H), in the batch's order."""

    @property
    def directions(self) -> int:
        return 2 if self.layer.bidirectional else 1

    @property
    def weights(self) -> list[LayerWeights]:
        return group_weights(self.parameters, self.layer.num_layers, self.directions)

    @property
    def dropout(self) -> float:
        """What is drawn between layers."""
        return drawn_dropout(self.layer)

    @cached_property
    def packed_order(self) -> Tensor | None:
        """The sequence at each sorted place of a PackedSequence; None: as they come. Any integers may have come in.

        A copy: backward reads it, and the caller may have changed theirs by then.
        """
        order = None if self.packed is None else self.packed.sorted_indices
        return None if order is None else order.resolve_neg().to(torch.int64, copy=True)

    def real(self) -> Tensor | None:
        """What says which steps are real, where anything does."""
        if self.packed is not None:
            return self.packed.batch_sizes
        return self.lengths if self.mask is None else self.mask

    def values_can_be_read(self) -> bool:
        real = self.real()
        return values_can_be_read(self.data if real is None else real) and (
            self.resets is None or values_can_be_read(self.resets)
        )

    def is_empty(self) -> bool:
        """Whether no sequence has a step, as far as can be seen without waiting for a device."""
        if self.batch == 0 or self.data.numel() == 0:
            return True
        real = self.real()
        return real is not None and is_on_host(real) and values_can_be_read(real) and not bool(real.any())

    def wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.data, *self.states, *self.parameters))

    def _with(self, **changes: Any) -> Call:
        # Not dataclasses.replace, which Dynamo can't follow in torch 2.6.
        values = {name: getattr(self, name) for name in FIELDS}
        return Call(**{**values, **changes})

    def in_weights_dtype(self) -> Call:
        dtype = self.parameters[0].dtype
        return self._with(data=self.data.to(dtype), states=tuple(h.to(dtype) for h in self.states))

    def cut(self, resets: Tensor) -> tuple[Call, Segments]:
        """The call of a batch whose sequences are the segments between resets. Reads them on the host."""
        lengths, mask = (None if t is None else t.cpu() for t in (self.lengths, self.mask))
        segments = Segments(resets.cpu(), lengths, mask, self.directions, self.batch_first, self.data.device)
        call = self._with(
            data=self.rows(),
            batch=len(segments.lengths),
            lengths=None,
            mask=None,
            resets=None,
            segments=segments,
            states=tuple(segments.initial(h) for h in self.states),
        )
        return call, segments

    @cached_property
    def plan(self) -> Plan:
        """Which rows run when. Reads the lengths on the host."""
        device, is_sorted = self.data.device, self.layer.enforce_sorted
        if self.segments is not None:
            return self.segments.plan
        if self.packed is not None:
            sizes = self.packed.batch_sizes.tolist()
            return Plan(sizes, self.batch, self.data.size(0), device, order=self.packed_order)
        if self.nested is not None:
            assert self.lengths is not None
            lengths, starts = (as_array(t.cpu()) for t in (self.lengths, self.nested.offsets()[:-1]))
            return plan_rows(lengths, starts, 1, self.data.size(0), device, is_sorted=is_sorted)
        if self.mask is not None:
            return plan_masked(self.mask.cpu(), self.batch_first, device, is_sorted=is_sorted)
        if self.lengths is not None:
            return plan_padded(self.lengths.cpu(), self.steps, self.batch_first, device, is_sorted=is_sorted)
        return plan_full(self.batch, self.steps, self.batch_first, device)

    def is_plain(self) -> bool:
        """Whether this is a padded batch that runs whole: no row is moved, and no value read."""
        every_step = self.lengths is None and self.mask is None and self.resets is None
        return self.data.dim() == 3 and every_step

    def rows(self) -> Tensor:
        """The input as rows, in the order in which the plan's index counts them."""
        return self.data if self.data.dim() == 2 else self.data.flatten(0, 1)

    def from_rows(self, output: Tensor) -> Tensor:
        """The output, as the input lies. It is memory of its own, which its caller may change in place."""
        return output if self.data.dim() == 2 else unsafe_view(output, [*self.data.shape[:2], output.size(-1)])

    def padded_last(self) -> tuple[Tensor, Tensor | None, Restore]:
        """The input (T, N, I), padding last; the lengths (N,), None where all are T; how to bring an output back."""
        if self.data.dim() == 2:
            return self._padded_rows()
        x, restore = self._time_first()
        if self.mask is None:
            return x, None if self.lengths is None else to_device(self.lengths, x.device), restore
        x, place = move_to_front(x, self.mask)
        return x, self.mask.sum(0), lambda output: restore(move_back(output, place))

    def padded_in_place(self) -> tuple[Tensor, Tensor | None, Restore]:
        """As `padded_last`, but with padding where it is, and real steps marked (T, N, 1); None where all are."""
        if self.mask is None or self.data.dim() == 2:
            x, lengths, restore = self.padded_last()
            return x, None if lengths is None else real_mask(lengths, x.size(0)), restore
        x, restore = self._time_first()
        return x, self.mask.unsqueeze(-1), restore

    def _time_first(self) -> tuple[Tensor, Restore]:
        if not self.batch_first:
            return self.data, lambda output: output
        return self.data.transpose(0, 1), lambda output: output.transpose(0, 1)

    def _padded_rows(self) -> tuple[Tensor, Tensor, Restore]:
        plan = self.plan
        steps = len(plan.batch_sizes)
        order = torch.arange(plan.sequences, device=plan.device) if plan.order is None else plan.order
        at, index = plan.padded_index(order), plan.index
        rows = self.data if index is None else self.data.index_select(0, index)
        x = rows.new_zeros(steps * plan.batch, rows.size(-1)).index_copy(0, at, rows)

        def restore(output: Tensor) -> Tensor:
            rows = output.flatten(0, 1).index_select(0, at)
            return rows if index is None else rows.new_zeros(plan.size, rows.size(-1)).index_copy(0, index, rows)

        lengths = torch.zeros(plan.batch, dtype=torch.int64, device=plan.device)
        return x.view(steps, plan.batch, x.size(-1)), lengths.index_copy(0, order, plan.sorted_lengths), restore


FIELDS = tuple(field.name for field in fields(Call))


def open_arguments(
    layer: Layer, opened: Opened, dtype: torch.dtype, hx: Any, lengths: Any, mask: Any, resets: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, States]:
    """Lengths, mask, resets and initial states, checked. `dtype` is that of the weights that the call runs with."""
    check_input(layer, dtype, opened.data)
    if opened.form in ("packed", "nested"):
        refuse_twice(opened.form, lengths, mask, resets)
        lengths = opened.lengths
    else:
        lengths, mask = open_lengths(opened, lengths, mask)
        resets = None if resets is None else open_resets(opened, resets)
    if layer.enforce_sorted and opened.form != "packed":
        counts = lengths if mask is None else mask.sum(0)
        if counts is not None:
            check_sorted(counts)
    states = open_states(layer, hx, opened.form, opened.batch, opened.data)
    if resets is not None and opened.steps == 1 and not is_traced():
        # Nothing to cut: at most the initial state is dropped, and that every backend can follow.
        if hx is not None:
            states = forget(states, resets, lengths, layer.bidirectional)
        resets = None
    return lengths, mask, resets, states


def open_call(layer: Layer, input: Any, hx: Any, lengths: Any, mask: Any, resets: Any) -> Call:
    packed = input if isinstance(input, PackedSequence) else None
    nested = input if isinstance(input, Tensor) and input.is_nested else None
    if packed is not None:
        opened = open_packed(layer, packed)
    elif nested is not None:
        opened = open_nested(nested)
    else:
        opened = open_padded(layer, input)
    parameters = read_weights(layer)
    check_devices(opened.data, parameters)
    lengths, mask, resets, states = open_arguments(layer, opened, parameters[0].dtype, hx, lengths, mask, resets)
    return Call(
        layer=layer,
        parameters=parameters,
        data=opened.data,
        form=opened.form,
        batch=opened.batch,
        steps=opened.steps,
        batch_first=opened.batch_first,
        lengths=lengths,
        mask=mask,
        resets=resets,
        packed=packed,
        nested=nested,
        segments=None,
        states=states,
    )


def close_call(call: Call, output: Tensor, states: States) -> tuple[Any, Any]:
    result: Any = output
    if call.form == "unbatched":
        result = output.squeeze(0 if call.batch_first else 1)
    elif call.packed is not None:
        result = PackedSequence(
            output, call.packed.batch_sizes, call.packed.sorted_indices, call.packed.unsorted_indices
        )
    elif call.form == "nested":
        result = jagged_like(call.nested, output)
    return result, close_states(call.layer, states, call.form)
