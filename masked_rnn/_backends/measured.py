"""Where PyTorch's kernels are faster than our loops: limits that were measured, and the rules made of them.

`python -m benchmarks.choice` measures them. docs/backends.md has the figures, the machine and the rules in words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._call import Call
from .._spec import Spec
from .._torch import has_onednn, is_autocast_on
from . import cudnn

LARGE, LARGE_STEP = 512, 32768
"""In inference, oneDNN's LSTM is faster than the native loops if H is at least LARGE, and N·H at least LARGE_STEP."""
# Without the native loops: limits below which PyTorch's kernel is faster than the loops of PyTorch's ops.
FEW_STEPS = 4
"""Up to this many steps, PyTorch's kernel is faster than our loop. With lengths: up to one."""
SMALL_STEP, SHORT = 512, 16
"""In inference, it is faster over less than SHORT steps if N·H is below SMALL_STEP. Not oneDNN's LSTM: see below."""
VECTOR = 16
"""The width of oneDNN's vectors. A smaller layer takes as long as one of this hidden size."""
ONEDNN_STEP, WORTH_TRAINING, WORTH = 1400, 0.8, 1.6
"""oneDNN's LSTM is faster if N·w < ONEDNN_STEP + worth · R·w, where w is H, but at
least VECTOR, R the mean number of sequences at a step, and worth is WORTH_TRAINING in training, WORTH in inference."""


def runs_all_steps_at_once(
    spec: Spec,
    x: Tensor,  # for its dtype and device
    in_training: bool,
) -> bool:
    """Return whether cuDNN runs all steps of a padded batch in one persistent kernel.

    Over packed rows cuDNN starts several kernels for each step. The rule is PyTorch's (`use_rnn_persist_small_h` in
    aten/src/ATen/native/cudnn/RNN.cpp).
    """
    if not cudnn.runs_cudnn(x) or torch.version.hip is not None or spec.proj_size or x.dtype == torch.float64:
        return False
    if spec.mode in ("GRU", "LSTM"):
        return spec.hidden_size <= (128 if in_training else 192)
    return spec.hidden_size <= (256 if in_training else 384)


def is_onednn_lstm(spec: Spec, dtype: torch.dtype) -> bool:
    """Return whether the CPU's kernel over a padded batch is oneDNN's LSTM."""
    return spec.mode == "LSTM" and not spec.proj_size and dtype == torch.float32 and has_onednn()


def kernel_beats_native(spec: Spec, dtype: torch.dtype, steps: int, batch: int, in_training: bool) -> bool:
    """Return whether PyTorch's kernel is faster than the native loops over a padded batch without lengths."""
    if spec.mode == "LSTM":
        is_large = spec.hidden_size >= LARGE and batch * spec.hidden_size >= LARGE_STEP
        return is_large and not in_training and is_onednn_lstm(spec, dtype)
    # An RNN's gradient of one step is a few products, and autograd runs a function written in Python more slowly. In
    # half precision, and for the GRU's larger gradient, the native loops are faster all the same.
    return in_training and steps == 1 and spec.mode != "GRU" and dtype in (torch.float32, torch.float64)


def kernel_is_faster(call: Call, in_training: bool, loops_are_native: bool) -> bool:
    """Return whether PyTorch's kernel on the CPU, over the padded batch, is faster than our loop over the real steps.

    It reads the lengths.
    """
    if call.form.is_rows or call.mask is not None or call.resets is not None:
        return False
    N, T, H, lengths = call.form.batch, call.form.steps, call.spec.hidden_size, call.lengths
    if loops_are_native:
        if lengths is None and kernel_beats_native(call.spec, call.data.dtype, T, N, in_training):
            return True
        # Under autocast only the kernel computes in the lower precision.
        return lengths is None and is_onednn_lstm(call.spec, call.data.dtype) and is_autocast_on("cpu")
    if (FEW_STEPS if lengths is None else 1) >= T:
        return True
    if not is_onednn_lstm(call.spec, call.data.dtype):
        return not in_training and N * H < SMALL_STEP and T < SHORT
    if lengths is None:
        return True
    width = max(H, VECTOR)
    real = int(lengths.sum()) / max(T, 1) * width
    return N * width < ONEDNN_STEP + (WORTH_TRAINING if in_training else WORTH) * real
