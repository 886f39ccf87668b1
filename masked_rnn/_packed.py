"""PyTorch's own kernel over the packed rows: sorted, packed, unpacked and unsorted by one gather and one scatter."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import Call, each_layer
from ._cells import States
from ._kernels import run_kernel, runs_cudnn
from ._rows import pick_rows, place_rows


def run(call: Call) -> tuple[Tensor, States]:
    layer = call.layer
    # With cuDNN dropout stands between single layers, so that its draw is known to a second pass.
    singly = call.draws_dropout() and runs_cudnn(call.data)
    if takes_input_as_it_is(call) and call.packed is None:
        if singly:
            x = call.data.transpose(0, 1) if call.batch_first else call.data
            x, last = each_layer(call, x, lambda x, state, w: run_kernel(layer.mode, x, state, [w]))
            return x.transpose(0, 1) if call.batch_first else x, last
        return run_kernel(
            layer.mode,
            call.data,
            call.states,
            call.weights,
            dropout=layer.dropout,
            training=layer.training,
            batch_first=call.batch_first,
        )
    if call.packed is not None:
        rows, batch_sizes, order = call.data, call.packed.batch_sizes, call.packed.sorted_indices
        index, whole = None, True
    else:
        plan = call.plan()
        index, order, whole = plan.index, plan.order, plan.live == plan.batch
        rows = pick_rows(call.rows(), index)
        batch_sizes = torch.tensor(plan.batch_sizes, dtype=torch.int64, device="cpu")
    if order is not None:
        states = tuple(h.index_select(1, order) for h in call.states)
    else:
        states = call.states if whole else tuple(h[:, : plan.live] for h in call.states)
    if singly:
        output, last = each_layer(
            call,
            rows,
            lambda x, state, w: run_kernel(layer.mode, x, state, [w], batch_sizes=batch_sizes),
            states,
        )
    else:
        output, last = run_kernel(
            layer.mode,
            rows,
            states,
            call.weights,
            batch_sizes=batch_sizes,
            dropout=layer.dropout,
            training=layer.training,
        )
    initial = tuple(h.to(new.dtype) for h, new in zip(call.states, last, strict=True))  # autocast may have changed it
    if order is not None:
        last = tuple(h.index_copy(1, order, new) for h, new in zip(initial, last, strict=True))
    elif not whole:
        last = tuple(torch.cat([new, h[:, plan.live :]], 1) for h, new in zip(initial, last, strict=True))
    return call.from_rows(output if index is None else place_rows(output, index, plan.size)), last


def takes_input_as_it_is(call: Call) -> bool:
    """Whether the kernel reads the call's input as it came: nothing is gathered, and no value read."""
    return call.packed is not None or (call.data.dim() == 3 and call.lengths is None and call.mask is None)
