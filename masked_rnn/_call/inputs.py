"""The forms of input, one class each. A class knows where the steps lie, and how to give an output the same form.

T time, N batch, I input, R rows of packed or nested input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._cells import Layer
from .._memory import as_array
from .._plan import Plan, plan_full, plan_masked, plan_padded, plan_rows
from .._probe import ALWAYS, check_dtype
from .._segments import Segments
from .._spec import Spec
from .._torch import is_autocast_on, jagged_like, ragged_dim, to_device
from .context import Context
from .lengths import check_lengths, check_marks, check_nested, check_packed, is_on_host
from .refusals import refusal


@dataclass(eq=False, repr=False)
class Form:
    """A form of input: one of the classes below."""

    data: Tensor
    """Time and batch in the layer's order, (N, T, I) or (T, N, I); or rows (R, I)."""
    batch: int
    steps: int
    batch_first: bool
    kind: ClassVar[str] = ""
    """The input in words"""
    is_rows: ClassVar[bool] = True
    """Whether `data` is rows (R, I). Such a form has lengths of its own, so the call may not give any."""
    is_unbatched: ClassVar[bool] = False
    own_lengths: ClassVar[Tensor | None] = None
    """(N,), of a nested tensor"""
    batch_sizes: ClassVar[Tensor | None] = None
    """(T,), of a PackedSequence"""

    def plan(self, lengths: Tensor | None, mask: Tensor | None, is_sorted: bool) -> Plan:
        """Return the rows that run at each step. Reads lengths (N,) and mask (T, N) on the host."""
        raise NotImplementedError

    def restore(self, output: Tensor) -> Any:
        """Give an output, which has the layout of `data`, the form of the input."""
        return output


@dataclass(eq=False, repr=False)
class Padded(Form):
    is_rows = False

    def plan(self, lengths: Tensor | None, mask: Tensor | None, is_sorted: bool) -> Plan:
        device = self.data.device
        if mask is not None:
            return plan_masked(mask.cpu(), self.batch_first, device, is_sorted=is_sorted)
        if lengths is not None:
            return plan_padded(lengths.cpu(), self.steps, self.batch_first, device, is_sorted=is_sorted)
        return plan_full(self.batch, self.steps, self.batch_first, device)


@dataclass(eq=False, repr=False)
class Unbatched(Padded):
    """One sequence (T, I). Its data has a batch dimension of size 1."""

    is_unbatched = True

    def restore(self, output: Tensor) -> Tensor:
        return output.squeeze(0 if self.batch_first else 1)


@dataclass(eq=False, repr=False)
class Packed(Form):
    packed: PackedSequence
    kind = "a PackedSequence"

    @property
    def batch_sizes(self) -> Tensor:  # type: ignore[override]
        return self.packed.batch_sizes

    @cached_property
    def order(self) -> Tensor | None:
        """The sequence at each sorted place, as int64. None: the batch is in sorted order.

        It is a copy, because backward reads it, and the caller may have changed the original by then.
        """
        order = self.packed.sorted_indices
        return None if order is None else order.resolve_neg().to(torch.int64, copy=True)

    def plan(self, lengths: Tensor | None, mask: Tensor | None, is_sorted: bool) -> Plan:
        sizes = self.packed.batch_sizes.tolist()
        while len(sizes) > 1 and not sizes[-1]:  # a last step that no sequence has
            sizes.pop()
        return Plan(sizes, self.batch, self.data.size(0), self.data.device, order=self.order)

    def restore(self, output: Tensor) -> PackedSequence:
        _, batch_sizes, sorted_indices, unsorted_indices = self.packed
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)


@dataclass(eq=False, repr=False)
class Nested(Form):
    nested: Any
    counts: Tensor
    """(N,)"""
    kind = "a nested tensor"

    @property
    def own_lengths(self) -> Tensor:  # type: ignore[override]
        return self.counts

    def plan(self, lengths: Tensor | None, mask: Tensor | None, is_sorted: bool) -> Plan:
        counts, starts = (as_array(t.cpu()) for t in (self.counts, self.nested.offsets()[:-1].to(torch.int64)))
        return plan_rows(counts, starts, 1, self.data.size(0), self.data.device, is_sorted=is_sorted)

    def restore(self, output: Tensor) -> Any:
        return jagged_like(self.nested, output)


@dataclass(eq=False, repr=False)
class Cut(Form):
    """A padded batch cut at its resets. Each segment is a sequence."""

    segments: Segments

    def plan(self, lengths: Tensor | None, mask: Tensor | None, is_sorted: bool) -> Plan:
        return self.segments.plan


def open_input(context: Context, layer: Layer, input: Any) -> Form:
    if isinstance(input, PackedSequence):
        return _open_packed(context, layer, input)
    if not isinstance(input, Tensor):
        raise TypeError(
            f"{type(layer).__name__}: expected input to be a tensor or a PackedSequence, got {type(input).__name__}"
        )
    if input.is_nested:
        return _open_nested(context, input)
    if input.dim() not in (2, 3):
        words = f"{type(layer).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead"
        raise refusal(layer, ValueError, lambda theirs: theirs.forward(input), words)
    batch_first, form = layer.batch_first, Padded
    if input.dim() == 2:
        input, form = input.unsqueeze(0 if batch_first else 1), Unbatched
    batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    return form(input, batch, steps, batch_first)


