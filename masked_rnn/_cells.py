"""The weights of a layer, and one step of each cell in the letters of torch.nn's docs.

I input, H hidden, P the state that is fed back (H, or proj_size), D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ._spec import configuration, expected_weights, spec_of
from ._torch import listed_weights

BackendName = Literal["auto", "packed", "padded", "bptt", "scan", "held"]
States = tuple[Tensor, ...]
"""(h,) or (h, c)"""


class Layer(Protocol):
    """The attributes of a layer that a call reads: `torch.nn`'s configuration, and our options."""

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

    def map(self, change: Callable[[Tensor], Tensor]) -> Weights:
        """Return the weights with `change` applied to each that is not None."""
        b_ih, b_hh, w_hr = (None if w is None else change(w) for w in self[2:])
        return Weights(change(self.w_ih), change(self.w_hh), b_ih, b_hh, w_hr)


LayerWeights = tuple[Weights, ...]
"""One for each direction."""
HOLD = 1e4
"""In every dtype, sigmoid(1e4) is 1 and sigmoid(-1e4) is 0: added to a gate's argument, it opens or shuts the gate."""


def read_weights(layer: Layer, traced: bool) -> list[Tensor]:
    """Return the weights in `torch.nn`'s order, of the shapes that the layer's configuration implies.

    `traced` says whether `torch.jit.trace` is recording.
    """
    listed = None if traced else listed_weights(layer)
    if listed is not None:
        spec = spec_of(layer)
        if not have_shapes(listed, spec.shapes):
            _refuse_weights(layer, listed, spec.names, spec.shapes)
        return listed
    # Attributes also give parametrized and functional weights.
    names, shapes = expected_weights(*configuration(layer))
    weights = [getattr(layer, name) for name in names]
    (_check_traced_weights if traced else _refuse_weights)(layer, weights, names, shapes)
    return weights


SHAPE_OF = attrgetter("shape")


def have_shapes(weights: Sequence[Tensor], shapes: list[torch.Size]) -> bool:
    try:
        return list(map(SHAPE_OF, weights)) == shapes
    except AttributeError:  # something that is no tensor stands in a parameter's place
        return False


def _refuse_weights(layer: Layer, weights: Sequence[Tensor], names: list[str], shapes: list[torch.Size]) -> None:
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


def _check_traced_weights(layer: Layer, weights: Sequence[Tensor], names: list[str], shapes: list[torch.Size]) -> None:
    """As `_refuse_weights`, without reading shapes: torch.jit.trace would record them, and fails for some weights."""
    for weight, name, shape in zip(weights, names, shapes, strict=True):
        if weight.dim() != len(shape) or weight.nbytes != shape.numel() * weight.element_size():
            raise RuntimeError(
                f"Expected {name} of size {list(shape)}, got another. Give the {type(layer).__name__} a weight of that "
                "size, or build a layer of the sizes that the weights have."
            )


def flatten_weights(layers: Iterable[LayerWeights]) -> list[Tensor]:
    """Return the weights as one list, in the order of `read_weights`."""
    return [t for layer in layers for w in layer for t in w if t is not None]


def group_weights(tensors: Sequence[Tensor], layers: int, directions: int) -> list[LayerWeights]:
    """Undo `flatten_weights`. A direction has two to five tensors: W_ih, W_hh, then the two biases, then W_hr."""
    each = len(tensors) // (layers * directions)
    grouped = []
    for start in range(0, len(tensors), each):
        w_ih, w_hh, *rest = tensors[start : start + each]
        w_hr = rest[-1] if len(rest) % 2 else None
        b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
        grouped.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr))
    return [tuple(grouped[k : k + directions]) for k in range(0, len(grouped), directions)]


def stack_layers(
    x: Tensor,  # as `run` takes it
    initial: States,  # each (L·D, N, P or H)
    layers: Sequence[LayerWeights],
    run: Callable[[Tensor, States, LayerWeights], tuple[Tensor, States]],
    dropout: float = 0.0,
) -> tuple[Tensor, States]:
    """Run the layers, each on the output of the one before, with dropout between them."""
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
