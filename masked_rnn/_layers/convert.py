"""Makes a masked layer from a layer of torch.nn, whose parameters it shares, or from a Keras layer."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._torch import forward_pre_hooks
from .keras import read_keras

SIZES = ("input_size", "hidden_size", "num_layers")
SHARED = ("bias", "batch_first", "dropout", "bidirectional")
"""With the sizes, the configuration that all kinds of layers have"""


def share_torch(kind: Any, source: Any, options: Mapping[str, Any], extra: Sequence[str]) -> Any:
    """Make a layer of class `kind` that shares the parameters of `source` and has its configuration and mode.

    `extra` names the attributes of `source` that are arguments of `kind` alone, as `proj_size` is of the LSTM.

    Raises:
        TypeError: `source` is not a layer of torch.nn of the same kind.
    """
    if not isinstance(source, kind._torch_layer):
        other = next((k.__name__ for k in (nn.GRU, nn.LSTM, nn.RNN) if isinstance(source, k)), None)
        cure = "" if other is None else f" Use Masked{other}.from_{other.lower()}."
        raise TypeError(f"expected an nn.{kind._torch_layer.__name__}, got {type(source).__name__}.{cure}")
    weight: Any = source.weight_ih_l0
    _check_options(kind, options, (*SIZES, *SHARED, "device", "dtype", *extra))
    sizes = [getattr(source, name) for name in SIZES]
    shared = {name: getattr(source, name) for name in (*SHARED, *extra)}
    layer = kind(*sizes, **shared, device="meta", dtype=weight.dtype, **options)
    _share_weights(layer, source)
    return layer.train(source.training)


def _check_options(kind: Any, options: Mapping[str, Any], taken: Collection[str]) -> None:
    """Refuse an argument that `kind` does not have, or that is `taken`, because the given layer decides it."""
    known = inspect.signature(kind).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name in options:
        if name in taken or (name not in known and not takes_all):
            raise TypeError(
                f"unexpected option {name}: the options are enforce_sorted, flatten_hidden and backend. The rest is "
                "taken from the given layer."
            )


def copy_keras(kind: Any, keras_layer: Any, device: Any, options: Mapping[str, Any]) -> Any:
    """Make a layer of class `kind` with the configuration and the weights of a Keras layer. Raises as `read_keras`."""
    keras_kind = "SimpleRNN" if kind._torch_layer is nn.RNN else kind._torch_layer.__name__
    _check_options(kind, options, (*SIZES, *SHARED, "dtype", "nonlinearity", "proj_size"))
    found = read_keras(keras_layer, keras_kind)
    layer = kind(
        found.input_size,
        found.hidden_size,
        bias=found.bias,
        batch_first=found.batch_first,
        bidirectional=found.bidirectional,
        device=device,
        dtype=found.dtype,
        **({"nonlinearity": found.nonlinearity} if keras_kind == "SimpleRNN" else {}),
        **options,
    )
    _copy_weights(layer, found.weights)
    return layer


@torch.no_grad()
def _copy_weights(layer: Any, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        getattr(layer, name).copy_(weight)


def _share_weights(layer: Any, source: Any) -> None:
    """Replace the layer's parameters with those of `source`, or with the tensors that they are computed from."""
    computed = False
    for name, _ in list(layer.named_parameters()):
        if parametrize.is_parametrized(source, name):
            parametrize.register_parametrization(layer, name, nn.Identity(), unsafe=True)
            layer.parametrizations[name] = source.parametrizations[name]
        elif isinstance(getattr(source, name), nn.Parameter):
            setattr(layer, name, getattr(source, name))
        else:  # a plain tensor that a hook, such as pruning's, computes before each call
            computed = True
            delattr(layer, name)
            setattr(layer, name, getattr(source, name))
    if computed:
        for name, parameter in source.named_parameters(recurse=False):
            layer.register_parameter(name, parameter)
        for name, buffer in source.named_buffers(recurse=False):
            layer.register_buffer(name, buffer)
        for hook, with_kwargs in forward_pre_hooks(source):
            layer.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
