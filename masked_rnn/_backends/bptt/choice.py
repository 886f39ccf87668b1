"""Which loops run a layer: the native ones where they can, those of PyTorch's ops elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._cells import LayerWeights, States
from ..._memory import NotPlain
from ..._torch import is_recorded
from . import library, loops, native
from .spec import LayerSpec, Saved


def forward(
    spec: LayerSpec, x: Tensor, initial: States, weights: LayerWeights, save: bool, into: Saved | None = None
) -> tuple[Tensor, States, Saved | None]:
    if library.runs(x.dtype) and not is_recorded():
        try:
            return native.forward(spec, x, initial, weights, save, into)
        except NotPlain:
            pass  # PyTorch's ops know what else a tensor can be, and refuse what they must
    return loops.forward(spec, x, initial, weights, save, into)


def backward(
    spec: LayerSpec,
    x: Tensor,
    initial: States,
    weights: LayerWeights,
    saved: Saved,
    d_output: Tensor | None,
    d_last: Sequence[Tensor | None],
    want_x: bool,
    want_weights: bool,
) -> tuple[Tensor | None, States, LayerWeights | None]:
    given = (spec, x, initial, weights, saved, d_output, d_last, want_x, want_weights)
    if library.runs(x.dtype) and not is_recorded():
        try:
            return native.backward(*given)
        except NotPlain:
            pass  # as above
    return loops.backward(*given)
