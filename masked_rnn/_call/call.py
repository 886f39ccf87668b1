"""One call in canonical form: opened from a layer's arguments, read by the backends, closed into the caller's form.

T time, N batch, I input, R rows, H hidden, P the state that is fed back (H, or proj_size), D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._cells import BackendName, Layer, read_weights
from .._plan import Plan, move_back, move_to_front, real_mask
from .._segments import Segments
from .._spec import Spec, States, spec_of
from .._torch import to_device, unsafe_view
from .context import Context, find_context, records_gradients
from .inputs import Cut, Form, Packed, check_input, open_input, open_lengths, open_resets, refuse_second_lengths
from .lengths import check_sorted, is_on_host
from .states import close_states, forget, open_states

Restore = Callable[[Tensor], Tensor]
"""Brings an output into the layout that its input had."""


@dataclass(eq=False, repr=False)
class Call:
    """One call in canonical form.

    Backends take the input as `rows()` with a `plan`, as `padded_last()` or as `padded_in_place()`.
    """

    spec: Spec
    backend: BackendName
    """The one that was asked for"""
    dropout: float
    """The probability of dropout between layers. 0 if none is drawn"""
    is_sorted: bool
    """Whether lengths never increase, as `enforce_sorted=True` promises"""
    context: Context
    form: Form
    parameters: list[Tensor]
    """The weights, in `torch.nn`'s order"""
    data: Tensor
    """The data of `form`, in the dtype in which the call runs"""
    lengths: Tensor | None
    """(N,)"""
    mask: Tensor | None
    """(T, N)"""
    resets: Tensor | None
    """(T, N), True where a sequence's state starts anew"""
    real: Tensor | None
    """The tensor that marks real steps: lengths, mask, or the batch sizes of a PackedSequence. None: there is none."""
    initial: States | None
    """The initial states that the caller gave, each (L·D, N, P or H), in the batch's order. None: zeros"""
    zeros: States | None = None
    """Made when they are needed"""

    @property
    def states(self) -> States:
        """The initial states, given or zeros."""
        if self.initial is not None:
            return self.initial
        if self.zeros is None:
            shape = (self.spec.stacked, self.form.batch)
            self.zeros = tuple([self.data.new_zeros((*shape, width)) for width in self.spec.state_widths])
        return self.zeros

    @property
    def is_full(self) -> bool:
        """Whether this is a padded batch in which every step is real and no state is reset."""
        return not self.form.is_rows and self.lengths is None and self.mask is None and self.resets is None

    def is_empty(self) -> bool:
        """Return whether no sequence has a step. False if the answer would need a wait for a device."""
        if self.form.batch == 0 or self.data.numel() == 0:
            return True
        real = self.real
        return real is not None and is_on_host(real) and self.context.readable and not bool(real.any())

    def records_gradients(self) -> bool:
        return records_gradients(self.parameters, (self.data,), self.initial or ())

    def why_unreadable(self, reads_plan: bool, reads_resets: bool = True) -> str | None:
        """Return why a backend can't read the values that it needs. None: it can, or needs none.

        `reads_plan` says whether it reads which steps are real, `reads_resets` whether it reads resets.
        """
        context = self.context
        if context.readable and not context.cuda_graph:
            return None
        has_resets = reads_resets and self.resets is not None
        if context.traced:
            what = "the resets of this call, or its number of steps," if has_resets else "the lengths of this call"
            return f"torch.jit.trace would record {what} as constants" if has_resets or reads_plan else None
        if not context.readable:
            what = "resets" if has_resets else "lengths"
            why = f"it reads {what}, which have no values here (FakeTensorMode, make_fx or the meta device)"
            return why if has_resets or reads_plan or self.form.is_rows else None
        if has_resets:
            return "it reads resets, and a CUDA graph is being recorded, which can't wait for them"
        if reads_plan:
            return "it plans its steps on the CPU, and a CUDA graph is being recorded, which can't wait for it"
        return None

    def _with(self, **changes: Any) -> Call:
        # Dynamo of torch 2.6 can't follow dataclasses.replace.
        values = {name: getattr(self, name) for name in FIELDS}
        return Call(**{**values, "zeros": None, **changes})

    def cast(self, dtype: torch.dtype) -> Call:
        return self._with(
            parameters=[w.to(dtype) for w in self.parameters],
            data=self.data.to(dtype),
            initial=self.initial and tuple(h.to(dtype) for h in self.initial),
        )

    def cut(self, resets: Tensor) -> tuple[Call, Segments]:
        """Return the call whose sequences are the segments between `resets` (T, N). Reads them on the host."""
        form = self.form
        lengths, mask = (None if t is None else t.cpu() for t in (self.lengths, self.mask))
        segments = Segments(resets.cpu(), lengths, mask, self.spec.directions, form.batch_first, self.data.device)
        rows = self.rows()
        call = self._with(
            context=self.context.seen_with(rows, rows, None),
            form=Cut(rows, len(segments.lengths), form.steps, form.batch_first, segments),
            data=rows,
            lengths=None,
            mask=None,
            resets=None,
            real=None,
            initial=self.initial and tuple(segments.initial(h) for h in self.initial),
        )
        return call, segments

    @cached_property
    def plan(self) -> Plan:
        """The rows that run at each step. Reads the lengths on the host."""
        return self.form.plan(self.lengths, self.mask, self.is_sorted)

    def rows(self) -> Tensor:
        """Return the input as rows (R, I), numbered as in the plan's index."""
        return self.data if self.form.is_rows else self.data.flatten(0, 1)

    def from_rows(
        self,
        output: Tensor,  # (R, D·P), one row for each of `rows()`
    ) -> Tensor:
        """Return the output in the layout of `data`, not as a view: the caller may change it in place."""
        return output if self.form.is_rows else unsafe_view(output, [*self.data.shape[:2], output.size(-1)])

    def padded_last(self) -> tuple[Tensor, Tensor | None, Restore]:
        """Return the input (T, N, I), padding last; the lengths (N,), None if all are T; how to restore an output."""
        if self.form.is_rows:
            return self._padded_rows()
        x, restore = self._time_first()
        if self.mask is None:
            return x, None if self.lengths is None else to_device(self.lengths, x.device), restore
        x, place = move_to_front(x, self.mask)
        return x, self.mask.sum(0), lambda output: restore(move_back(output, place))

    def padded_in_place(self) -> tuple[Tensor, Tensor | None, Restore]:
        """Return the input (T, N, I), padding where it was; a mask (T, N, 1), None if all are real; how to restore."""
        if self.mask is None or self.form.is_rows:
            x, lengths, restore = self.padded_last()
            return x, None if lengths is None else real_mask(lengths, x.size(0)), restore
        x, restore = self._time_first()
        # A copy, because autograd saves it, and the caller may change the original.
        return x, self.mask.unsqueeze(-1).clone(), restore

    def _time_first(self) -> tuple[Tensor, Restore]:
        if not self.form.batch_first:
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


