"""Tensors whose memory is read as it lies, not through PyTorch's ops."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._torch import Array, is_zero_tensor

PLAIN = (Tensor, torch.nn.Parameter)
_NUMPY = {torch.bool: np.bool_, torch.int64: np.int64}


def with_memory(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values whose memory holds them as they are.

    A subclass and a tensor of another device come back as they came. PyTorch's own ops read memory that was freed.

    Raises:
        RuntimeError: The storage was freed, or made too small.
    """
    if type(tensor) not in PLAIN or not tensor.is_cpu:
        return tensor
    if is_zero_tensor(tensor):
        return tensor.clone()
    size, dims = tensor.untyped_storage().nbytes(), zip(tensor.shape, tensor.stride(), strict=True)
    needed = (tensor.storage_offset() + 1 + sum((n - 1) * step for n, step in dims)) * tensor.element_size()
    if size < needed and tensor.numel():
        raise RuntimeError(
            f"A tensor of size {list(tensor.shape)} needs a storage of {needed} bytes, but its storage has {size}: it "
            "was freed or made smaller since the tensor was made."
        )
    return tensor.resolve_neg()


def as_array(tensor: Tensor) -> Array:
    """Return a NumPy view. `Tensor.numpy()` would prevent a later resize, which `fully_shard` needs.

    DLPack takes longer, and so do Numba's own arrays.
    """
    dtype = _NUMPY[tensor.dtype]
    if type(tensor) not in PLAIN or not tensor.is_cpu:
        return np.array(tensor.tolist(), dtype).reshape(tensor.shape)
    tensor = with_memory(tensor).contiguous()
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor
    return np.ndarray(tensor.shape, dtype, memory)
