"""Calls PyTorch's recurrent kernels (ATen, cuDNN, MIOpen, oneDNN), and knows when they are faster than our loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._call import Call
from .._cells import LayerWeights, States, flatten_weights, group_weights, stack_layers
from .._probe import lstm_kernel_runs
from .._spec import Spec, spec_of
from .._torch import KERNELS, has_onednn, is_autocast_on, is_fake
from . import cudnn
from .double_backward import DoubleBackward
from .recurrence import scan_layers

# Measured by `python -m benchmarks.choice`; docs/backends.md has the figures, the machine and the rules in words.
LARGE, LARGE_STEP = 512, 32768
"""In inference, oneDNN's LSTM is faster than the native loops if H is at least LARGE, and N·H at least LARGE_STEP."""
# Without the native loops: limits below which PyTorch's kernel is faster than the loops of PyTorch's ops.
FEW_STEPS = 4
"""Up to this many steps, PyTorch's kernel is faster than starting our loop. With lengths: up to one."""
SMALL_STEP, SHORT = 512, 16
"""In inference, it is faster over less than SHORT steps if N·H is below SMALL_STEP."""
VECTOR = 16
"""The width of oneDNN's vectors. A smaller layer takes as long as one of this hidden size."""
ONEDNN_STEP, WORTH_LEARNING, WORTH = 1400, 0.8, 1.6
"""oneDNN's LSTM is faster if N·w < ONEDNN_STEP + worth · R·w, where w is H, but at
least VECTOR, R the mean of real rows at a step, and worth is WORTH_LEARNING in training, WORTH in inference."""


def runs_all_steps_at_once(
    mode: str,
    x: Tensor,  # for its dtype and device
    hidden: int,
    proj: int,
    learns: bool,
) -> bool:
    """Return whether cuDNN runs all steps of a padded batch in one persistent kernel.

    Over packed rows cuDNN starts several kernels for each step. The rule is PyTorch's (`use_rnn_persist_small_h` in
    aten/src/ATen/native/cudnn/RNN.cpp).
    """
    if not cudnn.runs_cudnn(x) or torch.version.hip is not None or proj or x.dtype == torch.float64:
        return False
    if mode in ("GRU", "LSTM"):
        return hidden <= (128 if learns else 192)
    return hidden <= (256 if learns else 384)


def has_lstm_kernel(call: Call) -> bool:
    """Return whether the CPU's kernel over a padded batch is oneDNN's LSTM."""
    layer = call.layer
    return layer.mode == "LSTM" and not layer.proj_size and call.data.dtype == torch.float32 and has_onednn()


def kernel_beats_native(spec: Spec, dtype: torch.dtype, steps: int, batch: int) -> bool | None:
    """Return when PyTorch's kernel is faster than the native loops over a padded batch without lengths.

    True: while gradients are recorded. False: while they are not. None: never.
    """
    if spec.mode == "LSTM":
        large = batch * spec.hidden_size >= LARGE_STEP and spec.hidden_size >= LARGE
        return False if large and dtype == torch.float32 and not spec.proj_size and has_onednn() else None
    # An RNN's gradient of one step is a few products, and autograd runs a function written in Python more slowly.
    return True if steps == 1 and spec.mode != "GRU" and dtype.itemsize >= 4 else None


def kernel_is_faster(call: Call, learns: bool, loops_are_native: bool) -> bool:
    """Return whether PyTorch's kernel on the CPU, over the padded batch, is faster than our loop over the real steps.

    It reads the lengths.
    """
    if not call.form.is_strided or call.mask is not None or call.resets is not None:
        return False
    N, T, H, lengths = call.form.batch, call.form.steps, call.layer.hidden_size, call.lengths
    if loops_are_native:
        if lengths is None and kernel_beats_native(spec_of(call.layer), call.data.dtype, T, N) is learns:
            return True
        # Under autocast only the kernel computes in the lower precision.
        return has_lstm_kernel(call) and lengths is None and is_autocast_on("cpu")
    if (FEW_STEPS if lengths is None else 1) >= T:
        return True
    if not has_lstm_kernel(call):
        return not learns and N * H < SMALL_STEP and T < SHORT
    if lengths is None:
        return True
    width = max(H, VECTOR)
    real = int(lengths.sum()) / max(T, 1) * width
    return N * width < ONEDNN_STEP + (WORTH_LEARNING if learns else WORTH) * real


