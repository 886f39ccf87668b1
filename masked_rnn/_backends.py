"""Which backend runs a call: the first in the order of preference that has nothing against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _bptt, _onnx, _operator, _packed, _padded, _scan
from ._call import Call
from ._cells import States
from ._lengths import is_on_host
from ._products import has_onednn


class Backend(NamedTuple):
    name: str
    why_not: Callable[[Call], list[str]]
    """The reasons why it can't run a call, in words."""
    run: Callable[[Call], tuple[Tensor, States]]
    """The output, as the input lies, and the last states (L·D, N, P)."""


BACKENDS = {
    name: Backend(name, module.why_not, module.run)
    for name, module in (("packed", _packed), ("padded", _padded), ("bptt", _bptt), ("scan", _scan))
}
OPERATOR = Backend("operator", _operator.why_not, _operator.run)
ONNX = Backend("onnx", _onnx.why_not, _onnx.run)


def run(call: Call) -> tuple[Tensor, States]:
    backend = choose(call)
    device = call.data.device.type
    if backend.name in ("packed", "padded") or not torch.is_autocast_enabled(device):
        return backend.run(call)
    # The rest is our own arithmetic: it runs in the weights' precision, and only its results have autocast's.
    dtype, *dtypes = call.enter_weights_dtype(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        output, states = backend.run(call)
    return output.to(dtype), tuple(h.to(d) for h, d in zip(states, dtypes, strict=True))


def choose(call: Call) -> Backend:
    wanted = call.layer.backend
    if torch.compiler.is_compiling() or _onnx.is_exporting():
        return _choose_captured(call, wanted)
    transform = why_only_scan()
    if wanted != "auto":
        backend = BACKENDS["bptt" if call.is_empty() and not transform else wanted]
        reasons = ([transform] if transform and wanted != "scan" else []) + backend.why_not(call)
        if reasons:
            raise ValueError(
                f"backend={wanted!r} can't run this call: {'; '.join(reasons)}. "
                "Use backend='auto', which takes one that can."
            )
        return backend
    if transform:
        return BACKENDS["scan"]
    if call.is_empty():
        return BACKENDS["bptt"]
    return next(b for b in map(BACKENDS.__getitem__, preferred(call)) if not b.why_not(call))


def preferred(call: Call) -> tuple[str, ...]:
    """By measurement; see docs/backends.md."""
    if call.data.device.type == "cpu":
        return (
            ("padded", "bptt", "packed", "scan") if _suits_torchs_kernel(call) else ("bptt", "packed", "padded", "scan")
        )
    on_device = any(t is not None and not is_on_host(t) for t in (call.lengths, call.mask))
    return ("padded", "packed", "scan") if on_device and call.form != "nested" else ("packed", "padded", "scan")


def _suits_torchs_kernel(call: Call) -> bool:
    """On the CPU: whether the work is too small for a loop in Python, or an LSTM's, for which PyTorch has oneDNN's."""
    if call.data.dim() != 3 or call.mask is not None:
        return False
    size, learns = call.batch * call.layer.hidden_size, call.wants_gradient()
    if call.layer.mode == "LSTM" and not call.layer.proj_size and call.data.dtype == torch.float32 and has_onednn():
        return call.lengths is None or size < (4096 if learns else 8192)
    return not learns and size < 512


def why_only_scan() -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform (vmap, grad, jvp, ...) is active, which only backend='scan' can follow"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which only backend='scan' can follow"
    return None


def _choose_captured(call: Call, wanted: str) -> Backend:
    if wanted == "scan":
        return BACKENDS["scan"]
    if wanted in ("packed", "padded"):
        raise ValueError(
            f"backend={wanted!r} can't run this call: it is being compiled or exported, which goes through an operator "
            "of its own. Use backend='auto'."
        )
    backend = ONNX if _onnx.is_exporting() else OPERATOR
    reasons = backend.why_not(call)
    if reasons:
        raise ValueError(f"this layer can't be captured: {'; '.join(reasons)}.")
    return backend
