"""Calls PyTorch's recurrent kernels (ATen, cuDNN, MIOpen, oneDNN) over a padded batch or over packed rows.

T time, N batch, I input, R packed rows, H hidden, P the state that is fed back, D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._call import Call
from .._cells import stack_layers
from .._probe import lstm_kernel_runs
from .._spec import LayerWeights, Spec, States, flatten_weights
from .._torch import KERNELS, is_autocast_on, is_fake
from . import cudnn
from .double_backward import DoubleBackward
from .recurrence import scan_layers


def why_no_lstm_kernel(call: Call, with_gradients: bool) -> str | None:
    """Return why PyTorch's LSTM can't run over a padded batch on this CPU. None: it can."""
    spec = call.spec
    if spec.mode != "LSTM" or spec.proj_size or not call.data.is_cpu:
        return None
    if not is_autocast_on("cpu") or call.data.dtype == torch.float64:
        return None
    dtype = torch.get_autocast_dtype("cpu")
    if lstm_kernel_runs(dtype, with_gradients, spec.bidirectional):
        return None
    reason = f"PyTorch has no LSTM kernel for {dtype} under autocast on this CPU"
    if with_gradients and lstm_kernel_runs(dtype, False, spec.bidirectional):
        return f"{reason} while gradients are recorded"
    return reason


def run_stack(
    call: Call,
    x: Tensor,  # (N, T, I) or (T, N, I) in the layout of the call's data; packed rows (R, I) with batch_sizes
    initial: States,  # each (L·D, N, P or H)
    batch_sizes: Tensor | None = None,  # (T,)
) -> tuple[Tensor, States]:
    """Run a call's layers over a padded batch in its layout, or over packed rows if `batch_sizes` are given."""
    batch_first = call.form.batch_first and batch_sizes is None
    if not (call.dropout and cudnn.runs_cudnn(x)):
        return run_kernel(call.spec, x, initial, call.parameters, batch_sizes, batch_first, call.dropout)

    # A checkpoint, which runs once without gradients and once with them, must draw the same dropout twice. cuDNN's
    # own dropout can't be drawn again, but F.dropout between single layers can.
    def run_one(spec: Spec, x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States]:
        return run_layer(spec, x, initial, weights, batch_sizes)

    x = x.transpose(0, 1) if batch_first else x
    x, states = stack_layers(call.spec, x, initial, call.parameters, run_one, call.dropout)
    return x.transpose(0, 1) if batch_first else x, states


def run_layer(
    spec: Spec,
    x: Tensor,  # (T, N, I), or packed rows (R, I) with batch_sizes
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
    batch_sizes: Tensor | None = None,  # (T,)
) -> tuple[Tensor, States]:
    """Run one layer over a padded batch, time first, or over packed rows."""
    return run_kernel(spec, x, initial, flatten_weights([weights]), batch_sizes)


def run_kernel(
    spec: Spec,
    x: Tensor,
    initial: States,
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
    batch_first: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, States]:
    """Run a stack of layers over a padded batch, or over packed rows, so that cuDNN's can be differentiated twice."""
    if not cudnn.runs_cudnn(x):
        return call_kernel(spec, x, initial, parameters, batch_sizes, batch_first, dropout)
    initial = tuple(h.contiguous() for h in initial)  # cuDNN needs it; a flattened hx is not contiguous
    if not is_fake(x):
        parameters = cudnn.in_one_chunk(parameters)
    if not torch.is_grad_enabled():
        return call_kernel(spec, x, initial, parameters, batch_sizes, batch_first, dropout)
    if batch_sizes is not None:
        batch_sizes = batch_sizes.clone()  # `recurrence` reads it later, when the caller may have changed the original

    def recurrence(x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        weights = tensors[len(initial) :]
        dtype = weights[0].dtype  # under autocast, x and the states may have other dtypes
        x, *states = (t.to(dtype) for t in (x, *tensors[: len(initial)]))
        output, last = scan_layers(spec, x, tuple(states), weights, batch_sizes, batch_first)
        return output, *last

    output, last = call_kernel(spec, x, initial, parameters, batch_sizes, batch_first, dropout, saves=True)
    output, *last_again = DoubleBackward.apply(recurrence, 1 + len(last), output, *last, x, *initial, *parameters)
    return output, tuple(last_again)


def call_kernel(
    spec: Spec,
    x: Tensor,
    initial: States,
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
    batch_first: bool,
    dropout: float = 0.0,
    saves: bool = False,
) -> tuple[Tensor, States]:
    """Call PyTorch's function. Its flag `train` turns dropout on, and makes cuDNN save what backward needs."""
    hx: Any = initial if spec.has_cell_state else initial[0]
    options = (spec.bias, spec.num_layers, dropout, saves or dropout > 0, spec.bidirectional)
    results: tuple[Tensor, ...] = (
        KERNELS[spec.mode](x, hx, parameters, *options, batch_first)
        if batch_sizes is None
        else KERNELS[spec.mode](x, batch_sizes, hx, parameters, *options)
    )
    return results[0], results[1:]
