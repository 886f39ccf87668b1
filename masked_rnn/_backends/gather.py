"""Gathers rows of a tensor and scatters them back. Each is the gradient of the other.

The gradient of index_select has to add, because an index may repeat. A plan's index never repeats, so a copy is enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather_rows(x: Tensor, index: Tensor | None) -> Tensor:
    """Return the rows of x (M, I) at `index` (R,). None: all rows."""
    return x if index is None else _Gather.apply(x, index)


def scatter_rows(x: Tensor, index: Tensor | None, size: int) -> Tensor:
    """Return a tensor (size, I) with the rows of x (R, I) at `index` (R,), and zero elsewhere. None: x."""
    return x if index is None else _Scatter.apply(x, index, size)


class _Gather(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, index = inputs
        ctx.size = x.size(0)
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return scatter_rows(grad, index, ctx.size), None


class _Scatter(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, size: int) -> Tensor:
        return x.new_zeros(size, x.size(-1)).index_copy(0, index, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gather_rows(grad, index), None, None
