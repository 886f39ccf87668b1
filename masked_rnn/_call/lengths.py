"""Checks lengths, masks and resets, before anything is computed.

T time, N batch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence, ValuesView
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .._memory import with_memory
from .._torch import assert_async
from .context import Context

EXPECTED = "Expected whole numbers: a list, a tuple, an array or a tensor of any integer dtype."


def is_on_host(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def check_lengths(
    context: Context, given: Any, batch: int, steps: int, device: torch.device, batch_first: bool
) -> Tensor | None:
    """Return lengths as int64 `(N,)`, checked against the batch. None if all are T, as far as can be read.

    They stay on the CPU if they or the input, which is on `device`, are there.
    """
    if isinstance(given, Tensor):
        if device.type != "meta":
            check_values(given, "lengths")
        given = with_memory(given) if context.can_read(given) else given
    lengths = _int64(context, given, steps)
    if lengths.dim() == 0 and batch == 1:
        lengths = lengths.unsqueeze(0)
    if lengths.dim() != 1:
        raise ValueError(
            f"lengths must have one dimension, one length per sequence, but its shape is {tuple(lengths.shape)}. "
            f"Expected shape ({batch},)."
        )
    layout = f"batch_first={batch_first}"
    if lengths.size(0) != batch:
        expected = f"{batch} length{'' if batch == 1 else 's'}, one for each sequence of the input ({layout})"
        cure = ""
        if lengths.size(0) == steps and batch > 1:
            place = "second" if batch_first else "first"
            cure = (
                f" If the input's {place} dimension is the batch, build the layer with batch_first={not batch_first}."
            )
        raise ValueError(f"expected {expected}, got {lengths.size(0)}.{cure}")
    if device.type == "cpu":
        lengths = lengths.cpu()
    if not context.can_read(lengths):
        return lengths.to(device)
    if is_on_host(lengths):
        return None if check_range(lengths, steps, layout) else lengths
    # Reading the lengths would wait for the device. The assertion is checked there.
    if not assert_range(lengths, steps, layout):
        check_range(lengths, steps, layout)
    return lengths


def check_values(given: Tensor, name: str) -> None:
    """Refuse a tensor on the meta device."""
    if given.device.type == "meta":
        raise ValueError(f"{name} has no values, because it is on the meta device. Give it on the CPU.")


def assert_range(
    lengths: Tensor,  # (N,)
    steps: int,
    layout: str,
) -> bool:
    """Assert on the lengths' device that each is from 0 to T. Return False if it has no such assertion."""
    most = "T" if torch.compiler.is_compiling() else steps  # a graph that names a number is for this number only
    expected = f"expected 0 <= length <= {most}, the input's time steps ({layout})"
    return assert_async((lengths.clamp(0, steps) == lengths).all(), f"a length is out of range: {expected}")


def check_range(
    lengths: Tensor,  # (N,)
    steps: int,
    layout: str,
) -> bool:
    """Refuse a length that is not from 0 to T. Return whether every length is T."""
    values = lengths.tolist()
    if not values or (min(values) >= 0 and max(values) <= steps):
        return not values or min(values) == steps
    for n, length in enumerate(values):
        if not 0 <= length <= steps:
            fault = (
                f"but the input has only {steps} time steps ({layout})"
                if length > 0
                else "but a length can't be negative"
            )
            raise ValueError(f"lengths[{n}] = {length}, {fault}. Expected 0 <= length <= {steps}.")
    return False


def check_packed(
    batch_sizes: Tensor,  # (T,)
    order: Tensor | None,  # (N,)
    rows: int,
) -> None:
    """Refuse a PackedSequence that `pack_padded_sequence` would not make. Its constructor checks nothing."""
    sizes, fault = batch_sizes.tolist(), None
    for t, (size, after) in enumerate(pairwise(sizes)):
        if after > size:
            fault = f"batch_sizes can't grow, but batch_sizes[{t}] = {size} and batch_sizes[{t + 1}] = {after}"
            break
    if not fault and sizes and sizes[-1] < 0:
        fault = f"batch_sizes[{len(sizes) - 1}] = {sizes[-1]} is negative"
    if not fault and sum(sizes) != rows:
        fault = f"batch_sizes add up to {sum(sizes)}, but data has {rows} rows"
    if not fault and order is not None and is_on_host(order):
        places, batch = order.tolist(), sizes[0] if sizes else 0
        if len(places) != batch:
            fault = f"sorted_indices has {len(places)} elements, but batch_sizes[0] = {batch}"
        elif sorted(places) != list(range(batch)):
            k = next(k for k, place in enumerate(places) if not 0 <= place < batch or place in places[:k])
            fault = f"sorted_indices must hold each of 0 to {batch - 1} once, but sorted_indices[{k}] = {places[k]}"
    if fault:
        raise ValueError(f"a PackedSequence's {fault}. Make it by torch.nn.utils.rnn.pack_padded_sequence.")