def why_no_lstm_kernel(call: Call, learns: bool) -> str | None:
    """Return why PyTorch's LSTM can't run over a padded batch on this CPU. None: it can."""
    if call.layer.mode != "LSTM" or call.layer.proj_size or not call.data.is_cpu:
        return None
    if not is_autocast_on("cpu") or call.data.dtype == torch.float64:
        return None
    dtype, directions = torch.get_autocast_dtype("cpu"), call.directions
    if lstm_kernel_runs(dtype, learns, directions):
        return None
    reason = f"PyTorch has no LSTM kernel for {dtype} under autocast on this CPU"
    return f"{reason} while gradients are recorded" if learns and lstm_kernel_runs(dtype, False, directions) else reason


class Stack(NamedTuple):
    """The configuration of a stack of layers that the kernels take."""

    mode: str
    layers: int
    directions: int
    dropout: float = 0.0
    batch_first: bool = False


def run_stack(
    call: Call,
    x: Tensor,  # (N, T, I) or (T, N, I) in the layout of the call's data; packed rows (R, I) with batch_sizes
    initial: States,  # each (L·D, N, P or H)
    batch_sizes: Tensor | None = None,  # (T,)
) -> tuple[Tensor, States]:
    """Run a call's layers over a padded batch in its layout, or over packed rows if `batch_sizes` are given."""
    layer, dropout, batch_first = call.layer, call.dropout, call.form.batch_first and batch_sizes is None
    if dropout and cudnn.runs_cudnn(x):
        # A checkpoint, which runs once without gradients and once with them, must draw the same dropout twice. cuDNN's
        # own dropout can't be drawn again, but F.dropout between single layers can.
        def run_one(x: Tensor, states: States, weights: LayerWeights) -> tuple[Tensor, States]:
            return run_layer(layer.mode, x, states, weights, batch_sizes)

        x = x.transpose(0, 1) if batch_first else x
        x, states = stack_layers(x, initial, call.weights, run_one, dropout)
        return x.transpose(0, 1) if batch_first else x, states
    stack = Stack(layer.mode, layer.num_layers, call.directions, dropout, batch_first)
    return run_kernel(stack, x, initial, call.parameters, batch_sizes)


def run_layer(
    mode: str,
    x: Tensor,  # (T, N, I), or packed rows (R, I) with batch_sizes
    initial: States,  # each (D, N, P or H)
    weights: LayerWeights,
    batch_sizes: Tensor | None = None,  # (T,)
) -> tuple[Tensor, States]:
    """Run one layer over a padded batch, time first, or over packed rows."""
    return run_kernel(Stack(mode, 1, len(weights)), x, initial, flatten_weights([weights]), batch_sizes)


def run_kernel(
    stack: Stack, x: Tensor, initial: States, parameters: Sequence[Tensor], batch_sizes: Tensor | None
) -> tuple[Tensor, States]:
    """Run a stack of layers over a padded batch, or over packed rows if `batch_sizes` are given."""
    if not cudnn.runs_cudnn(x):
        return call_kernel(stack, x, initial, parameters, batch_sizes, stack.dropout > 0)
    initial = tuple(h.contiguous() for h in initial)  # cuDNN needs it; a flattened hx is not contiguous
    if not is_fake(x):
        parameters = cudnn.in_one_chunk(parameters)
    if not torch.is_grad_enabled():
        return call_kernel(stack, x, initial, parameters, batch_sizes, stack.dropout > 0)
    if batch_sizes is not None:
        batch_sizes = batch_sizes.clone()  # `recurrence` reads it later, when the caller may have changed the original
    mode, layers, directions, _, batch_first = stack

    def recurrence(x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        grouped = group_weights(tensors[len(initial) :], layers, directions)
        dtype = grouped[0][0].w_ih.dtype  # under autocast, x and the states may have other dtypes
        x, *states = (t.to(dtype) for t in (x, *tensors[: len(initial)]))
        output, last = scan_layers(mode, x, tuple(states), grouped, batch_sizes, batch_first)
        return output, *last

    # cuDNN needs the `train` flag to save data for backward.
    output, last = call_kernel(stack, x, initial, parameters, batch_sizes, True)
    output, *last_again = DoubleBackward.apply(recurrence, 1 + len(last), output, *last, x, *initial, *parameters)
    return output, tuple(last_again)


def call_kernel(
    stack: Stack, x: Tensor, initial: States, parameters: Sequence[Tensor], batch_sizes: Tensor | None, train: bool
) -> tuple[Tensor, States]:
    mode, layers, directions, dropout, batch_first = stack
    hx: Any = initial if mode == "LSTM" else initial[0]
    options = (len(parameters) >= 4 * layers * directions, layers, dropout, train, directions == 2)
    results: tuple[Tensor, ...] = (
        KERNELS[mode](x, hx, parameters, *options, batch_first)
        if batch_sizes is None
        else KERNELS[mode](x, batch_sizes, hx, parameters, *options)
    )
    return results[0], results[1:]
