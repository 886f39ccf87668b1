"""The weights of a layer whose gates hold the state over padding: those of the layer, and those of the marks.

I input, W input and marks, H hidden, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._cells import HOLD, relu_drive
from ..._spec import GATES, LayerWeights, Spec, Weights
from ..._torch import current_stream, is_capturing
from ..cudnn import views_of

DRIVES: dict[str, dict[int, float]] = {"GRU": {1: HOLD}, "LSTM": {0: -HOLD, 1: HOLD}, "RNN_RELU": {0: -torch.inf}}
"""The value that a mark adds to each gate, by the gate's index. -inf: as `relu_drive`"""


def marks_for(spec: Spec, dtype: torch.dtype) -> int:
    """Return how many features mark padding. With them, a row's size is a multiple of 8, which makes products faster.

    For float16, PyTorch's rule for the persistent kernel of LSTM and RNN (`use_persist_common_heuristics`) asks for a
    multiple of 128.
    """
    is_persistent = (
        spec.mode != "GRU"
        and dtype == torch.float16
        and not spec.bidirectional
        and spec.input_size % 128 == spec.hidden_size % 128 == 0
    )
    multiple = 128 if is_persistent else 8
    return multiple - spec.input_size % multiple


def flatten(spec: Spec, weights: LayerWeights, width: int, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
    """Return all weights of a layer as one chunk, with those of the marks, and as views of it in `torch.nn`'s order."""
    matrices: list[Tensor] = []
    biases: list[Tensor] = []
    for w in weights:
        matrices += [_widened(spec, w, width, dtype), w.w_hh, *(() if w.w_hr is None else (w.w_hr,))]
        if w.b_ih is not None and w.b_hh is not None:
            biases += [w.b_ih, w.b_hh]
    rows = spec.gates * spec.hidden_size
    tail = biases
    if not biases or spec.mode == "RNN_TANH":  # whose biases are weights of the marks
        tail = [_zeros(2 * len(weights) * rows, 1, dtype, weights[0].w_hh.device)]
    flat = torch.cat([t.reshape(-1).to(dtype) for t in (*matrices, *tail)])
    wide = spec.changed(input_size=width, bias=bool(biases))
    return flat, views_of(flat, wide.shapes)


def _widened(spec: Spec, w: Weights, width: int, dtype: torch.dtype) -> Tensor:
    """Return w_ih with the weights of the marks, (G·H, W)."""
    marks, device = width - w.w_ih.size(1), w.w_ih.device
    if spec.mode != "RNN_TANH":
        return torch.cat([w.w_ih.to(dtype), _drive(spec.mode, spec.hidden_size, marks, dtype, device)], 1)
    zeros = _zeros(spec.hidden_size, marks, dtype, device)
    if w.b_ih is None or w.b_hh is None:
        return torch.cat([w.w_ih.to(dtype), zeros], 1)
    return torch.cat([w.w_ih.to(dtype), (w.b_ih + w.b_hh).to(dtype).unsqueeze(1), zeros[:, 1:]], 1)


def narrowed(spec: Spec, d_weights: Sequence[Tensor]) -> LayerWeights:
    """Return the gradients of the weights from those of the widened ones."""

    def copied(part: Tensor) -> Tensor:  # with its own strides, also where its size is 1
        return part.clone(memory_format=torch.contiguous_format)

    found = []
    for wide in spec.group(d_weights)[0]:
        narrow = wide._replace(w_ih=copied(wide.w_ih[:, : spec.input_size]))
        if spec.mode == "RNN_TANH" and spec.bias:
            bias = wide.w_ih[:, spec.input_size]
            narrow = narrow._replace(b_ih=copied(bias), b_hh=copied(bias))
        found.append(narrow)
    return tuple(found)


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep the constant tensors that a function makes, by its arguments, whose last is a device.

    Each stream has its own, because another stream would not wait for the first. While a CUDA graph is recorded nothing
    is kept, because the memory belongs to the graph.
    """

    @lru_cache(maxsize=64)
    def kept(_stream: int, *arguments: Any) -> Tensor:
        return make(*arguments)

    def find(*arguments: Any) -> Tensor:
        device = arguments[-1]
        return make(*arguments) if is_capturing(device) else kept(current_stream(device), *arguments)

    return find


@_kept
def _drive(mode: str, hidden: int, marks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights of the marks (G·H, marks). Only the first mark has any."""
    drive = torch.zeros(GATES[mode], hidden, marks, dtype=dtype, device=device)
    for gate, value in DRIVES[mode].items():
        drive[gate, :, 0] = relu_drive(dtype) if value == -torch.inf else value
    return drive.flatten(0, 1)


@_kept
def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=dtype, device=device)
