"""The one door to a tensor's memory. Nothing else in the package asks for an address."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._torch import is_zero_tensor

Array = np.ndarray[Any, np.dtype[Any]]
PLAIN = (Tensor, torch.nn.Parameter)
_NUMPY = {torch.bool: np.bool_, torch.int64: np.int64}
_STRIDED = torch.strided


class NotPlainError(TypeError):
    """A tensor is not what its address would be read as. PyTorch's ops know what else a tensor can be."""


def address(tensor: Tensor, dtype: torch.dtype, rows: int, columns: int = 1) -> tuple[int, int]:
    """Return the address of a contiguous tensor's numbers, and how many they are: `rows` times `columns`.

    Raises:
        NotPlainError: The tensor is a subclass, on another device, of another dtype, layout or size, negated by its
            bit alone, or its storage is not there or too small.
    """
    count: int = tensor.numel()
    if (
        type(tensor) not in PLAIN
        or tensor.dtype is not dtype
        or count != rows * columns
        or not tensor.is_cpu
        or tensor.layout is not _STRIDED
        or not tensor.is_contiguous()
        or tensor.is_neg()
    ):
        raise NotPlainError
    place: int = tensor.data_ptr()
    if count and (not place or tensor.untyped_storage().nbytes() < (tensor.storage_offset() + count) * dtype.itemsize):
        raise NotPlainError
    return place, count


def with_memory(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values whose memory holds them as they are.

    A subclass and a tensor of another device come back as they came. PyTorch's own ops read memory that was freed.

    Raises:
        RuntimeError: The storage was freed, or made too small.
    """
    if type(tensor) not in PLAIN or not tensor.is_cpu or tensor.layout is not _STRIDED:
        return tensor
    if is_zero_tensor(tensor):
        return tensor.clone()
    size, numbers = tensor.untyped_storage().nbytes(), tensor.storage_offset() + 1
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        numbers += (n - 1) * step
    needed = numbers * tensor.element_size()
    if size < needed and tensor.numel():
        raise RuntimeError(
            f"A tensor of size {list(tensor.shape)} needs a storage of {needed} bytes, but its storage has {size}: it "
            "was freed or made smaller since the tensor was made."
        )
    return tensor.resolve_neg()


def contiguous(tensor: Tensor) -> Tensor:
    """`Tensor.contiguous`, but it copies only memory that is there, and values as they are."""
    return tensor if tensor.is_contiguous() else with_memory(tensor).contiguous()


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy, of memory that is there."""
    return with_memory(tensor).clone(memory_format=torch.contiguous_format)


def as_array(tensor: Tensor) -> Array:
    """Return a NumPy view. `Tensor.numpy()` would prevent a later resize, which `fully_shard` needs."""
    dtype = _NUMPY[tensor.dtype]
    if type(tensor) not in PLAIN or not tensor.is_cpu:
        return np.array(tensor.tolist(), dtype).reshape(tensor.shape)
    tensor = with_memory(tensor).contiguous()
    place, count = address(tensor, tensor.dtype, tensor.numel())
    memory: Any = (ctypes.c_char * (count * tensor.element_size())).from_address(place)
    memory.owner = tensor
    return np.ndarray(tensor.shape, dtype, memory)