def open_call(layer: Layer, input: Any, hx: Any, lengths: Any, mask: Any, resets: Any) -> Call:
    """Check a layer's arguments and bring them into one form."""
    context = find_context()
    spec, form = spec_of(layer, context.compiling), open_input(context, layer, input)
    parameters = read_weights(layer, spec, context.traced)
    check_input(context, layer, spec, form, parameters)
    if form.is_rows:
        refuse_second_lengths(form, lengths, mask, resets)
        lengths = form.own_lengths
    else:
        lengths, mask = open_lengths(context, form, lengths, mask)
        resets = None if resets is None else open_resets(context, form, resets)
    if layer.enforce_sorted and not isinstance(form, Packed):
        counts = lengths if mask is None else mask.sum(0)
        if counts is not None:
            check_sorted(context, counts)
    initial = None if hx is None else open_states(context, layer, spec, form, hx)
    if resets is not None and form.steps == 1 and not context.traced:
        # With one step, a reset only drops the initial state. Every backend can do that.
        if initial is not None:
            initial = forget(initial, resets, lengths, layer.bidirectional)
        resets = None
    real = mask if mask is not None else lengths if lengths is not None else form.batch_sizes
    context = context.seen_with(form.data, form.data if real is None else real, resets)
    dropout = float(layer.dropout) if layer.training and spec.num_layers > 1 else 0.0
    return Call(
        spec=spec,
        backend=layer.backend,
        dropout=dropout,
        is_sorted=layer.enforce_sorted,
        context=context,
        form=form,
        parameters=parameters,
        data=form.data,
        lengths=lengths,
        mask=mask,
        resets=resets,
        real=real,
        initial=initial,
    )


def close_call(
    layer: Layer,
    call: Call,
    output: Tensor,  # (N, T, D·P), (T, N, D·P) or (R, D·P), in the layout of the call's data
    states: States,  # each (L·D, N, P or H)
) -> tuple[Any, Any]:
    """Return the output in the form of the input, and the last states as the layer returns them."""
    return call.form.restore(output), close_states(layer.flatten_hidden, states, call.form.is_unbatched)
