"""What came in: the forms of input, and what says which of its steps are real, each checked.

T time, N batch, I input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._cells import Layer
from ._lengths import check_lengths, check_marks, check_nested, check_packed, is_on_host
from ._probe import check_dtype
from ._refusals import refusal
from ._torch import is_autocast_on, is_traced, ragged_dim, to_device, values_can_be_read


class Opened(NamedTuple):
    """What the form of an input says."""

    form: str
    data: Tensor
    batch: int
    steps: int
    batch_first: bool
    lengths: Tensor | None = None


def open_padded(layer: Layer, input: Any) -> Opened:
    if not isinstance(input, Tensor):
        raise TypeError(
            f"{type(layer).__name__}: expected input to be a tensor or a PackedSequence, got {type(input).__name__}"
        )
    if input.dim() not in (2, 3):
        words = f"{type(layer).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead"
        raise refusal(layer, ValueError, lambda their: their.forward(input), words)
    form = "padded" if input.dim() == 3 else "unbatched"
    data = input if form == "padded" else input.unsqueeze(0 if layer.batch_first else 1)
    batch, steps = data.shape[:2] if layer.batch_first else (data.shape[1], data.shape[0])
    return Opened(form, data, batch, steps, layer.batch_first)


def open_packed(layer: Layer, input: PackedSequence) -> Opened:
    data, batch_sizes, order, _ = input
    if data.dim() != 2:
        words = f"input must have 2 dimensions, got {data.dim()}"
        raise refusal(
            layer, RuntimeError, lambda theirs: theirs.check_input(data, batch_sizes), words, dtype=data.dtype
        )
    if values_can_be_read(batch_sizes):
        check_packed(batch_sizes, order, data.size(0))
    batch: Any = batch_sizes[0] if order is None else order.size(0)
    return Opened("packed", data, batch if is_traced() else int(batch), batch_sizes.size(0), False)


def open_nested(input: Any) -> Opened:
    if input.layout != torch.jagged:
        raise ValueError(
            "a nested input must have the jagged layout, got a strided one. "
            "Use torch.nested.nested_tensor(..., layout=torch.jagged)."
        )
    if is_traced():
        raise ValueError("torch.jit.trace can't record a nested tensor's lengths. Give padded input and lengths.")
    if input.dim() != 3 or ragged_dim(input) != 1:
        raise ValueError(f"a nested input must be of shape (N, j, I) with time ragged, got {tuple(input.shape)}")
    lengths = input.lengths()
    lengths = input.offsets().diff() if lengths is None else lengths
    if values_can_be_read(lengths):
        check_nested(input.offsets(), lengths, input.values().size(0))
    return Opened("nested", input.values(), lengths.size(0), 0, True, lengths)


def check_input(layer: Layer, dtype: torch.dtype, data: Tensor) -> None:
    """Refuse what torch.nn and its kernel refuse. `dtype` is that of the weights that the call runs with."""
    wrong_dtype = data.dtype != dtype and not is_autocast_on(data.device.type)
    if not wrong_dtype and data.size(-1) == layer.input_size:
        if not torch.compiler.is_compiling():  # the operator asks when it runs
            check_dtype(layer.mode, dtype, data.device, layer.bias, layer.proj_size > 0)
        return
    # torch asks only whether there are batch sizes.
    batch_sizes = None if data.dim() == 3 else ()

    def ask(their: Any) -> None:
        their.check_input(data, batch_sizes)

    if wrong_dtype:
        words = f"input has dtype {data.dtype}, but the weights have {dtype}"
        ids = not (data.is_floating_point() or data.is_complex())
        more = "If these are ids, embed them first: torch.nn.Embedding." if ids else ""
        raise refusal(layer, ValueError, ask, words, more, dtype=dtype)
    words = f"input.size(-1) must be equal to input_size. Expected {layer.input_size}, got {data.size(-1)}"
    raise refusal(layer, RuntimeError, ask, words, dtype=data.dtype)


def check_devices(data: Tensor, weights: Sequence[Tensor]) -> None:
    """What PyTorch's kernels refuse over a padded batch alone, in their words."""
    device = data.device
    for weight in weights:
        if weight.device != device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{device} and parameter tensor at {weight.device}. Use input.to({str(weight.device)!r}) or "
                f"layer.to({str(device)!r})."
            )


def refuse_twice(form: str, lengths: Any, mask: Any, resets: Any) -> None:
    kind = "a PackedSequence" if form == "packed" else "a nested tensor"
    if resets is not None:
        raise ValueError(
            f"resets mark steps of a padded batch, but the input is {kind}. Give padded input with lengths, or give "
            "each segment between resets as a sequence of its own."
        )
    for name, given in (("lengths", lengths), ("mask", mask)):
        if given is not None:
            raise ValueError(
                f"{kind} carries its own lengths: {name} must be None, but {name} was given too. Leave it out."
            )


def open_lengths(opened: Opened, lengths: Any, mask: Any) -> tuple[Tensor | None, Tensor | None]:
    """The lengths, None where no row is padded as far as can be seen; or the mask, (T, N)."""
    _, data, batch, steps, batch_first, _ = opened
    if lengths is not None and mask is not None:
        raise ValueError("lengths and mask say the same thing: give one of them, not both.")
    if lengths is not None:
        return check_lengths(lengths, batch, steps, data.device, batch_first), None
    if mask is not None:
        mask = to_device(_open_marks("mask", mask, opened), data.device)
        return (mask[0].long(), None) if not is_traced() and steps == 1 else (None, mask)
    if steps == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN: the input has no time steps. "
            "Give lengths (all 0) to run a batch of empty sequences."
        )
    return None, None


def _open_marks(name: str, marks: Any, opened: Opened) -> Tensor:
    """A mask or resets, (T, N)."""
    form, data, _, steps, batch_first, _ = opened
    shape = (steps,) if form == "unbatched" else tuple(data.shape[:2])
    checked = check_marks(name, marks, shape, f"batch_first={batch_first}")
    time_first: Tensor = checked.unsqueeze(-1) if form == "unbatched" else checked.t() if batch_first else checked
    return time_first


def open_resets(opened: Opened, given: Any) -> Tensor | None:
    """None where the state starts anew nowhere, as far as can be seen."""
    resets = _open_marks("resets", given, opened)
    if not values_can_be_read(resets):
        return resets.to(opened.data.device)
    return None if is_on_host(resets) and not bool(resets.any()) else resets
