"""Finds out what PyTorch's kernels can run on this machine: runs two steps once, and keeps the answer.

They run in a new thread, because the caller's modes, transforms and autocast hold in the caller's thread only.
"""

from __future__ import annotations

from functools import cache

import torch

from ._spec import Spec
from ._torch import KERNELS, has_onednn, in_fresh_thread

ALWAYS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes that the kernels of every cell have on every device."""


def check_dtype(spec: Spec, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a dtype that PyTorch's kernel refuses, with the same type of error."""
    if dtype in ALWAYS:
        return
    mode = spec.mode
    fault = _fault(mode, dtype, device.type, spec.bias, spec.proj_size > 0)
    if fault is not None:
        kind, words = fault
        raise kind(f"torch.nn's {mode} can't run in {dtype} on {device.type}: {words}.{_cure(mode, dtype)}")


def _cure(mode: str, dtype: torch.dtype) -> str:
    if dtype.is_complex and mode == "RNN_RELU":
        return ""  # in no complex dtype
    wide = torch.complex64 if dtype.is_complex else torch.float32
    if dtype.is_floating_point or dtype.is_complex:
        return f" Convert both: layer.to({wide}), input.to({wide})."
    return f" Make the parameters and the input of dtype {wide}."  # layer.to does not convert whole numbers


@cache
def _fault(
    mode: str, dtype: torch.dtype, device: str, bias: bool, projects: bool
) -> tuple[type[RuntimeError], str] | None:
    small = Spec(mode, 2, 2, bias=bias, proj_size=int(projects))
    try:
        in_fresh_thread(lambda: _run_two_steps(small, dtype, device, with_gradients=False))
    except RuntimeError as error:
        return type(error), str(error).partition("\n")[0].rstrip(".")
    return None


def lstm_kernel_runs(dtype: torch.dtype, with_gradients: bool, bidirectional: bool) -> bool:
    """Return whether `nn.LSTM` can run on this CPU under autocast to `dtype`.

    oneDNN has such a kernel for some CPUs only, and for some of these only without gradients. Without autocast PyTorch
    asks oneDNN first whether it has the kernel. Under autocast it asks with the dtype before the cast, and then fails.
    """
    return _lstm_kernel_runs(dtype, with_gradients, bidirectional, has_onednn())


@cache
def _lstm_kernel_runs(dtype: torch.dtype, with_gradients: bool, bidirectional: bool, onednn: bool) -> bool:
    def run() -> None:
        with torch.set_grad_enabled(with_gradients), torch.autocast("cpu", dtype):
            _run_two_steps(Spec("LSTM", 2, 2, bidirectional=bidirectional), torch.float32, "cpu", with_gradients)

    try:
        in_fresh_thread(run)
    except RuntimeError:
        return False
    return True


def _run_two_steps(spec: Spec, dtype: torch.dtype, device: str, with_gradients: bool) -> None:
    D = spec.directions
    x, *tensors = (
        torch.zeros(shape, dtype=dtype, device=device, requires_grad=with_gradients)
        for shape in ((2, 1, spec.input_size), *[(D, 1, width) for width in spec.state_widths], *spec.shapes)
    )
    states, weights = tensors[: len(spec.state_widths)], tensors[len(spec.state_widths) :]
    hx = states if spec.has_cell_state else states[0]
    output = KERNELS[spec.mode](x, hx, weights, spec.bias, 1, 0.0, False, spec.bidirectional, False)[0]
    if with_gradients:
        output.sum().backward()
