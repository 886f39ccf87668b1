"""Exports each layer as one ONNX node, GRU, LSTM or RNN, with sequence_lens.

https://onnx.ai/onnx/operators/onnx__GRU.html (linear_before_reset=1 is PyTorch's reset after the product).
T time, N batch, I input, H hidden, D directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call import Call
from .._cells import stack_layers
from .._spec import LayerWeights, Spec, States
from .._torch import symbolic_node

GATE_ORDER = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
"""For each of ONNX's gates (zrh; iofc), its index in PyTorch's order (r, z, n; i, f, g, o)."""


def why_not(call: Call) -> str | None:
    if call.resets is not None:
        return "ONNX's nodes know no resets within a sequence"
    return "ONNX's LSTM node has no projection (proj_size)" if call.spec.proj_size else None


def run(call: Call) -> tuple[Tensor, States]:
    x, lengths, restore = call.padded_last()

    def run_one(spec: Spec, x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States]:
        return _node(spec, x, lengths, initial, weights)

    output, last = stack_layers(call.spec, x, call.states, call.parameters, run_one, call.dropout)
    return restore(output), last


def _node(
    spec: Spec,
    x: Tensor,  # (T, N, I)
    lengths: Tensor | None,  # (N,)
    initial: States,  # each (D, N, H)
    weights: LayerWeights,
) -> tuple[Tensor, States]:
    """Add a layer's node; return its output (T, N, D·H) and last states (D, N, H)."""
    steps, batch, _ = x.shape
    mode, D, H = spec.mode, spec.directions, spec.hidden_size
    order = GATE_ORDER[mode]

    def ordered(t: Tensor) -> Tensor:
        return torch.cat([t[k * H : (k + 1) * H] for k in order])

    W = torch.stack([ordered(w.w_ih) for w in weights])
    R = torch.stack([ordered(w.w_hh) for w in weights])
    B = None
    if spec.bias:
        B = torch.stack([torch.cat([ordered(b) for b in (w.b_ih, w.b_hh) if b is not None]) for w in weights])
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
    if mode == "GRU":
        attributes["linear_before_reset"] = 1
    if mode.startswith("RNN"):
        attributes["activations"] = ["Tanh" if mode == "RNN_TANH" else "Relu"] * D
    Y, *last = symbolic_node(
        mode.split("_")[0],
        [x, W, R, B, None if lengths is None else lengths.to(torch.int32), *initial],
        attributes,
        dtypes=[x.dtype] * (1 + len(initial)),
        shapes=[(steps, D, batch, H), *[(D, batch, H)] * len(initial)],
    )
    output = Y.transpose(1, 2).flatten(2)
    if lengths is not None:
        # ONNX Runtime returns zeros as the last state of a sequence without steps.
        ran = (lengths > 0).view(1, -1, 1)
        last = [torch.where(ran, new, old) for new, old in zip(last, initial, strict=True)]
    return output, tuple(last)
