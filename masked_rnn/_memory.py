"""Access to a tensor's memory, checked first. No other module asks for an address."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._torch import is_zero_tensor

Array = np.ndarray[Any, np.dtype[Any]]
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_NUMPY = {torch.bool: np.bool_, torch.int64: np.int64}
_STRIDED = torch.strided


class NotPlainError(TypeError):
    """The memory of a tensor does not simply hold its values. PyTorch's ops can handle such tensors."""


def addresses(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[int]:
    """Return the address of each contiguous tensor's memory, followed by its number of elements.

    Raises:
        NotPlainError: A tensor is a subclass, on another device, or of another dtype or layout. Or its negative bit is
            set, or its storage is missing or too small.
    """
    found: list[int] = []
    for tensor in tensors:
        if (
            type(tensor) not in PLAIN_TYPES
            or tensor.dtype is not dtype
            or not tensor.is_cpu
            or tensor.layout is not _STRIDED
            or not tensor.is_contiguous()
            or tensor.is_neg()
        ):
            raise NotPlainError
        count, place = tensor.numel(), tensor.data_ptr()
        needed = (tensor.storage_offset() + count) * dtype.itemsize
        if count and (not place or tensor.untyped_storage().nbytes() < needed):
            raise NotPlainError
        found += (place, count)
    return found


def new_tensor(like: Tensor, shape: Sequence[int]) -> tuple[Tensor, int, int]:
    """Return a new tensor of the dtype of `like`, which has passed the checks of `addresses`; and its address and size.

    Raises:
        NotPlainError: A mode makes other tensors.
    """
    made = like.new_empty(*shape)
    if type(made) is not Tensor:
        raise NotPlainError
    return made, made.data_ptr(), made.numel()


def new_like(tensor: Tensor) -> tuple[Tensor, int, int]:
    """As `new_tensor`, of the same shape and strides as a tensor that has passed the checks of `addresses`."""
    made = torch.empty_like(tensor)
    if type(made) is not Tensor:
        raise NotPlainError
    return made, made.data_ptr(), made.numel()


def with_memory(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values whose storage is there and whose negative bit is not set.

    A subclass or a tensor on another device is returned unchanged. The check of the storage is needed because PyTorch's
    own ops read memory that was freed.

    Raises:
        RuntimeError: The storage was freed, or made too small.
    """
    if type(tensor) not in PLAIN_TYPES or not tensor.is_cpu or tensor.layout is not _STRIDED:
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
    """Return `tensor.contiguous()`, after the checks of `with_memory`."""
    return tensor if tensor.is_contiguous() else with_memory(tensor).contiguous()


def copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy, after the checks of `with_memory`."""
    return with_memory(tensor).clone(memory_format=torch.contiguous_format)


def as_array(tensor: Tensor) -> Array:
    """Return a NumPy view. `Tensor.numpy()` would prevent a later resize, which `fully_shard` needs."""
    dtype = _NUMPY[tensor.dtype]
    if type(tensor) not in PLAIN_TYPES or not tensor.is_cpu:
        return np.array(tensor.tolist(), dtype).reshape(tensor.shape)
    tensor = with_memory(tensor).contiguous()
    place, count = addresses((tensor,), tensor.dtype)
    memory: Any = (ctypes.c_char * (count * tensor.element_size())).from_address(place)
    memory.owner = tensor
    return np.ndarray(tensor.shape, dtype, memory)
