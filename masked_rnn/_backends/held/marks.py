"""The weights of a layer whose gates hold the state over padding: those of the layer, and those of the marks.

I input, W input and marks, H hidden, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._cells import HOLD, LayerWeights, Weights, group_weights
from ..._spec import GATES
from ..._torch import current_stream, is_capturing
from ..cudnn import views_of
from .operators import Kernel

DRIVES: dict[str, dict[int, float]] = {"GRU": {1: HOLD}, "LSTM": {0: -HOLD, 1: HOLD}, "RNN_RELU": {0: -torch.inf}}
"""The value that a mark adds to each gate, by the gate's index. -inf: a quarter of the dtype's least number"""


def marks_for(mode: str, inputs: int, hidden: int, directions: int, dtype: torch.dtype) -> int:
    """Return how many features mark padding. With them, a row's size is a multiple of 8, which makes products faster.

    For float16, PyTorch's rule for the persistent kernel of LSTM and RNN (`use_persist_common_heuristics`) asks for a
    multiple of 128.
    """
    is_persistent = mode != "GRU" and dtype == torch.float16 and directions == 1 and inputs % 128 == hidden % 128 == 0
    multiple = 128 if is_persistent else 8
    return multiple - inputs % multiple


def flatten(kernel: Kernel, weights: LayerWeights, width: int, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
    """Return all weights of a layer as one chunk, with those of the marks, and as views of it in `torch.nn`'s order."""
    matrices: list[Tensor] = []
    biases: list[Tensor] = []
    for w in weights:
        matrices += [_widened(kernel, w, width, dtype), w.w_hh, *(() if w.w_hr is None else (w.w_hr,))]
        if w.b_ih is not None and w.b_hh is not None:
            biases += [w.b_ih, w.b_hh]
    rows = GATES[kernel.mode] * kernel.hidden
    tail = biases
    if not biases or kernel.mode == "RNN_TANH":  # whose biases are weights of the marks
        tail = [_zeros(2 * len(weights) * rows, 1, dtype, weights[0].w_hh.device)]
    flat = torch.cat([t.reshape(-1).to(dtype) for t in (*matrices, *tail)])
    shapes: list[torch.Size] = []
    each = len(matrices) // len(weights)
    for d in range(len(weights)):
        own = [t.shape for t in matrices[d * each : (d + 1) * each]]
        shapes += [*own[:2], *(b.shape for b in biases[2 * d : 2 * d + 2]), *own[2:]]
    return flat, views_of(flat, shapes)


def _widened(kernel: Kernel, w: Weights, width: int, dtype: torch.dtype) -> Tensor:
    """Return w_ih with the weights of the marks, (G·H, W)."""
    marks, device = width - w.w_ih.size(1), w.w_ih.device
    if kernel.mode != "RNN_TANH":
        return torch.cat([w.w_ih.to(dtype), _drive(kernel.mode, kernel.hidden, marks, dtype, device)], 1)
    zeros = _zeros(kernel.hidden, marks, dtype, device)
    if w.b_ih is None or w.b_hh is None:
        return torch.cat([w.w_ih.to(dtype), zeros], 1)
    return torch.cat([w.w_ih.to(dtype), (w.b_ih + w.b_hh).to(dtype).unsqueeze(1), zeros[:, 1:]], 1)


def narrow(kernel: Kernel, d_weights: Sequence[Tensor], inputs: int) -> LayerWeights:
    """Return the gradients of the weights from those of the widened ones."""

    def copied(part: Tensor) -> Tensor:  # with its own strides, also where its size is 1
        return part.clone(memory_format=torch.contiguous_format)

    own_weights = []
    for w in group_weights(d_weights, 1, kernel.directions)[0]:
        own = w._replace(w_ih=copied(w.w_ih[:, :inputs]))
        if kernel.mode == "RNN_TANH" and w.b_ih is not None:
            bias = w.w_ih[:, inputs]
            own = own._replace(b_ih=copied(bias), b_hh=copied(bias))
        own_weights.append(own)
    return tuple(own_weights)


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
        drive[gate, :, 0] = torch.finfo(dtype).min / 4 if value == -torch.inf else value
    return drive.flatten(0, 1)


@_kept
def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=dtype, device=device)