def check_nested(
    offsets: Tensor,  # (N + 1,)
    lengths: Tensor,  # (N,)
    rows: int,
) -> None:
    """Refuse offsets and lengths that do not fit. `torch.nested.nested_tensor_from_jagged` takes any."""
    if not is_on_host(offsets):
        return
    bounds = offsets.tolist()
    for n, (length, (start, stop)) in enumerate(zip(lengths.tolist(), pairwise(bounds), strict=True)):
        if not 0 <= start <= start + length <= stop <= rows:
            raise ValueError(
                f"a nested input has {rows} rows, but its sequence {n} has {length} from row {start} on, and the next "
                f"one begins at row {stop}. Make it by torch.nested.nested_tensor(..., layout=torch.jagged)."
            )


MARKS = {"mask": "True at real steps", "resets": "True where the state starts anew before the step"}


def check_marks(
    context: Context, name: str, marks: Any, shape: tuple[int, ...], device: torch.device, batch_first: bool
) -> Tensor:
    """Return a mask, or resets, of the given shape: a bool for each step. The input is on `device`."""
    if not isinstance(marks, Tensor):
        converts = isinstance(marks, (list, tuple)) or hasattr(marks, "__array__")
        cure = f" Use torch.as_tensor({name})." if converts else ""
        raise TypeError(f"{name} must be a bool tensor, got {type(marks).__name__}.{cure}")
    if marks.dtype != torch.bool:
        cure = _marks_cure(context, name, marks)
        raise TypeError(f"{name} must be a bool tensor, {MARKS[name]}, but its dtype is {marks.dtype}.{cure}")
    if tuple(marks.shape) != shape:
        cure = f" Use {name}.squeeze(-1)." if tuple(marks.shape) == (*shape, 1) else ""
        if tuple(marks.shape) == shape[::-1]:
            place = "second" if batch_first else "first"
            cure = f" Use {name}.T; or, if the input's {place} dimension is the batch, batch_first={not batch_first}."
        raise ValueError(
            f"{name} has shape {tuple(marks.shape)}, but the input's first dimensions are {shape} "
            f"(batch_first={batch_first}). Expected one bool per time step of each sequence.{cure}"
        )
    if device.type != "meta":
        check_values(marks, name)
    return with_memory(marks) if context.can_read(marks) else marks


def _marks_cure(context: Context, name: str, marks: Tensor) -> str:
    if not context.can_read(marks):
        return ""
    if name == "mask" and marks.is_floating_point() and not bool(marks.any()):
        return ""  # all 0: no step is real; in an additive attention mask, every step is
    if bool(((marks == 0) | (marks == 1)).all()):
        return f" Use {name}.bool()."
    if name == "mask" and bool(((marks == 0) | (marks < -1)).all()):
        return " It looks like one that is added to scores, 0 at real steps: use mask == 0."
    return ""


def check_sorted(context: Context, lengths: Tensor) -> None:
    """Refuse lengths (N,) that grow: `enforce_sorted=True` promised that they do not."""
    if not context.can_read(lengths):
        return
    if not is_on_host(lengths) and assert_async(
        (lengths.diff() <= 0).all(), "lengths must decrease under enforce_sorted=True"
    ):
        return
    for n, (before, length) in enumerate(pairwise(lengths.tolist()), 1):
        if length > before:
            raise ValueError(
                f"lengths must decrease under enforce_sorted=True, but lengths[{n}] = {length} is longer than "
                f"lengths[{n - 1}] = {before}. Sort the batch by length, or build the layer with enforce_sorted=False."
            )


def _int64(context: Context, given: Any, steps: int) -> Tensor:
    if isinstance(given, Tensor):
        return _whole(context, given, steps)
    if isinstance(given, (bool, float, str, bytes)) or given is None:
        raise TypeError(f"lengths must be integers, got {given!r} of type {type(given).__name__}. {EXPECTED}")
    if isinstance(given, int):
        return _from_list(context, [given], steps).squeeze(0)
    if isinstance(given, Sequence):
        return _from_list(context, given, steps)
    array = np.asarray(given)
    if array.dtype.kind in "iu" and array.dtype != np.uint64:
        # A copy, because torch takes no negative strides and no foreign byte order, and warns about read-only memory.
        return torch.from_numpy(np.array(array, dtype=np.int64))
    if array.ndim and array.dtype.kind in "uO":
        return _from_list(context, array.tolist(), steps)
    if array.dtype.kind in "bf":
        values = torch.from_numpy(array.astype(bool if array.dtype.kind == "b" else float))
        cure = _cure(context, values, steps, array)
        raise TypeError(f"lengths must be integers, but its dtype is {array.dtype}. {EXPECTED}{cure}")
    if array.ndim == 0 and hasattr(given, "__index__"):
        return _from_list(context, [given], steps).squeeze(0)
    cure = " Use list(lengths)." if isinstance(given, (Iterator, ValuesView)) else ""
    raise TypeError(f"lengths can't be read as integers, got {type(given).__name__}. {EXPECTED}{cure}")