def _open_packed(context: Context, layer: Layer, input: PackedSequence) -> Packed:
    data, batch_sizes, order, _ = input
    if data.dim() != 2:
        words = f"input must have 2 dimensions, got {data.dim()}"
        raise refusal(
            layer, RuntimeError, lambda theirs: theirs.check_input(data, batch_sizes), words, dtype=data.dtype
        )
    if context.can_read(batch_sizes):
        check_packed(batch_sizes, order, data.size(0))
    batch: Any = batch_sizes[0] if order is None else order.size(0)
    return Packed(data, batch if context.traced else int(batch), batch_sizes.size(0), False, input)


def _open_nested(context: Context, input: Any) -> Nested:
    if input.layout != torch.jagged:
        raise ValueError(
            "a nested input must have the jagged layout, got a strided one. "
            "Use torch.nested.nested_tensor(..., layout=torch.jagged)."
        )
    if context.traced:
        raise ValueError("torch.jit.trace can't record a nested tensor's lengths. Give padded input and lengths.")
    if input.dim() != 3 or ragged_dim(input) != 1:
        raise ValueError(f"a nested input must be of shape (N, j, I) with time ragged, got {tuple(input.shape)}")
    lengths = input.lengths()
    lengths = input.offsets().diff() if lengths is None else lengths
    if context.can_read(lengths):
        check_nested(input.offsets(), lengths, input.values().size(0))
    return Nested(input.values(), lengths.size(0), 0, True, input, lengths.to(torch.int64))


def check_input(
    context: Context,
    layer: Layer,
    spec: Spec,
    form: Form,
    weights: Sequence[Tensor],
) -> None:
    """Refuse the input that torch.nn or its kernel refuses."""
    data, device, dtype = form.data, form.data.device, weights[0].dtype
    for weight in weights:
        if weight.device != device:
            # PyTorch's words. Its kernels check this for a padded batch only.
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{device} and parameter tensor at {weight.device}. Use input.to({str(weight.device)!r}) or "
                f"layer.to({str(device)!r})."
            )
    wrong_dtype = data.dtype != dtype and not is_autocast_on(device.type)
    if not wrong_dtype and data.size(-1) == layer.input_size:
        if dtype not in ALWAYS and not context.compiling:  # the operator checks when it runs
            check_dtype(spec, dtype, device)
        return
    # torch only tests whether batch sizes are None, so () stands for any.
    batch_sizes = () if form.is_rows else None

    def probe(theirs: Any) -> None:
        theirs.check_input(data, batch_sizes)

    if wrong_dtype:
        words = f"input has dtype {data.dtype}, but the weights have {dtype}"
        ids = not (data.is_floating_point() or data.is_complex())
        hint = "If these are ids, embed them first: torch.nn.Embedding." if ids else ""
        raise refusal(layer, ValueError, probe, words, hint, dtype=dtype)
    words = f"input.size(-1) must be equal to input_size. Expected {layer.input_size}, got {data.size(-1)}"
    raise refusal(layer, RuntimeError, probe, words, dtype=data.dtype)


def refuse_second_lengths(form: Form, lengths: Any, mask: Any, resets: Any) -> None:
    """Refuse lengths, mask and resets for a form that has its own lengths."""
    if resets is not None:
        raise ValueError(
            f"resets mark steps of a padded batch, but the input is {form.kind}. Give padded input with lengths, or "
            "give each segment between resets as a sequence of its own."
        )
    for name, given in (("lengths", lengths), ("mask", mask)):
        if given is not None:
            raise ValueError(
                f"{form.kind} carries its own lengths: {name} must be None, but {name} was given too. Leave it out."
            )


def open_lengths(context: Context, form: Form, lengths: Any, mask: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the lengths (N,) and the mask (T, N), of which at least one is None. Both: all steps are real."""
    if lengths is not None and mask is not None:
        raise ValueError("lengths and mask say the same thing: give one of them, not both.")
    if lengths is not None:
        return check_lengths(context, lengths, form.batch, form.steps, form.data.device, form.batch_first), None
    if mask is not None:
        mask = to_device(_open_marks(context, "mask", mask, form), form.data.device)
        # With one step, the mask is the lengths.
        return (mask[0].long(), None) if not context.traced and form.steps == 1 else (None, mask)
    if form.steps == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN: the input has no time steps. "
            "Give lengths (all 0) to run a batch of empty sequences."
        )
    return None, None


def open_resets(context: Context, form: Form, given: Any) -> Tensor | None:
    """Return the resets (T, N). None if none is True, as far as can be read without waiting for a device."""
    resets = _open_marks(context, "resets", given, form)
    if not context.can_read(resets):
        return resets.to(form.data.device)
    return None if is_on_host(resets) and not bool(resets.any()) else resets


def _open_marks(context: Context, name: str, marks: Any, form: Form) -> Tensor:
    """Return a mask or resets, checked, (T, N)."""
    shape = (form.steps,) if form.is_unbatched else tuple(form.data.shape[:2])
    checked = check_marks(context, name, marks, shape, form.data.device, form.batch_first)
    time_first: Tensor = checked.unsqueeze(-1) if form.is_unbatched else checked.t() if form.batch_first else checked
    return time_first
