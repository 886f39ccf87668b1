"""Which loops run a layer: the native ones where they can, those of PyTorch's ops elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._cells import LayerWeights, States
from ..._memory import NotPlainError, with_memory
from ..._torch import is_recorded
from . import library, loops, native
from .layer_run import LayerRun, Saved


def forward(
    layer_run: LayerRun, x: Tensor, initial: States, weights: LayerWeights, save: bool, into: Saved | None = None
) -> tuple[Tensor, States, Saved | None]:
    if library.runs(x.dtype) and not is_recorded():
        try:
            return native.forward(layer_run, x, initial, weights, save, into)
        except NotPlainError:
            pass  # PyTorch's ops know what else a tensor can be, and refuse what they must
    x, initial, weights = _readable(x, initial, weights)
    return loops.forward(layer_run, x, initial, weights, save, into)


def backward(
    layer_run: LayerRun,
    x: Tensor,
    initial: States,
    weights: LayerWeights,
    saved: Saved,
    d_output: Tensor | None,
    d_last: Sequence[Tensor | None],
    want_x: bool,
    want_weights: bool,
) -> tuple[Tensor | None, States, LayerWeights | None]:
    if library.runs(x.dtype) and not is_recorded():
        try:
            return native.backward(layer_run, x, initial, weights, saved, d_output, d_last, want_x, want_weights)
        except NotPlainError:
            pass  # as above
    x, initial, weights = _readable(x, initial, weights)
    history, buffer = saved
    saved = Saved(tuple(map(with_memory, history)), None if buffer is None else with_memory(buffer))
    d_output = None if d_output is None else with_memory(d_output)
    d_last = [None if d is None else with_memory(d) for d in d_last]
    return loops.backward(layer_run, x, initial, weights, saved, d_output, d_last, want_x, want_weights)


def _readable(x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States, LayerWeights]:
    return (
        with_memory(x),
        tuple(map(with_memory, initial)),
        tuple(each.map(with_memory) for each in weights),
    )
