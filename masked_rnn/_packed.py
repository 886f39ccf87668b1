"""PyTorch's own kernel over the packed rows: sorted, packed, unpacked and unsorted by one gather and one scatter."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import Call, each_layer
from ._cells import States
from ._kernels import differentiates_once, run_kernel
from ._rows import pick_rows, place_rows


def why_not(call: Call) -> list[str]:
    return []


def run(call: Call) -> tuple[Tensor, States]:
    layer = call.layer
    dropout = layer.dropout if layer.training else 0.0
    if call.data.dim() == 3 and call.lengths is None and call.mask is None:
        if dropout and differentiates_once(call.data):
            x = call.data.transpose(0, 1) if call.batch_first else call.data
            x, last = each_layer(call, x, lambda x, state, w: run_kernel(layer.mode, x, state, [w]))
            return x.transpose(0, 1) if call.batch_first else x, last
        return run_kernel(
            layer.mode,
            call.data,
            call.states,
            call.weights(),
            dropout=layer.dropout,
            training=layer.training,
            batch_first=call.batch_first,
        )
    plan = call.plan()
    rows = pick_rows(call.rows(), plan.index)
    batch_sizes = torch.tensor(plan.batch_sizes, dtype=torch.int64, device="cpu")
    whole = plan.live == plan.batch
    if plan.order is not None:
        states = tuple(h.index_select(1, plan.order) for h in call.states)
    else:
        states = call.states if whole else tuple(h[:, : plan.live] for h in call.states)
    if dropout and differentiates_once(rows):
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
            call.weights(),
            batch_sizes=batch_sizes,
            dropout=layer.dropout,
            training=layer.training,
        )
    initial = tuple(h.to(new.dtype) for h, new in zip(call.states, last, strict=True))  # autocast may have changed it
    if plan.order is not None:
        last = tuple(h.index_copy(1, plan.order, new) for h, new in zip(initial, last, strict=True))
    elif not whole:
        last = tuple(torch.cat([new, h[:, plan.live :]], 1) for h, new in zip(initial, last, strict=True))
    return call.from_rows(place_rows(output, plan.index, plan.size)), last
