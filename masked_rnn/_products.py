"""The recurrent product: many small matrices, one after another, with the same weight.

MKL lays out the weight anew for every product of more than one row. Where it is large against the rows, that is most of
the work, and oneDNN's product with a weight laid out once is faster although it can't add in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._cells import Add
from ._torch import has_onednn, packed_linear

LARGE = 3 << 18
"""Bytes of a weight from which its layout is worth keeping: most of a core's second-level cache."""


def adder(w: Tensor, rows: int) -> Add:
    """A function that adds h @ w to its first argument; w (K, M) and h (b, K) with b up to `rows`, or pairs of both."""
    if rows > 1 and _keeps_layout(w):
        return _kept(w) if w.dim() == 2 else _pair(_kept(w[0]), _kept(w[1]))
    product: Any = Tensor.addmm_ if w.dim() == 2 else Tensor.baddbmm_
    return lambda target, h: product(target, h, w)


def _keeps_layout(w: Tensor) -> bool:
    return (
        w.device.type == "cpu"
        and w.dtype == torch.float32
        and w.size(-1) * w.size(-2) * w.element_size() >= LARGE
        and torch.backends.mkl.is_available()
        and has_onednn()
        and packed_linear() is not None
    )


def _kept(w: Tensor) -> Add:
    found = packed_linear()
    assert found is not None
    pack, linear = found
    weight = pack(w.t().contiguous())

    def add_(target: Tensor, h: Tensor) -> None:
        target.add_(linear(h, weight))

    return add_


def _pair(first: Add, second: Add) -> Add:
    def add_(target: Tensor, h: Tensor) -> None:
        first(target[0], h[0])
        second(target[1], h[1])

    return add_
