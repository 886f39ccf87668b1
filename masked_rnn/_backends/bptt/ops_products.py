"""The matrix products of a layer: of its steps, of its input, and of its weights' gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._spec import LayerWeights, States, Weights
from .ops_cells import AddProduct, Cell


def recurrent_product(w: Tensor) -> AddProduct:
    """Return a function that adds h @ w to its first argument. Both are matrices, or pairs of matrices."""
    product: Any = Tensor.addmm_ if w.dim() == 2 else Tensor.baddbmm_
    return lambda target, h: product(target, h, w)


def input_biases(cell: Cell, weights: Weights) -> tuple[Tensor | None, Tensor | None]:
    """Return `b_ih + b_hh`, except for the GRU's n gate, where `b_hn` is multiplied by r; and the bias of that gate."""
    if weights.b_ih is None or weights.b_hh is None:
        return None, None
    b_hh = cell.order_gates(weights.b_hh)
    bias = weights.b_ih.clone()
    bias[: bias.size(0) - cell.recurrent_only].add_(b_hh[cell.recurrent_only :])
    return bias, b_hh[: cell.recurrent_only]


class InputProduct:
    """Computes W_ih x + b_ih + b_hh into a buffer. The GRU's b_hn goes into the block before it (see `GRU`)."""

    def __init__(self, cell: Cell, weights: Weights) -> None:
        self.w = weights.w_ih.t()
        self.gates = cell.spec.gates * cell.hidden
        self.before = cell.recurrent_only
        self.bias, self.bias_before = input_biases(cell, weights)

    def __call__(self, x: Tensor, buffer: Tensor) -> None:
        product = buffer.narrow(-1, self.before, self.gates)
        if self.bias is None:
            torch.mm(x, self.w, out=product)
        else:
            torch.addmm(self.bias, x, self.w, out=product)
        if self.before:
            before = buffer.narrow(-1, 0, self.before)
            before.zero_() if self.bias_before is None else before.copy_(self.bias_before)


class WeightGradients:
    """The sums of the weights' gradients over the chunks, by name. Recurrent ones hold both directions."""

    def __init__(self, cell: Cell, weights: LayerWeights) -> None:
        self.cell, self.weights = cell, weights
        self.recurrent: dict[str, Tensor] = {}
        self.input: list[dict[str, Tensor]] = [{} for _ in weights]

    def add_recurrent(self, derivatives: States, h: Tensor, dh: Tensor) -> None:
        self._add_product(self.recurrent, "w_hh", derivatives[0].mT, h)
        if self.weights[0].b_hh is not None:
            self._add_sum(self.recurrent, "b_hh", derivatives[0])
        if self.cell.w_hr is not None:
            self._add_product(self.recurrent, "w_hr", dh.mT, derivatives[-1])  # the LSTM's m

    def add_input(self, direction: int, d: Tensor, x: Tensor) -> None:
        self._add_product(self.input[direction], "w_ih", d.t(), x)
        if self.weights[direction].b_ih is not None:
            self._add_sum(self.input[direction], "b_ih", d)

    def _add_product(self, sums: dict[str, Tensor], name: str, a: Tensor, b: Tensor) -> None:
        if name not in sums:
            sums[name] = a @ b
        elif a.dim() == 2:
            sums[name].addmm_(a, b)
        else:
            sums[name].baddbmm_(a, b)

    def _add_sum(self, sums: dict[str, Tensor], name: str, d: Tensor) -> None:
        if name not in sums:
            sums[name] = d.sum(-2)
        else:
            sums[name].add_(d.sum(-2))

    def result(self) -> LayerWeights:
        grads = []
        for direction, weights in enumerate(self.weights):
            sums = self.input[direction] | {
                name: total[direction] if len(self.weights) == 2 else total for name, total in self.recurrent.items()
            }
            if not sums:  # no row ran
                sums = {name: torch.zeros_like(w) for name, w in weights._asdict().items() if w is not None}
            grads.append(Weights(**sums))
        return tuple(grads)
