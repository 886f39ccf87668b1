"""Errors in torch.nn's own words, with ours after them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from .._cells import Layer


def refusal(
    layer: Layer,
    kind: type[Exception],
    probe: Callable[[Any], Any],
    fallback: str = "",
    hint: str = "",
    **layer_options: Any,
) -> Exception:
    """Return the error to raise for a fault: in torch's words, followed by `hint`.

    `probe` passes the faulty argument to a torch.nn layer of the same configuration, made with `layer_options`. That
    layer is on the meta device, so it only checks its arguments. `fallback` takes the place of torch's words if torch
    raises nothing, and in compiled calls.
    """
    their = None
    if not torch.compiler.is_compiling():
        with suppress(Exception):  # some dtypes and transforms allow no new layer
            their = _layer_of_torch(layer, **layer_options)
    try:
        if their is not None:
            probe(their)
    except (RuntimeError, ValueError) as error:
        return type(error)(_joined(str(error), hint))
    except Exception:  # another error inside torch, whose message does not help
        pass
    return kind(_joined(fallback, hint))


def _layer_of_torch(layer: Any, **layer_options: Any) -> Any:
    projected = {"proj_size": layer.proj_size} if layer.proj_size else {}
    return layer._torch_layer(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        batch_first=layer.batch_first,
        bidirectional=layer.bidirectional,
        device="meta",
        **projected,
        **layer_options,
    )


def _joined(words: str, hint: str) -> str:
    return f"{words.rstrip('.')}. {hint}" if words and hint else words or hint
