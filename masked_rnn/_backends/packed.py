"""PyTorch's own kernel over the packed rows: sorted, packed, unpacked and unsorted by one gather and one scatter."""

from __future__ import annotations

import torch
from torch import Tensor

from .._call import Call
from .._cells import States
from .._plan import restore_states, sort_states
from .gather import gather_rows, scatter_rows
from .kernels import run_stack


def run(call: Call) -> tuple[Tensor, States]:
    if call.packed is not None:
        batch_sizes, order = call.packed.batch_sizes.resolve_neg(), call.packed_order
        states = call.states if order is None else tuple(h.index_select(1, order) for h in call.states)
        output, last = run_stack(call, call.data, states, batch_sizes)
        if order is not None:
            last = tuple(h.to(new.dtype).index_copy(1, order, new) for h, new in zip(call.states, last, strict=True))
        return output, last
    if call.is_plain():
        return run_stack(call, call.data, call.states)
    plan = call.plan
    batch_sizes = torch.tensor(plan.batch_sizes, dtype=torch.int64, device="cpu")
    rows = gather_rows(call.rows(), plan.index)
    states = tuple(sort_states(h, plan) for h in call.states)
    output, last = run_stack(call, rows, states, batch_sizes)
    initial = (h.to(new.dtype) for h, new in zip(call.states, last, strict=True))  # autocast may have changed it
    last = tuple(restore_states(new, h, plan) for h, new in zip(initial, last, strict=True))
    return call.from_rows(scatter_rows(output, plan.index, plan.size)), last


def takes_input_as_it_is(call: Call) -> bool:
    """Whether the kernel reads the call's input as it came: nothing is gathered, and no value read."""
    return call.packed is not None or call.is_plain()
