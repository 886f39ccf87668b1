"""Finds out what PyTorch's kernels can run on this machine: runs two steps once, and keeps the answer.

They run in a new thread, because the caller's modes, transforms and autocast hold in the caller's thread only.
"""

from __future__ import annotations

from functools import cache

import torch

from ._torch import KERNELS, has_onednn, in_fresh_thread

ALWAYS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes that the kernels of every cell have on every device."""


def check_dtype(mode: str, dtype: torch.dtype, device: torch.device, has_biases: bool, projects: bool) -> None:
    """Refuse a dtype that PyTorch's kernel refuses, with the same type of error."""
    if dtype in ALWAYS:
        return
    fault = _fault(mode, dtype, device.type, has_biases, projects)
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
    mode: str, dtype: torch.dtype, device: str, has_biases: bool, projects: bool
) -> tuple[type[RuntimeError], str] | None:
    try:
        in_fresh_thread(lambda: _run_two_steps(mode, dtype, device, 1, has_biases, projects, learns=False))
    except RuntimeError as error:
        return type(error), str(error).partition("\n")[0].rstrip(".")
    return None


def lstm_kernel_runs(dtype: torch.dtype, learns: bool, directions: int) -> bool:
    """Return whether `nn.LSTM` can run on this CPU under autocast to `dtype`.

    oneDNN has such a kernel for some CPUs only, and for some of these only without gradients. Without autocast PyTorch
    asks oneDNN first whether it has the kernel. Under autocast it asks with the dtype before the cast, and then fails.
    """
    return _lstm_kernel_runs(dtype, learns, directions, has_onednn())


@cache
def _lstm_kernel_runs(dtype: torch.dtype, learns: bool, directions: int, onednn: bool) -> bool:
    def run() -> None:
        with torch.set_grad_enabled(learns), torch.autocast("cpu", dtype):
            _run_two_steps("LSTM", torch.float32, "cpu", directions, True, False, learns)

    try:
        in_fresh_thread(run)
    except RuntimeError:
        return False
    return True


def _run_two_steps(
    mode: str, dtype: torch.dtype, device: str, directions: int, has_biases: bool, projects: bool, learns: bool
) -> None:
    hidden, fed_back = 2, 1 if projects else 2
    rows = {"GRU": 3, "LSTM": 4}.get(mode, 1) * hidden
    shapes: list[tuple[int, ...]] = [(rows, 2), (rows, fed_back)]
    shapes += [(rows,), (rows,)] if has_biases else []
    shapes += [(fed_back, hidden)] if projects else []
    x, h, c, *weights = (
        torch.zeros(shape, dtype=dtype, device=device, requires_grad=learns)
        for shape in ((2, 1, 2), (directions, 1, fed_back), (directions, 1, hidden), *shapes * directions)
    )
    hx = (h, c) if mode == "LSTM" else h
    output = KERNELS[mode](x, hx, weights, has_biases, 1, 0.0, False, directions == 2, False)[0]
    if learns:
        output.sum().backward()
