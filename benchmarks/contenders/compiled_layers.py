"""masked_rnn under torch.compile, one graph for every size."""

from __future__ import annotations

from typing import Any

import torch

from ..problem import Problem
from .torch_layers import Masked


class Compiled(Masked):
    def __init__(self, problem: Problem, threads: int, **options: Any) -> None:
        super().__init__(problem, threads, **options)
        torch._dynamo.reset()  # the layers before this one would count as recompilations of it
        torch._dynamo.config.allow_rnn = True
        self.layer.compile(fullgraph=True, dynamic=True)
