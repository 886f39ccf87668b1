"""The plain recurrence as a backend: it runs under every transform and on any device."""

from __future__ import annotations

from torch import Tensor

from ._call import Call, each_layer
from ._cells import States
from ._plain import scan


def run(call: Call) -> tuple[Tensor, States]:
    x, live, back = call.live()
    output, last = each_layer(call, x, lambda x, state, w: scan(call.layer.mode, x, live, state, w))
    return back(output), last
