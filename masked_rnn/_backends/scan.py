"""The recurrence in plain ops. It runs under every transform and on any device."""

from __future__ import annotations

from torch import Tensor

from .._call import Call
from .._call.lengths import assert_range
from .._cells import States, stack_layers
from .._torch import is_transformed, to_device
from .recurrence import scan


def why_not(call: Call) -> str | None:
    """Return the reason why this backend can't run a call. None: it can."""
    if call.context.traced and call.resets is None:
        return "torch.jit.trace would record the number of steps of this call as a constant"
    return call.why_unreadable(reads_plan=call.data.dim() == 2, reads_resets=call.context.traced)


def run(call: Call) -> tuple[Tensor, States]:
    if call.context.compiling and call.lengths is not None and not is_transformed():
        # The check must be part of the graph: no other code of ours runs with the compiled graph.
        assert_range(call.lengths, call.form.steps, f"batch_first={call.form.batch_first}")
    x, real, restore = call.padded_in_place()
    # A copy, because autograd saves it, and the caller may change the original.
    resets = None if call.resets is None else to_device(call.resets.unsqueeze(-1).clone(), x.device)
    output, last = stack_layers(
        x,
        call.states,
        call.weights,
        lambda x, states, w: scan(call.layer.mode, x, real, states, w, resets),
        call.dropout,
    )
    return restore(output), last
