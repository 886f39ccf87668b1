"""The recurrence as one node of a graph, for any number of steps. Compilers make a loop of it that needs no Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor

from .._spec import States, Weights
from .._torch import graph_scan
from .recurrence import Marks, advance


def in_graph(
    mode: str, w: Weights, marks: Marks, state: States, given: Sequence[Tensor], backward: bool
) -> tuple[States, Tensor]:
    """As `unrolled`, which `recurrence.scan` else calls."""
    _let_dynamo_keep_loop()
    *last, output = _run(mode, tuple(w), marks, state, tuple(given), backward)
    return tuple(last), output


def _let_dynamo_keep_loop() -> None:
    torch.compiler.allow_in_graph(_run)


# As torch.compiler.assume_constant_result, which would import Dynamo: Dynamo calls it, and leaves it out of the graph.
_let_dynamo_keep_loop._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        now, step_of_each = tuple(next(each) for _ in state), [next(each) for _ in given]
        w = Weights(*(next(each) if here else None for here in has))  # type: ignore[arg-type]
        new, output = advance(mode, w, marks, now, step_of_each)
        return [*new, output.clone()]  # a copy, because the output may be the new state

    # A loop keeps the strides of its state.
    start = [h.clone(memory_format=torch.contiguous_format) for h in state]
    steps = [t.flip(0) if backward else t for t in given]
    fixed = [w for w in weights if w is not None]
    with catch_warnings():
        # Under strict export, PyTorch calls torch.compile on the loop's gradient, and warns of that itself.
        filterwarnings("ignore", "torch.compile is ignored when called inside torch.export")
        *last, output = graph_scan(step, start, steps, (*fixed, *_free_sizes([*start, *steps, *fixed])))
    return (*last, output.flip(0) if backward else output)


def _free_sizes(tensors: Sequence[Tensor]) -> list[Any]:
    """Return the numbers from which a graph computes sizes: inductor looks for them among the arguments of a loop."""
    sizes: list[Any] = [size for t in tensors for size in t.shape]
    nodes = [size.node for size in sizes if isinstance(size, torch.SymInt)]
    found: dict[Any, Any] = {symbol: node.shape_env for node in nodes for symbol in node.expr.free_symbols}
    return [found[symbol].create_symintnode(symbol, hint=None) for symbol in sorted(found, key=str)]
