"""What a length or a mask means: checked here, and turned into the plan of rows that run.

T time, N batch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from ._torch import assert_async, is_fake, is_recorded, is_traced, is_transformed

EXPECTED = "Expected whole numbers: a list, a tuple, an array or a tensor of any integer dtype."


def values_can_be_read(tensor: Tensor) -> bool:
    """False while a call is compiled, traced, recorded or transformed: a tensor has no values then, or an example's."""
    return not (torch.compiler.is_compiling() or is_traced() or is_transformed() or is_recorded() or is_fake(tensor))


def is_on_host(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def check_lengths(given: Any, batch: int, steps: int, device: torch.device, layout: str) -> Tensor:
    """Lengths as int64 `(N,)`, checked against the batch. Kept on the CPU, unless both they and the input are on
    another device."""
    lengths = _int64(given, steps)
    if lengths.dim() == 0 and batch == 1:
        lengths = lengths.unsqueeze(0)
    if lengths.dim() != 1:
        raise ValueError(
            f"lengths must have one dimension, one length per sequence, but its shape is {tuple(lengths.shape)}. "
            f"Expected shape ({batch},)."
        )
    if lengths.size(0) != batch:
        raise ValueError(
            f"lengths has {lengths.size(0)} elements, but the input holds {batch} sequences ({layout}). "
            "Expected one length per sequence."
        )
    if device.type == "cpu":
        lengths = lengths.cpu()
    if not values_can_be_read(lengths):
        return lengths.to(device)
    if is_on_host(lengths):
        check_range(lengths, steps, layout)
    else:
        # A read would wait for the device; the assertion reports from there.
        assert_async(
            ((lengths >= 0) & (lengths <= steps)).all(),
            f"a length is out of range: expected 0 <= length <= {steps}, the input's time steps ({layout})",
        )
    return lengths


def check_range(lengths: Tensor, steps: int, layout: str) -> None:
    for n, length in enumerate(lengths.tolist()):
        if not 0 <= length <= steps:
            fault = (
                f"but the input has only {steps} time steps ({layout})"
                if length > 0
                else "but a length can't be negative"
            )
            raise ValueError(f"lengths[{n}] = {length}, {fault}. Expected 0 <= length <= {steps}.")


def check_mask(mask: Any, shape: tuple[int, ...], device: torch.device, layout: str) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, got {type(mask).__name__}. Use torch.as_tensor(mask).")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be a bool tensor, True at real steps, but its dtype is {mask.dtype}.{_mask_cure(mask)}"
        )
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, but the input's first dimensions are {shape} ({layout}). "
            "Expected one bool per time step of each sequence."
        )
    moved: Tensor = mask.to(device)
    return moved


def _mask_cure(mask: Tensor) -> str:
    if not values_can_be_read(mask):
        return ""
    if bool(((mask == 0) | (mask == 1)).all()):
        return " Use mask.bool()."
    if bool(((mask == 0) | (mask < -1)).all()):
        return " It looks like one that is added to scores, 0 at real steps: use mask == 0."
    return ""


def check_sorted(lengths: Tensor) -> None:
    if not values_can_be_read(lengths):
        return
    if not is_on_host(lengths):
        assert_async((lengths.diff() <= 0).all(), "lengths must decrease under enforce_sorted=True")
        return
    for n, (before, length) in enumerate(pairwise(lengths.tolist()), 1):
        if length > before:
            raise ValueError(
                f"lengths must decrease under enforce_sorted=True, but lengths[{n}] = {length} is longer than "
                f"lengths[{n - 1}] = {before}. Sort the batch by length, or build the layer with enforce_sorted=False."
            )


