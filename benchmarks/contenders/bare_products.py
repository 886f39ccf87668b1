"""Matrix products alone, by torch, to measure the speed of the machine. They are not a layer and are not checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import GATES, Problem


class Sgemm:
    """Multiplies two float32 matrices of n rows and columns."""

    def __init__(self, problem: Problem, threads: int, n: int) -> None:
        torch.set_num_threads(threads)
        self.a, self.b, self.out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)

    def infer(self) -> None:
        torch.mm(self.a, self.b, out=self.out)


class Products:
    """Makes only the products that a step needs, at real steps, by torch's `mm`, `addmm_` and `baddbmm_`.

    It computes no activation, moves no padding, allocates no memory and takes no slice.
    """

    def __init__(self, problem: Problem, threads: int) -> None:
        torch.set_num_threads(threads)
        _, T, I, H, L, _ = problem.shape  # noqa: E741
        D, columns = problem.shape.D, GATES[problem.cell] * H
        lengths = torch.from_numpy(problem.lengths())
        sizes = [int((lengths > t).sum()) for t in range(T)]
        rows = sum(sizes)

        def matrices(*shape: int) -> Tensor:
            return torch.randn(D, *shape) if D == 2 else torch.randn(*shape)

        axis = D - 1
        h, gates = matrices(rows, H), matrices(rows, columns)
        self.steps = list(zip(h.split(sizes, axis), gates.split(sizes, axis), strict=True))
        self.w_hh = matrices(columns, H)
        self.h, self.gates, self.dw_hh = h, gates, matrices(columns, H)
        self.add_: Any = Tensor.baddbmm_ if D == 2 else Tensor.addmm_
        self.directions = gates.unbind(0) if D == 2 else (gates,)
        self.layers = [
            (torch.randn(rows, width), torch.randn(columns, width), torch.randn(columns, width), k > 0)
            for k, width in enumerate([I] + [D * H] * (L - 1))
        ]

    @torch.no_grad()
    def infer(self) -> None:
        for x, w_ih, _, _ in self.layers:
            for gates in self.directions:
                torch.mm(x, w_ih.t(), out=gates)
            for h, gates in self.steps:
                self.add_(gates, h, self.w_hh.mT)

    @torch.no_grad()
    def train(self) -> None:
        self.infer()
        for x, w_ih, dw_ih, wants_dx in self.layers:
            for h, gates in self.steps:
                self.add_(h, gates, self.w_hh)
            self.add_(self.dw_hh, self.gates.mT, self.h)
            for gates in self.directions:
                torch.mm(gates.t(), x, out=dw_ih)
                if wants_dx:
                    torch.mm(gates, w_ih, out=x)