def _from_list(context: Context, given: Sequence[Any], steps: int) -> Tensor:
    if context.compiling:
        # isinstance is the only type check that Dynamo can do on a number that changes from call to call.
        for n, length in enumerate(given):
            if not isinstance(length, (int, Tensor)) or isinstance(length, bool):
                _refuse_element(given, n, steps)
    elif set(map(type, given)) != {int}:
        for n, length in enumerate(given):
            if isinstance(length, Sequence) and not isinstance(length, (str, bytes)):
                raise ValueError(f"lengths must have one dimension, but lengths[{n}] is {length!r}. {EXPECTED}")
            if isinstance(length, np.ndarray) and length.ndim:
                cure = " Use np.concatenate(lengths)." if all(np.shape(length) == (1,) for length in given) else ""
                raise ValueError(f"lengths must have one dimension, but lengths[{n}] is {length!r}. {EXPECTED}{cure}")
            if isinstance(length, Tensor):
                check_values(length, f"lengths[{n}]")
                integral = length.numel() == 1 and _is_integral(length.dtype)
            else:
                integral = hasattr(length, "__index__") and not isinstance(length, (bool, np.bool_))
            if not integral:
                _refuse_element(given, n, steps)
        given = [operator.index(length) for length in given]
    if not context.compiling and given and (min(given) < -(1 << 63) or max(given) >= 1 << 63):
        n, length = next((n, length) for n, length in enumerate(given) if not -(1 << 63) <= length < 1 << 63)
        raise ValueError(f"lengths[{n}] = {length} is out of range. Expected 0 <= length <= {steps}.")
    return torch.tensor(given, dtype=torch.int64, device="cpu")


def _whole(context: Context, lengths: Tensor, steps: int) -> Tensor:
    if not _is_integral(lengths.dtype):
        cure = _cure(context, lengths, steps, lengths)
        raise TypeError(f"lengths must be integers, but its dtype is {lengths.dtype}. {EXPECTED}{cure}")
    whole: Tensor = lengths.to(torch.int64)
    return whole


def _cure(context: Context, values: Tensor, steps: int, given: Tensor | np.ndarray[Any, Any]) -> str:
    """Return what to write instead of the given tensor or array of these values, if that is sure to be right."""
    is_tensor = isinstance(given, Tensor)
    if values.dtype == torch.bool:
        marks = "it" if is_tensor else "torch.as_tensor(lengths)"
        return f" If it marks real steps, give {marks} as mask; if it marks where the state starts anew, as resets."
    if values.is_complex() or not context.can_read(values) or not values.numel():
        return ""
    are_whole = bool((values == values.round()).all())
    are_fractions = bool(((values >= 0) & (values <= 1)).all())
    return _to_whole("lengths", ".long()" if is_tensor else ".astype(int)", are_whole, steps if are_fractions else None)


def _to_whole(given: str, convert: str, are_whole: bool, steps: int | None) -> str:
    """Return how to convert floats. `steps` is None if they can't be fractions of the steps."""
    if steps is None:
        return f" Use {given}{convert}." if are_whole else ""
    cure = f" If they are fractions of the {steps} steps, use ({given} * {steps}).round(){convert}"
    return f"{cure}; if they count steps, {given}{convert}." if are_whole else f"{cure}."


def _refuse_element(given: Sequence[Any], n: int, steps: int) -> NoReturn:
    cure = ""
    if all(isinstance(length, (bool, np.bool_)) for length in given):
        cure = " If they mark real steps, give a bool tensor as mask."
    elif all(isinstance(length, (int, float, np.number)) and not isinstance(length, bool) for length in given):
        are_whole, are_fractions = all(n % 1 == 0 for n in given), all(0 <= n <= 1 for n in given)
        cure = _to_whole("torch.tensor(lengths)", ".long()", are_whole, steps if are_fractions else None)
    raise TypeError(f"lengths[{n}] = {given[n]!r} is of type {type(given[n]).__name__}. {EXPECTED}{cure}")


def look_like_lengths(given: Any) -> bool:
    """Return whether the argument for the initial state is whole numbers."""
    if isinstance(given, (Tensor, np.ndarray)):
        return _is_integral(given.dtype) if isinstance(given, Tensor) else given.dtype.kind in "iu"
    if isinstance(given, (list, tuple)):
        return len(given) > 0 and all(look_like_lengths(value) for value in given)
    return hasattr(given, "__index__") and not isinstance(given, (bool, np.bool_))


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
