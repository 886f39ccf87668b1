"""Reads the configuration and the weights of a Keras layer, without importing Keras.

https://keras.io/api/layers/recurrent_layers/gru/ and the pages beside it. Keras 3 on any backend, and tf_keras.
I input, H hidden.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GATE_ORDER = {"GRU": (1, 0, 2), "LSTM": (0, 1, 2, 3), "SimpleRNN": (0,)}
"""For each of PyTorch's gates (r, z, n; i, f, g, o), its index in Keras's order (z, r, h; i, f, c, o)."""
SAME_IN_BOTH = ("units", "use_bias", "activation", "recurrent_activation", "reset_after")


class KerasLayer(NamedTuple):
    input_size: int
    hidden_size: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    nonlinearity: str
    dtype: torch.dtype
    weights: dict[str, Tensor]
    """By torch.nn's names, in its layout"""


def read_keras(layer: Any, kind: str) -> KerasLayer:
    """Read a built Keras layer of a kind (GRU, LSTM, SimpleRNN), or a Bidirectional of one.

    Raises:
        TypeError: `layer` is of another kind.
        ValueError: It has no weights yet, or does not compute torch.nn's equations.
    """
    both = "Bidirectional" in _kinds(layer)
    halves = [layer.forward_layer, layer.backward_layer] if both else [layer]
    for half in halves:
        if kind not in _kinds(half):
            name = f"{type(half).__module__.split('.')[0]}'s {type(half).__name__}"
            raise TypeError(
                f"expected a Keras {kind}, or a Bidirectional of one, got {'a Bidirectional of ' * both}{name}."
            )
    if not all(half.built for half in halves):
        raise ValueError("the Keras layer has no weights yet: call it once, or build((None, None, features)).")
    configs = [half.get_config() for half in halves]
    if both:
        _check_halves(layer.merge_mode, *configs)
    elif configs[0]["go_backwards"]:
        raise ValueError(
            "go_backwards=True reads sequences, padding included, from their end, which no layer of torch.nn does. "
            "Flip each sequence within its own length, or use a Bidirectional."
        )
    config = configs[0]
    for each in configs:
        _check(each, kind)
    weights: dict[str, Tensor] = {}
    for half, suffix in zip(halves, ("_l0", "_l0_reverse"), strict=False):
        weights.update(_weights(half.get_weights(), kind, config["use_bias"], suffix))
    first = weights["weight_ih_l0"]
    if len({weight.dtype for weight in weights.values()}) > 1:
        raise ValueError(
            "the Bidirectional's halves have weights of different dtypes. torch.nn's layers have one for both."
        )
    return KerasLayer(
        input_size=first.size(1),
        hidden_size=config["units"],
        bias=config["use_bias"],
        batch_first=not config.get("time_major", False),
        bidirectional=both,
        nonlinearity=config["activation"],
        dtype=first.dtype,
        weights=weights,
    )


def _kinds(layer: Any) -> set[str]:
    """Return the names of a layer's class and its base classes in Keras."""
    return {c.__name__ for c in type(layer).__mro__ if hasattr(c, "get_config")}


def _check_halves(merge_mode: str | None, forward: dict[str, Any], backward: dict[str, Any]) -> None:
    if merge_mode != "concat":
        raise ValueError(
            f"merge_mode={merge_mode!r}, but torch.nn's layers put the directions side by side (merge_mode='concat'). "
            "Convert with merge_mode='concat' and merge the halves of the output's last dimension yourself."
        )
    if forward["go_backwards"]:  # Keras itself checks that the halves differ
        raise ValueError("the Bidirectional's forward layer must run forwards, and its backward layer backwards.")
    for name in SAME_IN_BOTH:
        if forward.get(name) != backward.get(name):
            raise ValueError(
                f"the Bidirectional's halves differ: {name}={forward.get(name)!r} forwards, {backward.get(name)!r} "
                "backwards. torch.nn's layers have one for both."
            )


def _check(config: dict[str, Any], kind: str) -> None:
    if kind == "GRU" and not config["reset_after"]:
        raise ValueError(
            "reset_after=False applies the reset gate before the recurrent product; torch.nn.GRU applies it after. "
            "No weights make the two the same: train with reset_after=True, Keras's default."
        )
    known = {"activation": ("tanh", "relu") if kind == "SimpleRNN" else ("tanh",), "recurrent_activation": ("sigmoid",)}
    for name, values in known.items():
        if name in config and config[name] not in values:
            raise ValueError(
                f"{name}={config[name]!r}, but torch.nn's layer has {' or '.join(map(repr, values))} only."
            )
    if config["stateful"]:
        raise ValueError(
            "stateful=True keeps the state from batch to batch. Here it is handed on: output, state = layer(x, state). "
            "Set stateful = False on the Keras layer, then convert it."
        )
    for name in ("dropout", "recurrent_dropout"):
        if config[name]:
            where = "inputs: put nn.Dropout before it" if name == "dropout" else "state, which torch.nn's layers do not"
            warnings.warn(
                f"{name}={config[name]} is left out: in training, Keras drops elements of the layer's {where}.",
                UserWarning,
                stacklevel=5,
            )


def _weights(arrays: list[Any], kind: str, has_bias: bool, suffix: str) -> dict[str, Tensor]:
    """Convert kernels (I, gates·H), (H, gates·H) and a bias (gates·H). A GRU's (2, gates·H) holds b_ih and b_hh."""
    tensors = [_tensor(array, kind) for array in arrays]
    found = {f"weight_ih{suffix}": tensors[0], f"weight_hh{suffix}": tensors[1]}
    if has_bias:
        bias = tensors[2] if kind == "GRU" else torch.stack([tensors[2], torch.zeros_like(tensors[2])], -1)
        found.update({f"bias_ih{suffix}": bias[:, 0], f"bias_hh{suffix}": bias[:, 1]})
    return found


def _tensor(array: Any, kind: str) -> Tensor:
    """Return a transposed tensor with its gates in torch's order."""
    dtype = getattr(torch, str(array.dtype))  # via float64, because torch can't read NumPy's bfloat16
    gates = torch.from_numpy(np.asarray(array, np.float64)).t().chunk(len(GATE_ORDER[kind]))
    return torch.cat([gates[k] for k in GATE_ORDER[kind]]).to(dtype)
