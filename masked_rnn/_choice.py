"""Which backend runs a call, and why another can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._backends import bptt, packed, padded, scan
from ._backends.bptt import library
from ._backends.kernels import kernel_is_faster, runs_all_steps_at_once, runs_cudnn
from ._call import Call
from ._capture import custom_op, onnx
from ._cells import States
from ._lengths import is_on_host
from ._probe import lstm_kernel_runs
from ._torch import (
    forward_gradients_run,
    is_autocast_on,
    is_capturing,
    is_exporting_onnx,
    is_traced,
    is_transformed,
)


class Backend(NamedTuple):
    name: str
    run: Callable[[Call], tuple[Tensor, States]]
    """The output, as the input lies, and the last states (L·D, N, P)."""


BACKENDS = {
    name: Backend(name, module.run)
    for name, module in (("packed", packed), ("padded", padded), ("bptt", bptt), ("scan", scan))
}
OPERATOR = Backend("operator", custom_op.run)
ONNX = Backend("onnx", onnx.run)


STEP_BY_STEP = ("scan", "operator")
"""Those that take resets as they are."""
MOST_PADDING = 0.9
"""The share of padding up to which rows are padded for a kernel that runs all steps at once: it takes memory."""


def run(call: Call) -> tuple[Tensor, States]:
    backend = choose(call)
    if call.resets is None or backend.name in STEP_BY_STEP:
        return _run(backend, call)
    # Each segment is a sequence of its own: no backend but those above knows of resets.
    cut, segments = call.cut(call.resets)
    output, states = _run(choose(cut), cut)
    last = (segments.last(new, h.to(new.dtype)) for new, h in zip(states, call.states, strict=True))
    return call.from_rows(output), tuple(last)


def _run(backend: Backend, call: Call) -> tuple[Tensor, States]:
    device = call.data.device.type
    if backend.name in ("packed", "padded") or not is_autocast_on(device):
        return backend.run(call)
    # The rest is our own arithmetic: it runs in the weights' precision, and only its results have autocast's.
    dtype, *dtypes = _dtypes_under_autocast(call)
    with torch.autocast(device, enabled=False):
        output, states = backend.run(call.in_weights_dtype())
    return output.to(dtype), tuple(h.to(d) for h, d in zip(states, dtypes, strict=True))


def _dtypes_under_autocast(call: Call) -> list[torch.dtype]:
    """Those of the output and the last states that `torch.nn` returns. cuDNN's are float16 whatever autocast asks for.
    On a CPU a GRU's h and a projected LSTM's c keep the precision they came in."""
    weights, device = call.parameters[0].dtype, call.data.device.type
    autocast = torch.float16 if runs_cudnn(call.data) else torch.get_autocast_dtype(device)
    low = weights if weights == torch.float64 or weights.is_complex else autocast
    if device == "cuda":
        return [low] * (1 + len(call.states))
    wide = [torch.promote_types(low, h.dtype) for h in call.states]
    if call.layer.mode == "GRU":
        return [wide[0], wide[0]]
    if call.layer.proj_size:
        return [low, low, wide[1]]
    return [low] * (1 + len(wide))


class Mode(NamedTuple):
    """What runs around a call, found out once."""

    only_scan: str | None
    """Why only `scan` can follow it."""
    traced: bool
    readable: bool
    """Whether values are there."""
    captured: bool
    """Whether a CUDA graph is being recorded: nothing may wait for the device."""


def check_name(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        names = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend={backend!r} does not exist. Expected 'auto' or one of {names}.")


def mode_of(call: Call) -> Mode:
    readable = call.values_can_be_read()
    return Mode(why_only_scan(call), is_traced(), readable, readable and is_capturing(call.data.device))


def choose(call: Call) -> Backend:
    wanted = call.layer.backend
    if wanted != "auto":
        check_name(wanted)  # it may have been set after the layer was made
    if torch.compiler.is_compiling() or (is_exporting_onnx() and not is_traced()):
        return _choose_captured(call, wanted)
    mode = mode_of(call)
    name = preferred(call, mode) if wanted == "auto" else wanted
    reason = why_not(name, call, mode)
    if reason:
        cure = "Use backend='auto', which takes one that can." if preferred(call, mode) != name else ""
        what = "no backend can" if wanted == "auto" else f"backend={name!r} can't"
        raise ValueError(f"{what} run this call: {reason}. {cure}".rstrip())
    if not (name == "bptt" and mode.readable) and _has_no_step(name, call, mode):
        # No kernel takes such a call. `bptt` returns at once; `scan` does without reading anything.
        name = "bptt" if mode.readable else "scan"
    return BACKENDS[name]


def _has_no_step(name: str, call: Call, mode: Mode) -> bool:
    """Whether a call is known to be empty."""
    if mode.traced or mode.only_scan:
        return False
    reads_plan = call.form == "nested" or (name == "packed" and not packed.takes_input_as_it_is(call))
    return call.is_empty() or (reads_plan and not call.plan.rows)


def preferred(call: Call, mode: Mode) -> str:
    """What `auto` takes, by measurement; see docs/backends.md."""
    device = call.data.device
    if mode.only_scan:
        return "scan"
    if not mode.readable or mode.captured:
        if call.resets is not None:
            return "scan"
        if call.packed is not None:
            return "packed"
        return "scan" if not mode.traced and why_not("padded", call, mode) else "padded"
    if is_complex(call):
        return "packed"
    # Where dropout is drawn, the choice must not hang on gradients: a checkpoint runs once without and once with.
    draws = bool(call.dropout)
    if device.type == "cpu":
        learns = draws or torch.is_grad_enabled()
        return "padded" if _suits_kernel(call) and not _why_no_lstm_kernel(call, learns) else "bptt"
    if call.resets is not None:
        return "padded"  # or what suits the batch once it is cut
    layer, learns = call.layer, draws or call.wants_gradient()
    at_once = runs_all_steps_at_once(layer.mode, call.data, layer.hidden_size, layer.proj_size, learns)
    if call.data.dim() == 2:
        return "padded" if at_once and call.plan.share_of_padding() <= MOST_PADDING else "packed"
    on_host = all(t is None or is_on_host(t) for t in (call.lengths, call.mask))
    return "packed" if on_host and not at_once else "padded"


def _suits_kernel(call: Call) -> bool:
    if call.data.dim() != 3 or call.mask is not None or call.resets is not None:
        return False
    layer = call.layer
    learns = bool(call.dropout) or call.wants_gradient()
    fed_back = layer.proj_size or layer.hidden_size
    return kernel_is_faster(
        layer.mode,
        call.data,
        call.batch,
        call.steps,
        layer.hidden_size,
        fed_back,
        call.lengths,
        learns,
        library.runs,
    )


def why_not(name: str, call: Call, mode: Mode) -> str | None:
    """The reason why a backend can't run a call, in words."""
    if mode.only_scan and name != "scan":
        return mode.only_scan
    if mode.traced:
        if call.resets is not None:
            return "torch.jit.trace would keep the resets of this call, or its number of steps, for good"
        if name == "bptt" or (name == "packed" and not packed.takes_input_as_it_is(call)):
            return "torch.jit.trace would keep the lengths of this call for good"
        if name == "scan":
            return "torch.jit.trace would keep the number of steps of this call for good"
        if name == "padded" and call.packed is not None:
            return "torch.jit.trace would keep the lengths of this call for good"
    elif not mode.readable:
        reads = name in ("packed", "bptt") and (call.lengths is not None or call.mask is not None)
        if name != "scan" and call.resets is not None:
            return "it reads resets, which have no values here (FakeTensorMode, make_fx or the meta device)"
        if reads or call.data.dim() == 2:
            return "it reads lengths, which have no values here (FakeTensorMode, make_fx or the meta device)"
    elif mode.captured:
        if call.resets is not None and name != "scan":
            return "it reads resets, and a CUDA graph is being recorded, which can't wait for them"
        needs_plan = {"packed": call.packed is None and not call.is_plain(), "bptt": True}
        if needs_plan.get(name, call.data.dim() == 2):
            return "it plans its steps on the CPU, and a CUDA graph is being recorded, which can't wait for it"
    if is_complex(call):
        return _why_not_complex(name, call, mode)
    if name == "padded" or (name == "packed" and call.packed is None and packed.takes_input_as_it_is(call)):
        return _why_no_lstm_kernel(call, torch.is_grad_enabled())
    return None


