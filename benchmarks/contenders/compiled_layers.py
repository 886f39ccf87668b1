"""masked_rnn under torch.compile, with one graph for all sizes."""

from __future__ import annotations

from typing import Any

import torch

from ..problem import Problem
from .torch_layers import Masked


class Compiled(Masked):
    def __init__(self, problem: Problem, threads: int, **options: Any) -> None:
        super().__init__(problem, threads, **options)
        torch._dynamo.reset()  # else the layers before this one would count as its recompilations
        torch._dynamo.config.allow_rnn = True
        self.layer.compile(fullgraph=True, dynamic=True)
