"""The recurrence as one node of a graph, for any number of steps. Compilers make a loop of it that needs no Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from .._cells import States, Weights
from .._torch import graph_loop, runs_while_dynamo_traces
from .recurrence import Marks, advance


def in_graph(
    mode: str, w: Weights, marks: Marks, state: States, given: Sequence[Tensor], backward: bool
) -> tuple[States, Tensor]:
    """As `unrolled`, which `recurrence.scan` else calls."""
    _let_dynamo_keep_loop()
    *last, output = _run(mode, tuple(w), marks, state, tuple(given), backward)
    return tuple(last), output


@runs_while_dynamo_traces
def _let_dynamo_keep_loop() -> None:
    torch.compiler.allow_in_graph(_run)


def _run(
    mode: str,
    weights: tuple[Tensor | None, ...],
    marks: Marks,
    state: States,
    given: tuple[Tensor, ...],
    backward: bool,
) -> tuple[Tensor, ...]:
    """Return the last state and the output. Dynamo does not look inside: it can't tell the loop the sizes it needs."""
    has = [w is not None for w in weights]

    def step(*tensors: Tensor) -> list[Tensor]:
        each = iter(tensors)
        now, steps = tuple(next(each) for _ in state), [next(each) for _ in given]
        w = Weights(*(next(each) if here else None for here in has))  # type: ignore[arg-type]
        new, output = advance(mode, w, marks, now, steps)
        return [*new, output.clone()]  # a copy, because the output may be the new state

    # A loop keeps the strides of its state.
    start = [h.clone(memory_format=torch.contiguous_format) for h in state]
    steps = [t.flip(0) for t in given] if backward else given
    *last, output = graph_loop(step, start, steps, list(compress(weights, has)))  # type: ignore[arg-type]
    return (*last, output.flip(0) if backward else output)
