"""Chooses the backend that runs a call, and runs it. It is the only module that knows all backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ._backends import bptt, cudnn, held, packed, padded, scan
from ._backends.bptt import library
from ._backends.kernels import why_no_lstm_kernel
from ._backends.measured import kernel_is_faster, runs_all_steps_at_once
from ._call import Call, close_call, open_call
from ._call.inputs import Nested
from ._call.lengths import is_on_host
from ._capture import custom_op, onnx
from ._cells import Layer
from ._lean import run_lean
from ._spec import States
from ._torch import is_autocast_on


class Backend(Protocol):
    """A way of running a call: a module with two functions."""

    def run(self, call: Call) -> tuple[Tensor, States]:
        """Return the output in the layout of the call's data, and the last states, each (L·D, N, P or H)."""

    def why_not(self, call: Call) -> str | None:
        """Return the reason why this backend can't run the call, in words. None: it can."""


BACKENDS: dict[str, Backend] = {"packed": packed, "padded": padded, "bptt": bptt, "scan": scan, "held": held}
CAPTURED: dict[str, Backend] = {"operator": custom_op, "onnx": onnx}
"""The forms in which a compiler or an exporter captures a layer."""
CAPTURABLE = {"operator": ("auto", "bptt"), "onnx": ("auto",)}
"""The values of a layer's `backend` that each form captures. `scan` is captured as its own ops."""
TAKES_RESETS = ("scan", "operator")
TAKES_AUTOCAST = ("packed", "padded", "held")
MOST_PADDING = 0.9
"""On a GPU, rows are padded only up to this share of padding, because padding takes memory."""


def call_layer(layer: Layer, input: Any, hx: Any, lengths: Any, mask: Any, resets: Any) -> tuple[Any, Any]:
    """Call a layer: run an ordinary call at once, else open the call, choose a backend, run it, close the call."""
    if mask is None:
        results = run_lean(layer, input, hx, lengths, resets)
        if results is not None:
            return results
    call = open_call(layer, input, hx, lengths, mask, resets)
    return close_call(layer, call, *run(call))


def run(call: Call) -> tuple[Tensor, States]:
    name = choose(call)
    if call.resets is None or name in TAKES_RESETS:
        return _run(name, call)
    # The other backends take no resets. They run each segment between resets as a sequence.
    cut, segments = call.cut(call.resets)
    output, states = _run(choose(cut), cut)
    last = (segments.last(new, h.to(new.dtype)) for new, h in zip(states, call.states, strict=True))
    return call.from_rows(output), tuple(last)


def _run(name: str, call: Call) -> tuple[Tensor, States]:
    if name in TAKES_AUTOCAST:
        return BACKENDS[name].run(call)
    device = call.data.device.type
    if not is_autocast_on(device):
        return _run_backend(name, call)
    # The other backends compute in the weights' dtype under autocast. Only their results are cast.
    dtype, *dtypes = _dtypes_under_autocast(call)
    with torch.autocast(device, enabled=False):
        output, states = _run_backend(name, call.cast(call.parameters[0].dtype))
    return output.to(dtype), tuple(h.to(d) for h, d in zip(states, dtypes, strict=True))


def _run_backend(name: str, call: Call) -> tuple[Tensor, States]:
    """Run a backend. On a CPU our loops compute bfloat16 and float16 in float32, and round their results."""
    backend, dtype = BACKENDS.get(name) or CAPTURED[name], call.data.dtype
    computes_in = library.WIDER.get(dtype, dtype)
    if computes_in == dtype or name not in ("bptt", "operator") or not call.data.is_cpu:
        return backend.run(call)
    output, states = backend.run(call.cast(computes_in))
    return output.to(dtype), tuple(h.to(dtype) for h in states)


def _dtypes_under_autocast(call: Call) -> list[torch.dtype]:
    """Return the dtypes of the output and the last states that `torch.nn` returns.

    On a CPU a GRU's h and a projected LSTM's c keep the precision of the initial state.
    """
    low = cudnn.running_dtype(call.parameters[0])
    if call.data.device.type == "cuda":
        return [low] * (1 + len(call.states))
    wide = [torch.promote_types(low, h.dtype) for h in call.states]
    if call.spec.mode == "GRU":
        return [wide[0], wide[0]]
    if call.spec.proj_size:
        return [low, low, wide[1]]
    return [low] * (1 + len(wide))