def is_complex(call: Call) -> bool:
    return call.parameters[0].dtype.is_complex


def _why_not_complex(name: str, call: Call, mode: Mode) -> str | None:
    if name == "bptt":
        return "its gradients are those of real numbers, and this layer is complex"
    if name == "padded" and call.layer.mode == "LSTM" and not call.is_plain() and (call.steps != 1 or mode.traced):
        return "it saturates an LSTM's gates over padding, where PyTorch's complex sigmoid is NaN"
    return None


def why_only_scan(call: Call) -> str | None:
    if is_transformed():
        return "a torch.func transform (vmap, grad, jvp, ...) is active, which only backend='scan' can follow"
    if forward_gradients_run(call.data, *call.states):
        return "forward-mode differentiation is active, which only backend='scan' can follow"
    return None


def _why_no_lstm_kernel(call: Call, learns: bool) -> str | None:
    if call.layer.mode != "LSTM" or call.layer.proj_size or call.data.device.type != "cpu":
        return None
    if not is_autocast_on("cpu") or call.data.dtype == torch.float64:
        return None
    dtype, directions = torch.get_autocast_dtype("cpu"), call.directions
    if lstm_kernel_runs(dtype, learns, directions):
        return None
    reason = f"PyTorch has no LSTM kernel for {dtype} under autocast on this CPU"
    return f"{reason} while gradients are recorded" if learns and lstm_kernel_runs(dtype, False, directions) else reason


def _choose_captured(call: Call, wanted: str) -> Backend:
    if wanted == "scan":
        return BACKENDS["scan"]
    if wanted in ("packed", "padded"):
        raise ValueError(
            f"backend={wanted!r} can't run this call: it is being compiled or exported, which goes through an operator "
            "of its own. Use backend='auto'."
        )
    if not is_exporting_onnx():
        return OPERATOR
    reason = onnx.why_not(call)
    if reason:
        raise ValueError(f"this layer can't be captured: {reason}.")
    return ONNX
