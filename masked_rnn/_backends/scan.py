"""The recurrence in plain ops. It runs under every transform and on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._call import Call
from .._call.lengths import assert_range
from .._cells import stack_layers
from .._spec import LayerWeights, Spec, States
from .._torch import graph_scan, is_transformed, to_device
from .graph_loop import in_graph
from .recurrence import scan, unrolled


def why_not(call: Call) -> str | None:
    """Return the reason why this backend can't run a call. None: it can."""
    if call.context.traced and call.resets is None:
        return "torch.jit.trace would record the number of steps of this call as a constant"
    return call.why_unreadable(reads_plan=call.form.is_rows, reads_resets=call.context.traced)


def run(call: Call) -> tuple[Tensor, States]:
    if call.context.compiling and call.lengths is not None and not is_transformed():
        # The check must be part of the graph: no other code of ours runs with the compiled graph.
        assert_range(call.lengths, call.form.steps, f"batch_first={call.form.batch_first}")
    x, real, restore = call.padded_in_place()
    # A copy, because autograd saves it, and the caller may change the original.
    resets = None if call.resets is None else to_device(call.resets.unsqueeze(-1).clone(), x.device)
    loop = in_graph if _makes_loop(call) else unrolled

    def run_one(spec: Spec, x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States]:
        return scan(spec.mode, x, real, initial, weights, resets, loop)

    output, last = stack_layers(call.spec, x, call.states, call.parameters, run_one, call.dropout)
    return restore(output), last


def _makes_loop(call: Call) -> bool:
    """Return whether the graph gets a loop. Else it gets the steps of this call."""
    if call.context.captured_as != "operator" or graph_scan is None or is_transformed():
        return False
    # Inductor computes wrong gradients of a loop. An exported program computes them without inductor, except those of
    # complex numbers, which PyTorch's loop lacks.
    has_gradients = torch.compiler.is_exporting() and not call.data.is_complex()
    return call.form.steps > 0 and (has_gradients or not call.records_gradients())
