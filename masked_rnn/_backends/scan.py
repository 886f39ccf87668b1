"""The recurrence in plain ops as a backend: it runs under every transform and on any device."""

from __future__ import annotations

from torch import Tensor

from .._call import Call
from .._cells import States, stack_layers
from .._torch import to_device
from .recurrence import scan


def run(call: Call) -> tuple[Tensor, States]:
    x, real, restore = call.padded_in_place()
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