def _int64(given: Any, steps: int) -> Tensor:
    if isinstance(given, Tensor):
        return _whole(given, steps)
    if isinstance(given, (bool, float, str, bytes)) or given is None:
        raise TypeError(f"lengths must be integers, got {given!r} of type {type(given).__name__}. {EXPECTED}")
    if isinstance(given, int):
        return torch.tensor(given, dtype=torch.int64, device="cpu")
    if isinstance(given, Sequence):
        return _from_list(given, steps)
    array = np.asarray(given)
    if array.dtype.kind in "iu" and array.dtype != np.uint64:
        # A copy: torch takes no negative strides and no foreign byte order, and warns of memory it may not write.
        return torch.from_numpy(np.array(array, dtype=np.int64))
    if array.ndim and array.dtype.kind in "uO":
        return _from_list(array.tolist(), steps)
    if array.dtype.kind in "bf":
        return _whole(torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="))), steps)
    raise TypeError(f"lengths can't be read as integers, got {type(given).__name__}. {EXPECTED}")


def _from_list(given: Sequence[Any], steps: int) -> Tensor:
    if not torch.compiler.is_compiling():
        for n, length in enumerate(given):
            if isinstance(length, Sequence) and not isinstance(length, (str, bytes)):
                raise ValueError(f"lengths must have one dimension, but lengths[{n}] is {length!r}. {EXPECTED}")
            if isinstance(length, Tensor):
                integral = length.numel() == 1 and _is_integral(length.dtype)
            else:
                integral = hasattr(length, "__index__") and not isinstance(length, (bool, np.bool_))
            if not integral:
                _refuse_element(given, n, steps)
        given = [operator.index(length) for length in given]
        for n, length in enumerate(given):
            if not -(1 << 63) <= length < 1 << 63:
                raise ValueError(f"lengths[{n}] = {length} is out of range. Expected 0 <= length <= {steps}.")
    return torch.tensor(given, dtype=torch.int64, device="cpu")


def _whole(lengths: Tensor, steps: int) -> Tensor:
    if not _is_integral(lengths.dtype):
        raise TypeError(
            f"lengths must be integers, but its dtype is {lengths.dtype}. {EXPECTED}{_cure(lengths, steps)}"
        )
    whole: Tensor = lengths.to(torch.int64)
    return whole


def _cure(lengths: Tensor, steps: int) -> str:
    """What to write instead, where that is sure to be right."""
    if lengths.dtype == torch.bool:
        return " If it marks real steps, give it as mask."
    if lengths.is_complex() or not values_can_be_read(lengths) or not lengths.numel():
        return ""
    are_whole = bool((lengths == lengths.round()).all())
    if bool(((lengths >= 0) & (lengths <= 1)).all()):
        cure = f"If they are fractions of the {steps} steps, use (lengths * {steps}).round().long()"
        return f" {cure}; if they count steps, lengths.long()." if are_whole else f" {cure}."
    return " Use lengths.long()." if are_whole else ""


def _refuse_element(given: Sequence[Any], n: int, steps: int) -> NoReturn:
    cure = ""
    if all(isinstance(length, (int, float)) and 0 <= length <= 1 for length in given):
        cure = f" If they are fractions of the {steps} steps, use (torch.tensor(lengths) * {steps}).round().long()."
    raise TypeError(f"lengths[{n}] = {given[n]!r} is of type {type(given[n]).__name__}. {EXPECTED}{cure}")


def look_like_lengths(given: Any) -> bool:
    """Whether what stands where the initial state should is whole numbers."""
    if isinstance(given, (Tensor, np.ndarray)):
        return _is_integral(given.dtype) if isinstance(given, Tensor) else given.dtype.kind in "iu"
    if isinstance(given, (list, tuple)):
        return len(given) > 0 and all(look_like_lengths(value) for value in given)
    return hasattr(given, "__index__") and not isinstance(given, (bool, np.bool_))


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


class Plan:
    """Which rows run at which step: step 0 of every row that has one, longest first, then step 1, ...

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
        """Where each row that runs lies in the input; None: they are all there is, in order."""
        self.order = order
        """The sequence at each sorted place; None: as they come."""
        self.live = batch_sizes[0] if batch_sizes else 0
        self.starts = [0, *accumulate(batch_sizes)]
        self.rows = self.starts[-1]

    @cached_property
    def _step_and_place(self) -> tuple[Tensor, Tensor, Tensor]:
        sizes = torch.tensor(self.batch_sizes, dtype=torch.int64, device=self.device)
        starts = torch.tensor(self.starts, dtype=torch.int64, device=self.device)
        step = torch.repeat_interleave(sizes, output_size=self.rows)
        return step, torch.arange(self.rows, device=self.device) - starts[step], starts

    @cached_property
    def flip(self) -> Tensor:
        """For each row, the row that runs in its place when every sequence is reversed within its own length."""
        step, place, starts = self._step_and_place
        return starts[self._last_step[place] - step] + place

    @cached_property
    def _ends(self) -> list[int]:
        """The last step of each sequence, in sorted order."""
        ends = [t for t, (now, then) in enumerate(pairwise([*self.batch_sizes, 0])) for _ in range(now - then)]
        return ends[::-1]

    @cached_property
    def _last_step(self) -> Tensor:
        return torch.tensor(self._ends, dtype=torch.int64, device=self.device)

    @cached_property
    def last(self) -> Tensor:
        """The row of each sequence's last step, in sorted order."""
        rows = [self.starts[t] + place for place, t in enumerate(self._ends)]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    @cached_property
    def previous(self) -> Tensor:
        """The row of the step before, counting from `live` rows that stand for the initial state."""
        before = [self.live, *self.batch_sizes[:-1]]
        gaps = torch.tensor(before, dtype=torch.int64, device=self.device)
        step, _, _ = self._step_and_place
        return torch.arange(self.live, self.live + self.rows, device=self.device) - gaps[step]

    @cached_property
    def sorted_lengths(self) -> Tensor:
        """The lengths of the sequences that have a step, longest first."""
        return self._last_step + 1

    def grid(self, order: Tensor | None = None) -> Tensor:
        """Where each row lies in a padded `(T, live)` batch of the sorted sequences, or `(T, N)` in the given order."""
        step, place, _ = self._step_and_place
        return step * self.live + place if order is None else step * self.batch + order[place]

    def chunks(self, rows: int) -> list[Chunk]:
        """The steps in runs of about so many rows each, at least one step long."""
        chunks, first = [], 0
        while first < len(self.batch_sizes):
            start, stop = self.starts[first], first + 1
            while stop < len(self.batch_sizes) and self.starts[stop + 1] - start <= rows:
                stop += 1
            before = self.batch_sizes[first - 1] if first else self.live
            after = self.batch_sizes[stop] if stop < len(self.batch_sizes) else 0
            chunks.append(Chunk(first, start, self.starts[stop] - start, self.batch_sizes[first:stop], before, after))
            first = stop
        return chunks


class Chunk(NamedTuple):
    """Some steps in a row: the first, their rows, and how many sequences run at each, just before and just after."""

    first: int
    start: int
    rows: int
    sizes: list[int]
    before: int
    after: int


def plan_full(batch: int, steps: int, batch_first: bool, device: torch.device) -> Plan:
    """The plan of a batch without padding."""
    index = None
    if batch_first and batch > 1:
        index = torch.arange(batch * steps, device=device).view(batch, steps).t().reshape(-1)
    return Plan([batch] * steps if batch else [], batch, batch * steps, device, index)


def plan_rows(
    lengths: Tensor,
    starts: Tensor,
    stride: int,
    size: int,
    device: torch.device,
    *,
    is_sorted: bool = False,
    steps_of: Tensor | None = None,
) -> Plan:
    """The plan of a batch whose row `(n, t)` lies at `starts[n] + stride * t`.

    `steps_of` `(T, N)` names the time of each sequence's k-th real step, where that is not k.
    """
    batch = lengths.size(0)
    order = None
    if not is_sorted:
        lengths, order = lengths.sort(descending=True, stable=True)
    steps = int(lengths[0]) if batch else 0
    live = torch.arange(steps, device="cpu").unsqueeze(1) < lengths
    batch_sizes = live.sum(1).tolist()
    step, place = live.nonzero(as_tuple=True)
    sequence = place if order is None else order[place]
    time = step if steps_of is None else steps_of[step, sequence]
    index = (starts[sequence] + stride * time).to(device)
    if order is not None:
        order = order[: batch_sizes[0] if batch_sizes else 0].to(device)
    return Plan(batch_sizes, batch, size, device, index, order)


def real_steps(mask: Tensor) -> Tensor:
    """`(T, N)`: the times of each sequence's real steps, in order, then those of its padding."""
    return (~mask).to(torch.uint8).argsort(dim=0, stable=True)


def compact(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`(T, N, I)` with each sequence's real steps moved to its front, and where each step went (padding: T)."""
    steps = x.size(0)
    place = torch.where(mask, mask.to(torch.int64).cumsum(0) - 1, steps)  # ONNX sums no bools
    index = place.unsqueeze(-1).expand_as(x)
    moved = x.new_zeros(steps + 1, *x.shape[1:]).scatter(0, index, x)
    return moved[:steps], place


def spread(x: Tensor, place: Tensor) -> Tensor:
    """The inverse of `compact`; zero at padding."""
    padded = torch.cat([x, torch.zeros_like(x[:1])])
    return padded.gather(0, place.unsqueeze(-1).expand(*place.shape, x.size(-1)))


def live_steps(lengths: Tensor, steps: int) -> Tensor:
    """`(T, N, 1)`, True at real steps."""
    return (torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths).unsqueeze(-1)


def reverse_index(lengths: Tensor, steps: int) -> Tensor:
    """`(T, N, 1)`: for each step, the step that takes its place when every row is reversed within its own length.

    Lengths 3 and 1 of 3 steps: `[[2, 0], [1, 1], [0, 2]]`: padding stays where it is.
    """
    time = torch.arange(steps, device=lengths.device).unsqueeze(1)
    return torch.where(time < lengths, lengths - 1 - time, time).unsqueeze(-1)
