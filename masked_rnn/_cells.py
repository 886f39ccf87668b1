"""One step of each cell in the letters of torch.nn's docs, and how a call reads a layer's weights and stacks layers.

H hidden, P the state that is fed back (H, or proj_size), N batch, D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from operator import attrgetter
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ._spec import Configured, LayerWeights, Shape, Spec, States, Weights
from ._torch import listed_weights

BackendName = Literal["auto", "packed", "padded", "bptt", "scan", "held"]


class Layer(Configured, Protocol):
    """The attributes of a layer that a call reads: its configuration, and our options."""

    batch_first: bool
    dropout: float
    training: bool
    enforce_sorted: bool
    flatten_hidden: bool
    backend: BackendName


HOLD = 1e4
"""In every dtype, sigmoid(1e4) is 1 and sigmoid(-1e4) is 0: added to a gate's argument, it opens or shuts the gate."""


def relu_drive(dtype: torch.dtype) -> float:
    """Return a number that makes relu's argument negative. A quarter of the least one, so that the sum stays finite."""
    return torch.finfo(dtype).min / 4


def read_weights(layer: Layer, spec: Spec, traced: bool) -> list[Tensor]:
    """Return the weights in `torch.nn`'s order, of the shapes that the layer's configuration implies.

    `traced` says whether `torch.jit.trace` is recording.
    """
    listed = None if traced else listed_weights(layer)
    if listed is not None:
        if not have_shapes(listed, spec.shapes):
            _refuse_weights(layer, listed, spec.names, spec.shapes)
        return listed
    # Attributes also give parametrized and functional weights.
    names, shapes = spec.expected_weights()
    weights = [getattr(layer, name) for name in names]
    (_check_traced_weights if traced else _refuse_weights)(layer, weights, names, shapes)
    return weights


SHAPE_OF = attrgetter("shape")


def have_shapes(weights: Sequence[Tensor], shapes: list[Shape]) -> bool:
    try:
        return list(map(SHAPE_OF, weights)) == shapes
    except AttributeError:  # something that is no tensor stands in a parameter's place
        return False


def _refuse_weights(layer: Layer, weights: Sequence[Tensor], names: list[str], shapes: list[Shape]) -> None:
    """Refuse a weight that is no tensor, or of another shape.

    PyTorch's ops broadcast some wrong shapes, and oneDNN's LSTM reads past the end of weights that are too small.
    """
    kind = type(layer).__name__
    if len(weights) != len(names):
        raise RuntimeError(
            f"{kind} has {len(weights)} weights, but its configuration implies {len(names)}: {', '.join(names)}. "
            "Build a layer with the num_layers, bias, bidirectional and proj_size that the weights are for."
        )
    for weight, name, shape in zip(weights, names, shapes, strict=True):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
        if weight.shape != shape:
            sizes = f"input_size={layer.input_size}, hidden_size={layer.hidden_size}"
            sizes += f", proj_size={layer.proj_size}" if layer.proj_size else ""
            raise RuntimeError(
                f"Expected {name} of size {list(shape)}, got {list(weight.shape)}: {kind} has {sizes}. Give it a "
                "weight of that size, or build a layer of the sizes that the weights have."
            )


def _check_traced_weights(layer: Layer, weights: Sequence[Tensor], names: list[str], shapes: list[Shape]) -> None:
    """As `_refuse_weights`, without reading shapes: torch.jit.trace would record them, and fails for some weights."""
    for weight, name, shape in zip(weights, names, shapes, strict=True):
        if weight.dim() != len(shape) or weight.nbytes != prod(shape) * weight.element_size():
            raise RuntimeError(
                f"Expected {name} of size {list(shape)}, got another. Give the {type(layer).__name__} a weight of that "
                "size, or build a layer of the sizes that the weights have."
            )


RunLayer = Callable[[Spec, Tensor, States, LayerWeights], tuple[Tensor, States]]
"""Runs one layer, from its initial states, each (D, N, P or H). Returns its output and last states."""


def stack_layers(
    spec: Spec,
    x: Tensor,  # as `run` takes it
    initial: States,  # each (L·D, N, P or H)
    weights: Sequence[Tensor],  # of all layers, in `torch.nn`'s order
    run: RunLayer,
    dropout: float = 0.0,
) -> tuple[Tensor, States]:
    """Run the layers, each on the output of the one before, with dropout between them."""
    lasts: list[States] = []
    D = spec.directions
    for k, layer_weights in enumerate(spec.group(weights)):
        if k and dropout:
            x = F.dropout(x, dropout)
        states = initial if spec.num_layers == 1 else tuple(h[k * D : (k + 1) * D] for h in initial)
        x, last = run(spec.layer(k), x, states, layer_weights)
        lasts.append(last)
    return x, lasts[0] if len(lasts) == 1 else tuple(torch.cat(states) for states in zip(*lasts, strict=True))


def gru_step(x: Tensor, state: States, w: Weights) -> States:
    """r, z = σ(W_i x + b_i + W_h h + b_h);  n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h' = (1 - z) n + z h.

    Each step takes x = W_ih x_t + b_ih.
    """
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, w.w_hh, w.b_hh).chunk(3, -1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (h - n),)


def lstm_step(x: Tensor, state: States, w: Weights) -> States:
    """i, f, g, o = σ, σ, tanh, σ (W_i x + b_i + W_h h + b_h);  c' = f c + i g;  m = o tanh(c');  h' = m, or W_hr m."""
    h, c = state
    i, f, g, o = (x + F.linear(h, w.w_hh, w.b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    m = torch.sigmoid(o) * torch.tanh(c)
    return (m if w.w_hr is None else F.linear(m, w.w_hr)), c


def rnn_tanh_step(x: Tensor, state: States, w: Weights) -> States:
    """h' = tanh(W_i x + b_i + W_h h + b_h)."""
    return (torch.tanh(x + F.linear(state[0], w.w_hh, w.b_hh)),)


def rnn_relu_step(x: Tensor, state: States, w: Weights) -> States:
    """h' = max(0, W_i x + b_i + W_h h + b_h)."""
    return (torch.relu(x + F.linear(state[0], w.w_hh, w.b_hh)),)


STEPS: dict[str, Callable[[Tensor, States, Weights], States]] = {
    "GRU": gru_step,
    "LSTM": lstm_step,
    "RNN_TANH": rnn_tanh_step,
    "RNN_RELU": rnn_relu_step,
}
"""By `nn.RNNBase.mode`."""
