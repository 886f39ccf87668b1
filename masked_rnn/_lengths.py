"""What a length or a mask means: checked here, and turned into the plan of rows that run.

T time, N batch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


def values_can_be_read(tensor: Tensor) -> bool:
    """False while the call is traced or transformed, when a tensor stands for values that are not there."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or tensor.device.type == "meta"
        or isinstance(tensor, torch._subclasses.FakeTensor)
    )


def is_on_host(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def check_lengths(given: Any, batch: int, steps: int, device: torch.device, layout: str) -> Tensor:
    """Lengths as int64 `(N,)`, checked against the batch; on the host unless both they and the input are elsewhere."""
    lengths = _int64(given)
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
        torch._assert_async(
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
            f"mask must be a bool tensor, True at real steps, but its dtype is {mask.dtype}. Use mask.bool()."
        )
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, but the input's first dimensions are {shape} ({layout}). "
            "Expected one bool per time step of each sequence."
        )
    moved: Tensor = mask.to(device)
    return moved


def check_sorted(lengths: Tensor) -> None:
    if not values_can_be_read(lengths):
        return
    if not is_on_host(lengths):
        torch._assert_async((lengths.diff() <= 0).all(), "lengths must decrease under enforce_sorted=True")
        return
    for n, (before, length) in enumerate(pairwise(lengths.tolist()), 1):
        if length > before:
            raise ValueError(
                f"lengths must decrease under enforce_sorted=True, but lengths[{n}] = {length} is longer than "
                f"lengths[{n - 1}] = {before}. Sort the batch by length, or build the layer with enforce_sorted=False."
            )


def _int64(lengths: Any) -> Tensor:
    cure = "Expected whole numbers: a list, a tuple, an array or a tensor of any integer dtype."
    if isinstance(lengths, bool | float | str | bytes) or lengths is None:
        raise TypeError(f"lengths must be integers, got {lengths!r} of type {type(lengths).__name__}. {cure}")
    if isinstance(lengths, Sequence):
        for n, length in enumerate(lengths):
            if isinstance(length, Sequence) and not isinstance(length, str | bytes):
                raise ValueError(f"lengths must have one dimension, but lengths[{n}] is {length!r}. {cure}")
            if isinstance(length, Tensor):
                integral = length.numel() == 1 and _integral(length.dtype)
            else:
                integral = hasattr(length, "__index__") and not _is_bool(length)
            if not integral:
                raise TypeError(f"lengths[{n}] = {length!r} is of type {type(length).__name__}. {cure}")
        return torch.tensor([operator.index(length) for length in lengths], dtype=torch.int64, device="cpu")
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"lengths can't be read as integers, got {type(lengths).__name__}. {cure}") from error
    if not _integral(lengths.dtype):
        use = "If it marks real steps, give it as mask." if lengths.dtype == torch.bool else "Use lengths.long()."
        raise TypeError(f"lengths must be integers, but its dtype is {lengths.dtype}. {cure} {use}")
    whole: Tensor = lengths.to(torch.int64)
    return whole


def _is_bool(value: Any) -> bool:
    return type(value).__name__ in ("bool", "bool_")  # Python's, and NumPy's without importing it


def _integral(dtype: torch.dtype) -> bool:
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
    place = torch.where(mask, mask.cumsum(0) - 1, steps)
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
