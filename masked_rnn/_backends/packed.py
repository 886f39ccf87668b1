"""PyTorch's kernel over packed rows. One gather sorts and packs them; one scatter unpacks and unsorts the output."""

from __future__ import annotations

import torch
from torch import Tensor

from .._call import Call
from .._call.inputs import Packed
from .._plan import restore_states, sort_states
from .._spec import States
from .gather import gather_rows, scatter_rows
from .kernels import run_stack, why_no_lstm_kernel


def why_not(call: Call) -> str | None:
    """Return the reason why this backend can't run a call. None: it can."""
    is_direct = reads_input_directly(call)
    reason = call.context.only_scan or call.why_unreadable(reads_plan=not is_direct)
    if reason or call.parameters[0].is_complex() or not is_direct or call.form.is_rows:
        return reason
    return why_no_lstm_kernel(call, torch.is_grad_enabled())


def run(call: Call) -> tuple[Tensor, States]:
    if isinstance(call.form, Packed):
        batch_sizes, order = call.form.batch_sizes.resolve_neg(), call.form.order
        states = call.states if order is None else tuple(h.index_select(1, order) for h in call.states)
        output, last = run_stack(call, call.data, states, batch_sizes)
        if order is not None:
            last = tuple(h.to(new.dtype).index_copy(1, order, new) for h, new in zip(call.states, last, strict=True))
        return output, last
    if call.is_full:
        return run_stack(call, call.data, call.states)
    plan = call.plan
    batch_sizes = torch.tensor(plan.batch_sizes, dtype=torch.int64, device="cpu")
    rows = gather_rows(call.rows(), plan.index)
    states = tuple(sort_states(h, plan) for h in call.states)
    output, last = run_stack(call, rows, states, batch_sizes)
    initial = (h.to(new.dtype) for h, new in zip(call.states, last, strict=True))  # autocast may have changed it
    last = tuple(restore_states(new, h, plan) for h, new in zip(initial, last, strict=True))
    return call.from_rows(scatter_rows(output, plan.index, plan.size)), last


def reads_input_directly(call: Call) -> bool:
    """Return whether the kernel reads the input directly: no row is gathered, and no value is read."""
    return isinstance(call.form, Packed) or call.is_full
