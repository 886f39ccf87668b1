"""What PyTorch's kernels ask for on a GPU: when they are cuDNN's, in which dtype they run, how weights must lie."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .._spec import Shape
from .._torch import is_autocast_on, share_storage


def runs_cudnn(x: Tensor) -> bool:
    """Return whether PyTorch's kernel will be cuDNN's or MIOpen's, whose backward can't be differentiated."""
    return x.is_cuda and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()


def running_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which PyTorch's kernel runs for an input. cuDNN's is float16 whatever dtype autocast has."""
    device = x.device.type
    if not is_autocast_on(device) or x.dtype == torch.float64 or x.is_complex():
        return x.dtype
    return torch.float16 if runs_cudnn(x) else torch.get_autocast_dtype(device)


def in_one_chunk(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return a stack's weights in one chunk of memory, as cuDNN needs them: matrices, then biases, or else zeros.

    PyTorch copies other weights one by one, with a warning. If we run one layer of several, users can't avoid it.
    Without biases, cuDNN would read whatever follows the matrices as biases: hence the zeros.
    """
    order = sorted(range(len(parameters)), key=lambda k: -parameters[k].dim())
    inside = [parameters[k] for k in order]
    has_biases = inside[-1].dim() == 1
    zeros = 0 if has_biases else sum(p.size(0) for p in inside)
    begins = [p.storage_offset() * p.element_size() for p in inside]
    ends = [begin + p.nbytes for begin, p in zip(begins, inside, strict=True)]
    # A storage that ends there is one that this function made.
    has_zeros = has_biases or ends[-1] + zeros * inside[0].element_size() == inside[0].untyped_storage().nbytes()
    is_row = begins == [0, *ends[:-1]] and all(p.is_contiguous() and share_storage(p, inside[0]) for p in inside)
    if has_zeros and is_row:
        return parameters
    flat = torch.cat([*(p.reshape(-1) for p in inside), inside[0].new_zeros(zeros)])
    return views_of(flat, [p.shape for p in parameters])


def views_of(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Return the weights of these shapes that lie in a chunk: first the matrices, then the biases."""
    order = sorted(range(len(shapes)), key=lambda k: -len(shapes[k]))
    sizes = [prod(shapes[k]) for k in order]
    parts = dict(zip(order, flat[: sum(sizes)].split(sizes), strict=True))
    return [parts[k].view(shape) for k, shape in enumerate(shapes)]
