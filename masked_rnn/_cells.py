"""The weights of a layer, and one step of each cell in the equations' letters.

I input, H hidden, P the state that is fed back (H, or proj_size), D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ._torch import listed_weights

BackendName = Literal["auto", "packed", "padded", "bptt", "scan"]
States = tuple[Tensor, ...]
"""h; or h and c."""


class Layer(Protocol):
    """What is asked of a layer: `torch.nn`'s configuration, and our options."""

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    training: bool
    enforce_sorted: bool
    flatten_hidden: bool
    backend: BackendName


class Weights(NamedTuple):
    """One direction of one layer, as `torch.nn` names and shapes them."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


LayerWeights = tuple[Weights, ...]
"""Each direction's."""
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
"""The attributes that hold them, before `_l0`, `_l0_reverse` and so on."""


def read_weights(layer: Layer) -> list[Tensor]:
    """In `torch.nn`'s order. Read as attributes, so that parametrized and functional weights count."""
    listed = listed_weights(layer)
    if listed is not None:
        return listed
    suffixes = ("", "_reverse") if layer.bidirectional else ("",)
    has = (True, True, layer.bias, layer.bias, layer.proj_size > 0)
    names = [name for name, here in zip(NAMES, has, strict=True) if here]
    return [
        getattr(layer, f"{name}_l{k}{suffix}") for k in range(layer.num_layers) for suffix in suffixes for name in names
    ]


def drawn_dropout(layer: Layer) -> float:
    """What is drawn between layers."""
    return float(layer.dropout) if layer.training and layer.num_layers > 1 else 0.0


def flatten_weights(layers: Iterable[LayerWeights]) -> list[Tensor]:
    """In the order of `read_weights`."""
    return [t for layer in layers for w in layer for t in w if t is not None]


def group_weights(tensors: Sequence[Tensor], layers: int, directions: int) -> list[LayerWeights]:
    """The inverse of `flatten_weights`. Two to five tensors a direction: the biases are two, W_hr is the last."""
    each = len(tensors) // (layers * directions)
    grouped = []
    for start in range(0, len(tensors), each):
        w_ih, w_hh, *rest = tensors[start : start + each]
        w_hr = rest[-1] if len(rest) % 2 else None
        b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
        grouped.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr))
    return [tuple(grouped[k : k + directions]) for k in range(0, len(grouped), directions)]


def stack_layers(
    x: Tensor,
    initial: States,
    layers: Sequence[LayerWeights],
    run: Callable[[Tensor, States, LayerWeights], tuple[Tensor, States]],
    dropout: float = 0.0,
) -> tuple[Tensor, States]:
    """Run the layers, one upon the other's output, with dropout between them; states (L·D, N, P)."""
    lasts: list[States] = []
    for k, weights in enumerate(layers):
        if k and dropout:
            x = F.dropout(x, dropout)
        D = len(weights)
        x, last = run(x, initial if len(layers) == 1 else tuple(h[k * D : (k + 1) * D] for h in initial), weights)
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