def check_name(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        names = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend={backend!r} does not exist. Expected 'auto' or one of {names}.")


def choose(call: Call) -> str:
    """Return the name of the backend that runs a call: the one that was asked for, or the fastest that can."""
    wanted = call.backend
    if wanted != "auto":
        check_name(wanted)  # it may have been set after the layer was made
    if call.context.captured_as:
        return _choose_captured(call, wanted, call.context.captured_as)
    name, reason = first_that_can(call, order(call) if wanted == "auto" else (wanted,))
    if reason:
        raise _refusal(call, wanted, reason)
    return _without_steps(call, name) or name


def order(call: Call) -> Sequence[str]:
    """Return the backends that `auto` tries, the fastest first, by measurement. docs/backends.md says it in words."""
    context, data = call.context, call.data
    if context.only_scan:
        return ("scan",)
    if not context.readable or context.cuda_graph:
        return ("padded", "packed", "scan") if call.resets is None else ("scan",)
    if call.parameters[0].is_complex():
        return ("packed",)
    # A checkpoint runs once without gradients and once with them. If dropout is drawn, both must choose alike.
    draws_dropout = call.dropout > 0
    in_training = draws_dropout or call.records_gradients()
    if data.is_cpu:
        faster = kernel_is_faster(call, in_training, library.runs(library.WIDER.get(data.dtype, data.dtype)))
        faster = faster and not why_no_lstm_kernel(call, draws_dropout or torch.is_grad_enabled())
        return ("padded", "bptt") if faster else ("bptt",)
    if call.resets is not None:
        return ("padded",)  # the choice is made again for the segments
    at_once = runs_all_steps_at_once(call.spec, data, in_training)
    if call.form.is_rows:
        pads = at_once and call.plan.share_of_padding() <= MOST_PADDING
    else:
        pads = at_once or not all(t is None or is_on_host(t) for t in (call.lengths, call.mask))
    return ("padded",) if pads else ("packed",)


def first_that_can(call: Call, names: Sequence[str]) -> tuple[str, str | None]:
    """Return the first backend that can run a call, and None. If none can: the first, and why it can't."""
    reason = None
    for name in names:
        why_not = BACKENDS[name].why_not(call)
        if why_not is None:
            return name, None
        reason = reason or why_not
    return names[0], reason


def _refusal(call: Call, wanted: str, reason: str) -> ValueError:
    if wanted == "auto":
        return ValueError(f"no backend can run this call: {reason}.")
    name, nothing_can = first_that_can(call, order(call))
    cure = "" if nothing_can or name == wanted else " Use backend='auto', which takes one that can."
    return ValueError(f"backend={wanted!r} can't run this call: {reason}.{cure}")


def _without_steps(call: Call, name: str) -> str | None:
    """Return the backend for a call in which no sequence has a step, which kernels refuse. None: a sequence has one."""
    context = call.context
    if context.traced or context.only_scan or (name == "bptt" and context.readable):
        return None
    if call.is_empty() or (_reads_plan(call, name) and not call.plan.rows):
        return "bptt" if context.readable else "scan"  # bptt returns at once, scan reads no values
    return None


def _reads_plan(call: Call, name: str) -> bool:
    return isinstance(call.form, Nested) or (name == "packed" and not packed.reads_input_directly(call))


def _choose_captured(call: Call, wanted: str, captured_as: str) -> str:
    if wanted == "scan":
        return "scan"
    if wanted not in CAPTURABLE[captured_as]:
        raise ValueError(
            f"backend={wanted!r} can't run this call: it is being compiled or exported, which goes through an operator "
            "of its own. Use backend='auto'."
        )
    reason = CAPTURED[captured_as].why_not(call)
    if reason and wanted != "auto":
        raise _refusal(call, wanted, reason)
    if reason:
        raise ValueError(f"this layer can't be captured: {reason}.")
    return captured_as
