"""The one door to a tensor's memory. Nothing else in the package asks for an address."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
PLAIN = (Tensor, torch.nn.Parameter)
_NUMPY = {torch.bool: np.bool_, torch.int64: np.int64}
_STRIDED = torch.strided


class NotPlain(TypeError):
    """A tensor is not what its address would be read as. PyTorch's ops know what else a tensor can be."""


def address(tensor: Tensor, dtype: torch.dtype, rows: int, columns: int = 1) -> tuple[int, int]:
    """Return the address of a contiguous tensor's numbers, and how many they are: `rows` times `columns`.

    Raises:
        NotPlain: The tensor is a subclass, on another device, of another dtype, layout or size, negated by its bit
            alone, or its storage is not there or too small.
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
        raise NotPlain
    place: int = tensor.data_ptr()
    if count and (not place or tensor.untyped_storage().nbytes() < (tensor.storage_offset() + count) * dtype.itemsize):
        raise NotPlain
    return place, count


def as_array(tensor: Tensor) -> Array:
    """Return a NumPy view. `Tensor.numpy()` would prevent a later resize, which `fully_shard` needs."""
    tensor = tensor.detach().resolve_neg().contiguous()
    place, count = address(tensor, tensor.dtype, tensor.numel())
    memory: Any = (ctypes.c_char * (count * tensor.element_size())).from_address(place)
    memory.owner = tensor
    return np.ndarray(tensor.shape, _NUMPY[tensor.dtype], memory)
