"""cuDNN's recurrent kernels for one layer, through the operators that PyTorch's own layers call.

The operators are described in aten/src/ATen/native/cudnn/RNN.cpp. `_torch.py` finds them.

T time, N batch, W input and marks, H hidden, P the state that is fed back (H, or proj_size), D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._spec import Spec, States
from ..._torch import cudnn_backward, cudnn_forward, graph_is_kept
from .. import cudnn

MODES = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}
"""cuDNN's numbers, by `nn.RNNBase.mode`"""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not(x: Tensor) -> str | None:
    """Return the reason why the operators can't run an input. None: they can."""
    if not cudnn.runs_cudnn(x):
        where = "cuDNN is off or missing" if x.is_cuda else f"the input is on {x.device.type}"
        return f"it runs on an NVIDIA GPU, by cuDNN, and {where}"
    if torch.version.hip is not None:
        return "it runs on an NVIDIA GPU, by cuDNN, and this PyTorch is one for AMD's"
    if cudnn_forward is None or cudnn_backward is None:
        return "this PyTorch lacks cuDNN's operators"
    is_old = x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)
    if x.dtype not in DTYPES or (x.dtype == torch.bfloat16 and is_old):
        return f"cuDNN does not run {x.dtype} on this device"
    return None


def _arguments(spec: Spec, train: bool) -> tuple[Any, ...]:
    """Return the arguments that both operators end with: one layer, time first, no dropout, not packed."""
    sizes = (spec.hidden_size, spec.proj_size, 1)
    return MODES[spec.mode], *sizes, False, 0.0, train, spec.bidirectional, (), None


class Memory(NamedTuple):
    """The tensors that the kernel and its backward read."""

    x: Tensor
    """(T, N, W)"""
    flat: Tensor
    """All weights as one vector: the matrices, then the biases, or zeros in their place"""
    weights: Sequence[Tensor]
    """Views of `flat` in `torch.nn`'s order"""
    states: States
    """Each (D, N, P or H), contiguous"""


def run(spec: Spec, memory: Memory, train: bool) -> tuple[Tensor, States, Tensor]:
    """Return the output, the last states, and the reserve, which backward needs and `train` makes."""
    h, c = memory.states if spec.has_cell_state else (memory.states[0], None)
    count = len(memory.weights) // spec.directions
    output, h_n, c_n, reserve, _ = cudnn_forward(
        memory.x, memory.weights, count, memory.flat, h, c, *_arguments(spec, train)
    )
    return output, (h_n,) if c is None else (h_n, c_n), reserve


def run_back(
    spec: Spec,
    memory: Memory,
    output: Tensor,  # (T, N, D·P)
    reserve: Tensor,
    d_output: Tensor | None,  # (T, N, D·P)
    d_last: Sequence[Tensor | None],  # each (D, N, P or H)
    want_weights: bool,
) -> tuple[Tensor, States, Sequence[Tensor]]:
    """Return the gradients of x, of the initial states and, if they are wanted, of the weights.

    At least one of the given gradients must not be None.
    """
    h, c = memory.states if spec.has_cell_state else (memory.states[0], None)
    d_h, d_c = d_last if spec.has_cell_state else (d_last[0], None)
    count = len(memory.weights) // spec.directions
    if graph_is_kept():
        reserve = reserve.clone()  # cuDNN writes to it, and another backward will need it
    dx, dh, dc, d_weights = cudnn_backward(
        memory.x,
        memory.weights,
        count,
        memory.flat,
        h,
        c,
        output,
        d_output,
        d_h,
        d_c,
        *_arguments(spec, True),
        reserve,
        [True, True, c is not None, want_weights],
    )
    return dx, (dh,) if c is None else (dh, dc), d_weights
