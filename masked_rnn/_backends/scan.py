"""The recurrence in plain ops as a backend: it runs under every transform and on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._call import Call
from .._cells import States, stack_layers
from .._torch import assert_async, is_transformed, to_device
from .recurrence import scan


def run(call: Call) -> tuple[Tensor, States]:
    if call.lengths is not None and torch.compiler.is_compiling() and not is_transformed():
        # Nothing else of ours is in the graph: the values are checked where it runs.
        in_range = ((call.lengths >= 0) & (call.lengths <= call.steps)).all()
        assert_async(
            in_range, f"a length is out of range: expected 0 <= length <= {call.steps}, the input's time steps"
        )
    x, real, restore = call.masked()
    # A copy: what autograd saves must not change with the caller's tensor.
    resets = None if call.resets is None else to_device(call.resets.unsqueeze(-1).clone(), x.device)
    output, last = stack_layers(
        x,
        call.states,
        call.weights,
        lambda x, states, w: scan(call.layer.mode, x, real, states, w, resets),
        call.dropout,
    )
    return restore(output), last
